"""Architectures, the classifier that carries its own normalization, and checkpoints."""
