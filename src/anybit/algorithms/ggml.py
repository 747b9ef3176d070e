"""llama.cpp's reference rounding of blocks with one scale, or a scale and a minimum: its codes and scales bit for bit.

    largest   scale = (value of largest magnitude, with its sign) / -2**(bits - 1), so that this value is exact
    amax      scale = largest magnitude / 127, ties away from zero
    range     scale = (max - min) / (2**bits - 1), minimum = min

Codes are found with the reciprocal of the float32 scale; float16 is what is stored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anybit.errors import InvalidOption, NotRepresentable
from anybit.weight import nodes
from anybit.weight.weight import Weight, row_chunks

CHUNK = 1 << 18  # weights worked on at once
RULES = ("largest", "amax", "range")


def quantize(dense: Tensor, target: Weight, *, rule: str) -> Weight:
    """Fill a grid of integers whose scales (and minimums) are float16, one for each block of a row.

    Raises NotRepresentable for a weight that is not finite, or too large for float16 scales, and for trees of another form.
    """
    if rule not in RULES:
        raise InvalidOption(f"rule is {rule!r}; it is one of {', '.join(RULES)}")
    match target.tree:
        case nodes.Grid(
            codes=nodes.Codes(), scale=nodes.Values(), zero=None, levels=None, block=(1, int()), offset=offset
        ) if (offset is None) != (rule == "range"):
            pass
        case _:
            raise NotRepresentable(
                f"rule {rule!r} fills a grid of integers with {'a minimum' if rule == 'range' else 'nothing but a scale'} for "
                f"each block of a row, not this {type(target.tree).__name__}"
            )
    tree: Any = target.tree
    codes, width = tree.codes, tree.block[1]
    rows, columns = dense.numel() // dense.shape[-1], dense.shape[-1]
    flat, bits = dense.reshape(rows, columns), codes.bits
    packed = torch.empty(rows, codes.packed.shape[-1], dtype=torch.uint8, device=dense.device)
    numbers = torch.empty(2, rows, columns // width, dtype=torch.float16, device=dense.device)
    for start, stop in row_chunks(rows, columns, CHUNK):
        blocks = flat[start:stop].to(torch.float32).unflatten(-1, (-1, width))
        found, scale, minimum = _RULES[rule](blocks, bits)
        packed[start:stop] = nodes.Codes.of(found.to(torch.int16).flatten(-2), bits, codes.signed).packed
        numbers[0, start:stop], numbers[1, start:stop] = scale, minimum
    if not bool(torch.isfinite(numbers).all()):
        raise NotRepresentable(
            "the weight holds NaN, infinity, or numbers too large for float16 scales. Mend it, or leave the module out"
        )
    scale, minimum = (part.view(tree.scale.tensor.shape) for part in numbers)
    filled = replace(
        tree,
        codes=replace(codes, packed=packed.view(codes.packed.shape)),
        scale=replace(tree.scale, tensor=scale),
        offset=None if tree.offset is None else replace(tree.offset, tensor=minimum),
    )
    return Weight(filled, target.dtype, target.activation)


def _reciprocal(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0, 1 / scale)[..., None]


def _largest(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes minus 2**(bits - 1); of equal magnitudes the first one counts."""
    half = 1 << (bits - 1)
    sizes = blocks.abs()
    is_largest = sizes == sizes.amax(-1, keepdim=True)
    place = torch.where(is_largest, torch.arange(blocks.shape[-1], device=blocks.device), blocks.shape[-1] - 1).amin(-1)
    scale = blocks.gather(-1, place[..., None])[..., 0] / -half
    codes = (blocks * _reciprocal(scale) + (half + 0.5)).trunc().clamp(max=2 * half - 1) - half
    return codes, scale, torch.zeros_like(scale)


def _amax(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    scale = blocks.abs().amax(-1) / ((1 << (bits - 1)) - 1)
    numbers = blocks * _reciprocal(scale)
    sizes = numbers.abs()
    whole = sizes.floor()
    rounded = whole + (sizes - whole >= 0.5)  # C's roundf: half away from zero
    return torch.where(numbers < 0, -rounded, rounded), scale, torch.zeros_like(scale)


def _range(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    highest, lowest = (1 << bits) - 1, blocks.amin(-1)
    scale = (blocks.amax(-1) - lowest) / highest
    codes = ((blocks - lowest[..., None]) * _reciprocal(scale) + 0.5).trunc().clamp(max=highest)
    return codes, scale, lowest


_RULES = {"largest": _largest, "amax": _amax, "range": _range}
