"""The inner maximisation and the robust losses that training uses."""
