"""bitsandbytes' 4-bit weights: NF4 and FP4 in blocks of the flattened weight, their scales perhaps nested.

Stored for a weight [out, in] of n numbers, after `weight.` (a stack of experts has them after its own name):
    (the codes)         storage dtype [ceil(n/2) / itemsize, 1]   one byte = hhhhllll   h = code[2b], l = code[2b + 1]
    absmax              float32 [ceil(n/blocksize)]; nested: uint8, codes of nested_quant_map
    quant_map           float32 [16]; always the table of the type
    nested_absmax, nested_quant_map                               float32 [ceil(blocks/256)], [256]; nested only
    quant_state.bitsandbytes__nf4 (or __fp4)                      JSON as uint8: type, block size, dtype, shape, nested_offset
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import torch
from anybit.errors import CorruptFile, MissingTensor, NotRepresentable, ShapeMismatch
from anybit.weight import levels, nodes, packing
from anybit.weight.layout import Layout, meta
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weight.nodes import Node

QUANT_TYPES = {"nf4": "nf4", "fp4": "fp4_bnb"}  # bitsandbytes' name -> the value table's
WEIGHT_DTYPES = ("float16", "bfloat16", "float32")
BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256  # what bitsandbytes uses when it quantizes
LIMIT_STATE = 16 << 10  # bytes of JSON; bitsandbytes writes less than 200
LONGEST_OFFSET = -1.1754943508222875e-38  # no float32 is longer in JSON


@dataclass(frozen=True)
class QuantState:
    """What bitsandbytes keeps in the JSON beside a 4-bit weight."""

    quant_type: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    nested_blocksize: int | None = None
    nested_offset: float = 0.0

    def to_bytes(self) -> bytes:
        """As bitsandbytes writes it."""
        values = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }
        if self.nested_blocksize is not None:
            values |= {
                "nested_blocksize": self.nested_blocksize, "nested_dtype": "float32", "nested_offset": self.nested_offset
            }  # fmt: skip
        return json.dumps(values).encode()

    @classmethod
    def parse(cls, raw: bytes, name: str) -> QuantState:
        """CorruptFile, naming the tensor, for anything bitsandbytes would not write there."""
        try:
            values = json.loads(raw.decode())
        except (ValueError, RecursionError) as error:
            raise CorruptFile(f"tensor {name!r} is not JSON ({error}): {raw[:60]!r}. Fetch the file again") from None
        nested = isinstance(values, dict) and any(key.startswith("nested_") for key in values)
        wanted: dict[str, Callable[[Any], bool]] = {
            "quant_type": lambda value: value in QUANT_TYPES and name.endswith(f"__{value}"),
            "blocksize": _is_count,
            "dtype": lambda value: value in WEIGHT_DTYPES,
            "shape": lambda value: isinstance(value, list) and len(value) in (2, 3) and all(map(_is_count, value)),
        }
        if nested:
            wanted |= {
                "nested_blocksize": _is_count,
                "nested_dtype": lambda value: value == "float32",
                "nested_offset": lambda value: type(value) in (int, float) and abs(value) < 3e38,
            }
        if not isinstance(values, dict) or set(values) != set(wanted):
            raise CorruptFile(f"tensor {name!r} holds {raw[:200]!r}, not an object with {', '.join(wanted)}")
        for key, legal in wanted.items():
            if not legal(values[key]):
                raise CorruptFile(
                    f"tensor {name!r} says {key} = {values[key]!r}, which no {name.rpartition('__')[2]} weight has"
                )
        if nested:  # the number that counts is a float32
            values["nested_offset"] = struct.unpack("f", struct.pack("f", values["nested_offset"]))[0]
        values.pop("nested_dtype", None)
        return cls(**{**values, "shape": tuple(values["shape"])})


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 40


@dataclass(frozen=True)
class Bnb4BitLayout(Layout):
    """`own`: name of the codes, before the other names. `turned`: [in, out] was quantized. `storage`: dtype the bytes go by.

    `state_bytes`: length of the stored JSON, None while its nested offset is not known; `verbatim`: it is not as bitsandbytes
    would write it, and is kept.
    """

    quant_type: str = "nf4"
    blocksize: int = BLOCKSIZE
    nested_blocksize: int | None = None
    storage: str = "uint8"
    own: str = "weight"
    turned: bool = False
    state_bytes: int | None = None
    verbatim: bool = False

    algorithm: ClassVar[str | None] = "absmax"

    def algorithm_options(self) -> dict[str, object]:
        return {} if self.nested_blocksize is None else {"nested_block": self.nested_blocksize}

    # --- names and sizes ---

    def name(self, suffix: str) -> str:
        return f"{self.own}.{suffix}" if self.own else suffix

    @property
    def state_name(self) -> str:
        return self.name(f"quant_state.bitsandbytes__{self.quant_type}")

    def shrinking(self) -> frozenset[str]:
        nested = self.nested_blocksize is not None  # the JSON then holds a number, written out
        return frozenset({self.state_name}) if nested and self.state_bytes is None else frozenset()

    def state(self, offset: float) -> QuantState:
        *lead, rows, columns = self.shape
        shape = (*lead, columns, rows) if self.turned else self.shape
        return QuantState(self.quant_type, self.blocksize, self.dtype, shape, self.nested_blocksize, offset)

    @property
    def table(self) -> str:
        return {"nf4": "nf4", "fp4": "fp4_bnb"}[self.quant_type]

    @property
    def blocks(self) -> int:
        return -(-math.prod(self.shape) // self.blocksize)

    def _stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """All but the JSON."""
        itemsize = getattr(torch, self.storage).itemsize
        size, odd = divmod((math.prod(self.shape) + 1) // 2, itemsize)
        if odd:
            raise NotRepresentable(
                f"{math.prod(self.shape)} weights of 4 bits are no whole number of {self.storage}; "
                "use bnb_4bit_quant_storage='uint8'"
            )
        nested = self.nested_blocksize is not None
        found = {
            self.own: (self.storage, (size, 1)),
            self.name("absmax"): ("uint8" if nested else "float32", (self.blocks,)),
            self.name("quant_map"): ("float32", (16,)),
        }
        if self.nested_blocksize is not None:
            found[self.name("nested_absmax")] = ("float32", (-(-self.blocks // self.nested_blocksize),))
            found[self.name("nested_quant_map")] = ("float32", (256,))
        return found

    # --- the tree ---

    def _weight(self, tensors: Mapping[str, Tensor], offset: Tensor, extras: Mapping[str, Tensor]) -> Weight:
        *lead, rows, columns = self.state(0.0).shape
        experts = math.prod(lead)
        size = rows * columns
        if lead and (size % self.blocksize or size % 2):
            raise NotRepresentable(
                f"the blocks of {self.blocksize} of a stack {self.shape} run from one expert into the next; store experts apart"
            )
        whole_rows = columns % self.blocksize == 0 and columns % 2 == 0
        shape = (*lead, rows, columns) if whole_rows else (*lead, 1, size)
        codes = nodes.Codes(
            packing.halves_swapped(tensors[self.own].reshape(-1).view(torch.uint8)).view(
                *shape[:-1], (shape[-1] + 1) // 2
            ),
            4,
            shape[-1],
        )
        blocks = -(-size // self.blocksize)
        scale: Node
        if self.nested_blocksize is None:
            scale = nodes.Values(tensors[self.name("absmax")].view(*shape[:-1], -1))
        else:
            # in a stack, groups of scales may run from one expert into the next: cut them where experts end
            group = math.gcd(blocks, self.nested_blocksize) if lead else self.nested_blocksize
            largest = tensors[self.name("nested_absmax")].repeat_interleave(self.nested_blocksize // group)
            scale = nodes.Grid(
                nodes.Codes(tensors[self.name("absmax")].view(*lead, 1, blocks), 8, blocks),
                nodes.Values(largest[: experts * -(-blocks // group)].view(*lead, 1, -1)),
                offset=nodes.Values(offset.view(1, 1)),
                levels=tensors[self.name("nested_quant_map")],
                block=(1, group),
            )
            scale = nodes.View(scale, rows, columns // self.blocksize) if whole_rows else scale
        tree: Node = nodes.Grid(codes, scale, levels=self.table, block=(1, self.blocksize))
        tree = tree if whole_rows else nodes.View(tree, rows, columns)
        return Weight(nodes.Transpose(tree) if self.turned else tree, self.dtype, extras=extras)

    def scheme(self) -> Weight:
        tensors = {name: meta(dtype, *shape) for name, (dtype, shape) in self._stored().items()}
        extras = {self.state_name: meta("uint8", self.state_bytes or 0)} if self.verbatim else {}
        return self._weight(tensors, meta("float32", 1), extras)

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        if self.state_name not in tensors:
            raise MissingTensor(f"tensor {self.state_name!r} is not stored; it tells how the weight was quantized")
        raw = tensors[self.state_name]
        if raw.dtype != torch.uint8 or raw.dim() != 1 or raw.numel() > LIMIT_STATE:
            raise ShapeMismatch(
                f"tensor {self.state_name!r} is {raw.dtype} {tuple(raw.shape)}, expected JSON as uint8, at most {LIMIT_STATE}"
            )
        state = QuantState.parse(raw.cpu().numpy().tobytes(), self.state_name)
        if state != self.state(state.nested_offset):
            raise ShapeMismatch(
                f"tensor {self.state_name!r} describes {state}, expected {self.state(state.nested_offset)}"
            )
        found = {name: self.take(tensors, name, dtype, shape) for name, (dtype, shape) in self._stored().items()}
        for suffix in ("absmax", "nested_absmax", "nested_quant_map"):
            if self.name(suffix) in found:
                check_finite(found[self.name(suffix)], self.name(suffix))
        stored_map, table = found[self.name("quant_map")], self._quant_map(raw.device)
        if not torch.equal(stored_map.view(torch.int32), table.view(torch.int32)):
            raise CorruptFile(
                f"tensor {self.name('quant_map')!r} is {stored_map.tolist()}, which is not the {self.quant_type} table that "
                "every reader uses in its place"
            )
        offset = torch.tensor([state.nested_offset], dtype=torch.float32, device=raw.device)
        return self._weight(found, offset, {self.state_name: raw} if self.verbatim else {})

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        check_form(self, weight)
        grid = _body(weight.tree)
        codes, scale = grid.codes, _body(grid.scale)
        packed = packing.halves_swapped(codes.packed.reshape(-1)).view(getattr(torch, self.storage)).view(-1, 1)
        found = {self.own: packed}
        offset: float | None = 0.0
        if isinstance(scale, nodes.Grid):
            found[self.name("absmax")] = scale.codes.packed.reshape(-1)  # type: ignore[attr-defined]
        else:
            found[self.name("absmax")] = scale.tensor.reshape(-1)
        found[self.name("quant_map")] = self._quant_map(packed.device)
        if isinstance(scale, nodes.Grid):
            found[self.name("nested_absmax")] = self._groups(scale.scale.tensor.reshape(-1), scale.block[1])  # type: ignore[union-attr]
            found[self.name("nested_quant_map")] = scale.levels  # type: ignore[assignment]
            middle = scale.offset.tensor  # type: ignore[union-attr]
            offset = None if packed.is_meta else float(middle)
        found[self.state_name] = self._state_tensor(weight, offset, packed.device)
        return found

    def _groups(self, repeated: Tensor, group: int) -> Tensor:
        """One scale for each run of nested_blocksize blocks, from one for each run of `group`."""
        assert self.nested_blocksize is not None
        times = self.nested_blocksize // group
        groups = repeated.index_select(0, torch.arange(0, len(repeated), times, device=repeated.device))
        if (
            times > 1
            and not repeated.is_meta
            and not torch.equal(groups.repeat_interleave(times)[: len(repeated)], repeated)
        ):
            raise NotRepresentable(
                f"scales differ inside a group of {self.nested_blocksize} blocks that two experts share; quantize the stack again"
            )
        return groups

    def _state_tensor(self, weight: Weight, offset: float | None, device: torch.device) -> Tensor:
        kept = weight.extras.get(self.state_name)
        if offset is None:  # on the meta device; without a known length, the longest there can be
            size = self.state_bytes or len(self.state(LONGEST_OFFSET).to_bytes())
            return kept if kept is not None else torch.empty(size, dtype=torch.uint8, device=device)
        state = self.state(offset)
        if kept is not None and (
            kept.is_meta or QuantState.parse(kept.cpu().numpy().tobytes(), self.state_name) == state
        ):
            return kept
        return torch.frombuffer(bytearray(state.to_bytes()), dtype=torch.uint8).to(device)

    def _quant_map(self, device: torch.device) -> Tensor:
        if device.type == "meta":
            return meta("float32", 16)
        return levels.table(self.table, str(device)) + 0.0  # a stored FP4 table has no negative zero


def _body(node: Any) -> Any:
    """What lies below a change of shape."""
    while isinstance(node, (nodes.View, nodes.Transpose, nodes.Scaled)):
        node = node.child
    return node


def check_finite(tensor: Tensor, name: str) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        place = int((~torch.isfinite(tensor)).nonzero()[0])
        raise CorruptFile(
            f"tensor {name!r} holds {float(tensor[place])} at {place}; scales are finite. Fetch the file again"
        )


def check_form(layout: Layout, weight: Weight) -> None:
    """NotRepresentable unless the weight has the layout's tree, with tensors of its dtypes and shapes."""

    def form(of: Weight) -> tuple[str, list[tuple[Any, ...]]]:
        tensors = nodes.tensors_of(of.tree)
        return Weight(of.tree, layout.dtype).structure(), [(tensor.dtype, *tensor.shape) for tensor in tensors]

    if form(weight) != form(layout.scheme()):
        raise NotRepresentable(
            f"a {type(weight.tree).__name__} of shape {weight.shape} has not the form of {type(layout).__name__} {layout.shape}; "
            "quantize it anew (allow_lossy=True)"
        )
