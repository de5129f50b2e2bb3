"""Benchmarks of s2ap-deploy: one measurement per script, run by ``python -m benchmarks NAME``."""
