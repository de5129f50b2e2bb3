/* Copies of a convolution's input, with zeros in place of padding. */
typedef struct {
  uint32_t channels, planes, height, width, plane; /* of the input: planes of a channel, floats between two */
  uint32_t copies, columns, extra, floats;         /* copies of a channel, columns, rows beyond the output's, floats */
  const int16_t *first; /* of each copy: the plane, and its row and column that become row 0 and column 0 */
} copies;

/* The same `blocks` vectors of one copy, of every channel. */
INLINE void shift_vectors(size_t blocks, const copies *s, const float *in, float *out, const uint32_t *mask) {
  vec m[BLOCKS];
  size_t next = (size_t)s->planes * s->plane;
  UNROLL
  for (size_t b = 0; b < blocks; b++) memcpy(&m[b], mask + b * LANES, sizeof(vec));
  for (size_t c = 0; c < s->channels; c++, in += next, out += (size_t)s->copies * s->floats) {
    UNROLL
    for (size_t b = 0; b < blocks; b++) store(out + b * LANES, only(load(in + b * LANES), m[b]));
  }
}

/* `n` floats of one copy in a row, at least a vector, of every channel; the last vectors may overlap. */
INLINE void shift_floats(const copies *s, const float *in, float *out, const uint32_t *mask, size_t n) {
  for (size_t v = 0; v < n;) {
    size_t left = n - v, back = 0;
#if BLOCKS > 3
    if (left >= 5 * LANES) {
      shift_vectors(5, s, in + v, out + v, mask + v);
      v += 5 * LANES;
      continue;
    }
#endif
    if (left >= 2 * LANES) {
      shift_vectors(2, s, in + v, out + v, mask + v);
      v += 2 * LANES;
      continue;
    }
    if (left < LANES) back = LANES - left;
    shift_vectors(1, s, in + v - back, out + v - back, mask + v - back);
    v += LANES;
  }
}

INLINE uint32_t inside(ptrdiff_t at, uint32_t size) { return at >= 0 && at < (ptrdiff_t)size ? 0xffffffffu : 0u; }

/* Copy number `i`. Rows that begin at `at` in the output; what lies outside of the image is masked. */
INLINE void copy_one(const copies *s, const float *in, float *out, uint32_t *mask, ptrdiff_t at, size_t rows,
                     size_t i) {
  ptrdiff_t row = at + s->first[3 * i + 1], column = s->first[3 * i + 2], columns = (ptrdiff_t)s->columns;
  const float *source = in + (size_t)s->first[3 * i] * s->plane + row * (ptrdiff_t)s->width + column;
  float *target = out + i * s->floats;
  uint32_t *m = mask + i * s->floats;
  size_t all = (rows + s->extra) * s->columns;
  for (size_t y = 0; y < rows + s->extra; y++)
    for (ptrdiff_t x = 0; x < columns; x++)
      m[(ptrdiff_t)y * columns + x] = inside(row + (ptrdiff_t)y, s->height) & inside(x + column, s->width);
  if (s->columns == s->width && all >= LANES) {
    shift_floats(s, source, target, m, all);
  } else if (s->columns >= LANES) {
    for (size_t y = 0; y < rows + s->extra; y++)
      shift_floats(s, source + y * s->width, target + y * s->columns, m + y * s->columns, s->columns);
  } else {
    for (size_t c = 0; c < s->channels; c++)
      for (size_t y = 0; y < rows + s->extra; y++)
        for (size_t x = 0; x < s->columns; x++)
          target[c * s->copies * s->floats + y * s->columns + x] =
              m[y * s->columns + x] ? source[c * s->planes * s->plane + y * s->width + x] : 0.0f;
  }
}

UNUSED static void copy_input(const copies *s, const float *in, float *out, uint32_t *mask, ptrdiff_t at,
                              size_t rows) {
  ptrdiff_t number = (ptrdiff_t)s->copies;
  PARALLEL_FOR
  for (ptrdiff_t i = 0; i < number; i++) copy_one(s, in, out, mask, at, rows, (size_t)i);
}

/* The pixels of a row that lie `step` apart. */
INLINE void every_pixel(const float *in, size_t step, float *out, size_t n) {
  size_t x = 0;
  for (; x + 8 <= n; x += 8) {
    UNROLL
    for (size_t k = 0; k < 8; k++) out[x + k] = in[step * (x + k)];
  }
  for (; x < n; x++) out[x] = in[step * x];
}

/* Every plane split by rows and columns modulo a stride, zeros where the last ones are missing. */
UNUSED static void split(const float *in, const layout *from, float *out, const layout *to, size_t down, size_t right) {
  ptrdiff_t planes = (ptrdiff_t)to->channels;
  PARALLEL_FOR
  for (ptrdiff_t n = 0; n < planes; n++) {
    size_t c = (size_t)n / (down * right), row = (size_t)n / right % down, column = (size_t)n % right;
    size_t present = from->width > column ? (from->width - column + right - 1) / right : 0;
    const float *source = in + c * from->plane + column;
    float *target = out + (size_t)n * to->plane;
    for (size_t y = 0; y < to->height; y++, row += down, target += to->width) {
      size_t there = row < from->height ? present : 0;
      if (right == 2) {
        every_pixel(source + row * from->width, 2, target, there);
      } else {
        every_pixel(source + row * from->width, right, target, there);
      }
      for (size_t x = there; x < to->width; x++) target[x] = 0.0f;
    }
  }
}
