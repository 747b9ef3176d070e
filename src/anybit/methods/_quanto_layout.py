"""How quanto stores one weight: rows of 8-bit codes, or groups of 4 or 2 bits; and what it does to inputs and outputs.

    8 bits       weight._data int8 or float8 [out, in], weight._scale [out, 1]                    scale * code
    4, 2 bits    weight._data._data uint8, weight._scale and weight._shift [groups, 1]            scale * code - shift
                                                          shift of integers (a zero point):       scale * (code - shift)

Codes of M [groups, group] are packed along its rows, in equal blocks, the first in the lowest bits. For 4 bits and `step` bytes:

    byte[r]:  hhhhllll      l = M[r]   h = M[step + r]

The group size is not stored; it follows from the number of inputs (`group_size`). Each module also has input_scale and
output_scale, 1 where inputs and outputs are not quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.errors import CorruptFile, NotRepresentable
from anybit.methods._words import packed_codes, require_finite, unpacked_codes
from anybit.quantizers.attachments import Attachment
from anybit.weight import levels, packing
from anybit.weight.activation import Activation, Product, activation_rule
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import Codes, Grid, Node, Rows, Values
from anybit.weight.weight import Weight, row_chunks

if TYPE_CHECKING:
    from torch import Tensor

SCALES = ("input_scale", "output_scale")
LEVELS = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2", "float8_e4m3fnuz": "e4m3fnuz"}


def group_size(columns: int) -> int | None:
    """quanto's choice for 4 and 2 bits; None for one group in each row."""
    if columns <= 128:
        return None
    size = 128
    while columns % size and size > 32:
        size -= 32
    return size if columns % size == 0 else None


@dataclass(frozen=True)
class QuantoLayout(Layout):
    """`scale_dtype`: of all numbers; `activations`: dtype of quantized inputs and outputs, None for plain ones."""

    scale_dtype: str = "float32"
    activations: str | None = None
    io_dtype: str = "float32"

    algorithm = "quanto"

    @property
    def qtype(self) -> str:
        """quanto's word for the codes."""
        raise NotImplementedError

    def weight(self, tree: Node, found: Mapping[str, Tensor]) -> Weight:
        scales = {name: found[name] for name in SCALES}
        if self.activations is None:
            return Weight(tree, self.dtype, extras=scales)
        kind = LEVELS.get(self.activations, self.activations)
        return Weight(
            tree, self.dtype,
            Activation("quanto_static", kind, "tensor", names=SCALES, tensors=tuple(scales.values())),
        )  # fmt: skip

    def scheme(self) -> Weight:
        return self.weight(self.tree_scheme(), {name: meta(self.io_dtype) for name in SCALES})

    def tree_scheme(self) -> Grid:
        raise NotImplementedError

    def io_specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return dict.fromkeys(SCALES, (self.io_dtype, ()))

    def io_tensors(self, weight: Weight) -> dict[str, Tensor]:
        """input_scale and output_scale; ones for a new weight."""
        if weight.activation is not None:
            return {name: weight.activation[name] for name in SCALES}
        ones = torch.ones((), dtype=getattr(torch, self.io_dtype), device=weight.device)
        return {name: weight.extras.get(name, ones) for name in SCALES}

    def found(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {name: self.take(tensors, name, *spec) for name, spec in self.specs().items()}
        for name, tensor in found.items():
            if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
                require_finite(name, tensor)
        for name in SCALES:
            if self.activations is not None and not bool(found[name] > 0):
                raise CorruptFile(
                    f"tensor {name!r} holds {found[name].item()}; inputs are divided by it, so it must be positive"
                )
        return found

    def parts(self, weight: Weight) -> Grid:
        """The weight's grid, if the layout can store it as it is."""
        scheme = self.scheme()
        forms = [[(tensor.dtype, tensor.shape) for tensor in own.tensors] for own in (weight, scheme)]
        if weight.structure() != scheme.structure() or forms[0] != forms[1]:
            raise NotRepresentable(
                f"{type(self).__name__} stores {self.shape} in {self.dtype}, inputs {self.activations or 'plain'}; this weight "
                f"is a {type(weight.tree).__name__} of shape {tuple(weight.shape)} in {weight.dtype}. Requantize it to that "
                "layout"
            )
        assert isinstance(weight.tree, Grid)
        return weight.tree


@dataclass(frozen=True)
class QuantoBytesLayout(QuantoLayout):
    """`kind`: int8 or a float8 dtype."""

    kind: str = "int8"

    @property
    def qtype(self) -> str:
        return f"q{self.kind}"

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return (self.shape[0], 1) if self.shape[0] > 1 else ()

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            "weight._data": (self.kind, tuple(self.shape)), "weight._scale": (self.scale_dtype, self.scale_shape),
            **self.io_specs(),
        }  # fmt: skip

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        found = self.found(tensors)
        data, scale = found["weight._data"], found["weight._scale"]
        if self.kind != "int8":
            _require_numbers(data, scale)
        return self.weight(self._tree(data.contiguous().view(torch.uint8), scale.reshape(-1, 1)), found)

    def _tree(self, packed: Tensor, scale: Tensor) -> Grid:
        codes = Codes(packed, 8, self.shape[1], signed=self.kind == "int8")
        return Grid(codes, Values(scale), levels=LEVELS.get(self.kind), compute=self.scale_dtype)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        grid = self.parts(weight)
        assert isinstance(grid.codes, Codes)
        assert isinstance(grid.scale, Values)
        return {
            "weight._data": grid.codes.packed.view(getattr(torch, self.kind)),
            "weight._scale": grid.scale.tensor.reshape(self.scale_shape), **self.io_tensors(weight),
        }  # fmt: skip

    def tree_scheme(self) -> Grid:
        rows, columns = self.shape
        return self._tree(meta("uint8", rows, columns), meta(self.scale_dtype, rows, 1))


def _require_numbers(data: Tensor, scale: Tensor) -> None:
    """CorruptFile when float8 codes are not finite; quanto itself makes such ones of a row of zeros (0 / 0)."""
    for start, stop in row_chunks(*data.shape):
        bad = ~torch.isfinite(data[start:stop].to(torch.float32)).all(1)
        if bool(bad.any()):
            row = start + int(torch.nonzero(bad)[0])
            zeros = bool((scale.reshape(-1)[row if scale.numel() > 1 else 0] == 0).all())
            raise CorruptFile(
                f"tensor 'weight._data' holds NaN or infinity in row {row}, "
                + ("whose scale is 0: quanto divided a row of zeros by it. Quantize the model again with anybit, which does not"
                   if zeros else "a damaged file, get it again")
            )  # fmt: skip


@dataclass(frozen=True)
class QuantoBitsLayout(QuantoLayout):
    """`shift_dtype`: that of the scales, or uint8 for zero points."""

    bits: int = 4
    shift_dtype: str = "float32"
    optimizer: str = "max"

    @property
    def qtype(self) -> str:
        return f"qint{self.bits}"

    @property
    def group(self) -> int:
        return group_size(self.shape[1]) or self.shape[1]

    @property
    def groups(self) -> int:
        """In each row."""
        return self.shape[1] // self.group

    @property
    def parameters(self) -> tuple[int, int]:
        """Shape of scale and shift: one for each group; quanto takes the columns of a single group for its groups."""
        lines = self.shape[0] * self.groups
        return (lines, 1) if lines > 1 else (1, self.shape[1])

    @property
    def grouped(self) -> tuple[int, int]:
        """The same, as they lie in the tree."""
        return (self.shape[0], self.groups) if self.parameters[0] > 1 else self.parameters

    @property
    def compute(self) -> str:
        """quanto multiplies one combination with a kernel (tinygemm) that takes weights apart in float32."""
        on_kernel = self.bits == 4 and self.scale_dtype == "bfloat16" and group_size(self.shape[1]) == 128
        return "float32" if on_kernel else self.scale_dtype

    @property
    def step(self) -> int:
        """Rows of packed bytes."""
        return -(-self.shape[0] * self.groups * self.bits // 8)

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            "weight._data._data": ("uint8", (self.step, self.group)), "weight._scale": (self.scale_dtype, self.parameters),
            "weight._shift": (self.shift_dtype, self.parameters), **self.io_specs(),
        }  # fmt: skip

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        found, (rows, columns) = self.found(tensors), self.shape
        data, lines = found["weight._data._data"], rows * self.groups
        blocks, top = 8 // self.bits, (1 << self.bits) - 1
        codes = torch.empty(blocks * self.step, self.group, dtype=torch.uint8, device=data.device)
        for block in range(blocks):
            codes[block * self.step : (block + 1) * self.step] = (data >> (self.bits * block)) & top
        if bool(codes[lines:].any()):
            raise CorruptFile(
                f"tensor 'weight._data._data' has codes in the {len(codes) - lines} rows that only fill it up; it was written "
                "for another shape"
            )
        packed = packed_codes(codes[:lines].view(rows, columns), self.bits, columns)
        scale, shift = (found[f"weight.{name}"].reshape(self.grouped) for name in ("_scale", "_shift"))
        if self.shift_dtype == "uint8" and bool((shift > top).any()):
            raise CorruptFile(
                f"tensor 'weight._shift' holds the zero point {int(shift.max())}, beyond the {top} of its codes"
            )
        return self.weight(self._tree(packed, scale, shift), found)

    def _tree(self, codes: Codes, scale: Tensor, shift: Tensor) -> Grid:
        parts: dict[str, Any] = {"offset": Values(shift, negated=True)}
        if self.shift_dtype == "uint8":
            parts = {"zero": Values(shift)}
        return Grid(codes, Values(scale), **parts, block=(1, self.shape[1] // self.grouped[1]), compute=self.compute)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        grid = self.parts(weight)
        shift = grid.zero if self.shift_dtype == "uint8" else grid.offset
        assert isinstance(grid.codes, Codes)
        assert isinstance(grid.scale, Values)
        assert isinstance(shift, Values)
        lines, blocks = self.shape[0] * self.groups, 8 // self.bits
        codes = unpacked_codes(grid.codes).view(lines, self.group)
        codes = torch.nn.functional.pad(codes, (0, 0, 0, blocks * self.step - lines)).view(
            blocks, self.step, self.group
        )
        data = torch.zeros(self.step, self.group, dtype=torch.uint8, device=codes.device)
        for block in range(blocks):
            data |= codes[block] << (self.bits * block)
        return {
            "weight._data._data": data, "weight._scale": grid.scale.tensor.reshape(self.parameters),
            "weight._shift": shift.tensor.reshape(self.parameters), **self.io_tensors(weight),
        }  # fmt: skip

    def tree_scheme(self) -> Grid:
        rows, columns = self.shape
        codes = Codes(meta("uint8", rows, packing.row_bytes(columns, self.bits)), self.bits, columns)
        scale, shift = (meta(dtype, *self.grouped) for dtype in (self.scale_dtype, self.shift_dtype))
        return self._tree(codes, scale, shift)

    def algorithm_options(self) -> dict[str, object]:
        return {"shift": {"max": "extremes", "hqq": "half-quadratic"}[self.optimizer]}


# --- inputs and outputs --------------------------------------------------------------------------------------------------

_FLOATS = {level: dtype for dtype, level in LEVELS.items()}


def rounded(x: Tensor, scale: Tensor, kind: str) -> Tensor:
    """The codes nearest to x / scale, as numbers in x's dtype; `kind`: "int8" or a float8 of `levels`."""
    numbers = x / scale
    if kind == "int8":
        return torch.round(numbers).clamp_(-128, 127)
    target: torch.dtype = getattr(torch, _FLOATS[kind])
    return numbers.clamp_(torch.finfo(target).min, torch.finfo(target).max).to(target).to(x.dtype)


@activation_rule("quanto_static")
def quanto_static(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """Inputs and, bias included, outputs are rounded with one stored scale each. Products of integers are exact.

    quanto hands a rounded output on as such: where nothing but a ReLU or a view lies between two layers, the second does not
    round its input again. Here it does, with its own scale, which calibration makes nearly the same.
    """
    activation = weight.activation
    assert activation is not None
    scale, kind = activation["input_scale"], activation.dtype
    codes = rounded(x.contiguous(), scale, kind)  # sums come out the same, however the input lies in memory
    if _has_bytes(weight.tree):
        y = torch.cat([_byte_product(codes, part, scale, kind) for part in _row_parts(weight.tree)], dim=1).to(x.dtype)
    else:
        y = product((codes * scale.to(x.dtype)).to(torch.float32)).to(x.dtype)
    y = y if bias is None else y + bias.to(x.dtype)
    output = activation["output_scale"].to(x.dtype)
    return rounded(y, output, kind) * output


def _has_bytes(tree: Node) -> bool:
    if isinstance(tree, Rows):
        return all(_has_bytes(part) for part in tree.parts)
    return isinstance(tree, Grid) and isinstance(tree.codes, Codes) and tree.codes.bits == 8 and tree.offset is None


def _row_parts(tree: Node) -> list[Grid]:
    """The matrices that lie one above the other."""
    if isinstance(tree, Rows):
        return [one for part in tree.parts for one in _row_parts(part)]
    assert isinstance(tree, Grid)
    return [tree]


def _byte_product(codes: Tensor, grid: Grid, scale: Tensor, kind: str) -> Tensor:
    """float32. Both scales are multiplied first, in their own dtype: with the exact sums of integers, or into the weights."""
    assert isinstance(grid.codes, Codes)
    assert isinstance(grid.scale, Values)
    rows, columns = grid.shape
    integers = kind == "int8" and grid.codes.signed
    left = codes.to(torch.float64 if integers else torch.float32)
    y = torch.empty(codes.shape[0], rows, dtype=torch.float32, device=codes.device)
    for start, stop in row_chunks(rows, columns):
        right = grid.codes.integers(slice(start, stop), slice(0, columns))
        scales = scale * grid.scale.tensor[start:stop]
        if integers:
            y[:, start:stop] = (left @ right.to(torch.float64).T).to(torch.float32) * scales[:, 0].to(torch.float32)
            continue
        numbers = levels.look_up(grid.levels, right) if grid.levels is not None else right
        y[:, start:stop] = left @ (scales * numbers.to(scales.dtype)).to(torch.float32).T
    return y


class OutputRounding(Attachment):
    """A layer norm whose output quanto quantizes; its weight stays as it is."""

    def __init__(self, kind: str):
        self.kind = kind

    def __call__(self, module: Any, *arguments: Any) -> Tensor:
        output: Tensor = arguments[-1]
        scale = module.output_scale.to(output.dtype)
        return rounded(output, scale, self.kind) * scale
