"""Runtimes of devices: what converts an exported file for each of them, and what runs the result here."""
