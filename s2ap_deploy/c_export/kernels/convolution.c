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

/* The sums of `lists` channels over `blocks` vectors of pixels stay in registers. `across`: vectors of one row, in a
   padded copy of the input whose rows are `row` floats apart; with shifted copies all rows are one. */
INLINE const float *pixels_at(const float *p, size_t b, size_t across, size_t row) {
  return p + b / across * row + b % across * LANES;
}

/* Walk `lists` of the four lists of `n` entries each that are stored in turns. */
INLINE void walk(size_t lists, size_t blocks, size_t across, position_kind pk, value_kind vk, const float *const *in,
                 size_t row, size_t unit, size_t n, const unsigned char *positions, const unsigned char *values,
                 const float *scale, vec *sum) {
  size_t at[4] = {0, 0, 0, 0};
  for (size_t k = 0; k < 4 * n; k += 4) {
    UNROLL
    for (size_t j = 0; j < lists; j++) {
      at[j] = position(pk, positions, k + j, at[j]);
      const float *p = in[j] + at[j] * unit;
      float w = value(vk, values, k + j, scale[j]);
      UNROLL
      for (size_t b = 0; b < blocks; b++) sum[j * blocks + b] += w * load(pixels_at(p, b, across, row));
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
    store(s->out + at + b * LANES, activate(v, act));
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

/* `lists` channels from number `i` on in the order of processing; pixels from `first` on, which read from `from` on. */
INLINE void tile(size_t lists, size_t blocks, size_t across, position_kind pk, value_kind vk, const strip *s, size_t i,
                 size_t first, size_t from) {
  const convolution *c = s->c;
  const unsigned char *w = s->weights, *order = w + c->order + 4 * i;
  const float *in[4];
  float scale[4];
  vec sum[4 * BLOCKS];
  size_t channel[4], size = pk == GAP8 ? 1 : pk == OFFSET32 ? 4 : 2, bytes = vk == FLOAT32 ? 4 : vk == FLOAT16 ? 2 : 1;
  UNROLL
  for (size_t j = 0; j < lists; j++) {
    channel[j] = read_u32(order + 4 * j);
    in[j] = s->in + from;
    if (c->group_outputs < c->outputs) in[j] += channel[j] / c->group_outputs * c->group_step;
    scale[j] = vk == INT8 ? read_float(w + c->scales + 4 * channel[j]) : 1.0f;
    vec bias = every(read_float(w + c->bias + 4 * channel[j]));
    UNROLL
    for (size_t b = 0; b < blocks; b++) sum[j * blocks + b] = bias;
  }
  size_t start = read_u32(w + c->starts + i / 4 * 4), n = read_u32(w + c->starts + i / 4 * 4 + 4) - start;
  size_t entry = 4 * start + i % 4;
  walk(lists, blocks, across, pk, vk, in, c->row, c->unit, n, w + c->positions + entry * size,
       w + c->values + entry * bytes, scale, sum);
  UNROLL
  for (size_t j = 0; j < lists; j++) finish(blocks, s, channel[j], first, sum + j * blocks);
}

/* The same for four channels, as many at a time as registers hold. */
INLINE void tiles_of_four(size_t blocks, size_t across, position_kind pk, value_kind vk, const strip *s, size_t i,
                          size_t first, size_t from) {
  if (blocks <= NARROW) {
    tile(4, blocks, across, pk, vk, s, i, first, from);
  } else {
    for (size_t j = 0; j < 4; j += LISTS) tile(LISTS, blocks, across, pk, vk, s, i + j, first, from);
  }
}

/* Four channels over a number of vectors, so many of them across. */
#define TILE(B, A) \
  case 8 * B + A: \
    tiles_of_four(B, A, pk, vk, s, i, first, from); \
    break;

/* How a strip is cut into tiles: `vectors` of pixels in all, `wide` of them in a row, `blocks` in a tile: whole rows,
   or where those are wider than a tile, `parts` of each. */
typedef struct {
  size_t vectors, wide, blocks, parts, tiles;
} cut;

INLINE cut cut_strip(const strip *s, size_t most) {
  size_t vectors = (s->pixels + LANES - 1) / LANES, wide = s->c->row ? s->c->width / LANES : 1;
  if (wide <= most) {
    size_t blocks = most / wide * wide;
    return (cut){vectors, wide, blocks, 1, (vectors + blocks - 1) / blocks};
  }
  size_t parts = (wide + most - 1) / most;
  return (cut){vectors, wide, (wide + parts - 1) / parts, parts, parts * (vectors / wide)};
}

/* Where tile `n` begins, in vectors; its length. */
INLINE size_t tile_at(const cut *c, size_t n, size_t *here) {
  size_t at = c->parts > 1 ? n / c->parts * c->wide + n % c->parts * c->blocks : n * c->blocks;
  size_t end = c->parts > 1 ? (n / c->parts + 1) * c->wide : c->vectors;
  *here = end - at < c->blocks ? end - at : c->blocks;
  return at;
}

INLINE void convolve(position_kind pk, value_kind vk, const strip *s) {
  const convolution *c = s->c;
  cut tiles = cut_strip(s, BLOCKS);
  size_t rounds = (c->outputs + 3) / 4;
  ptrdiff_t work = (ptrdiff_t)(tiles.tiles * rounds);
  PARALLEL_FOR
  for (ptrdiff_t n = 0; n < work; n++) {
    size_t here, at = tile_at(&tiles, (size_t)n / rounds, &here), i = 4 * ((size_t)n % rounds), first = at * LANES;
    size_t from = c->row ? at / tiles.wide * c->row + at % tiles.wide * LANES : first;
    size_t across = c->row && tiles.wide < here ? tiles.wide : here;
    switch (8 * here + across) { TILES_OF(BLOCKS) }
  }
}
