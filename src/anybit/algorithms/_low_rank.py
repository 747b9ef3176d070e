"""The best product of two thin matrices for one matrix."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 1024  # shorter sides are decomposed whole
SPARE, PASSES = 16, 12  # extra directions, and passes over the matrix, of subspace iteration


def factors(matrix: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(up [out, rank], down [rank, in]) whose product is nearest to `matrix` [out, in]; both carry half of each singular value.

    Large matrices by subspace iteration from a start that `seed` decides.
    """
    if min(matrix.shape) <= EXACT:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(matrix.shape[1], rank + SPARE, generator=generator).to(matrix)
        basis = torch.linalg.qr(matrix @ start).Q
        for _ in range(PASSES):
            basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
        left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ left
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
