"""The same numbers in another form: a weight rewritten for the scheme of another layout, without choosing any code anew.

Both trees must be one grid under nodes that only move elements (views, transposes, orders, crops). Element by element the
source is (level - zero) * scale + offset; each of the four is carried to where the target's grid wants it, rounded to the nearest
number that the target can store. Where a block of the target would need two different scales, or an integer zero point
something between two steps, there is no such form. Whether the result has exactly the same values, or values
rounded by a narrower scale, is not argued but measured: compare the two dense weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.errors import NotRepresentable
from anybit.weight import levels as tables
from anybit.weight import nodes
from anybit.weight.elements import Elements, described, device_of, take_apart
from anybit.weight.joining import stack
from anybit.weight.nodes import Node
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

MOST_SLACK = 0.125  # of a step: an offset further than this from whole steps is no rounded zero point


def rewrite(weight: Weight, scheme: Weight) -> Weight:
    """`weight` in the structure of `scheme`, with codes kept. NotRepresentable says what does not fit.

    Scales are rounded where the scheme stores them in a narrower dtype, so compare `to_dense` of both.
    """
    if weight.shape != scheme.shape:
        raise NotRepresentable(f"a weight {weight.shape} cannot take the form of a weight {scheme.shape}")
    activation = scheme.activation
    if activation is not None and any(
        tensor.is_meta for tensor in activation.tensors
    ):  # scales of inputs come from the source
        if weight.activation is None or len(weight.activation.tensors) != len(activation.tensors):
            raise NotRepresentable("the target stores scales of its inputs, which the source does not have")
        own = [_as(mine, theirs) for mine, theirs in zip(weight.activation.tensors, activation.tensors, strict=True)]
        activation = replace(activation, tensors=tuple(own))
    kept = Weight(weight.tree, scheme.dtype, activation)
    if kept.structure() == scheme.structure() and _leaves(kept) == _leaves(
        scheme
    ):  # any form: scales of scales, tables
        return kept
    if len(weight.shape) == 3:
        return stack([rewrite(weight.select(expert), scheme.select(expert)) for expert in range(weight.shape[0])])
    return Weight(_matched(weight.tree, scheme.tree), scheme.dtype, activation)


def _as(stored: Tensor, scheme: Tensor) -> Tensor:
    """A scale of inputs in the dtype and shape of the target."""
    found = stored.to(scheme.dtype)
    if stored.numel() != scheme.numel() or not torch.equal(found.to(stored.dtype), stored):
        raise NotRepresentable(
            f"the target stores the scale of its inputs in another form, {scheme.dtype} {list(scheme.shape)}"
        )
    return found.reshape(scheme.shape)


def _matched(source: Node, target: Node) -> Node:
    """The target's node with the source's numbers; two rotations by the same matrix are one and the same."""
    if isinstance(source, nodes.Rotate) and isinstance(target, nodes.Rotate):
        if (source.size, source.side) != (target.size, target.side):
            raise NotRepresentable("source and target rotate the weight in blocks of different sizes")
        mine = source.factor(device_of(source))
        matrix = mine.to(target.matrix.dtype) if target.matrix is not None else None
        stored = matrix.to(torch.float32) if matrix is not None else nodes.hadamard(target.size, mine.device)
        if not torch.equal(stored, mine):
            raise NotRepresentable("source and target rotate the weight by different matrices")
        return replace(target, child=_matched(source.child, target.child), matrix=matrix)
    return _put_together(target, take_apart(source))


def _leaves(weight: Weight) -> list[tuple[torch.dtype, torch.Size]]:
    return [(tensor.dtype, tensor.shape) for tensor in nodes.tensors_of(weight.tree)]


def _put_together(node: Node, elements: Elements) -> Node:
    """The target's node holding the elements."""
    rows, columns = node.shape
    match node:
        case nodes.Grid():
            return _grid(node, elements)
        case nodes.View():
            high, wide = node.child.shape
            if high * wide != rows * columns:
                raise NotRepresentable(f"the target pads {rows * columns} weights to {high * wide}")
            return replace(node, child=_put_together(node.child, elements.map(lambda part: part.reshape(high, wide))))
        case nodes.Transpose():
            return replace(node, child=_put_together(node.child, elements.map(lambda part: part.T)))
        case nodes.Crop():
            high, wide = node.child.shape
            return replace(node, child=_put_together(node.child, elements.map(lambda part: _padded(part, high, wide))))
        case nodes.Scaled(scale=nodes.Values() as factor) if node.offset is None and not factor.tensor.is_meta:
            numbers = factor.dense().to(elements.level.device).expand(rows, columns)
            scale = elements.scale if elements.scale is not None else torch.ones_like(elements.level)
            offset = None if elements.offset is None else elements.offset / numbers
            own = replace(elements, scale=scale / numbers, offset=offset, unit=None)
            return replace(node, child=_put_together(node.child, own))
        case nodes.Values(inverted=False, levels=None):
            return _stored(node, _numbers(elements), "weight")
        case nodes.Rotate():
            raise NotRepresentable(
                f"the target stores the weight rotated, in blocks of {node.size} {node.side}s; codes of a weight that is not "
                "would mean nothing"
            )
    raise NotRepresentable(f"in the target {described(node)}; the source's codes do not say which those would be")


def _padded(part: Tensor, high: int, wide: int) -> Tensor:
    """Grown to high x wide by repeating the last row and column: a crop takes it away again, and groups stay like neighbours."""
    rows = torch.arange(high, device=part.device).clamp(max=part.shape[0] - 1)
    columns = torch.arange(wide, device=part.device).clamp(max=part.shape[1] - 1)
    return part.index_select(0, rows).index_select(1, columns)


def _numbers(elements: Elements) -> Tensor:
    numbers = elements.level if elements.zero is None else elements.level - elements.zero
    numbers = numbers if elements.scale is None else numbers * elements.scale
    return numbers if elements.offset is None else numbers + elements.offset


def _grid(node: nodes.Grid, elements: Elements) -> Node:
    if node.group_index is not None:
        raise NotRepresentable("the target orders its groups by an index that conversion does not choose")
    scale, zero, offset = elements.scale, elements.zero, elements.offset
    level = elements.level
    if node.levels is None:
        level, zero, offset = _integers(node, elements)
        codes = _codes(node, level)
    else:
        level = level if zero is None else level - zero
        zero = None
        codes = _codes(node, _look_back(node.levels, level))
    parts: dict[str, Any] = {}
    for name, values, neutral in (("scale", scale, 1.0), ("zero", zero, 0.0), ("offset", offset, 0.0)):
        own = getattr(node, name)
        if own is None:
            if values is not None and bool((values != neutral).any()):
                raise NotRepresentable(f"the target has no {name}, the source has one")
            parts[name] = None
        else:
            full = values if values is not None else torch.full_like(level, neutral)
            blocks = _blocks(full, own.shape, node.block, name)
            parts[name] = (
                _coded(own, blocks, elements.unit) if isinstance(own, nodes.Grid) else _stored(own, blocks, name)
            )
    return replace(node, codes=codes, **parts)


def _integers(node: nodes.Grid, elements: Elements) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Integer levels moved into the target's range, with the zero or offset that undoes it."""
    level, zero, scale, offset = elements.level, elements.zero, elements.scale, elements.offset
    codes = node.codes
    if not isinstance(codes, nodes.Codes):
        raise NotRepresentable(f"the target's codes are a {type(codes).__name__}")
    broken = level != torch.round(level)
    if bool(broken.any()):
        raise NotRepresentable(
            f"the source's levels are no integers, as the target's are: one of them is {float(level[broken][0]):.4g}"
        )
    if offset is not None and node.offset is None:  # an offset in steps is a zero
        zero = (zero if zero is not None else 0) - _steps(
            node, offset / scale if scale is not None else offset, elements
        )
        offset = None
    lowest = -(1 << (codes.bits - 1)) if codes.signed else 0
    highest = lowest + (1 << codes.bits) - 1
    half = float(1 << (codes.bits - 1))
    if node.zero is None:
        if zero is not None and node.offset is not None:
            offset = -zero * (scale if scale is not None else 1) + (offset if offset is not None else 0)
        elif zero is not None:
            level = level - zero
            if bool((level != torch.round(level)).any()):
                raise NotRepresentable("the target has no zero points, and the source's are no integers")
        shift = -half if float(level.min()) < lowest else half if float(level.max()) > highest else 0.0
        if shift:  # codes that begin elsewhere, and an offset that takes the difference
            if node.offset is None:
                raise NotRepresentable(
                    f"codes {int(level.min())}..{int(level.max())} do not fit the target's {lowest}..{highest}"
                )
            level = level - shift
            moved = shift * (scale if scale is not None else torch.ones_like(level))
            offset = moved if offset is None else offset + moved
        return level, None, offset
    zero = zero if zero is not None else torch.zeros_like(level)
    shift = half if float(level.min()) < lowest else -half if float(level.max()) > highest else 0.0
    return level + shift, zero + shift, offset


def _steps(node: nodes.Grid, steps: Tensor, elements: Elements) -> Tensor:
    """An offset in steps of the scale: as it is where the target's zero is a number, whole where it is an integer or none."""
    if isinstance(node.zero, nodes.Values) and node.zero.tensor.dtype.is_floating_point:
        return steps
    whole = torch.round(steps)
    slack = (2 * elements.rounding * steps.abs()).clamp(min=1e-5, max=MOST_SLACK)
    wrong = (steps - whole).abs() > slack
    if bool(wrong.any()):
        raise NotRepresentable(
            f"the source's offset of {float(steps[wrong][0]):.3f} steps is no whole zero point, and the target has no other"
        )
    return whole


def _coded(node: nodes.Grid, values: Tensor, unit: Tensor | None) -> Node:
    """Scales that are codes in a table times one unit, as NVFP4 has them: the source's unit, or a power of two."""
    if node.levels is None or node.zero is not None or node.offset is not None or node.scale is None:
        raise NotRepresentable("the target's scales are integers times a scale, which would have to be chosen anew")
    if node.scale.shape != (1, 1):
        raise NotRepresentable("the target has many scales of scales, which would have to be chosen anew")
    table = (
        tables.table(node.levels, str(values.device)) if isinstance(node.levels, str) else node.levels.to(torch.float32)
    )
    known = table[torch.isfinite(table)]
    if unit is None:
        largest = 2.0 ** torch.floor(torch.log2(known.max()))
        factor = 2.0 ** torch.floor(torch.log2(values.abs().max().clamp(min=1e-38))) / largest
        unit = torch.ones(1, 1, device=values.device) if bool(torch.isin(values, known).all()) else factor.reshape(1, 1)
    one = _stored(node.scale, _blocks(unit, (1, 1), (1, 1), "the scale of scales"), "scale of scales")
    wanted = values / one.dense()
    ordered, order = torch.sort(torch.where(torch.isfinite(table), table, torch.inf), stable=True)
    above = torch.searchsorted(ordered, wanted.contiguous()).clamp(max=len(known) - 1)
    below = (above - 1).clamp(min=0)
    place = torch.where((ordered[above] - wanted).abs() <= (ordered[below] - wanted).abs(), above, below)
    found = ordered[place]
    wrong = (found - wanted).abs() > 2.0**-20 * wanted.abs()  # what rounding the unit explains
    if bool(wrong.any()):
        raise NotRepresentable(
            f"the target's scales are {node.levels} codes times one unit; {float(wanted[wrong][0]):.4g} units is none of them"
        )
    assert isinstance(node.codes, nodes.Codes)
    codes = _codes(node, order[place].to(torch.float32))
    return replace(node, codes=codes, scale=one)


def _codes(node: nodes.Grid, level: Tensor) -> Node:
    codes = node.codes
    if not isinstance(codes, nodes.Codes):
        raise NotRepresentable(f"the target's codes are a {type(codes).__name__}")
    lowest = -(1 << (codes.bits - 1)) if codes.signed else 0
    highest = lowest + (1 << codes.bits) - 1
    smallest, largest = int(level.min()), int(level.max())
    if smallest < lowest or largest > highest:
        raise NotRepresentable(f"codes {smallest}..{largest} do not fit the target's {lowest}..{highest}")
    return nodes.Codes.of(level.to(torch.int32), codes.bits, codes.signed)


def _look_back(levels: str | Tensor, values: Tensor) -> Tensor:
    """The code of each value in a table; NotRepresentable names a value the table lacks."""
    table = tables.table(levels, str(values.device)) if isinstance(levels, str) else levels.to(torch.float32)
    order = torch.argsort(table, stable=True)
    ordered = table[order]
    ordered = torch.where(torch.isnan(ordered), torch.full_like(ordered, float("inf")), ordered)
    place = torch.searchsorted(ordered, values.contiguous()).clamp(max=len(table) - 1)
    wrong = ordered[place] != values
    if bool(wrong.any()):
        raise NotRepresentable(f"the target's table has no value {float(values[wrong][0])}")
    codes = order[place]
    negative = (values == 0) & torch.signbit(values)  # -0 has a code of its own in float tables
    minus = torch.nonzero((table == 0) & torch.signbit(table))
    plus = torch.nonzero((table == 0) & ~torch.signbit(table))
    if len(minus) and len(plus):
        codes = torch.where(values == 0, torch.where(negative, minus[0, 0], plus[0, 0]), codes)
    return codes.to(torch.float32)


def _blocks(full: Tensor, shape: tuple[int, ...], block: tuple[int, int], name: str) -> Tensor:
    """One value per block, which must be the same in all of it."""
    for axis in (0, 1):
        size = full.shape[axis] if shape[axis] == 1 else block[axis]
        first = full.index_select(axis, torch.arange(0, full.shape[axis], size, device=full.device))
        again = first.repeat_interleave(size, dim=axis).narrow(axis, 0, full.shape[axis])
        if not torch.equal(again, full):
            sides = "x".join("all" if own == 1 else str(side) for own, side in zip(shape, block, strict=True))
            raise NotRepresentable(
                f"a block of the target ({sides} weights) holds several values of {name}; its groups are too large"
            )
        full = first
    return full


def _stored(node: Node, values: Tensor, name: str) -> Node:
    """Values as the target keeps them, rounded to its dtype."""
    match node:
        case nodes.Values(tensor=like, inverted=inverted, negated=negated, levels=None):
            numbers = -values if negated else values
            numbers = 1 / numbers if inverted else numbers
            if not like.dtype.is_floating_point and bool((numbers != torch.round(numbers)).any()):
                raise NotRepresentable(f"the target's {name} is an integer, the source's is not")
            kept = numbers.to(like.dtype)
            if not like.dtype.is_floating_point and bool((kept.to(torch.float32) != numbers).any()):
                raise NotRepresentable(
                    f"a {name} of {float(numbers.abs().max()):.0f} is beyond the target's {like.dtype}"
                )
            if not bool(torch.isfinite(kept.to(torch.float32)).all()):
                raise NotRepresentable(
                    f"a {name} of {float(values.abs().max()):.3g} is beyond the target's {like.dtype}"
                )
            return replace(node, tensor=kept.contiguous())
        case nodes.Values(levels=str() as table, tensor=like):
            codes = _look_back(table, -values if node.negated else values)
            return replace(node, tensor=codes.to(torch.uint8).view(like.dtype).contiguous())
        case nodes.Divided(child=child, divisor=divisor):
            return replace(node, child=_stored(child, values * divisor, name))
        case nodes.Codes():
            whole = torch.round(values)
            if not torch.equal(whole, values):
                raise NotRepresentable(f"the target's {name} is an integer, the source's is not")
            return _codes(nodes.Grid(node), whole)
    raise NotRepresentable(
        f"the target keeps its {name} as a {type(node).__name__}, which would have to be chosen anew"
    )
