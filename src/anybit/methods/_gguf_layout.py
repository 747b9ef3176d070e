"""One tensor of GGUF blocks <-> weight. What each block type means, as a tree over the fields of `_gguf_blocks`.

Stored: one uint8 tensor [(experts,) rows, blocks of a row * bytes], named for its type (`q_proj.q4_k`), as it lies in the file;
NVFP4 may have `scale` (and `input_scale`) beside it. In memory the fields take exactly the bytes the blocks take.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.errors import CorruptFile, NotRepresentable
from anybit.methods._gguf_blocks import PACK, UNPACK
from anybit.weight.block_types import BY_NAME, BlockType
from anybit.weight.encoders import encoder
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import Codebook, Codes, Columns, Grid, Node, Permute, Scaled, Values, tensors_of
from anybit.weight.points import digit_places
from anybit.weight.weight import Weight, row_chunks

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 19  # weights converted at once
Leaves = Mapping[str, "Tensor"]
TREES: dict[str, Callable[[Leaves], Node]] = {}


def encoding_of(relative: str) -> str | None:
    """The block type that a stored tensor's relative name says, or None."""
    return relative.upper() if relative.islower() and relative.upper() in UNPACK else None


@dataclass(frozen=True)
class GgufLayout(Layout):
    """`encoding`: the block type. `beside`: tensors stored beside the blocks, with their shapes.

    `importance`: mean square of every input [(experts,) in], for the search of scales; no part of what is stored.
    """

    encoding: str = "Q8_0"
    beside: tuple[tuple[str, tuple[int, ...]], ...] = ()
    importance: Tensor | None = field(default=None, compare=False, repr=False)

    algorithm = "ggml"

    @property
    def name(self) -> str:
        """Of the stored tensor."""
        return self.encoding.lower()

    @property
    def block(self) -> BlockType:
        return BY_NAME[self.encoding]

    @property
    def _per_row(self) -> int:
        return self.shape[-1] // self.block.elements

    @property
    def _stored_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], self._per_row * self.block.bytes)

    # --- stored -> weight ------------------------------------------------------------------------------------------------

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        stored = self.take(tensors, self.name, "uint8", self._stored_shape)
        beside = {name: self.take(tensors, name, "float32", shape) for name, shape in self.beside}
        if stored.device.type == "meta":
            leaves = self._empty("meta")
        else:
            fields = fields_of_blocks(self.encoding, stored.reshape(-1, stored.shape[-1]))
            self._check(fields)
            leaves = {name: field.view(*self.shape[:-1], field.shape[-1]) for name, field in fields.items()}
        for name, scale in beside.items():
            if scale.device.type != "meta" and not bool(torch.isfinite(scale).all()):
                raise CorruptFile(f"tensor {name!r} holds NaN or infinity")
        return self._weight(leaves, beside)

    def _empty(self, device: str) -> dict[str, Tensor]:
        """Leaves without contents."""
        return {
            name: torch.empty(*self.shape[:-1], self._per_row * count, dtype=getattr(torch, dtype), device=device)
            for name, (dtype, count) in fields_of(self.encoding).items()
        }

    def _check(self, fields: Leaves) -> None:
        for name in ("d", "dmin", "m"):
            if name not in fields:
                continue
            numbers = fields[name]
            if self.encoding == "MXFP4":
                bad = numbers == 255
            elif numbers.is_floating_point():
                bad = ~torch.isfinite(numbers)
            else:
                continue
            if bool(bad.any()):
                row, place = torch.nonzero(bad)[0].tolist()
                raise CorruptFile(
                    f"tensor {self.name!r}: the scale {name!r} of row {row}, block "
                    f"{place * self._per_row // bad.shape[1]} is "
                    f"{'NaN' if self.encoding == 'MXFP4' else numbers[row, place].item()}"
                )

    def _weight(self, leaves: dict[str, Tensor], beside: Leaves) -> Weight:
        device = str(next(iter(leaves.values())).device)
        tree = TREES[self.encoding]({**leaves, **constants(self.encoding, self.shape[-1], device)})
        extras: dict[str, Any] = {"sums": leaves["sums"]} if "sums" in leaves else {}
        if "scale" in beside:
            tree = Scaled(tree, scale=Values(beside["scale"].view(*self.shape[:-2], 1, 1)))
        extras.update({name: tensor for name, tensor in beside.items() if name != "scale"})
        return Weight(tree, self.dtype, extras=extras)

    def scheme(self) -> Weight:
        return self._weight(self._empty("meta"), {name: meta("float32", *shape) for name, shape in self.beside})

    # --- weight -> stored ------------------------------------------------------------------------------------------------

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        scheme = self.scheme()
        if weight.structure() != scheme.structure() or tuple(weight.shape) != tuple(self.shape):
            raise NotRepresentable(
                f"a {type(weight.tree).__name__} {tuple(weight.shape)} of another form has no {self.encoding} blocks; "
                "requantize it"
            )
        leaves = self._leaves(weight)
        beside = {name: leaves[name].reshape(shape) for name, shape in self.beside}
        device = leaves["d"].device
        blocks = torch.empty(self._stored_shape, dtype=torch.uint8, device=device)
        if device.type != "meta":
            self._check_constants(leaves)
            fields = {
                name: leaves[name].reshape(-1, self._per_row * count)
                for name, (_, count) in fields_of(self.encoding).items()
            }
            blocks_of(self.encoding, fields, blocks.view(-1, blocks.shape[-1]))
        return {self.name: blocks, **beside}

    def _leaves(self, weight: Weight) -> dict[str, Tensor]:
        """Tensors of the weight by field name; the scheme's tree says which is which."""
        marks = {
            **self._empty("meta"),
            **{name: meta("float32", *shape) for name, shape in self.beside},
            **constants(self.encoding, self.shape[-1], "meta"),
        }
        tree = TREES[self.encoding](marks)
        if "scale" in marks:
            tree = Scaled(tree, scale=Values(marks["scale"]))
        names = {id(tensor): name for name, tensor in marks.items()}
        found = {
            names[id(mark)]: tensor for mark, tensor in zip(tensors_of(tree), tensors_of(weight.tree), strict=True)
        }
        missing = {"sums"} & set(marks) | {name for name, _ in self.beside} - {"scale"}
        for name in missing:
            if name not in weight.extras:
                raise NotRepresentable(
                    f"{self.encoding} stores {name!r}, which the weight does not have among its extras"
                )
            found[name] = weight.extras[name]
        return found

    def _check_constants(self, leaves: Leaves) -> None:
        for name, fixed in constants(self.encoding, self.shape[-1], str(leaves["d"].device)).items():
            if leaves[name].shape != fixed.shape or not torch.equal(leaves[name], fixed):
                raise NotRepresentable(
                    f"{self.encoding} has a fixed {name!r}, and the weight has another one; requantize it"
                )

    def algorithm_options(self) -> dict[str, object]:
        """The block type, and what the inputs say of the weight's columns."""
        found: dict[str, object] = {"kind": self.encoding}
        return found if self.importance is None else {**found, "importance": self.importance}


@functools.lru_cache(maxsize=64)
def fields_of(encoding: str) -> dict[str, tuple[str, int]]:
    """Dtype and count, in one block, of every field of a type."""
    block = torch.zeros(1, 1, BY_NAME[encoding].bytes, dtype=torch.uint8)
    return {
        name: (str(field.dtype).removeprefix("torch."), field.shape[-1])
        for name, field in UNPACK[encoding](block).items()
    }


@encoder("fields_of_blocks")
def fields_of_blocks(encoding: str, stored: Tensor) -> dict[str, Tensor]:
    """uint8 [rows, bytes] -> every field, [rows, n]."""
    kind, rows = BY_NAME[encoding], stored.shape[0]
    per_row = stored.shape[1] // kind.bytes
    found: dict[str, Tensor] = {}
    for name, (dtype, count) in fields_of(encoding).items():
        found[name] = torch.empty(rows, per_row * count, dtype=getattr(torch, dtype), device=stored.device)
    for start, stop in row_chunks(rows, per_row * kind.elements, CHUNK):
        for name, part in UNPACK[encoding](stored[start:stop].unflatten(-1, (per_row, kind.bytes))).items():
            found[name][start:stop] = part.flatten(-2)
    return found


@encoder("blocks_of")
def blocks_of(encoding: str, fields: Leaves, blocks: Tensor) -> Tensor:
    """The way back, into `blocks`."""
    kind, counts = BY_NAME[encoding], fields_of(encoding)
    per_row = blocks.shape[1] // kind.bytes
    for start, stop in row_chunks(blocks.shape[0], per_row * kind.elements, CHUNK):
        own = {name: fields[name][start:stop].unflatten(-1, (per_row, count)) for name, (_, count) in counts.items()}
        blocks[start:stop] = PACK[encoding](own).flatten(-2)
    return blocks


# --- trees -----------------------------------------------------------------------------------------------------------------


def _of(packed: Tensor, bits: int, signed: bool = False) -> Codes:
    return Codes(packed, bits, packed.shape[-1] * 8 // bits, signed)


def _scales(f: Leaves, bits: int, blocks: int, *, signed: bool = False, levels: str | None = None) -> Grid:
    """`blocks` scales of a super-block, multiples of its d."""
    return Grid(_of(f["sc"], bits, signed), scale=Values(f["d"]), levels=levels, block=(1, blocks))


def _simple(
    bits: int, block: int, *, signed: bool = False, levels: str | None = None, minimum: bool = False
) -> Callable[[Leaves], Node]:
    """d * q (+ m)."""

    def tree(f: Leaves) -> Node:
        offset = Values(f["m"]) if minimum else None
        return Grid(_of(f["q"], bits, signed), scale=Values(f["d"]), offset=offset, levels=levels, block=(1, block))

    return tree


def _with_minimums(bits: int, scale_bits: int, block: int) -> Callable[[Leaves], Node]:
    """d * sc * q - dmin * mn."""

    def tree(f: Leaves) -> Node:
        count = 256 // block
        offset = Grid(_of(f["mn"], scale_bits), scale=Values(f["dmin"], negated=True), block=(1, count))
        return Grid(_of(f["q"], bits), scale=_scales(f, scale_bits, count), offset=offset, block=(1, block))

    return tree


def _nested(
    bits: int, scale_bits: int, block: int, *, signed: bool = False, levels: str | None = None
) -> Callable[[Leaves], Node]:
    """d * sc * q, sc signed."""

    def tree(f: Leaves) -> Node:
        scale = _scales(f, scale_bits, 256 // block, signed=True)
        return Grid(_of(f["q"], bits, signed), scale=scale, levels=levels, block=(1, block))

    return tree


def _points(table: str, bits: int, wide: int, sign_bits: int, block: int, levels: str) -> Callable[[Leaves], Node]:
    """Points of a table for `wide` elements, signs (a bit each, or 7 bits for 8), scales of four bits."""

    def tree(f: Leaves) -> Node:
        signs: Node = _of(f["signs"], sign_bits)
        if sign_bits == 7:
            signs = Codebook(signs, "even_signs", (1, 8))
        scale = _scales(f, 4, 256 // block, levels=levels)
        return Codebook(_of(f["q"], bits), table, (1, wide), scale, signs, (1, block))

    return tree


def _iq1_s(f: Leaves) -> Node:
    """d * (2 sc + 1) * (point + shift): the point is a code of its own, the shift a zero of -1/8 or 1/8."""
    point = Codebook(_of(f["q"], 11), "iq1", (1, 8))
    zero = Grid(_of(f["shift"], 1), levels="eighth")
    return Grid(point, scale=_scales(f, 3, 8, levels="odd"), zero=zero, block=(1, 32))


def _iq1_m(f: Leaves) -> Node:
    """As IQ1_S, but a shift for every point: the table has each point twice, shifted up and down."""
    return Codebook(_of(f["q"], 12), "iq1_shifted", (1, 8), _scales(f, 3, 16, levels="odd"), None, (1, 16))


def _tq1_0(f: Leaves) -> Node:
    """A byte is five digits (of the last four bytes, four), which lie 32, 16 or 4 elements apart."""
    fives, fours = (
        Codebook(_of(f["fives"], 8), "base3_5", (1, 5)),
        Codebook(_of(f["fours"], 8), "base3_4", (1, 4)),
    )
    digits = Permute(Columns((fives, fours)), f["index"])
    return Grid(digits, scale=Values(f["d"]), levels="from_minus_one", block=(1, 256))


TREES.update({
    "Q4_0": _simple(4, 32, signed=True),
    "Q4_1": _simple(4, 32, minimum=True),
    "Q5_0": _simple(5, 32, signed=True),
    "Q5_1": _simple(5, 32, minimum=True),
    "Q8_0": _simple(8, 32, signed=True),
    "Q8_1": _simple(8, 32, signed=True),
    "Q8_K": _simple(8, 256, signed=True),
    "Q1_0": _simple(1, 128, levels="binary"),
    "Q2_0": _simple(2, 64, levels="from_minus_one"),
    "TQ2_0": _simple(2, 256, levels="from_minus_one"),
    "TQ1_0": _tq1_0,
    "IQ4_NL": _simple(4, 32, levels="iq4_nl"),
    "MXFP4": lambda f: Grid(_of(f["q"], 4), scale=Values(f["d"], levels="e8m0"), levels="e2m1", block=(1, 32)),
    "NVFP4": lambda f: Grid(_of(f["q"], 4), scale=Values(f["d"], levels="ue4m3"), levels="e2m1", block=(1, 16)),
    "Q2_K": _with_minimums(2, 4, 16),
    "Q4_K": _with_minimums(4, 6, 32),
    "Q5_K": _with_minimums(5, 6, 32),
    "Q3_K": _nested(3, 6, 16, signed=True),
    "Q6_K": _nested(6, 8, 16, signed=True),
    "IQ4_XS": _nested(4, 6, 32, levels="iq4_nl"),
    "IQ2_XXS": _points("iq2_xxs", 8, 8, 7, 32, "odd_eighths"),
    "IQ2_XS": _points("iq2_xs", 9, 8, 7, 16, "odd_eighths"),
    "IQ2_S": _points("iq2_s", 10, 8, 1, 16, "odd_eighths"),
    "IQ3_XXS": _points("iq3_xxs", 8, 4, 7, 32, "odd_quarters"),
    "IQ3_S": _points("iq3_s", 9, 4, 1, 32, "odd"),
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
})  # fmt: skip


@functools.lru_cache(maxsize=256)
def constants(encoding: str, columns: int, device: str) -> dict[str, Tensor]:
    """Tensors of a type's trees that are the same in every file. Shared: never write into them."""
    return {"index": digit_places(columns).to(device)} if encoding == "TQ1_0" else {}
