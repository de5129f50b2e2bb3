// Classify one image with an exported model. Needs a C++17 compiler and ONNX Runtime's library, nothing else.
//
//     make
//     build/classify model.onnx image.png
//     build/classify model.onnx image.png --json
//
// The same program as ../classify.py, with the same inputs, answers, messages and exit codes: read there
// what it accepts. Exits 2, with one line on stderr, on an input that cannot be used.

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "onnxruntime/onnxruntime_c_api.h"

#ifdef CLASSIFY_JPEG
#include <csetjmp>

#include <jpeglib.h>
#endif

namespace {

// The oldest interface that has everything used here; every runtime that reads opset 20 has it.
constexpr uint32_t kApiVersion = 17;
constexpr uint64_t kMaxPixels = 100'000'000;
constexpr int64_t kMaxBatch = 4096;
constexpr long kMaxThreads = 1024;

using Bytes = std::vector<uint8_t>;

struct Failure : std::exception {
  explicit Failure(std::string said) : words(std::move(said)) {}
  const char* what() const noexcept override { return words.c_str(); }
  std::string words;
};
struct Unusable : Failure {  // an input that this runner cannot use
  using Failure::Failure;
};
struct Damaged : Failure {  // a file that is not what it claims to be; gets its name on the way up
  using Failure::Failure;
};

std::string text(uint64_t number) { return std::to_string(number); }

std::string extent(uint64_t width, uint64_t height) { return text(width) + "x" + text(height); }

// ---------------------------------------------------------------------------------------------- files

Bytes read_file(const std::string& path) {
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) throw Unusable(path + ": " + std::strerror(errno));
  Bytes data;
  uint8_t block[1 << 16];
  while (size_t count = std::fread(block, 1, sizeof block, file.get())) {
    data.insert(data.end(), block, block + count);
  }
  if (std::ferror(file.get())) throw Unusable(path + ": " + std::strerror(errno));
  return data;
}

bool starts_with(const Bytes& data, const char* beginning, size_t length) {
  return data.size() >= length && std::memcmp(data.data(), beginning, length) == 0;
}

struct Pixels {  // [height, width, channels]
  uint32_t width, height, channels;
  Bytes values;
};
struct Tensor {  // [channels, height, width]
  uint64_t channels, height, width;
  std::vector<float> values;
};
using Input = std::variant<Pixels, Tensor>;

uint64_t checked(uint64_t width, uint64_t height) {
  // Each factor alone first, so that the product cannot overflow.
  if (width < 1 || height < 1 || width > kMaxPixels || height > kMaxPixels || width * height > kMaxPixels) {
    throw Unusable("an image of " + extent(width, height) + " pixels is not read");
  }
  return width * height;
}

// ------------------------------------------------------------- inflate: RFC 1950 (zlib), RFC 1951 (deflate)

struct InputEnds {};   // not damage by itself: the caller counts what came out
struct OutputFull {};

class Inflater {
 public:
  Inflater(const Bytes& data, size_t limit) : data_(data), limit_(limit) {}

  // At most ``limit`` bytes. Throws Damaged for a stream that is none.
  Bytes run() {
    try {
      header();
      bool last = false;
      while (!last) {
        last = bits(1) != 0;
        const uint32_t kind = bits(2);
        if (kind == 0) stored();
        else if (kind == 1) fixed();
        else if (kind == 2) dynamic();
        else fail();
      }
      checksum();
    } catch (const InputEnds&) {
    } catch (const OutputFull&) {
    }
    return std::move(out_);
  }

 private:
  struct Code {  // canonical Huffman: how many codes of each length, and their symbols in order
    uint16_t count[16] = {};
    std::vector<uint16_t> symbols;
    bool complete = false;
  };

  [[noreturn]] static void fail() { throw Damaged("the pixels cannot be decompressed"); }

  uint32_t bits(int wanted) {
    while (held_ < wanted) {
      if (position_ == data_.size()) throw InputEnds();
      buffer_ |= static_cast<uint64_t>(data_[position_++]) << held_;
      held_ += 8;
    }
    const auto value = static_cast<uint32_t>(buffer_ & ((uint64_t{1} << wanted) - 1));
    buffer_ >>= wanted;
    held_ -= wanted;
    return value;
  }

  void align() { bits(held_ % 8); }

  void put(uint8_t value) {
    if (out_.size() == limit_) throw OutputFull();
    out_.push_back(value);
  }

  void header() {
    const uint32_t method = bits(8), flags = bits(8);
    const bool sound = (method * 256 + flags) % 31 == 0 && method % 16 == 8 && method / 16 <= 7;
    if (!sound) fail();
    if (flags & 32) {  // a preset dictionary, of which the checksum follows
      bits(16);
      bits(16);
      fail();
    }
  }

  void checksum() {  // Adler-32
    align();
    uint32_t a = 1, b = 0, expected = 0;
    for (int index = 0; index < 4; ++index) expected = expected << 8 | bits(8);
    for (const uint8_t value : out_) {
      a = (a + value) % 65521;
      b = (b + a) % 65521;
    }
    if (expected != (b << 16 | a)) fail();
  }

  void stored() {
    align();
    const uint32_t length = bits(16), complement = bits(16);
    if (length != (complement ^ 0xFFFF)) fail();
    for (uint32_t index = 0; index < length; ++index) {
      if (out_.size() == limit_) throw OutputFull();  // before the input may end
      put(static_cast<uint8_t>(bits(8)));
    }
  }

  static Code code(const uint8_t* lengths, size_t size, bool of_lengths) {
    Code made;
    for (size_t symbol = 0; symbol < size; ++symbol) ++made.count[lengths[symbol]];
    const bool none = made.count[0] == size;
    made.count[0] = 0;
    int left = 1, longest = 0;
    for (int length = 1; length < 16; ++length) {
      left = 2 * left - made.count[length];
      if (left < 0) fail();
      if (made.count[length]) longest = length;
    }
    made.complete = left == 0;
    // One code alone may be incomplete, and no code at all where none is used.
    if (!made.complete && (of_lengths || !(none || longest == 1))) fail();
    for (int length = 1; length < 16; ++length) {
      for (size_t symbol = 0; symbol < size; ++symbol) {
        if (lengths[symbol] == length) made.symbols.push_back(static_cast<uint16_t>(symbol));
      }
    }
    return made;
  }

  uint16_t symbol(const Code& from) {
    uint32_t value = 0, first = 0, index = 0;
    for (int length = 1; length < 16; ++length) {
      value |= bits(1);
      const uint32_t count = from.count[length];
      if (value < first + count) return from.symbols[index + value - first];
      if (!from.complete) fail();
      index += count;
      first = (first + count) * 2;
      value *= 2;
    }
    fail();
  }

  void fixed() {
    uint8_t lengths[288], distances[32];
    for (int each = 0; each < 288; ++each) {
      lengths[each] = each < 144 ? 8 : each < 256 ? 9 : each < 280 ? 7 : 8;
    }
    std::memset(distances, 5, sizeof distances);
    block(code(lengths, 288, false), code(distances, 32, false));
  }

  void dynamic() {
    static const uint8_t order[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    const uint32_t literals = bits(5) + 257, distances = bits(5) + 1, described = bits(4) + 4;
    if (literals > 286 || distances > 30) fail();
    uint8_t lengths[286 + 30] = {};
    for (uint32_t each = 0; each < described; ++each) lengths[order[each]] = static_cast<uint8_t>(bits(3));
    const Code meta = code(lengths, 19, true);
    std::memset(lengths, 0, sizeof lengths);
    for (uint32_t done = 0; done < literals + distances;) {
      const uint16_t found = symbol(meta);
      uint8_t value = 0;
      uint32_t repeat = 1;
      if (found < 16) {
        value = static_cast<uint8_t>(found);
      } else if (found == 16) {
        if (done == 0) fail();
        value = lengths[done - 1];
        repeat = 3 + bits(2);
      } else {
        repeat = found == 17 ? 3 + bits(3) : 11 + bits(7);
      }
      if (done + repeat > literals + distances) fail();
      while (repeat--) lengths[done++] = value;
    }
    if (lengths[256] == 0) fail();  // such a block would never end
    block(code(lengths, literals, false), code(lengths + literals, distances, false));
  }

  void block(const Code& literals, const Code& distances) {
    static const uint16_t length_base[29] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                             31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
    static const uint8_t length_extra[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                             2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
    static const uint16_t distance_base[30] = {1,   2,   3,   4,   5,   7,    9,    13,   17,   25,
                                               33,  49,  65,  97,  129, 193,  257,  385,  513,  769,
                                               1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
    for (;;) {
      uint16_t found = symbol(literals);
      if (found == 256) return;
      if (found < 256) {
        put(static_cast<uint8_t>(found));
        continue;
      }
      found -= 257;
      if (found >= 29) fail();
      uint32_t length = length_base[found] + bits(length_extra[found]);
      const uint16_t far = symbol(distances);
      if (far >= 30) fail();
      const size_t distance = distance_base[far] + bits(far < 2 ? 0 : far / 2 - 1);
      if (out_.size() == limit_) throw OutputFull();  // what lies behind the last pixel is nobody's business
      if (distance > out_.size()) fail();
      while (length--) put(out_[out_.size() - distance]);
    }
  }

  const Bytes& data_;
  const size_t limit_;
  size_t position_ = 0;
  uint64_t buffer_ = 0;
  int held_ = 0;
  Bytes out_;
};

// ---------------------------------------------------------------------------------------------- PNG

constexpr char kTransparent[] = "transparency is not read; save the image without it";

uint32_t big_endian(const uint8_t* at) {
  return static_cast<uint32_t>(at[0]) << 24 | static_cast<uint32_t>(at[1]) << 16 |
         static_cast<uint32_t>(at[2]) << 8 | at[3];
}

uint32_t crc32(const uint8_t* data, size_t size) {
  uint32_t sum = 0xFFFFFFFF;
  for (size_t index = 0; index < size; ++index) {
    sum ^= data[index];
    for (int bit = 0; bit < 8; ++bit) sum = sum >> 1 ^ (sum & 1 ? 0xEDB88320 : 0);
  }
  return ~sum;
}

uint8_t paeth(int left, int up, int corner) {
  const int to_left = std::abs(up - corner), to_up = std::abs(left - corner);
  const int to_corner = std::abs(left + up - 2 * corner);
  if (to_left <= to_up && to_left <= to_corner) return static_cast<uint8_t>(left);
  return static_cast<uint8_t>(to_up <= to_corner ? up : corner);
}

// Undo the per-row prediction (W3C PNG, section 9): [height, 1 + width * channels] -> Pixels.
Pixels unfilter(const Bytes& rows, uint32_t width, uint32_t height, uint32_t channels) {
  const size_t stride = static_cast<size_t>(width) * channels;
  Pixels image{width, height, channels, Bytes(stride * height)};
  const Bytes nothing(stride, 0);
  for (uint32_t row = 0; row < height; ++row) {
    const uint8_t* from = rows.data() + row * (stride + 1);
    const uint8_t kind = *from++;
    if (kind > 4) throw Damaged("row filter " + text(kind));
    uint8_t* line = image.values.data() + row * stride;
    const uint8_t* above = row ? line - stride : nothing.data();
    for (size_t index = 0; index < stride; ++index) {
      const int up = above[index];
      const int left = index < channels ? 0 : line[index - channels];
      const int corner = index < channels ? 0 : above[index - channels];
      const int guess = kind == 0   ? 0
                        : kind == 1 ? left
                        : kind == 2 ? up
                        : kind == 3 ? (left + up) / 2
                                    : paeth(left, up, corner);
      line[index] = static_cast<uint8_t>(from[index] + guess);
    }
  }
  return image;
}

// 8 bits per sample; an alpha channel must be opaque throughout.
Pixels decode_png(const Bytes& data) {
  const uint8_t* header = nullptr;
  Bytes compressed;
  for (size_t position = 8; position < data.size();) {
    if (data.size() - position < 12) throw Damaged("the file ends early");
    const uint8_t* chunk = data.data() + position;
    const uint32_t length = big_endian(chunk);
    if (data.size() - position - 12 < length) throw Damaged("the file ends early");
    const uint8_t* body = chunk + 8;
    if (crc32(chunk + 4, size_t{length} + 4) != big_endian(body + length)) {
      throw Damaged("checksum of the chunk at byte " + text(position));
    }
    const auto is = [chunk](const char* kind) { return std::memcmp(chunk + 4, kind, 4) == 0; };
    if (is("IHDR")) {
      if (length != 13) throw Damaged("the header is too long or too short");
      header = body;
    } else if (is("IDAT")) {
      compressed.insert(compressed.end(), body, body + length);
    } else if (is("tRNS")) {
      throw Unusable(kTransparent);
    } else if (is("IEND")) {
      break;
    }
    position += size_t{12} + length;
  }
  if (!header) throw Damaged("no header");
  const uint32_t width = big_endian(header), height = big_endian(header + 4);
  const uint8_t depth = header[8], color = header[9], interlaced = header[12];
  const uint32_t channels = color == 0 ? 1 : color == 2 ? 3 : color == 4 ? 2 : color == 6 ? 4 : 0;
  if (depth != 8 || interlaced || !channels) {
    throw Unusable("only PNG of 8 bits per channel, gray or color, not interlaced, is read");
  }
  const size_t size = static_cast<size_t>(checked(width, height)) * channels + height;
  const Bytes rows = Inflater(compressed, size).run();
  if (rows.size() != size) throw Damaged("too few pixels");
  Pixels image = unfilter(rows, width, height, channels);
  if (channels % 2) return image;
  Pixels opaque{width, height, channels - 1, Bytes()};
  for (size_t index = 0; index < image.values.size(); ++index) {
    if (index % channels != channels - 1) opaque.values.push_back(image.values[index]);
    else if (image.values[index] != 255) throw Unusable(kTransparent);
  }
  return opaque;
}

// ---------------------------------------------------------------------------------------------- PGM, PPM

bool is_number(const std::string& field) {
  if (field.empty() || field.size() > 9) return false;
  for (const char each : field) {
    if (each < '0' || each > '9') return false;
  }
  return true;
}

bool is_space(uint8_t each) { return each == ' ' || (each >= '\t' && each <= '\r'); }

Pixels decode_pnm(const Bytes& data) {
  std::vector<std::string> fields;
  size_t position = 0;
  while (fields.size() < 4) {
    if (position == data.size()) throw Damaged("the header ends early");
    if (is_space(data[position])) {
      ++position;
    } else if (data[position] == '#') {
      while (position < data.size() && data[position++] != '\n') {
      }
    } else {
      std::string field;
      while (position < data.size() && !is_space(data[position])) {
        field.push_back(static_cast<char>(data[position++]));
      }
      fields.push_back(field);
    }
  }
  const bool gray = fields[0] == "P5";
  const bool numbers = is_number(fields[1]) && is_number(fields[2]) && is_number(fields[3]);
  if ((!gray && fields[0] != "P6") || !numbers) {
    throw Damaged("the header is not that of PGM or PPM");
  }
  const auto width = static_cast<uint32_t>(std::stoul(fields[1]));
  const auto height = static_cast<uint32_t>(std::stoul(fields[2]));
  if (std::stoul(fields[3]) != 255) {
    throw Unusable("the largest sample is " + text(std::stoul(fields[3])) + ", only 255 (8 bits) is read");
  }
  const uint32_t channels = gray ? 1 : 3;
  const size_t count = static_cast<size_t>(checked(width, height)) * channels;
  // One space ends the header, where the file goes on at all.
  if (data.size() < position + 1 || data.size() - position - 1 < count) throw Damaged("too few pixels");
  const uint8_t* first = data.data() + position + 1;
  return {width, height, channels, Bytes(first, first + count)};
}

// ---------------------------------------------------------------------------------------------- .npy

// What stands between ``before`` and ``after`` at ``position``, which moves on behind it.
std::string between(const std::string& header, size_t& position, const char* before, const char* after) {
  const size_t start = position + std::strlen(before);
  const size_t end = header.compare(position, std::strlen(before), before) == 0 ? header.find(after, start)
                                                                                  : std::string::npos;
  if (end == std::string::npos) throw Damaged("the header is not that of one array");
  position = end + std::strlen(after);
  return header.substr(start, end - start);
}

std::vector<uint64_t> extents(std::string listed) {  // a Python tuple: "3, 8, 8", "5," or nothing
  std::vector<uint64_t> found;
  if (listed.empty()) return found;
  if (listed.find(", ") == std::string::npos) {
    if (listed.back() != ',') throw Damaged("the header is not that of one array");
    listed.pop_back();
  }
  for (size_t position = 0; position <= listed.size();) {
    const size_t end = std::min(listed.find(", ", position), listed.size());
    const std::string field = listed.substr(position, end - position);
    if (!is_number(field)) throw Damaged("the header is not that of one array");
    found.push_back(std::stoul(field));
    position = end + 2;
  }
  return found;
}

// What numpy.save writes: uint8 [H, W] or [H, W, C], or float32 [C, H, W].
Input decode_npy(const Bytes& data) {
  const size_t width = data.size() > 6 && data[6] == 1 ? 2 : 4;
  uint64_t length = 0;
  for (size_t index = width; index-- > 0;) {
    length = length << 8 | (data.size() > 8 + index ? data[8 + index] : 0);
  }
  const uint64_t start = 8 + width + length;
  if (data.size() < start) throw Damaged("the header is not that of one array");
  const std::string header(reinterpret_cast<const char*>(data.data()) + 8 + width, length);
  size_t position = 0;
  const std::string kind = between(header, position, "{'descr': '", "', ");
  const std::string order = between(header, position, "'fortran_order': ", ", ");
  const std::vector<uint64_t> shape = extents(between(header, position, "'shape': (", "), }"));
  const bool fortran = order == "True";
  bool sound = !kind.empty() && kind.size() < 10 && (fortran || order == "False");
  for (const char each : kind) {
    sound = sound && (std::isalnum(static_cast<uint8_t>(each)) || std::memchr("<>|=", each, 4));
  }
  sound = sound && header.find_first_not_of(" \n", position) == std::string::npos;
  if (!sound) throw Damaged("the header is not that of one array");
  const bool bytes = kind == "|u1" && (shape.size() == 2 || shape.size() == 3);
  if (!bytes && !(kind == "<f4" && shape.size() == 3)) {
    std::string listed;
    for (const uint64_t each : shape) listed += (listed.empty() ? "" : ", ") + text(each);
    throw Unusable("the array is " + kind + " [" + listed + "]; it must be uint8 or float32, see --help");
  }
  // No extent exceeds the file, so that three of them multiply without overflow where it matters.
  const uint64_t room = (data.size() - start) / (bytes ? 1 : 4);
  uint64_t count = 1;
  for (const uint64_t each : shape) {
    if (each != 0 && count > room / each) throw Damaged("too few values");
    count *= each;
  }
  const uint64_t a = shape[0], b = shape[1], c = shape.size() == 3 ? shape[2] : 1;
  const uint8_t* values = data.data() + start;
  const auto place = [=](uint64_t index) {  // where the file keeps the value of this C-order index
    return fortran ? index / (b * c) + a * (index / c % b) + a * b * (index % c) : index;
  };
  if (bytes) {
    checked(b, a);
    Pixels image{static_cast<uint32_t>(b), static_cast<uint32_t>(a), static_cast<uint32_t>(c), Bytes(count)};
    for (uint64_t index = 0; index < count; ++index) image.values[index] = values[place(index)];
    return image;
  }
  Tensor tensor{a, b, c, std::vector<float>(count)};
  for (uint64_t index = 0; index < count; ++index) {
    const uint8_t* at = values + 4 * place(index);
    const uint32_t word = static_cast<uint32_t>(at[3]) << 24 | static_cast<uint32_t>(at[2]) << 16 |
                          static_cast<uint32_t>(at[1]) << 8 | at[0];
    std::memcpy(&tensor.values[index], &word, 4);
    if (!std::isfinite(tensor.values[index])) throw Unusable("the array holds values that are not finite");
  }
  return tensor;
}

void dump(const Tensor& tensor, const std::string& path) {
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + text(tensor.channels) + ", " +
                       text(tensor.height) + ", " + text(tensor.width) + "), }";
  while ((10 + header.size() + 1) % 64) header.push_back(' ');
  header.push_back('\n');
  const auto length = static_cast<uint16_t>(header.size());
  const uint8_t magic[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, static_cast<uint8_t>(length & 255),
                             static_cast<uint8_t>(length >> 8)};
  Bytes content(magic, magic + 10);
  content.insert(content.end(), header.begin(), header.end());
  for (const float value : tensor.values) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    for (int shift = 0; shift < 32; shift += 8) content.push_back(static_cast<uint8_t>(word >> shift));
  }
  std::FILE* file = std::fopen(path.c_str(), "wb");
  if (!file) throw Unusable(path + ": " + std::strerror(errno));
  const bool written = std::fwrite(content.data(), 1, content.size(), file) == content.size();
  const int reason = errno;
  if (std::fclose(file) != 0 || !written) {
    throw Unusable(path + ": " + std::strerror(written ? errno : reason));
  }
}

#ifdef CLASSIFY_JPEG
struct JpegEnds {
  jpeg_error_mgr manager;  // the first member: libjpeg knows no other
  std::jmp_buf place;
};

[[noreturn]] void jpeg_fails(j_common_ptr common) {
  std::longjmp(reinterpret_cast<JpegEnds*>(common->err)->place, 1);
}

// Decoded as Pillow does: the accurate integer transform, with smooth chroma. Nothing with a destructor lives
// between setjmp and longjmp but `image`, which is declared before.
bool decode_jpeg(const Bytes& data, Pixels& image, bool& colors) {
  jpeg_decompress_struct reader;
  JpegEnds ends;
  reader.err = jpeg_std_error(&ends.manager);
  ends.manager.error_exit = jpeg_fails;
  ends.manager.output_message = [](j_common_ptr) {};
  if (setjmp(ends.place)) {
    jpeg_destroy_decompress(&reader);
    return false;
  }
  jpeg_create_decompress(&reader);
  jpeg_mem_src(&reader, data.data(), data.size());
  jpeg_read_header(&reader, TRUE);
  colors = reader.num_components == 1 || reader.num_components == 3;
  const bool fits = uint64_t{reader.image_width} * reader.image_height <= kMaxPixels;
  if (!colors || !fits) {
    image.width = reader.image_width;
    image.height = reader.image_height;
    jpeg_destroy_decompress(&reader);
    return true;
  }
  reader.out_color_space = reader.num_components == 1 ? JCS_GRAYSCALE : JCS_RGB;
  reader.dct_method = JDCT_ISLOW;
  jpeg_start_decompress(&reader);
  image.width = reader.output_width;
  image.height = reader.output_height;
  image.channels = static_cast<uint32_t>(reader.output_components);
  image.values.resize(size_t{image.width} * image.height * image.channels);
  while (reader.output_scanline < reader.output_height) {
    JSAMPROW row = image.values.data() + size_t{reader.output_scanline} * image.width * image.channels;
    jpeg_read_scanlines(&reader, &row, 1);
  }
  jpeg_finish_decompress(&reader);
  const bool sound = ends.manager.num_warnings == 0;
  jpeg_destroy_decompress(&reader);
  return sound;
}
#endif

Input read_jpeg([[maybe_unused]] const Bytes& data) {
#ifdef CLASSIFY_JPEG
  Pixels image{0, 0, 0, Bytes()};
  bool colors = true;
  if (!decode_jpeg(data, image, colors)) throw Damaged("the JPEG data cannot be decoded");
  if (!colors) throw Unusable("only JPEG in gray or RGB is read");
  checked(image.width, image.height);
  return image;
#else
  throw Unusable("JPEG needs libjpeg-turbo: build this program with make JPEG=1");
#endif
}

Input read_input(const std::string& path) {
  const Bytes data = read_file(path);
  try {
    if (starts_with(data, "\x89PNG\r\n\x1a\n", 8)) return decode_png(data);
    if (starts_with(data, "P5", 2) || starts_with(data, "P6", 2)) return decode_pnm(data);
    if (starts_with(data, "\x93NUMPY", 6)) return decode_npy(data);
    if (starts_with(data, "\xff\xd8\xff", 3)) return read_jpeg(data);
  } catch (const Damaged& error) {
    throw Unusable(path + ": damaged: " + error.words);
  }
  throw Unusable(path + ": neither PNG, JPEG, PGM, PPM nor .npy");
}

// ------------------------------------------------------------------------------- JSON, as metadata holds it

struct Json {
  enum Kind { kNull, kBool, kInteger, kFraction, kText, kList, kObject } kind = kNull;
  double number = 0;
  std::string words;
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> members;

  const Json* member(const char* name) const {  // the last of that name, as Python's reader keeps it
    const Json* found = nullptr;
    for (const auto& each : members) {
      if (each.first == name) found = &each.second;
    }
    return found;
  }
};

struct NotJson {};

// What follows a backslash in a JSON string, and what it stands for.
constexpr char kLetters[] = "\"\\bfnrt/";
constexpr char kMeanings[] = "\"\\\b\f\n\r\t/";
constexpr size_t kMustEscape = 7;  // "/" may stand for itself

class JsonReader {
 public:
  explicit JsonReader(const std::string& content) : text_(content) {}

  Json read() {
    Json value = element(0);
    space();
    if (position_ != text_.size()) throw NotJson();
    return value;
  }

 private:
  static constexpr int kDeepest = 64;

  // The end of the text reads as NUL, which no JSON holds outside of a string.
  char peek() const { return position_ < text_.size() ? text_[position_] : '\0'; }
  void space() {
    while (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r') ++position_;
  }
  void expect(char wanted) {
    if (position_ >= text_.size() || text_[position_++] != wanted) throw NotJson();
  }
  bool take(const char* word) {
    const size_t length = std::strlen(word);
    if (text_.compare(position_, length, word) != 0) return false;
    position_ += length;
    return true;
  }

  Json element(int depth) {
    if (depth > kDeepest) throw NotJson();
    space();
    Json value;
    if (peek() == '{') {
      value.kind = Json::kObject;
      list('{', '}', [&] {
        space();
        std::string name = string();
        space();
        expect(':');
        value.members.emplace_back(std::move(name), element(depth + 1));
      });
    } else if (peek() == '[') {
      value.kind = Json::kList;
      list('[', ']', [&] { value.items.push_back(element(depth + 1)); });
    } else if (peek() == '"') {
      value.kind = Json::kText;
      value.words = string();
    } else if (take("true") || take("false")) {
      value.kind = Json::kBool;
    } else if (!take("null")) {
      number(value);
    }
    return value;
  }

  template <typename Each>
  void list(char opening, char closing, Each each) {
    expect(opening);
    space();
    if (peek() == closing) {
      ++position_;
      return;
    }
    for (;;) {
      each();
      space();
      if (peek() == closing) {
        ++position_;
        return;
      }
      expect(',');
    }
  }

  void digits() {
    if (!std::isdigit(static_cast<uint8_t>(peek()))) throw NotJson();
    while (std::isdigit(static_cast<uint8_t>(peek()))) ++position_;
  }

  void number(Json& value) {
    const size_t start = position_;
    value.kind = Json::kInteger;
    if (peek() == '-') ++position_;
    if (peek() == '0') ++position_;
    else digits();
    if (peek() == '.') {
      value.kind = Json::kFraction;
      ++position_;
      digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      value.kind = Json::kFraction;
      ++position_;
      if (peek() == '+' || peek() == '-') ++position_;
      digits();
    }
    value.number = std::strtod(text_.substr(start, position_ - start).c_str(), nullptr);
  }

  uint32_t four_hex() {
    uint32_t value = 0;
    for (int index = 0; index < 4; ++index) {
      const char each = peek();
      if (!std::isxdigit(static_cast<uint8_t>(each))) throw NotJson();
      const bool digit = each >= '0' && each <= '9';
      value = value * 16 + static_cast<uint32_t>(digit ? each - '0' : (each | 32) - 'a' + 10);
      ++position_;
    }
    return value;
  }

  std::string string() {
    expect('"');
    std::string found;
    for (;;) {
      if (position_ == text_.size()) throw NotJson();
      const char each = text_[position_++];
      if (each == '"') return found;
      if (static_cast<uint8_t>(each) < 32) throw NotJson();
      if (each != '\\') {
        found.push_back(each);
        continue;
      }
      const char escaped = peek();
      ++position_;
      const char* known = escaped == '\0' ? nullptr : std::strchr(kLetters, escaped);
      if (known) found.push_back(kMeanings[known - kLetters]);
      else if (escaped == 'u') append(found, code_point());
      else throw NotJson();
    }
  }

  uint32_t code_point() {
    const uint32_t first = four_hex();
    if (first < 0xD800 || first > 0xDFFF) return first;
    if (first > 0xDBFF || !take("\\u")) throw NotJson();
    const uint32_t second = four_hex();
    if (second < 0xDC00 || second > 0xDFFF) throw NotJson();
    return 0x10000 + (first - 0xD800) * 1024 + (second - 0xDC00);
  }

  static void append(std::string& to, uint32_t point) {  // as UTF-8
    if (point < 0x80) {
      to.push_back(static_cast<char>(point));
      return;
    }
    const int more = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
    to.push_back(static_cast<char>((0xFF00 >> (more + 1) & 0xFF) | point >> 6 * more));
    for (int each = more - 1; each >= 0; --each) {
      to.push_back(static_cast<char>(0x80 | (point >> 6 * each & 0x3F)));
    }
  }

  const std::string& text_;
  size_t position_ = 0;
};

// The code point at ``position`` of UTF-8, which moves on; nothing where the text is not UTF-8.
std::optional<uint32_t> next_point(const std::string& from, size_t& position) {
  const auto first = static_cast<uint8_t>(from[position++]);
  if (first < 0x80) return first;
  const int more = first >= 0xF0 ? 3 : first >= 0xE0 ? 2 : 1;
  if (first < 0xC2 || first > 0xF4 || from.size() - position < static_cast<size_t>(more)) return std::nullopt;
  uint32_t point = first & (0x3F >> more);
  for (int each = 0; each < more; ++each) {
    const auto following = static_cast<uint8_t>(from[position++]);
    if (following >> 6 != 2) return std::nullopt;
    point = point << 6 | (following & 0x3F);
  }
  static const uint32_t least[4] = {0, 0x80, 0x800, 0x10000};
  if (point < least[more] || point > 0x10FFFF || (point >= 0xD800 && point <= 0xDFFF)) return std::nullopt;
  return point;
}

bool is_utf8(const std::string& words) {
  for (size_t position = 0; position < words.size();) {
    if (!next_point(words, position)) return false;
  }
  return true;
}

std::string quoted(const std::string& words) {  // a JSON string in ASCII
  std::string found = "\"";
  char escape[16];
  for (size_t position = 0; position < words.size();) {
    const uint32_t point = *next_point(words, position);
    const void* known = point < 128 ? std::memchr(kMeanings, static_cast<int>(point), kMustEscape) : nullptr;
    if (known) {
      found.push_back('\\');
      found.push_back(kLetters[static_cast<const char*>(known) - kMeanings]);
    } else if (point >= 32 && point < 127) {
      found.push_back(static_cast<char>(point));
    } else if (point < 0x10000) {
      std::snprintf(escape, sizeof escape, "\\u%04x", point);
      found += escape;
    } else {
      std::snprintf(escape, sizeof escape, "\\u%04x\\u%04x", 0xD800 + ((point - 0x10000) >> 10),
                    0xDC00 + ((point - 0x10000) & 1023));
      found += escape;
    }
  }
  return found + "\"";
}

std::string json_number(double value) {  // the fewest digits that read back as the same number
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  char digits[40];
  for (int precision = 1; precision <= 17; ++precision) {
    std::snprintf(digits, sizeof digits, "%.*g", precision, value);
    if (std::strtod(digits, nullptr) == value) break;
  }
  const std::string found = digits;
  return found.find_first_of(".e") == std::string::npos ? found + ".0" : found;
}

// ---------------------------------------------------------------------------------------------- the model

struct Preprocessing {
  std::optional<uint32_t> resize, crop;
  double low = 0, high = 1;
};
struct Layout {
  std::string input, output;
  int64_t batch = 1;
  uint64_t channels = 0, height = 0, width = 0;
  Preprocessing preprocessing;
  std::vector<std::string> names;
};

std::optional<uint32_t> pixels_of(const Json* value) {  // a positive whole number, or null
  if (!value || value->kind == Json::kNull) return std::nullopt;
  if (value->kind != Json::kInteger || value->number < 1 || value->number > kMaxPixels) throw NotJson();
  return static_cast<uint32_t>(value->number);
}

Preprocessing read_preprocessing(const Json& from) {
  if (from.kind != Json::kObject) throw NotJson();
  const Json* order = from.member("channel_order");
  const bool words = order && order->kind == Json::kText;
  if (order && !(words && (order->words == "L" || order->words == "RGB"))) throw NotJson();
  Preprocessing found;
  found.resize = pixels_of(from.member("resize"));
  found.crop = pixels_of(from.member("crop"));
  if (const Json* limits = from.member("value_range")) {
    if (limits->kind != Json::kList || limits->items.size() != 2) throw NotJson();
    for (const Json& limit : limits->items) {
      const bool number = limit.kind == Json::kInteger || limit.kind == Json::kFraction;
      if (!number || !(std::fabs(limit.number) <= 1e6)) throw NotJson();
    }
    found.low = limits->items[0].number;
    found.high = limits->items[1].number;
  }
  return found;
}

std::vector<std::string> read_names(const Json& from) {
  if (from.kind != Json::kList) throw NotJson();
  std::vector<std::string> names;
  for (const Json& each : from.items) {
    if (each.kind != Json::kText) throw NotJson();
    names.push_back(each.words);
  }
  return names;
}

template <typename T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

// ONNX Runtime's C interface with errors as exceptions, and objects that clean up after themselves.
class Model {
 public:
  Model(const std::string& path, int threads) {
    const Bytes content = read_file(path);
    if (content.empty()) throw Unusable(path + ": the file is empty");
    try {
      open(content, threads);
    } catch (const Refusal& refusal) {
      throw Unusable(path + ": ONNX Runtime refuses it: " + refusal.words);
    }
    layout_ = describe();
  }

  const Layout& layout() const { return layout_; }

  // The logits of one image; a fixed batch is filled up with copies.
  std::vector<float> run(const Tensor& tensor) const {
    std::vector<float> batch;
    for (int64_t index = 0; index < layout_.batch; ++index) {
      batch.insert(batch.end(), tensor.values.begin(), tensor.values.end());
    }
    const int64_t shape[4] = {layout_.batch, static_cast<int64_t>(tensor.channels),
                              static_cast<int64_t>(tensor.height), static_cast<int64_t>(tensor.width)};
    try {
      return outputs(batch, shape);
    } catch (const Refusal& refusal) {
      throw Unusable("ONNX Runtime cannot run the model: " + refusal.words);
    }
  }

 private:
  struct Refusal : Failure {
    using Failure::Failure;
  };

  static const OrtApi& api() {
    static const OrtApi* const found = OrtGetApiBase()->GetApi(kApiVersion);
    if (!found) {
      throw Unusable("this ONNX Runtime is too old; 1." + text(kApiVersion) + " or later is needed");
    }
    return *found;
  }

  static void check(OrtStatus* status) {
    if (!status) return;
    std::string words = api().GetErrorMessage(status);
    api().ReleaseStatus(status);
    throw Refusal(words.substr(0, words.find('\n')));
  }

  void open(const Bytes& content, int threads) {
    OrtEnv* env = nullptr;
    check(api().CreateEnv(ORT_LOGGING_LEVEL_FATAL, "classify", &env));
    env_ = {env, api().ReleaseEnv};
    OrtSessionOptions* made = nullptr;
    check(api().CreateSessionOptions(&made));
    const Owned<OrtSessionOptions> options(made, api().ReleaseSessionOptions);
    check(api().SetIntraOpNumThreads(made, threads));
    check(api().SetSessionLogSeverityLevel(made, ORT_LOGGING_LEVEL_FATAL));
    OrtSession* session = nullptr;
    check(api().CreateSessionFromArray(env, content.data(), content.size(), made, &session));
    session_ = {session, api().ReleaseSession};
    check(api().GetAllocatorWithDefaultOptions(&allocator_));
  }

  // Takes over a string that the runtime allocated.
  std::string taken(char* words) const {
    if (!words) return "";
    const std::string copy = words;
    check(api().AllocatorFree(allocator_, words));
    return copy;
  }

  Layout describe() const {
    try {
      Layout layout;
      input_layout(layout);
      size_t outputs = 0;
      check(api().SessionGetOutputCount(session_.get(), &outputs));
      if (outputs == 0) throw Unusable("the model's output is not float32 [batch, classes]");
      char* name = nullptr;
      check(api().SessionGetOutputName(session_.get(), 0, allocator_, &name));
      layout.output = taken(name);
      layout.preprocessing = understood("s2ap.preprocessing", "{}", read_preprocessing);
      layout.names = understood("s2ap.class_names", "[]", read_names);
      return layout;
    } catch (const Refusal& refusal) {
      throw Unusable("ONNX Runtime cannot describe the model: " + refusal.words);
    }
  }

  void input_layout(Layout& layout) const {
    size_t count = 0;
    check(api().SessionGetInputCount(session_.get(), &count));
    if (count != 1) {
      throw Unusable("the model has " + text(count) + " inputs, a classifier of images has one");
    }
    char* name = nullptr;
    check(api().SessionGetInputName(session_.get(), 0, allocator_, &name));
    layout.input = taken(name);
    OrtTypeInfo* type = nullptr;
    check(api().SessionGetInputTypeInfo(session_.get(), 0, &type));
    const Owned<OrtTypeInfo> owned(type, api().ReleaseTypeInfo);
    const OrtTensorTypeAndShapeInfo* info = nullptr;  // belongs to ``type``
    check(api().CastTypeInfoToTensorInfo(type, &info));
    ONNXTensorElementDataType element = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    if (info) check(api().GetTensorElementType(info, &element));
    if (element != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) throw Unusable("the model's input is not float32");
    size_t rank = 0;
    check(api().GetDimensionsCount(info, &rank));
    int64_t extents[4] = {};  // -1 where the model leaves it open
    if (rank == 4) check(api().GetDimensions(info, extents, 4));
    if (rank != 4 || extents[1] < 1 || extents[2] < 1 || extents[3] < 1 || extents[0] > kMaxBatch) {
      throw Unusable("the model's input is not [batch, channels, height, width] of a fixed size");
    }
    layout.batch = std::max<int64_t>(extents[0], 1);
    layout.channels = static_cast<uint64_t>(extents[1]);
    layout.height = static_cast<uint64_t>(extents[2]);
    layout.width = static_cast<uint64_t>(extents[3]);
  }

  template <typename T>
  T understood(const char* key, const char* otherwise, T (*read)(const Json&)) const {
    OrtModelMetadata* metadata = nullptr;
    check(api().SessionGetModelMetadata(session_.get(), &metadata));
    const Owned<OrtModelMetadata> owned(metadata, api().ReleaseModelMetadata);
    char* value = nullptr;
    check(api().ModelMetadataLookupCustomMetadataMap(metadata, allocator_, key, &value));
    const std::string content = value ? taken(value) : otherwise;
    try {
      if (!is_utf8(content)) throw NotJson();
      return read(JsonReader(content).read());
    } catch (const NotJson&) {
      throw Unusable(std::string("the model's metadata is not understood: ") + key);
    }
  }

  std::vector<float> outputs(std::vector<float>& batch, const int64_t (&shape)[4]) const {
    OrtMemoryInfo* memory = nullptr;
    check(api().CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    const Owned<OrtMemoryInfo> owned_memory(memory, api().ReleaseMemoryInfo);
    OrtValue* input = nullptr;
    check(api().CreateTensorWithDataAsOrtValue(memory, batch.data(), batch.size() * sizeof(float), shape, 4,
                                               ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &input));
    const Owned<OrtValue> owned_input(input, api().ReleaseValue);
    const char* input_name = layout_.input.c_str();
    const char* output_name = layout_.output.c_str();
    OrtValue* output = nullptr;
    check(api().Run(session_.get(), nullptr, &input_name, &input, 1, &output_name, 1, &output));
    const Owned<OrtValue> owned_output(output, api().ReleaseValue);
    return first_row(output);
  }

  static std::vector<float> first_row(OrtValue* output) {
    int tensor = 0;
    check(api().IsTensor(output, &tensor));
    ONNXTensorElementDataType element = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    size_t rank = 0;
    int64_t extents[2] = {};
    if (tensor) {
      OrtTensorTypeAndShapeInfo* info = nullptr;
      check(api().GetTensorTypeAndShape(output, &info));
      const Owned<OrtTensorTypeAndShapeInfo> owned(info, api().ReleaseTensorTypeAndShapeInfo);
      check(api().GetTensorElementType(info, &element));
      check(api().GetDimensionsCount(info, &rank));
      if (rank == 2) check(api().GetDimensions(info, extents, 2));
    }
    if (element != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || extents[0] < 1 || extents[1] < 1) {
      throw Unusable("the model's output is not float32 [batch, classes]");
    }
    void* values = nullptr;
    check(api().GetTensorMutableData(output, &values));
    const float* row = static_cast<const float*>(values);
    return std::vector<float>(row, row + extents[1]);
  }

  // In this order, so that the session goes before its environment.
  Owned<OrtEnv> env_{nullptr, nullptr};
  Owned<OrtSession> session_{nullptr, nullptr};
  OrtAllocator* allocator_ = nullptr;  // the runtime's own, never released
  Layout layout_;
};

// ---------------------------------------------------------------------------------------------- pixels

// Gray to color by repetition; color to gray by ITU-R BT.601 luma in 16-bit fixed point.
Pixels convert(Pixels image, uint64_t channels) {
  if (image.channels == channels) return image;
  Pixels found{image.width, image.height, static_cast<uint32_t>(channels), Bytes()};
  if (channels == 3 && image.channels == 1) {
    for (const uint8_t value : image.values) found.values.insert(found.values.end(), 3, value);
    return found;
  }
  if (channels == 1 && image.channels == 3) {
    for (size_t index = 0; index < image.values.size(); index += 3) {
      const uint8_t* at = image.values.data() + index;
      const uint32_t luma = at[0] * 19595u + at[1] * 38470u + at[2] * 7471u;
      found.values.push_back(static_cast<uint8_t>((luma + 0x8000) >> 16));
    }
    return found;
  }
  throw Unusable("the image has " + text(image.channels) + " channels, the model takes " + text(channels));
}

// Resize the rows of `image` to `size` columns with weights of 22 bits: bilinear with antialias, the bits of
// Pillow's Resample.c. `step` is the distance of neighbors, `line` that of rows, in pixels.
void resample(const Bytes& from, Bytes& to, uint32_t lines, uint32_t length, uint32_t size, uint32_t channels,
              size_t from_line, size_t from_step, size_t to_line, size_t to_step) {
  const double scale = static_cast<double>(length) / size, support = std::max(scale, 1.0);
  for (uint32_t index = 0; index < size; ++index) {
    const double middle = (index + 0.5) * scale;
    const auto first = static_cast<uint32_t>(std::max(middle - support + 0.5, 0.0));
    const auto last = std::min(static_cast<uint32_t>(middle + support + 0.5), length);
    std::vector<double> weights;
    double total = 0;
    for (uint32_t each = first; each < last; ++each) {
      weights.push_back(std::max(1.0 - std::fabs((each - middle + 0.5) * (1.0 / support)), 0.0));
      total += weights.back();
    }
    std::vector<int32_t> steps;
    for (const double weight : weights) steps.push_back(static_cast<int32_t>(0.5 + weight / total * (1 << 22)));
    for (uint32_t line = 0; line < lines; ++line) {
      for (uint32_t channel = 0; channel < channels; ++channel) {
        int64_t sum = 1 << 21;
        for (size_t each = 0; each < steps.size(); ++each) {
          sum += int64_t{steps[each]} * from[(line * from_line + (first + each) * from_step) * channels + channel];
        }
        to[(line * to_line + index * to_step) * channels + channel] =
            static_cast<uint8_t>(std::clamp<int64_t>(sum >> 22, 0, 255));
      }
    }
  }
}

Pixels shorter_side(Pixels image, uint32_t side) {
  const uint32_t width = image.width, height = image.height, channels = image.channels;
  if (side < width && height > uint64_t{2} * width) {
    throw Unusable("the image is " + extent(width, height) + "; scale its shorter side to " + text(side) +
                   " pixels first");
  }
  const double longer = static_cast<double>(uint64_t{side} * std::max(width, height)) / std::min(width, height);
  checked(side, longer < 1e9 ? static_cast<uint64_t>(longer) : kMaxPixels + 1);
  const uint32_t columns = width <= height ? side : static_cast<uint32_t>(longer);
  const uint32_t rows = width <= height ? static_cast<uint32_t>(longer) : side;
  Bytes across(size_t{height} * columns * channels), found(size_t{rows} * columns * channels);
  if (columns == width) across = std::move(image.values);
  else resample(image.values, across, height, width, columns, channels, width, 1, columns, 1);
  if (rows == height) found = std::move(across);
  else resample(across, found, columns, height, rows, channels, 1, columns, 1, columns);
  return Pixels{columns, rows, channels, std::move(found)};
}

uint32_t half_to_even(uint32_t number) { return number / 2 + (number % 2 && number / 2 % 2); }

Pixels center(const Pixels& image, uint32_t crop) {
  if (std::min(image.width, image.height) < crop) {
    throw Unusable("the image is " + extent(image.width, image.height) + ", smaller than the crop of " +
                   text(crop) + " pixels");
  }
  // Halves go to the even neighbor, as in the evaluation's crop.
  const size_t top = half_to_even(image.height - crop), left = half_to_even(image.width - crop);
  Pixels found{crop, crop, image.channels, Bytes()};
  for (size_t row = top; row < top + crop; ++row) {
    const uint8_t* first = image.values.data() + (row * image.width + left) * image.channels;
    found.values.insert(found.values.end(), first, first + size_t{crop} * image.channels);
  }
  return found;
}

Tensor prepare(Input input, const Layout& layout) {
  const uint64_t channels = layout.channels, height = layout.height, width = layout.width;
  if (auto* tensor = std::get_if<Tensor>(&input)) {
    if (tensor->channels == channels && tensor->height == height && tensor->width == width) {
      return std::move(*tensor);
    }
    const auto listed = [](uint64_t a, uint64_t b, uint64_t c) {
      return "[" + text(a) + ", " + text(b) + ", " + text(c) + "]";
    };
    throw Unusable("the tensor is " + listed(tensor->channels, tensor->height, tensor->width) +
                   ", the model takes " + listed(channels, height, width));
  }
  const Preprocessing& how = layout.preprocessing;
  Pixels image = convert(std::move(std::get<Pixels>(input)), channels);
  if (how.resize && std::min(image.width, image.height) != *how.resize) {
    image = shorter_side(std::move(image), *how.resize);
  }
  if (how.crop) image = center(image, *how.crop);
  if (image.width != width || image.height != height) {
    throw Unusable("the image is " + extent(image.width, image.height) + ", the model takes " +
                   extent(width, height));
  }
  Tensor tensor{channels, height, width, std::vector<float>(image.values.size())};
  const auto scale = static_cast<float>(how.high - how.low), shift = static_cast<float>(how.low);
  const bool scaled = how.low != 0 || how.high != 1;
  const size_t area = static_cast<size_t>(height) * width;
  for (size_t channel = 0; channel < channels; ++channel) {
    for (size_t index = 0; index < area; ++index) {
      const float value = static_cast<float>(image.values[index * channels + channel]) / 255.0f;
      // Two roundings: the Makefile forbids the compiler to fuse them.
      tensor.values[channel * area + index] = scaled ? value * scale + shift : value;
    }
  }
  return tensor;
}

// ---------------------------------------------------------------------------------------------- main

struct Options {
  std::string model, image, dump_input;
  bool json = false, help = false;
  int threads = 1;
};

Options parse(const std::vector<std::string>& arguments) {
  Options options;
  std::vector<std::string> files;
  for (size_t index = 0; index < arguments.size(); ++index) {
    std::string word = arguments[index], value;
    const bool named = word.compare(0, 2, "--") == 0;
    const size_t equals = named ? word.find('=') : std::string::npos;
    const bool joined = equals != std::string::npos;
    if (joined) {
      value = word.substr(equals + 1);
      word.resize(equals);
    }
    if (word == "--threads" || word == "--dump-input") {
      if (!joined && ++index == arguments.size()) throw Unusable(word + " needs a value");
      if (!joined) value = arguments[index];
      if (word == "--dump-input") {
        options.dump_input = value;
      } else {
        if (!is_number(value) || std::stol(value) > kMaxThreads) {
          throw Unusable("--threads is a number from 0 to " + std::to_string(kMaxThreads));
        }
        options.threads = static_cast<int>(std::stol(value));
      }
    } else if (word == "--json" && !joined) {
      options.json = true;
    } else if ((word == "--help" || word == "-h") && !joined) {
      options.help = true;
    } else if (named || (word.size() > 1 && word[0] == '-')) {
      throw Unusable("there is no option " + word + "; see --help");
    } else {
      files.push_back(word);
    }
  }
  if (options.help) return options;
  if (files.size() != 2) throw Unusable("give a model and an image; see --help");
  options.model = files[0];
  options.image = files[1];
  return options;
}

constexpr char kHelp[] =
    "usage: classify MODEL IMAGE [--json] [--threads N] [--dump-input FILE]\n"
    "\n"
    "Classify one image with an exported ONNX model.\n"
    "\n"
    "IMAGE is PNG (8 bits per channel, gray or color, not interlaced), PGM or PPM (binary, 8 bits),\n"
    "or .npy: uint8 [H, W] or [H, W, C] is an image, float32 [C, H, W] is taken as it is;\n"
    "JPEG where the program was built with JPEG=1.\n"
    "\n"
    "  --json             print one JSON object\n"
    "  --threads N        0 takes all cores (default: 1)\n"
    "  --dump-input FILE  keep the model's input as .npy\n";

void run(const Options& options) {
  const Model model(options.model, options.threads);
  const Layout& layout = model.layout();
  const Tensor tensor = prepare(read_input(options.image), layout);
  if (!options.dump_input.empty()) dump(tensor, options.dump_input);
  const std::vector<float> logits = model.run(tensor);
  size_t index = 0;  // of the largest; the first NaN counts as that, as in NumPy
  for (size_t each = 1; each < logits.size() && !std::isnan(logits[index]); ++each) {
    if (logits[each] > logits[index] || std::isnan(logits[each])) index = each;
  }
  const std::string name = index < layout.names.size() ? layout.names[index] : text(index);
  std::string line = "class " + text(index) + " (" + name + ")\nlogits";
  if (options.json) line = "{\"class\": " + quoted(name) + ", \"index\": " + text(index) + ", \"logits\": [";
  for (size_t each = 0; each < logits.size(); ++each) {
    char shown[40];
    std::snprintf(shown, sizeof shown, "%.6g", std::isnan(logits[each]) ? NAN : logits[each]);
    line += options.json ? (each ? ", " : "") + json_number(logits[each]) : std::string(" ") + shown;
  }
  line += options.json ? "]}\n" : "\n";
  std::fwrite(line.data(), 1, line.size(), stdout);
}

int guarded(const std::vector<std::string>& arguments) {
  try {
    const Options options = parse(arguments);
    if (options.help) std::fputs(kHelp, stdout);
    else run(options);
    return 0;
  } catch (const Failure& error) {
    std::fprintf(stderr, "classify: %s\n", error.what());
  } catch (const std::bad_alloc&) {
    std::fputs("classify: there is not enough memory\n", stderr);
  }
  return 2;
}

}  // namespace

#ifndef CLASSIFY_WITHOUT_MAIN  // the tests bring their own
int main(int count, char** words) { return guarded(std::vector<std::string>(words + 1, words + count)); }
#endif
