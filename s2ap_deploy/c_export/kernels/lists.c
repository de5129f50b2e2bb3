/* Lists of kept weights. An entry is a position and a value; positions are stored as gaps from the one before
   (8 or 16 bits) or as they are. A gap too long for its bits is bridged by entries of value zero. */
typedef enum { GAP8, GAP16, OFFSET16, OFFSET32 } position_kind;
typedef enum { FLOAT32, FLOAT16, INT8 } value_kind;

INLINE uint32_t read_u16(const unsigned char *p) {
  uint16_t v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE uint32_t read_u32(const unsigned char *p) {
  uint32_t v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE float read_float(const unsigned char *p) {
  float v;
  memcpy(&v, p, sizeof v);
  return v;
}

/* The position of entry k after the position `before`. */
INLINE size_t position(position_kind kind, const unsigned char *p, size_t k, size_t before) {
  switch (kind) {
    case GAP8:
      return before + p[k];
    case GAP16:
      return before + read_u16(p + 2 * k);
    case OFFSET16:
      return read_u16(p + 2 * k);
    default:
      return read_u32(p + 4 * k);
  }
}

INLINE float half(uint32_t h) {
  /* Exponent and fraction move into place; the product rescales them exactly, subnormal numbers included. */
  uint32_t magnitude = (h & 0x7fffu) << 13, sign = (h & 0x8000u) << 16;
  float v;
  memcpy(&v, &magnitude, sizeof v);
  v *= 0x1p112f;
  memcpy(&magnitude, &v, sizeof v);
  magnitude |= sign;
  memcpy(&v, &magnitude, sizeof v);
  return v;
}

/* The value of entry k; `scale` is that of its output channel, for int8. */
INLINE float value(value_kind kind, const unsigned char *p, size_t k, float scale) {
  switch (kind) {
    case FLOAT16:
      return half(read_u16(p + 2 * k));
    case INT8:
      return (float)(signed char)p[k] * scale;
    default:
      return read_float(p + 4 * k);
  }
}
