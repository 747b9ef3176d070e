"""The numbers as they are, for formats that store master weights and quantize them only when they are multiplied."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from anybit.errors import NotRepresentable
from anybit.weight.nodes import map_tensors
from anybit.weight.weight import Weight


def quantize(dense: Tensor, target: Weight) -> Weight:
    """`target`'s only tensor becomes the weight, in that tensor's dtype. NotRepresentable for any other tree."""
    found = target.tensors
    if len(found) != 1 or found[0].shape != dense.shape:
        raise NotRepresentable(
            f"a weight is kept as one tensor of its shape {tuple(dense.shape)}; this {type(target.tree).__name__} has "
            f"{[tuple(tensor.shape) for tensor in found]}. Choose an algorithm that quantizes"
        )
    kept = dense.to(found[0].dtype)
    if not bool(torch.isfinite(kept).all()):
        raise NotRepresentable(f"the weight holds NaN or infinity in {kept.dtype}; mend it, or leave the module out")
    return replace(target, tree=map_tensors(target.tree, lambda _: kept))
