/* Sparse layers for a batch of images, for attacks on this machine: a tensor is [channels, rows, columns, images], so
   that a vector holds one pixel of several images, and neighbors in a row follow one another. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
typedef float vec4 __attribute__((vector_size(16)));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec16 __attribute__((vector_size(64)));

/* Numbers of one call, all in pixels: `pitch` pixels of a run belong to one row, whose first `width` are computed. A
   run of `length` begins every `line` pixels of the input, its pixels lie `step` apart; likewise in the output. */
typedef struct {
  int64_t outputs, images, lines, line, length, step, pitch, width;
  int64_t out_plane, out_row, out_step, out_first;
} sizes;

/* The sums of lists, for vectors of LANES images and tiles of PIXELS pixels: for each output channel o, entries
   starts[o] to starts[o + 1] of `position` and `value`. */
#define KERNEL(NAME, VEC, LANES) \
  INLINE void tile_##NAME(int64_t pixels, const sizes *s, const float *in, const int32_t *position, const float *value, \
                          int64_t kept, float bias, VEC *sum) { \
    const int64_t images = s->images, next = s->step * images; \
    UNROLL for (int64_t t = 0; t < pixels; t++) sum[t] = bias - (VEC){0}; \
    for (int64_t k = 0; k < kept; k++) { \
      const float *p = in + (int64_t)position[k] * images; \
      const float w = value[k]; \
      UNROLL for (int64_t t = 0; t < pixels; t++) { \
        VEC v; \
        memcpy(&v, p + t * next, sizeof v); \
        sum[t] += w * v; \
      } \
    } \
  } \
  static void NAME(const sizes *s, const float *in, const int32_t *starts, const int32_t *position, \
                   const float *value, const float *bias, float *out) { \
    for (int64_t image = 0; image < s->images; image += LANES) \
      for (int64_t line = 0; line < s->lines; line++) \
        for (int64_t first = 0; first < s->length; first += 12) { \
          const int64_t n = s->length - first < 12 ? s->length - first : 12; \
          const float *p = in + (line * s->line + first * s->step) * s->images + image; \
          for (int64_t o = 0; o < s->outputs; o++) { \
            const int64_t at = starts[o], kept = starts[o + 1] - at; \
            float *to = out + (s->out_first + o * s->out_plane + line * s->out_row) * s->images + image; \
            VEC sum[12]; \
            switch (n) { EACH(TILE, NAME) } \
            int64_t column = first % s->pitch, row = first / s->pitch; \
            for (int64_t t = 0; t < n; t++) { \
              if (column < s->width) \
                memcpy(to + (row * s->out_row + column * s->out_step) * s->images, &sum[t], sizeof sum[t]); \
              if (++column == s->pitch) column = 0, row++; \
            } \
          } \
        } \
  }
#define TILE(NAME, N) \
  case N: \
    tile_##NAME(N, s, p, position + at, value + at, kept, bias[o], sum); \
    break;
#define EACH(F, NAME) \
  F(NAME, 1) F(NAME, 2) F(NAME, 3) F(NAME, 4) F(NAME, 5) F(NAME, 6) \
  F(NAME, 7) F(NAME, 8) F(NAME, 9) F(NAME, 10) F(NAME, 11) F(NAME, 12)

#if defined(__AVX512F__)
KERNEL(wide, vec16, 16)
#endif
#if defined(__AVX__)
KERNEL(narrow, vec8, 8)
#else
KERNEL(narrow, vec4, 4)
#endif

/* `images` is a multiple of 8. */
void sparse_lists(const sizes *s, const float *in, const int32_t *starts, const int32_t *position, const float *value,
                  const float *bias, float *out) {
#if defined(__AVX512F__)
  if (s->images % 16 == 0) {
    wide(s, in, starts, position, value, bias, out);
    return;
  }
#endif
  narrow(s, in, starts, position, value, bias, out);
}
