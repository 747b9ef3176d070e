"""Small floats: codes of E2M1, E2M3, E3M2, E4M3 and E5M2 with scales per block, E8M0 and E4M3 scales among them.

Formats agree on the numbers and differ in everything else: what becomes of ties, whether a scale is rounded up, down or to the
nearest, whether a weight is divided by its scale or multiplied by the reciprocal. A method says all of it:

    codes(numbers, "e2m1", ties="away")        nearest codes, saturating      numbers_of(codes, "e2m1")   and back
    e4m3(numbers)                              float8_e4m3fn, half to even, saturating
    e8m0(numbers, "ceil")                      exponent bytes                 e8m0_numbers(bytes)         and back
    largest(matrix, (128, 128))                |maximum| of every block, short last blocks included
    fill(matrix, grid, rule, ...)              one matrix into a `Grid`; `quantize` does it for weights and stacks

These need no whole float32 copy of a weight: a few rows at a time. Nothing here rounds twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.algorithms._loops import CHUNK, blocks, cast, over_rows, row_largest
from anybit.errors import NotRepresentable
from anybit.weight import levels as tables
from anybit.weight import nodes, packing
from anybit.weight.encoders import encoder
from anybit.weight.weight import Weight, row_chunks

if TYPE_CHECKING:
    from torch import Tensor

ZEROS = ("signed", "below", "plain")
# exponent bits, mantissa bits, largest finite value
FORMATS = {
    "e2m1": (2, 1, 6.0),
    "e2m3": (2, 3, 7.5),
    "e3m2": (3, 2, 28.0),
    "e4m3": (4, 3, 448.0),
    "e5m2": (5, 2, 57344.0),
}

# what is added to the bits of a float32 before its mantissa is cut off. "nearest" goes up from 1.5 on (torch's cast); "even_1",
# "even_2", "even_3" go up where the largest code of that many mantissa bits would round to the next power of two: from 1.75,
# 1.875, 1.9375 on (what AMD and compressed-tensors do for E2M1, E3M2 and E2M3 or E4M3)
E8M0_ROUNDING = {
    "floor": 0, "ceil": 0x7FFFFF, "nearest": 0x400000, "even_1": 0x200000, "even_2": 0x100000, "even_3": 0x080000,
}  # fmt: skip


# --- single numbers --------------------------------------------------------------------------------------------------------


def codes(numbers: Tensor, levels: str, ties: str = "even", zeros: str = "signed") -> Tensor:
    """uint8 codes of the nearest numbers of `levels`, in the order of their bit patterns, the sign in the highest bit.

    `ties`: what becomes of a number half way between two: "even" (the even code), "away" from zero, or towards "zero".
    Beyond the largest the largest is taken, infinity included. NaN gives some code: check first. `zeros`: the sign of what
    rounds to zero is "signed" (the sign bit stays), "below" (set for numbers below 0, so not for -0.0) or "plain" (never set).
    """
    exponent_bits, mantissa_bits, top = FORMATS[levels]
    least = 2 - (1 << (exponent_bits - 1))  # exponent of the smallest normal number; subnormals share it
    size = numbers.to(torch.float32).abs().clamp_(max=top)
    exponent = (size.view(torch.int32) >> 23).sub_(127).clamp_(min=least)
    # a power of two: the product is exact, and its integers are the codes of one octave
    steps = size.mul_((exponent.neg() + (127 + mantissa_bits)).bitwise_left_shift_(23).view(torch.float32))
    if ties == "even":
        steps = steps.round_()  # an octave has an even number of codes, so code and step are even together
    elif ties in ("away", "zero"):
        whole = steps.floor()
        part = steps.sub_(whole)
        steps = whole.add_((part >= 0.5) if ties == "away" else (part > 0.5))
    else:
        raise ValueError(f"ties are 'even', 'away' or 'zero', not {ties!r}")
    found = steps.to(torch.int32).add_(exponent.sub_(least).bitwise_left_shift_(mantissa_bits)).to(torch.uint8)
    if zeros not in ZEROS:
        raise ValueError(f"zeros are {', '.join(map(repr, ZEROS))}, not {zeros!r}")
    negative = torch.signbit(numbers) if zeros == "signed" else numbers < 0
    if zeros == "plain":
        negative &= found != 0
    return found.bitwise_or_(negative.to(torch.uint8) << (exponent_bits + mantissa_bits))


def numbers_of(found: Tensor, levels: str) -> Tensor:
    """float32 numbers that codes stand for."""
    return tables.look_up(levels, found)


def nearest(numbers: Tensor, levels: str, ties: str = "even") -> Tensor:
    """float32: each number rounded to one of `levels`, saturating."""
    if levels == "e4m3" and ties == "even":
        return e4m3(numbers).to(torch.float32)
    return numbers_of(codes(numbers, levels, ties), levels)


def e4m3(numbers: Tensor) -> Tensor:
    """float8_e4m3fn, half to even, saturating at 448 (torch before 2.13 makes NaN beyond 464); NaN stays."""
    return numbers.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def e8m0(numbers: Tensor, rounding: str = "ceil") -> Tensor:
    """uint8 bytes b of powers of two 2**(b - 127) for positive `numbers`; 0, and what lies below the smallest, gives 0.

    `rounding`: a name of `E8M0_ROUNDING`. The largest byte is 254: 255 means NaN.
    """
    bits = numbers.to(torch.float32).contiguous().view(torch.int32)
    return ((bits + E8M0_ROUNDING[rounding]) >> 23).clamp_(0, 254).to(torch.uint8)


def e8m0_numbers(found: Tensor) -> Tensor:
    """float32 powers of two of E8M0 bytes (uint8 or float8_e8m0fnu), exact; 255 is NaN."""
    return tables.look_up("e8m0", found.contiguous().view(torch.uint8))


# --- blocks ----------------------------------------------------------------------------------------------------------------


def largest(matrix: Tensor, block: tuple[int, int], casts: tuple[torch.dtype, ...] = ()) -> Tensor:
    """float32 [ceil(rows / block[0]), ceil(columns / block[1])]: the largest magnitude of every block.

    `casts`: dtypes the numbers are rounded to first. NotRepresentable for NaN and infinity, naming the place.
    """
    rows, columns = matrix.shape
    down, across = min(block[0], rows), min(block[1], columns)
    found = row_largest(matrix, across, casts)
    if not bool(torch.isfinite(found).all()):
        for start, stop in row_chunks(rows, columns, CHUNK):
            for row, column in torch.nonzero(~torch.isfinite(cast(matrix[start:stop], casts)))[:1].tolist():
                raise NotRepresentable(
                    f"the weight holds {matrix[start + row, column].item()} at row {start + row}, column {column}, for which a "
                    "block has no scale. Mend the weight, or leave the module out"
                )
    return over_rows(found, down, "amax")


@dataclass(frozen=True)
class Scales:
    """A rule's answer for the blocks of one matrix.

    `scale` [down, across] is what the block's stored scale shall mean; for E8M0 and E4M3 scales it is one of their numbers
    already. `common` (one number): the scale of the scales. Before rounding, weights are divided by `divisor` or multiplied
    by `factor` (both [down, across]); by default divided by scale * common. Where the divisor is 0, codes are 0.
    """

    scale: Tensor
    common: Tensor | None = None
    divisor: Tensor | None = None
    factor: Tensor | None = None


# rule(|maximum| of every block, float32 [down, across]) -> Scales. The maximum over all of it is the matrix'.
Rule = Callable[["Tensor"], Scales]


def quantize(
    dense: Tensor,
    target: Weight,
    *,
    rule: Rule,
    ties: str = "even",
    zeros: str = "signed",
    through: tuple[str, ...] = (),
    quotient: str = "float32",
) -> Weight:
    """The target's grid of small floats, filled: every expert of a stack has scales of its own.

    `rule`: how the largest magnitudes become scales. `ties`, `zeros`: as in `codes`. `through`: dtypes the weight is
    rounded to first. `quotient`: dtype the scaled weight is rounded to before it becomes a code.
    """
    if tuple(dense.shape) != tuple(target.shape):
        raise NotRepresentable(f"a dense weight {tuple(dense.shape)} does not fill a target of shape {target.shape}")
    tree, turned = (target.tree.child, True) if isinstance(target.tree, nodes.Transpose) else (target.tree, False)
    if not isinstance(tree, nodes.Grid):
        raise NotRepresentable(f"small floats fill a Grid, not a {type(tree).__name__}; choose another algorithm")
    if target.activation is not None and target.activation.tensors:
        raise NotRepresentable(
            "static input scales cannot be found from weights alone; choose a dynamic activation scheme"
        )
    options: dict[str, Any] = {
        "ties": ties, "zeros": zeros, "through": through, "quotient": quotient,
    }  # fmt: skip
    source = dense.transpose(-1, -2) if turned else dense
    if source.dim() == 2:
        filled: nodes.Node = fill(source, tree, rule, **options)
    else:
        parts = [fill(part, tree.select(number), rule, **options) for number, part in enumerate(source)]  # type: ignore[arg-type]
        stacked = iter([torch.stack(own) for own in zip(*map(nodes.tensors_of, parts), strict=True)])
        filled = nodes.map_tensors(tree, lambda _: next(stacked))
    return Weight(nodes.Transpose(filled) if turned else filled, target.dtype, target.activation)


def fill(
    matrix: Tensor,
    grid: nodes.Grid,
    rule: Rule,
    *,
    ties: str = "even",
    zeros: str = "signed",
    through: tuple[str, ...] = (),
    quotient: str = "float32",
) -> nodes.Grid:
    """One matrix [rows, columns] as `grid` stores it; options as for `quantize`."""
    if not isinstance(grid.codes, nodes.Codes) or not isinstance(grid.levels, str) or grid.levels not in FORMATS:
        raise NotRepresentable(f"small floats fill codes of {', '.join(FORMATS)}, not of {grid.levels!r}")
    if grid.scale is None or grid.zero is not None or grid.offset is not None or grid.group_index is not None:
        raise NotRepresentable("small floats have a scale, and neither zero points nor offsets nor a group index")
    casts = tuple(getattr(torch, name) for name in through)
    rows, columns = matrix.shape
    down = min(grid.block[0], rows) if grid.scale.shape[0] > 1 else rows
    across = min(grid.block[1], columns) if grid.scale.shape[1] > 1 else columns
    found = rule(largest(matrix, (down, across), casts))
    scale, by, divide = _store_scale(grid.scale, found), found.factor, found.factor is None
    if by is None:
        by = found.divisor
    if by is None:
        by = found.scale if found.common is None else found.scale * found.common
    packed = small_float_codes(
        matrix, grid.levels, grid.codes.bits, (down, across), by, multiply=not divide, casts=casts,
        quotient=getattr(torch, quotient), ties=ties, zeros=zeros,
    )  # fmt: skip
    return replace(grid, codes=replace(grid.codes, packed=packed), scale=scale)


@encoder("small_float_codes")
def small_float_codes(
    matrix: Tensor, levels: str, bits: int, block: tuple[int, int], by: Tensor, *, multiply: bool,
    casts: tuple[torch.dtype, ...], quotient: torch.dtype, ties: str, zeros: str,
) -> Tensor:  # fmt: skip
    """Packed codes of matrix / by (0 where it is 0) or matrix * by, rounded to `quotient` first; loops as in _loops.py."""
    rows, columns = matrix.shape
    down, across = block
    packed = torch.empty(rows, packing.row_bytes(columns, bits), dtype=torch.uint8, device=matrix.device)
    for start, stop in row_chunks(rows, columns, CHUNK):
        piece = blocks(cast(matrix[start:stop], casts).to(torch.float32), across)
        own = by.index_select(0, torch.arange(start, stop, device=matrix.device) // down).unsqueeze(-1)
        numbers = piece * own if multiply else (piece / own).masked_fill_(own == 0, 0)
        numbers = numbers.flatten(1)[:, :columns].to(quotient)
        if levels == "e4m3" and (ties, zeros) == ("even", "signed"):
            packed[start:stop] = e4m3(numbers).view(torch.uint8)
        else:
            packed[start:stop] = packing.pack(codes(numbers, levels, ties, zeros), bits)
    return packed


def _store_scale(node: nodes.Node, found: Scales) -> nodes.Node:
    """The blocks' scales in the form of `node`."""
    if isinstance(node, nodes.Values) and found.common is None:
        return _store(node, found.scale)
    if found.common is not None:
        match node:
            case nodes.Grid(codes=nodes.Codes(bits=8) as stored, levels=str() as table, scale=nodes.Values() as above):
                own = _store(nodes.Values(stored.packed, levels=table), found.scale)
                return replace(node, codes=replace(stored, packed=own.tensor), scale=_store(above, found.common))
    raise NotRepresentable(
        f"the rule gives {'one' if found.common is None else 'two'} levels of scales, which a {type(node).__name__} of this "
        "form does not store"
    )


def _store(node: nodes.Values, numbers: Tensor) -> nodes.Values:
    meant = 1 / numbers if node.inverted else numbers
    meant = -meant if node.negated else meant
    dtype, shape = node.tensor.dtype, node.tensor.shape
    if node.levels == "e8m0" or dtype == torch.float8_e8m0fnu:
        stored = e8m0(meant, "floor").view(dtype)
    elif node.levels == "e4m3":
        stored = e4m3(meant).view(dtype)
    elif node.levels is not None:
        raise NotRepresentable(f"scales are not stored as {node.levels}")
    else:
        stored = e4m3(meant) if dtype == torch.float8_e4m3fn else meant.to(dtype)
        if not bool(torch.isfinite(stored.to(torch.float32)).all()):
            raise NotRepresentable(f"a scale of {meant.abs().max().item():g} is too large for {dtype}")
    return replace(node, tensor=stored.reshape(shape))
