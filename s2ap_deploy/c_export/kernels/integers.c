/* Integer arithmetic. A tensor holds 8-bit codes: code q stands for the number (q - zero) * scale. Sums of products are
   exact 32-bit integers, so their order does not matter; floats appear in the image and in the logits alone. */
typedef struct {
  uint32_t channels, height, width, plane, row, origin; /* pixel (y, x) of channel c: origin + c * plane + y * row + x */
} layout;

/* How a sum becomes a code: sum * multiplier / 2^shift, rounded to the nearest, a tie to the even number of steps, plus
   `zero`, from `least` to `most`. */
typedef struct {
  uint8_t zero, least, most;
} rounding;

INLINE uint8_t to_code(int64_t product, unsigned shift, const rounding *r) {
  int64_t one = (int64_t)1 << shift, v = product + r->zero * one, code, rest;
  if (v <= 0) return r->least;
  code = v >> shift;
  rest = v & (one - 1);
  if (rest > one / 2 || (rest == one / 2 && ((code ^ r->zero) & 1))) code++;
  return code < r->least ? r->least : code > r->most ? r->most : (uint8_t)code;
}

/* The code of a number in units of the scale. Adding and subtracting 1.5 * 2^23 rounds to an integer, a tie to even. */
INLINE uint8_t float_to_code(float steps, const rounding *r) {
  steps = steps > -512.0f ? steps : -512.0f;
  steps = steps < 512.0f ? steps : 512.0f;
  int code = (int)((steps + 12582912.0f) - 12582912.0f) + r->zero;
  return code < r->least ? r->least : code > r->most ? r->most : (uint8_t)code;
}

/* Codes of zero everywhere, the border included. */
UNUSED static void clear(uint8_t *out, size_t bytes, uint8_t zero) { memset(out, zero, bytes); }

typedef enum { ADD, SUB, MUL, DIV, AFFINE } operation;

/* One operation of the normalization of the image; its constants have one number per channel. */
typedef struct {
  operation how;
  uint32_t first, second; /* bytes from the start of the weights */
} normalization;

UNUSED static void quantize_image(const float *image, uint8_t *out, const layout *to, const unsigned char *w,
                                  const normalization *steps, size_t number, float scale, const rounding *r) {
  for (size_t c = 0; c < to->channels; c++)
    for (size_t y = 0; y < to->height; y++)
      for (size_t x = 0; x < to->width; x++) {
        float v = *image++;
        for (size_t i = 0; i < number; i++) {
          float first = read_float(w + steps[i].first + 4 * c);
          switch (steps[i].how) {
            case ADD:
              v = v + first;
              break;
            case SUB:
              v = v - first;
              break;
            case MUL:
              v = v * first;
              break;
            case DIV:
              v = v / first;
              break;
            case AFFINE:
              v = v * first + read_float(w + steps[i].second + 4 * c);
              break;
          }
        }
        out[to->origin + c * to->plane + y * to->row + x] = float_to_code(v / scale, r);
      }
}

/* A convolution by lists: each kept weight is a value and the position of the pixels that it multiplies. Pixels are
   computed in `lines` runs of `length`; one of stride 1 is a single run over rows and the border between them. */
typedef struct {
  uint32_t outputs, group_outputs, group_step; /* channels; bytes between the inputs of two groups */
  uint32_t shared;                             /* every list has the positions of the first one */
  uint32_t lines, length, line_step, step;     /* bytes of the input between lines, between pixels */
  uint32_t pitch;                              /* pixels of a run that belong to one row of the output */
  uint32_t starts, bias, multipliers, shifts, positions, values; /* bytes from the start of the weights */
  rounding round;
} convolution;

#define TILE 64

/* Add the products of a list to the sums of `n` pixels. */
INLINE void add_products(position_kind pk, const convolution *c, const unsigned char *w, size_t list, const uint8_t *in,
                         size_t n, int32_t *sum) {
  size_t k = read_u32(w + c->starts + 4 * list), end = read_u32(w + c->starts + 4 * list + 4), at = 0;
  size_t first = c->shared ? k : 0, step = c->step;
  for (; k < end; k++) {
    at = position(pk, w + c->positions, k - first, at);
    const uint8_t *p = in + at;
    int32_t v = (signed char)w[c->values + k];
    if (step == 1) {
      for (size_t x = 0; x < n; x++) sum[x] += v * p[x];
    } else {
      for (size_t x = 0; x < n; x++) sum[x] += v * p[x * step];
    }
  }
}

INLINE void convolve(position_kind pk, const convolution *c, const unsigned char *w, const uint8_t *in, uint8_t *out,
                     const layout *to) {
  ptrdiff_t outputs = (ptrdiff_t)c->outputs;
  PARALLEL_FOR
  for (ptrdiff_t list = 0; list < outputs; list++) {
    size_t o = (size_t)list;
    const uint8_t *from = in + o / c->group_outputs * c->group_step;
    uint8_t *plane = out + to->origin + o * to->plane;
    int32_t bias = (int32_t)read_u32(w + c->bias + 4 * o), sum[TILE];
    int64_t multiplier = (int64_t)read_u32(w + c->multipliers + 4 * o);
    unsigned shift = w[c->shifts + o];
    for (size_t line = 0; line < c->lines; line++)
      for (size_t first = 0; first < c->length; first += TILE) {
        size_t n = c->length - first < TILE ? c->length - first : TILE;
        size_t y = line + first / c->pitch, column = first % c->pitch;
        for (size_t x = 0; x < n; x++) sum[x] = bias;
        add_products(pk, c, w, o, from + line * c->line_step + first * c->step, n, sum);
        for (size_t x = 0; x < n; x++) {
          if (column < to->width) plane[y * to->row + column] = to_code(sum[x] * multiplier, shift, &c->round);
          if (++column == c->pitch) {
            column = 0;
            y++;
          }
        }
      }
  }
}

/* A linear layer, to codes or, with `scales`, to floats. */
typedef struct {
  uint32_t outputs, shared;
  uint32_t starts, bias, multipliers, shifts, scales, positions, values; /* bytes from the start of the weights */
  rounding round;
} linear;

INLINE int32_t dot(position_kind pk, const linear *l, const unsigned char *w, size_t o, const uint8_t *in) {
  size_t k = read_u32(w + l->starts + 4 * o), end = read_u32(w + l->starts + 4 * o + 4), at = 0;
  size_t first = l->shared ? k : 0;
  int32_t sum = (int32_t)read_u32(w + l->bias + 4 * o);
  for (; k < end; k++) {
    at = position(pk, w + l->positions, k - first, at);
    sum += (int32_t)(signed char)w[l->values + k] * in[at];
  }
  return sum;
}

INLINE void linear_codes(position_kind pk, const linear *l, const unsigned char *w, const uint8_t *in, uint8_t *out) {
  for (size_t o = 0; o < l->outputs; o++) {
    int64_t multiplier = (int64_t)read_u32(w + l->multipliers + 4 * o);
    out[o] = to_code(dot(pk, l, w, o, in) * multiplier, w[l->shifts + o], &l->round);
  }
}

INLINE void linear_floats(position_kind pk, const linear *l, const unsigned char *w, const uint8_t *in, float *out) {
  for (size_t o = 0; o < l->outputs; o++)
    out[o] = (float)dot(pk, l, w, o, in) * read_float(w + l->scales + 4 * o);
}

/* Any function of one number: a table of 256 codes, or one for each channel `next` bytes apart. */
UNUSED static void look_up(const uint8_t *in, const layout *from, uint8_t *out, const layout *to,
                           const unsigned char *table, size_t next) {
  for (size_t c = 0; c < to->channels; c++, table += next)
    for (size_t y = 0; y < to->height; y++)
      for (size_t x = 0; x < to->width; x++)
        out[to->origin + c * to->plane + y * to->row + x] = table[in[from->origin + c * from->plane + y * from->row + x]];
}

/* Two tensors with multipliers of their own, added, or multiplied by the first multiplier; one pixel of the second per
   channel where it has no more. */
typedef struct {
  int32_t first, second; /* multipliers */
  uint8_t product, first_zero, second_zero, shift;
  rounding round;
} combination;

UNUSED static void combine(const combination *how, const uint8_t *in, const layout *from, const uint8_t *other,
                           const layout *with, uint8_t *out, const layout *to) {
  size_t one = with->height * with->width == 1;
  for (size_t c = 0; c < to->channels; c++)
    for (size_t y = 0; y < to->height; y++)
      for (size_t x = 0; x < to->width; x++) {
        int32_t a = in[from->origin + c * from->plane + y * from->row + x] - how->first_zero;
        int32_t b = other[with->origin + c * with->plane + (one ? 0 : y * with->row + x)] - how->second_zero;
        int64_t v = how->product ? (int64_t)(a * b) * how->first
                                 : (int64_t)a * how->first + (int64_t)b * how->second;
        out[to->origin + c * to->plane + y * to->row + x] = to_code(v, how->shift, &how->round);
      }
}

/* The largest code, or the average, of windows. `multipliers`: for an average of 1, 2, ... pixels. */
typedef struct {
  uint32_t kernel_y, kernel_x, stride_y, stride_x, dilation_y, dilation_x, pad_y, pad_x;
  uint8_t maximum, whole, zero, shift; /* whole: an average divides by the whole window */
  uint32_t multipliers;                /* bytes from the start of the weights */
  rounding round;
} window;

UNUSED static void pool(const window *p, const unsigned char *w, const uint8_t *in, const layout *from, uint8_t *out,
                        const layout *to) {
  for (size_t c = 0; c < to->channels; c++)
    for (size_t y = 0; y < to->height; y++)
      for (size_t x = 0; x < to->width; x++) {
        int32_t sum = 0;
        uint32_t pixels = 0;
        uint8_t most = 0;
        for (uint32_t i = 0; i < p->kernel_y; i++) {
          ptrdiff_t row = (ptrdiff_t)(y * p->stride_y + i * p->dilation_y) - (ptrdiff_t)p->pad_y;
          if (row < 0 || row >= (ptrdiff_t)from->height) continue;
          for (uint32_t j = 0; j < p->kernel_x; j++) {
            ptrdiff_t column = (ptrdiff_t)(x * p->stride_x + j * p->dilation_x) - (ptrdiff_t)p->pad_x;
            if (column < 0 || column >= (ptrdiff_t)from->width) continue;
            uint8_t code = in[from->origin + c * from->plane + (size_t)row * from->row + (size_t)column];
            most = code > most ? code : most;
            sum += code - p->zero;
            pixels++;
          }
        }
        if (p->whole) pixels = p->kernel_y * p->kernel_x;
        if (!p->maximum) {
          int64_t multiplier = pixels ? (int64_t)read_u32(w + p->multipliers + 4 * (pixels - 1)) : 0;
          most = to_code(sum * multiplier, p->shift, &p->round);
        }
        out[to->origin + c * to->plane + y * to->row + x] = most;
      }
}

/* One plane of another tensor: rows and columns as listed, NOTHING for zeros; no plane at all for zeros only. */
#define NOTHING 0xffffu

UNUSED static void copy_plane(const uint8_t *plane, size_t row, uint8_t *out, const layout *to, const uint16_t *rows,
                              const uint16_t *columns, uint8_t zero) {
  for (size_t y = 0; y < to->height; y++)
    for (size_t x = 0; x < to->width; x++)
      out[y * to->row + x] =
          plane && rows[y] != NOTHING && columns[x] != NOTHING ? plane[rows[y] * row + columns[x]] : zero;
}

/* Codes of all pixels, one directly after the other. Returns where the next tensor's go. */
UNUSED static uint8_t *pack(const uint8_t *in, const layout *from, uint8_t *out) {
  for (size_t c = 0; c < from->channels; c++)
    for (size_t y = 0; y < from->height; y++, out += from->width)
      memcpy(out, in + from->origin + c * from->plane + y * from->row, from->width);
  return out;
}

/* Averages of whole planes, or codes themselves where there is one pixel, as floats. */
UNUSED static void average_floats(const uint8_t *in, const layout *from, float *out, uint8_t zero, float scale) {
  for (size_t c = 0; c < from->channels; c++) {
    int32_t sum = 0;
    for (size_t y = 0; y < from->height; y++)
      for (size_t x = 0; x < from->width; x++)
        sum += in[from->origin + c * from->plane + y * from->row + x] - zero;
    out[c] = (float)sum * scale;
  }
}
