"""The reference kernel: any tree, any device, a few rows of the weight at a time. Slow and obvious; never refuses.

Weights are evaluated and products accumulated in float32, whatever the dtype of the input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anybit.errors import NoKernel
from anybit.kernels.base import Kernel
from anybit.weight import Weight
from anybit.weight.activation import RULES
from anybit.weight.joining import in_stored_order
from anybit.weight.weight import row_chunks


class Reference(Kernel):
    name = "reference"
    rank = 0
    description = "any weight on any device; float32, decoded in chunks of rows"

    def refuses(self, weight: Weight, device: torch.device) -> str | None:
        return None

    def prepare(self, weight: Weight) -> tuple[str, list[Tensor]]:
        return weight.structure(), weight.tensors

    def restore(self, spec: str, tensors: list[Tensor]) -> Weight:
        return Weight.build(spec, tensors)

    def linear(self, x: Tensor, spec: str, tensors: list[Tensor], bias: Tensor | None) -> Tensor:
        return multiply(Weight.build(spec, tensors), x, bias)


def multiply(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [tokens, in] -> [tokens, out] in x's dtype, by the weight's activation rule if it has one."""
    stored = in_stored_order(weight)
    if stored is not None:
        own, places = stored[0], stored[1].long()
        y = multiply(own, x, None if bias is None else bias[places])
        return torch.empty_like(y).index_copy_(1, places, y)

    def product(rows: Tensor) -> Tensor:
        return _product(weight, rows)

    if weight.activation is not None:
        if weight.activation.rule not in RULES:
            raise NoKernel(
                f"activation rule {weight.activation.rule!r} is not registered; import the method that owns it"
            )
        return RULES[weight.activation.rule](x, weight, bias, product)
    y = product(x)
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)


def _product(weight: Weight, x: Tensor) -> Tensor:
    """float32 x @ W.T."""
    rows, columns = weight.shape
    x = x.to(torch.float32)
    y = torch.empty(x.shape[0], rows, device=x.device)
    for start, stop in row_chunks(rows, columns):
        torch.mm(x, weight.tree.region(slice(start, stop), slice(0, columns)).T, out=y[:, start:stop])
    return y


def gradient_through(weight: Weight, gradient: Tensor) -> Tensor:
    """gradient [tokens, out] -> gradient @ W in its dtype."""
    rows, columns = weight.shape
    total = torch.zeros(gradient.shape[0], columns, device=gradient.device)
    for start, stop in row_chunks(rows, columns):
        part = weight.tree.region(slice(start, stop), slice(0, columns))
        total.addmm_(gradient[:, start:stop].to(torch.float32), part)
    return total.to(gradient.dtype)


def each_expert(weight: Weight, x: Tensor, ends: Tensor) -> Tensor:
    """x [rows, in] sorted by expert -> [rows, out]; only experts that own rows are touched."""
    y = torch.empty(x.shape[0], weight.shape[1], dtype=x.dtype, device=x.device)
    start = 0
    for expert, stop in enumerate(ends.tolist()):
        if stop > start:
            y[start:stop] = multiply(weight.select(expert), x[start:stop], None)
        start = stop
    return y


KERNELS = [Reference()]
