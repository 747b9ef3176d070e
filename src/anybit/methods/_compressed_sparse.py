"""compressed-tensors' older sparse formats, weights quantized only at run time, and layers of which only the input is quantized.

Bitmasks: `compressed` holds the stored values row by row, `bitmask` uint8 [out, in/8] a bit for each column, lowest bit first.
2:4: in every run of four columns exactly two bits are set, `compressed` is [out, in/2]; elsewhere `compressed` is a list.
Marlin 2:4: `weight_packed` int32, `meta` int16 and `scale_packed` float16, in the order one GPU kernel reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import torch
from anybit.algorithms import minifloat
from anybit.errors import CorruptFile
from anybit.methods._compressed_inputs import activation, rounded, span
from anybit.methods._compressed_layouts import (
    CompressedLayout,
    FloatLayout,
    IntegerLayout,
    Spec,
    as_dtype,
    require_range,
    require_shape,
)
from anybit.methods._compressed_schemes import Arguments
from anybit.methods._scaled_floats import check_form, require_numbers, require_scale
from anybit.weight import packing
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import Codes, Grid, Masked, Node, Values
from anybit.weight.weight import Weight, row_chunks

if TYPE_CHECKING:
    from torch import Tensor


def masked(mask: Codes, values: Node) -> Masked:
    """A mask and its values, rows counted."""
    device, rows = mask.packed.device, mask.shape[0]
    if device.type == "meta":
        return Masked(mask, values, meta("int64", rows + 1))
    offsets = torch.zeros(rows + 1, dtype=torch.int64, device=device)
    for start, stop in row_chunks(*mask.shape):
        ones = mask.integers(slice(start, stop), slice(0, mask.shape[1]))
        offsets[start + 1 : stop + 1] = ones.sum(1, dtype=torch.int64)
    return Masked(mask, values, offsets.cumsum(0))


# --- bitmasks ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BitmaskLayout(CompressedLayout):
    """Values where a bit is set, zero (the code 0) elsewhere. `count`: stored values of a list, None for 2:4.

    `element`: dtype of the values: floats of a weight that is only sparse, or the codes of int- or float-quantized.
    """

    element: str = "bfloat16"
    count: int | None = None

    @property
    def quantized(self) -> bool:
        return self.element in ("int8", "float8_e4m3fn")

    @property
    def stored(self) -> int:
        """How many values are stored."""
        return self.shape[0] * self.shape[1] // 2 if self.count is None else self.count

    def _values_spec(self) -> tuple[int, ...]:
        return (self.shape[0], self.shape[1] // 2) if self.count is None else (self.count,)

    def _shape_spec(self) -> tuple[int, ...]:
        return (2, 1) if self.count is None else (2,)

    def read_codes(self, tensors: Mapping[str, Tensor]) -> Node:
        rows, columns = self.shape
        values = self.take(tensors, "compressed", self.element, self._values_spec())
        bits = self.take(tensors, "bitmask", "uint8", (rows, packing.row_bytes(columns, 1)))
        require_shape(self, tensors, "shape", self._shape_spec())
        if columns % 8 and bool((bits[:, -1] >> (columns % 8)).any()):
            raise CorruptFile(f"tensor 'bitmask' has bits set behind column {columns - 1}")
        found = masked(Codes(bits, 1, columns), self._values(values))
        if self.count is None:
            for start, stop in row_chunks(rows, columns):
                quads = found.mask.integers(slice(start, stop), slice(0, columns)).unflatten(1, (-1, 4)).sum(-1)
                if bool((quads != 2).any()):
                    row, quad = torch.nonzero(quads != 2)[0].tolist()
                    raise CorruptFile(
                        f"tensor 'bitmask' has {int(quads[row, quad])} of 4 bits set in row {start + row}, columns {4 * quad} to "
                        f"{4 * quad + 3}; 2:4 has two everywhere"
                    )
        else:
            if int(found.row_offsets[-1]) != self.count:
                raise CorruptFile(
                    f"tensor 'bitmask' has {int(found.row_offsets[-1])} bits set, and 'compressed' holds {self.count} values"
                )
            offsets = self.take(tensors, "row_offsets", "int64", (rows,))
            if not torch.equal(offsets, found.row_offsets[:-1]):
                raise CorruptFile("tensor 'row_offsets' does not count the bits of 'bitmask'")
        if self.element == "int8":
            require_range("compressed", values, self.args.bits)
        elif self.quantized:
            require_numbers("compressed", values)
        else:
            require_scale("compressed", values)
        return found

    def _values(self, values: Tensor) -> Node:
        flat = values.reshape(1, -1)
        if self.quantized:
            return Codes(flat.view(torch.uint8), 8, flat.shape[1], signed=self.element == "int8")
        return Values(flat)

    def codes_scheme(self) -> Node:
        rows, columns = self.shape
        mask = Codes(meta("uint8", rows, packing.row_bytes(columns, 1)), 1, columns)
        return masked(mask, self._values(meta(self.element, self.stored)))

    def write_codes(self, codes: Any) -> dict[str, Tensor]:
        values = codes.values.packed if self.quantized else codes.values.tensor
        device = values.device
        found = {
            "compressed": as_dtype(values, self.element).reshape(self._values_spec()),
            "bitmask": codes.mask.packed,
            "shape": torch.tensor(self.shape, device=device).reshape(self._shape_spec()),
        }
        if self.count is not None:
            found["row_offsets"] = codes.row_offsets[:-1].clone()
        return found

    # a weight that is only sparse has no scales

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        if self.quantized:
            return super().decode(tensors)
        return self._plain(self.read_codes(tensors), self._inputs(tensors))

    def _plain(self, tree: Node, inputs: tuple[Tensor, ...]) -> Weight:
        names = tuple(name for name, _, _ in self.input_specs)
        return Weight(tree, self.dtype, activation(self.inputs, names, inputs) if self.inputs is not None else None)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        if self.quantized:
            return super().encode(weight)
        stored = self.write_codes(check_form(weight, self))
        if weight.activation is not None:
            stored.update(zip(weight.activation.names, weight.activation.tensors, strict=True))
        return stored

    def scheme(self) -> Weight:
        if self.quantized:
            return super().scheme()
        return self._plain(self.codes_scheme(), tuple(meta(dtype, *shape) for _, dtype, shape in self.input_specs))


# --- Marlin 2:4 ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Marlin24Layout(CompressedLayout):
    """marlin-24: 2:4 sparse integers of 4 or 8 bits, packed for one GPU kernel.

    Stored: weight_packed int32 [in/32, out*bits/2], meta int16 [in/32, 2*out], scale_packed float16 [groups, out].
    """

    scale_dtype: str = "float16"

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        rows, columns = self.shape
        words = self.take(tensors, "weight_packed", "int32", (columns // 32, rows * self.args.bits // 2))
        places = self.take(tensors, "meta", "int16", (columns // 32, 2 * rows))
        scale = self.take(tensors, "scale_packed", "float16", self.scale_grid[::-1])
        require_scale("scale_packed", scale)
        codes = masked(self._mask(places), self._values(words))
        scales = torch.empty_like(scale)
        order = self._scale_order(scale.device)
        scales.view(-1, len(order))[:, order] = scale.view(-1, len(order))
        return self._weight(codes, Values(scales.T.contiguous()), None, None, self._inputs(tensors))

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        grid: Any = check_form(weight, self)
        scales = grid.scale.tensor.T.contiguous()
        order = self._scale_order(scales.device)
        stored = {
            "weight_packed": self._words(grid.codes.values),
            "meta": self._places(grid.codes.mask),
            "scale_packed": scales.view(-1, len(order))[:, order].reshape(self.scale_grid[::-1]),
        }
        if weight.activation is not None:
            stored.update(zip(weight.activation.names, weight.activation.tensors, strict=True))
        return stored

    def codes_scheme(self) -> Node:
        rows, columns = self.shape
        mask = Codes(meta("uint8", rows, packing.row_bytes(columns, 1)), 1, columns)
        kept = rows * columns // 2
        values = Codes(meta("uint8", 1, packing.row_bytes(kept, self.args.bits)), self.args.bits, kept, signed=True)
        return masked(mask, values)

    # values: [in/2, out] in tiles of 16 x 16, tiles of a row of tiles side by side, runs of 1024 reordered

    def _values(self, words: Tensor) -> Codes:
        rows, columns = self.shape
        bits = self.args.bits
        fields = packing.unpack(packing.words_to_rows(words), bits, 16 * rows)
        order = weight_order(bits, words.device)
        tiles = torch.empty_like(fields)
        tiles.view(-1, 1024)[:, order] = fields.view(-1, 1024)
        values = tiles.view(columns // 32, rows // 16, 16, 16).transpose(1, 2).reshape(columns // 2, rows).T
        flipped = values.reshape(1, -1) ^ (1 << (bits - 1))  # stored is the code plus 2**(bits - 1)
        return Codes.of(flipped, bits, signed=True)

    def _words(self, values: Codes) -> Tensor:
        rows, columns = self.shape
        bits = self.args.bits
        fields = replace(values, signed=False).integers().reshape(rows, columns // 2) ^ (1 << (bits - 1))
        tiles = fields.T.reshape(columns // 32, 16, rows // 16, 16).transpose(1, 2).reshape(-1, 1024)
        stream = packing.pack(tiles[:, weight_order(bits, fields.device)].reshape(columns // 32, 16 * rows), bits)
        return packing.rows_to_words(stream, torch.int32)

    # places: two bits for each value, its column among four; eight of them in an int16

    def _mask(self, places: Tensor) -> Codes:
        rows, columns = self.shape
        words = places.reshape(-1)[meta_order(rows, columns // 16, places.device)].to(torch.int32) & 0xFFFF
        shifts = torch.arange(0, 16, 2, device=places.device, dtype=torch.int32)
        pairs = ((words.view(rows, -1, 1) >> shifts) & 3).view(rows, -1, 2)
        if bool((pairs[..., 0] >= pairs[..., 1]).any()):
            row, quad = torch.nonzero(pairs[..., 0] >= pairs[..., 1])[0].tolist()
            raise CorruptFile(
                f"tensor 'meta' places the two values of row {row}, columns {4 * quad} to {4 * quad + 3} at "
                f"{pairs[row, quad].tolist()}; they must ascend"
            )
        mask = torch.zeros(rows, columns // 4, 4, dtype=torch.uint8, device=places.device)
        mask.scatter_(2, pairs.long(), 1)
        return Codes.of(mask.view(rows, columns), 1)

    def _places(self, mask: Codes) -> Tensor:
        rows, columns = self.shape
        bits = mask.integers().view(rows, columns // 4, 4)
        # stable: the columns of the two ones in order, then the others
        pairs = torch.argsort(bits, dim=-1, descending=True, stable=True)[..., :2].reshape(rows, columns // 16, 8)
        shifts = torch.arange(0, 16, 2, device=bits.device)
        words = (pairs.to(torch.int32) << shifts).sum(-1).to(torch.int16)
        found = torch.empty(columns // 32 * 2 * rows, dtype=torch.int16, device=bits.device)
        found[meta_order(rows, columns // 16, bits.device)] = words.reshape(-1)
        return found.view(columns // 32, 2 * rows)

    def _scale_order(self, device: torch.device) -> Tensor:
        """Order of runs of columns of scale_packed; the writer compared the group with the length of a compressed row."""
        kept = self.shape[1] // 2
        if self.args.group_size and self.args.group_size < kept:
            return torch.tensor([8 * run + one for run in range(8) for one in (0, 4, 1, 5, 2, 6, 3, 7)], device=device)
        return torch.arange(self.shape[0], device=device)


def weight_order(bits: int, device: torch.device | str = "cpu") -> Tensor:
    """Where element i of a run of 1024 comes from."""
    return _weight_order(bits).to(device)


@functools.lru_cache(maxsize=4)
def _weight_order(bits: int) -> Tensor:
    found = []
    for lane in range(32):
        column, first = lane // 4, lane % 4
        rows = (2 * first, 2 * first + 1, 2 * (first + 4), 2 * (first + 4) + 1)
        own = [16 * row + 256 * (column // 2) + 8 * (column % 2) + 4 * block for block in (0, 1) for row in rows]
        found += [place + step for step in range(4) for place in own]
    inside = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    return torch.tensor(found).view(-1, len(inside))[:, inside].reshape(-1)


def meta_order(rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """Where entry (row, column) of the table of places lies in the stored tensor, as CUTLASS orders it; row-major."""
    row = torch.arange(rows, device=device)[:, None].expand(rows, columns)
    column = torch.arange(columns, device=device)[None].expand(rows, columns)
    moved = row // 64 * 64 + (row % 2) * 2 + (row % 8) // 4 + ((row % 32) % 4) // 2 * 32 + ((row % 64) // 8) * 4
    up = ((moved % 2 == 0) & (column % 2 == 1)).to(torch.int64)
    down = ((moved % 2 == 1) & (column % 2 == 0)).to(torch.int64)
    moved, column = moved + up - down, column - up + down
    return (column // 2 * 2 * rows + moved * 2 + column % 2).reshape(-1)


# --- floats on disk ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DenseLayout(Layout):
    """A dense weight whose input is quantized. Stored: weight, and the input's static scales."""

    weight_dtype: str = "bfloat16"
    inputs: Arguments = Arguments()  # noqa: RUF009 frozen, so that sharing one is safe
    input_specs: tuple[Spec, ...] = ()

    def _weight(self, weight: Tensor, inputs: tuple[Tensor, ...]) -> Weight:
        names = tuple(name for name, _, _ in self.input_specs)
        return Weight(Values(weight), self.dtype, activation(self.inputs, names, inputs))

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        weight = self.take(tensors, "weight", self.weight_dtype, self.shape)
        require_scale("weight", weight)
        return self._weight(weight, tuple(self.take(tensors, *spec) for spec in self.input_specs))

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        tree: Any = check_form(weight, self)
        assert weight.activation is not None
        return {"weight": tree.tensor, **dict(zip(weight.activation.names, weight.activation.tensors, strict=True))}

    def scheme(self) -> Weight:
        inputs = tuple(meta(dtype, *shape) for _, dtype, shape in self.input_specs)
        return self._weight(meta(self.weight_dtype, *self.shape), inputs)


@dataclass(frozen=True)
class FakeQuantizedLayout(Layout):
    """A weight that was not compressed yet: floats, which the peer rounds to their codes whenever they are used.

    `inner` stores the codes; its scales are stored already. The floats are kept to be written again.
    """

    inner: IntegerLayout | FloatLayout = IntegerLayout((0, 0))  # noqa: RUF009 frozen
    weight_dtype: str = "bfloat16"

    algorithm: ClassVar[str | None] = None

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        dense = self.take(tensors, "weight", self.weight_dtype, self.shape)
        require_scale("weight", dense)
        empty: Any = self.inner.codes_scheme()
        weight = self.inner.with_codes(empty, tensors)
        tree: Any = weight.tree
        codes = replace(empty, packed=self._codes(dense, tree))
        return replace(weight, tree=replace(tree, codes=codes), extras={"weight": dense})

    def _codes(self, dense: Tensor, grid: Grid) -> Tensor:
        """Packed codes of floats under the stored scales, divided as they are: in the dtype of the weight."""
        rows, columns = self.shape
        one = replace(
            grid, codes=Values(torch.ones(1, 1, device=dense.device).expand(rows, columns)), levels=None, zero=None
        )
        packed = []
        for start, stop in row_chunks(rows, columns):
            own, all_columns = slice(start, stop), slice(0, columns)
            numbers = dense[own]
            numbers = numbers / one.region(own, all_columns).to(torch.float32 if self.inner.common else numbers.dtype)
            if grid.zero is not None:
                shifts = replace(one, scale=grid.zero).region(own, all_columns)
                numbers = numbers + shifts.to(numbers.dtype)
            if self.inner.levels is None:
                codes = rounded(numbers, self.inner.args).to(torch.int32)
            else:
                codes = minifloat.codes(numbers.clamp(*span(self.inner.args)), self.inner.levels)
            packed.append(packing.pack(codes, self.inner.args.bits))
        return torch.cat(packed)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        check_form(weight, self)
        stored = self.inner.encode(replace(weight, extras={}))
        for name in ("weight_packed", "weight_shape"):
            stored.pop(name, None)
        kept = weight.extras.get("weight")
        tree: Any = weight.tree
        if kept is None or (kept.device.type != "meta" and not torch.equal(self._codes(kept, tree), tree.codes.packed)):
            kept = weight.to_dense(self.weight_dtype)
        return {**stored, "weight": kept}

    def scheme(self) -> Weight:
        return replace(self.inner.scheme(), extras={"weight": meta(self.weight_dtype, *self.shape)})
