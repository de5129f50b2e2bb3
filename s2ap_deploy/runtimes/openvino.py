"""OpenVINO: its own graph with encoded weights, computed in float32 also where bf16 would be the default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s2ap_deploy.runtimes.runtime import Conversion, Logits, Runtime


def _convert(conversion: Conversion) -> None:
    import openvino

    core = openvino.Core()
    model = core.read_model(conversion.source)
    openvino.save_model(model, conversion.folder / "model.xml", compress_to_fp16=False)


def _load(folder: Path) -> Logits:
    import openvino

    core = openvino.Core()
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    request = core.compile_model(
        core.read_model(folder / "model.xml"), "CPU", settings
    ).create_infer_request()
    fixed = request.model_inputs[0].partial_shape[0]
    size = fixed.get_length() if fixed.is_static else 64

    def answer(images: Any) -> Any:
        import numpy as np

        parts = []
        for at in range(0, len(images), size):
            part = images[at : at + size]
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            parts.append(request.infer([filled if fixed.is_static else part])[0][: len(part)].copy())
        return np.concatenate(parts)

    return answer


RUNTIME = Runtime(
    name="openvino",
    title="OpenVINO",
    extra="openvino",
    modules=("openvino",),
    packages=("openvino",),
    main="model.xml",
    convert=_convert,
    load=_load,
    bits={"float32": 0, "int8": 0},
    encoded=True,
    quantizes=False,
)
