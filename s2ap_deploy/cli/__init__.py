"""One file per command; no mathematics."""
