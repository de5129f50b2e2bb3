// Reads every file named on stdin with the C++ runner's own readers, and prints what each held as JSON lines.
// The tests compile it with sanitisers, so that a step out of bounds ends it.

#define CLASSIFY_WITHOUT_MAIN
#include "classify.cpp"

#include <iostream>

namespace {

template <typename T>
std::string listed(const std::vector<T>& values) {
  std::string found;
  for (const T value : values) found += (found.empty() ? "" : ", ") + json_number(static_cast<double>(value));
  return "[" + found + "]";
}

std::string image(const std::string& path) {
  const Input input = read_input(path);
  if (const auto* tensor = std::get_if<Tensor>(&input)) {
    return "{\"shape\": [" + text(tensor->channels) + ", " + text(tensor->height) + ", " + text(tensor->width) +
           "], \"values\": " + listed(tensor->values) + "}";
  }
  const auto& pixels = std::get<Pixels>(input);
  return "{\"shape\": [" + text(pixels.height) + ", " + text(pixels.width) + ", " + text(pixels.channels) +
         "], \"values\": " + listed(pixels.values) + "}";
}

std::string written(const Json& value) {
  std::string found;
  switch (value.kind) {
    case Json::kNull: return "null";
    case Json::kBool: return "true";  // the runner needs no truth values
    case Json::kInteger:
    case Json::kFraction: return json_number(value.number);
    case Json::kText: return quoted(value.words);
    case Json::kList:
      for (const Json& each : value.items) found += (found.empty() ? "" : ", ") + written(each);
      return "[" + found + "]";
    case Json::kObject:
      for (const auto& each : value.members) {
        found += (found.empty() ? "" : ", ") + quoted(each.first) + ": " + written(each.second);
      }
      return "{" + found + "}";
  }
  return "";
}

std::string json(const std::string& path) {
  const Bytes data = read_file(path);
  const std::string content(data.begin(), data.end());
  if (!is_utf8(content)) throw Unusable("not UTF-8");
  try {
    return written(JsonReader(content).read());
  } catch (const NotJson&) {
    throw Unusable("not JSON");
  }
}

}  // namespace

int main(int count, char** words) {
  const bool as_json = count > 1 && std::string(words[1]) == "--json";
  for (std::string path; std::getline(std::cin, path);) {
    try {
      std::cout << (as_json ? json(path) : image(path)) << "\n";
    } catch (const Unusable& error) {
      std::cout << "{\"error\": " << quoted(error.words) << "}\n";
    }
  }
}
