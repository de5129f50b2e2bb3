"""The whole path on one GPU."""
