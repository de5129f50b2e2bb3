"""The pruned network as a small C library: lowering, planning, packing, writing and building."""
