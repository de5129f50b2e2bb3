# make             device.elf: the self-test for a bare-metal Cortex-M, whose flash and RAM the linker checks
# make run         run it in QEMU, which reads vectors.bin through semihosting
# make CPU=cortex-m7 MACHINE=mps2-an500, make CPU=cortex-m3 MACHINE=mps2-an385 FPU=: other cores, soft floats
CROSS = arm-none-eabi-
CPU = cortex-m4
FPU = -mfloat-abi=hard -mfpu=fpv4-sp-d16
MACHINE = mps2-an386
FLASH = 128K
RAM = 40K
CFLAGS = -Os
ALL = -std=c11 -mthumb -mcpu=$(CPU) $(FPU) $(CFLAGS) -ffunction-sections -fdata-sections

device.elf: startup.c device.c model.c model.h cortex-m.ld
	$(CROSS)gcc $(ALL) -o $@ startup.c device.c model.c -T cortex-m.ld -nostartfiles --specs=nano.specs \
	  -Wl,--gc-sections -Wl,--defsym=FLASH_BYTES=$(FLASH) -Wl,--defsym=RAM_BYTES=$(RAM)
	$(CROSS)size $@

run: device.elf
	qemu-system-arm -M $(MACHINE) -kernel device.elf -nographic -monitor none -serial null \
	  -semihosting-config enable=on,target=native

.PHONY: run
