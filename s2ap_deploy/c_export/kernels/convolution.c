/* A convolution by lists (direct sparse convolution: Park et al., ICLR 2017, arXiv 1608.01409; the sums of a block of
   pixels stay in registers while a list is walked, as in Elsen et al., CVPR 2020, arXiv 1911.09723).

   Each kept weight is a value and a position: where the pixels that it multiplies lie in the copies of the input.
   A sum starts with the bias and adds the products in the order of the list, whatever the width of a vector. */
typedef struct {
  uint32_t outputs, together;         /* channels; so many lists are stored entry by entry in turns */
  uint32_t plane, width, row;         /* floats between channels of the output, its columns; row: see below */
  uint32_t group_outputs, group_step; /* channels of a group, floats between the inputs of two groups */
  uint32_t unit;                      /* floats that a position counts */
  uint32_t channel_step, taps, group_channels;
  const uint32_t *tap;                /* dense kernel: floats to each tap */
  uint32_t starts, order, bias, scales, positions, values; /* bytes from the start of the weights */
  activation act;
} convolution;

/* Some rows of the output, from pixel `first` on; `in` is what they read. */
typedef struct {
  const convolution *c;
  const unsigned char *weights;
  const float *in, *residual;
  float *out;
  size_t first, pixels;
} strip;

/* The sums of four channels over `blocks` vectors of pixels stay in registers. `across`: vectors of one row, in a
   padded copy of the input whose rows are `row` floats apart; with shifted copies all rows are one. */
INLINE const float *pixels_at(const float *p, size_t b, size_t across, size_t row) {
  return p + b / across * row + b % across * LANES;
}

/* Walk four lists of `n` entries each. */
INLINE void walk(size_t blocks, size_t across, position_kind pk, value_kind vk, const float *const *in, size_t row,
                 size_t unit, size_t n, const unsigned char *positions, const unsigned char *values,
                 const float *scale, vec *sum) {
  size_t at[4] = {0, 0, 0, 0};
  for (size_t k = 0; k < 4 * n; k += 4) {
    UNROLL
    for (size_t j = 0; j < 4; j++) {
      at[j] = position(pk, positions, k + j, at[j]);
      const float *p = in[j] + at[j] * unit;
      float w = value(vk, values, k + j, scale[j]);
      UNROLL
      for (size_t b = 0; b < blocks; b++) sum[j * blocks + b] += w * load(pixels_at(p, b, across, row));
    }
  }
}

/* Add what a residual connection brings, activate, and write the sums of channel `o`. */
INLINE void finish(size_t blocks, const strip *s, size_t o, size_t first, const vec *sum) {
  size_t at = o * s->c->plane + s->first + first;
  UNROLL
  for (size_t b = 0; b < blocks; b++) {
    vec v = sum[b];
    if (s->residual) v += load(s->residual + at + b * LANES);
    store(s->out + at + b * LANES, activate(v, s->c->act));
  }
}

/* Four channels, number `i` in the order of processing; pixels from `first` on, which read from `in` on. */
INLINE void tile(size_t blocks, size_t across, position_kind pk, value_kind vk, const strip *s, size_t i, size_t first,
                 size_t from) {
  const convolution *c = s->c;
  const unsigned char *w = s->weights, *order = w + c->order + 16 * i;
  const float *in[4];
  float scale[4];
  vec sum[4 * BLOCKS];
  size_t channel[4], size = pk == GAP8 ? 1 : pk == OFFSET32 ? 4 : 2, bytes = vk == FLOAT32 ? 4 : vk == FLOAT16 ? 2 : 1;
  UNROLL
  for (size_t j = 0; j < 4; j++) {
    channel[j] = read_u32(order + 4 * j);
    in[j] = s->in + from;
    if (c->group_outputs < c->outputs) in[j] += channel[j] / c->group_outputs * c->group_step;
    scale[j] = vk == INT8 ? read_float(w + c->scales + 4 * channel[j]) : 1.0f;
    vec bias = every(read_float(w + c->bias + 4 * channel[j]));
    UNROLL
    for (size_t b = 0; b < blocks; b++) sum[j * blocks + b] = bias;
  }
  size_t start = read_u32(w + c->starts + 4 * i), n = read_u32(w + c->starts + 4 * i + 4) - start;
  walk(blocks, across, pk, vk, in, c->row, c->unit, n, w + c->positions + 4 * start * size,
       w + c->values + 4 * start * bytes, scale, sum);
  UNROLL
  for (size_t j = 0; j < 4; j++) finish(blocks, s, channel[j], first, sum + j * blocks);
}

/* Call CASES(TILE) for a number of vectors and of vectors across. */
#define TILE(B, A) \
  case 8 * B + A: \
    tile(B, A, pk, vk, s, i, first, from); \
    break;

/* How a strip is cut into tiles: `vectors` of pixels in all, `wide` of them in a row, `blocks` in a tile. */
typedef struct {
  size_t vectors, wide, blocks, parts;
} cut;

INLINE cut cut_strip(const strip *s) {
  size_t vectors = (s->pixels + LANES - 1) / LANES, wide = s->c->row ? s->c->width / LANES : vectors;
  size_t most = wide < BLOCKS && LANES == 16 ? BLOCKS / wide * wide : BLOCKS;
  if (wide > BLOCKS || LANES < 16) {
    /* Tiles lie within one row. */
    size_t parts = (wide + BLOCKS - 1) / BLOCKS, blocks = (wide + parts - 1) / parts;
    return (cut){vectors, wide, blocks, parts * (vectors / wide)};
  }
  return (cut){vectors, wide, most, (vectors + most - 1) / most};
}

/* Where tile `n` begins, in vectors; its length. */
INLINE size_t tile_at(const cut *c, size_t n, size_t *here) {
  if (c->wide > BLOCKS || LANES < 16) {
    size_t parts = (c->wide + c->blocks - 1) / c->blocks, at = n % parts * c->blocks;
    *here = c->wide - at < c->blocks ? c->wide - at : c->blocks;
    return n / parts * c->wide + at;
  }
  *here = c->vectors - n * c->blocks < c->blocks ? c->vectors - n * c->blocks : c->blocks;
  return n * c->blocks;
}

INLINE void convolve(position_kind pk, value_kind vk, const strip *s) {
  const convolution *c = s->c;
  cut tiles = cut_strip(s);
  size_t rounds = (c->outputs + 3) / 4;
  ptrdiff_t work = (ptrdiff_t)(tiles.parts * rounds);
  PARALLEL_FOR
  for (ptrdiff_t n = 0; n < work; n++) {
    size_t here, at = tile_at(&tiles, (size_t)n / rounds, &here), i = (size_t)n % rounds, first = at * LANES;
    size_t from = c->row ? at / tiles.wide * c->row + at % tiles.wide * LANES : first;
    size_t across = c->row && tiles.wide < here ? tiles.wide : here;
    switch (8 * here + across) { TILES }
  }
}
