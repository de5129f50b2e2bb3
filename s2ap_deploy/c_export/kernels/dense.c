/* A convolution with few zeros: no positions, four output channels share each load of pixels. The weights of
   four channels lie side by side, those of the last one to three likewise. */
INLINE void dense_tile(size_t blocks, size_t across, size_t lists, value_kind vk, const strip *s, size_t i,
                       size_t first, size_t from) {
  const convolution *c = s->c;
  const unsigned char *w = s->weights;
  size_t entry = i * c->group_channels * c->taps;
  const float *in = s->in + i / c->group_outputs * c->group_step + from;
  float scale[4];
  vec sum[4 * DENSE_BLOCKS];
  UNROLL
  for (size_t j = 0; j < lists; j++) {
    vec bias = every(read_float(w + c->bias + 4 * (i + j)));
    scale[j] = vk == INT8 ? read_float(w + c->scales + 4 * (i + j)) : 1.0f;
    UNROLL
    for (size_t b = 0; b < blocks; b++) sum[j * blocks + b] = bias;
  }
  for (size_t channel = 0; channel < c->group_channels; channel++, in += c->channel_step) {
    for (size_t t = 0; t < c->taps; t++, entry += lists) {
      const float *p = in + c->tap[t];
      float weight[4];
      UNROLL
      for (size_t j = 0; j < lists; j++) weight[j] = value(vk, w + c->values, entry + j, scale[j]);
      UNROLL
      for (size_t b = 0; b < blocks; b++) {
        vec v = load(pixels_at(p, b, across, c->row));
        UNROLL
        for (size_t j = 0; j < lists; j++) sum[j * blocks + b] += weight[j] * v;
      }
    }
  }
  UNROLL
  for (size_t j = 0; j < lists; j++) finish(blocks, s, i + j, first, sum + j * blocks);
}

#undef TILE
#define TILE(B, A) \
  case 8 * B + A: \
    if (four) { \
      dense_tile(B, A, 4, vk, s, i, first, from); \
    } else { \
      dense_tile(B, A, 1, vk, s, i, first, from); \
    } \
    break;

INLINE void convolve_dense(value_kind vk, const strip *s) {
  const convolution *c = s->c;
  cut tiles = cut_strip(s, DENSE_BLOCKS);
  size_t fours = c->together == 4 ? c->outputs / 4 : 0, rounds = fours + (c->outputs - 4 * fours);
  ptrdiff_t work = (ptrdiff_t)(tiles.tiles * rounds);
  PARALLEL_FOR
  for (ptrdiff_t n = 0; n < work; n++) {
    size_t here, at = tile_at(&tiles, (size_t)n / rounds, &here), round = (size_t)n % rounds, first = at * LANES;
    size_t i = round < fours ? 4 * round : 4 * fours + (round - fours);
    size_t from = c->row ? at / tiles.wide * c->row + at % tiles.wide * LANES : first;
    size_t across = c->row && tiles.wide < here ? tiles.wide : here;
    int four = round < fours;
    switch (8 * here + across) { TILES_OF(DENSE_BLOCKS) }
  }
}
