const char *model_class_name(int index) { return index < 0 || index >= MODEL_CLASSES ? NULL : names[index]; }

const void *model_weights(void) {
#if MODEL_WEIGHTS_EMBEDDED
  return constants;
#else
  return NULL;
#endif
}

int model_check(const void *weights, size_t bytes) {
  static const unsigned char head[64] = {
      /*HEAD*/};
  const unsigned char *p = weights;
  uint64_t first = 0, second = 0, stated[2];
  if (weights == NULL || bytes != MODEL_WEIGHTS_BYTES || memcmp(p, head, sizeof head) != 0) return 0;
  for (size_t i = sizeof head; i < bytes; i += 4) {
    first += read_u32(p + i);
    second += first;
  }
  memcpy(stated, head + 16, sizeof stated);
  return first == stated[0] && second == stated[1];
}

void model_run(const void *weights, const float *image, float *logits, void *workspace) {
  const unsigned char *const w = (const unsigned char *)weights + 64;
  /*UNIT*/ *const space = workspace;
/*BODY*/
}

int model_run_batch(const void *weights, const float *images, size_t count, float *logits, void *workspace,
                    size_t bytes) {
  size_t workspaces = bytes / MODEL_WORKSPACE_BYTES;
  ptrdiff_t workers = (ptrdiff_t)(workspaces < count ? workspaces : count);
  if (workspaces == 0) return 0;
  PARALLEL_FOR
  for (ptrdiff_t worker = 0; worker < workers; worker++) {
    unsigned char *space = (unsigned char *)workspace + (size_t)worker * MODEL_WORKSPACE_BYTES;
    for (size_t i = (size_t)worker; i < count; i += (size_t)workers)
      model_run(weights, images + i * MODEL_CHANNELS * MODEL_HEIGHT * MODEL_WIDTH, logits + i * MODEL_CLASSES, space);
  }
  return 1;
}
