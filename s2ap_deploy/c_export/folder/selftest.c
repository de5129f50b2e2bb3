/* Runs the test vectors: selftest vectors.bin [weights.bin]. Exit code 0: every logit is as expected.

   vectors.bin: "S2APV001", then in 32 bits each: images, whether logits must have the same bits (1) or only be close
   (0), and as a float how close; then for each image its pixels and its logits. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

#define PIXELS (MODEL_CHANNELS * MODEL_HEIGHT * MODEL_WIDTH)

static void *read_file(const char *name, size_t *size) {
  FILE *file = fopen(name, "rb");
  if (!file || fseek(file, 0, SEEK_END) != 0) return NULL;
  long length = ftell(file);
  void *data = length > 0 ? malloc((size_t)length) : NULL;
  rewind(file);
  if (data && fread(data, 1, (size_t)length, file) != (size_t)length) {
    free(data);
    data = NULL;
  }
  fclose(file);
  *size = length > 0 ? (size_t)length : 0;
  return data;
}

int main(int count, char **words) {
  size_t size = 0, bytes = MODEL_WEIGHTS_BYTES;
  unsigned char *vectors = count > 1 ? read_file(words[1], &size) : NULL;
  void *loaded = MODEL_WEIGHTS_EMBEDDED || count < 3 ? NULL : read_file(words[2], &bytes);
  const void *weights = MODEL_WEIGHTS_EMBEDDED ? model_weights() : loaded;
  float *workspace = malloc(MODEL_WORKSPACE_BYTES);
  static float pixels[PIXELS], logits[MODEL_CLASSES], expected[MODEL_CLASSES];
  uint32_t images, exact, wrong = 0;
  float tolerance;
  if (!vectors || !workspace || size < 20 || memcmp(vectors, "S2APV001", 8) != 0 || !model_check(weights, bytes)) {
    fprintf(stderr, "selftest: the vectors or the weights are missing, or not this model's\n");
    return 2;
  }
  memcpy(&images, vectors + 8, 4);
  memcpy(&exact, vectors + 12, 4);
  memcpy(&tolerance, vectors + 16, 4);
  if (size != 20 + (size_t)images * (sizeof pixels + sizeof logits)) return 2;
  for (uint32_t i = 0; i < images; i++) {
    const unsigned char *at = vectors + 20 + i * (sizeof pixels + sizeof logits);
    memcpy(pixels, at, sizeof pixels);
    memcpy(expected, at + sizeof pixels, sizeof expected);
    model_run(weights, pixels, logits, workspace);
    int differs = 0;
    for (int k = 0; k < MODEL_CLASSES; k++) {
      float difference = logits[k] > expected[k] ? logits[k] - expected[k] : expected[k] - logits[k];
      if (exact ? memcmp(&logits[k], &expected[k], sizeof(float)) != 0 : !(difference <= tolerance)) differs = 1;
    }
    wrong += (uint32_t)differs;
  }
  printf("%u of %u images as expected%s\n", (unsigned)(images - wrong), (unsigned)images, exact ? ", bit for bit" : "");
  free(vectors);
  free(loaded);
  free(workspace);
  return wrong ? 1 : 0;
}
