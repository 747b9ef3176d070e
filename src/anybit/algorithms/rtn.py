"""Round to nearest: a block's extremes give its scale and zero point, and every weight takes the nearest code.

Fills any `Grid` of integer codes. How extremes become a scale differs between formats (where zero must lie, which arithmetic,
what an empty block gets), so a layout may pass its own rule as the option `ranges`; without one, all codes span the block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anybit.algorithms._loops import integer_codes, over_rows, row_ranges
from anybit.errors import NotRepresentable
from anybit.weight import Codes, Crop, Grid, Node, Values, Weight
from anybit.weight.nodes import map_tensors, tensors_of
from anybit.weight.weight import row_chunks


@dataclass(frozen=True)
class Range:
    """A rule's answer for every block: value = (code - zero) * scale, or code * scale + offset.

    `origin`: what is subtracted from a weight before the division, where that is not the offset that is stored.
    """

    scale: Tensor
    zero: Tensor | None = None
    offset: Tensor | None = None
    origin: Tensor | None = None


@dataclass(frozen=True)
class _Rounding:
    """How a weight becomes a code, see `quantize`."""

    arithmetic: torch.dtype
    as_stored: bool
    zero_first: bool
    ties: str
    reciprocal: bool
    limits: tuple[int, int] | None


# rule(lowest [blocks down, blocks across], highest) -> the fields of Range by name, same shape and dtype
Rule = Callable[[Tensor, Tensor], dict[str, Tensor]]


def quantize(
    dense: Tensor,
    target: Weight,
    *,
    symmetric: bool = False,
    ranges: Rule | None = None,
    arithmetic: str = "float32",
    as_stored: bool = False,
    zero_first: bool = False,
    ties: str = "even",
    reciprocal: bool = False,
    limits: tuple[int, int] | None = None,
) -> Weight:
    """The nearest codes of `target`'s grid.

    `symmetric`: zero is the middle code (without `ranges`). `arithmetic`: dtype of ranges and quotients, each operation
    rounded. `as_stored`: codes are chosen for scale and zero point as they are stored, not as they were computed.
    `zero_first`: a zero point is always added before rounding, which decides ties differently when it is odd. `ties`: what
    lies half way between two codes becomes the "even" one, or the one "away" from zero. `reciprocal`: weights are multiplied
    by 1 / scale, not divided by it. `limits`: smallest and largest code to use; all by default.
    """
    if isinstance(target.tree, Crop):  # what the format cuts off is made of zeros
        padded = target.tree.child.shape
        room = (0, padded[-1] - dense.shape[-1], 0, padded[-2] - dense.shape[-2])
        filled = quantize(
            torch.nn.functional.pad(dense, room), replace(target, tree=target.tree.child), symmetric=symmetric,
            ranges=ranges, arithmetic=arithmetic, as_stored=as_stored, zero_first=zero_first, ties=ties,
            reciprocal=reciprocal, limits=limits,
        )  # fmt: skip
        return replace(filled, tree=replace(target.tree, child=filled.tree))
    grid = _checked(dense, target)
    rule = ranges or _spanning(grid, symmetric)
    how = _Rounding(getattr(torch, arithmetic), as_stored, zero_first, ties, reciprocal, limits)
    if dense.dim() == 2:
        return Weight(_matrix(dense, grid, rule, how), target.dtype, target.activation)
    experts = [_matrix(part, grid.select(number), rule, how) for number, part in enumerate(dense)]  # type: ignore[arg-type]
    stacked = iter([torch.stack(own) for own in zip(*map(tensors_of, experts), strict=True)])
    return Weight(map_tensors(grid, lambda _: next(stacked)), target.dtype, target.activation)


def _spanning(grid: Grid, symmetric: bool) -> Rule:
    """All codes between the extremes, zero among the values; or the largest magnitude on the last code."""
    codes = grid.codes
    assert isinstance(codes, Codes)
    first, last = code_range(codes)

    def rule(low: Tensor, high: Tensor) -> dict[str, Tensor]:
        if symmetric or (grid.zero is None and grid.offset is None):
            middle = 0 if codes.signed else 1 << (codes.bits - 1)
            scale = torch.maximum(-low, high) / max(last - middle, 1)
            zero = torch.full_like(scale, middle)
        else:
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = (high - low) / (last - first)
            zero = first - torch.round(low / torch.where(scale > 0, scale, 1))
        return {"scale": torch.where(scale > 0, scale, 1), "zero": zero}

    return rule


def code_range(codes: Codes) -> tuple[int, int]:
    """Smallest and largest integer a code can be."""
    return (-(1 << (codes.bits - 1)), (1 << (codes.bits - 1)) - 1) if codes.signed else (0, (1 << codes.bits) - 1)


# --- one matrix ----------------------------------------------------------------------------------------------------------


def _matrix(dense: Tensor, grid: Grid, rule: Rule, how: _Rounding) -> Grid:
    dtype = how.arithmetic
    rows, columns = dense.shape
    codes = grid.codes
    assert isinstance(codes, Codes)
    assert grid.scale is not None
    down = grid.block[0] if grid.scale.shape[0] > 1 else rows
    across = grid.block[1] if grid.scale.shape[1] > 1 else columns
    found = Range(**rule(*_extremes(dense, grid.scale.shape, down, across, dtype)))
    parameters = _stored(grid, found)
    if how.as_stored:
        found = Range(*(_as_read(parameters.get(name), dtype) for name in ("scale", "zero", "offset")))  # type: ignore[arg-type]
        found = replace(found, zero=None) if grid.zero is None else found
    first, last = how.limits or code_range(codes)
    # a whole zero point is added after rounding, as in most integer formats; another one before
    whole = not how.zero_first and found.zero is not None and bool((found.zero == found.zero.round()).all())
    origin = found.offset if found.origin is None else found.origin
    packed = integer_codes(
        dense, codes.bits, (down, across), (first, last), 1 / found.scale if how.reciprocal else found.scale,
        arithmetic=dtype, zero=found.zero, offset=origin, multiply=how.reciprocal, zero_after=whole, ties=how.ties,
    )  # fmt: skip
    return replace(grid, codes=replace(codes, packed=packed), **parameters)  # type: ignore[arg-type]


def _extremes(
    dense: Tensor, shape: tuple[int, ...], down: int, across: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every block, in `dtype`."""
    low, high = row_ranges(dense, across, (dtype,))
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        for start, stop in row_chunks(*dense.shape):
            for row, column in torch.nonzero(~torch.isfinite(dense[start:stop].to(dtype)))[:1].tolist():
                raise NotRepresentable(
                    f"the weight holds {dense[start + row, column].item()} at row {start + row}, column {column}, which no "
                    f"block of integers in {str(dtype).removeprefix('torch.')} arithmetic can hold; repair the checkpoint"
                )
    return over_rows(low, down, "amin").view(shape).to(dtype), over_rows(high, down, "amax").view(shape).to(dtype)


# --- parameters ----------------------------------------------------------------------------------------------------------


def _stored(grid: Grid, found: Range) -> dict[str, Node]:
    """Scale, zero point and offset in the form the grid keeps them."""
    assert grid.scale is not None
    nodes = {"scale": _store(grid.scale, found.scale, "scale")}
    zero = found.zero if found.zero is not None else torch.zeros_like(found.scale)
    if grid.zero is not None:
        nodes["zero"] = _store(grid.zero, zero, "zero point")
    elif grid.offset is None and bool(zero.any()):
        raise NotRepresentable(
            f"the zero point is {zero.max().item():g}, and the grid has neither zero point nor offset"
        )
    if grid.offset is not None:
        offset = found.offset
        if offset is None:  # code * scale + offset = (code - zero) * scale, for the scale as it is stored
            offset = -(nodes["scale"].dense() * zero.to(torch.float32)) if grid.zero is None else torch.zeros_like(zero)
        nodes["offset"] = _store(grid.offset, offset, "offset")
    return nodes


def _store(node: Node, numbers: Tensor, what: str) -> Node:
    if isinstance(node, Codes):
        first, last = code_range(node)
        if bool((numbers < first).any() | (numbers > last).any()):
            raise NotRepresentable(f"a {what} of {numbers.max().item():g} does not fit {node.bits} bits")
        return Codes.of(numbers.to(torch.int32), node.bits, node.signed)
    assert isinstance(node, Values)
    meant = 1 / numbers if node.inverted else numbers
    stored = (-meant if node.negated else meant).to(node.tensor.dtype)
    if not bool(torch.isfinite(stored).all()):
        raise NotRepresentable(
            f"a {what} of {meant.abs().max().item():g} is too large for {stored.dtype}; scale the weight down"
        )
    return replace(node, tensor=stored)


def _as_read(node: Node | None, dtype: torch.dtype) -> Tensor | None:
    return None if node is None else node.dense().to(dtype)


def _checked(dense: Tensor, target: Weight) -> Grid:
    """The target's grid, if it is one this algorithm can fill."""
    grid = target.tree
    if tuple(dense.shape) != tuple(target.shape):
        raise NotRepresentable(
            f"a dense weight {tuple(dense.shape)} does not fill a target of shape {tuple(target.shape)}"
        )
    if not isinstance(grid, Grid):
        raise NotRepresentable(f"round to nearest fills a Grid, not a {type(grid).__name__}; choose another algorithm")
    if grid.levels is not None or grid.group_index is not None:
        what = "whose levels are a table" if grid.levels is not None else "whose groups are named by an index"
        raise NotRepresentable(f"round to nearest cannot fill a Grid {what}; choose another algorithm")
    if target.activation is not None and target.activation.tensors:
        raise NotRepresentable(
            "static input scales cannot be found from weights alone; choose an algorithm that calibrates"
        )
    if not isinstance(grid.codes, Codes) or not isinstance(grid.scale, Values) or grid.scale.levels is not None:
        raise NotRepresentable("round to nearest needs packed codes and a scale stored as plain numbers")
    if grid.codes.signed is False and grid.zero is None and grid.offset is None:
        raise NotRepresentable("unsigned codes without zero point or offset hold no negative number")
    for name, part in (("zero point", grid.zero), ("offset", grid.offset)):
        if part is not None and (not isinstance(part, (Codes, Values)) or part.shape != grid.scale.shape):
            raise NotRepresentable(f"round to nearest needs a {name} for each scale, stored as plain numbers or codes")
    if len(grid.scale.shape) != dense.dim():
        raise NotRepresentable("round to nearest gives every expert its own scales; this target shares them")
    return grid
