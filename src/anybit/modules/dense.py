"""What stays dense beside packed layers: a head of bfloat16 numbers is as large as a fifth of a 4-bit model.

torch multiplies one row of input with such a matrix at half of what memory gives (bfloat16 and float32; float16 is fine).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anybit.kernels._direct import unobserved
from anybit.weight.encoders import encoder

FEW = {torch.bfloat16: 2, torch.float32: 4}  # rows of input up to which torch is the slower one
SMALLEST = 1 << 20  # numbers; below, the caches hold it and torch is as fast


@encoder("dense_product")
def dense_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] @ weight.T + bias [..., out], all of one dtype."""
    return nn.functional.linear(x, weight, bias)


class DenseLinear(nn.Linear):
    """An `nn.Linear`, quick for a few rows of input where nobody records gradients or traces. Its state is that of any other."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if (
            unobserved(x)
            and type(weight) is nn.Parameter
            and x.dtype == weight.dtype
            and 0 < x.numel() <= FEW.get(x.dtype, 0) * x.shape[-1]
            and x.shape[-1] == weight.shape[1]
            and not torch.is_autocast_enabled("cpu")
        ):
            return dense_product(x, weight, bias)
        return nn.functional.linear(x, self.weight, self.bias)


def quicken(model: nn.Module) -> None:
    """Make large plain linear layers on the CPU `DenseLinear`s."""
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in module.__dict__:
            weight = module.weight
            if weight.device.type == "cpu" and weight.dtype in FEW and weight.numel() >= SMALLEST:
                module.__class__ = DenseLinear
