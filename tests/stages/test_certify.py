"""Records in another folder: points linked, journals copied and last, nothing there overwritten."""

import errno
import os
from pathlib import Path

import pytest

from s2ap_deploy.errors import StorageError
from s2ap_deploy.files import link
from s2ap_deploy.stages.certify import reuse_attack_record


@pytest.fixture
def record(tmp_path) -> Path:
    folder = tmp_path / "record"
    (folder / "curve").mkdir(parents=True)
    (folder / "attack.jsonl").write_text("header\n")
    (folder / "block-0.safetensors").write_bytes(b"points")
    (folder / "curve" / "fmn.jsonl").write_text("header\n")
    return folder


def test_everything_arrives_and_a_journal_grows_alone(record, tmp_path) -> None:
    into = tmp_path / "run" / "record-dense"
    reuse_attack_record(record, into)
    assert (into / "block-0.safetensors").stat().st_ino == (record / "block-0.safetensors").stat().st_ino
    with (into / "attack.jsonl").open("a") as stream:
        stream.write("unit\n")
    assert (record / "attack.jsonl").read_text() == "header\n"
    assert (into / "curve" / "fmn.jsonl").read_text() == "header\n"


def test_what_is_there_stays(record, tmp_path) -> None:
    into = tmp_path / "into"
    into.mkdir()
    (into / "attack.jsonl").write_text("further on\n")
    reuse_attack_record(record, into)
    assert (into / "attack.jsonl").read_text() == "further on\n"


def test_nothing_is_made_of_nothing(tmp_path) -> None:
    reuse_attack_record(tmp_path / "absent", tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_a_kill_on_the_way_leaves_no_journal(record, tmp_path, monkeypatch) -> None:
    from s2ap_deploy import files

    def killed(path: Path, data: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        reuse_attack_record(record, tmp_path / "into")
    monkeypatch.undo()
    found = {path.name for path in (tmp_path / "into").rglob("*") if path.is_file()}
    assert found == {"block-0.safetensors"}
    reuse_attack_record(record, tmp_path / "into")
    assert (tmp_path / "into" / "attack.jsonl").exists()


def test_a_disk_without_hard_links_gets_copies(record, tmp_path, monkeypatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EXDEV, "another device")

    monkeypatch.setattr(os, "link", refused)
    link(record / "block-0.safetensors", tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == b"points"
    assert (tmp_path / "copy.safetensors").stat().st_nlink == 1
    with pytest.raises(StorageError):
        link(record / "absent.safetensors", tmp_path / "other.safetensors")


def test_links_in_a_record_are_not_followed(record, tmp_path) -> None:
    (tmp_path / "secret").write_text("x")
    (record / "planted.safetensors").symlink_to(tmp_path / "secret")
    reuse_attack_record(record, tmp_path / "into")
    assert not (tmp_path / "into" / "planted.safetensors").exists()
