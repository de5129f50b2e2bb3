"""Define a target for a board that needs small files with a fixed batch size."""

from __future__ import annotations

from s2ap_deploy.recipe.target import Target, TargetBudgets

TINY_BOARD = Target(
    name="tiny-board",
    description="A board with 256 KiB for the file and one image at a time",
    batch=1,
    budgets=TargetBudgets(bytes=262144),
)
