"""Architectures, the classifier that carries its own normalisation, and checkpoints."""
