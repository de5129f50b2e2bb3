"""The layer that reads the image, with a gradient for attacks that is cheap on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

_IMAGE_CHANNELS = 4  # up to so many, a product of matrices and a fold beat the general backward pass
_LARGEST_COLUMNS = 2**24  # values; beyond, the columns would cost more memory than they save time


class ImageConv2d(nn.Conv2d):
    """A convolution whose gradient with respect to its input is one product of matrices and one fold.

    The general backward pass is made for many input channels; for an image's one to four it takes several
    times as long. The weights are taken as constant: no gradient reaches them.
    """

    @classmethod
    def like(cls, layer: nn.Conv2d) -> ImageConv2d:
        """The same convolution; it shares ``layer``'s tensors."""
        twin = cls.__new__(cls)
        twin.__dict__.update(layer.__dict__)
        return twin

    def forward(self, input: Tensor) -> Tensor:
        plain = not (torch.is_grad_enabled() and input.requires_grad)
        if plain or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        values: Tensor = _ImageConvolution.apply(input, self.weight, self.bias, self.stride, self.padding)
        return values


class _ImageConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, image: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any
    ) -> Tensor:
        context.save_for_backward(weight)
        context.size, context.stride, context.padding = image.shape, stride, padding
        return F.conv2d(image, weight, bias, stride, padding)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = context.saved_tensors
        (gradient,) = gradients
        size, stride, padding = context.size, context.stride, context.padding
        if gradient[:, 0].numel() * weight[0].numel() > _LARGEST_COLUMNS:
            image = conv2d_input(size, weight, gradient, stride, padding)  # type: ignore[no-untyped-call]
        else:
            columns = torch.matmul(weight.flatten(1).t(), gradient.flatten(2))
            image = F.fold(columns, size[2:], weight.shape[2:], padding=padding, stride=stride)
        return image, None, None, None, None


def reads_image(module: nn.Conv2d) -> bool:
    """Whether :class:`ImageConv2d` computes what ``module`` does, and faster."""
    return (
        type(module) is nn.Conv2d
        and module.in_channels <= _IMAGE_CHANNELS
        and module.groups == 1
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.weight.device.type == "cpu"
        and not hooked(module)
    )


def hooked(module: nn.Module) -> bool:
    """Whether something listens to the module's calls, which must not be replaced."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
