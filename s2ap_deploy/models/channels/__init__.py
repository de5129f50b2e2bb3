"""Channel groups: which layers are coupled, and their removal."""
