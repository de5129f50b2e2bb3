"""Certificates made, checked again, and held against a gate."""
