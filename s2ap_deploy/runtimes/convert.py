"""Run a converter in a child process: converters crash, hang, install packages and succeed without a file."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from s2ap_deploy.errors import VerificationError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from s2ap_deploy.runtimes.runtime import Runtime

SECONDS = 1800
MEMORY = 16 * 2**30
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
_OFFLINE = {"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1", "UV_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


class Converted(NamedTuple):
    """The files by their names, the seconds, and whether the converter was cut off from the network."""

    files: dict[str, bytes]
    seconds: float
    isolated: bool


def convert(runtime: Runtime, source: bytes, calibration: NDArray[np.float32] | None) -> Converted:
    """Convert an ONNX file for ``runtime`` in a child with limits on time and memory and without a network.

    Raises VerificationError for a converter that fails, takes too long, or ends without its file.
    """
    import numpy as np

    from s2ap_deploy.runtimes.runtime import MODULES, searched

    with tempfile.TemporaryDirectory(prefix="s2ap-") as name:
        work = Path(name)
        folder = work / "out"
        folder.mkdir()
        (work / "model.onnx").write_bytes(source)
        if calibration is not None:
            np.save(work / "calibration.npy", calibration)
        limits = {"module": MODULES[runtime.name], "seconds": SECONDS, "memory": MEMORY}
        environment = {**os.environ, **_OFFLINE, "PYTHONPATH": searched(), "HOME": name, "TMPDIR": name}
        started = time.monotonic()
        said, code = _run(
            [sys.executable, "-m", "s2ap_deploy.runtimes.convert", json.dumps(limits)], work, environment
        )
        if code != 0:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise _failed(runtime, f"ended with {how}: {said}", "converter-failed")
        main = folder / runtime.main
        if not any(path.stat().st_size for path in (main, *main.rglob("*")) if path.is_file()):
            raise _failed(
                runtime, f"ended with exit code 0 and wrote no {main.name}", "converter-without-file"
            )
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return Converted(files, time.monotonic() - started, not (work / "network").exists())


def _run(words: list[str], work: Path, environment: dict[str, str]) -> tuple[str, int]:
    """Run the child and everything that it starts; return the end of its output, and its exit code."""
    with open(work / "output", "w+b") as output:
        child = subprocess.Popen(
            words,
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise VerificationError(
                f"the converter did not end within {SECONDS} seconds", code="converter-timeout"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        output.seek(max(0, output.tell() - 100_000))
        lines = output.read().decode(errors="replace").strip().splitlines()
        return "\n".join(lines[-3:])[-600:], code


def _failed(runtime: Runtime, what: str, code: str) -> VerificationError:
    return VerificationError(f"the converter of {runtime.title} {what}", code=code)


def _isolate() -> bool:
    """Leave the network of this process; possible on Linux before any thread is started."""
    ids = {"uid_map": os.getuid(), "gid_map": os.getgid()}
    try:
        if ctypes.CDLL(None, use_errno=True).unshare(_NEW_USER | _NEW_NETWORK):
            return False
        Path("/proc/self/setgroups").write_text("deny")
        for name, number in ids.items():
            Path("/proc/self", name).write_text(f"{number} {number} 1")
    except (OSError, AttributeError):
        return False
    return True


def _child(request: dict[str, object]) -> None:
    """Convert ``model.onnx`` of the working folder; the first thing is to give up what is not needed."""
    work = Path.cwd()
    if not _isolate():
        (work / "network").touch()
    resource.setrlimit(resource.RLIMIT_DATA, (int(str(request["memory"])),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (2 * int(str(request["seconds"])),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import numpy as np

    from s2ap_deploy.runtimes.runtime import Conversion

    calibration = work / "calibration.npy"
    runtime = importlib.import_module(str(request["module"])).RUNTIME
    runtime.convert(
        Conversion(work / "model.onnx", work / "out", np.load(calibration) if calibration.exists() else None)
    )


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
