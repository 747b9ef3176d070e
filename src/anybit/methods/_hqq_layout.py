"""How HQQ stores one weight. W, flattened, is cut into groups: the rows (axis 1) or the columns (axis 0) of a matrix M.

    axis 1:  M = W.reshape(-1, group)          axis 0:  M = W.reshape(group, -1)          value = (code - zero) * scale

Codes are packed along the rows of M, in equal blocks, the first in the highest bits. For 4 bits and `step` rows of words:

    word[r]:  hhhhllll      h = M[r]   l = M[step + r]            3 bits: ten blocks in the lower 30 bits of an int32

Every setting of a layer is a tensor of its own: numbers, 0 or 1 for flags, text as bytes. Old files also quantize scale and zero
in the same way (`scale_q`, `meta_scale.*`), or keep both in one tensor (`zero_scale`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from anybit._lazy import torch
from anybit.errors import CorruptFile, NotRepresentable
from anybit.methods._words import packed_codes, require_finite, unpacked_codes
from anybit.weight import packing
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import Codes, Grid, Node, Values, View
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

Setting = bool | int | float | str
FLOATS = ("float16", "bfloat16", "float32")


class Packing(NamedTuple):
    """`blocks` of rows share a word of type `word`, `bits` each."""

    bits: int
    blocks: int
    word: str


PACKINGS = {
    "8bit_u8": Packing(8, 1, "uint8"), "4bit_u8": Packing(4, 2, "uint8"), "3bit_32": Packing(3, 10, "int32"),
    "2bit_u8": Packing(2, 4, "uint8"), "1bit_u8": Packing(1, 8, "uint8"),
}  # fmt: skip
PACKING_OF = {
    8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1.58: "2bit_u8", 1: "1bit_u8",
}  # fmt: skip


@dataclass(frozen=True)
class Grouped:
    """One quantized matrix: the weight, or its scales or zero points. `group` None: all of it is one group.

    `stored_as`: dtype of the words; a float when their bytes are viewed as numbers.
    """

    shape: tuple[int, int]
    bits: int
    group: int | None
    axis: int
    packing: str
    stored_as: str
    compute: str

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of M."""
        count = math.prod(self.shape)
        if self.group is None:
            return self.shape
        return (count // self.group, self.group) if self.axis == 1 else (self.group, count // self.group)

    @property
    def parameters(self) -> tuple[int, ...]:
        """Shape of scale and zero."""
        rows, columns = self.matrix
        if self.group is None:
            return ()
        return (rows, 1) if self.axis == 1 else (1, columns)

    @property
    def words(self) -> tuple[int, int]:
        """Shape of the stored codes."""
        form, (rows, columns) = PACKINGS[self.packing], self.matrix
        ratio = {"uint8": 1, "int32": 4}[form.word], _ITEMSIZE[self.stored_as]
        return (-(-rows // form.blocks), columns * ratio[0] // ratio[1])

    @property
    def in_rows(self) -> bool:
        """Whether groups are runs of columns of the matrix itself, so that it needs no other shape."""
        return self.group is None or (self.axis == 1 and self.shape[1] % self.group == 0)

    # --- stored <-> node ---

    def node(self, name: str, words: Tensor, scale: Node, zero: Node) -> Node:
        """`scale` and `zero` have the shape that `parameter_shape` tells."""
        codes = self._codes(name, words)
        if self.in_rows:
            codes = codes.view(self.shape)
        return self._tree(packed_codes(codes, self.bits, codes.shape[1]), scale, zero)

    def _tree(self, codes: Codes, scale: Node, zero: Node) -> Node:
        block = (1, self.group) if self.in_rows and self.group is not None else (1, 1)
        grid = Grid(codes, scale, zero, block=block, compute=self.compute)
        return grid if self.in_rows else View(grid, *self.shape)

    def scheme(self, scale: Node, zero: Node) -> Node:
        rows, columns = self.shape if self.in_rows else self.matrix
        codes = Codes(meta("uint8", rows, packing.row_bytes(columns, self.bits)), self.bits, columns)
        return self._tree(codes, scale, zero)

    @property
    def parameter_shape(self) -> tuple[int, int]:
        """How scale and zero lie in the tree."""
        if self.group is None:
            return (1, 1)
        if self.in_rows:
            return (self.shape[0], self.shape[1] // self.group)
        return (self.matrix[0], 1) if self.axis == 1 else (1, self.matrix[1])

    def _codes(self, name: str, words: Tensor) -> Tensor:
        """uint8 M."""
        form, (rows, columns) = PACKINGS[self.packing], self.matrix
        if self.stored_as != form.word:
            flat = words.contiguous().reshape(-1).view(getattr(torch, form.word))
            words = flat.view(-1, columns)
        step = words.shape[0]
        codes = torch.empty(form.blocks * step, columns, dtype=torch.uint8, device=words.device)
        mask = (1 << form.bits) - 1
        for block in range(form.blocks):
            shift = form.bits * (form.blocks - 1 - block)
            codes[block * step : (block + 1) * step] = (words >> shift) & mask
        spare = form.bits * form.blocks
        if form.word == "int32" and bool((words >> spare).any()):
            raise CorruptFile(f"tensor {name!r} has bits set above the {spare} that {self.packing} uses")
        if bool(codes[rows:].any()):
            raise CorruptFile(
                f"tensor {name!r} has codes in the {len(codes) - rows} rows that only fill up its words; it was written for "
                "another shape"
            )
        if self.bits < form.bits and bool((codes >> self.bits).any()):
            raise CorruptFile(f"tensor {name!r} holds the code {int(codes.max())}, its layer has {self.bits} bits")
        return codes[:rows]

    def stored(self, codes: Codes) -> Tensor:
        form, (rows, columns) = PACKINGS[self.packing], self.matrix
        matrix = unpacked_codes(codes).view(rows, columns)
        step = -(-rows // form.blocks)
        matrix = torch.nn.functional.pad(matrix, (0, 0, 0, form.blocks * step - rows)).view(form.blocks, step, columns)
        words = torch.zeros(step, columns, dtype=getattr(torch, form.word), device=matrix.device)
        for block in range(form.blocks):
            words |= matrix[block].to(words.dtype) << (form.bits * (form.blocks - 1 - block))
        if self.stored_as != form.word:
            words = words.reshape(-1).view(getattr(torch, self.stored_as)).view(self.words)
        return words


_ITEMSIZE = {"uint8": 1, "int32": 4, "float16": 2, "bfloat16": 2, "float32": 4}


def as_tensor(value: Any) -> Tensor:
    """A setting as hqq's safetensors flavour stores it."""
    if isinstance(value, bool):
        return torch.tensor(int(value), dtype=torch.uint8)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int32)
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float32)
    if isinstance(value, str):
        return torch.tensor(list(value.encode()), dtype=torch.uint8)
    return torch.tensor(list(value), dtype=torch.int64)


def spec_of(value: Any) -> tuple[str, tuple[int, ...]]:
    """dtype and shape of `as_tensor(value)`."""
    if isinstance(value, (str, tuple)):
        return ("uint8" if isinstance(value, str) else "int64", (len(value),))
    return ("uint8" if isinstance(value, bool) else "int32" if isinstance(value, int) else "float32", ())


@dataclass(frozen=True)
class HqqLayout(Layout):
    """`settings`: what is stored beside the numbers, shapes aside, by relative name; "meta_scale." and "meta_zero." are those
    of quantized scales and zero points. `words`: dtype of W_q; `parameter_dtypes`: of scale and zero (innermost).
    """

    settings: tuple[tuple[str, Setting], ...] = ()
    words: str = "uint8"
    parameter_dtypes: tuple[str, str] = ("float16", "float16")
    together: bool = False

    algorithm = "hqq"

    def __post_init__(self) -> None:
        assert dict(self.settings), "a layer has settings"

    # --- what the settings say ---

    @functools.cached_property
    def known(self) -> dict[str, Setting]:
        return dict(self.settings)

    @functools.cached_property
    def grouped(self) -> Grouped:
        known, (rows, columns) = self.known, self.shape
        axis = int(known["axis"])
        group = int(known["group_size"]) if "group_size" in known else columns if axis == 1 else rows
        return Grouped(
            (rows, columns), _bits(known["nbits"]), group, axis, str(known["packing"]), self.words, self.compute
        )

    @property
    def compute(self) -> str:
        return str(self.known["compute_dtype"]).removeprefix("torch.")

    def parameter(self, name: str) -> Grouped | None:
        """How "scale" or "zero" is quantized; None when it is plain numbers."""
        start = f"meta_{name}."
        own = {key.removeprefix(start): value for key, value in self.settings if key.startswith(start)}
        if not own:
            return None
        shape = self.grouped.parameters
        assert len(shape) == 2
        group = int(own["group_size"]) if "group_size" in own else None
        return Grouped(
            shape, _bits(own["nbits"]), group, int(own["axis"]), str(own["packing"]), "uint8",
            str(own["compute_dtype"]).removeprefix("torch."),
        )  # fmt: skip

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        specs: dict[str, tuple[str, tuple[int, ...]]] = {"W_q": (self.words, self.grouped.words)}
        parts = {}
        for name, dtype in zip(("scale", "zero"), self.parameter_dtypes, strict=True):
            quantized = self.parameter(name)
            if quantized is None:
                parts[name] = (dtype, self.grouped.parameters)
                continue
            parts[f"{name}_q"] = (quantized.stored_as, quantized.words)
            specs[f"meta_{name}.shape"] = ("int64", (2,))
            for own in ("scale", "zero"):
                specs[f"meta_{name}.{own}"] = (dtype, quantized.parameters)
        if self.together:
            dtype, shape = next(iter(parts.values()))
            parts = {"zero_scale": (dtype, (2, *shape))}
        settings = {name: spec_of(value) for name, value in self.settings}
        return {**specs, **parts, "shape": ("int64", (2,)), **settings}

    # --- decode, encode ---

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        found = {name: self.take(tensors, name, *spec) for name, spec in self.specs().items()}
        self._check_settings(found)
        if self.together:
            both, suffix = found["zero_scale"], "_q" if self.parameter("scale") is not None else ""
            found[f"zero{suffix}"], found[f"scale{suffix}"] = both[0], both[1]
        scale, zero = self._parameter_node("scale", found), self._parameter_node("zero", found)
        return Weight(self.grouped.node("W_q", found["W_q"], scale, zero), self.dtype)

    def _check_settings(self, found: Mapping[str, Tensor]) -> None:
        wanted: dict[str, Any] = {**self.known, "shape": self.shape}
        for name in ("scale", "zero"):
            if self.parameter(name) is not None:
                wanted[f"meta_{name}.shape"] = self.grouped.parameters
        for name, value in wanted.items():
            if not torch.equal(found[name].cpu(), as_tensor(value)):
                raise CorruptFile(
                    f"tensor {name!r} holds {found[name].tolist()}, not {value!r} as when the layer was planned"
                )

    def _parameter_node(self, name: str, found: Mapping[str, Tensor]) -> Node:
        quantized, label = self.parameter(name), "zero_scale" if self.together else name
        if quantized is None:
            numbers = require_finite(label, found[name])
            return Values(numbers.reshape(self.grouped.parameter_shape).contiguous())
        inner = []
        for own in ("scale", "zero"):
            numbers = require_finite(f"meta_{name}.{own}", found[f"meta_{name}.{own}"])
            inner.append(Values(numbers.reshape(quantized.parameter_shape).contiguous()))
        label = label if self.together else f"{name}_q"
        return _reshaped(quantized.node(label, found[f"{name}_q"], *inner), self.grouped.parameter_shape)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        grid = self._grid(weight)
        assert isinstance(grid.codes, Codes)
        stored = {"W_q": self.grouped.stored(grid.codes)}
        parts: dict[str, Tensor] = {}
        for name, node in (("scale", grid.scale), ("zero", grid.zero)):
            assert node is not None
            quantized = self.parameter(name)
            if quantized is None:
                assert isinstance(node, Values)
                parts[name] = node.tensor.reshape(self.grouped.parameters)
                continue
            inner = _inside(node)
            assert isinstance(inner.codes, Codes)
            parts[f"{name}_q"] = quantized.stored(inner.codes)
            for own, numbers in (("scale", inner.scale), ("zero", inner.zero)):
                assert isinstance(numbers, Values)
                stored[f"meta_{name}.{own}"] = numbers.tensor.reshape(quantized.parameters)
            stored[f"meta_{name}.shape"] = as_tensor(self.grouped.parameters)
        if self.together:
            suffix = "" if "zero" in parts else "_q"
            parts = {"zero_scale": torch.stack([parts[f"zero{suffix}"], parts[f"scale{suffix}"]])}
        settings = {name: as_tensor(value) for name, value in self.settings}
        stored = {**stored, **parts, "shape": as_tensor(self.shape), **settings}
        device = weight.device
        return {name: tensor.to(device) for name, tensor in stored.items()}

    def _grid(self, weight: Weight) -> Grid:
        scheme = self.scheme()
        forms = [[(tensor.dtype, tensor.shape) for tensor in own.tensors] for own in (weight, scheme)]
        if weight.structure() != scheme.structure() or forms[0] != forms[1]:
            own = self.grouped
            raise NotRepresentable(
                f"HqqLayout stores {own.bits}-bit codes in groups of {own.group} along axis {own.axis} of a weight {self.shape} "
                f"in {self.dtype}; this weight is a {type(weight.tree).__name__} of shape {tuple(weight.shape)} in "
                f"{weight.dtype}. Requantize it to that layout"
            )
        return _inside(weight.tree)

    def scheme(self) -> Weight:
        nodes: list[Node] = []
        for name, dtype in zip(("scale", "zero"), self.parameter_dtypes, strict=True):
            quantized, shape = self.parameter(name), self.grouped.parameter_shape
            if quantized is None:
                nodes.append(Values(meta(dtype, *shape)))
            else:
                inner = [Values(meta(dtype, *quantized.parameter_shape)) for _ in range(2)]
                nodes.append(_reshaped(quantized.scheme(*inner), shape))
        return Weight(self.grouped.scheme(*nodes), self.dtype)

    def algorithm_options(self) -> dict[str, object]:
        known = self.known
        levels = round(2 ** float(known["nbits"]) - 1)
        return {
            "top": levels, "group": self.grouped.group, "axis": self.grouped.axis,
            "round_zero": bool(known.get("round_zero", False)), "optimize": bool(known.get("optimize", True)),
        }  # fmt: skip


def _bits(nbits: Setting) -> int:
    """Bits of a code: 1.58 is three values in two bits."""
    return 2 if nbits == 1.58 or (isinstance(nbits, float) and abs(nbits - 1.58) < 1e-6) else int(nbits)


def _reshaped(node: Node, shape: tuple[int, int]) -> Node:
    if node.shape == shape:
        return node
    return View(node.child if isinstance(node, View) else node, *shape)


def _inside(node: Node) -> Grid:
    grid = node.child if isinstance(node, View) else node
    assert isinstance(grid, Grid)
    return grid
