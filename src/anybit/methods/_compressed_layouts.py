"""How compressed-tensors stores one weight: codes in one of several ways, with scales, zero points and input scales beside them.

Stored: weight (int8, int16 or float8, one code each), or weight_packed with weight_shape int64 [2]: int32 words of integers,
uint8 of FP4 and FP6; weight_scale per matrix, row, group or block; weight_zero_point; weight_g_idx int32 [in], the group of each
column; weight_global_scale, which divides all scales; input_scale, input_zero_point, input_global_scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import torch
from anybit.algorithms import minifloat
from anybit.errors import CorruptFile
from anybit.methods._compressed_inputs import activation, mx_scales, parameters, smallest
from anybit.methods._compressed_schemes import Arguments
from anybit.methods._scaled_floats import check_form, require_numbers, require_scale
from anybit.weight import packing
from anybit.weight.activation import Activation
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import Codes, Grid, Node, Values
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

Spec = tuple[str, str, tuple[int, ...]]  # relative name, dtype, shape
PLAIN = Arguments()


@dataclass(frozen=True)
class CompressedLayout(Layout):
    """What all ways of storing codes share. `args`: the scheme of the weight.

    `scale_rank`: dimensions of a stored scale ([], [1] or [down, across]). `zero`: dtype of a stored zero point, "words" if it
    is packed. `index`: "columns" if weight_g_idx tells the groups, "runs" if it says what group sizes say, "unused" if it is
    all -1. `inputs`: the input's scheme, with the stored tensors it needs in `input_specs`.
    """

    args: Arguments = PLAIN
    scale_dtype: str = "bfloat16"
    scale_rank: int = 2
    zero: str | None = None
    dense_words: bool = True
    index: str | None = None
    common: tuple[int, ...] | None = None  # shape of weight_global_scale
    inputs: Arguments | None = None
    input_specs: tuple[Spec, ...] = ()

    # --- shapes ---

    @property
    def levels(self) -> str | None:
        return self.args.levels

    @property
    def grid_block(self) -> tuple[int, int]:
        """An axis without a choice counts as 1, so that cuts fall anywhere."""
        down, across = self.args.block
        return down or 1, 1 if self.index == "columns" else across or 1

    @property
    def scale_grid(self) -> tuple[int, int]:
        """Scales along each axis."""
        (rows, columns), (down, across) = self.shape, self.args.block
        return -(-rows // down) if down else 1, -(-columns // across) if across else 1

    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the stored scale, and of a zero point that is not packed."""
        return self.scale_grid if self.scale_rank == 2 else self.scale_grid[: self.scale_rank]

    def zero_spec(self) -> tuple[str, tuple[int, ...]]:
        rows, groups = self.scale_grid
        if self.zero == "words":
            return "int32", (words_of(rows, self.args.bits, self.dense_words), groups)
        assert self.zero is not None
        return self.zero, self.parameter_shape()

    # --- codes: one way for each subclass ---

    def read_codes(self, tensors: Mapping[str, Tensor]) -> Node:
        """Stored codes -> node [out, in]."""
        raise NotImplementedError

    def write_codes(self, codes: Any) -> dict[str, Tensor]:
        """Inverse of `read_codes`."""
        raise NotImplementedError

    def codes_scheme(self) -> Node:
        """`read_codes` of tensors without numbers."""
        raise NotImplementedError

    # --- both ways ---

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        return self.with_codes(self.read_codes(tensors), tensors)

    def with_codes(self, codes: Node, tensors: Mapping[str, Tensor]) -> Weight:
        """A weight of these codes and of what is stored beside them."""
        scale = self.take(tensors, "weight_scale", self.scale_dtype, self.parameter_shape())
        (require_numbers if self.scale_dtype == "float8_e4m3fn" else require_scale)("weight_scale", scale)
        common = None
        if self.common is not None:
            common = positive("weight_global_scale", self.take(tensors, "weight_global_scale", "float32", self.common))
        zero = None
        if self.zero is not None:
            stored_zero = self.take(tensors, "weight_zero_point", *self.zero_spec())
            zero = self._zero_node(self._read_zeros(stored_zero) if self.zero == "words" else stored_zero)
        return self._weight(
            codes, self._scale_node(scale, common), zero, self._read_index(tensors), self._inputs(tensors)
        )

    def _inputs(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        found = []
        for name, dtype, shape in self.input_specs:
            tensor = self.take(tensors, name, dtype, shape)
            if name != "input_zero_point":
                positive(name, tensor)
            found.append(tensor)
        return tuple(found)

    def _scale_node(self, scale: Tensor, common: Tensor | None) -> Node:
        grid = scale.reshape(self.scale_grid)
        if self.scale_dtype in ("uint8", "float8_e8m0fnu"):
            return Values(grid.view(torch.uint8), levels="e8m0")
        if common is None:
            return Values(grid)
        codes = Codes(grid.view(torch.uint8), 8, grid.shape[-1])
        return Grid(codes, Values(common.reshape(1, 1), inverted=True), levels="e4m3")

    def _zero_node(self, zero: Tensor) -> Node:
        if self.zero == "words":
            return Codes.of(zero, self.args.bits, signed=True)
        return Values(zero.reshape(self.scale_grid))

    def _weight(
        self, codes: Node, scale: Node, zero: Node | None, index: Tensor | None, inputs: tuple[Tensor, ...]
    ) -> Weight:
        names = tuple(name for name, _, _ in self.input_specs)
        own = activation(self.inputs, names, inputs) if self.inputs is not None else None
        grid = Grid(codes, scale, zero, levels=self.levels, block=self.grid_block, group_index=index)
        return Weight(grid, self.dtype, own)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        grid: Any = check_form(weight, self)
        stored = self.write_codes(grid.codes)
        scale = grid.scale.codes.packed if self.common is not None else grid.scale.tensor
        stored["weight_scale"] = as_dtype(scale, self.scale_dtype).reshape(self.parameter_shape())
        if self.common is not None:
            stored["weight_global_scale"] = grid.scale.scale.tensor.reshape(self.common)
        if self.zero == "words":
            stored["weight_zero_point"] = write_words(
                grid.zero.integers().T, self.args.bits, self.dense_words
            ).T.contiguous()
        elif self.zero is not None:
            stored["weight_zero_point"] = grid.zero.tensor.reshape(self.parameter_shape())
        if self.index is not None:
            known = (
                grid.group_index if grid.group_index is not None else self._known_index(stored["weight_scale"].device)
            )
            stored["weight_g_idx"] = known
        if weight.activation is not None:
            stored.update(zip(weight.activation.names, weight.activation.tensors, strict=True))
        return stored

    def scheme(self) -> Weight:
        zero = None
        if self.zero is not None:
            bits, grid = self.args.bits, self.scale_grid
            packed = meta("uint8", grid[0], packing.row_bytes(grid[1], bits))
            zero = Codes(packed, bits, grid[1], True) if self.zero == "words" else Values(meta(self.zero, *grid))
        scale = self._scale_node(
            meta(self.scale_dtype, *self.parameter_shape()),
            None if self.common is None else meta("float32", *self.common),
        )
        index = meta("int32", self.shape[1]) if self.index == "columns" else None
        return self._weight(
            self.codes_scheme(), scale, zero, index, tuple(meta(dtype, *shape) for _, dtype, shape in self.input_specs)
        )

    # --- zero points and groups ---

    def _read_zeros(self, words: Tensor) -> Tensor:
        """int32 words along the outputs -> zero points [out, groups]."""
        return (
            read_words(words.T, self.args.bits, self.scale_grid[0], self.dense_words, "weight_zero_point").integers().T
        )

    def _known_index(self, device: torch.device) -> Tensor:
        index = torch.arange(self.shape[1], dtype=torch.int32, device=device)
        return torch.full_like(index, -1) if self.index == "unused" else index // self.args.group_size

    def _read_index(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        if self.index is None:
            return None
        index = self.take(tensors, "weight_g_idx", "int32", self.shape[1:])
        groups = self.scale_grid[1]
        if self.index == "columns":
            if bool((index < 0).any() | (index >= groups).any()):
                raise CorruptFile(
                    f"tensor 'weight_g_idx' names groups {int(index.min())} to {int(index.max())}, but there are {groups}; the "
                    "file is damaged or has another group_size"
                )
            return index
        if not torch.equal(index, self._known_index(index.device)):
            raise CorruptFile("tensor 'weight_g_idx' is not what it was when the load was planned")
        return None

    # --- creating ---

    def ordered(self) -> Layout | None:
        return replace(self, index="columns") if self.args.block[0] == 1 and self.args.group_size else None

    @property
    def averaging(self) -> float:  # type: ignore[override]
        return self.inputs.averaging if self.inputs is not None else 0.0

    def measured_inputs(self, low: Tensor, high: Tensor) -> Activation:
        """Parameters in the dtype of the model, as the peer's observers find them there."""
        assert self.inputs is not None
        names = tuple(name for name, _, _ in self.input_specs)
        dtype = getattr(torch, self.dtype)
        if self.inputs.strategy == "group":
            low, high = (part.unflatten(-1, (-1, self.inputs.group_size)) for part in (low, high))
        low, high = low.amin(-1).to(dtype), high.amax(-1).to(dtype)
        if self.inputs.dynamic == "local":
            whole = torch.maximum(-low.clamp(max=0), high.clamp(min=0)).clamp(min=torch.finfo(dtype).tiny)
            found = (minifloat.FORMATS["e4m3"][2] * minifloat.FORMATS[str(self.inputs.levels)][2] / whole).to(
                torch.float32
            )
            return activation(self.inputs, names, (found.reshape(1),))
        scale, zero = parameters(low.reshape(-1), high.reshape(-1), self.inputs)
        known = {"input_scale": scale, "input_zero_point": zero if zero is None else zero.to(torch.int8)}
        return activation(self.inputs, names, tuple(known[name] for name in names))  # type: ignore[misc]

    def value_dtype(self) -> str:
        """The dtype the peer quantizes in: that of the weight, which is also its scale's."""
        return self.scale_dtype if self.scale_dtype in ("float16", "bfloat16", "float32") else self.dtype


# --- integers ------------------------------------------------------------------------------------------------------------------


def integer_ranges(low: Tensor, high: Tensor, *, args: Arguments) -> dict[str, Tensor]:
    """Scale and zero point for rounding to nearest."""
    scale, zero = parameters(low, high, args)
    return {"scale": scale} if zero is None else {"scale": scale, "zero": zero}


@dataclass(frozen=True)
class IntegerLayout(CompressedLayout):
    """Integers of any width, one in each element of `weight` (int-quantized, naive-quantized)."""

    algorithm: ClassVar[str | None] = "rtn"

    @property
    def element(self) -> str:
        return "int8" if self.args.bits <= 8 else "int16"

    def read_codes(self, tensors: Mapping[str, Tensor]) -> Node:
        stored = self.take(tensors, "weight", self.element, self.shape)
        require_range("weight", stored, self.args.bits)
        return self._codes(stored)

    def _codes(self, stored: Tensor) -> Codes:
        if self.args.bits == 8:
            return Codes(stored.view(torch.uint8), 8, self.shape[1], signed=True)
        return Codes.of(stored, self.args.bits, signed=True)

    def write_codes(self, codes: Any) -> dict[str, Tensor]:
        return {"weight": codes.integers().to(getattr(torch, self.element))}

    def codes_scheme(self) -> Node:
        return self._codes(meta(self.element, *self.shape))

    def algorithm_options(self) -> dict[str, object]:
        return {
            "ranges": partial(integer_ranges, args=self.args),
            "arithmetic": self.value_dtype(),
            "as_stored": True,
            "zero_first": True,
        }


@dataclass(frozen=True)
class PackedLayout(IntegerLayout):
    """pack-quantized: integers in int32 words, each code plus 2**(bits - 1), which flips the sign bit.

    `dense_words`: from 0.18 a row is one stream of bits; before, a word held 32 // bits codes and its rest was empty.
    """

    def read_codes(self, tensors: Mapping[str, Tensor]) -> Node:
        count = words_of(self.shape[1], self.args.bits, self.dense_words)
        words = self.take(tensors, "weight_packed", "int32", (self.shape[0], count))
        require_shape(self, tensors, "weight_shape", (2,))
        return read_words(words, self.args.bits, self.shape[1], self.dense_words, "weight_packed")

    def write_codes(self, codes: Any) -> dict[str, Tensor]:
        words = write_words(codes.integers(), self.args.bits, self.dense_words)
        return {"weight_packed": words, "weight_shape": torch.tensor(self.shape, device=words.device)}

    def codes_scheme(self) -> Node:
        packed = meta("uint8", self.shape[0], packing.row_bytes(self.shape[1], self.args.bits))
        return Codes(packed, self.args.bits, self.shape[1], signed=True)


# --- small floats --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FloatLayout(CompressedLayout):
    """E4M3 in `weight`; E2M1 and E2M3 in `weight_packed`, one little-endian stream of bits for each row."""

    joined: tuple[str, ...] = field(default=(), compare=False)  # last names of the layers whose global scale is one
    covers: float = field(default=0.0, compare=False)

    algorithm: ClassVar[str | None] = "minifloat"

    @property
    def alongside(self) -> tuple[str, ...]:
        return self.joined

    def covering(self, largest: float) -> Layout:
        return replace(self, covers=largest)

    @property
    def name(self) -> str:
        return "weight" if self.args.bits == 8 else "weight_packed"

    @property
    def element(self) -> str:
        return "float8_e4m3fn" if self.args.bits == 8 else "uint8"

    def _shape(self) -> tuple[int, int]:
        return self.shape[0], packing.row_bytes(self.shape[1], self.args.bits)

    def read_codes(self, tensors: Mapping[str, Tensor]) -> Node:
        stored = self.take(tensors, self.name, self.element, self._shape())
        if self.args.bits == 8:
            require_numbers(self.name, stored)
        return self._codes(stored)

    def _codes(self, stored: Tensor) -> Codes:
        return Codes(stored.view(torch.uint8), self.args.bits, self.shape[1])

    def write_codes(self, codes: Any) -> dict[str, Tensor]:
        return {self.name: as_dtype(codes.packed, self.element)}

    def codes_scheme(self) -> Node:
        return self._codes(meta(self.element, *self._shape()))

    def algorithm_options(self) -> dict[str, object]:
        common = self.common is not None
        return {
            "rule": self.scales,
            # a zero point of 0 was added, which makes 0.0 of -0.0; not for six bits
            "zeros": "signed" if self.args.bits == 6 else "below",
            "through": (self.value_dtype(),),
            "quotient": "float32" if common else self.value_dtype(),
        }

    def scales(self, largest: Tensor) -> minifloat.Scales:
        """The peer's rule, in the dtype of the weight."""
        dtype = getattr(torch, self.value_dtype())
        if self.args.powers:
            return minifloat.Scales(mx_scales(largest, self.args.bits))
        top = minifloat.FORMATS[str(self.levels)][2]
        scale = largest.to(dtype) / top
        if self.common is None:
            scale = torch.where(scale == 0, smallest(self.args, dtype), scale)
            return minifloat.Scales(scale.to(torch.float32))
        whole = largest.amax().clamp(min=self.covers).to(dtype).clamp(min=torch.finfo(dtype).tiny)
        common = (448.0 * top / whole).nan_to_num(nan=1.0, posinf=1.0).to(torch.float32)
        found = minifloat.nearest(common * scale.to(torch.float32), "e4m3")
        found = torch.where(found == 0, smallest(self.args, dtype), found)
        # what is stored divides; in float64 its reciprocal's reciprocal is itself again
        return minifloat.Scales(found, 1 / common.double(), divisor=found / common)


# --- words ---------------------------------------------------------------------------------------------------------------------


def words_of(count: int, bits: int, dense: bool) -> int:
    """32-bit words that hold so many codes."""
    return -(-count * bits // 32) if dense else -(-count // (32 // bits))


def read_words(words: Tensor, bits: int, count: int, dense: bool, name: str) -> Codes:
    """int32 words [rows, n] -> signed codes. CorruptFile when bits that hold no code are set."""
    stream = packing.words_to_rows(words)
    if dense or 32 % bits == 0:
        used, spare = packing.row_bytes(count, bits), -count * bits % 8
        rest = bool(stream[:, used:].any()) or (spare and bool((stream[:, used - 1] >> (8 - spare)).any()))
        codes = None
    else:
        per_word = 32 // bits
        shifts = torch.arange(per_word, dtype=torch.int32, device=words.device) * bits
        fields = ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)
        rest = bool((words >> (per_word * bits)).any()) or bool(fields[:, count:].any())
        codes = fields[:, :count]
    if rest:
        raise CorruptFile(
            f"tensor {name!r} has bits set that belong to no code ({count} codes of {bits} bits in {words.shape[-1]} words a "
            "row); it was written for another shape or width"
        )
    if codes is not None:
        return Codes.of(codes ^ (1 << (bits - 1)), bits, signed=True)
    flipped = stream[:, :used] ^ _sign_bits(count, bits, words.device)
    return Codes(flipped, bits, count, signed=True)


def write_words(codes: Tensor, bits: int, dense: bool) -> Tensor:
    """Signed codes [rows, count] -> int32 words [rows, n]."""
    fields = codes.to(torch.int32) + (1 << (bits - 1))
    if dense or 32 % bits == 0:
        return packing.rows_to_words(packing.pack(fields, bits), torch.int32)
    per_word = 32 // bits
    fields = torch.nn.functional.pad(fields, (0, -fields.shape[-1] % per_word)).unflatten(-1, (-1, per_word))
    shifts = torch.arange(per_word, dtype=torch.int32, device=codes.device) * bits
    return (fields << shifts).sum(-1, dtype=torch.int32)


def _sign_bits(count: int, bits: int, device: torch.device) -> Tensor:
    """One packed row in which every code has only its highest bit."""
    return packing.pack(torch.full((1, count), 1 << (bits - 1), dtype=torch.uint8, device=device), bits)


# --- checks --------------------------------------------------------------------------------------------------------------------


def as_dtype(tensor: Tensor, dtype: str) -> Tensor:
    """The same bytes under another dtype of the same width."""
    target = getattr(torch, dtype)
    return tensor if tensor.dtype == target else tensor.contiguous().view(target)


def positive(name: str, scale: Tensor) -> Tensor:
    """The scale; CorruptFile when it is not a positive number."""
    numbers = scale.to(torch.float32)
    if not bool((torch.isfinite(numbers) & (numbers > 0)).all()):
        raise CorruptFile(
            f"tensor {name!r} holds {numbers.flatten()[:4].tolist()}; a scale must be positive and finite. A damaged file"
        )
    return scale


def require_range(name: str, codes: Tensor, bits: int) -> None:
    """CorruptFile when integers are too large for their width."""
    if bits in (8, 16):
        return
    low, high = int(codes.min()), int(codes.max())
    if low < -(1 << (bits - 1)) or high >= 1 << (bits - 1):
        raise CorruptFile(
            f"tensor {name!r} holds {low} to {high}, which the {bits} bits of the configuration do not; num_bits is wrong or the "
            "file is damaged"
        )


def require_shape(layout: Layout, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
    """CorruptFile when the stored shape is not that of the model's weight."""
    stored = layout.take(tensors, name, "int64", shape)
    if stored.flatten().tolist() != list(layout.shape):
        raise CorruptFile(
            f"tensor {name!r} says {stored.flatten().tolist()}, the model's weight is {list(layout.shape)}; the file is damaged "
            "or belongs to another model"
        )
