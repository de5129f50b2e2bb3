"""Cost, size and time estimates before a run."""
