/* Linear layers. A sum runs in a fixed number of lanes, entry k in lane k mod 4 (lists) or k mod 16 (dense rows);
   the lanes are added as a fixed tree, then the bias. */
typedef struct {
  uint32_t outputs, inputs;
  uint32_t starts, bias, scales, positions, values; /* bytes from the start of the weights */
  activation act;
} linear;

INLINE void linear_lists(position_kind pk, value_kind vk, const linear *l, const unsigned char *w, const float *in,
                         float *out) {
  ptrdiff_t outputs = (ptrdiff_t)l->outputs;
  PARALLEL_FOR
  for (ptrdiff_t o = 0; o < outputs; o++) {
    size_t k = read_u32(w + l->starts + 4 * o), end = read_u32(w + l->starts + 4 * o + 4), at = 0;
    float scale = vk == INT8 ? read_float(w + l->scales + 4 * o) : 1.0f;
    float lane[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (; k + 4 <= end; k += 4) {
      UNROLL
      for (size_t j = 0; j < 4; j++) {
        at = position(pk, w + l->positions, k + j, at);
        lane[j] += value(vk, w + l->values, k + j, scale) * in[at];
      }
    }
    for (size_t j = 0; k < end; j++, k++) {
      at = position(pk, w + l->positions, k, at);
      lane[j] += value(vk, w + l->values, k, scale) * in[at];
    }
    out[o] = ((lane[0] + lane[1]) + (lane[2] + lane[3])) + read_float(w + l->bias + 4 * o);
  }
}

INLINE void linear_dense(value_kind vk, const linear *l, const unsigned char *w, const float *in, float *out) {
  ptrdiff_t outputs = (ptrdiff_t)l->outputs;
  size_t inputs = l->inputs;
  PARALLEL_FOR
  for (ptrdiff_t o = 0; o < outputs; o++) {
    const unsigned char *row = w + l->values + (size_t)o * inputs * (vk == FLOAT32 ? 4 : vk == FLOAT16 ? 2 : 1);
    float scale = vk == INT8 ? read_float(w + l->scales + 4 * o) : 1.0f;
    float lane[16] = {0.0f};
    size_t k = 0;
    for (; k + 16 <= inputs; k += 16) {
      UNROLL
      for (size_t j = 0; j < 16; j++) lane[j] += value(vk, row, k + j, scale) * in[k + j];
    }
    for (size_t j = 0; k < inputs; j++, k++) lane[j] += value(vk, row, k, scale) * in[k];
    for (size_t half_of = 8; half_of > 0; half_of /= 2)
      for (size_t j = 0; j < half_of; j++) lane[j] += lane[j + half_of];
    out[o] = lane[0] + read_float(w + l->bias + 4 * o);
  }
}
