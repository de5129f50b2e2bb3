"""Sweeps: a recipe in all combinations of chosen values."""
