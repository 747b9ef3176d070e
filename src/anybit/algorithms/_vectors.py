"""What algorithms with codebooks share: weighted k-means, the nearest vector, and the factor that errors are passed on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from anybit.errors import NotRepresentable

POINTS = 64  # a centroid: more say nothing new about where it lies


def nearest(points: Tensor, table: Tensor) -> Tensor:
    """int64 [n]: for each point [n, d] the entry of `table` [k, d] that is closest."""
    squares = table.square().sum(1)
    found = [
        torch.addmm(squares, points[start:stop], table.T, alpha=-2).argmin(1)
        for start, stop in chunks(len(points), len(table))
    ]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=points.device)


def chunks(rows: int, width: int, elements: int = 1 << 24) -> Iterator[tuple[int, int]]:
    """Runs of rows whose products have about so many elements."""
    step = max(1, elements // max(width, 1))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def means(points: Tensor, count: int, *, weights: Tensor, seed: int, iterations: int = 20) -> Tensor:
    """k-means: `count` vectors [count, d] with a small sum of weights [n] * squared distance. The same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(points), generator=generator)[: POINTS * count].to(points.device)
    points, weights = points[order], weights[order].clamp(min=1e-12)
    table = torch.zeros(count, points.shape[1], device=points.device)
    start = points[:count]
    table[: len(start)] = start
    if len(points) <= count:
        return table
    for _ in range(iterations):
        owner = nearest(points, table)
        total = torch.zeros(count, device=points.device).index_add_(0, owner, weights)
        sums = torch.zeros_like(table).index_add_(0, owner, points * weights[:, None])
        moved = torch.where(total[:, None] > 0, sums / total.clamp(min=1e-30)[:, None], table)
        empty = torch.nonzero(total == 0)[:, 0]
        if len(empty):  # to where the largest errors are
            error = (points - table[owner]).square().sum(1) * weights
            moved[empty] = points[error.topk(len(empty)).indices]
        if torch.allclose(moved, table, rtol=1e-5, atol=0):
            break
        table = moved
    return table


def usable(hessian: Tensor, damp: float) -> Tensor:
    """A damped copy: inputs that are always zero count as one, and `damp` of the mean diagonal is added."""
    hessian = hessian.to(torch.float32).clone()
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(hessian).all()):
        raise NotRepresentable(
            "the inputs of the layer are not finite on the calibration text; calibrate with other text"
        )
    diagonal[diagonal == 0] = diagonal.mean() if bool((diagonal > 0).any()) else 1
    diagonal += damp * diagonal.mean()
    return hessian


def upper_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor U of the inverse of a damped Hessian: an error of column i moves column j by U[i, j] / U[i, i]."""
    damped, more = hessian, 0.01
    for _ in range(8):
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return upper
        damped, more = (
            hessian + more * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device),
            more * 4,
        )
    raise NotRepresentable("the inputs of the layer make no usable second moment; calibrate with other text")


def fitted(start: Tensor, residual: Tensor, image: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    """Least squares by conjugate gradients: `start` moved by x with image(x) = residual, both of start's shape."""
    step, numbers, residual = residual.clone(), start.clone(), residual.clone()
    size = residual.square().sum()
    for _ in range(steps):
        if float(size) == 0:
            break
        moved = image(step)
        rate = size / (step * moved).sum().clamp(min=1e-30)
        numbers += rate * step
        residual -= rate * moved
        new = residual.square().sum()
        step = residual + new / size * step
        size = new
    return numbers
