"""Exact removal of dead structure: smaller shapes, the same function."""
