"""A packed `nn.Linear`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anybit.modules.packed import PackedWeight


class QuantLinear(PackedWeight, nn.Linear):
    """An `nn.Linear` whose weight stays packed; whatever wraps linears (PEFT, hooks) works on it.

    `dequantize()` is the dense [out, in] weight. `weight` is a shape and a dtype on the meta device: code that only asks
    what a weight looks like works, code that computes with it fails loudly.
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None = None):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return torch.empty(self.out_features, self.in_features, dtype=getattr(torch, self.parts[0].layout.dtype), device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.anybit.linear(x, self.packed, self.bias, self.spec, self.out_features)

    def extra_repr(self) -> str:
        layout = type(self.parts[0].layout).__name__
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, layout={layout}, kernel={self.kernel.name}"
