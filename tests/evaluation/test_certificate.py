"""The certificate: counts that follow from the samples, one spelling, and nothing read that is not one."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from s2ap_deploy import files
from s2ap_deploy.errors import InputError, StorageError
from s2ap_deploy.evaluation.certificate import Certificate
from s2ap_deploy.evaluation.points import save_points
from s2ap_deploy.evaluation.samples import Proven, ids_sha256
from s2ap_deploy.evaluation.statistics import clopper_pearson

MakeCertificate = Callable[..., Certificate]
BROKEN_BY = (None, None, "clean", "apgd-ce", None, "square")


@pytest.fixture
def certificate(make_certificate) -> Certificate:
    return make_certificate(BROKEN_BY)


def test_counts_shares_and_classes(certificate) -> None:
    assert (certificate.clean.k, certificate.robust.k, certificate.n) == (5, 3, 6)
    assert certificate.robust.value == 0.5
    assert certificate.robust.interval == clopper_pearson(3, 6)
    assert str(certificate.robust) == "50.0% [11.8%, 88.2%]"
    rows = {row.label: (row.name, row.n, row.clean, row.robust) for row in certificate.per_class}
    assert rows == {0: ("zero", 3, 2, 2), 1: ("one", 3, 3, 1)}
    assert certificate.samples[3].broken_by == "apgd-ce"


def test_its_words_claim_no_more_than_an_upper_bound(make_certificate) -> None:
    standard = make_certificate(BROKEN_BY)
    assert standard.formal_guarantee is False
    assert standard.statement == "robust accuracy under AutoAttack (upper bound)"
    adapted = make_certificate(BROKEN_BY, protocol="aa-adapted", flags=("adapted_protocol",))
    assert "adapted" in adapted.statement
    assert "upper bound" in adapted.statement


def test_saving_and_loading_is_exact_and_canonical(certificate, tmp_path) -> None:
    path = tmp_path / "certificate.json"
    certificate.save(path)
    loaded = Certificate.load(path)
    assert loaded == certificate
    assert loaded.text() == path.read_text() == files.canonical_json(json.loads(path.read_text()))
    assert files.sha256(path) == certificate.sha256 == loaded.sha256


def test_sample_ids_are_hashed_in_their_order() -> None:
    assert ids_sha256(["a", "b"]) != ids_sha256(["b", "a"]) != ids_sha256(["ba"])
    assert ids_sha256(["a"]) == hashlib.sha256(b'["a"]').hexdigest()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n": 7}, "n does not follow"),
        ({"sample_ids_sha256": "0"}, "sample_ids_sha256 does not follow"),
        ({"samples.3.broken_by": None}, "broken_by"),
        ({"samples.3.broken_by": "prayer"}, "broken_by"),
        ({"samples.2.broken_by": "square"}, "broken_by"),
        ({"samples.0.id": "test/1"}, "occurs twice"),
        ({"clean.k": 6}, "value and interval do not follow from 6 of 6"),
        ({"robust.k": 4, "robust.value": 4 / 6}, "value and interval do not follow from 4 of 6"),
        ({"robust.interval": [0.0, 0.4]}, "value and interval"),
        ({"per_class.0.robust": 3}, "per_class does not follow"),
        ({"formal_guarantee": True}, "formal_guarantee"),
        ({"flags": ["fine"]}, r"flags\.0"),
        ({"threat.eps": "-1"}, r"threat\.eps"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_certificate_that_contradicts_itself_is_refused(certificate, tmp_path, change, named) -> None:
    content = json.loads(certificate.text())
    for dotted, value in change.items():
        *way, last = [int(key) if key.isdigit() else key for key in dotted.split(".")]
        place = content
        for key in way:
            place = place[key]
        place[last] = value
    path = tmp_path / "certificate.json"
    files.write_json(path, content)
    with pytest.raises(InputError, match=named) as error:
        Certificate.load(path)
    assert error.value.exit_code == 2
    assert str(path) in error.value.message


def test_other_versions_are_refused_by_name(certificate, tmp_path) -> None:
    path = tmp_path / "certificate.json"
    files.write_json(path, {**json.loads(certificate.text()), "schema_version": 2})
    with pytest.raises(InputError, check=lambda error: error.code == "record-version-unknown"):
        Certificate.load(path)


@pytest.mark.parametrize("content", ["[1, 2]", "{}", '{"kind": "something else", "schema_version": 1}'])
def test_other_files_are_not_certificates(tmp_path, content) -> None:
    path = tmp_path / "certificate.json"
    path.write_text(content)
    with pytest.raises(InputError, check=lambda error: error.code == "record-kind-wrong"):
        Certificate.load(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"attack_seed": ', '"attack_seed": 9e999, "x": '),
        ('"seconds": ', '"seconds": NaN, "x": '),
        ('"statement": "', '"statement": "\\ud800'),
        ('"attack_seed": ', '"attack_seed": 1' + "0" * 400 + ', "x": '),
    ],
)
def test_what_has_no_canonical_text_is_refused(certificate, tmp_path, old, new) -> None:
    path = tmp_path / "certificate.json"
    path.write_text(certificate.text().replace(old, new, 1))
    with pytest.raises(InputError, check=lambda error: error.code == "record-not-json"):
        Certificate.load(path)


def test_an_endless_file_is_no_certificate(monkeypatch, certificate, tmp_path) -> None:
    with pytest.raises(StorageError, check=lambda error: error.code == "file-special"):
        Certificate.load(Path("/dev/zero"))
    certificate.save(tmp_path / "long.json")
    monkeypatch.setattr(files, "LARGEST_JSON", 1000)
    with pytest.raises(InputError, check=lambda error: error.code == "record-not-json"):
        Certificate.load(tmp_path / "long.json")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04\xff\xfe", b'{"kind": ', b"[" * 100_000])
def test_damaged_files_are_refused(tmp_path, content) -> None:
    path = tmp_path / "certificate.json"
    path.write_bytes(content)
    with pytest.raises(InputError, check=lambda error: error.code == "record-not-json"):
        Certificate.load(path)
    with pytest.raises(StorageError, check=lambda error: error.code == "file-not-read"):
        Certificate.load(tmp_path / "absent.json")


def test_the_points_file_holds_what_was_given(tmp_path) -> None:
    clean = torch.rand(3, 2, 4, 4).to(memory_format=torch.channels_last)
    attacked = clean + 0.1
    found = save_points(tmp_path / "points.safetensors", clean, attacked)
    assert found.name == "points.safetensors"
    assert found.sha256 == files.sha256(tmp_path / found.name)
    loaded = safetensors.torch.load_file(tmp_path / found.name)
    assert torch.equal(loaded["clean"], clean)
    assert torch.equal(loaded["attacked"], attacked)


PROVEN = Proven.of([0, 4], 6, method="test", tolerance=1e-6)


def test_proofs_are_a_lower_bound_beside_the_upper_one(make_certificate, certificate, tmp_path) -> None:
    proven = make_certificate(BROKEN_BY, proven=PROVEN)
    assert proven.proven is not None
    assert proven.proven.count <= proven.robust.k
    assert "lower bound" in proven.proven.statement
    proven.save(tmp_path / "certificate.json")
    assert Certificate.load(tmp_path / "certificate.json") == proven
    assert json.loads(certificate.text())["proven"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"proven.indices": [0, 3]},  # 3 was broken
        {"proven.indices": [0, 0]},
        {"proven.indices": [0, 6]},
        {"proven.count": 3},
        {"proven.n": 5},
        {"proven.interval": [0.0, 1.0]},
    ],
)
def test_proofs_that_contradict_the_attacks_are_refused(make_certificate, tmp_path, change) -> None:
    content = json.loads(make_certificate(BROKEN_BY, proven=PROVEN).text())
    for dotted, value in change.items():
        content["proven"][dotted.split(".")[1]] = value
    files.write_json(tmp_path / "certificate.json", content)
    with pytest.raises(InputError, check=lambda error: error.code == "record-invalid"):
        Certificate.load(tmp_path / "certificate.json")
