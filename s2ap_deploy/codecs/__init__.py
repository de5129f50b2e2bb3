"""Encodings of sparse weights: their names, encoders, decode graphs and sizes."""
