"""The inner maximization and the robust losses that training uses."""
