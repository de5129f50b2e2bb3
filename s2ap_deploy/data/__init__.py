"""Data sets, their splits, and the loaders that feed them."""
