"""Bundles on this machine as the device, what comes back, and what a record may not say."""

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from s2ap_deploy import api, files
from s2ap_deploy.data import published
from s2ap_deploy.errors import InputError
from s2ap_deploy.evaluation.certificate import Certificate

RUNNER = Path(__file__).parents[2] / "export" / "edge" / "judge.py"
FEW = ["--repeats", "5", "--warmup", "1"]
ALL = ["--min-robust", "0", "--rule", "point"]


def on_device(bundle: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a bundle as a device does, with nothing of this project on the path."""
    words = [sys.executable, "-I", str(bundle), *FEW, *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def bundle(finished_run, tmp_path_factory) -> Path:
    return api.bundle(finished_run, output=tmp_path_factory.mktemp("bundle") / "bundle.pyz")


@pytest.fixture(scope="module")
def record(bundle) -> Path:
    """What came back from a device that answers as certified."""
    done = on_device(bundle, "--name", "board", cwd=bundle.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return bundle.parent / "device.json"


def edited(
    record: Path, target: Path, change: Callable[[dict[str, Any]], Any], *, sealed: bool = True
) -> Path:
    """Change a record; ``sealed`` gives it the hash of its new content."""
    content = json.loads(record.read_text())
    del content["content_sha256"]
    digest = hashlib.sha256(files.canonical_json(content).encode()).hexdigest()
    change(content)
    if sealed:
        digest = hashlib.sha256(files.canonical_json(content).encode()).hexdigest()
    target.write_text(files.canonical_json({**content, "content_sha256": digest}))
    return target


def repacked(bundle: Path, target: Path, member: str, data: bytes, *, listed: bool) -> Path:
    """Replace a member of a bundle; ``listed`` also replaces its hash, as one who knows the format can."""
    with zipfile.ZipFile(bundle) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content[member] = data
    if listed:
        about = json.loads(content["bundle.json"])
        about["members"][member] = about["file"]["sha256"] = hashlib.sha256(data).hexdigest()
        content["bundle.json"] = files.canonical_json(about).encode()
    with zipfile.ZipFile(target, "w") as archive:
        for name, each in content.items():
            archive.writestr(name, each)
    return target


def changed_weight(bundle: Path) -> bytes:
    """Return the packed ONNX file with the sign of its largest stored value changed."""
    import onnx

    with zipfile.ZipFile(bundle) as archive:
        model = onnx.ModelProto.FromString(archive.read("file/model.onnx"))
    floats = [each for each in model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT]
    tensor = max(floats, key=lambda each: np.abs(onnx.numpy_helper.to_array(each)).max())
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[np.unravel_index(np.abs(values).argmax(), values.shape)] *= -100
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def program(bundle) -> Any:
    """The program in the bundle, imported."""
    spec = importlib.util.spec_from_file_location("judge", RUNNER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def judged_as(program: Any, bundle: Path, target: Path, change: Callable[[Any, int], Any]) -> Path:
    """Write the record of a device whose n-th answer is ``change(logits, n)``."""
    honest, count = program.RUNTIMES["onnxruntime"], iter(range(10**6))

    def opened(folder, about, options):
        run, versions = honest(folder, about, options)
        return lambda image: change(run(image), next(count)), versions

    options = argparse.Namespace(name="board", threads=1, repeats=3, warmup=0, images=None)
    folder = target.parent / "unpacked"
    program.RUNTIMES["onnxruntime"] = opened
    try:
        program.write(target, program.judged(bundle, options, folder))
    finally:
        program.RUNTIMES["onnxruntime"] = honest
    return target


def test_equal_runs_give_equal_bytes(finished_run, bundle, tmp_path) -> None:
    again = api.bundle(finished_run, output=tmp_path / "again.pyz")
    assert again.read_bytes() == bundle.read_bytes()
    with zipfile.ZipFile(bundle) as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_what_a_device_measured_is_collected_and_judged(s2ap, own_run, record) -> None:
    content = json.loads(record.read_text())
    assert (content["name"], content["different"], content["n"]) == ("board", [], 40)
    assert content["peak_memory_bytes"] > 10 * 2**20
    assert content["times_ms"]
    found = s2ap.json("collect", own_run, record)
    assert (found["judged"]["clean_disagreements"], found["judged"]["adversarial_disagreements"]) == (0, 0)
    again = s2ap.json("collect", own_run, record)
    assert again == found
    gate = ["gate", "--run", own_run, *ALL]
    assert s2ap(*gate).code == 0
    assert s2ap(*gate, "--require-device", "board", "--max-latency-ms", 10_000).code == 0
    slow = s2ap(*gate, "--require-device", "board", "--max-latency-ms", 1e-9, "--json")
    assert slow.code == 1
    assert [each["rule"] for each in slow.answer["checks"] if each["status"] == "fail"] == ["latency"]
    missing = s2ap(*gate, "--require-device", "board,other", "--json")
    assert missing.code == 3
    assert [each["reason"] for each in missing.answer["checks"] if each["status"] != "pass"] == ["missing"]


def test_the_record_is_hashed_with_the_run(s2ap, own_run, record) -> None:
    s2ap.ok("collect", own_run, record)
    stored = own_run / "device-board" / "device.json"
    assert stored.read_bytes() == record.read_bytes()
    certificate = own_run / "certify" / "pruned.json"
    assert s2ap("verify", certificate, "--files").code == 0
    stored.write_text(stored.read_text().replace("p50", "p51"))
    assert s2ap("verify", certificate, "--files").code == 1
    assert s2ap("gate", "--run", own_run, *ALL, "--require-device", "board").code == 1


def test_a_further_record_replaces_only_when_asked(s2ap, own_run, record, tmp_path) -> None:
    s2ap.ok("collect", own_run, record)
    other = edited(record, tmp_path / "other.json", lambda each: each.update(threads=2))
    s2ap.refused("stage-inputs-changed", "collect", own_run, other)
    s2ap.ok("collect", own_run, other, "--name", "second")
    assert s2ap.json("collect", own_run, other, "--overwrite")["record"]["threads"] == 2
    s2ap.refused("device-name-invalid", "collect", own_run, other, "--name", "A B")
    # A new export discards what devices said about the old one.
    s2ap.ok("export", "--onnx", "--overwrite", "--run", own_run)
    assert not list(own_run.glob("device-*"))


@pytest.mark.parametrize("listed", [False, True])
def test_a_changed_weight_is_refused(listed, own_run, bundle, tmp_path) -> None:
    spoiled = repacked(
        bundle, tmp_path / "bundle.pyz", "file/model.onnx", changed_weight(bundle), listed=listed
    )
    done = on_device(spoiled, cwd=tmp_path)
    if not listed:
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert not (tmp_path / "device.json").exists()
        return
    assert done.returncode == 1, done.stdout + done.stderr
    with pytest.raises(InputError, check=lambda error: error.code == "device-record-foreign"):
        api.collect(own_run, tmp_path / "device.json")


def test_a_bundle_of_another_run_is_refused(record, channel_bundle_record) -> None:
    with pytest.raises(InputError, check=lambda error: error.code == "device-record-foreign"):
        api.collect(channel_bundle_record, record)


@pytest.fixture
def channel_bundle_record(s2ap, own_run) -> Path:
    """The same network certified again with another seed: another certificate."""
    s2ap.ok("certify", "--n", 10, "--overwrite", "--run", own_run)
    s2ap.ok("export", "--onnx", "--run", own_run)
    return own_run


def answers_all_right(content: dict[str, Any]) -> None:
    content["attacked"] = [7] * content["n"]


def flipped(content: dict[str, Any]) -> None:
    content["clean"][0] = (content["clean"][0] + 1) % 10


@pytest.mark.parametrize(
    ("change", "sealed", "code"),
    [
        (lambda each: each.update(p50_ms=1e-3), False, "record-invalid"),
        (lambda each: each.update(p50_ms=1e-3), True, "record-invalid"),
        (lambda each: each.update(p95_ms=1e-3), True, "record-invalid"),
        (lambda each: each.update(n=39), True, "record-invalid"),
        (lambda each: each["clean"].pop(), True, "record-invalid"),
        (lambda each: each.update(processor="another"), False, "device-record-edited"),
        (lambda each: each.update(times_ms=[1.0, -1.0]), True, "record-invalid"),
        (answers_all_right, True, "device-record-wrong"),
        (flipped, True, "device-record-wrong"),
        (
            lambda each: each["different"].append({"index": 0, "attacked": False, "gap": 0}),
            True,
            "device-record-wrong",
        ),
        (lambda each: each.update(certificate_sha256="a" * 64), True, "device-record-foreign"),
        (lambda each: each.update(file_sha256="a" * 64), True, "device-record-foreign"),
        (lambda each: each.update(kind="other"), True, "record-kind-wrong"),
        (lambda each: each.update(schema_version=2), True, "record-version-unknown"),
        (lambda each: each.update(name="../up"), True, "record-invalid"),
        (lambda each: each.update(more=1), True, "record-invalid"),
    ],
)
def test_records_that_are_refused(change, sealed, code, own_run, record, tmp_path) -> None:
    spoiled = edited(record, tmp_path / "device.json", change, sealed=sealed)
    with pytest.raises(InputError, check=lambda error: error.code == code and bool(error.hint)):
        api.collect(own_run, spoiled)
    assert not list(own_run.glob("device-*"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"n": 40', '"n": 40, "n": 40'),
        lambda text: text.replace('"threads": 1', '"threads": NaN'),
        lambda text: "",
    ],
    ids=["truncated", "duplicate key", "not a number", "empty"],
)
def test_files_that_are_no_record(spoil, own_run, record, tmp_path) -> None:
    (tmp_path / "device.json").write_text(spoil(record.read_text()))
    with pytest.raises(InputError, check=lambda error: error.code == "record-not-json"):
        api.collect(own_run, tmp_path / "device.json")


def test_a_device_that_answers_otherwise_is_named_with_its_points(
    s2ap, program, bundle, own_run, tmp_path
) -> None:
    told = judged_as(
        program, bundle, tmp_path / "device.json", lambda scores, n: -scores if n == 3 else scores
    )
    assert program.show(json.loads(told.read_text()), "device.json") == 1
    found = s2ap.json("collect", own_run, told)
    assert [(each["index"], each["attacked"]) for each in found["judged"]["changed"]] == [(3, False)]
    gate = ["gate", "--run", own_run, *ALL, "--json"]
    doubt, failed = s2ap(*gate), s2ap(*gate, "--require-device", "board")
    assert (doubt.code, failed.code) == (3, 1)
    for answer in (doubt.answer, failed.answer):
        (check,) = (each for each in answer["checks"] if each["rule"] == "device")
        assert check["reason"] == "answers-differ"
        assert "clean 3" in check["message"]


def test_an_answer_that_is_not_a_number_is_another_one(program, bundle, own_run, tmp_path) -> None:
    told = judged_as(
        program, bundle, tmp_path / "device.json", lambda scores, n: scores * np.nan if n == 2 else scores
    )
    content = json.loads(told.read_text())
    assert content["clean"][2] == program.NOT_FINITE
    assert {"index": 2, "attacked": False, "gap": None} in content["different"]
    device = api.collect(own_run, told)
    assert device.judged is not None
    assert (device.judged.clean_disagreements, device.judged.ties) == (1, 0)
    assert device.check(required=True).status == "fail"


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_c_library_needs_no_runtime(s2ap, own_run, tmp_path) -> None:
    s2ap.ok("export", "--onnx", "--c", "--name", "c", "--run", own_run)
    s2ap.refused("file-ambiguous", "bundle", own_run, "--output", tmp_path / "bundle.pyz")
    made = s2ap.json("bundle", own_run, "--file", "export-c/c", "--output", tmp_path / "bundle.pyz")
    done = on_device(Path(made["bundle"]), "--name", "c-board", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    device = api.collect(own_run, tmp_path / "device.json")
    assert device.check(required=True).status == "pass"
    assert (device.record.runtime, device.record.file) == ("c", "export-c/c/model.c")
    assert s2ap("gate", "--run", own_run, *ALL, "--require-device", "c-board").code == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--name", "A B"],
        ["--repeats", "0"],
        ["--output", "missing/device.json"],
        ["--library", "missing.so", "--reader", "x.py:f"],
        ["--images"],
    ],
)
def test_options_that_a_device_refuses(words, bundle, tmp_path) -> None:
    done = on_device(bundle, *words, cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--file", "export/none.onnx"], "file-not-exported"),
        (["--file", "certify/pruned.json"], "file-not-exported"),
        (["--file", "export/report.json"], "file-not-bundled"),
        (["--output", "bundle.zip"], "output-format-unknown"),
        (["--images", "."], "image-not-certified"),
    ],
)
def test_bundles_that_are_refused(words, code, s2ap, finished_run, tmp_path) -> None:
    s2ap.refused(code, "bundle", finished_run, *words, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_report_has_a_row_per_device(s2ap, own_run, record) -> None:
    s2ap.ok("collect", own_run, record)
    s2ap.ok("collect", own_run, record, "--name", "second")
    written = api.report(own_run)
    for text in (written.page.read_text(), written.card.read_text()):
        assert text.count("all 40 as certified") == 2
        assert "second" in text


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Gray images of 64 pixels with noise, some of them JPEG: an image folder of ten classes."""
    folder, noise = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    _, test = published.load_digits()
    images, labels = test.subset(list(range(60))).tensors()
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        large = Image.fromarray((image[0] * 255).to(torch.uint8).numpy()).resize((64, 72), Image.BICUBIC)
        levels = np.asarray(large).astype(int) + noise.integers(-40, 41, (72, 64))
        for part in ("train", "test"):
            place = folder / part / str(int(label)) / f"{index:02d}.{'jpg' if index % 2 else 'png'}"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).save(place)
    return folder


@pytest.fixture(scope="module")
def photo_run(s2ap, digits_model, photos, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("photo") / "s2ap-run"
    data = ["--data", f"imagefolder:{photos}", "--eps", "0.02", "--protocol", "quick"]
    s2ap.ok("certify", digits_model, *data, "--n", 12, "--run", run, "--threads", 1)
    s2ap.ok("export", "--onnx", "--run", run, "--threads", 1)
    return run


CAMERA = """
import numpy as np
from PIL import Image

def bicubic(path):
    return np.asarray(fitted(path).resize((8, 8), Image.BICUBIC))

def same(path):
    return (np.asarray(fitted(path).resize((8, 9), Image.BILINEAR))[:8] / 255).astype(np.float32)[None]

def nearest(path):
    return np.asarray(fitted(path).resize((8, 9), Image.NEAREST))[:8]

def color(path):
    return np.zeros((8, 8, 3), np.uint8)

def fitted(path):
    return Image.open(path).convert("L")
"""


def test_a_certificate_names_how_image_files_became_pixels(photo_run, finished_run) -> None:
    pixels = Certificate.load(photo_run / "certify" / "dense.json").pixels
    assert pixels is not None
    assert (pixels.channel_order, pixels.resize, pixels.crop, pixels.antialias) == ("L", 8, 8, True)
    assert pixels.decoder == f"Pillow {PIL.__version__}"
    without = (finished_run / "certify" / "pruned.json").read_text()
    assert '"pixels"' not in without
    certificate = Certificate.load(finished_run / "certify" / "pruned.json")
    assert (certificate.pixels, certificate.text()) == (None, without)


@pytest.mark.parametrize(
    ("reader", "same"), [(None, True), ("same", True), ("bicubic", False), ("nearest", False)]
)
def test_another_resize_filter_is_found(reader, same, s2ap, photo_run, photos, tmp_path) -> None:
    run = Path(shutil.copytree(photo_run, tmp_path / "s2ap-run"))
    bundle = api.bundle(run, output=tmp_path / "bundle.pyz", images=photos, most_images=12)
    (tmp_path / "camera.py").write_text(CAMERA)
    words = [] if reader is None else ["--reader", f"camera.py:{reader}"]
    done = on_device(bundle, "--images", *words, cwd=tmp_path)
    assert done.returncode in ((0,) if same else (0, 1)), done.stderr
    device = api.collect(run, tmp_path / "device.json")
    assert device.seen is not None
    assert device.seen.images == 12
    gate = s2ap("gate", "--run", run, *ALL, "--json")
    (check,) = (each for each in gate.answer["checks"] if each["rule"] == "camera")
    assert check["status"] == ("pass" if same else "inconclusive")
    if same:
        assert device.seen.largest == 0
    else:
        assert device.seen.largest > 0.02
        assert check["reason"] == "pixels-differ"
        (required,) = (
            each
            for each in s2ap("gate", "--run", run, *ALL, "--require-device", "device", "--json").answer[
                "checks"
            ]
            if each["rule"] == "camera"
        )
        assert required["status"] == "fail"


def test_images_that_a_device_cannot_use(photo_run, photos, tmp_path) -> None:
    bundle = api.bundle(photo_run, output=tmp_path / "bundle.pyz")
    (tmp_path / "camera.py").write_text(CAMERA)
    for words in (
        ["--images"],
        ["--images", tmp_path],
        ["--images", photos, "--reader", "camera.py:missing"],
        ["--images", photos, "--reader", "missing.py:read"],
        ["--images", photos, "--reader", "camera.py:color"],
    ):
        done = on_device(bundle, *words, cwd=tmp_path)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stdout + done.stderr
    assert on_device(bundle, "--images", photos, cwd=tmp_path).returncode == 0


@pytest.mark.runtimes
@pytest.mark.parametrize("processor", ["Haswell", "cortex-a53"])
def test_an_emulated_processor_gives_the_answers_of_the_certificate(
    processor, emulated, s2ap, bundle, own_run, tmp_path
) -> None:
    words = [*emulated(processor), str(bundle), *FEW, "--name", processor.lower()]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    device = api.collect(own_run, tmp_path / "device.json")
    assert device.record.machine == ("x86_64" if processor == "Haswell" else "aarch64")
    assert not any(name.startswith("AVX512") for name in device.record.features)
    asked = ["--require-device", processor.lower(), "--max-latency-ms", 9999]
    assert s2ap("gate", "--run", own_run, *ALL, *asked).code == 0


@pytest.mark.runtimes
@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-gcc") is None, reason="no cross compiler for ARM64")
def test_the_c_library_of_an_emulated_processor_gives_the_same_answers(
    emulated, s2ap, own_run, tmp_path
) -> None:
    emulator = emulated("cortex-a53")
    s2ap.ok("export", "--onnx", "--c", "--name", "c", "--run", own_run)
    library = tmp_path / "libmodel.so"
    cross = ["aarch64-linux-gnu-gcc", "-std=c11", "-O3", "-mcpu=cortex-a53", "-shared", "-fPIC"]
    subprocess.run([*cross, "-o", library, own_run / "export-c" / "c" / "model.c"], check=True)
    bundle = api.bundle(own_run, file="export-c/c", output=tmp_path / "bundle.pyz")
    words = [*emulator, str(bundle), *FEW, "--name", "a53-c", "--library", str(library)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert api.collect(own_run, tmp_path / "device.json").check(required=True).status == "pass"
