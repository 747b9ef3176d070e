"""Products of E4M3 by E4M3 numbers on units for them: what FP8 formats with quantized inputs mean.

    input [n, in] float8_e4m3fn  x  codes of the weight [rows, in], bytes of E4M3  ->  [n, rows] float32

The units multiply without scales; those of tokens and of rows of the weight are factors of the sums, as they are everywhere
else. Scales of blocks of 128 are none, so weights with them are decoded in the product. torch's own product is taken where a
first try on the device gives the right numbers: it needs a card with such units (compute capability 8.9, or gfx94).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.weight.nodes import Codes, Grid, Node, Rows, Values

if TYPE_CHECKING:
    from torch import Tensor

MULTIPLE = 16  # of inputs and outputs
_CLOSE = 1e-3  # relative: units keep fewer bits of a sum than float32 has


def why_not(device: torch.device) -> str | None:
    """Why products on `device` do not go through units for E4M3, or None."""
    if device.type != "cuda":
        return f"no units for 8-bit floats are known on {device.type}"
    return _tried(device)


@functools.lru_cache(maxsize=64)
def _tried(device: torch.device) -> str | None:
    numbers = (torch.arange(32 * 64, device=device) % 33 - 16).to(torch.float32).view(32, 64)
    try:
        found = multiplied(numbers.to(torch.float8_e4m3fn), numbers.to(torch.float8_e4m3fn))
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        return f"torch has no product of 8-bit floats there: {str(error).splitlines()[0]}"
    wanted = numbers @ numbers.t()
    off = float((found - wanted).abs().max() / wanted.abs().max())
    return None if off < _CLOSE else f"torch's product of 8-bit floats is off by {off:.1e} there"


def multiplied(left: Tensor, right: Tensor) -> Tensor:
    """float8_e4m3fn [n, in] x [rows, in] -> float32 [n, rows]."""
    rows, short = right.shape[0], -left.shape[1] % MULTIPLE
    if short or rows % MULTIPLE:
        left = _filled(left, 0, short)
        right = _filled(right, -rows % MULTIPLE, short)
    one = torch.ones((), dtype=torch.float32, device=left.device)
    found = torch._scaled_mm(
        left.contiguous(),
        right.contiguous().t(),
        scale_a=one,
        scale_b=one,
        out_dtype=torch.float32,
        use_fast_accum=False,
    )
    return found[:, :rows]


def _filled(numbers: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(numbers.view(torch.uint8), (0, columns, 0, rows)).view(torch.float8_e4m3fn)


def scaled_product(tree: Node, numbers: Tensor) -> Tensor | None:
    """float8_e4m3fn [n, in] x the tree -> float32 [n, rows], times the scale of each row.

    None: the tree is not rows of E4M3 numbers with a scale for each row or for all.
    """
    parts = tree.parts if isinstance(tree, Rows) else (tree,)
    if not all(is_rows_of_e4m3(part) for part in parts):
        return None
    return torch.cat([_part_product(part, numbers) for part in parts], 1)


def is_rows_of_e4m3(tree: Node) -> bool:
    """Whether a scale of each row, or of all, is all that is between bytes and numbers."""
    match tree:
        case Grid(
            codes=Codes(bits=8, signed=False), scale=Values(levels=None) as scale, zero=None, offset=None, levels="e4m3",
            group_index=None, compute="float32",
        ):  # fmt: skip
            return len(tree.shape) == 2 and scale.shape in ((tree.shape[0], 1), (1, 1))
    return False


def _part_product(tree: Node, numbers: Tensor) -> Tensor:
    assert isinstance(tree, Grid)
    assert isinstance(tree.codes, Codes)
    assert isinstance(tree.scale, Values)
    codes = tree.codes.packed.view(torch.float8_e4m3fn)
    scale = tree.scale.tensor.to(torch.float32).t()
    scale = -scale if tree.scale.negated else scale
    sums = multiplied(numbers, codes)
    return sums / scale if tree.scale.inverted else sums * scale
