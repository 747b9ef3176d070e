"""Putting weights together, and taking them apart again exactly: experts into a stack, gate and up into one matrix.

Leaves are concatenated where the trees have one form and no stored tensor would have to be equal in all of them; otherwise
the trees stay side by side under `Stack` or `Rows`. The choice never looks at numbers, so a scheme joins like its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.errors import NotRepresentable
from anybit.weight import nodes
from anybit.weight.activation import Activation, beside
from anybit.weight.gathering import gather_rows
from anybit.weight.nodes import Node, map_tensors, tensors_of
from anybit.weight.slicing import slice_rows
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

# nodes whose tensors may all get a leading experts axis; the others hold lists of entries that differ in length
_STACKABLE = (
    nodes.Values, nodes.Codes, nodes.Grid, nodes.Codebook, nodes.Columns, nodes.Rows, nodes.Sum, nodes.Permute,
    nodes.Transpose, nodes.Scaled, nodes.Divided, nodes.Rotate, nodes.View, nodes.Crop,
)  # fmt: skip


# --- experts -------------------------------------------------------------------------------------------------------------


def stack(weights: Sequence[Weight]) -> Weight:
    """Matrices of one shape -> a stack [experts, rows, columns]. Extras are left behind."""
    first = weights[0]
    if any(weight.shape != first.shape or len(weight.shape) != 2 for weight in weights):
        raise NotRepresentable(
            f"only matrices of one shape can be stacked, not {[tuple(weight.shape) for weight in weights]}"
        )
    activation = _stack_activations([weight.activation for weight in weights])
    if not _stackable(first.tree) or any(_form(weight.tree) != _form(first.tree) for weight in weights):
        return Weight(nodes.Stack(tuple(weight.tree for weight in weights)), first.dtype, activation)
    columns = zip(*(tensors_of(weight.tree) for weight in weights), strict=True)
    stacked = iter([torch.stack(list(tensors)) for tensors in columns])
    return Weight(map_tensors(first.tree, lambda _: next(stacked)), first.dtype, activation)


def unstack(weight: Weight) -> list[Weight]:
    """Inverse of `stack`."""
    return [weight.select(expert) for expert in range(weight.shape[0])]


def _stackable(node: Node) -> bool:
    return isinstance(node, _STACKABLE) and all(_stackable(part) for part in _below(node))


def _below(node: Node) -> list[Node]:
    """Direct children, those in tuples included."""
    found: list[Node] = []
    for field in fields(node):
        value = getattr(node, field.name)
        found += [part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, Node)]
    return found


def _form(node: Node) -> tuple[str, list[tuple[Any, ...]]]:
    """Everything of a tree but its numbers."""
    shapes: list[tuple[Any, ...]] = [(tensor.dtype, *tensor.shape) for tensor in tensors_of(node)]
    return Weight(node).structure(), shapes


def _stack_activations(activations: list[Activation | None]) -> Activation | None:
    first = activations[0]
    if first is None or not first.tensors:
        _same_rules(activations)
        return first
    _same_rules(activations)
    columns = zip(*(activation.tensors for activation in activations if activation is not None), strict=True)
    return replace(first, tensors=tuple(torch.stack(list(tensors)) for tensors in columns), stacked=True)


def _same_rules(activations: list[Activation | None]) -> None:
    def rule(activation: Activation | None) -> Activation | None:
        return replace(activation, tensors=()) if activation is not None else None

    first = _fields(rule(activations[0]))
    if any(_fields(rule(activation)) != first for activation in activations):
        raise NotRepresentable(
            "weights that quantize their input in different ways cannot become one weight; load them apart"
        )


def _fields(value: Activation | None) -> object:
    return None if value is None else [getattr(value, field.name) for field in fields(value)]


# --- rows ----------------------------------------------------------------------------------------------------------------


def join_rows(weights: Sequence[Weight]) -> Weight:
    """Matrices (or stacks) over the same inputs, one above the other. Extras are left behind."""
    first = weights[0]
    activation = _join_activations([weight.activation for weight in weights], [weight.shape[-2] for weight in weights])
    if len(weights) == 1:
        return Weight(first.tree, first.dtype, activation)
    if len({(*weight.shape[:-2], weight.shape[-1]) for weight in weights}) != 1:
        raise NotRepresentable(
            f"rows of different widths cannot be joined: {[tuple(weight.shape) for weight in weights]}"
        )
    trees = [weight.tree for weight in weights]
    joined = _join(trees)
    return Weight(joined if joined is not None else nodes.Rows(tuple(trees)), first.dtype, activation)


class Alternating(int):
    """Position of a part whose rows take turns with those of the others: row r of part p of n is row r * n + p."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alternating) and int(self) == int(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((Alternating, int(self)))


def alternate_rows(weights: Sequence[Weight]) -> Weight:
    """Matrices of one shape, their rows by turns. Extras are left behind.

    A tree whose rows cannot be picked, or that has scales of inputs for each part, stays as `join_rows` makes it, and its rows
    are put in order when they are read: Transpose(Permute(Transpose(tree))).
    """
    whole = join_rows(weights)
    count, rows = len(weights), weights[0].shape[-2]
    if whole.activation is None or not whole.activation.tensors:
        try:
            return replace(
                whole, tree=gather_rows(whole.tree, torch.arange(count * rows).view(count, rows).T.reshape(-1))
            )
        except NotRepresentable:
            pass
    places = torch.arange(count * rows, dtype=torch.int32).view(rows, count).T.reshape(-1)  # of each row of the tree
    order = nodes.Permute(nodes.Transpose(whole.tree), places.to(whole.device))
    return replace(whole, tree=nodes.Transpose(order))


def in_stored_order(weight: Weight) -> tuple[Weight, Tensor] | None:
    """The weight with its rows as they are stored, and where they belong; None if that is no difference."""
    match weight.tree:
        case nodes.Transpose(child=nodes.Permute(child=nodes.Transpose(child=tree), index=places)):
            return replace(weight, tree=tree), places
    return None


def split_alternating(weight: Weight, count: int) -> list[Weight]:
    """Inverse of `alternate_rows`."""
    rows = weight.shape[-2] // count
    stored = in_stored_order(weight)
    if stored is not None:
        return split_rows(stored[0], [rows] * count)
    return [
        replace(weight, tree=gather_rows(weight.tree, torch.arange(position, count * rows, count)))
        for position in range(count)
    ]


def split_rows(weight: Weight, rows: Sequence[int]) -> list[Weight]:
    """Inverse of `join_rows`: consecutive parts of rows[0], rows[1], ... rows."""
    if sum(rows) != weight.shape[-2]:
        raise NotRepresentable(f"parts of {list(rows)} rows do not make up a weight of {weight.shape[-2]} rows")
    starts = [sum(rows[:position]) for position in range(len(rows))]
    tree = weight.tree
    if isinstance(tree, nodes.Rows) and [part.shape[-2] for part in tree.parts] == list(rows):
        activation = weight.activation
        return [
            Weight(part, weight.dtype, activation and activation.of_rows(start, start + part.shape[-2]))
            for part, start in zip(tree.parts, starts, strict=True)
        ]
    return [slice_rows(weight, start, start + count) for start, count in zip(starts, rows, strict=True)]


def _join_activations(activations: list[Activation | None], rows: list[int]) -> Activation | None:
    """Static scales stay those of their rows, whether or not they are equal: a scheme has no numbers to tell."""
    _same_rules(activations)
    first = activations[0]
    if first is None or not first.tensors or len(activations) == 1:
        return first
    parts = [part for activation in activations if activation is not None for part in activation.parts]
    heights = [
        height
        for activation, own in zip(activations, rows, strict=True)
        if activation is not None
        for height in (activation.rows or (own,))
    ]
    return beside(parts, heights)


def _join(parts: list[Any]) -> Node | None:
    """One tree with the parts' leaves concatenated, or None if that would need equal tensors or uncut blocks."""
    first = parts[0]
    if any(type(part) is not type(first) for part in parts) or type(first) not in _JOINERS:
        return None
    return _JOINERS[type(first)](parts)


def _agree(parts: list[Any], *names: str) -> bool:
    """Whether fields that hold no tensor are equal in all parts. A tensor counts as different."""
    found = [[getattr(part, name) for name in names] for part in parts]
    if any(isinstance(value, torch.Tensor) for own in found for value in own):
        return False
    return all(own == found[0] for own in found)


def _concatenate(tensors: list[Tensor]) -> Tensor | None:
    first = tensors[0]
    if any(
        tensor.dtype != first.dtype or (*tensor.shape[:-2], tensor.shape[-1]) != (*first.shape[:-2], first.shape[-1])
        for tensor in tensors
    ):
        return None
    return torch.cat(tensors, dim=-2)


def _values(parts: list[nodes.Values]) -> Node | None:
    tensor = _concatenate([part.tensor for part in parts])
    if tensor is None or not _agree(parts, "inverted", "negated", "levels"):
        return None
    return replace(parts[0], tensor=tensor)


def _codes(parts: list[nodes.Codes]) -> Node | None:
    packed = _concatenate([part.packed for part in parts])
    return (
        replace(parts[0], packed=packed) if packed is not None and _agree(parts, "bits", "columns", "signed") else None
    )


def _parameters(parts: list[Any], names: tuple[str, ...], high: int) -> dict[str, Any] | None:
    """Every named parameter joined, or None. A parameter that all rows share would have to be equal in all parts."""
    joined: dict[str, Any] = {}
    for name in names:
        own = [getattr(part, name) for part in parts]
        if all(node is None for node in own):
            joined[name] = None
            continue
        if any(node is None for node in own):
            return None
        for number, (part, node) in enumerate(zip(parts, own, strict=True)):
            rows = part.shape[-2]
            whole = number == len(parts) - 1 or rows % high == 0
            if not whole or node.shape[-2] != -(-rows // high):
                return None
        # one block in all would look like a parameter shared by all rows, which the cut back keeps
        found = _join(own)
        if found is None:
            return None
        joined[name] = found
    return joined


def _grid(parts: list[nodes.Grid]) -> Node | None:
    if not _agree(parts, "levels", "block", "compute", "group_index"):
        return None
    codes = _join([part.codes for part in parts])
    parameters = _parameters(parts, ("scale", "zero", "offset"), parts[0].block[0])
    return None if codes is None or parameters is None else replace(parts[0], codes=codes, **parameters)


def _scaled(parts: list[nodes.Scaled]) -> Node | None:
    child = _join([part.child for part in parts])
    parameters = _parameters(parts, ("scale", "offset"), 1)
    if child is None or parameters is None or not _agree(parts, "compute"):
        return None
    return replace(parts[0], child=child, **parameters)


def _divided(parts: list[nodes.Divided]) -> Node | None:
    child = _join([part.child for part in parts]) if _agree(parts, "divisor") else None
    return None if child is None else replace(parts[0], child=child)


def _sum(parts: list[nodes.Sum]) -> Node | None:
    if not _agree(parts, "compute") or len({len(part.parts) for part in parts}) != 1:
        return None
    joined = [_join(list(own)) for own in zip(*(part.parts for part in parts), strict=True)]
    return None if any(node is None for node in joined) else replace(parts[0], parts=tuple(joined))  # type: ignore[arg-type]


def _side_by_side(parts: list[nodes.Columns]) -> Node | None:
    if len({tuple(own.shape[-1] for own in part.parts) for part in parts}) != 1:
        return None
    joined = [_join(list(own)) for own in zip(*(part.parts for part in parts), strict=True)]
    return None if any(node is None for node in joined) else replace(parts[0], parts=tuple(joined))  # type: ignore[arg-type]


def _rotate(parts: list[nodes.Rotate]) -> Node | None:
    child = _join([part.child for part in parts]) if _agree(parts, "size", "side") and parts[0].matrix is None else None
    return replace(parts[0], child=child) if child is not None and all(part.matrix is None for part in parts) else None


def _view(parts: list[nodes.View]) -> Node | None:
    if not _agree(parts, "columns") or any(
        part.child.shape[-2] * part.child.shape[-1] != part.rows * part.columns for part in parts
    ):
        return None
    child = _join([part.child for part in parts])
    return None if child is None else replace(parts[0], child=child, rows=sum(part.rows for part in parts))


def _crop(parts: list[nodes.Crop]) -> Node | None:
    if not _agree(parts, "columns") or any(part.rows != part.child.shape[-2] for part in parts):
        return None
    child = _join([part.child for part in parts])
    return None if child is None else replace(parts[0], child=child, rows=sum(part.rows for part in parts))


_JOINERS: dict[type[Node], Callable[[list[Any]], Node | None]] = {
    nodes.Values: _values,
    nodes.Codes: _codes,
    nodes.Grid: _grid,
    nodes.Scaled: _scaled,
    nodes.Divided: _divided,
    nodes.Sum: _sum,
    nodes.Columns: _side_by_side,
    nodes.Rotate: _rotate,
    nodes.View: _view,
    nodes.Crop: _crop,
}
