"""Whole pipelines as data: schema, shipped recipes, and errors that name the line."""
