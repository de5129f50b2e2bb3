"""Core ML: coremltools with its sparse storage, one bit per weight and the values that are not zero."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2ap_deploy.runtimes.runtime import Conversion, Logits, Runtime, each_image

if TYPE_CHECKING:
    from torch import nn


def _convert(conversion: Conversion) -> None:
    import coremltools as ct
    import coremltools.optimize.coreml as cto
    import torch

    network, images = conversion.network()
    program = torch.export.export(network, images).run_decompositions({})
    model = ct.convert(
        program, minimum_deployment_target=ct.target.iOS18, compute_precision=ct.precision.FLOAT32
    )
    pruning = cto.OpThresholdPrunerConfig(threshold=1e-12, minimum_sparsity_percentile=0.2)
    model = cto.prune_weights(model, cto.OptimizationConfig(global_config=pruning))
    if conversion.calibration is not None:
        rounding = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8")
        settings = cto.OptimizationConfig(global_config=rounding)
        model = cto.linear_quantize_weights(model, settings, joint_compression=True)
    _check(model, network, exact=conversion.calibration is None)
    model.save(str(conversion.folder / "model.mlpackage"))


def _check(model: Any, network: nn.Module, *, exact: bool) -> None:
    """Check that the file holds every weight of the network, up to half a step of 8 bits where not exact.

    Predictions need macOS, so this is what can be compared anywhere. Raises RuntimeError.
    """
    import coremltools.optimize.coreml as cto
    import numpy as np

    stored = cto.get_weights_metadata(cto.decompress_weights(model), weight_threshold=0).values()
    found = [np.asarray(each.val, np.float32) for each in stored]
    for name, parameter in network.named_parameters():
        weight = parameter.detach().numpy()
        if weight.ndim < 2 or min(weight.shape[:2]) == 1:
            continue
        step = 0.0 if exact else float(np.abs(weight).max()) / 127
        alike = (each for each in found if each.shape == weight.shape)
        if not any(np.abs(each - weight).max() <= step for each in alike):
            raise RuntimeError(f"the converted file does not hold the weight {name}")


def _load(folder: Path) -> Logits:
    import coremltools as ct
    import numpy as np

    model = ct.models.MLModel(str(folder / "model.mlpackage"), compute_units=ct.ComputeUnit.CPU_ONLY)
    description = model.get_spec().description
    entry, output = description.input[0].name, description.output[0].name
    return each_image(lambda image: np.asarray(model.predict({entry: image})[output], np.float32))


RUNTIME = Runtime(
    name="coreml",
    title="Core ML",
    extra="coreml",
    modules=("coremltools",),
    packages=("coremltools", "torch"),
    main="model.mlpackage",
    convert=_convert,
    load=_load,
    bits={"float32": 1, "int8": 1},
    kept_bits={"float32": 32, "int8": 8},
    systems=("Darwin",),
)
