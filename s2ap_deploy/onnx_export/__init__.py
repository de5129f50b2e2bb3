"""From a pruned classifier to a file that a device runs, and the proof that they agree."""
