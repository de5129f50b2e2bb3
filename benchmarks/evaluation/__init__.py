"""Attacks and bounds."""
