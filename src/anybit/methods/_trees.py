"""What formats with code vectors and outliers share. No method of its own: the name starts with an underscore."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.errors import CorruptFile, NotRepresentable

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weight import Layout, Weight


def fitted_tree(weight: Weight, layout: Layout) -> Any:
    """The weight's tree if the layout can store it as it is, else NotRepresentable."""
    scheme = layout.scheme()
    same = weight.structure() == scheme.structure() and [(tensor.dtype, tensor.shape) for tensor in weight.tensors] == [
        (tensor.dtype, tensor.shape) for tensor in scheme.tensors
    ]
    if not same:
        raise NotRepresentable(
            f"{type(layout).__name__} of shape {tuple(layout.shape)}, standing for {layout.dtype}, stores a "
            f"{type(scheme.tree).__name__} of its own structure; this weight is a {type(weight.tree).__name__} of shape "
            f"{tuple(weight.shape)} standing for {weight.dtype}. Requantize it, or keep its own format"
        )
    return weight.tree


def require_permutation(name: str, index: Tensor) -> Tensor:
    """The index, int32; CorruptFile unless every input occurs once."""
    count = index.numel()
    seen = torch.zeros(count, dtype=torch.bool, device=index.device)
    inside = (index >= 0) & (index < count)
    seen[index[inside].long()] = True
    if not bool(inside.all() & seen.all()):
        raise CorruptFile(
            f"tensor {name!r} does not name each of the {count} inputs once ({int(seen.sum())} of them occur); "
            "a damaged file, get it again"
        )
    return index.to(torch.int32)


def require_below(name: str, codes: Tensor, limit: int) -> None:
    """CorruptFile when a code lies outside its table."""
    if codes.numel() and (int(codes.max()) >= limit or int(codes.min()) < 0):
        raise CorruptFile(
            f"tensor {name!r} holds codes from {int(codes.min())} to {int(codes.max())}; its table has {limit} entries"
        )
