"""The record: torn, damaged, foreign and full-disk cases."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s2ap_deploy.errors import RunFolderError, StorageError
from s2ap_deploy.evaluation.autoattack.frozen_model import Unit, UnitResult
from s2ap_deploy.evaluation.workers.record import AttackRecord, _line

HEADER: dict[str, Any] = {"seed": 0, "shape": (2, 1, 3, 3), "eps": "8/255"}


def result(block: int = 0, attack: str = "apgd-ce", broken: tuple[int, ...] = (4,)) -> UnitResult:
    return UnitResult(
        unit=Unit(block, attack, 99, (3, 4, 5)),
        broken=broken,
        predictions=tuple(7 for _ in broken),
        points=np.full((len(broken), 1, 3, 3), 0.1 + block, dtype=np.float32),
        seconds=1.5,
        zero_gradient=block == 1,
    )


def filled(folder: Path) -> Path:
    record = AttackRecord(folder, HEADER)
    record.append(result(0))
    record.append(result(1))
    record.append(result(0, "square", broken=()))
    return folder / "attack.jsonl"


def test_what_was_appended_comes_back(tmp_path) -> None:
    filled(tmp_path)
    found = AttackRecord(tmp_path, HEADER).results
    assert [(r.unit.block, r.unit.attack, r.broken) for r in found] == [
        (0, "apgd-ce", (4,)), (1, "apgd-ce", (4,)), (0, "square", ()),
    ]  # fmt: skip
    assert found[1].unit == result(1).unit
    assert found[1].predictions == (7,)
    assert found[1].zero_gradient
    assert found[1].points.dtype == np.float32
    assert np.array_equal(found[1].points, result(1).points)
    assert len(found[2].points) == 0


def test_cut_anywhere_the_record_keeps_its_whole_lines(tmp_path) -> None:
    path = filled(tmp_path)
    content = path.read_bytes()
    header_end = content.index(b"\n") + 1
    for length in range(header_end, len(content) + 1):
        path.write_bytes(content[:length])
        record = AttackRecord(tmp_path, HEADER)
        assert len(record.results) == content[:length].count(b"\n") - 1
        assert path.read_bytes().endswith(b"\n")
    path.write_bytes(content[:-3])
    record = AttackRecord(tmp_path, HEADER)
    record.append(result(0, "square", broken=()))
    assert path.read_bytes() == content


def test_another_header_is_refused_by_name(tmp_path) -> None:
    path = filled(tmp_path)
    with pytest.raises(RunFolderError, check=lambda error: error.code == "attack-record-foreign") as error:
        AttackRecord(tmp_path, {**HEADER, "eps": "0.031"})
    assert "--overwrite" in (error.value.hint or "")
    with pytest.raises(RunFolderError, check=lambda error: error.code == "attack-record-foreign"):
        AttackRecord(tmp_path, {**HEADER, "ids": "x"})
    path.write_bytes(_line({**HEADER, "schema_version": 9}))
    with pytest.raises(RunFolderError, check=lambda error: error.code == "attack-record-foreign"):
        AttackRecord(tmp_path, HEADER)


def test_damage_is_reported(tmp_path) -> None:
    path = filled(tmp_path)
    whole = path.read_text()
    points = tmp_path / "block-00001-apgd-ce.safetensors"
    kept = points.read_bytes()

    points.write_bytes(kept[:-1] + b"\x01")
    with pytest.raises(RunFolderError, check=lambda error: error.code == "attack-record-damaged"):
        AttackRecord(tmp_path, HEADER)
    points.unlink()
    with pytest.raises(RunFolderError, check=lambda error: error.code == "attack-record-damaged"):
        AttackRecord(tmp_path, HEADER)
    points.write_bytes(kept)

    lines = whole.splitlines(keepends=True)
    path.write_text(lines[0] + "{not json}\n" + lines[1])
    with pytest.raises(RunFolderError, check=lambda error: error.code == "attack-record-damaged"):
        AttackRecord(tmp_path, HEADER)
    path.write_bytes(lines[0].encode() + _line({"block": 0}))
    with pytest.raises(RunFolderError, check=lambda error: error.code == "attack-record-damaged"):
        AttackRecord(tmp_path, HEADER)
    path.write_text(whole.replace('"zero_gradient":false', '"zero_gradient":true', 1))
    with pytest.raises(RunFolderError, check=lambda error: error.code == "attack-record-damaged"):
        AttackRecord(tmp_path, HEADER)
    path.write_text("")
    with pytest.raises(RunFolderError, check=lambda error: error.code == "attack-record-damaged"):
        AttackRecord(tmp_path, HEADER)


def test_a_file_name_in_the_record_does_not_lead_out_of_the_folder(tmp_path) -> None:
    path = filled(tmp_path / "record")
    header, first, *_ = path.read_text().splitlines()
    entry = json.loads(first)
    entry["points"] = "../secret"
    del entry["sha256"]
    path.write_bytes(header.encode() + b"\n" + _line(entry))
    with pytest.raises(RunFolderError, check=lambda error: error.code == "path-outside"):
        AttackRecord(tmp_path / "record", HEADER)


def test_a_full_disk_leaves_the_record_as_it_was(tmp_path, monkeypatch) -> None:
    path = filled(tmp_path)
    before = path.read_bytes()
    record = AttackRecord(tmp_path, HEADER)

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    for broken in ((), (4,)):
        with pytest.raises(StorageError, match=r"(?i)no space left"):
            record.append(result(1, "square", broken=broken))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert len(AttackRecord(tmp_path, HEADER).results) == 3


def test_a_file_where_the_folder_should_be(tmp_path) -> None:
    (tmp_path / "record").write_text("")
    with pytest.raises(StorageError, check=lambda error: error.code == "storage"):
        AttackRecord(tmp_path / "record", HEADER)
