"""What compaction did, for a report. No torch, no onnx."""

from __future__ import annotations

from s2ap_deploy.spec import Record

# With this fraction of the multiply-accumulates left, and above, nobody can measure a difference.
NOTICEABLE = 0.98


class CompactedTensor(Record):
    """Channels that the weight ``name`` writes, before and after.

    ``merged`` of those that went, or channels tied to them, were constants other than zero that a later
    layer read: their part moved into its bias or into another constant channel. The rest was zero, or
    nobody read it.
    """

    name: str
    channels_before: int
    channels_after: int
    merged: int


class Skipped(Record):
    """Nodes of one operator whose channels were left as they are, and why."""

    operator: str
    reason: str
    nodes: tuple[str, ...]


class Compaction(Record):
    """Removal of dead structure from a graph.

    ``macs``: multiply-accumulates of all convolutions and matrix products for one image.
    ``parameters``: entries of all floating-point tensors that the file stores.
    ``tensors`` lists the weights that lost channels. ``max_logit_difference``, where it was measured, is
    between the graphs before and after on real and artificial images, ``tolerance`` what was allowed.
    """

    channels_before: int
    channels_after: int
    merged: int
    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int
    tensors: tuple[CompactedTensor, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    max_logit_difference: float | None = None
    tolerance: float | None = None

    @property
    def statement(self) -> str:
        """What removing channels means for speed, in one sentence."""
        share = self.macs_after / max(self.macs_before, 1)
        speed = "which does save time" if share < NOTICEABLE else "so hardly any time is saved"
        return (
            f"Compaction left out {self.removed:,} of {self.channels_before:,} channels, no output changed: "
            f"{share:.0%} of the multiply-accumulates remain, {speed}."
        )

    @property
    def removed(self) -> int:
        return self.channels_before - self.channels_after
