"""Outliers beside a grid (SpQR; ../_outliers.py) on a GPU: a CSR matrix whose product is added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anybit.kernels._programs import Program
from anybit.kernels.triton.launching import current


class SparseLeaf(Program):
    """A CSR matrix: a launch of the function in outliers.py."""

    def __init__(self, content: dict[str, Any]):
        self.rows, self.columns = content["rows"], content["columns"]
        self.slots = [content[name]["position"] for name in ("offsets", "places", "values")]

    def into(
        self, x: Tensor, tensors: list[Tensor], bias: Tensor | None, y: Tensor, add: bool = False, expert: int = 0
    ) -> None:
        from anybit.kernels.triton.outliers import _sparse_kernel

        offsets, places, values = (tensors[slot] for slot in self.slots)
        inputs = 1 if x.shape[0] == 1 else 16
        with current(x.device):
            _sparse_kernel[(self.rows, -(-x.shape[0] // inputs))](
                x, y, x if bias is None else bias, offsets, places, values, x.shape[0], x.stride(0), x.stride(1), y.stride(0),
                BIASED=bias is not None, ADDED=add, M=inputs, K=64, num_warps=1,
            )  # fmt: skip

    def add_gradient(self, gradient: Tensor, tensors: list[Tensor], total: Tensor) -> None:
        offsets, places, values = (tensors[slot] for slot in self.slots)
        # the number of outliers is known, so that nobody waits for the device to say it
        each = torch.arange(self.rows, device=offsets.device)
        rows = torch.repeat_interleave(each, offsets.diff().long(), output_size=places.numel())
        total.index_add_(1, places.long(), gradient.to(torch.float32)[:, rows] * values)
