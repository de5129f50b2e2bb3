"""The C++ runner under export/edge/cpp: built here, and held against classify.py and the evaluation."""

import importlib.util
import io
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tomllib
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from PIL import Image
from torch import Tensor, nn

from s2ap_deploy.data import imagefolder as evaluation
from s2ap_deploy.data.splits import Augmentation, MemorySplit
from s2ap_deploy.onnx_export import encoding
from s2ap_deploy.onnx_export.dead_channels.compact import compact
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.onnx_export.quantization import quantize
from s2ap_deploy.spec import Preprocessing

EDGE = Path(__file__).resolve().parents[2] / "export" / "edge"
PROBE = Path(__file__).with_name("edge_probe.cpp")
TOOLS = ("make", "g++", "readelf")
JPEG = any(Path("/usr/include").rglob("jpeglib.h"))  # libjpeg-turbo's header, where the program reads JPEG

missing = [tool for tool in TOOLS if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"building the C++ runner needs {' and '.join(missing)}"
)

Done = subprocess.CompletedProcess


def load_runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("edge_classify", EDGE / "classify.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


classify = load_runner()


def ran(*command: str | Path, **options: Any) -> Done[str]:
    # As Python prints them, bytes that are no text become marks.
    options = {"encoding": "utf-8", "errors": "replace", **options}
    return subprocess.run([str(each) for each in command], capture_output=True, **options)


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    """The folder of the finished program, made as a deployer makes it."""
    folder = tmp_path_factory.mktemp("build")
    command = [
        "make",
        "-C",
        EDGE / "cpp",
        f"PYTHON={sys.executable}",
        f"BUILD={folder}",
        "CXXFLAGS=-O1 -Werror",
        *(["JPEG=1"] if JPEG else []),
    ]
    done = ran(*command)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def runners(build) -> dict[str, list[str | Path]]:
    """How each runner is called."""
    return {"python": [sys.executable, "-I", EDGE / "classify.py"], "c++": [build / "classify"]}


@pytest.fixture(scope="module")
def probe(build, tmp_path_factory) -> Callable[..., list[Any]]:
    """What the program's own readers, under address and undefined-behavior checks, make of many files."""
    program = tmp_path_factory.mktemp("probe") / "probe"
    (library,) = build.glob("libonnxruntime*")
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    done = ran(
        *("g++", "-std=c++17", "-O1", *checks, f"-I{EDGE / 'cpp'}", PROBE, "-o", program, library),
        f"-Wl,-rpath,{build}",
    )
    if done.returncode and "cannot find" in done.stderr:
        pytest.skip("this compiler comes without sanitisers")
    assert done.returncode == 0, done.stderr

    def read(*files: Path, options: tuple[str, ...] = ()) -> list[Any]:
        names = "".join(f"{each}\n" for each in files)
        # The runtime's own library leaves objects behind that are no fault of the reader's.
        done = ran(program, *options, input=names, env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"})
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return read


class Small(nn.Module):
    """A convolution with a dead channel and a linear layer: enough for every kind of export."""

    def __init__(self, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.features = nn.Conv2d(size[0], 48, 3, stride=2, padding=1)
        self.linear = nn.Linear(48, 5)
        with torch.no_grad():
            self.features.weight[3] = self.features.bias[3] = 0
            self.features.weight.mul_(torch.rand_like(self.features.weight) < 0.4)
            self.linear.weight.mul_(torch.rand_like(self.linear.weight) < 0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.features(x)).mean((2, 3)))


NAMES = ['an "ant"', "Käfer", "\U0001f41d\n", "dog\x7f", "eel"]


def exported(
    path: Path,
    size: tuple[int, int, int],
    kind: str = "sparse",
    *,
    model: ModelProto | None = None,
    **facts: Any,
) -> Path:
    torch.manual_seed(1)
    if model is None:
        model = to_onnx(Small(size).eval(), size)
        if kind == "compact":
            model, removal = compact(model)
            assert removal.removed > 0
        if kind == "int8":
            model = quantize(model, np.random.default_rng(0).random((8, *size), dtype=np.float32))
        model, table = encoding.encode(model, encoding="ef")
        assert any(row.encoding == "ef" for row in table)
    preprocessing = Preprocessing(size=size, channel_order="L" if size[0] == 1 else "RGB", **facts)
    properties = {
        "s2ap.preprocessing": preprocessing.model_dump_json(),
        "s2ap.class_names": json.dumps(NAMES, ensure_ascii=False, indent=1),
    }
    helper.set_model_props(model, properties)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("kind", ["sparse", "int8", "compact"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_both_runners_see_the_evaluations_tensor_and_answer_alike(kind, mode, runners, tmp_path) -> None:
    """Digits are 8x8 gray and CIFAR-like images 32x32 color; here with room around them for the crop."""
    size = (1, 8, 8) if mode == "L" else (3, 32, 32)
    crop = size[1]
    shape = (crop + 3, crop + 5) if mode == "L" else (crop + 3, crop + 5, 3)
    pixels = np.random.default_rng(5).integers(0, 256, shape, np.uint8)
    picture = tmp_path / "image.png"
    Image.fromarray(pixels).save(picture)
    model = exported(tmp_path / "model.onnx", size, kind, crop=crop)
    decoded = evaluation.decode(str(picture), Preprocessing(size=size, crop=crop))
    pixels_of_one = torch.from_numpy(decoded.copy())[None]
    split = MemorySplit(
        pixels_of_one, torch.zeros(1, dtype=torch.long), ["0"], Augmentation(padding=0, flip=False)
    )
    expected = split.tensors()[0][0].numpy()
    answers = []
    for name, command in runners.items():
        dumped = tmp_path / f"{name}.npy"
        done = ran(*command, model, picture, "--json", "--dump-input", dumped)
        assert (done.returncode, done.stderr) == (0, "")
        tensor = np.load(dumped)
        assert (tensor.dtype, tensor.shape) == (np.float32, size)
        assert tensor.tobytes() == expected.tobytes()
        answers.append(json.loads(done.stdout))
        again = ran(*command, model, dumped, "--json")  # what was dumped is itself an input
        assert again.stdout == done.stdout
    assert answers[0] == answers[1]
    assert answers[0]["class"] == NAMES[answers[0]["index"]]
    assert len(set(answers[0]["logits"])) == 5


@pytest.mark.parametrize(
    ("width", "height", "mode", "suffix", "options"),
    [
        (64, 64, "L", "png", {}),
        (100, 37, "RGB", "png", {}),
        (37, 70, "RGB", "jpg", {}),
        (300, 200, "RGB", "jpg", {"quality": 80, "subsampling": 2}),
        (301, 203, "RGB", "jpg", {"quality": 95, "subsampling": 0}),
        (55, 90, "L", "jpg", {}),
        (120, 90, "RGB", "jpg", {"progressive": True}),
        (6, 6, "L", "png", {}),
        (5, 9, "RGB", "png", {}),
    ],
)
def test_images_are_decoded_and_resized_to_the_bits_of_the_evaluation(
    width, height, mode, suffix, options, runners, tmp_path
) -> None:
    if suffix == "jpg" and not JPEG:
        runners = {"python": runners["python"]}
    coarse = np.random.default_rng(5).integers(0, 256, (height // 4 + 2, width // 4 + 2, 3), np.uint8)
    picture = tmp_path / f"image.{suffix}"
    image = Image.fromarray(coarse).convert(mode).resize((width, height), Image.Resampling.BICUBIC)
    image.save(picture, **options)
    model = exported(tmp_path / "model.onnx", (3, 32, 32), resize=32, crop=32)
    decoded = evaluation.decode(str(picture), Preprocessing(size=(3, 32, 32), resize=32, crop=32))
    expected = decoded.astype(np.float32) / np.float32(255)
    for name, command in runners.items():
        dumped = tmp_path / f"{name}.npy"
        done = ran(*command, model, picture, "--json", "--dump-input", dumped)
        assert (done.returncode, done.stderr) == (0, "")
        assert np.load(dumped).tobytes() == expected.tobytes(), name


def test_what_cannot_be_resized_or_decoded_to_those_bits_is_refused_by_both(runners, tmp_path) -> None:
    model = exported(tmp_path / "model.onnx", (3, 32, 32), resize=32, crop=32)
    tall, damaged, inks = (tmp_path / name for name in ("tall.png", "damaged.jpg", "inks.jpg"))
    Image.new("RGB", (40, 81)).save(tall)
    Image.effect_noise((64, 64), 50).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:600])
    Image.new("CMYK", (40, 40)).save(inks)
    refusals = {tall: "scale its shorter side", **({damaged: "decoded", inks: "gray or RGB"} if JPEG else {})}
    for picture, words in refusals.items():
        done = [ran(*command, model, picture) for command in runners.values()]
        assert [each.returncode for each in done] == [2, 2]
        assert len({each.stderr for each in done}) == 1
        assert words in done[0].stderr


def test_people_get_the_same_lines(runners, tmp_path) -> None:
    """A gray picture for a color model, another value range, and a batch that is fixed."""
    size = (3, 8, 8)
    torch.manual_seed(1)
    batches = nn.Sequential(Small(size)).eval()
    model = ModelProto.FromString(to_onnx(batches, size).SerializeToString())
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    exported(tmp_path / "model.onnx", size, model=model, value_range=(-1.0, 1.3))
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(tmp_path / "image.png")
    python, cpp = (
        ran(
            *command,
            tmp_path / "model.onnx",
            tmp_path / "image.png",
            "--threads=2",
            "--dump-input",
            tmp_path / name,
        )
        for name, command in runners.items()
    )
    assert python.returncode == 0, python.stderr
    assert (cpp.returncode, cpp.stdout, cpp.stderr) == (0, python.stdout, "")
    assert np.load(tmp_path / "python").tobytes() == np.load(tmp_path / "c++").tobytes()
    assert np.load(tmp_path / "c++").min() == -1


def network(inputs: list[Any], outputs: list[Any], nodes: list[Any]) -> bytes:
    graph = helper.make_graph(nodes, "graph", inputs, outputs)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(made.SerializeToString())


def value(name: str, shape: Any, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def same(shape: Any, kind: int = TensorProto.FLOAT) -> bytes:
    return network(
        [value("x", shape, kind)], [value("y", shape, kind)], [helper.make_node("Identity", ["x"], ["y"])]
    )


def told(key: str, content: str) -> bytes:
    model = ModelProto.FromString(same([1, 1, 2, 2]))
    helper.set_model_props(model, {key: content})
    return bytes(model.SerializeToString())


ODD_MODELS = {
    "no text": same([1, 1, 2, 2]).replace(b"Identity", b"Ident\xff\xfey"),
    "empty": b"",
    "text": b"no model",
    "noise": random.Random(3).randbytes(5000),
    "truncated": same([1, 1, 2, 2])[:-9],
    "integers": same([1, 1, 2, 2], TensorProto.INT64),
    "open size": same([1, 1, None, None]),
    "rank": same([1, 4]),
    "batch": same([2**40, 1, 2, 2]),
    "no classifier": same([1, 1, 2, 2]),
    "two inputs": network(
        [value("x", [1, 1, 2, 2]), value("z", [1, 1, 2, 2])],
        [value("y", [1, 1, 2, 2])],
        [helper.make_node("Add", ["x", "z"], ["y"])],
    ),
    "does not run": network(
        [value("x", ["n", 1, 2, 2])],
        [value("y", None)],
        [
            helper.make_node("Constant", [], ["s"], value_ints=[3, 5]),
            helper.make_node("Reshape", ["x", "s"], ["y"]),
        ],
    ),
    "names no JSON": told("s2ap.class_names", "["),
    "names no list": told("s2ap.class_names", '{"a": 1}'),
    "names no words": told("s2ap.class_names", "[1, 2]"),
    "half a character": told("s2ap.class_names", '["\\ud800"]'),
    "deep": told("s2ap.class_names", "[" * 100_000),
    "BGR": told("s2ap.preprocessing", '{"channel_order": "BGR"}'),
    "crop": told("s2ap.preprocessing", '{"crop": 0}'),
    "fraction": told("s2ap.preprocessing", '{"crop": 2.0}'),
    "truth": told("s2ap.preprocessing", '{"resize": true}'),
    "endless": told("s2ap.preprocessing", '{"value_range": [0, 1e999]}'),
    "NaN": told("s2ap.preprocessing", '{"value_range": [NaN, 1]}'),
}


@pytest.mark.parametrize("case", ODD_MODELS)
def test_an_odd_model_is_refused_in_one_line_by_both(case, runners, tmp_path, capfd) -> None:
    model, picture = tmp_path / "model.onnx", tmp_path / "image.png"
    model.write_bytes(ODD_MODELS[case])
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(picture)
    done = ran(*runners["c++"], model, picture)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("classify: ")
    assert done.stderr.count("\n") == 1
    assert classify.main([str(model), str(picture)]) == 2
    assert capfd.readouterr() == ("", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a model and an image"),
        (["MODEL"], "give a model and an image"),
        (["MODEL", "IMAGE", "more"], "give a model and an image"),
        (["MODEL", "IMAGE", "--jsn"], "there is no option --jsn"),
        (["MODEL", "IMAGE", "--json=1"], "there is no option --json"),
        (["MODEL", "IMAGE", "--threads"], "--threads needs a value"),
        (["MODEL", "IMAGE", "--threads", "-1"], "--threads is a number from 0 to 1024"),
        (["MODEL", "IMAGE", "--threads=1025"], "--threads is a number from 0 to 1024"),
        (["MODEL", "nowhere.png"], "nowhere.png: No such file or directory"),
        (["nowhere.onnx", "IMAGE"], "nowhere.onnx: No such file or directory"),
        (["MODEL", "FOLDER"], ": Is a directory"),
        (["MODEL", "IMAGE", "--dump-input", "nowhere/x.npy"], "nowhere/x.npy: No such file or directory"),
        (["MODEL", "IMAGE"], "the model takes 2x2"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_two(arguments, message, runners, tmp_path) -> None:
    model = ModelProto.FromString(same([1, 1, 2, 2]))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(tmp_path / "i.png")
    if arguments[-1:] == ["nowhere/x.npy"]:
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "i.png")
    places = {"MODEL": "m.onnx", "IMAGE": "i.png", "FOLDER": str(tmp_path)}
    done = ran(*runners["c++"], *(places.get(each, each) for each in arguments), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_is_no_error(runners) -> None:
    done = ran(*runners["c++"], "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--dump-input FILE" in done.stdout


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def any_png(draw: random.Random) -> bytes:
    """A small PNG, half of the time with damage that its checksums do not show."""
    width, height, color = draw.randint(1, 12), draw.randint(1, 12), draw.choice([0, 2, 2, 2, 3, 4, 6])
    stride = 1 + width * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    rows = bytearray(draw.randbytes(height * stride) if draw.random() < 0.5 else bytes(height * stride))
    if color in (4, 6) and draw.random() < 0.7:
        rows = bytearray(b"\xff" * len(rows))
    for row in range(height):
        rows[row * stride] = draw.choice([0, 1, 2, 3, 4] * 4 + [5])
    packer = zlib.compressobj(
        draw.choice([0, 1, 9]), zlib.DEFLATED, draw.choice([9, 15]), 9, draw.randint(0, 4)
    )
    data = bytearray(packer.compress(bytes(rows)) + packer.flush())
    chance = draw.random()
    if chance < 0.4:
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    elif chance < 0.5:
        del data[draw.randrange(len(data)) :]
    elif chance < 0.6:  # a block with code lengths of its own, which are noise
        data = bytearray(b"\x78\x9c" + bytes([4 | draw.randrange(256) & 0xF9]) + draw.randbytes(200))
    header = struct.pack(">IIBBBBB", width, height, draw.choice([8] * 20 + [16]), color, 0, 0, 0)
    cut = draw.randrange(len(data) + 1)
    more = chunk(draw.choice([b"tEXt", b"tRNS"]), b"abc") if draw.random() < 0.1 else b""
    parts = chunk(b"IDAT", bytes(data[:cut])) + chunk(b"IDAT", bytes(data[cut:])) + chunk(b"IEND", b"")
    return battered(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + parts, draw, 8, 0.1)


def any_pnm(draw: random.Random) -> bytes:
    kind, space = draw.choice(["P5", "P6", "P5x"]), draw.choice([" ", "\n", "#x\n ", " # c\n"])
    largest = draw.choice([255, 255, 255, 65535, "1e2"])
    header = f"{kind}{space}{draw.randint(0, 5)} {draw.randint(0, 5)} {largest}\n"
    return battered(header.encode() + draw.randbytes(draw.randint(0, 80)), draw, 2, 0.3)


def any_npy(draw: random.Random) -> bytes:
    shape = draw.choice([(3, 4, 5), (4, 5), (4, 5, 3), (0, 3, 2), (5,), (), (2, 2, 2, 2), (3, 1, 1)])
    array = np.frombuffer(draw.randbytes(60), np.uint8)[: int(np.prod(shape))].reshape(shape)
    array = np.array(array, draw.choice(["u1", "u1", "<f4", "<f4", ">f4", "f8"]), order=draw.choice("CF"))
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=draw.choice([(1, 0), (2, 0), (3, 0)]))
    return battered(stream.getvalue(), draw, 6, 0.4)


def battered(data: bytes, draw: random.Random, start: int, share: float) -> bytes:
    """In ``share`` of the cases with bytes changed, or cut off, behind ``start``."""
    content = bytearray(data)
    if draw.random() < share:
        if draw.random() < 0.3:
            del content[draw.randrange(start, len(content)) :]
        else:
            for _ in range(draw.randint(1, 3)):
                content[draw.randrange(start, len(content))] = draw.randrange(256)
    return bytes(content)


def test_whatever_the_file_both_read_the_same_or_say_the_same(probe, tmp_path) -> None:
    draw = random.Random(20)
    paths = []
    for index in range(1500):
        paths.append(tmp_path / f"{index}")
        paths[-1].write_bytes(draw.choice([any_png, any_png, any_png, any_pnm, any_npy])(draw))
    read = 0
    for path, found in zip(paths, probe(*paths), strict=True):
        try:
            array = classify.read(path)
            expected = {"shape": list(array.shape), "values": array.reshape(-1).tolist()}
            read += 1
        except classify.Unusable as error:
            expected = {"error": str(error)}
        assert found == expected, path.read_bytes()
    assert 150 < read < 1200


def any_json(draw: random.Random) -> str:
    def element(depth: int) -> Any:
        kind = draw.randrange(4 if depth > 2 else 6)
        if kind == 4:
            return [element(depth + 1) for _ in range(draw.randrange(4))]
        if kind == 5:
            return {word(): element(depth + 1) for _ in range(draw.randrange(4))}
        return [word(), draw.randint(-(10**20), 10**20), draw.uniform(-1e9, 1e-9), None][kind]

    def word() -> str:
        return "".join(draw.choice('a"\\/\b\n\t\x01\x7fé\u20ac\U0001f41d') for _ in range(draw.randrange(5)))

    content = json.dumps(element(0), ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1]))
    if draw.random() < 0.6:
        place = draw.randrange(len(content))
        content = content[:place] + draw.choice(
            ['"', "\\u12", "\\ud83d", "[", "}", ",", "1.", "-", "e", "\0", ""]
        )
    return content


def test_metadata_is_parsed_as_python_parses_it(probe, tmp_path) -> None:
    draw = random.Random(21)
    texts = [any_json(draw).encode() for _ in range(600)]
    texts += [
        b"",
        b" ",
        b"\xff",
        b'"\xed\xa0\x80"',
        b'"\xc0\x80"',
        b"01",
        b"1 2",
        b"[1,]",
        b"nul",
        b"[" * 9999,
    ]
    paths = []
    for index, content in enumerate(texts):
        paths.append(tmp_path / f"{index}")
        paths[-1].write_bytes(content)
    good = 0
    for content, found in zip(texts, probe(*paths, options=("--json",)), strict=True):
        try:
            expected = json.loads(content.decode(), parse_constant=classify.no_constant)
            json.dumps(expected, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            assert set(found) == {"error"}
            continue
        good += 1
        assert found == json.loads(json.dumps(expected), parse_int=float)
    assert good > 200


def test_the_interface_that_it_asks_for_is_in_every_runtime_that_is_allowed() -> None:
    project = tomllib.loads((EDGE.parents[1] / "pyproject.toml").read_text())["project"]
    (lowest,) = (
        re.findall(r">=1\.(\d+)", each)[0]
        for each in project["dependencies"]
        if each.startswith("onnxruntime>")
    )
    asked = next(
        line for line in (EDGE / "cpp" / "classify.cpp").read_text().splitlines() if "kApiVersion = " in line
    )
    assert int(asked.split("= ")[1].rstrip(";")) <= int(lowest)


def test_the_header_comes_with_its_license() -> None:
    folder = EDGE / "cpp" / "onnxruntime"
    assert (folder / "LICENSE").read_text().startswith("MIT License\n\nCopyright (c) Microsoft Corporation")
    assert "#define ORT_API_VERSION" in (folder / "onnxruntime_c_api.h").read_text()


def test_make_has_nothing_to_do_twice_and_says_what_it_lacks(build) -> None:
    command = ["make", "-C", EDGE / "cpp", f"BUILD={build}"]
    again = ran(*command, f"PYTHON={sys.executable}")
    assert again.returncode == 0
    assert "classify.cpp" not in again.stdout
    without = ran(*command, "ORT_LIBRARY=")
    assert without.returncode == 2
    assert "there is no ONNX Runtime: pip install onnxruntime" in without.stderr
