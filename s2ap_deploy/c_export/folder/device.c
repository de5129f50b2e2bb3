/* The self-test of a bare-metal device: images and expected logits are read one by one through semihosting. */
#include "model.h"

#include <stdint.h>
#include <string.h>

enum { OPEN = 0x01, WRITE0 = 0x04, READ = 0x06, EXIT = 0x18 };

static float image[MODEL_CHANNELS * MODEL_HEIGHT * MODEL_WIDTH], logits[MODEL_CLASSES], expected[MODEL_CLASSES];
static float workspace[MODEL_WORKSPACE_BYTES / sizeof(float)];

static uint32_t ask_host(uint32_t operation, const void *block) {
  register uint32_t r0 __asm__("r0") = operation;
  register const void *r1 __asm__("r1") = block;
  __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
  return r0;
}

static int received(uint32_t file, void *to, uint32_t bytes) {
  const uint32_t block[3] = {file, (uint32_t)(uintptr_t)to, bytes};
  return ask_host(READ, block) == 0;
}

int main(void) {
  static const char name[] = "vectors.bin";
  static char text[] = "00 of 00 images as expected, bit for bit\n";
  const uint32_t opened[3] = {(uint32_t)(uintptr_t)name, 1, sizeof name - 1};
  uint32_t file = ask_host(OPEN, opened), head[5], good = 0;
  if (received(file, head, sizeof head)) {
    for (uint32_t i = 0; i < head[2]; i++) {
      if (!received(file, image, sizeof image) || !received(file, expected, sizeof expected)) break;
      model_run(model_weights(), image, logits, workspace);
      good += memcmp(logits, expected, sizeof logits) == 0;
    }
    text[0] = (char)('0' + good / 10 % 10);
    text[1] = (char)('0' + good % 10);
    text[6] = (char)('0' + head[2] / 10 % 10);
    text[7] = (char)('0' + head[2] % 10);
    ask_host(WRITE0, text);
  }
  ask_host(EXIT, (const void *)(uintptr_t)(good == head[2] ? 0x20026 : 0x20023));
  return 0;
}
