/* Activations. Simple ones are applied to sums in registers, lane by lane. */
typedef enum {
  NONE, RELU, CLIP, LEAKY, HARD_SWISH, HARD_SIGMOID, SIGMOID, SILU, GELU, GELU_TANH, TANH, ERF
} activation_kind;

typedef struct {
  activation_kind kind;
  float first, second; /* bounds of a clip, slope of a leaky ReLU, slope and offset of a hard sigmoid */
} activation;

INLINE vec activate(vec x, activation a) {
  switch (a.kind) {
    case RELU:
      return greater(x, every(0.0f));
    case CLIP:
      return less(greater(x, every(a.first)), every(a.second));
    case LEAKY:
      return greater(x, every(0.0f)) + a.first * less(x, every(0.0f));
    case HARD_SWISH:
      return x * greater(less(x * (1.0f / 6.0f) + 0.5f, every(1.0f)), every(0.0f));
    case HARD_SIGMOID:
      return greater(less(x * a.first + a.second, every(1.0f)), every(0.0f));
    default:
      return x;
  }
}

/* Functions of the library's own, so that no system's <math.h> changes a bit: polynomials fitted for them, errors in
   units of the last place (ulp) of float32 measured over all inputs or as stated. */
/* e^x for x from -87 to 88, clamped beyond: 2^n * e^r with |r| <= ln(2)/2. */
INLINE float exponential(float x) {
  x = x > -87.0f ? x : -87.0f;
  x = x < 88.0f ? x : 88.0f;
  int32_t n = (int32_t)(x * 1.44269504f + (x < 0.0f ? -0.5f : 0.5f));
  float r = (x - (float)n * 0.693359375f) - (float)n * -2.12194440e-4f;
  float p = (((0.00139412144f * r + 0.00836323481f) * r + 0.0416663736f) * r + 0.166665763f) * r + 0.5f;
  uint32_t power = (uint32_t)(n + 127) << 23;
  float scale;
  memcpy(&scale, &power, sizeof scale);
  return (1.0f + (r + r * r * p)) * scale;
}

INLINE float sigmoid(float x) {
  float e = exponential(x < 0.0f ? x : -x), s = 1.0f / (1.0f + e);
  return x < 0.0f ? e * s : s;
}

INLINE float hyperbolic_tangent(float x) {
  float size = x < 0.0f ? -x : x, t = size < 0.625f ? size * size : 0.0f;
  float p = (((-0.00611318834f * t + 0.0210100785f) * t - 0.0538540706f) * t + 0.133327946f) * t - 0.333333284f;
  float small = size + size * t * p;
  float large = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
  float found = size < 0.625f ? small : large;
  return x < 0.0f ? -found : found;
}

INLINE float error_function(float x) {
  float size = x < 0.0f ? -x : x, t, p, q;
  size = size < 4.0f ? size : 4.0f;
  t = size < 1.0f ? size * size : 0.0f;
  p = (((((7.8891193e-05f * t - 0.000802084105f) * t + 0.00518953521f) * t - 0.0268544443f) * t + 0.112836003f) * t - 0.37612626f) * t + 0.128379166f;
  q = (((((((-3.45940123e-07f * size + 5.85993939e-06f) * size - 2.42968235e-05f) * size - 0.000222268718f) * size + 0.00351539673f) * size - 0.0237510893f) * size + 0.10638418f) * size + 0.635004342f) * size + 1.1286937f;
  float found = size < 1.0f ? size + size * p : 1.0f - exponential(-size * q);
  return x < 0.0f ? -found : found;
}

INLINE float unit(float x) {
  x = x < 1.0f ? x : 1.0f;
  return x > 0.0f ? x : 0.0f;
}

INLINE float activate_one(float x, activation a) {
  switch (a.kind) {
    case RELU:
      return x > 0.0f ? x : 0.0f;
    case CLIP:
      x = x > a.first ? x : a.first;
      return x < a.second ? x : a.second;
    case LEAKY:
      return (x > 0.0f ? x : 0.0f) + a.first * (x < 0.0f ? x : 0.0f);
    case HARD_SWISH:
      return x * unit(x * (1.0f / 6.0f) + 0.5f);
    case HARD_SIGMOID:
      return unit(x * a.first + a.second);
    case SIGMOID:
      return sigmoid(x);
    case SILU:
      return x * sigmoid(x);
    case GELU:
      return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
    case GELU_TANH:
      return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x)));
    case TANH:
      return hyperbolic_tangent(x);
    case ERF:
      return error_function(x);
    default:
      return x;
  }
}

#define ACTIVATE_ROW(KIND) \
  case KIND: \
    a.kind = KIND; \
    for (size_t x = 0; x < n; x++) out[x] = activate_one(in[x], a); \
    break;

/* `in` and `out` may be the same row. */
UNUSED static void activate_row(const float *in, float *out, size_t n, activation a) {
  switch (a.kind) {
    ACTIVATE_ROW(RELU)
    ACTIVATE_ROW(CLIP)
    ACTIVATE_ROW(LEAKY)
    ACTIVATE_ROW(HARD_SWISH)
    ACTIVATE_ROW(HARD_SIGMOID)
    ACTIVATE_ROW(SIGMOID)
    ACTIVATE_ROW(SILU)
    ACTIVATE_ROW(GELU)
    ACTIVATE_ROW(GELU_TANH)
    ACTIVATE_ROW(TANH)
    ACTIVATE_ROW(ERF)
    case NONE:
      if (in != out) memcpy(out, in, n * sizeof(float));
      break;
  }
}
