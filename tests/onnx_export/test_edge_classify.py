"""The stand-alone runner under export/edge, on files that the exporter wrote."""

import ast
import importlib.util
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, helper
from PIL import Image

from s2ap_deploy.data.imagefolder import squared
from s2ap_deploy.onnx_export import encoding
from s2ap_deploy.onnx_export.inference import logits, session
from s2ap_deploy.spec import Preprocessing

RUNNER = Path(__file__).resolve().parents[2] / "export" / "edge" / "classify.py"
NAMES = ["ant", "bee", "cat", "dog", "eel"]


def load_runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("edge_classify", RUNNER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


classify = load_runner()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(rows: bytes, width: int, height: int, color: int = 2, depth: int = 8, interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    data = zlib.compress(rows)
    # Two data chunks, since encoders split them at will.
    parts = chunk(b"IDAT", data[:5]) + chunk(b"IDAT", data[5:])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + parts + chunk(b"IEND", b"")


def saved(pixels: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def image() -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (8, 8, 3), np.uint8)


@pytest.fixture
def model_file(dense_model, tmp_path) -> Path:
    model, _ = encoding.encode(dense_model)
    preprocessing = Preprocessing(size=(3, 8, 8), crop=8)
    helper.set_model_props(
        model, {"s2ap.preprocessing": preprocessing.model_dump_json(), "s2ap.class_names": json.dumps(NAMES)}
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(RUNNER), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_imports_nothing_but_numpy_onnx_runtime_and_for_jpeg_pillow() -> None:
    imported = set()
    for node in ast.walk(ast.parse(RUNNER.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"numpy", "onnxruntime", "PIL"}


def test_an_image_gets_the_logits_of_the_evaluation(model_file, image, tmp_path) -> None:
    (tmp_path / "image.png").write_bytes(saved(image))
    done = run(model_file, tmp_path / "image.png", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    tensor = (image.transpose(2, 0, 1)[None] / np.float32(255)).astype(np.float32)
    expected = logits(session(model_file), tensor)[0]
    assert np.array_equal(np.array(result["logits"], np.float32), expected)
    assert (result["index"], result["class"]) == (expected.argmax(), NAMES[expected.argmax()])


def test_people_get_two_lines(model_file, image, tmp_path) -> None:
    (tmp_path / "image.png").write_bytes(saved(image))
    lines = run(model_file, tmp_path / "image.png").stdout.splitlines()
    assert lines[0].startswith("class ")
    assert lines[1].startswith("logits ")
    assert len(lines[1].split()) == 6


@pytest.mark.parametrize("suffix", ["png", "ppm", "npy", "tensor.npy"])
def test_every_format_gives_the_same_tensor(image, tmp_path, suffix) -> None:
    path = tmp_path / f"image.{suffix}"
    tensor = image.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    if suffix.endswith("npy"):
        np.save(path, tensor if suffix.startswith("tensor") else image)
    else:
        path.write_bytes(saved(image, suffix.upper()))
    found = classify.prepare(classify.read(path), (3, 8, 8), {})
    assert found.dtype == np.float32
    assert found.tobytes() == tensor.tobytes()


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0, 2]), st.integers(0, 2**32))
@settings(deadline=None, max_examples=80)
def test_every_row_filter_is_undone_as_pillow_does(width, height, color, seed) -> None:
    generator = np.random.default_rng(seed)
    channels = 3 if color == 2 else 1
    rows = generator.integers(0, 256, (height, 1 + width * channels), np.uint8)
    rows[:, 0] = generator.integers(0, 5, height)
    data = png(rows.tobytes(), width, height, color)
    expected = np.asarray(Image.open(io.BytesIO(data))).reshape(height, width, channels)
    assert np.array_equal(classify.decode_png(data), expected)


def test_an_opaque_alpha_channel_is_dropped_and_another_refused(image) -> None:
    opaque = np.dstack([image, np.full((8, 8), 255, np.uint8)])
    assert np.array_equal(classify.decode_png(saved(opaque)), image)
    opaque[2, 2, 3] = 254
    with pytest.raises(classify.Unusable, match="transparency"):
        classify.decode_png(saved(opaque))


def test_color_becomes_gray_as_pillow_converts_it(image) -> None:
    gray = np.asarray(Image.fromarray(image).convert("L"))
    assert np.array_equal(classify.convert(image, 1)[:, :, 0], gray)
    assert np.array_equal(classify.convert(gray[:, :, None], 3), np.dstack([gray] * 3))


@pytest.mark.parametrize("height", [8, 9, 11])
@pytest.mark.parametrize("width", [8, 9, 10])
def test_the_crop_is_torchvisions(height, width) -> None:
    from torchvision.transforms.functional import center_crop

    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    expected = np.asarray(center_crop(Image.fromarray(pixels), [7, 7]))
    assert np.array_equal(classify.center(pixels, 7), expected)


def test_another_value_range_is_applied(image) -> None:
    found = classify.prepare(image, (3, 8, 8), {"value_range": [-1.0, 1.0]})
    assert np.allclose(found, image.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


BROKEN = {
    "empty": (b"", "neither PNG"),
    "text": (b"hello", "neither PNG"),
    "truncated": (png(bytes(8 * 25), 8, 8)[:60], "damaged"),
    "checksum": (png(bytes(8 * 25), 8, 8).replace(b"IHDR", b"IHDX"), "damaged: checksum"),
    "too few pixels": (png(bytes(30), 8, 8), "damaged: too few pixels"),
    "filter": (png(b"\x09" + bytes(24), 8, 1), "damaged: row filter 9"),
    "sixteen bits": (png(bytes(8 * 49), 8, 8, depth=16), "only PNG of 8 bits"),
    "palette": (png(bytes(8 * 9), 8, 8, color=3), "only PNG of 8 bits"),
    "interlaced": (png(bytes(8 * 25), 8, 8, interlaced=1), "only PNG of 8 bits"),
    "huge": (png(bytes(10), 2**30, 2**30), "pixels is not read"),
    "wrong size": (png(bytes(9 * 28), 9, 9), "the model takes 8x8"),
    "scaled": (png(bytes(4 * 13), 4, 4), "smaller than the crop"),
    "pnm header": (b"P6 8 8", "damaged: the header ends early"),
    "pnm pixels": (b"P5 8 8 255\n123", "damaged"),
    "pnm sixteen bits": (b"P5 8 8 65535\n" + bytes(128), "only 255"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_unusable_image_is_one_line_and_exit_two(case, model_file, tmp_path, capsys) -> None:
    data, message = BROKEN[case]
    if case == "wrong size":
        model = ModelProto.FromString(model_file.read_bytes())
        helper.set_model_props(model, {})
        model_file.write_bytes(model.SerializeToString())
    path = tmp_path / "image"
    path.write_bytes(data)
    assert classify.main([str(model_file), str(path)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 8), np.float64), "must be uint8 or float32"),
        (np.full((3, 8, 8), np.nan, np.float32), "not finite"),
        (np.zeros((3, 4, 4), np.float32), "the model takes [3, 8, 8]"),
        (np.zeros((8, 8, 2), np.uint8), "2 channels, the model takes 3"),
        (np.array([{}], object), "must be uint8 or float32"),
    ],
)
def test_an_unusable_array_is_refused(array, message, model_file, tmp_path, capsys) -> None:
    np.save(tmp_path / "image.npy", array)
    assert classify.main([str(model_file), str(tmp_path / "image.npy")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("height", "width", "side"), [(20, 31, 8), (31, 20, 8), (5, 7, 9), (8, 8, 3), (40, 20, 7)]
)
def test_the_shorter_side_is_resized_to_the_bits_of_pillow(height, width, side) -> None:
    pixels = np.random.default_rng(side).integers(0, 256, (height, width, 3), np.uint8)
    expected = np.asarray(squared(Image.fromarray(pixels), side, None))
    assert np.array_equal(classify.shorter_side(pixels, side), expected)


def test_an_image_whose_scaling_depends_on_the_version_of_pillow_is_refused(image) -> None:
    with pytest.raises(classify.Unusable, match="scale its shorter side to 7 pixels first"):
        classify.prepare(np.repeat(image, 3, axis=0), (3, 7, 7), {"resize": 7, "crop": 7})


def test_its_syntax_is_that_of_python_3_9() -> None:
    ast.parse(RUNNER.read_text(), feature_version=(3, 9))


def test_the_input_is_dumped_as_the_model_got_it(model_file, image, tmp_path) -> None:
    (tmp_path / "image.png").write_bytes(saved(image))
    dumped = tmp_path / "input"  # the name stays as it was given
    assert classify.main([str(model_file), str(tmp_path / "image.png"), "--dump-input", str(dumped)]) == 0
    tensor = image.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    assert np.load(dumped).tobytes() == tensor.tobytes()


def test_a_fixed_batch_is_filled_up(model_file, image, tmp_path, capsys) -> None:
    (tmp_path / "image.png").write_bytes(saved(image))
    answers = []
    for batch in (None, 3):
        if batch:
            model = ModelProto.FromString(model_file.read_bytes())
            model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
            model_file.write_bytes(model.SerializeToString())
        assert classify.main([str(model_file), str(tmp_path / "image.png"), "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["logits"] == pytest.approx(answers[1]["logits"], abs=1e-5)


@pytest.mark.parametrize("threads", ["-1", "1025"])
def test_an_odd_number_of_threads_is_refused(threads, model_file, tmp_path, capsys) -> None:
    assert classify.main([str(model_file), str(tmp_path / "none.png"), f"--threads={threads}"]) == 2
    assert capsys.readouterr().err == "classify: --threads is a number from 0 to 1024\n"


def test_a_missing_or_damaged_model_is_exit_two(model_file, tmp_path, capsys) -> None:
    (tmp_path / "image.png").write_bytes(saved(np.zeros((8, 8, 3), np.uint8)))
    assert classify.main([str(tmp_path / "none.onnx"), str(tmp_path / "image.png")]) == 2
    model_file.write_bytes(model_file.read_bytes()[:-1000])
    assert classify.main([str(model_file), str(tmp_path / "image.png")]) == 2
    assert "ONNX Runtime refuses it" in capsys.readouterr().err
