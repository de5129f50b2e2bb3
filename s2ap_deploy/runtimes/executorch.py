"""ExecuTorch with XNNPACK: float32, or int8 with a scale per channel by torchao's quantizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s2ap_deploy.runtimes.runtime import Conversion, Logits, Runtime, each_image


def _convert(conversion: Conversion) -> None:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    network, images = conversion.network()
    # Any other batch size than the traced one fails from 16 images on (executorch 1.5.1).
    exported = torch.export.export(network, images)
    if conversion.calibration is not None:
        exported = torch.export.export(_quantized(exported, conversion.calibration), images)
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    (conversion.folder / "model.pte").write_bytes(program.buffer)


def _quantized(exported: Any, calibration: Any) -> Any:
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(exported.module(), quantizer)
    with torch.no_grad():
        for image in torch.from_numpy(calibration):
            prepared(image[None])
    return convert_pt2e(prepared)


def _load(folder: Path) -> Logits:
    import torch
    from executorch.runtime import Runtime as Loader

    method = Loader.get().load_program(folder / "model.pte").load_method("forward")
    if method is None:
        raise RuntimeError("the program has no method forward")
    return each_image(lambda image: method.execute((torch.from_numpy(image),))[0].numpy().copy())


RUNTIME = Runtime(
    name="executorch",
    title="ExecuTorch",
    extra="executorch",
    modules=("executorch", "torchao"),
    packages=("executorch", "torchao", "torch"),
    main="model.pte",
    convert=_convert,
    load=_load,
    bits={"float32": 32, "int8": 8},
)
