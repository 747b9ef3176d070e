"""Input quantization that several methods share. Every rule divides in float32, rounds to small floats and multiplies back.

    e4m3_token      one scale for each token        e4m3_group      for each run of `group_size` inputs of a token
    e4m3_static     one stored scale                mx_e4m3         powers of two for each `group_size` inputs
    int8_static     one stored scale, integers      mx_e2m1         the same with four bits
    e4m3_tensor     one scale for all tokens of a call
    nvfp4           E4M3 scales for each `group_size` inputs below a stored scale of scales

The static ones also exist with "_prescaled" behind their names: a stored factor for each input comes first.

A scale is a factor of the product (`sum(q * w) * scale`), and the order of its float32 roundings is all that is left open.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.algorithms import minifloat
from anybit.weight import float8_products
from anybit.weight.activation import RULES, Activation, Product, activation_rule

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weight import Weight

TOP = 448.0  # of E4M3
SMALLEST = 1e-12  # the divisor of a token that is all zero


def finish(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """float32 products -> the input's dtype, then the bias, as a kernel with an epilogue of its own leaves it."""
    y = y.to(dtype)
    return y if bias is None else y + bias.to(dtype)


def groups(x: Tensor, size: int) -> Tensor:
    """[tokens, in] -> float32 [tokens, groups, size]; a short last group is filled up with zeros."""
    return torch.nn.functional.pad(x.to(torch.float32), (0, -x.shape[1] % size)).unflatten(1, (-1, size))


def rounded_groups(x: Tensor, size: int) -> Tensor:
    """The input as E4M3 numbers with a float32 scale for each `size` inputs sees it, float32."""
    blocks = groups(x, size)
    scales = blocks.abs().amax(-1, keepdim=True) / TOP
    return (minifloat.nearest(blocks / scales.clamp(min=SMALLEST), "e4m3") * scales).flatten(1)[:, : x.shape[1]]


def rounded_powers(x: Tensor, size: int, levels: str = "e4m3", top: float = TOP) -> Tensor:
    """The input as small floats with a power of two, rounded up, for each `size` inputs, float32."""
    blocks = groups(x, size)
    exponents = minifloat.e8m0(blocks.abs().amax(-1, keepdim=True) / top, "ceil").clamp_(min=1)
    scales = minifloat.e8m0_numbers(exponents)
    return (minifloat.nearest(blocks / scales, levels) * scales).flatten(1)[:, : x.shape[1]]


def rounded_nvfp4(x: Tensor, size: int, common: Tensor) -> Tensor:
    """The input as E2M1 numbers with an E4M3 scale for each `size` inputs, all scales times `common`, float32."""
    blocks = groups(x, size)
    scales = minifloat.nearest(blocks.abs().amax(-1, keepdim=True) / 6.0 / common, "e4m3") * common
    numbers = (blocks / scales).masked_fill_(scales == 0, 0)
    return (minifloat.nearest(numbers, "e2m1") * scales).flatten(1)[:, : x.shape[1]]


def _codes(numbers: Tensor) -> Tensor:
    """Float32 numbers -> the nearest E4M3 numbers, as codes where a device multiplies them."""
    found = minifloat.nearest(numbers, "e4m3")
    return found if float8_products.why_not(numbers.device) else found.to(torch.float8_e4m3fn)


def _group_size(weight: Weight) -> int:
    activation = _activation(weight)
    assert activation.group_size is not None
    return activation.group_size


def _activation(weight: Weight) -> Activation:
    assert weight.activation is not None
    return weight.activation


@activation_rule("e4m3_token")
def e4m3_token(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """s = max|x| / 448 of each token."""
    numbers = x.to(torch.float32)
    scales = numbers.abs().amax(1, keepdim=True) / TOP
    return finish(product(_codes(numbers / scales.clamp(min=SMALLEST))) * scales, bias, x.dtype)


@activation_rule("e4m3_group")
def e4m3_group(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """s = max|x| / 448 of each run of inputs of each token."""
    return finish(product(rounded_groups(x, _group_size(weight))), bias, x.dtype)


@activation_rule("e4m3_static")
def e4m3_static(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """One stored scale; what lies beyond 448 of it is clipped."""
    scale = _activation(weight).tensors[0].to(torch.float32).reshape(())
    return finish(product(_codes(x.to(torch.float32) / scale)) * scale, bias, x.dtype)


@activation_rule("e4m3_tensor")
def e4m3_tensor(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """s = max|x| / 448 of all tokens together."""
    numbers = x.to(torch.float32)
    largest = numbers.abs().amax() if numbers.numel() else numbers.new_zeros(())
    scale = torch.where(largest > 0, largest / TOP, 1.0)
    return finish(product(_codes(numbers / scale)) * scale, bias, x.dtype)


@activation_rule("int8_static")
def int8_static(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """One stored scale; integers from -128 to 127."""
    scale = _activation(weight).tensors[0].to(torch.float32).reshape(())
    codes = (x.to(torch.float32) / scale).round().clamp(-128, 127)
    return finish(product(codes.to(torch.int8)) * scale, bias, x.dtype)


@activation_rule("mx_e2m1")
def mx_e2m1(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """2**ceil(log2(max|x| / 6)) of each run of inputs of each token."""
    return finish(product(rounded_powers(x, _group_size(weight), "e2m1", 6.0)), bias, x.dtype)


@activation_rule("mx_e4m3")
def mx_e4m3(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """2**ceil(log2(max|x| / 448)) of each run of inputs of each token."""
    return finish(product(rounded_powers(x, _group_size(weight))), bias, x.dtype)


@activation_rule("nvfp4")
def nvfp4(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """s = e4m3(max|x| / 6 / common) * common of each run of inputs, `common` stored and a multiplier."""
    common = _activation(weight).tensors[0].to(torch.float32).reshape(())
    return finish(product(rounded_nvfp4(x, _group_size(weight), common)), bias, x.dtype)


def _prescaled(x: Tensor, weight: Weight, bias: Tensor | None, product: Product, *, base: str) -> Tensor:
    """Inputs times the last of the stored tensors [in], in their dtype, then the rule `base`."""
    return RULES[base](x * _activation(weight).tensors[-1].to(x.dtype), weight, bias, product)


for _base in ("e4m3_static", "int8_static", "nvfp4"):
    activation_rule(f"{_base}_prescaled")(partial(_prescaled, base=_base))
