/* A convolution by lists (direct sparse convolution: Park et al., ICLR 2017, arXiv 1608.01409; the sums of a block of
   pixels stay in registers while a list is walked, as in Elsen et al., CVPR 2020, arXiv 1911.09723).

   Each kept weight is a value and a position: where the pixels that it multiplies lie in the copies of the input.
   A sum starts with the bias and adds the products in the order of the list, whatever the width of a vector. */
typedef struct {
  uint32_t outputs, together;         /* channels; so many lists are stored entry by entry in turns */
  uint32_t plane;                     /* floats between channels of the output */
  uint32_t group_outputs, group_step; /* channels of a group, floats between the inputs of two groups */
  uint32_t unit;                      /* floats that a position counts */
  uint32_t blocks, block_step;        /* blocks of input channels, floats between the inputs of two */
  uint32_t channel_step, taps, group_channels;
  const uint32_t *tap;                /* dense kernel: floats to each tap */
  uint32_t starts, order, bias, scales, positions, values; /* bytes from the start of the weights */
  activation act;
} convolution;

/* Some rows of the output, from pixel `first` on; `in` is what they read. `mask`: the pixels of a plane among the zeros
   of its border, NULL where it has none. */
typedef struct {
  const convolution *c;
  const unsigned char *weights;
  const float *in, *residual;
  const uint32_t *mask;
  float *out;
  size_t first, pixels;
} strip;

/* Walk `lists` of the four lists of `n` entries each that are stored in turns; the sums of `blocks` vectors of pixels
   for each of them stay in registers. */
INLINE void walk(size_t lists, size_t blocks, position_kind pk, value_kind vk, const float *const *in, size_t unit,
                 size_t n, const unsigned char *positions, const unsigned char *values, const float *scale, vec *sum) {
  size_t at[4] = {0, 0, 0, 0};
  for (size_t k = 0; k < 4 * n; k += 4) {
    if (blocks <= NARROW) PREFETCH(values + (4 * k + 1024)); /* long lists, read once */
    UNROLL
    for (size_t j = 0; j < lists; j++) {
      at[j] = position(pk, positions, k + j, at[j]);
      const float *p = in[j] + at[j] * unit;
      float w = value(vk, values, k + j, scale[j]);
      UNROLL
      for (size_t b = 0; b < blocks; b++) sum[j * blocks + b] += w * load(p + b * LANES);
    }
  }
}

/* Add what a residual connection brings, activate, and write the sums of channel `o`. */
INLINE void finish_as(size_t blocks, const strip *s, size_t o, size_t first, const vec *sum, activation act) {
  size_t at = o * s->c->plane + s->first + first;
  UNROLL
  for (size_t b = 0; b < blocks; b++) {
    vec v = sum[b];
    if (s->residual) v += load(s->residual + at + b * LANES);
    v = activate(v, act);
    if (s->mask) v = only(v, load_mask(s->mask + first + b * LANES));
    store(s->out + at + b * LANES, v);
  }
}

INLINE void finish(size_t blocks, const strip *s, size_t o, size_t first, const vec *sum) {
  const activation relu = {RELU, 0.0f, 0.0f}, none = {NONE, 0.0f, 0.0f};
  if (s->c->act.kind == RELU) {
    finish_as(blocks, s, o, first, sum, relu);
  } else if (s->c->act.kind == NONE) {
    finish_as(blocks, s, o, first, sum, none);
  } else {
    finish_as(blocks, s, o, first, sum, s->c->act);
  }
}

/* `lists` channels from number `i` on in the order of processing of one block of the input; pixels from `first` on. The
   first block begins with the bias, the others with the sums so far, which only the last one finishes. */
INLINE void tile(size_t lists, size_t blocks, position_kind pk, value_kind vk, const strip *s, size_t block, size_t i,
                 size_t first) {
  const convolution *c = s->c;
  const unsigned char *w = s->weights, *order = w + c->order + 4 * i, *bounds = w + c->starts + i / 4 * 4;
  const float *in[4];
  float scale[4];
  vec sum[4 * BLOCKS];
  size_t channel[4], size = pk == GAP8 ? 1 : pk == OFFSET32 ? 4 : 2, bytes = vk == FLOAT32 ? 4 : vk == FLOAT16 ? 2 : 1;
  UNROLL
  for (size_t j = 0; j < lists; j++) {
    channel[j] = read_u32(order + 4 * j);
    in[j] = s->in + first + block * c->block_step;
    if (c->group_outputs < c->outputs) in[j] += channel[j] / c->group_outputs * c->group_step;
    scale[j] = vk == INT8 ? read_float(w + c->scales + 4 * channel[j]) : 1.0f;
    vec bias = every(read_float(w + c->bias + 4 * channel[j]));
    const float *so_far = s->out + channel[j] * c->plane + s->first + first;
    UNROLL
    for (size_t b = 0; b < blocks; b++) sum[j * blocks + b] = block ? load(so_far + b * LANES) : bias;
  }
  size_t start = read_u32(bounds), n = read_u32(bounds + 4) - start, entry = 4 * start + i % 4;
  walk(lists, blocks, pk, vk, in, c->unit, n, w + c->positions + entry * size, w + c->values + entry * bytes, scale,
       sum);
  UNROLL
  for (size_t j = 0; j < lists; j++) {
    if (block + 1 < c->blocks) {
      float *out = s->out + channel[j] * c->plane + s->first + first;
      UNROLL
      for (size_t b = 0; b < blocks; b++) store(out + b * LANES, sum[j * blocks + b]);
    } else {
      finish(blocks, s, channel[j], first, sum + j * blocks);
    }
  }
}

/* The same for four channels, as many at a time as registers hold. */
INLINE void tiles_of_four(size_t blocks, position_kind pk, value_kind vk, const strip *s, size_t block, size_t i,
                          size_t first) {
  if (blocks <= NARROW) {
    tile(4, blocks, pk, vk, s, block, i, first);
  } else {
    for (size_t j = 0; j < 4; j += LISTS) tile(LISTS, blocks, pk, vk, s, block, i + j, first);
  }
}

/* Four channels over a number of vectors. */
#define TILE(B) \
  case B: \
    tiles_of_four(B, pk, vk, s, block, i, first); \
    break;

INLINE size_t tiles_of(const strip *s, size_t most) { return (s->pixels + most * LANES - 1) / (most * LANES); }

/* The vectors of a tile that begins at pixel `first`. */
INLINE size_t vectors_of(const strip *s, size_t most, size_t first) {
  size_t left = (s->pixels - first + LANES - 1) / LANES;
  return left < most ? left : most;
}

INLINE void convolve(position_kind pk, value_kind vk, const strip *s) {
  size_t rounds = (s->c->outputs + 3) / 4;
  ptrdiff_t work = (ptrdiff_t)(tiles_of(s, BLOCKS) * rounds);
  for (size_t block = 0; block < s->c->blocks; block++) {
    PARALLEL_FOR
    for (ptrdiff_t n = 0; n < work; n++) {
      size_t first = (size_t)n / rounds * BLOCKS * LANES, i = 4 * (block * rounds + (size_t)n % rounds);
      switch (vectors_of(s, BLOCKS, first)) { TILES_OF(BLOCKS) }
    }
  }
}
