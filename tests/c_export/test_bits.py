"""The same logits to the bit: vector widths, compilers, processors under emulation, threads."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from s2ap_deploy.c_export.assembling import Facts, Sources, folder_files, vectors
from s2ap_deploy.c_export.writing import write_sources
from s2ap_deploy.codecs.values import ValuesName
from s2ap_deploy.models.architectures import registry
from s2ap_deploy.onnx_export.graph import to_onnx
from s2ap_deploy.onnx_export.quantization import quantize
from tests.c_export.conftest import images, library, prune
from tests.c_export.test_integers import Operators

pytestmark = pytest.mark.runtimes
SIZE = (3, 20, 32)
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror")
STATIC = ("-O2", "-static")
KINDS: dict[str, ValuesName] = {"float": "float32", "half": "float16", "byte": "int8"}


def network() -> nn.Module:
    """Every kernel, on widths that vectors do and do not divide, and functions of the library's own."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 24, 3, 2, padding=1),
        nn.GELU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=6),
        nn.Hardswish(),
        nn.MaxPool2d(2),
        nn.Conv2d(24, 30, 3, padding=2, dilation=2),
        nn.LeakyReLU(0.1),
        nn.BatchNorm2d(30),
        nn.Sigmoid(),
        nn.AvgPool2d(2, padding=1),
        nn.Conv2d(30, 16, 1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16 * 3 * 5, 40),
        nn.ReLU6(),
        nn.Linear(40, 7),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources and vectors whose logits come from a plain build with gcc: no vectors, no optimization."""
    torch.manual_seed(0)
    layers = network()
    prune(layers, 0.9)
    torch.nn.init.normal_(layers[-1].weight)  # type: ignore[arg-type]
    pixels = images(SIZE, 4)
    place = tmp_path_factory.mktemp("c")
    model = to_onnx(layers, SIZE)
    written: dict[str, Sources] = {
        name: write_sources(model, Facts(), values=kind, embed=True) for name, kind in KINDS.items()
    }
    integers = quantize(to_onnx(prune(Operators(), 0.5), SIZE), pixels)
    written["integer"] = write_sources(integers, Facts(), embed=True)
    for name, sources in written.items():
        plain = library(sources, ("gcc",), ("-std=c11", "-O1", "-DLANES=1"))
        content = {
            **sources.files,
            **folder_files(),
            "vectors.bin": vectors(pixels, plain(pixels), exact=True),
        }
        (place / name).mkdir()
        for file, data in content.items():
            (place / name / file).write_bytes(data)
    return place


def run(
    folder: Path, compiler: str, flags: tuple[str, ...], emulator: tuple[str, ...] = (), threads: int = 1
) -> None:
    """Build the self-test and run it; skip where a tool is missing."""
    for tool in (compiler, *emulator[:1]):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    for place in sorted(folder.iterdir()):
        words = [compiler, "-std=c11", *flags, "selftest.c", "model.c", "-o", "selftest"]
        built = subprocess.run(words, cwd=place, capture_output=True, text=True, check=False)
        if "-fopenmp" in flags and built.returncode and "omp" in built.stderr:
            pytest.skip(f"needs OpenMP for {compiler}")
        assert built.returncode == 0, built.stderr
        command = [*emulator, "./selftest", "vectors.bin"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            command, cwd=place, capture_output=True, text=True, env=environment, check=False
        )
        assert (done.returncode, done.stdout) == (0, "4 of 4 images as expected, bit for bit\n"), done.stderr


def supports(feature: str) -> bool:
    """Return whether this processor is x86-64 with a feature."""
    try:
        return feature in Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize(
    ("march", "feature"),
    [("x86-64-v4", "avx512f"), ("haswell", "avx2"), ("x86-64", "sse2"), ("plain", "sse2")],
)
def test_vectors_of_this_machine(folder: Path, compiler: str, march: str, feature: str) -> None:
    if platform.machine() != "x86_64" or not supports(feature):
        pytest.skip(f"needs an x86-64 processor with {feature}")
    kind = ("-DLANES=1",) if march == "plain" else (f"-march={march}",)
    run(folder, compiler, ("-O3", *kind))


@pytest.mark.parametrize(
    ("march", "processor"), [("haswell", "Haswell"), ("nehalem", "Nehalem")], ids=["haswell", "nehalem"]
)
def test_lesser_x86_processors(folder: Path, march: str, processor: str) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("needs a compiler for x86-64")
    run(folder, "gcc", (*STATIC, f"-march={march}"), ("qemu-x86_64", "-cpu", processor))


@pytest.mark.parametrize("processor", ["cortex-a53", "max"])
def test_arm(folder: Path, processor: str) -> None:
    run(folder, "aarch64-linux-gnu-gcc", STATIC, ("qemu-aarch64", "-cpu", processor))


@pytest.mark.parametrize("arch", ["mnist-conv", "digits-conv"])
@pytest.mark.parametrize("arithmetic", ["float32", "int8 weights", "integers"])
@pytest.mark.parametrize(
    ("processor", "machine", "fpu"),
    [
        ("cortex-m4", "mps2-an386", "-mfloat-abi=hard -mfpu=fpv4-sp-d16"),
        ("cortex-m7", "mps2-an500", "-mfloat-abi=hard -mfpu=fpv5-sp-d16"),
        ("cortex-m3", "mps2-an385", ""),
    ],
)
def test_bare_metal(
    tmp_path: Path, processor: str, machine: str, fpu: str, arithmetic: str, arch: str
) -> None:
    """At 90%, in 128 KiB of flash and 40 KiB of RAM, which the linker script enforces."""
    for tool in ("arm-none-eabi-gcc", "qemu-system-arm", "make"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    torch.manual_seed(0)
    architecture = registry.resolve(arch)
    assert architecture.input_size is not None
    model = to_onnx(prune(architecture.build(10), 0.9), architecture.input_size)
    pixels = images(architecture.input_size, 3)
    if arithmetic == "integers":
        model = quantize(model, pixels)
    kind = KINDS["byte" if arithmetic == "int8 weights" else "float"]
    sources = write_sources(model, Facts(), values=kind, static=True)
    expected = vectors(pixels, library(sources, ("gcc",), ("-std=c11", "-O1"))(pixels), exact=True)
    for name, data in {**sources.files, **folder_files(static=True), "vectors.bin": expected}.items():
        (tmp_path / name).write_bytes(data)
    words = ["make", "run", f"CPU={processor}", f"MACHINE={machine}", f"FPU={fpu}", "FLASH=128K", "RAM=40K"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "03 of 03 images as expected, bit for bit" in done.stdout + done.stderr


def test_riscv(folder: Path) -> None:
    run(folder, "riscv64-linux-gnu-gcc", STATIC, ("qemu-riscv64",))


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("threads", [1, 4])
def test_threads(folder: Path, compiler: str, threads: int) -> None:
    run(folder, compiler, ("-O2", "-fopenmp"), threads=threads)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("lanes", ["native", "plain"])
def test_sanitizers_and_warnings_are_silent(folder: Path, compiler: str, lanes: str) -> None:
    kind = ("-DLANES=1",) if lanes == "plain" else ("-march=native",)
    checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    run(folder, compiler, ("-O1", *kind, *WARNINGS, *checks))


def test_fast_math_is_refused(folder: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    words = ["gcc", "-std=c11", "-ffast-math", "-c", "model.c", "-o", os.devnull]
    done = subprocess.run(words, cwd=folder / "float", capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "fast-math" in done.stderr
