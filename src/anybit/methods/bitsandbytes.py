"""bitsandbytes: NF4 and FP4 in blocks of the flattened weight, with optional nested scales, and LLM.int8.

Stored for a 4-bit weight [out, in] of n numbers (suffixes of `weight.`; a stack of experts has them under its own name):
    weight              storage dtype [ceil(n/2) / itemsize, 1]   one byte = hhhhllll   h = code[2b], l = code[2b + 1]
    absmax              float32 [ceil(n/blocksize)]; nested: uint8
    quant_map           float32 [16]; always the table of the type
    nested_absmax, nested_quant_map                               float32 [blocks/256], [256]; nested only
    quant_state.bitsandbytes__nf4 (or __fp4)                      JSON as uint8: type, block size, dtype, shape, nested_offset
and for LLM.int8: weight int8 [out, in], SCB float32 [out] (largest magnitude of each row), weight_format uint8 = 0.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import torch
from anybit.errors import (
    ConfigError,
    CorruptFile,
    InvalidOption,
    MissingTensor,
    NoKernel,
    NotRepresentable,
    ShapeMismatch,
)
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin, difference
from anybit.quantizers.matching import matching_pattern
from anybit.quantizers.options import DtypeOption, check_names, check_type
from anybit.quantizers.registry import register_quantization_config, register_quantizer
from anybit.weight import levels, nodes
from anybit.weight.activation import Activation, activation_rule
from anybit.weight.layout import Layout, ModuleInfo, join_name, meta
from anybit.weight.weight import Weight, row_chunks

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weight.nodes import Node

STORAGE_DTYPES = ("float16", "float32", "int8", "uint8", "float64", "bfloat16")
QUANT_TYPES = ("nf4", "fp4")
WEIGHT_DTYPES = ("float16", "bfloat16", "float32")
BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256  # what bitsandbytes uses when it quantizes
LIMIT_STATE = 16 << 10  # bytes of JSON; bitsandbytes writes less than 200
LONGEST_OFFSET = -1.1754943508222875e-38  # no float32 is longer in JSON


@register_quantization_config("bitsandbytes_8bit")
@register_quantization_config("bitsandbytes_4bit")
@dataclass(eq=False, repr=False)
class BitsAndBytesConfig(QuantizationConfigMixin):
    """One class for both widths; exactly one of `load_in_4bit` and `load_in_8bit` selects the quantizer."""

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: Any = DtypeOption("float32")  # noqa: RUF009 - a descriptor
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: Any = DtypeOption("uint8", STORAGE_DTYPES)  # noqa: RUF009 - a descriptor

    method: ClassVar[str] = "bitsandbytes"
    claims: ClassVar[tuple[str, ...]] = ("load_in_4bit", "load_in_8bit")

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get(name)
        super().__setattr__(name, value)
        if name in self.claims and self.__dict__.get("load_in_4bit") and self.__dict__.get("load_in_8bit"):
            self.__dict__[name] = before
            raise InvalidOption(
                "BitsAndBytesConfig: load_in_4bit and load_in_8bit are both true; a module has one width. Set one of them to False"
            )

    def post_init(self) -> None:
        for name in (
            "load_in_4bit", "load_in_8bit", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
            "bnb_4bit_use_double_quant",
        ):  # fmt: skip
            check_type(self, name, bool)
        check_type(self, "llm_int8_threshold", float)
        check_type(self, "bnb_4bit_quant_type", str)
        check_type(self, "llm_int8_skip_modules", list, None)
        check_names(self, "llm_int8_skip_modules")

    @classmethod
    def modernize(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        for name in cls.claims:  # private copies that transformers leaks into files
            config_dict.pop(f"_{name}", None)
            if config_dict.get(name) is None:
                config_dict.pop(name, None)
        if type(config_dict.get("llm_int8_threshold")) is int:
            config_dict["llm_int8_threshold"] = float(config_dict["llm_int8_threshold"])
        return config_dict

    def dispatch_key(self) -> str:
        if self.load_in_4bit or self.load_in_8bit:
            return f"{self.method}_{'4bit' if self.load_in_4bit else '8bit'}"
        raise ConfigError(
            "BitsAndBytesConfig: neither load_in_4bit nor load_in_8bit is true, so the width is unknown. Set one of them, "
            "e.g. BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')"
        )

    def is_quantizable(self) -> bool:
        """Whether a width is selected."""
        return self.load_in_8bit or self.load_in_4bit

    def quantization_method(self) -> str | None:
        """ "llm_int8", "fp4", "nf4", or None when no width is selected."""
        if self.load_in_8bit:
            return "llm_int8"
        return self.bnb_4bit_quant_type if self.load_in_4bit and self.bnb_4bit_quant_type in ("fp4", "nf4") else None

    def own_dict(self) -> dict[str, Any]:
        own = super().own_dict()
        return {**own, "_load_in_4bit": own["load_in_4bit"], "_load_in_8bit": own["load_in_8bit"]}

    def to_diff_dict(self) -> dict[str, Any]:
        return difference(self, BitsAndBytesConfig())


# --- 4 bit -------------------------------------------------------------------------------------------------------------


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
                f"{math.prod(self.shape)} weights of 4 bits are no whole number of {self.storage}; use bnb_4bit_quant_storage='uint8'"
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
        if lead and size % (2 * self.blocksize):
            raise NotRepresentable(
                f"the blocks of {self.blocksize} of a stack {self.shape} run from one expert into the next; store experts apart"
            )
        whole_rows = columns % self.blocksize == 0 and columns % 2 == 0
        shape = (*lead, rows, columns) if whole_rows else (*lead, 1, size)
        codes = nodes.Codes(_swapped(tensors[self.own]).view(*shape[:-1], (shape[-1] + 1) // 2), 4, shape[-1])
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
                _check_finite(found[self.name(suffix)], self.name(suffix))
        stored_map, table = found[self.name("quant_map")], self._quant_map(raw.device)
        if not torch.equal(stored_map.view(torch.int32), table.view(torch.int32)):
            raise CorruptFile(
                f"tensor {self.name('quant_map')!r} is {stored_map.tolist()}, which is not the {self.quant_type} table that every "
                "reader uses instead of it"
            )
        offset = torch.tensor([state.nested_offset], dtype=torch.float32, device=raw.device)
        return self._weight(found, offset, {self.state_name: raw} if self.verbatim else {})

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        _check_form(self, weight)
        grid = _body(weight.tree)
        codes, scale = grid.codes, _body(grid.scale)
        packed = _swapped(codes.packed.reshape(-1)).view(getattr(torch, self.storage)).view(-1, 1)
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
        groups = repeated[::times].contiguous()
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


def _swapped(packed: Tensor) -> Tensor:
    """Bytes of any dtype, flat, with their halves exchanged; a few megabytes at a time."""
    stored = packed.reshape(-1).view(torch.uint8)
    swapped = torch.empty_like(stored)
    for part, target in zip(stored.split(1 << 21), swapped.split(1 << 21)):
        torch.bitwise_left_shift(part, 4, out=target)
        target |= part >> 4
    return swapped


def _body(node: Any) -> Any:
    """What lies below a change of shape."""
    while isinstance(node, (nodes.View, nodes.Transpose, nodes.Scaled)):
        node = node.child
    return node


def _check_finite(tensor: Tensor, name: str) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        place = int((~torch.isfinite(tensor)).nonzero()[0])
        raise CorruptFile(
            f"tensor {name!r} holds {float(tensor[place])} at {place}; scales are finite. Fetch the file again"
        )


def _check_form(layout: Layout, weight: Weight) -> None:
    """NotRepresentable unless the weight has the layout's tree, with tensors of its dtypes and shapes."""

    def form(of: Weight) -> tuple[str, list[tuple[Any, ...]]]:
        tensors = nodes.tensors_of(of.tree)
        return Weight(of.tree, layout.dtype).structure(), [(tensor.dtype, *tensor.shape) for tensor in tensors]

    if form(weight) != form(layout.scheme()):
        raise NotRepresentable(
            f"a {type(weight.tree).__name__} of shape {weight.shape} has not the form of {type(layout).__name__} {layout.shape}; "
            "quantize it anew (allow_lossy=True)"
        )


# --- 8 bit -------------------------------------------------------------------------------------------------------------

ONE_127TH = 7.874015718698502e-3  # as a float32; bitsandbytes multiplies with it instead of dividing


@dataclass(frozen=True)
class LlmInt8Layout(Layout):
    """`threshold`: inputs at least this large are multiplied unquantized; 0 for none."""

    threshold: float = 6.0
    has_format: bool = True

    algorithm: ClassVar[str | None] = "absmax"

    def algorithm_options(self) -> dict[str, object]:
        return {"through": "float16"}

    def _weight(self, codes: Tensor, scales: Tensor, factor: Tensor) -> Weight:
        grid = nodes.Grid(
            nodes.Codes(codes.view(torch.uint8), 8, self.shape[-1], signed=True), nodes.Values(scales.view(-1, 1))
        )
        return Weight(
            nodes.Scaled(grid, nodes.Values(factor)), self.dtype, Activation("llm_int8", threshold=self.threshold)
        )

    def scheme(self) -> Weight:
        return self._weight(meta("int8", *self.shape), meta("float32", self.shape[0]), meta("float32", 1, 1))

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        codes = self.take(tensors, "weight", "int8", self.shape)
        scales = self.take(tensors, "SCB", "float32", self.shape[:1])
        _check_finite(scales, "SCB")
        if self.has_format and (found := int(self.take(tensors, "weight_format", "uint8", ()))) != 0:
            raise CorruptFile(
                f"tensor 'weight_format' is {found}: the codes lie in an old order for NVIDIA cards that nothing reads any more, "
                "bitsandbytes included. Save the model again with the bitsandbytes that wrote it"
            )
        return self._weight(codes, scales, torch.full((1, 1), ONE_127TH, device=codes.device))

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        _check_form(self, weight)
        tree: Any = weight.tree
        factor = tree.scale.tensor
        if not factor.is_meta and float(factor) != ONE_127TH:
            raise NotRepresentable(
                f"LLM.int8 rows are scaled by 1/127, not by {float(factor)}; quantize the weight anew"
            )
        found = {"SCB": tree.child.scale.tensor.reshape(-1), "weight": tree.child.codes.packed.view(torch.int8)}
        if self.has_format:
            found["weight_format"] = torch.zeros((), dtype=torch.uint8, device=factor.device)
        return found


@activation_rule("llm_int8")
def llm_int8(x: Tensor, weight: Weight, bias: Tensor | None, product: Any) -> Tensor:
    """Rows of the input become int8, columns with an outlier in any row stay in its dtype. As bitsandbytes in eval mode."""
    assert weight.activation is not None
    halves, threshold = x.to(torch.float16), weight.activation.threshold
    outliers = halves.abs() >= threshold if threshold > 0 else torch.zeros_like(halves, dtype=torch.bool)
    columns = outliers.any(0).nonzero()[:, 0]
    halves = halves.masked_fill(outliers, 0)
    largest = halves.abs().amax(1).to(torch.float32)
    codes = torch.round(halves * (127.0 / largest)[:, None]).masked_fill_((largest == 0)[:, None], 0)
    codes[:, columns] = 0
    found = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    start = 0
    for part in _row_parts(weight.tree):
        for first, last in row_chunks(*part.shape):
            rows = slice(first, last)
            stored, scales = part.child.codes.integers(rows, slice(0, part.shape[1])), part.child.scale.tensor[rows, 0]
            sums = _integer_product(codes, stored)
            own = sums * (largest[:, None] * scales[None]) * 6.200124e-05  # 1 / 127**2
            if bias is not None:
                own += bias[start + first : start + last]
            own = own.to(x.dtype)
            if len(columns):
                dense = stored[:, columns] * scales[:, None] * part.scale.tensor
                own = own.addmm(x[:, columns], dense.to(x.dtype).t())
            found[:, start + first : start + last] = own
        start += part.shape[0]
    return found


def _row_parts(tree: Any) -> list[Any]:
    """The matrices that lie one above the other."""
    if isinstance(tree, nodes.Rows):
        return [one for part in tree.parts for one in _row_parts(part)]
    if (
        isinstance(tree, nodes.Scaled)
        and isinstance(tree.child, nodes.Grid)
        and isinstance(tree.child.codes, nodes.Codes)
    ):
        return [tree]
    raise NoKernel(
        f"LLM.int8 multiplies rows of 8-bit integers, not a {type(tree).__name__}; dequantize the weight first"
    )


def _integer_product(left: Tensor, right: Tensor) -> Tensor:
    """float32 integers [tokens, in] x int8 [rows, in] -> int32 [tokens, rows]. 1024 products of 7 bits are exact in float32."""
    total = torch.zeros(left.shape[0], right.shape[0], dtype=torch.int32, device=left.device)
    for a, b in zip(left.split(1024, 1), right.split(1024, 1)):
        total += (a @ b.to(torch.float32).t()).to(torch.int32)
    return total


# --- quantizers ----------------------------------------------------------------------------------------------------------


class _BnbQuantizer(HfQuantizer):
    layouts_available = True

    def skipped_modules(self) -> Sequence[str] | None:
        skipped: Sequence[str] | None = self.quantization_config.llm_int8_skip_modules
        return skipped

    def why_not(self, module: ModuleInfo) -> str | None:
        """Why a dense module is not quantized, or None."""
        pattern = matching_pattern(module.name, self.modules_to_not_convert)
        if pattern is not None:
            return f"{pattern!r} is among the modules not to convert"
        if module.kind == "embedding" or module.class_name not in ("Linear", "Conv1D") and module.kind != "experts":
            return f"bitsandbytes quantizes Linear and Conv1D layers and stacks of experts, not a {module.class_name}"
        return None

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if not self.should_convert(module):
            return None
        reason = self.why_not(module)
        if reason is not None:
            self.skip_reasons[module.name] = reason
            return None
        return self.new_layout(replace(module, dtype=module.dtype if module.dtype in WEIGHT_DTYPES else "float32"))

    def new_layout(self, module: ModuleInfo) -> Layout:
        raise NotImplementedError


def _contradiction(module: ModuleInfo, stored: Mapping[str, Any], name: str, says: str, holds: str) -> ShapeMismatch:
    return ShapeMismatch(
        f"{module.name}: the configuration says {says}, but tensor {stored[name].name!r} in {stored[name].file} belongs to a weight "
        f"of {holds}. Set load_in_4bit or load_in_8bit in quantization_config as the file was written"
    )


@register_quantizer("bitsandbytes_4bit")
class Bnb4BitHfQuantizer(_BnbQuantizer):
    """NF4 and FP4."""

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        super().validate_environment(*args, device_map=device_map, **kwargs)
        if self.quantization_config.bnb_4bit_quant_type not in QUANT_TYPES:
            raise InvalidOption(
                f"BitsAndBytesConfig: bnb_4bit_quant_type is {self.quantization_config.bnb_4bit_quant_type!r}; it must be 'nf4' or 'fp4'"
            )

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        if "SCB" in stored:
            raise _contradiction(module, stored, "SCB", "load_in_4bit", "8 bits")
        own = "" if module.kind == "experts" else "weight"
        others = [name for name in stored if name != own and name.startswith(f"{own}." if own else "")]
        if not others:
            return None
        start = join_name(own, "quant_state.bitsandbytes__") if own else "quant_state.bitsandbytes__"
        states = [name for name in others if name in (start + "nf4", start + "fp4")]
        if len(states) != 1:
            kind = self.quantization_config.bnb_4bit_quant_type
            near = [stored[name].name for name in others if "quant_state" in name]
            raise MissingTensor(
                f"tensor {join_name(module.name, start + kind)!r} is not stored, or not once; it tells how the 4-bit weight was "
                f"quantized. There are {near or [stored[name].name for name in others]}"
            )
        info = stored[states[0]]
        if info.nbytes > LIMIT_STATE or info.dtype != "uint8" or len(info.shape) != 1:
            raise ShapeMismatch(
                f"tensor {info.name!r} in {info.file} is {info.dtype} {info.shape}, expected a short JSON text as uint8"
            )
        raw = peek(states[0]).numpy().tobytes()
        state = QuantState.parse(raw, info.name)
        turned = state.shape != module.shape and state.shape == (*module.shape[:-2], module.shape[-1], module.shape[-2])
        if state.shape != module.shape and not turned:
            raise ShapeMismatch(
                f"tensor {info.name!r} in {info.file} is of a weight {state.shape}, {module.name} is {module.shape}"
            )
        storage = stored[own].dtype if own in stored else "uint8"
        if storage not in STORAGE_DTYPES:
            raise ShapeMismatch(
                f"tensor {stored[own].name!r} in {stored[own].file} is {storage}; 4-bit codes are {', '.join(STORAGE_DTYPES)}"
            )
        return Bnb4BitLayout(
            module.shape, state.dtype, state.quant_type, state.blocksize, state.nested_blocksize, storage, own, turned,
            len(raw), verbatim=raw != state.to_bytes(),
        )  # fmt: skip

    def new_layout(self, module: ModuleInfo) -> Layout:
        config = self.quantization_config
        layout = Bnb4BitLayout(
            module.shape, module.dtype, config.bnb_4bit_quant_type,
            nested_blocksize=NESTED_BLOCKSIZE if config.bnb_4bit_use_double_quant else None,
            storage=str(config.bnb_4bit_quant_storage).removeprefix("torch."),
            own="" if module.kind == "experts" else "weight",
        )  # fmt: skip
        try:
            layout.scheme()
        except NotRepresentable as error:
            raise InvalidOption(f"{module.name}: {error}") from error
        return layout


@register_quantizer("bitsandbytes_8bit")
class Bnb8BitHfQuantizer(_BnbQuantizer):
    """LLM.int8."""

    def why_not(self, module: ModuleInfo) -> str | None:
        if module.kind == "experts":
            return "LLM.int8 has no form for a stack of experts; load_in_4bit has one"
        if self.quantization_config.llm_int8_has_fp16_weight:
            return "llm_int8_has_fp16_weight keeps weights in 16 bit"
        return super().why_not(module)

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        for name in stored:
            if "quant_state.bitsandbytes__" in name:
                raise _contradiction(module, stored, name, "load_in_8bit", "4 bits")
        if not ({"SCB", "weight_format"} & set(stored) or ("weight" in stored and stored["weight"].dtype == "int8")):
            return None
        return LlmInt8Layout(
            module.shape, module.dtype, self.quantization_config.llm_int8_threshold, "weight_format" in stored
        )

    def new_layout(self, module: ModuleInfo) -> Layout:
        return LlmInt8Layout(module.shape, module.dtype, self.quantization_config.llm_int8_threshold)
