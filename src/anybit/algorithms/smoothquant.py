"""SmoothQuant (arXiv 2211.10438): outliers of the inputs move into the weights, so that both can be rounded to 8 bits.

s = max|x|^a / max|w|^(1 - a)        y = (x / s) (w * s)^T, where 1 / s goes into what makes the input

The paper divides norms only. Rows of an earlier linear are divided here too: where every row has a scale, that costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STRENGTH = 0.5  # a: how much of the difficulty the weights take over
SMALLEST = 1e-5


def candidates(weights: Sequence[Tensor], inputs: Tensor, largest: Tensor, group: int) -> list[Tensor]:
    """The scales [in] of matrices [out, in] that share an input whose largest magnitude per column is `largest`."""
    del inputs, group
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).clamp(min=SMALLEST)
    scales = largest.clamp(min=SMALLEST).pow(STRENGTH) / columns.pow(1 - STRENGTH)
    return [torch.where(largest > 0, scales.clamp(min=SMALLEST), 1.0)]
