"""Executors of attack units (this process, a pool, several ranks), and the record that survives a kill."""
