"""A packed `nn.Linear`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anybit.modules.packed import PackedWeight


class QuantLinear(PackedWeight, nn.Linear):  # type: ignore[override]
    """An `nn.Linear` whose weight stays packed; whatever wraps linears (PEFT, hooks) works on it.

    `dequantize()` is the dense [out, in] weight.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None = None):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self._parameters["bias"])

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.form}"


class TiedLinear(nn.Linear):
    """An output layer that multiplies with the packed table of an embedding; it owns nothing but its bias."""

    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(self, owner: PackedWeight, bias: nn.Parameter | None = None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = owner.quantized_shape
        self.register_parameter("bias", bias)
        self._owner = (
            owner,
        )  # in a tuple: the owner is a module of its own place in the model, not a child of this one

    @property
    def owner(self) -> PackedWeight:
        return self._owner[0]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.owner.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense [out, in] weight."""
        return self.owner.dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.owner.multiply(x, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, tied to a {type(self.owner).__name__}"
        )
