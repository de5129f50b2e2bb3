"""What an export says of layers that were made smaller. No torch, no onnx."""

from __future__ import annotations

from s2ap_deploy.spec import Record

RESELECTED = (
    "These channels were chosen anew by the scores of the run and nothing was trained since: the accuracy "
    "and the robustness of this network are those of no certificate."
)


class NarrowedGroup(Record):
    """Channels that vanish together, and what the search and this export kept of them.

    ``wanted`` is what the request comes to before alignment.
    """

    name: str
    channels: int
    searched: int
    wanted: int
    kept: int


class Skipped(Record):
    """A weight with rows in no group, and why."""

    name: str
    reason: str


class Cost(Record):
    """Prunable weights, and multiply-accumulates per image: of the whole network, wanted, and achieved."""

    before: int
    wanted: int
    achieved: int


class CompactFile(Record):
    """A file beside the ONNX file."""

    name: str
    sha256: str


class Narrowed(Record):
    """A network with physically smaller layers.

    ``keep_ratio`` None means the channels of the run's mask; otherwise they were chosen anew, and no
    certificate covers the result. ``align`` divides the counts of ``groups`` wherever they have so many
    channels. ``skipped`` are weights that stayed as wide as they were, ``classifier`` those that write the
    classes. ``max_logit_difference`` is against the whole network with the other channels masked.
    """

    keep_ratio: float | None = None
    align: int = 1
    groups: tuple[NarrowedGroup, ...]
    skipped: tuple[Skipped, ...] = ()
    classifier: tuple[str, ...] = ()
    weights: Cost
    macs: Cost
    max_logit_difference: float
    files: tuple[CompactFile, ...] = ()

    @property
    def reselected(self) -> bool:
        return self.keep_ratio is not None

    @property
    def summary(self) -> str:
        """What was achieved, in one sentence."""
        kept, channels = sum(g.kept for g in self.groups), sum(g.channels for g in self.groups)
        text = (
            f"{kept:,} of {channels:,} channels in {len(self.groups)} groups: "
            f"{self.macs.achieved / self.macs.before:.1%} of the multiply-accumulates, "
            f"{self.weights.achieved / self.weights.before:.1%} of the weights"
        )
        if self.align > 1:
            odd = sum(g.kept % self.align != 0 for g in self.groups)
            exactly = (self.macs.wanted, self.weights.wanted)
            text += f", in multiples of {self.align}"
            text += f" but for {odd} {'group' if odd == 1 else 'groups'}" if odd else ""
            if exactly != (self.macs.achieved, self.weights.achieved):
                shares = (part.wanted / part.before for part in (self.macs, self.weights))
                text += " (without alignment {:.1%} and {:.1%})".format(*shares)
        return text
