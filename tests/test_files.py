"""Writes are whole or absent, errors are typed, and names from files stay inside their folder."""

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ap_deploy import files
from s2ap_deploy.errors import InputError, RunFolderError, StorageError

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**128) + 1, 2**128 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_write_replaces_and_leaves_nothing_else(tmp_path) -> None:
    target = tmp_path / "model.bin"
    files.write_bytes(target, b"old")
    files.write_bytes(target, b"new")
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["model.bin"]


def test_permissions_follow_the_umask(tmp_path) -> None:
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_atomic_keeps_the_suffix_because_writers_choose_a_format_by_it(tmp_path) -> None:
    with files.atomic(tmp_path / "points.npy") as temporary:
        assert temporary.suffix == ".npy"
        assert temporary.parent == tmp_path
        temporary.write_bytes(b"x")
        assert not (tmp_path / "points.npy").exists()
    assert os.listdir(tmp_path) == ["points.npy"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_the_old_file(tmp_path, error) -> None:
    target = tmp_path / "a.json"
    files.write_text(target, "old")

    def write_half() -> None:
        with files.atomic(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_full_disk_is_a_storage_error_that_names_the_file(tmp_path, monkeypatch, call) -> None:
    target = tmp_path / "a.json"
    files.write_text(target, "old")
    monkeypatch.setattr(os, call, no_space)
    with pytest.raises(StorageError, check=lambda error: error.code == "disk-full") as caught:
        files.write_text(target, "new")
    monkeypatch.undo()
    assert caught.value.exit_code == 2
    assert caught.value.hint is not None
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_really_full_disk(tmp_path) -> None:
    """A file size limit makes the kernel itself refuse the write, for root as well."""
    script = (
        "import resource, signal, sys; from s2ap_deploy import errors, files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: files.write_bytes(sys.argv[1], bytes(5000))\n"
        "except errors.StorageError as error: print(error)\n"
    )
    target = tmp_path / "big.bin"
    done = subprocess.run(
        [sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith(f"cannot write {target}: File too large")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", ["missing/a.json", "folder", "file/a.json"])
def test_a_place_that_cannot_be_written(tmp_path, place) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, check=lambda error: error.code == "file-not-written"):
        files.write_text(tmp_path / place, "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_missing_file_cannot_be_read(tmp_path) -> None:
    for read in (files.sha256, files.read_bytes):
        with pytest.raises(StorageError, check=lambda error: error.code == "file-not-read"):
            read(tmp_path / "absent")


def test_read_bytes_stops_one_past_the_limit(tmp_path) -> None:
    files.write_bytes(tmp_path / "a", b"12345")
    assert files.read_bytes(tmp_path / "a", limit=3) == b"1234"


@settings(deadline=None, max_examples=60)
@given(json_values)
def test_canonical_json_is_read_back_and_has_one_form(value) -> None:
    text = files.canonical_json(value)
    assert json.loads(text) == value
    assert files.canonical_json(json.loads(text)) == text
    assert text.endswith("\n")


def test_canonical_json_does_not_depend_on_key_order() -> None:
    assert files.canonical_json({"b": 1, "a": 2}) == files.canonical_json({"a": 2, "b": 1})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_has_no_nan_and_nothing_is_written(tmp_path, value) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"x": value})
    assert os.listdir(tmp_path) == []


def test_sha256(tmp_path) -> None:
    files.write_bytes(tmp_path / "a", b"abc")
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_remove_takes_a_missing_file_for_removed_but_not_a_folder(tmp_path) -> None:
    files.remove(tmp_path / "absent")
    with pytest.raises(StorageError, check=lambda error: error.code == "file-not-removed"):
        files.remove(tmp_path)


def test_leftovers_of_a_killed_writer_are_removed_and_nothing_else(tmp_path) -> None:
    script = "import os, sys; from s2ap_deploy import files\nwith files.atomic(sys.argv[1]): os._exit(9)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.json")], check=False, timeout=60)
    assert (
        [name for name in os.listdir(tmp_path) if name.startswith(files.TEMPORARY)]
        == os.listdir(tmp_path)
        != []
    )
    (tmp_path / "kept.json").write_text("")
    files.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["kept.json"]


@pytest.mark.parametrize("name", ["a", "a/b.json", "a/./b"])
def test_within_accepts_what_lies_inside(tmp_path, name) -> None:
    assert files.within(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", ["", ".", "..", "a/../../b", "/etc/passwd", "a\\..\\b", "a\0b", "//x"])
def test_within_refuses_what_leads_out(tmp_path, name) -> None:
    with pytest.raises(RunFolderError, check=lambda error: error.code == "path-outside"):
        files.within(tmp_path, name)


def test_within_refuses_a_link_that_leads_out(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "out").symlink_to(tmp_path)
    with pytest.raises(RunFolderError, check=lambda error: error.code == "path-outside"):
        files.within(tmp_path / "run", "out/a")


def test_a_link_in_a_circle_is_an_input_error(tmp_path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError):  # refused at once, or (from Python 3.13) when it is opened
        files.sha256(files.within(tmp_path, "loop/a"))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(["..", ".", "a", "b", "", "/", "c.d"]), max_size=6).map("/".join))
def test_within_never_leaves_the_folder(name) -> None:
    folder = Path("/nowhere/run")
    try:
        path = files.within(folder, name)
    except RunFolderError:
        return
    assert os.path.normpath(path).startswith("/nowhere/run/")


@given(json_values)
def test_what_was_written_is_parsed_back(value) -> None:
    text = files.canonical_json(value)
    assert files.parse_json(text) == files.parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "NaN",
        "[-Infinity]",
        "1e400",
        "9" * 5000,
        str(2**128),
        '"\\ud800"',
        '{"\\uDFFF": 1}',
        "[" * 100_000,
        '{"a":' * 100_000,
        b"\xff\xfe\x80",
        '{"a": 1, "b": {"c": 1, "c": 1}}',
    ],
)
def test_what_could_not_be_written_again_is_not_parsed(text) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        files.parse_json(text)


def test_json_of_any_size_is_not_parsed(monkeypatch) -> None:
    monkeypatch.setattr(files, "LARGEST_JSON", 5)
    assert files.parse_json("[1,2]") == [1, 2]
    with pytest.raises(ValueError, match="larger than"):
        files.parse_json(b"[1, 2]")


@pytest.mark.parametrize(
    ("text", "value"), [('"\\ud83d\\ude00"', "\U0001f600"), ('"\\\\ud800"', "\\ud800"), ("-1e308", -1e308)]
)
def test_what_only_looks_odd_is_parsed(text, value) -> None:
    assert files.parse_json(text) == value
