"""Where HQQ keeps a layer's settings: as tensors (safetensors), or as plain values beside them (qmodel.pt). No method of its own.

safetensors    W_q, scale, zero, nbits, packing, ...        values encoded as tensors
qmodel.pt      W_q, scale, zero, nbits, packing, ...        plain values (hqq 0.2)
               W_q, meta.scale, meta.nbits, ...             plain values, one level down (hqq 0.1)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anybit.errors import CorruptFile, ShapeMismatch
from anybit.methods import _hqq_layout as layouts

if TYPE_CHECKING:
    from torch import Tensor

NUMBERS = ("nbits", "group_size", "axis")
TEXTS = ("packing", "unpack_view_dtype", "compute_dtype")
DTYPES = ("unpack_view_dtype", "compute_dtype")
FLAGS = (
    "view_as_float", "quant_scale", "quant_zero", "channel_wise", "optimize", "round_zero", "offload_meta",
    "stores_quant_config", "encoded_state_dict",
)  # fmt: skip
LONGEST_TEXT = 32


def setting(name: str, info: Any, peek: Callable[[str], Any]) -> Any:
    """The value a stored tensor stands for; None when its name is not that of a setting."""
    own = name.rpartition(".")[2] if name.startswith(("meta_scale.", "meta_zero.")) else name
    shape = tuple(info.shape)
    if own in NUMBERS:
        allowed = ("int32", "float32") if own == "nbits" else ("int32",)
        _check_form(info, info.dtype in allowed and shape == (), " or ".join(allowed))
        value = peek(name).item()
        _check_form(info, math.isfinite(value), "a finite number")
        return value
    if own in FLAGS:
        _check_form(info, info.dtype == "uint8" and shape == (), "uint8, 0 or 1")
        value = peek(name).item()
        if value not in (0, 1):
            raise CorruptFile(f"tensor {info.name!r} in {info.file} holds {value}; it is a flag, 0 or 1")
        return bool(value)
    if own in TEXTS:
        _check_form(
            info, info.dtype == "uint8" and len(shape) == 1 and shape[0] <= LONGEST_TEXT, "a short text as bytes"
        )
        raw = bytes(peek(name).tolist())
        if not raw.isascii():
            raise CorruptFile(f"tensor {info.name!r} in {info.file} holds {raw!r}, which is no name")
        return raw.decode("ascii")
    return None


def _check_form(info: Any, right: bool, wanted: str) -> None:
    if not right:
        raise ShapeMismatch(
            f"tensor {info.name!r} in {info.file} is {info.dtype} {tuple(info.shape)}, expected {wanted}"
        )


class SpelledOut:
    """A checkpoint whose layers keep plain values, with those as tensors and hqq 0.1's level of names taken out."""

    def __init__(self, checkpoint: Any, layers: Collection[str]):
        self._checkpoint = checkpoint
        self._original: dict[str, str] = {}
        self._made: dict[str, Tensor] = {}
        tensors: dict[str, Any] = {}
        for name, info in checkpoint.tensors.items():
            new = _flat(name, layers)
            self._original[new] = name
            tensors[new] = replace(info, name=new)
        for name, value in checkpoint.values.items():
            layer = _layer_of(name, layers)
            if layer is None or value is None or value == {}:
                continue
            new = _flat(name, layers)
            if new.rpartition(".")[2] in DTYPES:
                value = f"torch.{value}"
            if not isinstance(value, (bool, int, float, str, tuple)):
                raise CorruptFile(
                    f"{checkpoint.path}: {name!r} is {type(value).__name__} {value!r}, which no layer of hqq has"
                )
            self._add(tensors, new, value, layer)
        for layer in layers:
            self._add(tensors, f"{layer}.encoded_state_dict", True, layer)
            shape, axis = (self._made.get(f"{layer}.{name}") for name in ("shape", "axis"))
            if f"{layer}.group_size" not in tensors and shape is not None and axis is not None and shape.shape == (2,):
                # None: a whole row or column, which hqq 0.2 writes down
                self._add(tensors, f"{layer}.group_size", int(shape[1 if axis == 1 else 0]), layer)
        self.tensors: Mapping[str, Any] = tensors
        self.values: dict[str, Any] = {}

    def _add(self, tensors: dict[str, Any], name: str, value: Any, layer: str) -> None:
        tensor = layouts.as_tensor(value)
        self._made[name] = tensor
        dtype, shape = layouts.spec_of(value)
        tensors[name] = replace(
            tensors[f"{layer}.W_q"], name=name, dtype=dtype, shape=shape, nbytes=tensor.numel() * tensor.element_size()
        )

    def read(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        """The tensor, on the CPU."""
        if name in self._made:
            return self._made[name].clone()
        tensor: Tensor = self._checkpoint.read(self._original.get(name, name), *args, **kwargs)
        return tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)


def _layer_of(name: str, layers: Collection[str]) -> str | None:
    pieces = name.split(".")
    prefixes = (".".join(pieces[:cut]) for cut in range(len(pieces) - 1, 0, -1))
    return next((prefix for prefix in prefixes if prefix in layers), None)


def _flat(name: str, layers: Collection[str]) -> str:
    layer = _layer_of(name, layers)
    if layer is None or not name.startswith(f"{layer}.meta."):
        return name
    return f"{layer}.{name.removeprefix(f'{layer}.meta.')}"
