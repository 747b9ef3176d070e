"""How torchao's tensor classes are stored: the parts of a weight beside each other, what they mean in the header of the file.

    class                      parts                                                    value
    Int8Tensor                 qdata int8, scale, zero_point int8 (may be absent)       (q - z) * scale
    IntxUnpackedToInt8Tensor   qdata int8 however few bits, scale, zero_point           (q - z) * scale
    Float8Tensor               qdata float8, scale                                      q * scale
    Int4Tensor                 qdata two codes a byte, scale and zero_point turned      q * scale + zero_point
    Int4TilePackedTo4dTensor   qdata int32 in tensor core tiles, scale_and_zero         (q - 8) * scale + zero

The part `x` of the parameter `a.b.weight` is the tensor `a.b._weight_x`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import torch
from anybit.errors import CorruptFile, NotRepresentable
from anybit.methods import _torchao_ranges as ranges
from anybit.methods._torchao_inputs import Inputs
from anybit.methods._words import packed_codes, require_finite
from anybit.weight import packing
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import Codes, Crop, Grid, Node, Transpose, Values
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weight.activation import Activation

Spec = tuple[str, tuple[int, ...]]
WHOLE = -1
FLOAT8 = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2", "float8_e4m3fnuz": "e4m3fnuz", "float8_e5m2fnuz": "e5m2fnuz"}


@dataclass(frozen=True)
class TorchaoLayout(Layout):
    """Base. `parameter`: the weight's name in its module. `attributes`: what the header says of it, JSON.

    `parts`: names in the order of the header. `inputs`: how inputs are quantized. `turned`: the stored axes are [in, out].
    """

    parameter: str = "weight"
    attributes: str = "{}"
    parts: tuple[str, ...] = ("qdata", "scale")
    inputs: Inputs | None = None
    turned: bool = False

    tensor_class: ClassVar[str] = ""

    def name(self, part: str) -> str:
        """Relative name of a part: a stack of experts is a parameter itself, any other weight is its module's."""
        return f"{'.' if self.parameter == 'weight' else '/'}_{self.parameter}_{part}"

    @property
    def record(self) -> str:
        """What the header of the file says of the parameter."""
        own = json.loads(self.attributes)
        own.update({name: value for name, value in self.of_shape().items() if own.get(name)})
        return json.dumps({"_type": self.tensor_class, "_data": own, "_tensor_data_names": list(self.parts)})

    def of_shape(self) -> dict[str, Any]:
        """Attributes that follow from the shape, so that they hold for a layout of another one, too."""
        return {"shape": list(self.stored_shape)}

    @property
    def stored_shape(self) -> tuple[int, ...]:
        *lead, rows, columns = self.shape
        return (*lead, columns, rows) if self.turned else self.shape

    def part_specs(self) -> dict[str, Spec]:
        """dtype and shape of every part."""
        raise NotImplementedError(type(self).__name__)

    def specs(self) -> dict[str, Spec]:
        own = {**self.part_specs(), **(self.inputs.specs() if self.inputs else {})}
        return {self.name(part): own[part] for part in self.parts}

    def tree(self, parts: Mapping[str, Tensor]) -> Node:
        """The numbers, from parts that have the right form."""
        raise NotImplementedError(type(self).__name__)

    def untree(self, tree: Any) -> dict[str, Tensor]:
        """Inverse of `tree`, for a tree that `scheme` could be of."""
        raise NotImplementedError(type(self).__name__)

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        parts = {
            name: self.take(tensors, self.name(name), *spec)
            for name, spec in zip(self.parts, self.specs().values(), strict=True)
        }
        for name, tensor in parts.items():
            if tensor.is_floating_point() and tensor.element_size() > 1:
                require_finite(self.name(name), tensor)
        activation = self.inputs.activation(parts) if self.inputs else None
        return Weight(self.tree(parts), self.dtype, activation)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        wanted = self.scheme()
        if weight.structure() != wanted.structure() or [(t.dtype, t.shape) for t in weight.tensors] != [
            (t.dtype, t.shape) for t in wanted.tensors
        ]:
            raise NotRepresentable(
                f"{self.tensor_class} of {self.attributes} does not hold a {type(weight.tree).__name__} of shape "
                f"{tuple(weight.shape)} standing for {weight.dtype}. Requantize it to that layout"
            )
        made = {**self.untree(weight.tree), **_input_parts(weight.activation, self.inputs)}
        return {self.name(part): made[part] for part in self.parts}

    def scheme(self) -> Weight:
        own = {**self.part_specs(), **(self.inputs.specs() if self.inputs else {})}
        parts = {name: meta(own[name][0], *own[name][1]) for name in self.parts}
        activation = self.inputs.activation(parts) if self.inputs else None
        return Weight(self.tree(parts), self.dtype, activation)

    def _turn(self, tree: Node) -> Node:
        return Transpose(tree) if self.turned else tree

    def _unturn(self, tree: Any) -> Any:
        return tree.child if self.turned else tree


def sides_of(block: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Sides of blocks with WHOLE in place of the length of an axis."""
    return tuple(WHOLE if side == size else side for side, size in zip(block, shape, strict=True))


def _input_parts(activation: Activation | None, inputs: Inputs | None) -> dict[str, Tensor]:
    if activation is None or inputs is None:
        return {}
    return {name: activation[name].view(inputs.specs()[name][1]) for name in inputs.specs()}


@dataclass(frozen=True)
class _Blocks(TorchaoLayout):
    """`block`: sides of the blocks that share a scale, as many as the stored shape has; WHOLE for all of an axis.

    `zero_dtype`: None where no zero points are stored.
    """

    block: tuple[int, ...] = ()
    scale_dtype: str = "float32"
    zero_dtype: str | None = None

    @property
    def sides(self) -> tuple[int, ...]:
        return tuple(size if side == WHOLE else side for size, side in zip(self.stored_shape, self.block, strict=True))

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many blocks lie along each axis."""
        return tuple(size // side for size, side in zip(self.stored_shape, self.sides, strict=True))

    def of_shape(self) -> dict[str, Any]:
        return {"block_size": list(self.sides)}

    def part_specs(self) -> dict[str, Spec]:
        found: dict[str, Spec] = {"scale": (self.scale_dtype, self.blocks)}
        if self.zero_dtype is not None:
            found["zero_point"] = (self.zero_dtype, self.blocks)
        return found

    def _grid(self, codes: Codes, parts: Mapping[str, Tensor], levels: str | None = None) -> Node:
        zero = self._parameter(parts["zero_point"]) if "zero_point" in self.parts else None
        rows, columns = self.sides[-2:]
        return self._turn(Grid(codes, self._parameter(parts["scale"]), zero, levels=levels, block=(rows, columns)))

    def _parameter(self, tensor: Tensor) -> Values:
        # scales that all experts share have no axis of experts
        shared = len(self.block) == 3 and self.blocks[0] == 1 and self.shape[0] > 1
        return Values(tensor[0] if shared else tensor)

    def _parameters(self, grid: Grid) -> dict[str, Tensor]:
        found = {"scale": grid.scale, "zero_point": grid.zero}
        return {name: node.tensor.view(self.blocks) for name, node in found.items() if isinstance(node, Values)}


@dataclass(frozen=True)
class Int8Layout(_Blocks):
    """`reduced`: codes and inputs use one bit less, so that sums of products fit 16-bit instructions."""

    reduced: bool = False

    algorithm = "rtn"
    tensor_class = "Int8Tensor"

    def algorithm_options(self) -> dict[str, object]:
        limits = (-64, 63) if self.reduced else (-128, 127)
        return {
            "ranges": partial(ranges.int8, dtype=self.dtype, limits=limits), "reciprocal": True, "limits": limits,
        }  # fmt: skip

    def part_specs(self) -> dict[str, Spec]:
        return {"qdata": ("int8", self.stored_shape), **super().part_specs()}

    def tree(self, parts: Mapping[str, Tensor]) -> Node:
        return self._grid(Codes(parts["qdata"].view(torch.uint8), 8, self.stored_shape[-1], signed=True), parts)

    def untree(self, tree: Any) -> dict[str, Tensor]:
        grid = self._unturn(tree)
        return {"qdata": grid.codes.packed.view(torch.int8), **self._parameters(grid)}


@dataclass(frozen=True)
class IntxLayout(_Blocks):
    """Codes of `bits`, each stored in a byte; in memory they take `bits`. `mapping`: how scales are found."""

    bits: int = 8
    mapping: str = "SYMMETRIC"
    search: bool = False

    tensor_class = "IntxUnpackedToInt8Tensor"

    @property
    def algorithm(self) -> str:  # type: ignore[override]
        return "scale_refit" if self.search else "rtn"

    def algorithm_options(self) -> dict[str, object]:
        if self.search:
            return {"dtype": self.dtype}
        return {
            "ranges": partial(
                ranges.intx, dtype=self.dtype, scale_dtype=self.scale_dtype, bits=self.bits, mapping=self.mapping
            ),
            "arithmetic": ranges.wider(self.dtype, self.scale_dtype), "reciprocal": True,
        }  # fmt: skip

    def part_specs(self) -> dict[str, Spec]:
        return {"qdata": ("int8", self.stored_shape), **super().part_specs()}

    def tree(self, parts: Mapping[str, Tensor]) -> Node:
        numbers = parts["qdata"]
        *lead, rows, columns = numbers.shape
        if numbers.is_meta:
            packed = meta("uint8", *lead, rows, packing.row_bytes(columns, self.bits))
        else:
            end = 1 << (self.bits - 1)
            low, high = numbers.aminmax()
            if int(low) < -end or int(high) >= end:
                raise CorruptFile(
                    f"tensor {self.name('qdata')!r} holds codes from {int(low)} to {int(high)}, but int{self.bits} ends at "
                    f"{-end} and {end - 1}; a damaged file, get it again"
                )
            packed = packed_codes(numbers.reshape(-1, columns), self.bits, columns).packed.view(*lead, rows, -1)
        return self._grid(Codes(packed, self.bits, columns, signed=True), parts)

    def untree(self, tree: Any) -> dict[str, Tensor]:
        grid = self._unturn(tree)
        if grid.codes.packed.is_meta:
            numbers = meta("int8", *self.stored_shape)
        elif self.bits == 8:
            numbers = grid.codes.packed.view(torch.int8)
        else:
            numbers = torch.empty(self.stored_shape, dtype=torch.int8, device=grid.codes.packed.device)
            flat, packed = numbers.view(-1, numbers.shape[-1]), grid.codes.packed.flatten(0, -2)
            flat_codes = replace(grid.codes, packed=packed)
            step = max(1, (1 << 21) // max(numbers.shape[-1], 1))
            for start in range(0, flat.shape[0], step):
                rows = slice(start, min(start + step, flat.shape[0]))
                flat[rows] = flat_codes.integers(rows).to(torch.int8)
        return {"qdata": numbers, **self._parameters(grid)}


@dataclass(frozen=True)
class Float8Layout(_Blocks):
    """`qdata_dtype`: torch's name of the 8-bit floats."""

    qdata_dtype: str = "float8_e4m3fn"

    algorithm = "minifloat"
    tensor_class = "Float8Tensor"

    def algorithm_options(self) -> dict[str, object]:
        return {"rule": partial(ranges.float8, dtype=self.dtype, levels=FLOAT8[self.qdata_dtype])}

    def part_specs(self) -> dict[str, Spec]:
        return {"qdata": (self.qdata_dtype, self.stored_shape), **super().part_specs()}

    def tree(self, parts: Mapping[str, Tensor]) -> Node:
        numbers = parts["qdata"].view(torch.uint8)
        if not numbers.is_meta:
            table = torch.isfinite(_bytes_as(self.qdata_dtype, numbers.device))
            if not bool(table[numbers.reshape(-1).to(torch.int32)].all()):
                raise CorruptFile(
                    f"tensor {self.name('qdata')!r} holds NaN or infinity as {self.qdata_dtype} (torchao writes it for rows "
                    "that are all zero); the model's outputs would be NaN. Quantize the weight again"
                )
        return self._grid(Codes(numbers, 8, self.stored_shape[-1]), parts, FLOAT8[self.qdata_dtype])

    def untree(self, tree: Any) -> dict[str, Tensor]:
        grid = self._unturn(tree)
        return {"qdata": grid.codes.packed.view(getattr(torch, self.qdata_dtype)), **self._parameters(grid)}


def _bytes_as(dtype: str, device: Any) -> Tensor:
    """float32 values of all 256 bytes."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(getattr(torch, dtype)).to(torch.float32)


@dataclass(frozen=True)
class Int4Layout(TorchaoLayout):
    """Two's complement codes, the even column in the low half; scale and zero_point lie [groups, out].

    `symmetric`: the zero points are all zero (weights for FP8 inputs).
    """

    group_size: int = 128
    scale_dtype: str = "bfloat16"
    symmetric: bool = False

    algorithm = "rtn"
    tensor_class = "Int4Tensor"

    def algorithm_options(self) -> dict[str, object]:
        return {"ranges": ranges.int4_symmetric if self.symmetric else ranges.int4}

    def part_specs(self) -> dict[str, Spec]:
        *lead, rows, columns = self.stored_shape
        turned = (self.scale_dtype, (*lead, columns // self.group_size, rows))
        return {"qdata": ("int8", (*lead, rows, columns // 2)), "scale": turned, "zero_point": turned}

    def tree(self, parts: Mapping[str, Tensor]) -> Node:
        codes = Codes(parts["qdata"].view(torch.uint8), 4, self.stored_shape[-1], signed=True)
        scale, offset = (Values(parts[name].transpose(-1, -2).contiguous()) for name in ("scale", "zero_point"))
        return self._turn(Grid(codes, scale, offset=offset, block=(1, self.group_size)))

    def untree(self, tree: Any) -> dict[str, Tensor]:
        grid = self._unturn(tree)
        return {
            "qdata": grid.codes.packed.view(torch.int8),
            "scale": grid.scale.tensor.transpose(-1, -2).contiguous(),
            "zero_point": grid.offset.tensor.transpose(-1, -2).contiguous(),
        }


@dataclass(frozen=True)
class Int4TileLayout(TorchaoLayout):
    """Codes as tinygemm's tensor core instructions load them, of a weight padded to 8 rows and 1024 columns.

    A word of qdata [rows / 8, columns / 128, 32 lanes, 4] has 8 codes of one row r and the columns 16 t + e of two tiles t:

        lane  r (of 8) * 4 + pair        word  pair of tiles        code at bit 0 4 8 .. of the word, by (t, half, even/odd):
        e     half * 8 + pair * 2 + odd                             (0,0,0) (0,1,0) (1,0,0) (1,1,0) (0,0,1) (0,1,1) ...
    """

    group_size: int = 64

    algorithm = "rtn"
    tensor_class = "Int4TilePackedTo4dTensor"

    def algorithm_options(self) -> dict[str, object]:
        return {"ranges": ranges.tinygemm, "arithmetic": "bfloat16"}

    @property
    def padded(self) -> tuple[int, ...]:
        *lead, rows, columns = self.stored_shape
        return (*lead, rows + -rows % 8, columns + -columns % 1024)

    def part_specs(self) -> dict[str, Spec]:
        *lead, rows, columns = self.padded
        return {
            "qdata": ("int32", (*lead, rows // 8, columns // 128, 32, 4)),
            "scale_and_zero": ("bfloat16", (*lead, columns // self.group_size, rows, 2)),
        }

    def tree(self, parts: Mapping[str, Tensor]) -> Node:
        words, both = parts["qdata"], parts["scale_and_zero"]
        *lead, rows, columns = self.padded
        if words.is_meta:
            packed = meta("uint8", *lead, rows, columns // 2)
        else:
            packed = torch.stack([_from_tiles(matrix) for matrix in words.view(-1, *words.shape[-4:])])
            packed = packed.view(*lead, rows, columns // 2)
        scale, offset = (Values(both[..., number].transpose(-1, -2).contiguous()) for number in range(2))
        grid = Grid(Codes(packed, 4, columns, signed=True), scale, offset=offset, block=(1, self.group_size))
        return self._turn(Crop(grid, *self.stored_shape[-2:]))

    def untree(self, tree: Any) -> dict[str, Tensor]:
        grid = self._unturn(tree).child
        packed = grid.codes.packed
        words_shape = self.part_specs()["qdata"][1]
        if packed.is_meta:
            words = meta("int32", *words_shape)
        else:
            words = torch.stack([_to_tiles(matrix) for matrix in packed.view(-1, *packed.shape[-2:])]).view(words_shape)
        pair = [node.tensor.transpose(-1, -2) for node in (grid.scale, grid.offset)]
        return {"qdata": words, "scale_and_zero": torch.stack(pair, dim=-1).contiguous()}


def _from_tiles(words: Tensor) -> Tensor:
    """int32 words of one matrix -> two's complement codes, packed [rows, columns / 2]. Unsigned 8 is zero: flip the top bit."""
    fields = packing.unpack(packing.words_to_rows(words), 4, words.shape[-1] * 8) ^ 8
    # [row block, column block, row, pair, word, odd, tile, half]: the order of codes in a word is by odd, tile, half
    tiles = fields.view(words.shape[0], words.shape[1], 8, 4, 4, 2, 2, 2)
    ordered = tiles.permute(0, 2, 1, 4, 6, 7, 3, 5)  # row block, row, column block, word, tile, half, pair, odd
    return packing.pack(ordered.reshape(words.shape[0] * 8, words.shape[1] * 128), 4)


def _to_tiles(packed: Tensor) -> Tensor:
    """Inverse of `_from_tiles`."""
    rows, columns = packed.shape[0], packed.shape[1] * 2
    codes = packing.unpack(packed, 4, columns) ^ 8
    ordered = codes.view(rows // 8, 8, columns // 128, 4, 2, 2, 4, 2)
    tiles = ordered.permute(0, 2, 1, 6, 3, 7, 4, 5).reshape(rows // 8, columns // 128, 32, 32)
    return packing.rows_to_words(packing.pack(tiles, 4), torch.int32)


@dataclass(frozen=True)
class OldIntxLayout(IntxLayout):
    """Integers whose inputs are quantized as torchao did it before 0.15; its classes of today do not say how."""

    tensor_class = "LinearActivationQuantizedTensor"
