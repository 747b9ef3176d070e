"""Products of 8-bit integers by 8-bit integers with exact sums: what W8A8 formats mean, and what integer units are for.

    codes of the input [n, in] int8  x  codes of the weight [rows, in] int8  ->  [n, rows] int32

torch's own product of integers is taken where a first try on the device gives the right numbers: on a CPU without VNNI
it may add pairs in 16 bits and saturate, and GPUs have limits of shape.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.weight.nodes import Codes, Grid, Node, Rows, Values

if TYPE_CHECKING:
    from torch import Tensor

EXACT_IN_FLOAT32 = 1024  # products of 7 bits by 7 bits that a float32 sum holds: 2**14 * 2**10
GPU_ROWS = 17  # fewer rows are refused by CUDA's product; they are filled up with zeros
GPU_MULTIPLE = 8  # of inputs and outputs


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """int8 [n, in] x int8 [rows, in] -> int32 [n, rows]; exact up to 2**17 inputs."""
    if _is_exact(left.device):
        return _filled_product(left, right) if left.device.type != "cpu" else torch._int_mm(left, right.t())
    total = torch.zeros(left.shape[0], right.shape[0], dtype=torch.int32, device=left.device)
    for a, b in zip(left.split(EXACT_IN_FLOAT32, 1), right.split(EXACT_IN_FLOAT32, 1), strict=True):
        total += (a.to(torch.float32) @ b.to(torch.float32).t()).to(torch.int32)
    return total


def _filled_product(left: Tensor, right: Tensor) -> Tensor:
    """torch's product within the limits of GPUs: what is missing is filled up with zeros."""
    rows, outputs = left.shape[0], right.shape[0]
    short = -left.shape[1] % GPU_MULTIPLE
    left = torch.nn.functional.pad(left, (0, short, 0, max(0, GPU_ROWS - rows)))
    if short or outputs % GPU_MULTIPLE:  # a copy of the weight, for sizes that models hardly have
        right = torch.nn.functional.pad(right, (0, short, 0, -outputs % GPU_MULTIPLE))
    return torch._int_mm(left, right.t())[:rows, :outputs]


def probe(device: torch.device) -> None:
    """Find out what the device's products of integers are worth, before anything waits for a product or records one."""
    _is_exact(device)


@functools.lru_cache(maxsize=64)
def _is_exact(device: torch.device) -> bool:
    """Whether the device's product of integers exists and neither saturates nor rounds at the ends of the range."""
    left = torch.tensor([127, -128], dtype=torch.int8, device=device).repeat_interleave(16)[:, None].expand(32, 64)
    if device.type == "meta":
        return False
    try:
        found = torch._int_mm(left.contiguous(), left.contiguous().t())
    except (RuntimeError, NotImplementedError):
        return False
    numbers = left.to(torch.float32)
    return bool(torch.equal(found, (numbers @ numbers.t()).to(torch.int32)))


def scaled_product(tree: Node, codes: Tensor) -> Tensor | None:
    """int8 codes [n, in] x the tree -> float32 [n, rows]: exact sums, times the scale of each row.

    None: the tree is not rows of 8-bit integers with a scale for each row or for all.
    """
    parts = tree.parts if isinstance(tree, Rows) else (tree,)
    if not all(_is_rows_of_integers(part) for part in parts):
        return None
    return torch.cat([_part_product(part, codes) for part in parts], 1)


def _is_rows_of_integers(tree: Node) -> bool:
    match tree:
        case Grid(
            codes=Codes(bits=8, signed=True),
            scale=Values(inverted=False) as scale,
            zero=None,
            offset=None,
            levels=None,
            compute="float32",
        ):
            return len(tree.shape) == 2 and scale.shape in ((tree.shape[0], 1), (1, 1))
    return False


def _part_product(tree: Node, codes: Tensor) -> Tensor:
    assert isinstance(tree, Grid)
    assert isinstance(tree.codes, Codes)
    assert isinstance(tree.scale, Values)
    scales = tree.scale.region(slice(0, tree.scale.shape[0]), slice(0, 1))
    return exact_product(codes, tree.codes.integers()) * scales.t()
