"""The stages of a run: each reads what the one before left in the run folder and adds its own."""
