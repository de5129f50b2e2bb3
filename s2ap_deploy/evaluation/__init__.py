"""Attacks on held-out images, bounds, and the certificates that record what they show."""
