"""Build a generated C library with the system's compiler, and call it."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from s2ap_deploy.c_export.assembling import Sources
from s2ap_deploy.c_export.placing import LANES
from s2ap_deploy.errors import VerificationError

FLAGS = ("-std=c11", "-O3", "-march=native")
_CORTEX_M4 = ("-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16")
CROSS = ("arm-none-eabi-gcc", "-std=c11", "-Os", *_CORTEX_M4)
CROSS_SIZE = "arm-none-eabi-size"
_SECONDS = 900


def compiler() -> list[str] | None:
    """Return the command of the system's compiler, ``CC`` or ``cc``; None if there is none."""
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    return command if shutil.which(command[0]) else None


def build(files: Mapping[str, bytes], command: Sequence[str], flags: Sequence[str] = FLAGS) -> bytes:
    """Compile sources in a private folder and return the shared library.

    Raises VerificationError with the compiler's message when it fails.
    """
    with tempfile.TemporaryDirectory(prefix="s2ap-") as folder:
        for name, content in files.items():
            if name in ("model.h", "model.c"):
                (Path(folder) / name).write_bytes(content)
        library = Path(folder) / "model.so"
        words = [*command, *flags, "-shared", "-fPIC", "-o", str(library), str(Path(folder) / "model.c")]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _failed(command, str(error)) from error
        if done.returncode != 0 or not library.is_file():
            raise _failed(command, done.stderr.strip()[-2000:])
        return library.read_bytes()


def device_code(files: Mapping[str, bytes]) -> int | None:
    """Return the bytes of code and constants on a Cortex-M4; None without its cross compiler.

    Raises VerificationError with the compiler's message when it fails.
    """
    if shutil.which(CROSS[0]) is None or shutil.which(CROSS_SIZE) is None:
        return None
    with tempfile.TemporaryDirectory(prefix="s2ap-") as folder:
        for name in ("model.h", "model.c"):
            (Path(folder) / name).write_bytes(files[name])
        words = [*CROSS, "-c", "model.c", "-o", "model.o"]
        done = subprocess.run(
            words, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        if done.returncode != 0:
            raise _failed(CROSS, done.stderr.strip()[-2000:])
        said = subprocess.run([CROSS_SIZE, "model.o"], cwd=folder, capture_output=True, text=True, check=True)
    text, data = said.stdout.splitlines()[1].split()[:2]
    return int(text) + int(data)


def _failed(command: Sequence[str], words: str) -> VerificationError:
    return VerificationError(
        f"{shlex.join(command)} does not compile the generated sources: {words}",
        code="compiler-failed",
        hint="set CC to a C11 compiler such as gcc or clang",
    )


class Library:
    """A built library as a function: float32 [n, C, H, W] in [0, 1] to logits [n, K].

    It is pickled as bytes; each process loads its own copy.
    """

    def __init__(
        self,
        content: bytes,
        weights: bytes,
        size: tuple[int, int, int],
        classes: int,
        workspace: int,
        images_at_once: int = 1,
    ) -> None:
        """Store the library; ``workspace`` is in bytes per image. Several images need a build with OpenMP."""
        self._state = (content, weights, size, classes, workspace, images_at_once)
        self._loaded: ctypes.CDLL | None = None

    @classmethod
    def of(cls, sources: Sources, content: bytes, images_at_once: int = 1) -> Library:
        """Return the library that was built from ``sources``."""
        sizes = (sources.image_shape, sources.classes, sources.workspace_bytes)
        return cls(content, sources.weights, *sizes, images_at_once)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image."""
        return self._state[2]

    @property
    def bytes(self) -> int:
        """The size of the built library, without weights in a file of their own."""
        return len(self._state[0])

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute logits. Raises ValueError for images of another size."""
        _, weights, size, classes, workspace, images_at_once = self._state
        if images.shape[1:] != size:
            raise ValueError(f"images of {images.shape[1:]}, not {size}")
        pixels = np.ascontiguousarray(images, np.float32)
        logits = np.empty((len(images), classes), np.float32)
        space = np.empty(images_at_once * workspace // 4 + LANES, np.float32)
        aligned = -space.ctypes.data // 4 % LANES
        done = self.loaded.model_run_batch(
            weights,
            pixels.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_size_t(len(images)),
            logits.ctypes.data_as(ctypes.c_void_p),
            space[aligned:].ctypes.data_as(ctypes.c_void_p),
            ctypes.c_size_t(images_at_once * workspace),
        )
        assert done
        return logits

    @property
    def loaded(self) -> ctypes.CDLL:
        """The library, loaded on first use from a private file that is removed at once."""
        if self._loaded is None:
            with tempfile.TemporaryDirectory(prefix="s2ap-") as folder:
                path = Path(folder) / "model.so"
                path.write_bytes(self._state[0])
                self._loaded = ctypes.CDLL(str(path))
            self._loaded.model_run_batch.restype = ctypes.c_int
            self._loaded.model_run_batch.argtypes = [
                ctypes.c_char_p,
                ctypes.c_void_p,
                ctypes.c_size_t,
                ctypes.c_void_p,
                ctypes.c_void_p,
                ctypes.c_size_t,
            ]
        return self._loaded

    def __getstate__(self) -> tuple[object, ...]:
        return self._state

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]
