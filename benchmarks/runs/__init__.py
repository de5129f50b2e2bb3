"""Whole runs: the demo, start-up, kills, and equality of two checkouts."""
