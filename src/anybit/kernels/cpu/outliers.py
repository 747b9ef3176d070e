"""Outliers beside a grid (SpQR; ../_outliers.py) on the CPU: a call of the library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anybit.kernels._programs import Program
from anybit.kernels.cpu import native


class SparseLeaf(Program):
    """A CSR matrix: a call of the library."""

    def __init__(self, content: dict[str, Any]):
        self.rows, self.columns = content["rows"], content["columns"]
        self.slots = [content[name]["position"] for name in ("offsets", "places", "values")]

    def into(
        self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, y: Tensor, add: bool = False, expert: int = 0
    ) -> None:
        total = y if add else torch.zeros(y.shape)
        if bias is not None:
            total += bias
        offsets, places, values = (tensors[slot] for slot in self.slots)
        native.add_sparse(offsets, places, values, x, total)
        if not add:
            y.copy_(total)

    def add_gradient(self, gradient: Tensor, tensors: list[Tensor], total: Tensor) -> None:
        offsets, places, values = (tensors[slot] for slot in self.slots)
        rows = torch.repeat_interleave(torch.arange(self.rows), offsets.diff().long())
        total.index_add_(1, places.long(), gradient.to(torch.float32)[:, rows] * values)
