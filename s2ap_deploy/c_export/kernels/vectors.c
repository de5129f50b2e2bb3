/* Pixels in one vector. 32-bit ARM stays scalar: its vectors flush the smallest numbers to zero. */
#if !defined(LANES)
#if !defined(__GNUC__)
#define LANES 1
#elif defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#elif defined(__SSE2__) || defined(__aarch64__)
#define LANES 4
#else
#define LANES 1
#endif
#endif
/* A tile holds the sums of BLOCKS vectors of pixels, for LISTS channels at once, in registers; a tile of at most
   NARROW vectors those of four channels, a dense one those of four channels over DENSE_BLOCKS vectors. */
#if !defined(BLOCKS)
#if LANES == 16
#define BLOCKS 6
#define LISTS 4
#define NARROW 6
#define DENSE_BLOCKS 6
#elif defined(__aarch64__)
#define BLOCKS 8
#define LISTS 2
#define NARROW 4
#define DENSE_BLOCKS 6
#elif LANES > 1 || defined(__SSE2__)
#define BLOCKS 8
#define LISTS 1
#define NARROW 3
#define DENSE_BLOCKS 3
#else
#define BLOCKS 2
#define LISTS 4
#define NARROW 2
#define DENSE_BLOCKS 2
#endif
#endif
#define TILES_2 TILE(1) TILE(2)
#define TILES_3 TILES_2 TILE(3)
#define TILES_6 TILES_3 TILE(4) TILE(5) TILE(6)
#define TILES_8 TILES_6 TILE(7) TILE(8)
#define TILES_OF_(B) TILES_##B
#define TILES_OF(B) TILES_OF_(B)

#if LANES > 1
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t bits __attribute__((vector_size(4 * LANES)));
#else
typedef float vec;
#endif

INLINE vec load(const float *p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

/* The mask of a vector's pixels. */
INLINE vec load_mask(const uint32_t *p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

INLINE vec every(float x) {
#if LANES > 1
  return x - (vec){0};
#else
  return x;
#endif
}

/* a > b ? a : b, lane by lane. */
INLINE vec greater(vec a, vec b) {
#if LANES > 1
  bits m = a > b;
  return (vec)(((bits)a & m) | ((bits)b & ~m));
#else
  return a > b ? a : b;
#endif
}

/* a < b ? a : b, lane by lane. */
INLINE vec less(vec a, vec b) {
#if LANES > 1
  bits m = a < b;
  return (vec)(((bits)a & m) | ((bits)b & ~m));
#else
  return a < b ? a : b;
#endif
}

/* v where the mask's bits are set, zero elsewhere. */
INLINE vec only(vec v, vec mask) {
#if LANES > 1
  return (vec)((bits)v & (bits)mask);
#else
  uint32_t m;
  memcpy(&m, &mask, sizeof m);
  return m ? v : 0.0f;
#endif
}
