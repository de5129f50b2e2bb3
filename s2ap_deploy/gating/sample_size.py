"""Sample sizes: what a number of samples can show, before any attack runs."""

from __future__ import annotations

from s2ap_deploy.evaluation import statistics
from s2ap_deploy.gating.pairs import LEVEL
from s2ap_deploy.spec import Record

POWER = 0.8


class DetectableDrop(Record):
    """The smallest ``drop`` that is told from none with 80 % power.

    ``discordance`` is the share of samples that are robust with only one of the two networks.
    """

    discordance: float
    drop: float


class SampleSize(Record):
    """What ``n`` samples can show under the rule ``lower``.

    ``needed`` of them must survive for a floor of ``threshold``; None when even all would not show it.
    """

    n: int
    threshold: float | None
    needed: int | None
    drops: tuple[DetectableDrop, ...]

    @classmethod
    def of(cls, n: int, threshold: float | None = None) -> SampleSize:
        """Compute it for ``n`` samples and a floor, if there is one. Raises ValueError for n < 1."""
        return cls(
            n=n,
            threshold=threshold,
            needed=None if threshold is None else statistics.least_survivors(n, threshold, LEVEL),
            drops=tuple(
                DetectableDrop(discordance=rate, drop=statistics.detectable_drop(n, rate, LEVEL, POWER))
                for rate in statistics.DISCORDANCE_RATES
            ),
        )

    def __str__(self) -> str:
        """Sentences for a person, one per line."""
        rates = ", ".join(
            f"{each.drop:.2%} where they differ on {each.discordance:.0%}" for each in self.drops
        )
        lines = [
            f"on {self.n} images a network that lost nothing against the dense one shows it in {POWER:.0%} "
            f"of cases if the drop that is allowed is at least {rates} of the images"
        ]
        if self.threshold is not None and self.needed is None:
            lines.append(f"{self.n} samples cannot show a floor of {self.threshold:.1%}, even if all survive")
        elif self.threshold is not None:
            share = f"{self.needed} of {self.n} ({(self.needed or 0) / self.n:.1%})"
            lines.append(f"a floor of {self.threshold:.1%} needs {share} to survive")
        return "\n".join(lines)
