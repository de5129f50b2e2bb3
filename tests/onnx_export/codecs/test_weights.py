from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import ModelProto
from torch import Tensor, nn

from s2ap_deploy.errors import VerificationError
from s2ap_deploy.onnx_export.codecs.weights import kept_but_zero, weights
from s2ap_deploy.onnx_export.graph import to_onnx


class Tokens(nn.Module):
    """A linear layer on [batch, tokens, channels], whose weight the exporter transposes."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(x.flatten(2).transpose(1, 2)).mean(1))


def as_arrays(masks: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: mask.numpy() for name, mask in masks.items()}


def test_only_what_products_read_is_a_weight(dense_model: ModelProto) -> None:
    assert weights(dense_model).keys() == {
        "network.stem.weight",
        "network.block.weight",
        "network.linear.weight",
    }


def test_an_export_within_its_masks_passes(dense_model: ModelProto, masks: dict[str, Tensor]) -> None:
    assert kept_but_zero(dense_model, as_arrays(masks)) == 0


def test_kept_weights_that_are_zero_are_counted(dense_model: ModelProto, masks: dict[str, Tensor]) -> None:
    wider = as_arrays(masks)
    name = "network.block.weight"
    wider[name] = np.ones_like(wider[name])
    assert kept_but_zero(dense_model, wider) == int((~masks[name]).sum())


def test_a_weight_outside_its_mask_is_found(dense_model: ModelProto, masks: dict[str, Tensor]) -> None:
    narrower = as_arrays(masks)
    name = "network.linear.weight"
    narrower[name] = np.zeros_like(narrower[name])
    count = int(masks[name].sum())
    with pytest.raises(VerificationError, match=f"{name}: {count} exported weights outside the mask"):
        kept_but_zero(dense_model, narrower)


def test_a_mask_of_an_unknown_shape_is_not_passed_over(dense_model: ModelProto) -> None:
    with pytest.raises(VerificationError, match=r"extra\.weight: no exported tensor has its shape"):
        kept_but_zero(dense_model, {"extra.weight": np.ones((3, 3), np.bool_)})


def test_a_transposed_weight_is_held_against_its_mask() -> None:
    torch.manual_seed(0)
    network = Tokens()
    mask = torch.rand(7, 4) > 0.5
    network.mix.weight.data *= mask
    model = to_onnx(network, (4, 2, 2))
    assert "mix.weight" not in weights(model)
    assert kept_but_zero(model, {"mix.weight": mask.numpy()}) == 0
    with pytest.raises(VerificationError, match=r"mix\.weight"):
        kept_but_zero(model, {"mix.weight": ~mask.numpy()})
