"""Checkpoint files: reading, matching with an architecture, and building the classifier."""
