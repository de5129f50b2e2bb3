"""How a file stores weights: where the non-zero ones are, their values, and the way back."""
