"""What the benchmarks share: options, result files, timing, networks, images, commands and processes."""
