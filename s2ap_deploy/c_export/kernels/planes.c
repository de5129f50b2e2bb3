/* Everything else works on planes: `channels` planes of `height` x `width` pixels, `plane` floats apart; their rows
   `row` floats apart. Where that is more than `width`, zeros lie between rows, between planes, and in the `lead` floats
   before the first one. */
typedef struct {
  uint32_t channels, height, width, plane, row, lead;
} layout;

UNUSED static size_t pixels_of(const layout *l) { return (size_t)l->height * l->width; }

/* Write the zeros around planes; `rows`: those between rows as well. */
UNUSED static void clear_border(float *out, const layout *l, int rows) {
  memset(out - l->lead, 0, l->lead * sizeof(float));
  for (size_t c = 0; c < l->channels; c++, out += l->plane) {
    size_t used = (size_t)l->height * l->row;
    for (size_t y = 0; rows && y < l->height; y++)
      for (size_t x = l->width; x < l->row; x++) out[y * l->row + x] = 0.0f;
    memset(out + used, 0, (l->plane - used) * sizeof(float));
  }
}

/* Mark the pixels of a plane among its zeros. */
UNUSED static void mark_pixels(uint32_t *mask, const layout *l) {
  size_t n = ((size_t)l->height * l->row + 15) / 16 * 16;
  for (size_t p = 0, x = 0; p < n; p++) {
    mask[p] = x < l->width && p < (size_t)l->height * l->row ? 0xffffffffu : 0u;
    if (++x == l->row) x = 0;
  }
}

/* Planes one directly after the other, to planes `to->plane` floats apart. */
UNUSED static void unpack(const float *in, float *out, const layout *to) {
  for (size_t c = 0; c < to->channels; c++)
    for (size_t y = 0; y < to->height; y++)
      memcpy(out + c * to->plane + y * to->row, in + c * pixels_of(to) + y * to->width, to->width * sizeof(float));
}

/* The reverse. Returns where the next tensor's pixels go. */
UNUSED static float *pack(const float *in, const layout *from, float *out) {
  for (size_t c = 0; c < from->channels; c++)
    memcpy(out + c * pixels_of(from), in + c * from->plane, pixels_of(from) * sizeof(float));
  return out + from->channels * pixels_of(from);
}

typedef struct {
  uint32_t kernel_y, kernel_x, stride_y, stride_x, dilation_y, dilation_x, pad_y, pad_x;
  int whole; /* an average divides by the whole window, the part outside of the image included */
} window;

/* The maximum or average of windows; a sum adds pixels row by row. */
INLINE void pool(int maximum, const float *in, const layout *from, float *out, const layout *to, const window *w) {
  ptrdiff_t channels = (ptrdiff_t)to->channels;
  PARALLEL_FOR
  for (ptrdiff_t c = 0; c < channels; c++)
    for (size_t y = 0; y < to->height; y++)
      for (size_t x = 0; x < to->width; x++) {
        float found = maximum ? -FLT_MAX : 0.0f;
        uint32_t pixels = 0;
        for (uint32_t i = 0; i < w->kernel_y; i++) {
          ptrdiff_t row = (ptrdiff_t)(y * w->stride_y + i * w->dilation_y) - (ptrdiff_t)w->pad_y;
          if (row < 0 || row >= (ptrdiff_t)from->height) continue;
          for (uint32_t j = 0; j < w->kernel_x; j++) {
            ptrdiff_t column = (ptrdiff_t)(x * w->stride_x + j * w->dilation_x) - (ptrdiff_t)w->pad_x;
            if (column < 0 || column >= (ptrdiff_t)from->width) continue;
            float pixel = in[(size_t)c * from->plane + (size_t)row * from->row + (size_t)column];
            if (maximum) {
              found = found > pixel ? found : pixel;
            } else {
              found += pixel;
            }
            pixels++;
          }
        }
        if (w->whole) pixels = w->kernel_y * w->kernel_x;
        out[(size_t)c * to->plane + y * to->row + x] = maximum ? found : found / (float)(pixels ? pixels : 1);
      }
}

/* The maximum or average of a plane; pixel k in lane k mod 16, lanes added as a fixed tree. */
INLINE void global_pool(int maximum, const float *in, const layout *from, float *out) {
  size_t pixels = pixels_of(from);
  for (size_t c = 0; c < from->channels; c++) {
    const float *plane = in + c * from->plane;
    float lane[16];
    for (size_t j = 0; j < 16; j++) lane[j] = maximum ? -FLT_MAX : 0.0f;
    for (size_t k = 0; k < pixels; k += 16) {
      size_t n = pixels - k < 16 ? pixels - k : 16;
      for (size_t j = 0; j < n; j++) {
        if (maximum) {
          lane[j] = lane[j] > plane[k + j] ? lane[j] : plane[k + j];
        } else {
          lane[j] += plane[k + j];
        }
      }
    }
    for (size_t n = 8; n > 0; n /= 2)
      for (size_t j = 0; j < n; j++) {
        if (maximum) {
          lane[j] = lane[j] > lane[j + n] ? lane[j] : lane[j + n];
        } else {
          lane[j] += lane[j + n];
        }
      }
    out[c] = maximum ? lane[0] : lane[0] / (float)pixels;
  }
}

typedef enum { ADD, SUB, MUL, DIV, REVERSED_SUB, REVERSED_DIV, PRELU, AFFINE } operation;

INLINE float compute(operation how, float x, float first, float second) {
  switch (how) {
    case ADD:
      return x + first;
    case SUB:
      return x - first;
    case MUL:
      return x * first;
    case DIV:
      return x / first;
    case REVERSED_SUB:
      return first - x;
    case REVERSED_DIV:
      return first / x;
    case PRELU:
      return x > 0.0f ? x : x * first;
    default:
      return x * first + second;
  }
}

/* One activation by itself. */
UNUSED static void activate_planes(const float *in, float *out, const layout *l, activation a) {
  for (size_t c = 0; c < l->channels; c++) activate_row(in + c * l->plane, out + c * l->plane, pixels_of(l), a);
}

/* A tensor and one or two constants per channel. */
INLINE void channelwise(operation how, const float *in, float *out, const layout *l, const unsigned char *first,
                        const unsigned char *second, activation a) {
  size_t pixels = pixels_of(l);
  for (size_t c = 0; c < l->channels; c++) {
    float one = read_float(first + 4 * c), two = second ? read_float(second + 4 * c) : 0.0f;
    const float *pixel = in + c * l->plane;
    float *target = out + c * l->plane;
    for (size_t x = 0; x < pixels; x++) target[x] = compute(how, pixel[x], one, two);
    activate_row(target, target, pixels, a);
  }
}

/* Two tensors; `one`: the second has one pixel per channel. */
INLINE void combine(operation how, int one, const float *in, const float *other, float *out, const layout *l,
                    activation a) {
  size_t pixels = pixels_of(l);
  for (size_t c = 0; c < l->channels; c++) {
    const float *pixel = in + c * l->plane, *with = other + c * (one ? 1 : l->plane);
    float *target = out + c * l->plane;
    if (one) {
      for (size_t x = 0; x < pixels; x++) target[x] = compute(how, pixel[x], with[0], 0.0f);
    } else {
      for (size_t x = 0; x < pixels; x++) target[x] = compute(how, pixel[x], with[x], 0.0f);
    }
    activate_row(target, target, pixels, a);
  }
}

/* One plane of another tensor: rows and columns as listed, NOTHING for zeros; no plane at all for zeros only. */
#define NOTHING 0xffffu

UNUSED static void copy_plane(const float *plane, size_t width, float *out, const layout *to, const uint16_t *rows,
                              const uint16_t *columns) {
  for (size_t y = 0; y < to->height; y++)
    for (size_t x = 0; x < to->width; x++)
      *out++ = plane && rows[y] != NOTHING && columns[x] != NOTHING ? plane[rows[y] * width + columns[x]] : 0.0f;
}
