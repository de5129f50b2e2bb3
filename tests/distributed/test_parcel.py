"""What travels between ranks arrives whole, also where its code was never imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from s2ap_deploy.distributed import parcel, sources

MODULE = """
from torch import nn
class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 3)
    def forward(self, x):
        return self.inner(x)
"""
OPEN = """
import sys
from pathlib import Path
from s2ap_deploy.distributed import parcel
network, parameter = parcel.unpack(Path(sys.argv[1]).read_bytes())
print(type(network).__name__, parameter is network.inner.weight, float(parameter.detach().sum()))
"""


def test_what_is_shared_inside_stays_shared() -> None:
    network = nn.Linear(2, 2)
    one, other = parcel.unpack(parcel.pack((network, network.weight)))
    assert one.weight is other
    assert one.weight is not network.weight
    assert torch.equal(one.weight, network.weight)


def test_a_class_from_a_file_is_imported_from_there(tmp_path: Path) -> None:
    file = tmp_path / "strange_layers.py"
    file.write_text(MODULE)
    sources.import_source("strange_layers", str(file))
    network = sys.modules["strange_layers"].Strange()
    try:
        (tmp_path / "parcel").write_bytes(parcel.pack((network, network.inner.weight), [network]))
    finally:
        del sys.modules["strange_layers"]
    found = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path / "parcel")], capture_output=True, text=True, check=True
    )
    name, same, total = found.stdout.split()
    assert (name, same) == ("Strange", "True")
    assert abs(float(total) - float(network.inner.weight.detach().sum())) < 1e-6


def test_a_module_that_is_there_is_not_imported_again(tmp_path: Path) -> None:
    sources.import_source("torch.nn", str(tmp_path / "absent.py"))
    assert sys.modules["torch.nn"] is nn
