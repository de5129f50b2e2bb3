"""What a report says of removed channels."""

from __future__ import annotations

import pytest

from s2ap_deploy.onnx_export.dead_channels.compaction_report import Compaction


@pytest.mark.parametrize(
    ("macs_after", "words"),
    [
        (430, "43% of the multiply-accumulates remain, which does save time."),
        (979, "98% of the multiply-accumulates remain, which does save time."),
        (980, "98% of the multiply-accumulates remain, so hardly any time is saved."),
        (1000, "100% of the multiply-accumulates remain, so hardly any time is saved."),
        (0, "0% of the multiply-accumulates remain, which does save time."),
    ],
)
def test_time_is_promised_only_where_work_is_gone(macs_after: int, words: str) -> None:
    removal = Compaction(
        channels_before=115,
        channels_after=67,
        merged=0,
        macs_before=1000,
        macs_after=macs_after,
        parameters_before=100,
        parameters_after=50,
    )
    assert removal.removed == 48
    assert removal.statement == f"Compaction left out 48 of 115 channels, no output changed: {words}"
