"""One interface for all runtimes: what it converts and how, what it runs and in which precision.

A module of this package describes a runtime and imports its libraries inside of functions only.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
from numpy.typing import NDArray

from s2ap_deploy.errors import InconclusiveError, UsageError, VerificationError
from s2ap_deploy.recipe.field_types import RuntimeName
from s2ap_deploy.requirements import DISTRIBUTION, extra_requirements

if TYPE_CHECKING:
    from torch import Tensor, nn

Logits = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Float32 images [n, C, H, W] in [0, 1] to logits [n, K]."""

MODULES: dict[RuntimeName, str] = {name: f"s2ap_deploy.runtimes.{name}" for name in get_args(RuntimeName)}
"""The module of each runtime, which has a constant ``RUNTIME``."""


@dataclass(frozen=True)
class Conversion:
    """What a converter works on, in its own process: ``source`` is an ONNX file, ``folder`` receives files.

    ``calibration`` are images [n, C, H, W] that set the ranges of int8; None for float32.
    """

    source: Path
    folder: Path
    calibration: NDArray[np.float32] | None = None

    def network(self) -> tuple[nn.Module, tuple[Tensor]]:
        """Return the file as a torch module traced with one image, and that image [1, C, H, W]."""
        import torch
        from torch.fx.experimental.proxy_tensor import make_fx

        from s2ap_deploy.onnx_export import onnx_file
        from s2ap_deploy.onnx_export.onnx_module import OnnxModule

        opened = onnx_file.load(self.source)
        image = torch.linspace(0, 1, int(np.prod(opened.input_size))).reshape(1, *opened.input_size)
        # Shapes that the file holds as tensors become numbers; torch.export would take them for unknown.
        with torch.no_grad():
            traced = make_fx(OnnxModule(opened.model).linear(), pre_dispatch=True)(image)
        traced.graph.eliminate_dead_code()
        traced.recompile()
        return traced, (image,)


@dataclass(frozen=True)
class Runtime:
    """One runtime.

    ``extra`` of this package installs ``modules``; ``packages`` are the distributions whose versions decide
    about answers. ``convert`` writes ``main`` and what belongs to it; ``load`` opens that folder.
    ``precision`` is what ``load`` sets for float32 files. ``encoded``: it reads encoded weights, others get
    them dense. ``quantizes``: int8 is made from the float32 network and calibration images, not from the int8
    ONNX file. ``systems`` are those that it predicts on, empty for all. ``bits`` are those that it stores per
    weight, ``kept_bits`` more per weight that is not zero, by type; a type that is missing is refused.
    """

    name: RuntimeName
    title: str
    extra: str
    modules: tuple[str, ...]
    packages: tuple[str, ...]
    main: str
    convert: Callable[[Conversion], None]
    load: Callable[[Path], Logits]
    bits: Mapping[str, int]
    kept_bits: Mapping[str, int] | None = None
    precision: str = "float32"
    encoded: bool = False
    quantizes: bool = True
    systems: tuple[str, ...] = ()

    @property
    def runs_here(self) -> bool:
        """Whether the runtime predicts on this operating system."""
        return not self.systems or platform.system() in self.systems

    def versions(self) -> dict[str, str]:
        """Return the versions of its installed distributions."""
        found = {}
        for package in self.packages:
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return found

    def predicted_bytes(self, kind: str, encoded: int, weights: int, kept: int, others: int) -> int:
        """Predict the size of its files from that of the encoded ONNX file and the number of parameters.

        Args:
            kind: float32 or int8.
            encoded: bytes of the ONNX file, which a runtime that reads encodings keeps.
            weights: entries of the weights, ``kept`` of them not zero.
            others: further parameters, in float32.
        """
        if self.encoded:
            return encoded
        bits = weights * self.bits[kind] + kept * (self.kept_bits or {}).get(kind, 0)
        return bits // 8 + 4 * others

    def require(self) -> None:
        """Raise UsageError where the extra is not installed."""
        missing = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if missing:
            listed = " ".join(f'"{each}"' for each in extra_requirements(self.extra))
            raise UsageError(
                f"{self.title} needs {missing[0]}, which is not installed",
                code="extra-missing",
                hint=f"pip install {listed}: the extra {self.extra} of {DISTRIBUTION}",
            )


def find(name: RuntimeName) -> Runtime:
    """Return the runtime of that name."""
    runtime: Runtime = importlib.import_module(MODULES[name]).RUNTIME
    return runtime


def each_image(answer: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Logits:
    """Return a function of any number of images from one of a single image [1, C, H, W]."""
    return lambda images: np.concatenate([answer(images[at : at + 1]) for at in range(len(images))])


class DeviceAnswers:
    """Files of a runtime as a function: float32 [n, C, H, W] in [0, 1] to logits [n, K], on one thread.

    It is pickled as the bytes of the files; each process loads its own copy.
    """

    def __init__(self, runtime: RuntimeName, files: Mapping[str, bytes], classes: int) -> None:
        """Store ``files``, by their names below the folder of the runtime."""
        self._state = (runtime, dict(files), classes)
        self._answer: Logits | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute logits.

        Raises UsageError without the runtime, InconclusiveError where it cannot predict on this system, and
        VerificationError where it fails or answers anything but finite logits [n, K].
        """
        name, _, classes = self._state
        runtime = find(name)
        try:
            if self._answer is None:
                self._answer = self._load(runtime)
            found = np.asarray(self._answer(np.ascontiguousarray(images, np.float32)))
        except (ImportError, RuntimeError, ValueError, OSError, TypeError, AttributeError) as error:
            words = (str(error).splitlines() or [type(error).__name__])[0]
            raise VerificationError(
                f"{runtime.title} does not run the file: {words}", code="runtime-failed"
            ) from error
        if found.shape != (len(images), classes):
            raise VerificationError(
                f"{runtime.title} returns {list(found.shape)} for {len(images)} images of {classes} classes",
                code="runtime-output-unexpected",
            )
        if not np.isfinite(found).all():
            raise VerificationError(
                f"{runtime.title} returns logits that are not finite", code="runtime-logits-not-finite"
            )
        return found.astype(np.float32)

    def _load(self, runtime: Runtime) -> Logits:
        runtime.require()
        if not runtime.runs_here:
            raise InconclusiveError(
                f"{runtime.title} predicts on {' and '.join(runtime.systems)} only, this is "
                f"{platform.system()}",
                code="runtime-not-here",
                hint="certify the file there; its float32 twin is the ONNX file beside it",
            )
        self._folder = tempfile.TemporaryDirectory(prefix="s2ap-")
        folder = Path(self._folder.name)
        for name, content in self._state[1].items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return runtime.load(folder)

    def __getstate__(self) -> tuple[object, ...]:
        return self._state

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]


def searched() -> str:
    """Return the module search path, for a child of this process."""
    return os.pathsep.join(each for each in sys.path if each)
