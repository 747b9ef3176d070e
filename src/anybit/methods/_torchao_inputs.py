"""How torchao quantizes inputs: in the input's own dtype, each operation rounded, the quotient by a float32 reciprocal.

    torchao_int8        codes times codes, then the scales; static where `act_quant_scale` is stored
    torchao_int8_qdq    asymmetric int8 of each token, back into the input's dtype, then an ordinary product
    torchao_float8      E4M3 or E5M2 of each token, of the whole input, or of runs of a token
    torchao_scaled      no rounding; inputs times `act_pre_scale`, which the other rules apply first, too

Before 0.15 it was done otherwise: torchao_int8_old has 127 steps of one sign, torchao_int8_qdq_old keeps scales in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.methods._activations import finish
from anybit.weight.activation import Activation, Product, activation_rule
from anybit.weight.nodes import Grid, Rows, Values

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weight import Weight
    from anybit.weight.nodes import Node

SMALLEST_INT8 = 2.0**-23  # the least scale of integer codes
PRE_SCALE, STATIC_SCALE, STATIC_ZERO = "act_pre_scale", "act_quant_scale", "act_quant_zero_point"
STORED = (STATIC_SCALE, STATIC_ZERO, PRE_SCALE)


@dataclass(frozen=True)
class Inputs:
    """What a layout knows of its inputs. `stored`: (name, dtype, shape) of tensors beside the weight. `reduced`: one bit less."""

    rule: str
    dtype: str = "int8"
    granularity: str = "token"
    group_size: int | None = None
    symmetric: bool = True
    reduced: bool = False
    lower: float | None = None
    upper: float | None = None
    stored: tuple[tuple[str, str, tuple[int, ...]], ...] = ()

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (dtype, shape) for name, dtype, shape in self.stored}

    def activation(self, parts: Mapping[str, Tensor]) -> Activation:
        names = [name for name, _, _ in self.stored]
        return Activation(
            self.rule,
            "int7" if self.reduced else self.dtype,
            self.granularity,
            self.group_size,
            self.symmetric,
            names=tuple(names),
            tensors=tuple(parts[name] for name in names),
            limit=self.upper,
            least=self.lower,
        )


def _of(weight: Weight) -> Activation:
    assert weight.activation is not None
    return weight.activation


def _scaled(x: Tensor, how: Activation) -> Tensor:
    """The input times the scales that were taken out of the weight (AWQ, SmoothQuant)."""
    return x * how[PRE_SCALE] if PRE_SCALE in how.names else x


def _extremes(x: Tensor, how: Activation) -> tuple[Tensor, Tensor]:
    """Smallest and largest number, and zero, of each token or of all."""
    axes = (
        1 if how.granularity == "token" else (0, 1)
    )  # never a number without axes: torch would not widen a product by it
    low, high = x.amin(axes, True), x.amax(axes, True)
    return low.clamp(max=0), high.clamp(min=0)


def affine(low: Tensor, high: Tensor, first: int, last: int, symmetric: bool, smallest: float) -> tuple[Tensor, Tensor]:
    """Scale and whole zero point in the dtype of the extremes, as torchao's `choose_qparams_affine` finds them."""
    if symmetric:
        scale = (torch.maximum(-low, high) / ((last - first) / 2)).clamp(min=smallest)
        return scale, torch.full_like(scale, (last + first + 1) // 2)
    scale = ((high - low) / (last - first)).clamp(min=smallest)
    return scale, (first - torch.round(low / scale)).clamp(first, last)


@activation_rule("torchao_int8")
def int8(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """Integers by integers: exact sums, then scale of the input, zero point, scales of the weight."""
    how = _of(weight)
    first, last = (-64, 63) if how.dtype == "int7" else (-128, 127)
    numbers = _scaled(x, how)
    if STATIC_SCALE in how.names:
        scale = how[STATIC_SCALE].reshape(-1, 1)
        zero = how[STATIC_ZERO].reshape(-1, 1).to(scale.dtype) if STATIC_ZERO in how.names else torch.zeros_like(scale)
    else:
        scale, zero = affine(*_extremes(numbers, how), first, last, how.symmetric, SMALLEST_INT8)
        scale = scale.to(torch.float32)
    codes = (torch.round(numbers * (1.0 / scale)) + zero).clamp_(first, last)
    integers = (
        codes.to(torch.int8) if how.symmetric and STATIC_ZERO not in how.names else (codes - zero).to(torch.float32)
    )
    sums, own = product(integers), _row_scales(weight.tree)
    if own is None or x.dtype == torch.float32:
        return _finish(sums * scale.to(torch.float32), bias, x.dtype)
    # the peer rounds between the two scales
    return _finish((sums / own * scale.to(torch.float32)).to(x.dtype).to(torch.float32) * own, bias, x.dtype)


def _row_scales(tree: Node) -> Tensor | None:
    """float32 [rows], or [1]: the scale of each row of codes; None where a row has several, or none that could be divided by."""
    if isinstance(tree, Rows):
        parts = [_row_scales(part) for part in tree.parts]
        whole = [part.expand(node.shape[0]) for part, node in zip(parts, tree.parts, strict=True) if part is not None]
        return torch.cat(whole) if len(whole) == len(parts) else None
    if not isinstance(tree, Grid) or not isinstance(tree.scale, Values) or tree.scale.shape[-1] != 1:
        return None
    return tree.scale.tensor[:, 0].to(torch.float32)


@activation_rule("torchao_int8_qdq")
def int8_qdq(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """Asymmetric int8 of each token and back, all in the input's dtype."""
    how = _of(weight)
    numbers = _scaled(x, how)
    smallest = torch.finfo(numbers.dtype).smallest_normal
    scale, zero = affine(*_extremes(numbers, how), -128, 127, how.symmetric, smallest)
    codes = (torch.round(numbers * (1.0 / scale)) + zero).clamp_(-128, 127)
    return _finish(product((codes - zero) * scale), bias, x.dtype)


@activation_rule("torchao_float8")
def float8(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """s = max|x| / top, found in the input's dtype; bounds first, where there are any. A token of zeros stays zero."""
    how = _of(weight)
    dtype = getattr(torch, how.dtype)
    top = torch.finfo(dtype).max
    numbers = _scaled(x, how)
    size = how.group_size if how.granularity == "group" and how.group_size else numbers.shape[1]
    blocks = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % size)).unflatten(1, (-1, size))
    largest = blocks.abs().amax(-1, keepdim=True) if how.granularity != "tensor" else blocks.abs().amax()
    if how.least is not None or how.limit is not None:
        largest = largest.clamp(how.least, how.limit)
    scale = (largest / top).to(torch.float32)
    codes = (blocks.to(torch.float32) / scale).masked_fill_(scale == 0, 0).clamp_(-top, top).to(dtype).to(torch.float32)
    if how.granularity == "group":
        return _finish(product((codes * scale).flatten(1)[:, : numbers.shape[1]]), bias, x.dtype)
    return _finish(product(codes.flatten(1)) * scale.reshape(-1, 1), bias, x.dtype)


@activation_rule("torchao_scaled")
def scaled(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """Only the scales that were taken out of the weight."""
    return _finish(product(_scaled(x, _of(weight))), bias, x.dtype)


@activation_rule("torchao_int8_old")
def int8_old(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """s = max|x| / 127 of each token, not below 1e-5; codes from -127 to 127. Every step in the dtype of the scales."""
    low, high = _extremes(x, _of(weight))
    scale, _ = affine(low, high, -127, 127, True, 1e-5)
    scale = scale.to(torch.float32) if x.dtype == torch.float16 else scale
    codes = torch.round(x * (1.0 / scale)).clamp_(-127, 127)
    sums, own = product(codes.to(torch.int8)), _row_scales(weight.tree)
    if own is None or x.dtype == torch.float32:
        return finish(sums * scale.to(torch.float32), bias, x.dtype)
    y = torch.round(sums / own).to(scale.dtype) * scale
    return finish(y * own.to(x.dtype), bias, x.dtype)


@activation_rule("torchao_int8_qdq_old")
def int8_qdq_old(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """As `torchao_int8_qdq`, but scales are float32 once they are found."""
    how = _of(weight)
    scale, zero = affine(*_extremes(x, how), -128, 127, how.symmetric, SMALLEST_INT8)
    scale = scale.to(torch.float32)
    codes = (torch.round(x * (1.0 / scale)) + zero).clamp_(-128, 127)
    return _finish(product(((codes - zero) * scale).to(x.dtype)), bias, x.dtype)


def _finish(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The bias is added before the only rounding."""
    return (y if bias is None else y + bias.to(torch.float32)).to(dtype)
