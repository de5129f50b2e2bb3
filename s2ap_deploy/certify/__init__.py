"""Attacks on held-out images, what they show, and the verdict drawn from it."""
