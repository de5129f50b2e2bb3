"""The run folder: what is done, from which inputs, and where a kill left off. No torch."""
