"""A packed `nn.Embedding`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anybit.kernels import ops
from anybit.kernels._direct import unobserved
from anybit.modules.packed import PackedWeight


class QuantEmbedding(PackedWeight, nn.Embedding):  # type: ignore[override]
    """An `nn.Embedding` whose table stays packed; only the rows asked for are decoded. `dequantize()`: [vocabulary, width]."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None):
        nn.Module.__init__(self)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    def forward(self, input: Tensor) -> Tensor:
        dtype = getattr(torch, self.parts[0].layout.dtype)
        look_up = ops.embedding if unobserved(input) else torch.ops.anybit.embedding
        return look_up(input, self.packed, self.spec, self.embedding_dim, dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.form}"
