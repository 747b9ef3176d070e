"""How SINQ stores one weight: codes in groups with a scale and a zero point each, and a second scale for each column.

    value = ((code - zero) * scale) * scale2

Codes, as rows of one group each, lie in words of equal blocks of rows, the first in the highest bits. 4 bits, `step` rows:

    word[r]:  hhhhllll      h = row r   l = row step + r          3, 5, 6 bits: 10, 6, 5 blocks in the lower 30 bits of an int32

Tiles have all rows and a group of columns (1D), or as many rows as columns (2D). Codes go row by row through the weight in both;
scales of 2D tiles go tile by tile, and are read where they lie. Scales and zero points may be 8-bit codes themselves (quantAux).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from anybit._lazy import torch
from anybit.errors import CorruptFile, NotRepresentable
from anybit.methods._words import packed_codes, require_finite, require_zeros, unpacked_codes
from anybit.weight import packing as bitstream
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import OPAQUE_DECODERS, Codes, Grid, Node, Opaque, Scaled, Values, View
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.algorithms.sinq import DualScaled


class Packing(NamedTuple):
    """`blocks` of rows share a word of type `word`, `bits` each."""

    bits: int
    blocks: int
    word: str


PACKINGS = {
    "8bit_u8": Packing(8, 1, "uint8"), "6bit_32": Packing(6, 5, "int32"), "5bit_32": Packing(5, 6, "int32"),
    "4bit_u8": Packing(4, 2, "uint8"), "3bit_32": Packing(3, 10, "int32"), "2bit_u8": Packing(2, 4, "uint8"),
    "1bit_u8": Packing(1, 8, "uint8"),
}  # fmt: skip
PACKING_OF = {packing.bits: name for name, packing in PACKINGS.items()}
ITEMSIZE = {"uint8": 1, "int32": 4, "float16": 2, "bfloat16": 2, "float32": 4}
FLOATS = ("float16", "bfloat16", "float32")
HIGH = 32  # rows of the matrix whose columns are scales with a step and a minimum in common


@dataclass(frozen=True)
class SinqLayout(Layout):
    """`words`: dtype of W_q, a float where its bytes are viewed as numbers. `square`: 2D tiles. `coded`: scale and zero point
    are 8-bit codes; `one_zero`: one zero point for all. `levels`: a table the codes point into. `second`: dtype of scale2.
    """

    bits: int = 4
    group: int = 64
    packing: str = "4bit_u8"
    words: str = "uint8"
    square: bool = False
    coded: bool = True
    one_zero: bool = False
    levels: str | None = None
    parameters: str = "float16"
    second: str = "float16"
    compute: str = "float32"

    algorithm: ClassVar[str | None] = "sinq"

    def algorithm_options(self) -> dict[str, object]:
        return {
            "bits": self.bits,
            "width": self.group,
            "square": self.square,
            "working": self.parameters,
            "assemble": self._assemble,
        }

    # --- shapes ---

    @property
    def groups(self) -> int:
        """Of a row."""
        return self.shape[1] // self.group

    @property
    def count(self) -> int:
        """Groups of the weight."""
        return self.shape[0] * self.groups

    @property
    def tiled(self) -> tuple[int, int, int]:
        """(tiles down, tiles across, rows of a tile), of 2D tiles."""
        return self.shape[0] // self.group, self.groups, self.group

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        form, dtype = PACKINGS[self.packing], self.parameters
        width = self.group * ITEMSIZE[form.word] // ITEMSIZE[self.words]
        tiles = self.tiled[0] * self.tiled[1] if self.square else 0
        plain = (tiles, self.group, 1) if self.square else (self.count, 1)
        found: dict[str, tuple[str, tuple[int, ...]]] = {"W_q": (self.words, (-(-self.count // form.blocks), width))}
        if self.coded:
            columns, zeros = self.count // HIGH, 1 if self.one_zero else self.count
            found |= {
                "meta.scale.x": ("uint8", (HIGH, columns)),
                "meta.scale.s": (dtype, (1, columns)),
                "meta.scale.m": (dtype, (1, columns)),
                "meta.zero.x": ("uint8", (zeros, 1)),
                "meta.zero.s": (dtype, (1, 1)),
                "meta.zero.m": (dtype, (1, 1)),
            }
        else:
            found |= {"meta.scale": (dtype, plain), "meta.zero": (dtype, () if self.one_zero else plain)}
        found["meta.scale2"] = (self.second, (tiles, 1, self.group) if self.square else (1, self.shape[1]))
        return found

    # --- the tree ---

    def _weight(self, codes: Codes, found: Mapping[str, Any]) -> Weight:
        rows, groups = self.shape[0], self.groups
        scale: Node
        if not self.coded:
            scale, zero = Values(found["meta.scale"]), Values(found["meta.zero"])
        else:
            x, s, m = (found[f"meta.scale.{name}"] for name in "xsm")
            if self.square:
                scale = Opaque("sinq_tile_scales", ("x", "s", "m"), (x, s, m), rows, groups)
            else:
                inner = Codes(x, 8, x.shape[1])
                scale = View(Grid(inner, Values(s), offset=Values(m), compute=self.parameters), rows, groups)
            x, s, m = (found[f"meta.zero.{name}"] for name in "xsm")
            zero = Grid(Codes(x, 8, x.shape[1]), Values(s), offset=Values(m), compute=self.parameters)  # type: ignore[assignment]
        grid = Grid(codes, scale, zero, levels=self.levels, block=(1, self.group), compute=self.compute)
        second: Node = Values(found["meta.scale2"])
        if self.square:
            second = Opaque("sinq_tile_columns", ("scale2",), (found["meta.scale2"],), *self.shape)
        return Weight(Scaled(grid, second, compute=self.compute), self.dtype)

    def scheme(self) -> Weight:
        rows, columns = self.shape
        codes = Codes(meta("uint8", rows, bitstream.row_bytes(columns, self.bits)), self.bits, columns)
        stored = {name: meta(dtype, *shape) for name, (dtype, shape) in self.specs().items()}
        return self._weight(codes, self._placed(stored))

    def _placed(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored parameters in the shapes they have in the tree: those of a group where the group lies."""
        found = {name: tensor for name, tensor in stored.items() if name != "W_q"}
        grouped = ("meta.scale", "meta.zero", "meta.zero.x")
        for name in grouped:
            if name not in found:
                continue
            tensor = found[name]
            if self.one_zero and "zero" in name:
                found[name] = tensor.reshape(1, 1)
            elif self.square:
                down, across, high = self.tiled
                turned = tensor.reshape(down, across, high).transpose(1, 2)
                found[name] = turned.reshape(self.shape[0], self.groups)
            else:
                found[name] = tensor.reshape(self.shape[0], self.groups)
        if self.square:
            for name in ("meta.scale2", "meta.scale.x"):
                if name in found:
                    found[name] = found[name].reshape(self.tiled)
        return found

    def _stored(self, name: str, tensor: Tensor) -> Tensor:
        """Inverse of `_placed` for one tensor."""
        shape = self.specs()[name][1]
        if self.square and name in ("meta.scale", "meta.zero", "meta.zero.x") and tensor.numel() > 1:
            down, across, high = self.tiled
            tensor = tensor.reshape(down, high, across).transpose(1, 2)
        return tensor.reshape(shape)

    # --- decode, encode ---

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        found = {name: self.take(tensors, name, *spec) for name, spec in self.specs().items()}
        for name, (dtype, _) in self.specs().items():
            if dtype in FLOATS and name != "W_q":
                require_finite(name, found[name])
        codes = self._codes(found["W_q"]).reshape(self.shape)
        return self._weight(packed_codes(codes, self.bits, self.shape[1]), self._placed(found))

    def _codes(self, words: Tensor) -> Tensor:
        """uint8 codes, a row for each group."""
        form = PACKINGS[self.packing]
        if self.words != form.word:
            words = words.contiguous().reshape(-1).view(getattr(torch, form.word)).view(words.shape[0], self.group)
        step = words.shape[0]
        codes = torch.empty(form.blocks * step, self.group, dtype=torch.uint8, device=words.device)
        for block in range(form.blocks):
            shift = form.bits * (form.blocks - 1 - block)
            codes[block * step : (block + 1) * step] = (words >> shift) & ((1 << form.bits) - 1)
        if form.word == "int32" and bool((words >> 30).any()):
            raise CorruptFile(f"tensor 'W_q' has bits set above the 30 that {self.packing} uses; the file is damaged")
        require_zeros("W_q", codes[self.count :])
        if self.bits < form.bits and bool((codes >> self.bits).any()):
            raise CorruptFile(f"tensor 'W_q' holds the code {int(codes.max())}, its layer has {self.bits} bits")
        return codes[: self.count]

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        scheme = self.scheme()
        forms = [[(tensor.dtype, tensor.shape) for tensor in own.tensors] for own in (weight, scheme)]
        if weight.structure() != scheme.structure() or forms[0] != forms[1]:
            raise NotRepresentable(
                f"SinqLayout stores {self.bits}-bit codes in groups of {self.group} of a weight {self.shape} in {self.dtype} and "
                f"a second scale for each column; this weight is a {type(weight.tree).__name__} {tuple(weight.shape)} in "
                f"{weight.dtype}. Requantize it to that layout"
            )
        tree: Any = weight.tree
        grid = tree.child
        stored = {"W_q": self._words(grid.codes)}
        if not self.coded:
            parts = {"meta.scale": grid.scale.tensor, "meta.zero": grid.zero.tensor}
        else:
            if self.square:
                of_scale = dict(zip(grid.scale.names, grid.scale.tensors, strict=True))
            else:
                of_scale = _coded(grid.scale.child)
            parts = {f"meta.scale.{name}": tensor for name, tensor in of_scale.items()}
            parts |= {f"meta.zero.{name}": tensor for name, tensor in _coded(grid.zero).items()}
        parts["meta.scale2"] = tree.scale.tensors[0] if self.square else tree.scale.tensor
        return {**stored, **{name: self._stored(name, tensor) for name, tensor in parts.items()}}

    def _words(self, packed: Codes) -> Tensor:
        form = PACKINGS[self.packing]
        codes = unpacked_codes(packed).view(self.count, self.group)
        step = -(-self.count // form.blocks)
        codes = torch.nn.functional.pad(codes, (0, 0, 0, form.blocks * step - self.count))
        blocks = codes.view(form.blocks, step, self.group)
        words = torch.zeros(step, self.group, dtype=getattr(torch, form.word), device=codes.device)
        for block in range(form.blocks):
            words |= blocks[block].to(words.dtype) << (form.bits * (form.blocks - 1 - block))
        if self.words != form.word:
            shape = self.specs()["W_q"][1]
            words = words.reshape(-1).view(getattr(torch, self.words)).view(shape)
        return words

    # --- creating ---

    def _assemble(self, found: DualScaled) -> Weight:
        from anybit.algorithms.sinq import eight_bits

        placed = {"meta.scale": found.scale, "meta.zero": found.zero}
        if self.coded:
            for name in ("scale", "zero"):
                # in the order the format stores them, for neighbours share steps
                numbers = self._in_order(placed.pop(f"meta.{name}"))
                parts = eight_bits(numbers, HIGH if name == "scale" else self.count)
                placed |= {f"meta.{name}.{own}": part for own, part in zip("xsm", parts, strict=True)}
            placed = self._placed(placed)
        placed["meta.scale2"] = found.columns.reshape(self.tiled) if self.square else found.columns
        return self._weight(packed_codes(found.codes, self.bits, self.shape[1]), placed)

    def _in_order(self, numbers: Tensor) -> Tensor:
        """Numbers [out, groups] as they lie in a file."""
        if not self.square:
            return numbers
        down, across, high = self.tiled
        return numbers.reshape(down, high, across).transpose(1, 2)


def _coded(grid: Any) -> dict[str, Tensor]:
    return {"x": grid.codes.packed, "s": grid.scale.tensor, "m": grid.offset.tensor}


# --- parameters of 2D tiles ------------------------------------------------------------------------------------------------


def _tile_scales(tensors: Mapping[str, Tensor], rows: slice, columns: slice) -> Tensor:
    """A scale for each row of a tile: codes x [tiles down, tiles across, rows of a tile], whose steps and minima s and m [1, n]
    are those of every n-th in the order they lie.
    """
    x, s, m = tensors["x"], tensors["s"][0], tensors["m"][0]
    _, across, high = x.shape
    first, last = rows.start // high, -(-rows.stop // high)
    codes = x[first:last].reshape(-1)
    place = torch.arange(len(codes), device=codes.device).add_(first * across * high) % len(s)
    numbers = codes.to(s.dtype) * s[place] + m[place]
    own = numbers.view(-1, across, high).transpose(1, 2).reshape(-1, across)
    return own[rows.start - first * high : rows.stop - first * high, columns].to(torch.float32)


def _tile_columns(tensors: Mapping[str, Tensor], rows: slice, columns: slice) -> Tensor:
    """A scale for each column of a tile, scale2 [tiles down, tiles across, columns of a tile], for all of its rows."""
    scale2 = tensors["scale2"]
    place = torch.arange(rows.start, rows.stop, device=scale2.device) // scale2.shape[2]
    return scale2.flatten(1)[:, columns].index_select(0, place).to(torch.float32)


OPAQUE_DECODERS["sinq_tile_scales"] = _tile_scales
OPAQUE_DECODERS["sinq_tile_columns"] = _tile_columns
