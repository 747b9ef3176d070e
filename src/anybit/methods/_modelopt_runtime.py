"""What ModelOpt does to inputs beside quantizing them: AWQ leaves a factor for each input where it could not be folded away."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.errors import CorruptFile, ShapeMismatch
from anybit.quantizers.attachments import Attachment, attach_before

if TYPE_CHECKING:
    from torch import Tensor

NAME = "pre_quant_scale"


class PreScaled(Attachment):
    """Before a layer: its input times the stored factors, in the input's dtype."""

    def __call__(self, module: Any, arguments: Any) -> Any:
        x, *others = arguments
        return (x * module._buffers[NAME].to(x.dtype), *others)


def attach_pre_scales(
    model: Any, checkpoint: Any, path_of: Callable[[str], str | None]
) -> tuple[set[str], dict[str, Callable[[Any], Any]]]:
    """Buffers and hooks for all stored factors of linear layers: (state dict keys, what makes dense weights do without)."""
    keys: set[str] = set()
    folds: dict[str, Callable[[Any], Any]] = {}
    for key, info in checkpoint.tensors.items():
        path = path_of(key.removesuffix(f".{NAME}")) if key.endswith(f".{NAME}") else None
        if path is None:
            continue
        module = model.get_submodule(path)
        columns = getattr(module, "in_features", None)
        if info.dtype not in ("float32", "bfloat16", "float16") or tuple(info.shape) != (columns,):
            raise ShapeMismatch(
                f"tensor {key!r} in {info.file} is {info.dtype} {tuple(info.shape)}; {path} has {columns} inputs, and a factor "
                "for each"
            )
        factors = checkpoint.read(key)
        if not bool(torch.isfinite(factors).all()):
            raise CorruptFile(f"tensor {key!r} in {info.file} holds NaN or infinity; a damaged file, get it again")
        module.register_buffer(NAME, torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta"))
        attach_before(module, PreScaled(), first=True)
        keys.add(f"{path}.{NAME}")
        folds[f"{path}.weight"] = partial(_scale_columns, factors.clone())
    return keys, folds


def _scale_columns(factors: Tensor, dense: Tensor) -> Tensor:
    return dense * factors.to(dense.device, dense.dtype)
