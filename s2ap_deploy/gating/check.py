"""One question that a gate asks, and its answer. No torch."""

from __future__ import annotations

from typing import Literal

from s2ap_deploy.spec import Record

Status = Literal["pass", "fail", "inconclusive"]


class Check(Record):
    """One question and its answer. ``bound`` is what was compared with the threshold."""

    name: str
    status: Status
    words: str
    threshold: float | None = None
    observed: float | None = None
    bound: float | None = None
