"""ncnn: converted by pnnx from the decoded ONNX file, computed in float32 without its 16-bit options."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from s2ap_deploy.runtimes.runtime import Conversion, Logits, Runtime, each_image

_SIXTEEN_BIT = (
    "fp16_packed",
    "fp16_storage",
    "fp16_arithmetic",
    "bf16_storage",
    "bf16_packed",
    "int8_inference",
)


def _convert(conversion: Conversion) -> None:
    import pnnx

    _, images = conversion.network()
    shape = ",".join(map(str, images[0].shape))
    # pnnx writes all of its files beside its source.
    source = conversion.source.parent / "pnnx" / "model.onnx"
    source.parent.mkdir()
    source.write_bytes(conversion.source.read_bytes())
    subprocess.run([pnnx.EXEC_PATH, str(source), f"inputshape=[{shape}]", "fp16=0"], check=True)
    for suffix in ("param", "bin"):
        (conversion.folder / f"model.{suffix}").write_bytes(
            (source.parent / f"model.ncnn.{suffix}").read_bytes()
        )


def _load(folder: Path) -> Logits:
    import ncnn
    import numpy as np

    network = ncnn.Net()
    network.opt.num_threads = 1
    network.opt.use_vulkan_compute = False
    for name in _SIXTEEN_BIT:
        if hasattr(network.opt, f"use_{name}"):
            setattr(network.opt, f"use_{name}", False)
    if network.load_param(str(folder / "model.param")) or network.load_model(str(folder / "model.bin")):
        raise RuntimeError("the files do not load")

    def answer(image: Any) -> Any:
        with network.create_extractor() as run:
            run.input("in0", ncnn.Mat(np.ascontiguousarray(image[0])).clone())
            code, found = run.extract("out0")
        if code:
            raise RuntimeError(f"the network ends with code {code}")
        return np.array(found, np.float32).reshape(1, -1)

    return each_image(answer)


RUNTIME = Runtime(
    name="ncnn",
    title="ncnn",
    extra="ncnn",
    modules=("ncnn", "pnnx"),
    packages=("ncnn", "pnnx"),
    main="model.bin",
    convert=_convert,
    load=_load,
    bits={"float32": 32},
)
