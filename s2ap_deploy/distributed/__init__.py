"""Ranks: the processes that share one command's work, on one machine or on many."""
