"""Models that transformers 4 pickled: torchao's older classes, seen as the tensors and the header that are written today.

AffineQuantizedTensor             Int8Tensor, IntxUnpackedToInt8Tensor or Float8Tensor, whose parts they have
LinearActivationQuantizedTensor   the same with a rule for inputs that today's classes do not have: kept under its name
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from anybit._lazy import torch
from anybit.errors import CorruptFile, NotRepresentable
from anybit.methods import _torchao_data as data
from anybit.methods._torchao_layouts import OldIntxLayout

if TYPE_CHECKING:
    from torch import Tensor

TensorInfo = Any  # of a container


class Described(Protocol):
    """A pickled object as a container takes it down: its class, what it was made with, its fields."""

    path: str
    arguments: tuple[Any, ...]
    fields: dict[str, Any]


# classes of the codes -> their part of that name
IMPLEMENTATIONS = {
    "PlainAQTTensorImpl": "int_data",
    "QDQTensorImpl": "int_data",
    "Float8AQTTensorImpl": "float8_data",
    "TensorCoreTiledAQTTensorImpl": "packed_weight",
}
FLOAT_ZERO_POINT = 2  # of the enumeration ZeroPointDomain: INT 1, FLOAT 2, NONE 3


class SpelledOut:
    """A checkpoint whose wrapped tensors are parts with names of their own."""

    def __init__(self, checkpoint: Any, tensors: Mapping[str, tuple[str, TensorInfo]], metadata: Mapping[str, str]):
        self._checkpoint = checkpoint
        self._sources = {name: source for name, (source, _) in tensors.items()}
        self.tensors = {name: info for name, (_, info) in tensors.items()}
        self.metadata = {**checkpoint.metadata, **metadata}

    def read(self, name: str, *args: Any, **options: Any) -> Tensor:
        info = self.tensors[name]
        tensor: Tensor = self._checkpoint.read(self._sources[name], *args, **options)
        wanted = getattr(torch, info.dtype)
        if tensor.dtype != wanted:  # whole zero points, once kept in 64 bits
            if bool((tensor < -128).any() | (tensor > 127).any()):
                raise CorruptFile(
                    f"tensor {self._sources[name]!r} in {info.file} holds zero points from {int(tensor.min())} to "
                    f"{int(tensor.max())}, beyond 8 bits; a damaged file, get it again"
                )
            tensor = tensor.to(wanted)
        return tensor.reshape(info.shape)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)


def spelled_out(checkpoint: Any) -> Any:
    """The checkpoint itself if nothing in it is wrapped."""
    wrapped = {name: value for name, value in checkpoint.values.items() if _is_object(value)}
    if not wrapped:
        return checkpoint
    tensors = {
        name: (name, info)
        for name, info in checkpoint.tensors.items()
        if not any(name.startswith(f"{owner}.") for owner in _owners(name, wrapped))
    }
    metadata = {}
    for name, value in wrapped.items():
        record, parts = _described(name, value, checkpoint.tensors)
        owner, _, parameter = name.rpartition(".")
        metadata[name] = json.dumps(record)
        for part, (source, info) in parts.items():
            own = f"{owner}._{parameter}_{part}"
            tensors[own] = (source, dataclasses.replace(info, name=own))
    return SpelledOut(checkpoint, tensors, metadata)


def _owners(name: str, wrapped: Mapping[str, Any]) -> Iterator[str]:
    """Prefixes of a name that are wrapped tensors."""
    pieces = name.split(".")
    return (prefix for cut in range(1, len(pieces)) if (prefix := ".".join(pieces[:cut])) in wrapped)


Parts = dict[str, tuple[str, TensorInfo]]


def _described(name: str, value: Described, tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, Any], Parts]:
    """(what today's header would say, part -> (stored name, what is known of it))."""
    kind, inputs, path = _class(value), None, name
    if kind == "LinearActivationQuantizedTensor":
        function, weight = value.fields.get("input_quant_func"), value.fields.get("original_weight_tensor")
        if not _is_object(weight) or function is None or not hasattr(function, "path"):
            raise CorruptFile(f"{name}: a {kind} without weight or without a function for inputs; get the file again")
        if value.fields.get("quant_kwargs"):
            raise NotRepresentable(
                f"{name}: {function.path} is called with {value.fields['quant_kwargs']!r}, unknown here"
            )
        inputs, value, path = function.path.rpartition(".")[2], weight, f"{name}.original_weight_tensor"
        kind = _class(value)
    inner = value.fields.get("tensor_impl")
    if kind != "AffineQuantizedTensor" or not _is_object(inner) or _class(inner) not in IMPLEMENTATIONS:
        what = f"{kind} of {_class(inner)}" if _is_object(inner) else kind
        raise NotRepresentable(
            f"{name} is an old {what}, which anybit does not read (it reads AffineQuantizedTensor of "
            f"{', '.join(IMPLEMENTATIONS)}). Load it with the torchao that wrote it, and save it dense"
        )
    shape, dtype = value.arguments[2], value.arguments[1]
    found = {
        part: tensors[full]
        for part in (IMPLEMENTATIONS[_class(inner)], "scale", "zero_point", "scale_and_zero")
        if (full := f"{path}.tensor_impl.{part}") in tensors
    }
    block = [int(side) for side in value.fields.get("block_size") or shape]
    made = _Old(name, value, inner, inputs, list(shape), str(dtype), block, found)
    return made.record(), made.parts()


def _is_object(value: Any) -> TypeGuard[Described]:
    """Whether a pickled value is an object, told by its class and its fields."""
    return hasattr(value, "path") and hasattr(value, "fields")


def _class(value: Described) -> str:
    return value.path.rpartition(".")[2]


class _Old:
    """One old tensor, in the words of today."""

    def __init__(
        self, name: str, value: Described, inner: Described, inputs: str | None, shape: list[int], dtype: str,
        block: list[int], found: Mapping[str, TensorInfo],
    ):  # fmt: skip
        self.name, self.inputs, self.shape, self.dtype, self.block, self.found = (
            name,
            inputs,
            shape,
            dtype,
            block,
            found,
        )
        self.kind, self.codes = _class(inner), IMPLEMENTATIONS[_class(inner)]
        self.ends = (value.fields.get("quant_min"), value.fields.get("quant_max"))
        domain = value.fields.get("zero_point_domain")
        self.domain = domain.arguments[0] if _is_object(domain) and domain.arguments else None
        if inner.fields.get("transposed"):
            raise NotRepresentable(f"{name}: its codes are kept transposed, a form that no model file had so far")

    @property
    def bits(self) -> int:
        low, high = self.ends
        if low is None and high is None:
            return 8
        for bits in range(1, 9):
            if (low, high) == (-(1 << (bits - 1)), (1 << (bits - 1)) - 1):
                return bits
        raise NotRepresentable(f"{self.name}: codes from {low} to {high} are no signed integers of 1 to 8 bits")

    def record(self) -> dict[str, Any]:
        common: dict[str, Any] = {"block_size": self.block, "dtype": data.dtype(self.dtype)}
        parts = list(self.parts())
        if self.kind == "TensorCoreTiledAQTTensorImpl":
            self._no_inputs()
            return _record("Int4TilePackedTo4dTensor", {"block_size": self.block, "shape": self.shape}, parts)
        if self.kind == "Float8AQTTensorImpl":
            self._no_inputs()
            own = {
                "mm_config": None,
                "act_quant_kwargs": None,
                "kernel_preference": data.member("KernelPreference", "AUTO"),
            }
            return _record("Float8Tensor", {**common, **own}, parts)
        if self.domain == FLOAT_ZERO_POINT:
            raise NotRepresentable(
                f"{self.name}: integer codes with zero points that are added as numbers, unknown here"
            )
        target = {"target_dtype": data.dtype(f"int{self.bits}")}
        if self.inputs is not None:
            return _record(OldIntxLayout.tensor_class, {**target, **common, "input_quant_func": self.inputs}, parts)
        if self.bits == 8:
            return _record("Int8Tensor", {"act_quant_kwargs": None, "reduce_range": False, **common}, parts)
        return _record("IntxUnpackedToInt8Tensor", {**target, **common, "activation_quantization": None}, parts)

    def _no_inputs(self) -> None:
        if self.inputs is not None:
            raise NotRepresentable(f"{self.name}: a {self.kind} with inputs quantized by {self.inputs}, unknown here")

    def parts(self) -> Parts:
        found: Parts = {}
        blocks = tuple(size // side for size, side in zip(self.shape, self.block, strict=True))
        for part, info in self.found.items():
            new = "qdata" if part == self.codes else part
            changes: dict[str, Any] = {}
            if new in ("scale", "zero_point") and info.stride is None and _count(info.shape) == _count(blocks):
                changes["shape"] = blocks
            if new == "zero_point" and info.dtype in ("int32", "int64"):
                changes.update(dtype="int8", nbytes=_count(info.shape))
            found[new] = (info.name, dataclasses.replace(info, **changes))
        return found


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def _record(tensor_class: str, attributes: Mapping[str, Any], parts: list[str]) -> dict[str, Any]:
    return {"_type": tensor_class, "_data": dict(attributes), "_tensor_data_names": parts}
