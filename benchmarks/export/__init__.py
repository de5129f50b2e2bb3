"""Size, speed and equality of exported files."""
