"""Scores, masks, budgets, and the search that turns one into the other."""
