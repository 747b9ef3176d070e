"""Four Over Six: blocks of 4-bit codes, each under the closer one of two scales (arXiv 2512.02010), and what it is measured by.

    nvfp4    E2M1 codes; an adaptive rule ("mse", "mae", "abs_max") takes 4 for the largest code where that is closer than 6
    mxfp4    E2M1 codes under powers of two, rounded up
    if4      E2M1 or integers from -7 to 7, times 6/7, whichever is closer; the sign bit of the scale says which
    nvint4   integers from -7 to 7

The arithmetic is the peer's torch backend's, operation by operation, in float32; codes saturate, where the peer's overflow.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.algorithms import minifloat
from anybit.errors import NotRepresentable
from anybit.weight import nodes, packing
from anybit.weight.weight import Weight, row_chunks

if TYPE_CHECKING:
    from torch import Tensor

STATIC = ("static_6", "static_4")
ADAPTIVE = ("mse", "mae", "abs_max")
# rules each format knows, and how many numbers a block has
RULES = {"nvfp4": STATIC + ADAPTIVE, "mxfp4": STATIC, "if4": ADAPTIVE, "nvint4": ("static_6",)}
GROUP = {"nvfp4": 16, "mxfp4": 32, "if4": 16, "nvint4": 16}
INTEGERS = 0x80  # the bit of an if4 scale that says so


def largest_code(dtype: str, rule: str) -> float:
    """What the largest magnitude of a block becomes under its scale."""
    if dtype == "nvint4":
        return 7.0
    return 4.0 if rule == "static_4" and dtype != "if4" else 6.0


def divisor(dtype: str, rule: str) -> float:
    """What `amax` is divided by to give the scale of the scales."""
    return largest_code(dtype, rule) * (256.0 if dtype == "nvfp4" and rule in ADAPTIVE else 448.0)


# --- blocks ----------------------------------------------------------------------------------------------------------------


def encode(blocks: Tensor, dtype: str, rule: str, amax: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [blocks, n] and the largest magnitude of all of them -> codes uint8 [blocks, n], bytes of scales [blocks]."""
    highest = blocks.abs().amax(-1)
    if dtype == "mxfp4":
        scales = minifloat.e8m0(highest / largest_code(dtype, rule), "ceil")
        return _e2m1(blocks / minifloat.e8m0_numbers(scales)[:, None]), scales
    scales, numbers = _scaled(blocks, highest, dtype, rule, amax)
    if dtype == "nvint4":
        return _int4(numbers), scales
    codes = _e2m1(numbers)
    if dtype == "nvfp4" and rule in STATIC:
        return codes, scales
    if dtype == "if4":
        other_codes, other_scales = _int4(numbers * (7 / 6)), scales | INTEGERS
    else:
        other_scales, numbers = _scaled(blocks, highest, dtype, rule, amax, 1.5)
        other_codes = _e2m1(numbers)
    errors = [
        _error(decode(own, by, dtype, rule, amax) - blocks, rule)
        for own, by in ((codes, scales), (other_codes, other_scales))
    ]
    other = errors[1] < errors[0]
    return torch.where(other[:, None], other_codes, codes), torch.where(other, other_scales, scales)


def decode(codes: Tensor, scales: Tensor, dtype: str, rule: str, amax: Tensor) -> Tensor:
    """float32 numbers of blocks: codes uint8 [blocks, n], bytes of scales [blocks]."""
    if dtype == "mxfp4":
        return minifloat.numbers_of(codes, "e2m1") * minifloat.e8m0_numbers(scales)[:, None]
    magnitudes = (scales & 0x7F if dtype == "if4" else scales).view(torch.float8_e4m3fn).to(torch.float32)[:, None]
    over = torch.full((), divisor(dtype, rule), device=codes.device)
    if dtype == "nvint4":
        return _integers(codes) * magnitudes * amax / over
    numbers = minifloat.numbers_of(codes, "e2m1") * magnitudes * amax
    if dtype == "if4":
        whole = _integers(codes) * magnitudes * amax * (6 / 7)
        numbers = torch.where((scales >= INTEGERS)[:, None], whole, numbers)
    return numbers / over


def rounded(x: Tensor, dtype: str, rule: str) -> Tensor:
    """Inputs [tokens, in] as their codes stand for them, float32; the scale of the scales is that of all tokens."""
    size, numbers = GROUP[dtype], x.to(torch.float32)
    amax = numbers.abs().amax() if numbers.numel() else numbers.new_zeros(())
    found = torch.empty_like(numbers)
    for start, stop in row_chunks(numbers.shape[0], numbers.shape[1], minifloat.CHUNK):
        blocks = torch.nn.functional.pad(numbers[start:stop], (0, -x.shape[1] % size)).reshape(-1, size)
        own = decode(*encode(blocks, dtype, rule, amax), dtype, rule, amax)
        found[start:stop] = own.view(stop - start, -1)[:, : x.shape[1]]
    return found


def _scaled(
    blocks: Tensor, highest: Tensor, dtype: str, rule: str, amax: Tensor, expanded: float | None = None
) -> tuple[Tensor, Tensor]:
    """(bytes of scales, blocks under them)."""
    top = largest_code(dtype, rule)
    up = torch.full((), divisor(dtype, rule), device=blocks.device) / amax
    wanted = highest / top * up if expanded is None else highest / top * up * expanded
    scales = minifloat.e4m3(torch.where(amax > 0, wanted, 0.0))
    numbers = scales.to(torch.float32)[:, None]
    return scales.view(torch.uint8), torch.where(numbers != 0, blocks * (1 / (1 / up * numbers)), 0.0)


def _error(difference: Tensor, rule: str) -> Tensor:
    if rule == "mse":
        return (difference**2).sum(-1)
    return difference.abs().sum(-1) if rule == "mae" else difference.abs().amax(-1)


def _e2m1(numbers: Tensor) -> Tensor:
    return minifloat.codes(numbers, "e2m1", zeros="below")


def _int4(numbers: Tensor) -> Tensor:
    return numbers.clamp(-7, 7).round().to(torch.int8).view(torch.uint8) & 0xF


def _integers(codes: Tensor) -> Tensor:
    return ((codes.to(torch.int8) ^ 8) - 8).to(torch.float32)


# --- weights ---------------------------------------------------------------------------------------------------------------


def quantize(
    dense: Tensor, target: Weight, *, format: str = "nvfp4", rule: str = "mse", scale_2d: bool = False
) -> Weight:
    """A weight [out, in] in the target's padded form. `scale_2d`: one scale for 16 rows as well (32 for mxfp4)."""
    if dense.dim() != 2 or tuple(dense.shape) != tuple(target.shape):
        raise NotRepresentable(
            f"Four Over Six fills a matrix {tuple(target.shape)}, not a weight {tuple(dense.shape)}; choose another algorithm"
        )
    if isinstance(target.tree, nodes.Values):  # a master weight, which is quantized whenever it is used
        return Weight(nodes.Values(dense.to(target.tree.tensor.dtype)), target.dtype, target.activation)
    rows, columns = dense.shape
    outer, inner = _padded(target.tree)
    size = GROUP[format]
    highest = minifloat.largest(dense, (rows, columns)).reshape(())
    packed = torch.zeros(outer, inner // 2, dtype=torch.uint8, device=dense.device)
    scales = torch.zeros(outer, inner // size, dtype=torch.uint8, device=dense.device)
    down = size if scale_2d else 1
    step = max(down, minifloat.CHUNK // max(inner, 1) // down * down)
    for start in range(0, rows, step):
        piece = dense[start : start + step].to(torch.float32)
        tall = piece.shape[0] + -piece.shape[0] % down
        piece = torch.nn.functional.pad(piece, (0, inner - columns, 0, tall - piece.shape[0]))
        tiles = piece.view(tall // down, down, inner // size, size).transpose(1, 2)
        codes, own = encode(tiles.reshape(-1, down * size), format, rule, highest)
        codes = codes.view(tall // down, inner // size, down, size).transpose(1, 2).reshape(tall, inner)
        packed[start : start + tall] = packing.pack(codes, 4)
        scales[start : start + tall] = own.view(-1, inner // size).repeat_interleave(down, 0)
    return Weight(_filled(target.tree, packed, scales, highest), target.dtype, target.activation)


def _padded(tree: nodes.Node) -> tuple[int, int]:
    if isinstance(tree, nodes.Opaque):
        outer, half = tree.tensors[tree.names.index("values")].shape
        return outer, 2 * half
    outer, inner = (tree.child if isinstance(tree, nodes.Crop) else tree).shape
    return outer, inner


def _filled(tree: nodes.Node, packed: Tensor, scales: Tensor, amax: Tensor) -> nodes.Node:
    match tree:
        case nodes.Opaque():
            found = {"values": packed, "scales": scales, "amax": amax.reshape(1)}
            return replace(tree, tensors=tuple(found[name] for name in tree.names))
        case nodes.Crop():
            return replace(tree, child=_filled(tree.child, packed, scales, amax))
        case nodes.Grid(codes=nodes.Codes() as codes):
            scale: Any = tree.scale
            if isinstance(scale, nodes.Values):
                scale = replace(scale, tensor=scales)
            else:
                above = replace(scale.scale, child=nodes.Values(amax.reshape(1, 1)))
                scale = replace(scale, codes=replace(scale.codes, packed=scales), scale=above)
            return replace(tree, codes=replace(codes, packed=packed), scale=scale)
    raise NotRepresentable(f"Four Over Six fills a grid, not a {type(tree).__name__}; choose another algorithm")
