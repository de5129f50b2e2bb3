/* A convolution with few zeros: no positions, four output channels share each load of pixels. The weights of
   four channels lie side by side, those of the last one to three likewise. */
INLINE void dense_tile(size_t blocks, size_t lists, value_kind vk, const strip *s, size_t i, size_t first) {
  const convolution *c = s->c;
  const unsigned char *w = s->weights;
  size_t entry = i * c->group_channels * c->taps;
  const float *in = s->in + i / c->group_outputs * c->group_step + first;
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
        vec v = load(p + b * LANES);
        UNROLL
        for (size_t j = 0; j < lists; j++) sum[j * blocks + b] += weight[j] * v;
      }
    }
  }
  UNROLL
  for (size_t j = 0; j < lists; j++) finish(blocks, s, i + j, first, sum + j * blocks);
}

#undef TILE
#define TILE(B) \
  case B: \
    if (four) { \
      dense_tile(B, 4, vk, s, i, first); \
    } else { \
      dense_tile(B, 1, vk, s, i, first); \
    } \
    break;

INLINE void convolve_dense(value_kind vk, const strip *s) {
  const convolution *c = s->c;
  size_t fours = c->together == 4 ? c->outputs / 4 : 0, rounds = fours + (c->outputs - 4 * fours);
  ptrdiff_t work = (ptrdiff_t)(tiles_of(s, DENSE_BLOCKS) * rounds);
  PARALLEL_FOR
  for (ptrdiff_t n = 0; n < work; n++) {
    size_t first = (size_t)n / rounds * DENSE_BLOCKS * LANES, round = (size_t)n % rounds;
    size_t i = round < fours ? 4 * round : 4 * fours + (round - fours);
    int four = round < fours;
    switch (vectors_of(s, DENSE_BLOCKS, first)) { TILES_OF(DENSE_BLOCKS) }
  }
}
