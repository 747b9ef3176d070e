"""Latent attention (DeepSeek's): keys and values are expanded from a short vector by one matrix, which newer files keep in two.

In the checkpoint: kv_b_proj [heads * (nope + value), rank], for each head its rows for the key, then those for the value.
In a file: attn_k_b [heads, rank, nope], so that it multiplies queries; attn_v_b [heads, value, rank].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("attn_k_b", "attn_v_b")
DENSE = "llama.cpp keeps it in two matrices, of which one is turned: no block of it would be one of theirs"


def whole_shape(shapes: Sequence[tuple[int, ...]], settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Shape of kv_b_proj; None if the two do not belong together, or to the settings."""
    if any(len(shape) != 3 for shape in shapes):
        return None
    (heads, rank, nope), values = shapes[0], shapes[1]
    wanted = tuple(settings[name] for name in ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"))
    if (heads, rank, nope, values[1]) != wanted or (values[0], values[2]) != (heads, rank):
        return None
    return heads * (nope + values[1]), rank


def join(encodings: Sequence[str], shapes: Sequence[tuple[int, ...]], dtype: str, tensors: list[Tensor]) -> Tensor:
    """The two -> kv_b_proj, dense."""
    keys, values = (_numbers(*one).to(getattr(torch, dtype)) for one in zip(encodings, shapes, tensors, strict=True))
    return torch.cat([keys.transpose(1, 2), values], 1).flatten(0, 1)


def _numbers(encoding: str, shape: tuple[int, ...], tensor: Tensor) -> Tensor:
    if not encoding:
        return tensor
    from anybit.methods._gguf_layout import GgufLayout

    layout = GgufLayout(shape, "float32", encoding)
    return layout.decode({layout.name: tensor}).to_dense(torch.float32)


def cut(settings: Mapping[str, Any], part: int, dtype: str, tensor: Tensor) -> Tensor:
    """kv_b_proj -> one of the two."""
    heads, nope = settings["num_attention_heads"], settings["qk_nope_head_dim"]
    rows = tensor.reshape(heads, -1, tensor.shape[-1])
    found = rows[:, nope:] if part else rows[:, :nope].transpose(1, 2)
    return found.contiguous().to(getattr(torch, dtype))


def part_shapes(settings: Mapping[str, Any]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes of the two in a file."""
    heads, rank = settings["num_attention_heads"], settings["kv_lora_rank"]
    return (heads, rank, settings["qk_nope_head_dim"]), (heads, settings["v_head_dim"], rank)
