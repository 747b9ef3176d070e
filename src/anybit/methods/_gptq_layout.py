"""How GPTQ stores one weight. Columns share a scale and a zero point per group; `g_idx` names the group of each column.

Stored: qweight int32 [in*bits/32, out], qzeros int32 [groups, out*bits/32], scales [groups, out], g_idx int32 [in].
Codes are one little-endian stream, of qweight along the inputs, of qzeros along the outputs; planar ones see `_words.PLANES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.errors import CorruptFile, NotRepresentable
from anybit.methods._words import fitted, read_codes, require_finite, require_zeros, word_count, write_codes
from anybit.weight import packing
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import Codes, Grid, Values
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

# 1 in every field of a word: gptqmodel subtracts and adds it to whole words, so that a field of 0 borrows from the next one
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True)
class GptqLayout(Layout):
    """`zeros`: how qzeros become zero points, see `_read_zeros`. `index`: what g_idx is, see `_index_kind`.

    `zero_bias`: dtype of a bias the checkpoint stores, all zero, for a layer that has none.
    """

    bits: int = 4
    group_size: int = 128
    scale_dtype: str = "float16"
    zeros: str = "v1"
    planar: bool = False
    index: str = "plain"
    symmetric: bool = True
    zero_bias: str | None = None

    algorithm = "rtn"

    @property
    def groups(self) -> int:
        return -(-self.shape[1] // self.group_size)

    def ordered(self) -> Layout | None:
        return replace(self, index="columns")

    def algorithm_options(self) -> dict[str, object]:
        return {"ranges": partial(ranges, bits=self.bits, symmetric=self.symmetric)}

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        rows, columns = self.shape
        specs: dict[str, tuple[str, tuple[int, ...]]] = {
            "qweight": ("int32", (word_count(columns, self.bits), rows)),
            "qzeros": ("int32", (self.groups, word_count(rows, self.bits))),
            "scales": (self.scale_dtype, (self.groups, rows)),
        }
        if self.index != "absent":
            specs["g_idx"] = ("int32", (columns,))
        if self.zero_bias is not None:
            specs["bias"] = (self.zero_bias, (rows,))
        return specs

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        found = {name: self.take(tensors, name, *spec) for name, spec in self.specs().items()}
        words, zero_words, scales = found["qweight"], found["qzeros"], found["scales"]
        if self.zero_bias is not None:
            require_zeros("bias", found["bias"])
        codes = read_codes(words.T, self.bits, self.shape[1], "qweight", self.planar)
        zeros = self._read_zeros(zero_words)
        zero = Codes.of(zeros.T, self._zero_bits)
        scale = Values(require_finite("scales", scales).T.contiguous())
        return self._weight(codes, scale, zero, self._read_index(found.get("g_idx")))

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        grid = fitted(weight, self)
        assert isinstance(grid.codes, Codes)
        assert isinstance(grid.zero, Codes)
        assert isinstance(grid.scale, Values)
        stored = {
            "qweight": packing.turned(write_codes(grid.codes, self.planar).T),
            "qzeros": self._write_zeros(grid.zero.integers().T),
            "scales": grid.scale.tensor.T.contiguous(),
        }
        device = stored["scales"].device
        if self.index != "absent":
            stored["g_idx"] = grid.group_index if grid.group_index is not None else self._known_index(device)
        if self.zero_bias is not None:
            stored["bias"] = torch.zeros(self.shape[0], dtype=getattr(torch, self.zero_bias), device=device)
        return stored

    def scheme(self) -> Weight:
        rows, columns = self.shape
        codes = Codes(meta("uint8", rows, -(-columns * self.bits // 8)), self.bits, columns)
        zero = Codes(meta("uint8", rows, -(-self.groups * self._zero_bits // 8)), self._zero_bits, self.groups)
        index = meta("int32", columns) if self.index == "columns" else None
        return self._weight(codes, Values(meta(self.scale_dtype, rows, self.groups)), zero, index)

    def _weight(self, codes: Codes, scale: Values, zero: Codes, index: Tensor | None) -> Weight:
        block = (1, 1 if index is not None else self.group_size)
        return Weight(Grid(codes, scale, zero, block=block, group_index=index), self.dtype)

    # --- zero points ---

    @property
    def _zero_bits(self) -> int:
        return self.bits + (self.zeros == "v1_unmasked")

    def _read_zeros(self, words: Tensor) -> Tensor:
        """qzeros -> zero points [groups, out].

        "v2": as stored. "v1": minus one, exactly undone: over whole words where fields do not cross them, else per field modulo
        2**bits (gptqmodel from 0.9.0). "v1_unmasked": stored + 1 up to 2**bits, as AutoGPTQ computes. "v1_agreed": the file's
        maker is unknown but both readings agree, because no field is all ones.
        """
        top = (1 << self.bits) - 1
        if self.zeros == "v1" and self.bits in ONES:
            words = words + ONES[self.bits]
        fields = read_codes(words, self.bits, self.shape[0], "qzeros", self.planar).integers().to(torch.int32)
        if self.zeros == "v1_agreed" and bool((fields == top).any()):
            raise CorruptFile(
                f"tensor 'qzeros' stores {top} for some zero points, which gptqmodel reads as 0 and AutoGPTQ as {top + 1}, "
                "though the configuration says sym: true. Set sym: false, or name the maker, e.g. "
                '"meta": {"quantizer": ["gptqmodel:0.9.0"]}'
            )
        if self.zeros == "v2" or (self.zeros == "v1" and self.bits in ONES):
            return fields
        return (fields + 1) & top if self.zeros == "v1" else fields + 1

    def _write_zeros(self, zeros: Tensor) -> Tensor:
        fields = zeros.to(torch.int32)
        whole_words = self.zeros == "v1" and self.bits in ONES
        if self.zeros != "v2" and not whole_words:
            fields = fields - 1
            if self.zeros == "v1":
                fields = fields & ((1 << self.bits) - 1)
            elif fields.device.type != "meta" and bool((fields < 0).any() | (fields >> self.bits).any()):
                raise NotRepresentable(
                    f"a zero point of {int(zeros.min())} or {int(zeros.max())} is outside 1..{1 << self.bits}, where readers of "
                    "checkpoint_format 'gptq' disagree; write checkpoint_format 'gptq_v2'"
                )
        words = write_codes(Codes.of(fields, self.bits), self.planar)
        return words - ONES[self.bits] if whole_words else words

    # --- g_idx ---

    def _known_index(self, device: torch.device) -> Tensor:
        index = torch.arange(self.shape[1], dtype=torch.int32, device=device)
        return torch.zeros_like(index) if self.index == "unused" else index // self.group_size

    def _read_index(self, index: Tensor | None) -> Tensor | None:
        """The groups of the columns, None where they are runs of `group_size`."""
        if index is None:
            return None
        if self.index == "columns":
            if bool((index < 0).any() | (index >= self.groups).any()):
                raise CorruptFile(
                    f"tensor 'g_idx' names groups {int(index.min())} to {int(index.max())}, but there are {self.groups} (0 to "
                    f"{self.groups - 1}); the file is damaged or has another group_size"
                )
            return index
        if not torch.equal(index, self._known_index(index.device)):
            raise CorruptFile(
                f"tensor 'g_idx' is not the plain index in groups of {self.group_size} that it was when planned"
            )
        return None


def ranges(low: Tensor, high: Tensor, *, bits: int, symmetric: bool) -> dict[str, Tensor]:
    """Scale and zero point of gptqmodel's and AutoGPTQ's quantizer, float32.

    Zero lies inside the range. Symmetric: of both signs, twice the magnitude over all codes but one; a block without negative
    weights keeps zero as its lower end, so that its upper half is cut off.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = torch.where(low < 0, -high, low)
    steps = (1 << bits) - 1
    empty = (high - low) / steps == 0
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale = (high - low) / steps
    return {"scale": scale, "zero": torch.full_like(scale, 1 << (bits - 1)) if symmetric else torch.round(-low / scale)}
