/* Example of a start file for a Cortex-M: memory, floating-point unit, main. */
#include <stdint.h>

extern uint32_t data_start[], data_end[], data_stored[], bss_start[], bss_end[], stack_end[];
int main(void);
void reset(void);

static void stop(void) {
  for (;;) {
  }
}

__attribute__((section(".vectors"), used)) static const uintptr_t table[16] = {
    (uintptr_t)stack_end, (uintptr_t)reset, (uintptr_t)stop, (uintptr_t)stop,
    (uintptr_t)stop,      (uintptr_t)stop,  (uintptr_t)stop};

void reset(void) {
  uint32_t *from = data_stored;
#if defined(__ARM_FP)
  *(volatile uint32_t *)0xE000ED88u |= 0xFu << 20; /* access to the floating-point unit */
  __asm__ volatile("dsb\n isb");
#endif
  for (uint32_t *to = data_start; to < data_end; to++) *to = *from++;
  for (uint32_t *to = bss_start; to < bss_end; to++) *to = 0;
  main();
  stop();
}
