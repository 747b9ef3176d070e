"""AWQ (arXiv 2306.00978): columns that large inputs meet are scaled up before rounding, and inputs down by as much.

    s = mean|x|^r / mean|w|^(1 - r)      for r = 0, 1/20 ... 19/20: the one whose rounded weights change the output least
    y = (x / s) (Q(w * s))^T             1 / s goes into what makes the input, so that nothing is left to do at run time

Then every group of columns is clipped at the share of its largest magnitude that changes the layer's output least. Steps and
constants are AutoAWQ 0.2.9's; no scaling at all is tried as well, so that the search never makes a layer worse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from anybit.algorithms import Cost

RATIOS = 20
SHRINK, SHRINK_STEPS = 0.5, 20  # bounds of 1, 0.95 ... 0.55 of the largest magnitude
CLIP_TOKENS = 512
# clipping changes these most where it matters most, in the scores of attention
NOT_CLIPPED = ("q_", "k_", "query", "key", "Wqkv")
ELEMENTS = 1 << 22  # numbers of a temporary


def candidates(weights: Sequence[Tensor], inputs: Tensor, largest: Tensor, group: int) -> list[Tensor]:
    """Scales [in] to try for matrices [out, in] that share an input; `inputs`: its mean magnitude per column.

    `largest`: its largest, which AWQ has no use for. `group`: columns that share a scale when they are rounded.
    """
    del largest
    total, rows = torch.zeros_like(inputs), 0
    for weight in weights:
        size = group if weight.shape[1] % group == 0 else weight.shape[1]
        groups = weight.abs().unflatten(1, (-1, size))
        total += (groups / (groups.amax(-1, keepdim=True) + 1e-6)).flatten(1).sum(0)
        rows += weight.shape[0]
    mean = total / rows
    found = [torch.ones_like(inputs)]
    for step in range(RATIOS):
        ratio = step / RATIOS
        scales = (inputs.pow(ratio) / (mean.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        found.append(torch.where(torch.isfinite(scales), scales, 1.0))
    return found


def clips(name: str) -> bool:
    """Whether the layer of this name is clipped."""
    own = name.rpartition(".")[2]
    return not any(part in own for part in NOT_CLIPPED)


def clipped(weight: Tensor, x: Tensor, group: int, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """The matrix with each group's magnitude bounded where that serves its product with the inputs `x` [tokens, in] best."""
    rows, columns = weight.shape
    size = group if columns % group == 0 else columns
    x = x[:: max(1, x.shape[0] // CLIP_TOKENS)].unflatten(1, (-1, size)).transpose(0, 1)  # [groups, tokens, size]
    groups = weight.unflatten(1, (-1, size))
    largest = groups.abs().amax(-1, keepdim=True)
    best, least = largest, torch.full_like(largest, torch.inf)
    step = max(1, ELEMENTS // max(1, x.shape[0] * x.shape[1]))
    for number in range(int(SHRINK * SHRINK_STEPS)):
        bound = largest * (1 - number / SHRINK_STEPS)
        tried = torch.minimum(torch.maximum(groups, -bound), bound).flatten(1)
        change = (rounded(tried) - weight).unflatten(1, (-1, size))
        error = torch.cat(
            [
                torch.einsum("gti,rgi->rgt", x, change[start : start + step]).pow_(2).mean(-1, keepdim=True)
                for start in range(0, rows, step)
            ]
        )
        better = error < least
        best, least = torch.where(better, bound, best), torch.where(better, error, least)
    return torch.minimum(torch.maximum(groups, -best), best).flatten(1)


def memory(weights: int, widths: int, samples: int, length: int) -> int:
    """The dense block in float32, inputs of a matrix with outputs of what it belongs to, and errors of clipping."""
    return 4 * (weights + min(samples * length, 8192) * widths // 3 + 2 * ELEMENTS)


def cost(rows: int, columns: int, samples: int, length: int) -> Cost:
    """Every ratio and every bound rounds the matrix, and runs what it belongs to: about twice its own product."""
    tokens, bounds = samples * length, SHRINK * SHRINK_STEPS
    judged, clipped = min(tokens, 8192), min(tokens, CLIP_TOKENS)
    products = 2.0 * rows * columns * (2 * (RATIOS + 1) * judged + bounds * clipped)
    return Cost(products, roundings=RATIOS + 1 + bounds)
