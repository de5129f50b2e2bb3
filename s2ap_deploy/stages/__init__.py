"""The stages of a run, one module each, and the context they share."""
