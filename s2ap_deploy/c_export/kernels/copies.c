/* Copies of a convolution's input, with zeros in place of padding. */
typedef struct {
  uint32_t channels, planes, height, width, plane; /* of the input: planes of a channel, floats between two */
  uint32_t copies, columns, extra, floats;         /* copies of a channel, columns, rows beyond the output's, floats */
  const int16_t *first; /* of each copy: the row and column that become row 0 and column 0 */
  const int32_t *from;  /* where that is, floats from the channel's first */
} copies;

INLINE void shift_vector(const float *in, float *out, const uint32_t *mask) {
  store(out, only(load(in), load_mask(mask)));
}

/* `n` floats of one copy in a row, at least a vector; the last vectors may overlap. */
INLINE void shift_floats(const float *in, float *out, const uint32_t *mask, size_t n) {
  size_t v = 0;
  for (; v + LANES <= n; v += LANES) shift_vector(in + v, out + v, mask + v);
  if (v < n) shift_vector(in + n - LANES, out + n - LANES, mask + n - LANES);
}

INLINE uint32_t inside(ptrdiff_t at, uint32_t size) { return at >= 0 && at < (ptrdiff_t)size ? 0xffffffffu : 0u; }

/* Which pixels of copy `i` lie inside of the image. */
INLINE void mask_copy(const copies *s, uint32_t *mask, ptrdiff_t at, size_t rows, size_t i) {
  ptrdiff_t row = at + s->first[2 * i], column = s->first[2 * i + 1];
  for (size_t y = 0; y < rows + s->extra; y++) {
    uint32_t there = inside(row + (ptrdiff_t)y, s->height);
    for (size_t x = 0; x < s->columns; x++) *mask++ = there & inside((ptrdiff_t)x + column, s->width);
  }
}

/* One copy of one channel: `rows` rows; what lies outside of the image is masked. */
INLINE void copy_one(const float *in, size_t width, float *out, size_t columns, const uint32_t *mask, size_t rows) {
  if (columns == width && rows * columns >= LANES) {
    shift_floats(in, out, mask, rows * columns);
    return;
  }
  for (size_t y = 0; y < rows; y++, in += width, out += columns, mask += columns) {
    if (columns >= LANES) {
      shift_floats(in, out, mask, columns);
    } else {
      for (size_t x = 0; x < columns; x++) out[x] = mask[x] ? in[x] : 0.0f;
    }
  }
}

/* All copies for `rows` rows of the output, from row `at` on. */
UNUSED static void copy_input(const copies *s, const float *in, float *out, uint32_t *mask, ptrdiff_t at,
                              size_t rows) {
  const size_t number = s->copies, floats = s->floats, width = s->width, columns = s->columns;
  const size_t next = (size_t)s->planes * s->plane;
  const ptrdiff_t channels = (ptrdiff_t)s->channels;
  const int32_t *const from = s->from;
  for (size_t i = 0; i < number; i++) mask_copy(s, mask + i * floats, at, rows, i);
  in += at * (ptrdiff_t)width;
  rows += s->extra;
  PARALLEL_FOR
  for (ptrdiff_t c = 0; c < channels; c++) {
    const float *source = in + (size_t)c * next;
    float *target = out + (size_t)c * number * floats;
    for (size_t i = 0; i < number; i++)
      copy_one(source + from[i], width, target + i * floats, columns, mask + i * floats, rows);
  }
}

/* The pixels of a row at even and at odd columns. */
INLINE void split_pairs(const float *restrict in, float *restrict even, float *restrict odd, size_t n) {
  for (size_t x = 0; x < n; x++) {
    even[x] = in[2 * x];
    odd[x] = in[2 * x + 1];
  }
}

/* The pixels of a row that lie `step` apart. */
INLINE void every_pixel(const float *restrict in, size_t step, float *restrict out, size_t n) {
  for (size_t x = 0; x < n; x++) out[x] = in[step * x];
}

/* Every plane split by rows and columns modulo a stride, zeros where the last ones are missing and between rows. */
UNUSED static void split(const float *in, const layout *from, float *out, const layout *to, size_t down, size_t right) {
  ptrdiff_t planes = (ptrdiff_t)(to->channels / right);
  PARALLEL_FOR
  for (ptrdiff_t n = 0; n < planes; n++) {
    size_t c = (size_t)n / down, row = (size_t)n % down;
    const float *source = in + c * from->plane;
    float *target = out + (size_t)n * right * to->plane;
    for (size_t y = 0; y < to->height; y++, row += down, target += to->row) {
      size_t there = row < from->height ? from->width / right : 0;
      const float *pixels = source + row * from->row;
      if (right == 2) split_pairs(pixels, target, target + to->plane, there);
      for (size_t column = 0; column < right; column++) {
        float *own = target + column * to->plane;
        size_t all = row < from->height && from->width > column ? (from->width - column + right - 1) / right : 0;
        size_t done = right == 2 ? there : 0;
        every_pixel(pixels + done * right + column, right, own + done, all - done);
        for (size_t x = all; x < to->row; x++) own[x] = 0.0f;
      }
    }
  }
}
