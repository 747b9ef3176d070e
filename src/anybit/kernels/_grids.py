"""Which weight trees the native kernels read, and how: a tree becomes a small program over the tensors it was made of.

Codes stay where and as they are: the kernels read the canonical packing, of scales that are grids themselves too. What is
added are a few small tensors (tables, unpacked zeros), so a weight costs hardly more than its bytes and `restore` is exact for
nothing.
Only act-order columns are moved, so that a group is a run again; the way back is kept.

A program is plain data, part of the kernel's spec:
    {"grid": ...}                                  one Grid
    {"rows": [...]} {"columns": [...]}             parts above or beside each other
    {"stack": [...]}                               one program per expert
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anybit.weight import Weight, levels, nodes
from anybit.weight.nodes import Node
from anybit.weight.packing import row_bytes

# the enumerations of cpu/csrc/grid.h
COMPUTE = {"float32": 0, "bfloat16": 1, "float16": 2}
UNSIGNED, SIGNED, TABLE, E4M3, E5M2 = range(5)
_FLOAT_PARAMETERS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4, torch.int8: 5}
_E8M0, _NESTED = 6, 7
_ONE_FOR_ALL = 1 << 40  # rows that share a parameter, when all do


class Refused(Exception):
    """Why a tree is not one of ours."""


@dataclass
class Slot:
    """A tensor of the prepared weight: position in the list, and bytes from one expert to the next."""

    position: int
    stride: int = 0


@dataclass
class Parameter:
    """`anybit_parameter`, and where its numbers are."""

    kind: int
    slot: Slot
    down: int
    row_stride: int
    width: int
    inverted: bool = False
    negated: bool = False
    nested: Nested | None = None


@dataclass
class Nested:
    """What makes numbers of a parameter's codes: `anybit_parameter`, and where its tensors are."""

    bits: int
    levels: int
    group: int
    count: int
    scale_kind: int
    scale: Slot
    scale_negated: bool = False
    offset_kind: int = 0
    offset: Slot | None = None
    table: Slot | None = None


@dataclass
class Grid:
    """`anybit_shape`, and where its tensors are."""

    rows: int
    columns: int
    row_bytes: int
    bits: int
    levels: int
    group: int
    compute: int
    codes: Slot
    inputs: int  # columns of x; the codes may have more, filled up, or be cut
    table: Slot | None = None
    scale: Parameter | None = None
    zero: Parameter | None = None
    offset: Parameter | None = None
    permutation: Slot | None = None


class Workspace:
    """The prepared tensors as they grow: the weight's own first, then what is derived from them.

    On the meta device what is derived gets the size that it has for the numbers a format writes, so that plans can count it.
    """

    def __init__(self, weight: Weight, nested: bool = False):
        self.nested = nested  # whether codes of scales stay codes
        self.quantized_inputs = weight.activation is not None
        self.tensors = [tensor.detach().contiguous() for tensor in weight.tensors]
        self.own = len(self.tensors)
        self.meta = any(tensor.device.type == "meta" for tensor in self.tensors)
        self.moved: dict[
            int, list[tuple[int, int]]
        ] = {}  # slot of codes -> (moved codes, place of each column) an expert
        self._position = {id(tensor): number for number, tensor in enumerate(weight.tensors)}

    def own_slot(self, tensor: Tensor, stacked: bool) -> Slot:
        stride = tensor.numel() // tensor.shape[0] * tensor.element_size() if stacked else 0
        return Slot(self._position[id(tensor)], stride)

    def add(self, tensor: Tensor, stacked: bool = False) -> Slot:
        tensor = tensor.contiguous()
        self.tensors.append(tensor)
        return Slot(len(self.tensors) - 1, tensor[0].numel() * tensor.element_size() if stacked else 0)


# --- programs ------------------------------------------------------------------------------------------------------------


def grid_program(tree: Node, space: Workspace) -> dict[str, Any]:
    """The program of a grid and what lies closely around it; Refused if there is none."""
    if len(tree.shape) == 3 and has_group_index(tree):
        raise Refused("a stack of experts with an order of columns each; a matrix of that kind is accepted")
    return {"grid": _grid_of(tree, space)}


def rounds_inputs(kind: str, grid: Any) -> bool:
    """Whether a leaf is a grid that the fast kernel multiplies in bytes."""
    return (
        kind == "grid"
        and grid.compute == 0
        and (grid.levels in (UNSIGNED, SIGNED) or (grid.levels == TABLE and grid.bits == 4))
    )


def has_group_index(tree: Node) -> bool:
    """Whether groups of columns are no runs of them."""
    match tree:
        case nodes.Grid(group_index=torch.Tensor()):
            return True
        case nodes.Permute():
            return tree.index.dim() == 2 or has_group_index(tree.child)
        case nodes.Crop() | nodes.View():
            return has_group_index(tree.child)
    return False


def _grid_of(tree: Node, space: Workspace) -> Grid:
    match tree:
        case nodes.Grid():
            return _plain(tree, space)
        case nodes.Permute(child=nodes.Grid(group_index=None) as child, index=index):
            if not space.meta and not bool(((index >= 0) & (index < child.shape[-1])).all()):
                raise ValueError(f"an order of columns that names columns outside 0 .. {child.shape[-1] - 1}")
            order = space.add(index.to(torch.int32))
            return replace(_plain(child, space), permutation=order)
        case nodes.Crop(child=nodes.Grid(group_index=None) | nodes.View() as child, rows=rows, columns=columns):
            return replace(_grid_of(child, space), rows=rows, columns=columns, inputs=columns)
        case nodes.View(child=nodes.Grid(group_index=None) as child, rows=rows, columns=columns):
            return _viewed(child, rows, columns, space)
    inside = f" of {type(tree.child).__name__}" if isinstance(getattr(tree, "child", None), Node) else ""  # type: ignore[attr-defined]
    raise Refused(f"the tree is a {type(tree).__name__}{inside}, not a grid of codes")


def _plain(node: nodes.Grid, space: Workspace) -> Grid:
    rows, columns = node.shape[-2:]
    bits, kind, codes, table = _codes(node, space)
    width = _common_width(node, columns)
    group = node.block[1] if width > 1 else columns
    grid = Grid(rows, columns, row_bytes(columns, bits), bits, kind, group, _compute(node), codes, columns, table)
    select: Callable[[Tensor], Tensor] | None = None
    if node.group_index is not None and width > 1:
        select = _in_runs(node, grid, width, space)
    elif group % 8 and group < columns:
        raise Refused(f"groups of {group} columns; only multiples of 8 are read")
    for name in ("scale", "zero", "offset"):
        part = getattr(node, name)
        if part is not None:
            _check_extent(part, name, rows, columns, node.block, width if node.group_index is not None else None)
            setattr(grid, name, _parameter(part, name, node.block[0], space, select))
    return grid


def _check_extent(part: Node, name: str, rows: int, columns: int, block: tuple[int, int], groups: int | None) -> None:
    """Native code believes what it is told: a parameter has a value for every block, or one for all."""
    high, wide = part.shape[-2:]
    down, across = -(-rows // block[0]), groups if groups is not None else -(-columns // block[1])
    if high not in (1, down) or wide not in (1, across):
        raise Refused(f"a {name} of {high} x {wide} values for {down} x {across} blocks")


def _compute(node: nodes.Grid) -> int:
    if node.compute not in COMPUTE:
        raise Refused(f"arithmetic in {node.compute}")
    return COMPUTE[node.compute]


def _common_width(node: nodes.Grid, columns: int) -> int:
    """Groups of a row: 1 if no parameter varies along it."""
    parts = [part for part in (node.scale, node.zero, node.offset) if part is not None]
    widths = {part.shape[-1] for part in parts} - {1}
    if len(widths) > 1:
        raise Refused(f"parameters of {sorted(widths)} groups a row")
    return widths.pop() if widths else 1


# --- codes -----------------------------------------------------------------------------------------------------------------


def _codes(node: nodes.Grid, space: Workspace) -> tuple[int, int, Slot, Slot | None]:
    """(bits, kind of levels, codes, table)."""
    own = node.codes
    stacked = len(node.shape) == 3
    if isinstance(own, nodes.Values):
        if own.tensor.dtype not in (torch.int8, torch.uint8) or own.levels or own.negated or own.inverted:
            raise Refused(f"codes kept as {own.tensor.dtype} values; only bytes are read")
        slot, bits, signed = space.own_slot(own.tensor, own.tensor.dim() == 3), 8, own.tensor.dtype == torch.int8
        packed = own.tensor
    elif isinstance(own, nodes.Codes):
        if own.bits > 8:
            raise Refused(f"codes of {own.bits} bits; 1 to 8 are read")
        if own.packed.shape[-1] != row_bytes(own.columns, own.bits):
            raise Refused(f"{own.packed.shape[-1]} bytes a row for {own.columns} codes of {own.bits} bits")
        slot, bits, signed, packed = space.own_slot(own.packed, own.packed.dim() == 3), own.bits, own.signed, own.packed
    else:
        raise Refused(f"codes that are a {type(own).__name__}")
    if node.levels is None:
        return bits, SIGNED if signed else UNSIGNED, slot, None
    if signed:
        raise Refused("signed codes that name entries of a table")
    if isinstance(node.levels, Tensor):
        return bits, TABLE, slot, _stored_table(node.levels, bits, stacked, space)
    if levels.BITS[node.levels] > bits:
        raise Refused(f"{bits}-bit codes of the {levels.BITS[node.levels]}-bit table {node.levels}")
    if levels.BITS[node.levels] < bits:
        raise Refused(f"{bits}-bit codes of the smaller table {node.levels}")
    if node.levels == "e5m2":
        return bits, E5M2, slot, None
    if node.levels == "e4m3" and (space.meta or not _has_nan(packed)):
        return bits, E4M3, slot, None
    return bits, TABLE, slot, space.add(levels.table(node.levels).to("meta" if space.meta else "cpu"))


def _has_nan(codes: Tensor) -> bool:
    """Whether any e4m3 byte is NaN: the quick reading of these bytes would make a number of it."""
    flat = codes.reshape(-1)
    return any(bool(((piece & 0x7F) == 0x7F).any()) for piece in flat.split(1 << 22))


def _stored_table(table: Tensor, bits: int, stacked: bool, space: Workspace) -> Slot:
    if table.shape[-1] > 1 << bits:
        raise Refused(f"a table of {table.shape[-1]} entries for {bits}-bit codes")
    if space.nested and table.dtype == torch.float32 and table.shape[-1] == 1 << bits:
        return space.own_slot(table, table.dim() == 2 and stacked)
    full = torch.nn.functional.pad(table.to(torch.float32), (0, (1 << bits) - table.shape[-1]))
    return space.add(full, table.dim() == 2 and stacked)


# --- parameters --------------------------------------------------------------------------------------------------------------


def _parameter(
    node: Node, name: str, down: int, space: Workspace, select: Callable[[Tensor], Tensor] | None
) -> Parameter:
    if select is None and (found := _nested(node, space)):
        slot, nested = found
        high, wide = node.shape[-2:]
        return Parameter(
            _NESTED, slot, down if high > 1 else _ONE_FOR_ALL, wide if high > 1 else 0, wide, nested=nested
        )
    kind, slot, shape, inverted, negated = _numbers(node, name, space, select)
    high, wide = shape[-2:]
    return Parameter(kind, slot, down if high > 1 else _ONE_FOR_ALL, wide if high > 1 else 0, wide, inverted, negated)


def _nested(node: Node, space: Workspace) -> tuple[Slot, Nested] | None:
    """Codes of a parameter and how they are read, where the kernels can; None: its numbers are worked out once."""
    if not space.nested:
        return None
    if isinstance(node, nodes.View):  # values are counted one after the other, whatever their rows
        rows, columns = node.shape[-2:]
        return _nested(node.child, space) if rows * columns <= node.child.shape[-2] * node.child.shape[-1] else None
    match node:
        case nodes.Grid(codes=nodes.Codes() as codes, zero=None, group_index=None, compute="float32"):
            high, wide = codes.shape[-2:]
            if codes.bits > 8 or (high > 1 and wide * codes.bits % 8) or codes.packed.dim() != len(node.shape):
                return None
            own, bits, signed = codes.packed, codes.bits, codes.signed
        case nodes.Grid(codes=nodes.Values() as values, zero=None, group_index=None, compute="float32"):
            if (
                values.tensor.dtype not in (torch.uint8, torch.int8)
                or values.levels
                or values.negated
                or values.inverted
            ):
                return None
            high, wide = values.tensor.shape[-2:]
            own, bits, signed = values.tensor, 8, values.tensor.dtype == torch.int8
            if own.dim() != len(node.shape):
                return None
        case _:
            return None
    scale, offset = node.scale, node.offset
    unscaled = scale is None
    if unscaled:
        scale = nodes.Values(torch.ones(1, 1, device="meta" if space.meta else own.device))
    if not isinstance(scale, nodes.Values) or scale.inverted or (kind := _stored_kind(scale)) is None:
        return None
    group = _flat_group((high, wide), node.block, (scale.shape[-2], scale.shape[-1]))
    if group is None or group % 8:
        return None
    stacked = len(node.shape) == 3
    table, levels_kind = None, SIGNED if signed else UNSIGNED
    if node.levels is not None:
        if signed or (isinstance(node.levels, str) and levels.BITS[node.levels] != bits):
            return None
        levels_kind = TABLE
        if isinstance(node.levels, Tensor):
            if node.levels.shape[-1] > 1 << bits:
                return None
            table = _stored_table(node.levels, bits, stacked, space)
        elif node.levels == "e4m3" and (space.meta or not _has_nan(own)):
            levels_kind = E4M3
        else:
            table = space.add(levels.table(node.levels).to("meta" if space.meta else "cpu"))
    scale_slot = space.add(scale.tensor) if unscaled else space.own_slot(scale.tensor, scale.tensor.dim() == 3)
    found = Nested(bits, levels_kind, group, high * wide, kind, scale_slot)
    found.scale_negated, found.table = scale.negated, table
    if offset is not None:
        plain = isinstance(offset, nodes.Values) and not (offset.inverted or offset.negated)
        if not plain or offset.shape[-2:] != (1, 1) or (offset_kind := _stored_kind(offset)) is None:  # type: ignore[arg-type]
            return None
        found.offset_kind = offset_kind
        found.offset = space.own_slot(offset.tensor, offset.tensor.dim() == 3)  # type: ignore[attr-defined]
    return space.own_slot(own, stacked), found


def _flat_group(shape: tuple[int, int], block: tuple[int, int], scales: tuple[int, int]) -> int | None:
    """Values that share a scale, counted row by row over all of them; None if they are no runs."""
    high, wide = shape
    if scales == (1, 1):
        return _ONE_FOR_ALL
    if wide == 1 and scales == (-(-high // block[0]), 1):
        return block[0]
    if high == 1 and scales == (1, -(-wide // block[1])):
        return block[1]
    if block[0] == 1 and scales == (high, 1):
        return wide
    if block[0] == 1 and wide % block[1] == 0 and scales == (high, wide // block[1]):
        return block[1]
    return None


def _numbers(
    node: Node, name: str, space: Workspace, select: Callable[[Tensor], Tensor] | None = None
) -> tuple[int, Slot, tuple[int, ...], bool, bool]:
    """(kind, slot, shape, inverted, negated) of a parameter, read as it is stored where the kernels can."""
    if isinstance(node, nodes.Values) and (name == "scale" or not node.inverted):
        tensor, kind = node.tensor, _stored_kind(node)
        if kind is not None:
            stacked = tensor.dim() == 3
            if select is not None and tensor.shape[-1] > 1 and not space.meta:
                tensor = select(tensor)
                return kind, space.add(tensor, stacked), tuple(tensor.shape), node.inverted, node.negated
            return kind, space.own_slot(tensor, stacked), tuple(tensor.shape), node.inverted, node.negated
    if isinstance(node, nodes.Values) and node.inverted and name == "scale":
        raise Refused(f"a scale to divide by, stored as {node.tensor.dtype}")
    shape = tuple(node.shape)
    kept = (
        getattr(torch, node.compute) if isinstance(node, nodes.Grid) else torch.float32
    )  # it holds what was rounded to it
    if space.meta:
        small = name == "zero" and isinstance(node, nodes.Codes) and node.bits <= 8 and not node.signed
        derived = torch.empty(shape, dtype=torch.uint8 if small else kept, device="meta")
        return (_FLOAT_PARAMETERS[derived.dtype], space.add(derived, len(shape) == 3), shape, False, False)
    numbers = node.dense().to(kept)
    if select is not None and numbers.shape[-1] > 1:
        numbers = select(numbers)
    kind = _FLOAT_PARAMETERS[kept]
    if name == "zero" and bool(((numbers >= 0) & (numbers <= 255) & (numbers == numbers.round())).all()):
        numbers, kind = numbers.to(torch.uint8), _FLOAT_PARAMETERS[torch.uint8]
    return kind, space.add(numbers, numbers.dim() == 3), tuple(numbers.shape), False, False


def _stored_kind(node: nodes.Values) -> int | None:
    if node.levels == "e8m0":
        return _E8M0 if node.tensor.element_size() == 1 else None
    return _FLOAT_PARAMETERS.get(node.tensor.dtype) if node.levels is None else None


# --- act-order: groups that are no runs of columns ------------------------------------------------------------------------------


def _in_runs(node: nodes.Grid, grid: Grid, groups: int, space: Workspace) -> Callable[[Tensor], Tensor] | None:
    """Move columns until every group is a run of a multiple of eight; returns what that does to parameters, if anything."""
    if not isinstance(node.codes, nodes.Codes):
        raise Refused("a group index over codes that are not packed")
    assert node.group_index is not None
    if space.meta:  # even groups, as every tool writes them
        assert isinstance(grid.codes, Slot)
        columns = torch.empty(node.shape[-1], dtype=torch.int32, device="meta")
        space.add(torch.empty_like(node.codes.packed))
        space.tensors[grid.codes.position] = torch.empty(0, dtype=torch.uint8, device="meta")
        grid.permutation = space.add(columns)
        space.add(columns)
        return None
    index = node.group_index.long()
    counts = torch.bincount(index, minlength=groups)
    size, last = int(counts.max()), int(index.max())
    if last >= groups:
        raise ValueError(f"a group index that names group {last} of {groups}")
    select = None
    if size % 8 == 0 and bool((counts[:last] == size).all()):
        order = torch.argsort(index, stable=True)
        place = torch.argsort(order)
        grid.group = size
    else:  # uneven groups: each is filled up to a multiple of eight, and every eight columns get parameters of their own
        padded = (counts + 7) // 8 * 8
        starts = padded.cumsum(0) - padded
        sorted_columns = torch.argsort(index, stable=True)
        rank = torch.empty_like(index)
        firsts = counts.cumsum(0) - counts
        rank[sorted_columns] = torch.arange(len(index)) - firsts[index[sorted_columns]]
        place = starts[index] + rank
        order = torch.full((int(padded.sum()),), -1)
        order[place] = torch.arange(len(index))
        owners = torch.repeat_interleave(torch.arange(groups), padded // 8)
        grid.group, grid.columns = 8, len(order)

        def select(numbers: Tensor) -> Tensor:
            return numbers.index_select(-1, owners)

    codes = replace(node.codes, signed=False).integers()
    codes = torch.nn.functional.pad(codes, (0, 1)).index_select(-1, torch.where(order < 0, codes.shape[-1], order))
    moved = space.add(nodes.Codes.of(codes, grid.bits).packed)
    back = space.add(place.to(torch.int32))
    space.moved[grid.codes.position] = [(moved.position, back.position)]
    space.tensors[grid.codes.position] = torch.empty(0, dtype=torch.uint8)
    grid.codes, grid.row_bytes = moved, row_bytes(grid.columns, grid.bits)
    grid.permutation = space.add(order.to(torch.int32))
    return select


def restored(
    structure: str, own: list[Tensor], moved: dict[int, list[tuple[int, int]]], tensors: list[Tensor]
) -> Weight:
    """The weight a program was made of."""
    if not moved:
        return Weight.build(structure, own)
    empty = Weight.build(structure, own)
    position = {id(tensor): number for number, tensor in enumerate(own)}
    found: dict[int, Tensor] = {}

    def visit(node: Any) -> None:
        if isinstance(node, nodes.Codes) and position.get(id(node.packed)) in moved:
            slot = position[id(node.packed)]
            ((codes, place),) = moved[slot]
            width = tensors[codes].shape[-1] * 8 // node.bits
            numbers = nodes.Codes(tensors[codes], node.bits, width).integers()
            found[slot] = nodes.Codes.of(numbers.index_select(-1, tensors[place].long()), node.bits).packed
        elif isinstance(node, Node):
            for value in vars(node).values():
                for part in value if isinstance(value, tuple) else (value,):
                    visit(part)

    visit(empty.tree)
    return Weight.build(structure, [found.get(number, tensor) for number, tensor in enumerate(own)])


# --- View: groups over the flattened weight ------------------------------------------------------------------------------------


def _viewed(child: nodes.Grid, rows: int, columns: int, space: Workspace) -> Grid:
    """A grid read as rows of another width: its rows must be whole blocks, or its blocks whole rows."""
    bits, kind, codes, table = _codes(child, space)
    high, width = child.shape[-2:]
    if (high > 1 and width * bits % 8) or (rows > 1 and columns * bits % 8):
        raise Refused(f"rows of {columns} {bits}-bit codes in rows of {width}: they do not start on a byte")
    if rows * columns > high * width:
        raise Refused(f"a view of {rows} x {columns} weights over {high} x {width}")
    grid = Grid(rows, columns, columns * bits // 8 if rows > 1 else row_bytes(columns, bits), bits, kind, columns,
                _compute(child), codes, columns, table)  # fmt: skip
    sizes: set[int] = set()
    for name in ("scale", "zero", "offset"):
        part = getattr(child, name)
        if part is None:
            continue
        nested = None
        if found := _nested(part, space):
            own_kind, (slot, nested), shape, inverted, negated = _NESTED, found, tuple(part.shape), False, False
        else:
            own_kind, slot, shape, inverted, negated = _numbers(part, name, space)
        if shape[-2:] == (1, 1):
            setattr(grid, name, Parameter(own_kind, slot, _ONE_FOR_ALL, 0, 1, inverted, negated, nested))
            continue
        size = _run_length(child, shape)
        if size * shape[-2] * shape[-1] < rows * columns:
            raise Refused(
                f"a {name} of {shape[-2] * shape[-1]} values for {rows * columns} weights in blocks of {size}"
            )
        sizes.add(size)
        if columns % size == 0:
            width_here = columns // size
            setattr(grid, name, Parameter(own_kind, slot, 1, width_here, width_here, inverted, negated, nested))
            grid.group = min(grid.group, size)
        elif size % columns == 0:
            setattr(grid, name, Parameter(own_kind, slot, size // columns, 1, 1, inverted, negated, nested))
        else:
            raise Refused(f"blocks of {size} weights that straddle rows of {columns}")
    if len(sizes) > 1:
        raise Refused(f"parameters for blocks of {sorted(sizes)} weights")
    if grid.group % 8 and grid.group < columns:
        raise Refused(f"groups of {grid.group} columns; only multiples of 8 are read")
    return grid


def _run_length(child: nodes.Grid, shape: tuple[int, ...]) -> int:
    """Flat weights per parameter value, values in row-major order."""
    high, width = child.shape[-2:]
    down, across = child.block
    if shape[-1] == 1 and shape[-2] == high and down == 1:
        return width
    if shape[-1] > 1 and (high == 1 or (shape[-2] == high and down == 1 and width % across == 0)):
        return across
    raise Refused("blocks that are no runs of the flattened weight")
