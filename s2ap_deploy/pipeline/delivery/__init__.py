"""From a judged network to the file that a device runs, planned, made and held against its target."""
