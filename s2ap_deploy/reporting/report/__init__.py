"""The report of a run: one HTML page and a model card."""
