"""Quark's integers: 8 bits for matrices and rows, 4 bits eight to a word, 8 and 2 bits in groups, rows turned to columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import torch
from anybit.errors import CorruptFile
from anybit.methods._quark_states import measured
from anybit.methods._scaled_floats import Inputs, Spec, check_form, require_scale
from anybit.methods._words import packed_codes, read_codes, unpacked_codes, write_codes
from anybit.weight import packing
from anybit.weight.activation import Activation
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import Codes, Grid, Node, Values
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

# nibble n of a word holds output ORDER[n] of its eight; the output j is in nibble NIBBLE_OF[j]
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)
SMALLEST = 2.0**-23  # of a scale


@dataclass(frozen=True)
class QuarkLayout(Layout):
    """Static input scales beside a weight. `inputs`: how its input is rounded."""

    scale: Spec = ("weight_scale", "float32", ())
    zero: Spec | None = None
    inputs: Inputs | None = None
    symmetric: bool = True

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        own = {"weight": self.weight_spec()}
        parts = [self.scale, *([self.zero] if self.zero else []), *(self.inputs.stored if self.inputs else ())]
        return {**own, **{name: (dtype, shape) for name, dtype, shape in parts}}

    def weight_spec(self) -> tuple[str, tuple[int, ...]]:
        """dtype and shape of the stored weight."""
        raise NotImplementedError

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        found = {name: self.take(tensors, name, *spec) for name, spec in self.specs().items()}
        require_scale(self.scale[0], found[self.scale[0]])
        for name, _, _ in self.inputs.stored if self.inputs else ():
            require_scale(name, found[name])
        return self._weight(found)

    def _weight(self, found: Mapping[str, Tensor]) -> Weight:
        zero = found[self.zero[0]] if self.zero else None
        activation = None
        if self.inputs is not None:
            activation = self.inputs.activation(tuple(found[name] for name, _, _ in self.inputs.stored))
        tree, extras = self.read(found["weight"], found[self.scale[0]], zero)
        return Weight(tree, self.dtype, activation, extras)

    def read(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Node, dict[str, Tensor]]:
        """Stored tensors -> (tree, extras)."""
        raise NotImplementedError

    def write(self, weight: Weight) -> dict[str, Tensor]:
        """Inverse of `read`."""
        raise NotImplementedError

    def measured_inputs(self, low: Tensor, high: Tensor) -> Activation:
        assert self.inputs is not None
        return measured(self.inputs, low, high)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        check_form(weight, self)
        found = self.write(weight)
        if weight.activation is not None:
            found.update(zip(weight.activation.names, weight.activation.tensors, strict=True))
        return found

    def scheme(self) -> Weight:
        return self._weight({name: meta(dtype, *shape) for name, (dtype, shape) in self.specs().items()})


@dataclass(frozen=True)
class IntegerLayout(QuarkLayout):
    """Integers by Quark's minimum and maximum observers."""

    algorithm: ClassVar[str | None] = "rtn"

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        raise NotImplementedError

    def algorithm_options(self) -> dict[str, object]:
        return {"ranges": self.ranges, "as_stored": True, "zero_first": True, "reciprocal": True}

    def ranges(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Scale and zero point of blocks, every operation rounded to the weight's dtype, as the peer does it.

        One scale for a matrix is the exception: a comparison with the smallest one makes it float32.
        """
        dtype = getattr(torch, self.dtype)
        low, high = low.clamp(max=0).to(dtype), high.clamp(min=0).to(dtype)
        first, last = self.code_range
        if self.symmetric:
            scale = torch.maximum(-low, high) / ((last - first) / 2)
        else:
            scale = (high - low) / float(last - first)
        if self.scale[2] in ((), (1,)):
            scale = scale.to(torch.float32)
        scale = scale.clamp(min=SMALLEST)
        zero = torch.zeros_like(scale)
        if not self.symmetric:
            zero = (first - (low.to(scale.dtype) / scale).round().to(torch.float32)).clamp(first, last)
        return {"scale": scale.to(torch.float32), "zero": zero.to(torch.float32)}


@dataclass(frozen=True)
class BytesLayout(IntegerLayout):
    """8-bit integers, one scale and zero point for a matrix or for each output."""

    element: str = "int8"

    @property
    def code_range(self) -> tuple[int, int]:
        return (-128, 127) if self.element == "int8" else (0, 255)

    def weight_spec(self) -> tuple[str, tuple[int, ...]]:
        return self.element, self.shape

    def _column(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, 1)

    def read(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Node, dict[str, Tensor]]:
        codes = Codes(weight.view(torch.uint8), 8, self.shape[1], signed=self.element == "int8")
        zeros = Values(self._column(zero)) if zero is not None else None
        return Grid(codes, Values(self._column(scale)), zeros), {}

    def write(self, weight: Weight) -> dict[str, Tensor]:
        grid: Any = weight.tree
        found = {
            "weight": grid.codes.packed.view(getattr(torch, self.element)),
            self.scale[0]: grid.scale.tensor.reshape(self.scale[2]),
        }
        if self.zero is not None:
            found[self.zero[0]] = grid.zero.tensor.reshape(self.zero[2])
        return found


@dataclass(frozen=True)
class NibblesLayout(IntegerLayout):
    """4-bit integers, eight to a word."""

    signed: bool = False
    reordered: bool = True

    @property
    def code_range(self) -> tuple[int, int]:
        return (-8, 7) if self.signed else (0, 15)

    def _unpacked(self, words: Tensor, name: str, count: int) -> Tensor:
        """uint8 codes [rows, count] of int32 words [rows, count / 8]."""
        codes = unpacked_codes(read_codes(words, 4, count, name))
        return codes.unflatten(-1, (-1, 8))[..., NIBBLE_OF].flatten(-2) if self.reordered else codes

    def _packed(self, codes: Tensor) -> Tensor:
        """Inverse of `_unpacked`."""
        codes = codes.unflatten(-1, (-1, 8))[..., ORDER].flatten(-2) if self.reordered else codes
        return write_codes(packed_codes(codes, 4, codes.shape[1]))


@dataclass(frozen=True)
class WordsLayout(NibblesLayout):
    """4-bit integers in groups of inputs, eight outputs to a word. `turned`: scales lie [groups, out]."""

    group_size: int = 128
    turned: bool = True

    @property
    def groups(self) -> int:
        return -(-self.shape[1] // self.group_size)

    def weight_spec(self) -> tuple[str, tuple[int, ...]]:
        return "int32", (self.shape[1], self.shape[0] // 8)

    def read(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Node, dict[str, Tensor]]:
        codes = self._codes(weight, "weight", self.shape[1])
        zeros = self._codes(zero, "weight_zero_point", self.groups) if zero is not None else None
        scales = Values(scale.T.contiguous() if self.turned else scale)
        return Grid(codes, scales, zeros, block=(1, self.group_size)), {}

    def _codes(self, words: Tensor, name: str, count: int) -> Codes:
        rows = self.shape[0]
        if words.device.type == "meta":
            return Codes(meta("uint8", rows, packing.row_bytes(count, 4)), 4, count, self.signed)
        found = packed_codes(self._unpacked(words, name, rows).T, 4, count)
        return Codes(found.packed, 4, count, self.signed)

    def write(self, weight: Weight) -> dict[str, Tensor]:
        grid: Any = weight.tree
        scales = grid.scale.tensor
        found = {"weight": self._words(grid.codes), self.scale[0]: scales.T.contiguous() if self.turned else scales}
        if self.zero is not None:
            found[self.zero[0]] = self._words(grid.zero)
        return found

    def _words(self, codes: Codes) -> Tensor:
        return self._packed(unpacked_codes(codes).T)


@dataclass(frozen=True)
class RowWordsLayout(NibblesLayout):
    """4-bit integers with one scale for each output or for the matrix: eight inputs to a word, nothing turned.

    Zero points: int32 [out / 8], packed likewise; one for the matrix is a number of its own.
    """

    def weight_spec(self) -> tuple[str, tuple[int, ...]]:
        return "int32", (self.shape[0], self.shape[1] // 8)

    def read(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Node, dict[str, Tensor]]:
        assert zero is not None
        rows, columns = self.shape
        if weight.device.type == "meta":
            codes = meta("uint8", rows, packing.row_bytes(columns, 4))
            zeros: Node = Codes(meta("uint8", rows, 1), 4, 1, self.signed) if zero.shape else Values(zero.reshape(1, 1))
        else:
            codes = packed_codes(self._unpacked(weight, "weight", columns), 4, columns).packed
            if zero.shape:
                found = self._unpacked(zero.reshape(1, -1), "weight_zero_point", rows)
                zeros = Codes(packed_codes(found.T, 4, 1).packed, 4, 1, self.signed)
            else:
                low, high = self.code_range
                if not low <= int(zero) <= high:
                    raise CorruptFile(
                        f"tensor 'weight_zero_point' is {int(zero)}, beyond {low} to {high}; get it again"
                    )
                zeros = Values(zero.reshape(1, 1))
        return Grid(Codes(codes, 4, columns, self.signed), Values(scale.reshape(-1, 1)), zeros), {}

    def write(self, weight: Weight) -> dict[str, Tensor]:
        grid: Any = weight.tree
        assert self.zero is not None
        if self.zero[2]:
            zero = self._packed(unpacked_codes(grid.zero).T)
        else:
            zero = grid.zero.tensor
        return {
            "weight": self._packed(unpacked_codes(grid.codes)),
            self.scale[0]: grid.scale.tensor.reshape(self.scale[2]),
            self.zero[0]: zero.reshape(self.zero[2]),
        }


@dataclass(frozen=True)
class TurnedBytesLayout(IntegerLayout):
    """Integers in groups of inputs, stored [in, out] in bytes: one of 8 bits, or four of 2 bits, the first one highest.

    Zero points lie [groups, out] and are packed likewise. `turned`: scales lie [groups, out].
    """

    element: str = "int8"
    bits: int = 8
    group_size: int = 128
    turned: bool = True

    @property
    def code_range(self) -> tuple[int, int]:
        return (-128, 127) if self.element == "int8" else (0, (1 << self.bits) - 1)

    def weight_spec(self) -> tuple[str, tuple[int, ...]]:
        return self.element, (self.shape[1], self.shape[0] * self.bits // 8)

    def read(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Node, dict[str, Tensor]]:
        assert zero is not None
        scales = Values(scale.T.contiguous() if self.turned else scale)
        return Grid(self._codes(weight), scales, self._codes(zero), block=(1, self.group_size)), {}

    def _codes(self, stored: Tensor) -> Codes:
        """Bytes [n, out * bits / 8] as codes [out, n]."""
        count = stored.shape[0]
        if stored.device.type == "meta":
            packed = meta("uint8", self.shape[0], packing.row_bytes(count, self.bits))
        elif self.bits == 8:
            packed = stored.view(torch.uint8).T.contiguous()
        else:
            places = [(stored >> shift) & 3 for shift in (6, 4, 2, 0)]
            packed = packed_codes(torch.stack(places, -1).flatten(-2).T, self.bits, count).packed
        return Codes(packed, self.bits, count, signed=self.element == "int8")

    def write(self, weight: Weight) -> dict[str, Tensor]:
        grid: Any = weight.tree
        assert self.zero is not None
        scales = grid.scale.tensor
        return {
            "weight": self._bytes(grid.codes),
            self.scale[0]: scales.T.contiguous() if self.turned else scales,
            self.zero[0]: self._bytes(grid.zero),
        }

    def _bytes(self, codes: Codes) -> Tensor:
        if self.bits == 8:
            return codes.packed.T.contiguous().view(getattr(torch, self.element))
        first, second, third, fourth = unpacked_codes(codes).T.unflatten(-1, (-1, 4)).unbind(-1)
        return (first << 6) | (second << 4) | (third << 2) | fourth
