"""The weight tree. Every node is a matrix [rows, columns] or a stack [experts, rows, columns]; leaves hold stored tensors.

    Values      a stored tensor and how to read it            Columns, Rows, Stack   parts joined along one axis
    Codes       bit-packed integers (packing.py)              Permute, Transpose     input columns reordered; axes swapped
    Grid        ((levels[code] - zero) * scale + offset)      Scaled                 child * scale + offset per row/column
    Codebook    sum of K vector tables, signs, scale          Rotate                 Hadamard blocks on the input or output
    Sparse      CSR            Masked  bitmask / 2:4          View, Crop             other shape; padding cut off
    Sum         parts added       Divided  child / constant   Opaque                 anything else, by a registered decoder

A node evaluates any region of itself in float32 (`region`), so nothing ever needs the whole dense weight. A scale, zero or
offset is itself a node: nested scales are recursion. In a stack, a leaf without the leading axis is shared by all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import torch
from anybit.weight import levels as tables
from anybit.weight import packing, points

if TYPE_CHECKING:
    from torch import Tensor

NODES: dict[str, type[Node]] = {}


@dataclass(frozen=True, eq=False)
class Node:
    """A matrix that knows its shape and evaluates regions of itself."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        NODES[cls.__name__] = cls

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns), or (experts, rows, columns)."""
        raise NotImplementedError(type(self).__name__)

    def region(self, rows: slice, columns: slice) -> Tensor:
        """float32 values of rows x columns of a matrix (not a stack); slices have explicit bounds and step 1."""
        raise NotImplementedError(type(self).__name__)

    def select(self, expert: int) -> Node:
        """The matrix of one expert of a stack."""
        return replace(self, **{name: value.select(expert) for name, value in children(self)})

    def take_rows(self, index: Tensor) -> Tensor:
        """float32 values [len(index), columns] of the rows named by `index`."""
        width = self.shape[-1]
        found = [self.region(slice(row, row + 1), slice(0, width)) for row in index.tolist()]
        return torch.cat(found) if found else torch.empty(0, width, device=index.device)

    def dense(self) -> Tensor:
        """All values, float32, in this node's shape."""
        if len(self.shape) == 3:
            return torch.stack([self.select(expert).dense() for expert in range(self.shape[0])])
        return self.region(slice(0, self.shape[0]), slice(0, self.shape[1]))


def children(node: Node) -> list[tuple[str, Node]]:
    """Named direct children; those in tuples are not included (their owners override what needs them)."""
    return [(name, value) for name in field_names(type(node)) if isinstance(value := getattr(node, name), Node)]


_FIELD_NAMES: dict[Any, tuple[str, ...]] = {}


def field_names(kind: Any) -> tuple[str, ...]:
    """Names of the fields of a dataclass, in order. Trees are walked thousands of times while a model is loaded."""
    found = _FIELD_NAMES.get(kind)
    if found is None:
        found = _FIELD_NAMES[kind] = tuple(field.name for field in fields(kind))
    return found


def map_tensors(node: Node, change: Callable[[Tensor], Tensor]) -> Node:
    """The same tree with every tensor replaced by `change(tensor)`."""

    result: Node = _visit(node, change)
    return result


def _visit(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    # not a closure: one that calls itself is a cycle, and keeps the tensors it has seen until the garbage collector comes
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Node):
        kind = type(value)
        return kind(**{name: _visit(getattr(value, name), change) for name in field_names(kind)})
    return tuple(_visit(item, change) for item in value) if isinstance(value, tuple) else value


def map_nodes(node: Node, change: Callable[[Node], Node | None]) -> Node:
    """The same tree with every node for which `change` gives one replaced by it; others are searched further down."""
    found = change(node)
    if found is not None:
        return found
    below: dict[str, Any] = {}
    for field in fields(node):
        value = getattr(node, field.name)
        if isinstance(value, Node):
            below[field.name] = map_nodes(value, change)
        elif isinstance(value, tuple) and value and isinstance(value[0], Node):
            below[field.name] = tuple(map_nodes(part, change) for part in value)
    return replace(node, **below)


def _device(node: Node) -> torch.device:
    return tensors_of(node)[0].device


def tensors_of(node: Node) -> list[Tensor]:
    """Every tensor of the tree, in field order."""
    found: list[Tensor] = []
    _collect(node, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, Node):
        for name in field_names(type(value)):
            _collect(getattr(value, name), found)
    elif isinstance(value, tuple):
        for part in value:
            _collect(part, found)


# --- leaves -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Values(Node):
    """Stored numbers. `inverted`: the number that was meant is 1 / stored; a product with it divides. `negated`: -stored.

    `levels` reads the tensor's bytes through a named table (E8M0 or FP8 scales kept as uint8).
    """

    tensor: Tensor
    inverted: bool = False
    negated: bool = False
    levels: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def select(self, expert: int) -> Node:
        return replace(self, tensor=self.tensor[expert]) if self.tensor.dim() == 3 else self

    def read(self, tensor: Tensor) -> Tensor:
        """float32 of a piece of the tensor, before inversion."""
        if self.levels is not None:
            numbers = tables.look_up(self.levels, tensor.contiguous().view(torch.uint8))
        else:
            numbers = tensor.to(torch.float32)
        return -numbers if self.negated else numbers

    def region(self, rows: slice, columns: slice) -> Tensor:
        numbers = self.read(self.tensor[rows, columns])
        return 1 / numbers if self.inverted else numbers

    def take_rows(self, index: Tensor) -> Tensor:
        numbers = self.read(self.tensor.index_select(0, index))
        return 1 / numbers if self.inverted else numbers


@dataclass(frozen=True, eq=False)
class Codes(Node):
    """Bit-packed integers: uint8 [..., rows, ceil(columns * bits / 8)], one little-endian stream per row (packing.py)."""

    packed: Tensor
    bits: int
    columns: int
    signed: bool = False

    @classmethod
    def of(cls, codes: Tensor, bits: int, signed: bool = False) -> Codes:
        """Pack integer codes [..., rows, columns]; two's complement if `signed`."""
        return cls(packing.pack(codes, bits), bits, codes.shape[-1], signed)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.packed.shape[:-1], self.columns)

    def select(self, expert: int) -> Node:
        return replace(self, packed=self.packed[expert]) if self.packed.dim() == 3 else self

    def _signed(self, codes: Tensor) -> Tensor:
        if not self.signed:
            return codes
        if self.bits == 8:
            return codes.contiguous().view(torch.int8)
        top = 1 << (self.bits - 1)
        return (codes.to(torch.int32) ^ top) - top

    def integers(self, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """Codes as integers; all of them, leading experts axis included, if no region is given."""
        packed = self.packed if rows is None else self.packed[..., rows, :]
        start, stop = (columns.start, columns.stop) if columns is not None else (0, self.columns)
        return self._signed(packing.unpack(packed, self.bits, stop - start, start))

    def region(self, rows: slice, columns: slice) -> Tensor:
        return self.integers(rows, columns).to(torch.float32)

    def take_rows(self, index: Tensor) -> Tensor:
        return self.row_integers(index).to(torch.float32)

    def row_integers(self, index: Tensor) -> Tensor:
        return self._signed(packing.unpack(self.packed.index_select(0, index), self.bits, self.columns))


# --- parameters of a body: a small node whose values are shared by blocks of the weight ----------------------------------


def _spread(values: Tensor, axis: int, block: int, first: int, count: int) -> Tensor:
    """Repeat each value `block` times along `axis` and cut out `count` elements from position `first`."""
    if values.shape[axis] == 1:
        return values
    if block > 1:
        values = values.repeat_interleave(block, dim=axis)
    return values.narrow(axis, first, count) if values.shape[axis] != count else values


def _parameter(node: Node, rows: slice, columns: slice, block: tuple[int, int], group_index: Tensor | None) -> Tensor:
    """float32 parameter values, broadcastable to the region; inverted values come back as the stored divisor."""
    height, width = node.shape
    down, across = block
    own_rows = slice(0, 1) if height == 1 else slice(rows.start // down, -(-rows.stop // down))
    if group_index is not None and width > 1:
        own_columns = slice(0, width)
    else:
        own_columns = slice(0, 1) if width == 1 else slice(columns.start // across, -(-columns.stop // across))
    if isinstance(node, Values):
        values = node.read(node.tensor[own_rows, own_columns])
    else:
        values = node.region(own_rows, own_columns)
    values = _spread(values, 0, down, rows.start % down, rows.stop - rows.start)
    if group_index is not None and width > 1:
        return values.index_select(1, group_index[columns].long())
    return _spread(values, 1, across, columns.start % across, columns.stop - columns.start)


def _addend(node: Node, numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """A zero or an offset: unlike a factor, an inverted one cannot be used as it is stored."""
    return (1 / numbers if isinstance(node, Values) and node.inverted else numbers).to(dtype)


def _multiply(numbers: Tensor, factor: Tensor, node: Node) -> Tensor:
    return numbers / factor if isinstance(node, Values) and node.inverted else numbers * factor


@dataclass(frozen=True, eq=False)
class Grid(Node):
    """((levels[code] - zero) * scale + offset), parameters shared by blocks of (rows, columns).

    A parameter has ceil(rows / block[0]) x ceil(columns / block[1]) values, or 1 along an axis it does not vary over; the
    last block of an axis may be short. `levels`: None for integers, the name of a table (levels.py) or a stored table.
    `group_index` int32 [columns] names the group of each column where groups are not runs of block[1].
    `compute`: dtype in which the format does its arithmetic, each operation rounded.
    """

    codes: Node
    scale: Node | None = None
    zero: Node | None = None
    offset: Node | None = None
    levels: str | Tensor | None = None
    block: tuple[int, int] = (1, 1)
    group_index: Tensor | None = None
    compute: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def select(self, expert: int) -> Node:
        chosen: Grid = super().select(expert)  # type: ignore[assignment]
        if isinstance(self.levels, torch.Tensor) and self.levels.dim() == 2:
            chosen = replace(chosen, levels=self.levels[expert])
        if self.group_index is not None and self.group_index.dim() == 2:
            chosen = replace(chosen, group_index=self.group_index[expert])
        return chosen

    def _values(
        self, codes: Tensor, rows: slice, columns: slice, parameter: Callable[..., Tensor] = _parameter
    ) -> Tensor:
        dtype = getattr(torch, self.compute)
        numbers = (codes if self.levels is None else tables.look_up(self.levels, codes)).to(dtype)
        place = (rows, columns, self.block, self.group_index)
        if self.zero is not None:
            numbers = numbers - _addend(self.zero, parameter(self.zero, *place), dtype)
        if self.scale is not None:
            numbers = _multiply(numbers, parameter(self.scale, *place).to(dtype), self.scale)
        if self.offset is not None:
            numbers = numbers + _addend(self.offset, parameter(self.offset, *place), dtype)
        return numbers.to(torch.float32)

    def _codes(self, rows: slice, columns: slice) -> Tensor:
        if isinstance(self.codes, Codes):
            return self.codes.integers(rows, columns)
        return self.codes.region(rows, columns).to(torch.int32)

    def region(self, rows: slice, columns: slice) -> Tensor:
        return self._values(self._codes(rows, columns), rows, columns)

    def take_rows(self, index: Tensor) -> Tensor:
        if not isinstance(self.codes, Codes):
            return super().take_rows(index)

        def parameter(node: Node, rows: slice, columns: slice, block: tuple[int, int], groups: Tensor | None) -> Tensor:
            if node.shape[0] == 1:
                return _parameter(node, slice(0, 1), columns, block, groups)
            picked = node.take_rows(index // block[0])
            if isinstance(node, Values) and node.inverted:
                picked = node.read(node.tensor.index_select(0, index // block[0]))
            if groups is not None and picked.shape[1] > 1:
                return picked.index_select(1, groups.long())
            return _spread(picked, 1, block[1], 0, columns.stop)

        everything = slice(0, self.shape[-1])
        return self._values(self.codes.row_integers(index), slice(0, len(index)), everything, parameter)


@dataclass(frozen=True, eq=False)
class Codebook(Node):
    """sum_k tables[k][code_k] * sign * scale, where one code names a tile of `vector` (rows, columns) weights.

    `codes` [rows / vector[0], columns / vector[1] * K], the K codes of a tile side by side. `tables` [K, entries, *vector],
    stored or the name of a fixed one (points.py). `signs`: one bit per weight, 1 = negative. `scale` per `block`, as in `Grid`.
    """

    codes: Node
    tables: Any  # Tensor | str
    vector: tuple[int, int]
    scale: Node | None = None
    signs: Node | None = None
    block: tuple[int, int] = (1, 1)
    compute: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, columns = self.codes.shape
        return (*lead, rows * self.vector[0], columns // self.count * self.vector[1])

    @property
    def count(self) -> int:
        """K, the number of tables."""
        return 1 if isinstance(self.tables, str) else self.tables.shape[-4]

    def books(self) -> Tensor:
        """The tables themselves."""
        return points.table(self.tables, str(_device(self.codes))) if isinstance(self.tables, str) else self.tables

    def select(self, expert: int) -> Node:
        chosen: Codebook = super().select(expert)  # type: ignore[assignment]
        stacked = not isinstance(self.tables, str) and self.tables.dim() == 5
        return replace(chosen, tables=self.tables[expert]) if stacked else chosen

    def region(self, rows: slice, columns: slice) -> Tensor:
        dtype = getattr(torch, self.compute)
        high, wide = self.vector
        tables, books = self.books(), self.count
        first_row, first_column = rows.start // high, columns.start // wide
        own_rows = slice(first_row, -(-rows.stop // high))
        own_columns = slice(first_column * books, -(-columns.stop // wide) * books)
        source = self.codes
        codes = (
            source.integers(own_rows, own_columns)
            if isinstance(source, Codes)
            else source.region(own_rows, own_columns)
        )
        codes = codes.to(torch.int64).view(codes.shape[0], -1, books)
        total = tables[0].to(dtype)[codes[..., 0]]
        for book in range(1, books):
            total = total + tables[book].to(dtype)[codes[..., book]]
        tiles_down, tiles_across = total.shape[:2]
        numbers = total.permute(0, 2, 1, 3).reshape(tiles_down * high, tiles_across * wide)
        numbers = numbers[rows.start - first_row * high :, columns.start - first_column * wide :]
        numbers = numbers[: rows.stop - rows.start, : columns.stop - columns.start]
        if self.signs is not None:
            numbers = torch.where(self.signs.region(rows, columns) > 0, -numbers, numbers)
        if self.scale is not None:
            numbers = _multiply(numbers, _parameter(self.scale, rows, columns, self.block, None).to(dtype), self.scale)
        return numbers.to(torch.float32)


@dataclass(frozen=True, eq=False)
class Sparse(Node):
    """CSR: `values` [1, stored] at `columns` int32 [stored], row r owning row_offsets[r] .. row_offsets[r + 1]."""

    row_offsets: Tensor
    columns: Tensor
    values: Node
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.row_offsets.shape[:-1], self.row_offsets.shape[-1] - 1, self.width)

    def region(self, rows: slice, columns: slice) -> Tensor:
        offsets = self.row_offsets[rows.start : rows.stop + 1].long()
        first, last = int(offsets[0]), int(offsets[-1])
        full = torch.zeros(rows.stop - rows.start, self.width, device=self.columns.device)
        row_of = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff())
        numbers = self.values.region(slice(0, 1), slice(first, last))[0]
        full.index_put_((row_of, self.columns[first:last].long()), numbers, accumulate=True)
        return full[:, columns]


@dataclass(frozen=True, eq=False)
class Masked(Node):
    """Bit mask [rows, columns]: 1 = the next of `values` [1, ones], taken in row-major order; 0 = zero. Also 2:4.

    `row_offsets` int64 [rows + 1]: ones before each row (counted once, when the layout is read).
    """

    mask: Codes
    values: Node
    row_offsets: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.mask.shape

    def region(self, rows: slice, columns: slice) -> Tensor:
        mask = self.mask.integers(rows, slice(0, self.shape[1])).bool()
        first, last = int(self.row_offsets[rows.start]), int(self.row_offsets[rows.stop])
        full = torch.zeros(mask.shape, device=mask.device)
        full[mask] = self.values.region(slice(0, 1), slice(first, last))[0]
        return full[:, columns]


# --- combinators ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Parts(Node):
    parts: tuple[Node, ...]
    axis: ClassVar[int]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    def select(self, expert: int) -> Node:
        return replace(self, parts=tuple(part.select(expert) for part in self.parts))

    def region(self, rows: slice, columns: slice) -> Tensor:
        wanted, found, start = (rows if self.axis == -2 else columns), [], 0
        for part in self.parts:
            stop = start + part.shape[self.axis]
            if start < wanted.stop and stop > wanted.start:
                own = slice(max(wanted.start - start, 0), min(wanted.stop, stop) - start)
                found.append(part.region(own, columns) if self.axis == -2 else part.region(rows, own))
            start = stop
        return torch.cat(found, dim=self.axis)


class Columns(_Parts):
    """Parts side by side along the input axis."""

    axis = -1


class Rows(_Parts):
    """Parts one above the other along the output axis (fused gate and up, fused query, key and value)."""

    axis = -2


@dataclass(frozen=True, eq=False)
class Stack(Node):
    """One matrix per expert, each with a tree of its own."""

    parts: tuple[Node, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    def select(self, expert: int) -> Node:
        return self.parts[expert]


@dataclass(frozen=True, eq=False)
class Sum(Node):
    """Parts added, in order; `compute` is the dtype of the sum."""

    parts: tuple[Node, ...]
    compute: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    def select(self, expert: int) -> Node:
        return replace(self, parts=tuple(part.select(expert) for part in self.parts))

    def region(self, rows: slice, columns: slice) -> Tensor:
        total = self.parts[0].region(rows, columns)
        for part in self.parts[1:]:
            total = total + part.region(rows, columns)
        return total.to(getattr(torch, self.compute)).to(torch.float32)


@dataclass(frozen=True, eq=False)
class Permute(Node):
    """Column j of `child` is input channel index[j]: value[:, index[j]] = child[:, j]. `index` int32 [columns]."""

    child: Node
    index: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.child.shape

    def select(self, expert: int) -> Node:
        return Permute(self.child.select(expert), self.index[expert] if self.index.dim() == 2 else self.index)

    def region(self, rows: slice, columns: slice) -> Tensor:
        stored = self.child.region(rows, slice(0, self.shape[1]))
        full = torch.empty_like(stored)
        full[:, self.index.long()] = stored
        return full[:, columns]

    def take_rows(self, index: Tensor) -> Tensor:
        return self.child.take_rows(index)[:, torch.argsort(self.index)]


@dataclass(frozen=True, eq=False)
class Transpose(Node):
    """Rows and columns of `child` swapped, for formats whose groups run along the output axis."""

    child: Node

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, columns = self.child.shape
        return (*lead, columns, rows)

    def region(self, rows: slice, columns: slice) -> Tensor:
        return self.child.region(columns, rows).T


@dataclass(frozen=True, eq=False)
class Scaled(Node):
    """child * scale + offset; scale and offset are [rows or 1, columns or 1]."""

    child: Node
    scale: Node | None = None
    offset: Node | None = None
    compute: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.child.shape

    def region(self, rows: slice, columns: slice) -> Tensor:
        dtype = getattr(torch, self.compute)
        numbers = self.child.region(rows, columns).to(dtype)
        if self.scale is not None:
            numbers = _multiply(numbers, _parameter(self.scale, rows, columns, (1, 1), None).to(dtype), self.scale)
        if self.offset is not None:
            numbers = numbers + _addend(self.offset, _parameter(self.offset, rows, columns, (1, 1), None), dtype)
        return numbers.to(torch.float32)


@dataclass(frozen=True, eq=False)
class Divided(Node):
    """child / divisor. The divisor is a constant of the format, which no file stores."""

    child: Node
    divisor: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.child.shape

    def _over(self, numbers: Tensor) -> Tensor:
        # a tensor: by a plain number, a GPU would multiply with the reciprocal
        return numbers / torch.full((), self.divisor, device=numbers.device)

    def region(self, rows: slice, columns: slice) -> Tensor:
        return self._over(self.child.region(rows, columns))

    def take_rows(self, index: Tensor) -> Tensor:
        return self._over(self.child.take_rows(index))


@dataclass(frozen=True, eq=False)
class Rotate(Node):
    """child with every run of `size` columns (side "input") or rows ("output") multiplied by an orthogonal matrix.

    The matrix is the normalised Sylvester-Hadamard matrix H[i, j] = (-1)**popcount(i & j) / sqrt(size), or `matrix`
    [size, size] if stored. side "input": W = child @ M per block; side "output": W = M @ child per block.
    """

    child: Node
    size: int
    side: str = "input"
    matrix: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.child.shape

    def select(self, expert: int) -> Node:
        chosen: Rotate = super().select(expert)  # type: ignore[assignment]
        return (
            replace(chosen, matrix=self.matrix[expert])
            if self.matrix is not None and self.matrix.dim() == 3
            else chosen
        )

    def factor(self, device: torch.device) -> Tensor:
        """float32 [size, size]."""
        return self.matrix.to(torch.float32) if self.matrix is not None else hadamard(self.size, device)

    def region(self, rows: slice, columns: slice) -> Tensor:
        size = self.size
        if self.side == "input":
            first = columns.start // size * size
            stored = self.child.region(rows, slice(first, -(-columns.stop // size) * size))
            turned = (stored.view(stored.shape[0], -1, size) @ self.factor(stored.device)).view(stored.shape)
            return turned[:, columns.start - first : columns.stop - first]
        first = rows.start // size * size
        stored = self.child.region(slice(first, -(-rows.stop // size) * size), columns)
        turned = (self.factor(stored.device) @ stored.view(-1, size, stored.shape[1])).reshape(stored.shape)
        return turned[rows.start - first : rows.stop - first]


def hadamard(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Normalised Sylvester-Hadamard matrix, float32 [size, size]; size is a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / size**0.5


@dataclass(frozen=True, eq=False)
class View(Node):
    """`child` read row-major as another shape: the groups of some formats run over the flattened weight."""

    child: Node
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.child.shape[:-2], self.rows, self.columns)

    def _flat(self, start: int, stop: int) -> Tensor:
        """Flat elements start .. stop of the child."""
        width = self.child.shape[1]
        top, bottom = start // width, -(-stop // width)
        if bottom - top == 1:
            return self.child.region(slice(top, bottom), slice(start - top * width, stop - top * width))[0]
        block = self.child.region(slice(top, bottom), slice(0, width)).reshape(-1)
        return block[start - top * width : stop - top * width]

    def region(self, rows: slice, columns: slice) -> Tensor:
        block = self._flat(rows.start * self.columns, rows.stop * self.columns)
        return block.view(rows.stop - rows.start, self.columns)[:, columns]


@dataclass(frozen=True, eq=False)
class Crop(Node):
    """The first rows x columns of a padded child."""

    child: Node
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.child.shape[:-2], self.rows, self.columns)

    def region(self, rows: slice, columns: slice) -> Tensor:
        return self.child.region(rows, columns)

    def take_rows(self, index: Tensor) -> Tensor:
        return self.child.take_rows(index)[:, : self.columns]


OPAQUE_DECODERS: dict[str, Callable[[Mapping[str, Tensor], slice, slice], Tensor]] = {}


@dataclass(frozen=True, eq=False)
class Opaque(Node):
    """Tensors that only the decoder registered as OPAQUE_DECODERS[kind] can read. The last resort: nothing converts it."""

    kind: str
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.columns)

    def region(self, rows: slice, columns: slice) -> Tensor:
        return OPAQUE_DECODERS[self.kind](dict(zip(self.names, self.tensors, strict=True)), rows, columns)
