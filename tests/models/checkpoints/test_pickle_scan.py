"""What a pickle asks for is read, and nothing of it is run."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from s2ap_deploy.errors import CheckpointError
from s2ap_deploy.models.checkpoints.pickle_scan import COMPUTED, scan


class Malicious:
    """Writes a marker file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.system, (f"touch {self.marker}",)


SYSTEM = f"{os.name}.system"  # pickle names a function by the module that defines it


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("zipped", [True, False])
def test_finds_code_in_both_formats_at_every_protocol(tmp_path, protocol, zipped) -> None:
    marker = tmp_path / "ran"
    path = tmp_path / "model.pt"
    content = {"state_dict": {"w": torch.rand(3)}, "extra": Malicious(marker)}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert scan(path.read_bytes()).requested == (SYSTEM,)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_finds_code_in_a_plain_pickle(tmp_path, protocol) -> None:
    assert scan(pickle.dumps([1, Malicious(tmp_path / "ran")], protocol=protocol)).requested == (SYSTEM,)


@pytest.mark.parametrize("protocol", range(2, 5))
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_numbers_and_numpy_values_ask_for_nothing(tmp_path, protocol, zipped) -> None:
    path = tmp_path / "model.pt"
    content = {
        "state_dict": torch.nn.BatchNorm2d(3).state_dict(),
        "rate": np.float64(0.1),
        "step": np.int64(3),
        "history": np.arange(4.0),
    }
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert scan(path.read_bytes()).requested == ()


@pytest.mark.parametrize("protocol", range(6))
def test_tells_the_protocol_and_who_wrote_it(tmp_path, protocol) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": 1}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    found = scan(path.read_bytes())
    assert found.torch_save
    assert max(found.protocol, 1) == max(protocol, 1)  # 0 and 1 carry no mark
    assert not scan(pickle.dumps({"w": 1}, protocol=protocol)).torch_save


def test_a_whole_module_asks_for_its_classes(tmp_path) -> None:
    path = tmp_path / "model.pt"
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), path)
    assert {"torch.nn.modules.container.Sequential", "torch.nn.modules.linear.Linear"} <= set(
        scan(path.read_bytes()).requested
    )


def test_the_same_name_used_twice_through_the_memo_is_found() -> None:
    data = b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x930h\x00h\x01\x93."
    assert scan(data).requested == ("os.system",)


def test_a_frame_between_the_names_hides_nothing() -> None:
    frame = b"\x95" + (0).to_bytes(8, "little")
    assert scan(b"\x80\x04\x8c\x02os" + frame + b"\x8c\x06system\x93.").requested == ("os.system",)


def test_a_computed_name_is_listed_as_such() -> None:
    # The names come from a tuple taken apart, as no honest pickler writes it.
    assert scan(b"\x80\x04\x8c\x02os)\x93.").requested == (COMPUTED,)


def test_an_extension_code_is_listed() -> None:
    assert scan(b"\x80\x02\x82\x07.").requested == ("(extension 7 of copyreg)",)


def test_every_pickle_of_a_legacy_file_is_read(tmp_path) -> None:
    """The code may hide in the list of storage keys, behind the object itself."""
    stream = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {}, {"w": 1}, [Malicious(tmp_path / "ran")]):
        pickle.dump(value, stream, protocol=2)
    assert scan(stream.getvalue()).requested == (SYSTEM,)


def test_every_pickle_of_a_zip_is_read(tmp_path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(1))
        archive.writestr("b/data.pkl", pickle.dumps(Malicious(tmp_path / "ran")))
    assert scan(stream.getvalue()).requested == (SYSTEM,)


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x03\x04 and no archive", b"\x80\x02}q\x00"])
def test_what_is_no_pickle_is_refused(data) -> None:
    with pytest.raises(CheckpointError, check=lambda error: error.code == "pickle-unreadable"):
        scan(data)


@given(st.binary(max_size=60))
@example(b"g5\n.")
@example(b"\x93.")
@example(b"0.")
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_names_or_a_refusal(data) -> None:
    for prefix in (b"", b"\x80\x04", b"PK"):
        try:
            found = scan(prefix + data).requested
        except CheckpointError:
            continue
        assert all(isinstance(name, str) for name in found)
