"""Scales behind an activation function: AWQ's ScaledActivation, y = act(x) / scales, one number for each of its outputs.

AutoAWQ smooths a layer by the inverse scales in the layer before it. Where an activation function that bends lies between the
two (falcon, mpt, gptj, gpt_neox, gpt_bigcode, bloom, starcoder2), it stores `<mlp>.<act>.scales` and divides at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.errors import CorruptFile, UnexpectedTensor
from anybit.quantizers.attachments import Attachment, attach_after

if TYPE_CHECKING:
    from torch import Tensor

# the layers whose output goes into such an activation function, in transformers' classes
BEFORE = ("c_fc", "dense_h_to_4h", "up_proj", "fc_in")


class DividedOutput(Attachment):
    """The output of a module divided by its buffer `scales`."""

    def __call__(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output / module.scales.to(output.dtype)


def attach_scales(
    model: Any, checkpoint: Any, path_of: Callable[[str], str | None]
) -> tuple[set[str], dict[str, Callable[[Tensor], Tensor]]]:
    """Give the model's activation functions the scales that are stored for them: (buffer keys, folds of the layers behind)."""
    attached: set[str] = set()
    folds: dict[str, Callable[[Tensor], Tensor]] = {}
    for name in [name for name in checkpoint.tensors if name.endswith(".scales")]:
        path = path_of(name.removesuffix(".scales"))
        module = model.get_submodule(path) if path is not None else None
        if module is None or any(True for _ in module.parameters()):
            continue  # a layer's own scales
        scales = _checked(name, checkpoint.read(name))
        parent = str(path).rpartition(".")[0]
        behind = [
            own
            for own, layer in model.get_submodule(parent).named_children()
            if own not in BEFORE and getattr(layer, "in_features", None) == scales.numel()
        ]
        if len(behind) != 1:
            raise UnexpectedTensor(
                f"tensor {name!r} divides {scales.numel()} outputs of an activation function (AWQ's ScaledActivation), but "
                f"{parent} has {len(behind)} layers that could take them ({', '.join(behind) or 'none'}); expected one"
            )
        module.register_buffer("scales", torch.empty(scales.shape, dtype=scales.dtype, device="meta"))
        attach_after(module, DividedOutput())
        attached.add(f"{path}.scales")
        folds[f"{parent}.{behind[0]}.weight"] = partial(_divide_columns, scales.clone())
    return attached, folds


def _checked(name: str, scales: Tensor) -> Tensor:
    """Numbers that one can divide by, one for each output."""
    if scales.dim() != 1 or not scales.is_floating_point():
        raise CorruptFile(
            f"tensor {name!r} is {scales.dtype} {tuple(scales.shape)}; scales of an activation are a list of numbers"
        )
    if not bool((torch.isfinite(scales) & (scales != 0)).all()):
        raise CorruptFile(f"tensor {name!r} holds zero, NaN or infinity, by which no output can be divided")
    return scales


def _divide_columns(scales: Tensor, dense: Tensor) -> Tensor:
    """The dense weight [out, in] of the layer behind, for inputs that are not divided."""
    return dense / scales.to(device=dense.device, dtype=dense.dtype)
