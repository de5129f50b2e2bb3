"""A runtime for tests: its converter copies the ONNX file, or fails in the way that FAKE_RUNTIME names."""

import os
import socket
import sys
import time

import numpy as np

from s2ap_deploy.runtimes.runtime import Runtime

MODE = os.environ.get("FAKE_RUNTIME", "")


def convert(conversion):
    print("Conversion completed successfully", file=sys.stderr)
    if MODE == "dies":
        raise ValueError("no kernel for operator Foo")
    if MODE == "killed":
        os.abort()
    if MODE == "hangs":
        time.sleep(60)
    if MODE == "greedy":
        np.ones(2**33, np.uint8)
    if MODE == "nothing":
        return
    if MODE == "empty":
        (conversion.folder / "model.bin").touch()
        return
    content = conversion.source.read_bytes()
    if MODE.startswith("connects:"):
        try:
            socket.create_connection(("127.0.0.1", int(MODE.partition(":")[2])), 1).close()
            content = b"connected"
        except OSError:
            content = b"cut off"
    (conversion.folder / "model.bin").write_bytes(content)
    if conversion.calibration is not None:
        np.save(conversion.folder / "ranges.npy", conversion.calibration)


def load(folder):
    from s2ap_deploy.onnx_export.inference import FileAnswers

    answers = FileAnswers((folder / "model.bin").read_bytes())

    def run(images):
        logits = answers(images)
        if MODE == "nan":
            logits[0, 0] = np.nan
        if MODE == "different":
            logits = -logits
        if MODE == "raises":
            raise RuntimeError("out of arena")
        return logits[:, :-1] if MODE == "classes" else logits

    return run


RUNTIME = Runtime(
    name="ncnn",
    title="a runtime of the tests",
    extra="ncnn",
    modules=("numpy",),
    packages=("numpy",),
    main="model.bin",
    convert=convert,
    load=load,
    bits={"float32": 32, "int8": 8},
    systems=("Plan9",) if MODE == "elsewhere" else (),
)
