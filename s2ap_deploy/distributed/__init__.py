"""Distributed execution: every rank runs the same command, rank 0 writes and prints."""
