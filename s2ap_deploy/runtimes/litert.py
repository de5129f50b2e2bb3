"""LiteRT (TensorFlow Lite): converted by litert-torch, float32 or int8 with a scale per channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s2ap_deploy.runtimes.runtime import Conversion, Logits, Runtime, each_image


def _convert(conversion: Conversion) -> None:
    import litert_torch

    network, images = conversion.network()
    settings = None
    if conversion.calibration is not None:
        network, settings = _quantized(network, images, conversion.calibration)
    litert_torch.convert(network, images, quant_config=settings).export(
        str(conversion.folder / "model.tflite")
    )


def _quantized(network: Any, images: Any, calibration: Any) -> tuple[Any, Any]:
    import torch
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
    from litert_torch.quantize.quant_config import QuantConfig
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(network, images).module(), quantizer)
    with torch.no_grad():
        for image in torch.from_numpy(calibration):
            prepared(image[None])
    return convert_pt2e(prepared, fold_quantize=False), QuantConfig(pt2e_quantizer=quantizer)


def _load(folder: Path) -> Logits:
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(model_path=str(folder / "model.tflite"), num_threads=1)
    run.allocate_tensors()
    entry, output = run.get_input_details()[0], run.get_output_details()[0]
    scale, zero = output["quantization"]

    def answer(image: Any) -> Any:
        run.set_tensor(entry["index"], image)
        run.invoke()
        found = run.get_tensor(output["index"])
        # An int8 file answers in raw integers.
        return scale * (found.astype("float32") - zero) if output["dtype"].__name__ == "int8" else found

    return each_image(answer)


RUNTIME = Runtime(
    name="litert",
    title="LiteRT",
    extra="litert",
    modules=("litert_torch", "ai_edge_litert"),
    packages=("litert-torch", "ai-edge-litert", "torchao", "torch"),
    main="model.tflite",
    convert=_convert,
    load=_load,
    bits={"float32": 32, "int8": 8},
)
