"""The release gate: thresholds, coverage of shipped files, and the verdict."""
