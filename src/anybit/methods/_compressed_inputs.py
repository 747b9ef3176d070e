"""How compressed-tensors quantizes what flows through a model: inputs and outputs of layers, keys and values.

x -> round(clamp(x / s + z)) -> (q - z) * s, every operation rounded to the dtype of x. A range always includes 0; symmetric
integers use the whole range, so that s = max|x| / 127.5 for eight bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.algorithms import minifloat
from anybit.methods._compressed_schemes import Arguments
from anybit.weight.activation import Activation, Product, activation_rule

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weight import Weight

# granularity of an Activation: strategy
GRANULARITY = {"tensor": "tensor", "token": "token", "group": "group", "tensor_group": "group"}
TYPES = {"e4m3": ("float", 8), "e2m3": ("float", 6), "e2m1": ("float", 4)}
# added to the bits of a float32 before its mantissa goes: the largest number of the type decides when a scale is doubled
MX_ROUNDING = {4: ("even_1", 2), 6: ("even_3", 2), 8: ("even_1", 8)}


def span(args: Arguments) -> tuple[float, float]:
    """Smallest and largest code."""
    if args.levels is not None:
        top = minifloat.FORMATS[args.levels][2]
        return -top, top
    return -(2.0 ** (args.bits - 1)), 2.0 ** (args.bits - 1) - 1


def mx_scales(largest: Tensor, bits: int) -> Tensor:
    """float32 powers of two for the largest magnitudes of groups."""
    rounding, offset = MX_ROUNDING[bits]
    exponents = minifloat.e8m0(largest, rounding).to(torch.int32) - offset
    return minifloat.e8m0_numbers(exponents.clamp_(min=0).to(torch.uint8))


def parameters(
    low: Tensor, high: Tensor, args: Arguments, common: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for the smallest and largest number of a block, in their dtype (a common scale makes it float32)."""
    low, high, (bottom, top) = low.clamp(max=0), high.clamp(min=0), span(args)
    zero = None
    if not args.symmetric:
        scale = (high - low) / (top - bottom)
        zero = (bottom - low / scale).clamp(bottom, top).nan_to_num(0.0).round()
    elif args.powers:
        scale = mx_scales(torch.maximum(-low, high), args.bits).to(low.dtype)
    else:
        scale = torch.maximum(-low, high) / ((top - bottom) / 2)
    if common is not None:
        scale = common * scale
    if args.scale_dtype == "float8_e4m3fn":
        scale = minifloat.e4m3(scale).to(scale.dtype)
    elif args.scale_dtype is not None and args.scale_dtype != "uint8":
        scale = scale.to(getattr(torch, args.scale_dtype)).to(scale.dtype)
    return torch.where(scale == 0, smallest(args, scale.dtype), scale), zero


def smallest(args: Arguments, dtype: torch.dtype) -> float:
    """The scale of a block that holds nothing but zeros."""
    if args.scale_dtype is not None:
        dtype = getattr(torch, args.scale_dtype)
    return {torch.float8_e4m3fn: 0.125, torch.uint8: 1.0}.get(dtype) or torch.finfo(dtype).eps


def rounded(numbers: Tensor, args: Arguments) -> Tensor:
    """The nearest codes, in the dtype of `numbers`."""
    numbers = numbers.clamp(*span(args))
    return numbers.round() if args.levels is None else minifloat.nearest(numbers, args.levels).to(numbers.dtype)


def quantized(
    x: Tensor,
    args: Arguments,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    common: Tensor | None = None,
    axes: tuple[int, ...] = (-1,),
) -> Tensor:
    """x [..., in] as its codes stand for it, in its dtype. Without `scale`, one is found for each block of x.

    `common` divides all scales. `axes`: what a token spans.
    """
    dtype, width = x.dtype, x.shape[-1]
    grouped = args.strategy in ("group", "tensor_group")
    if grouped:
        x = x.unflatten(-1, (-1, args.group_size))
        scale, zero = (part.unsqueeze(-1) if part is not None and part.dim() else part for part in (scale, zero))
    if scale is None:
        within = (-1,) if grouped else axes if args.strategy == "token" else tuple(range(x.dim()))
        scale, zero = parameters(x.amin(within, keepdim=True), x.amax(within, keepdim=True), args, common)
    else:
        scale = scale.to(dtype)
    if common is not None:
        scale = scale / common
    numbers = x / scale
    if zero is not None:
        numbers = numbers + zero.to(dtype)
    codes = rounded(numbers, args).to(scale.dtype)
    if zero is not None:
        codes = codes - zero.to(scale.dtype)
    return (codes * scale).to(dtype).reshape(*x.shape[:-2], width) if grouped else (codes * scale).to(dtype)


# --- as the rule of a weight ---------------------------------------------------------------------------------------------------


def activation(args: Arguments, names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> Activation:
    """What a weight carries of its input's arguments."""
    return Activation(
        "compressed_tensors_mx" if args.powers else "compressed_tensors",
        args.levels or f"int{args.bits}",
        GRANULARITY[args.strategy],
        args.group_size or None,
        symmetric=args.symmetric,
        names=names,
        tensors=tensors,
    )


def arguments(given: Activation) -> Arguments:
    """Back from what a weight carries."""
    kind, bits = TYPES.get(given.dtype) or ("int", int(given.dtype.removeprefix("int")))
    common = "input_global_scale" in given.names
    return Arguments(
        bits,
        kind,
        given.symmetric,
        given.granularity,
        (1, given.group_size or 0),
        "no" if "input_scale" in given.names else "yes",
        "uint8" if given.rule == "compressed_tensors_mx" else "float8_e4m3fn" if common else None,
    )


@activation_rule("compressed_tensors_mx")
@activation_rule("compressed_tensors")
def quantized_input(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """Round the input to its codes, multiply; the product accumulates in float32."""
    given = weight.activation
    assert given is not None
    found = dict(zip(given.names, given.tensors, strict=True))
    rounded_x = quantized(
        x,
        arguments(given),
        found.get("input_scale"),
        found.get("input_zero_point"),
        found.get("input_global_scale"),
    )
    y = product(rounded_x)
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)
