"""No step of a search or a fine-tuning waits for its device: what the host reads, it reads between epochs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("pretended_device.py")
EPOCHS = 2  # S2AP and AWP act in the second


@pytest.fixture(scope="module")
def counted() -> Any:
    """What ``pretended_device`` counted."""
    from torch.utils import backend_registration

    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices written in Python")
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_what_waits_is_counted(counted) -> None:
    found = counted["controls"]
    assert found.pop("nothing") == []
    assert len(found) == 8
    assert all(len(reasons) == 1 for reasons in found.values()), found


@pytest.mark.parametrize("stage", ["search", "finetune"])
def test_no_step_waits_for_its_device(counted, stage) -> None:
    """Every loss and allocation, S2AP and AWP off and on, alone and on two ranks, with its batch."""
    found = counted[stage]
    assert {name.split(",")[0] for name in found} == {"at", "trades", "mart", "fast", "free"}
    assert {name.split()[-1] for name in found} == {"1", "2"}
    for name, steps in found.items():
        assert len(steps) >= EPOCHS, name
        assert not any(steps), (name, steps)
