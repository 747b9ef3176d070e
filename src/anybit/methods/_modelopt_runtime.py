"""What ModelOpt does to inputs and outputs beside quantizing them.

AWQ leaves a factor for each input where it could not be folded away: pre_quant_scale [in]. SVDQuant leaves what the codes do
not hold as two thin matrices: y += (x a^T) b^T, svdquant_lora_a [rank, in] and svdquant_lora_b [out, rank], x scaled first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.errors import CorruptFile, MissingTensor, ShapeMismatch
from anybit.quantizers.attachments import Attachment, attach_after, attach_before

if TYPE_CHECKING:
    from torch import Tensor

NAME = "pre_quant_scale"
LOW_RANK = ("svdquant_lora_a", "svdquant_lora_b")


class PreScaled(Attachment):
    """Before a layer: its input times the stored factors, in the input's dtype."""

    def __call__(self, module: Any, arguments: Any) -> Any:
        x, *others = arguments
        return (x * module._buffers[NAME].to(x.dtype), *others)


class Residual(Attachment):
    """After a layer: what its two thin matrices make of its input, which is scaled already."""

    def __call__(self, module: Any, arguments: Any, output: Any) -> Any:
        x = arguments[0]
        first, second = (module._buffers[name].to(x.dtype) for name in LOW_RANK)
        return output + (x @ first.T) @ second.T


@dataclass
class Sides:
    """Keys of the buffers in the state dict, and what makes dense weights, by parameter, do without."""

    keys: set[str] = field(default_factory=set)
    folds: dict[str, Callable[[Any], Any]] = field(default_factory=dict)


def attach_sides(model: Any, checkpoint: Any, path_of: Callable[[str], str | None]) -> Sides:
    """Buffers and hooks for all stored factors and thin matrices of linear layers."""
    sides = Sides()
    wanted = (NAME, *LOW_RANK)
    for key in checkpoint.tensors:
        layer, _, own = key.rpartition(".")
        path = path_of(layer) if own in wanted else None
        if path is None or f"{path}.{own}" in sides.keys:
            continue
        module = model.get_submodule(path)
        factors = pair = None
        if f"{layer}.{NAME}" in checkpoint.tensors:
            factors = _read(checkpoint, f"{layer}.{NAME}", (getattr(module, "in_features", None),))
            attach_before(module, PreScaled(), first=True)
            _hold(module, path, NAME, factors, sides)
        if any(f"{layer}.{name}" in checkpoint.tensors for name in LOW_RANK):
            pair = _pair(checkpoint, layer, module)
            attach_after(module, Residual())
            for name, matrix in zip(LOW_RANK, pair, strict=True):
                _hold(module, path, name, matrix, sides)
        sides.folds[f"{path}.weight"] = partial(_folded, factors, pair)
    return sides


def _pair(checkpoint: Any, layer: str, module: Any) -> tuple[Tensor, Tensor]:
    for name in LOW_RANK:
        if f"{layer}.{name}" not in checkpoint.tensors:
            raise MissingTensor(f"tensor '{layer}.{name}' is not stored, and the other of the two matrices is")
    rank = checkpoint.tensors[f"{layer}.{LOW_RANK[0]}"].shape[0]
    shapes = ((rank, getattr(module, "in_features", None)), (getattr(module, "out_features", None), rank))
    first, second = (_read(checkpoint, f"{layer}.{name}", shape) for name, shape in zip(LOW_RANK, shapes, strict=True))
    return first, second


def _read(checkpoint: Any, key: str, shape: tuple[int | None, ...]) -> Tensor:
    """A copy of a stored tensor of floats, checked."""
    info = checkpoint.tensors[key]
    if info.dtype not in ("float32", "bfloat16", "float16") or tuple(info.shape) != shape:
        raise ShapeMismatch(
            f"tensor {key!r} in {info.file} is {info.dtype} {tuple(info.shape)}; its layer needs floats {shape}"
        )
    found: Tensor = checkpoint.read(key).clone()
    if not bool(torch.isfinite(found).all()):
        raise CorruptFile(f"tensor {key!r} in {info.file} holds NaN or infinity; a damaged file, get it again")
    return found


def _hold(module: Any, path: str, name: str, like: Tensor, sides: Sides) -> None:
    module.register_buffer(name, torch.empty(like.shape, dtype=like.dtype, device="meta"))
    sides.keys.add(f"{path}.{name}")


def _folded(factors: Tensor | None, pair: tuple[Tensor, Tensor] | None, dense: Tensor) -> Tensor:
    """A dense weight with the residual added and its columns scaled."""
    if pair is not None:
        first, second = (matrix.to(dense.device, torch.float32) for matrix in pair)
        dense = dense + (second @ first).to(dense.dtype)
    return dense if factors is None else dense * factors.to(dense.device, dense.dtype)
