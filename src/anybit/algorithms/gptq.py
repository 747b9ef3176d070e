"""GPTQ (arXiv 2210.17323): columns are rounded one after the other, and the error of each is made up for by those to come.

    H = 2 / tokens * sum x x^T     what the layer's inputs say about which errors matter
    U = upper Cholesky factor of H^-1
    for column i:  q = round(w_i);  w_j -= (w_i - q) / U[i, i] * U[i, j]  for all j > i

Scales and zero points of a group are found when its first column comes, from weights that carry the corrections of earlier
blocks of columns (not of the block being worked on, as in gptqmodel 7.6, whose steps these are); with static groups, before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anybit.algorithms import Cost, rtn
from anybit.errors import InvalidOption, NotRepresentable
from anybit.weight import Codes, Grid, Weight

BLOCK = 128
ORDERS = ("natural", "groups", "columns")
SHRINKING = [
    1 - step / 100 for step in range(80)
]  # shares of a group's range that the search for the least error tries
FLOORS = 6  # powers of ten that are added to the diagonal when no damping helps


def quantize(
    dense: Tensor,
    target: Weight,
    *,
    hessian: Tensor,
    damp: float = 0.05,
    damp_increment: float = 0.01,
    order: str = "groups",
    static_groups: bool = False,
    mse: float = 0.0,
    ranges: rtn.Rule | None = None,
    symmetric: bool = False,
) -> Weight:
    """Codes of `target`'s grid for one matrix [out, in], given `hessian` float32 [in, in].

    `damp`: share of the mean diagonal that is added to it, and `damp_increment` more until there is a factor; at two bits with
    few tokens more of it keeps errors on other text smaller (0.3 instead of 0.05 with 6144 tokens of examples/tiny-llama in
    MLX's groups of 64: KL 0.121 instead of 0.138). `order`:
    "natural"; "groups": groups of large inputs first, and large inputs first inside a group (gptqmodel's act_group_aware);
    "columns": large inputs first, groups named by an index (desc_act; the target needs one, unless `static_groups` finds
    scales and zeros of the stored groups before anything is rounded). `mse`: an exponent (2.4 is usual); of ranges shrunk by
    up to four fifths, the one with the least sum of |error|^mse is taken. `ranges`, `symmetric`: how extremes become scale
    and zero, as for `rtn`.
    """
    grid = _checked(dense, target, order, static_groups)
    plain = ranges or rtn._spanning(grid, symmetric)
    found_of = partial(_searched, plain, grid, mse) if mse > 0 else partial(_extremes, plain)
    weight = dense.to(torch.float32).clone()
    hessian = hessian.to(torch.float32).clone()
    dead = torch.diagonal(hessian) == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    columns = weight.shape[1]
    assert grid.scale is not None
    groups = grid.scale.shape[1]
    size = -(-columns // groups) if grid.group_index is not None else grid.block[1] if groups > 1 else columns
    static = None
    if static_groups:
        parts = [found_of(weight[:, start : start + size]) for start in range(0, columns, size)]
        static = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    permutation = _order(torch.diagonal(hessian), size, order)
    weight, hessian = weight[:, permutation], hessian[permutation][:, permutation]
    group_of = permutation // size if static_groups else torch.arange(columns, device=dense.device) // size
    codes, found = _sweep(weight, _factor(hessian, damp, damp_increment), grid, found_of, group_of, static)
    back = torch.argsort(permutation)
    codes = codes[:, back]
    index = None
    if static_groups:
        if grid.group_index is not None:
            index = (torch.arange(columns, device=dense.device) // size).to(torch.int32)
    elif order == "columns":
        index = (torch.arange(columns, device=dense.device) // size)[back].to(torch.int32)
    elif order == "groups":  # groups were met in another order than they are stored in
        met = permutation[torch.arange(0, columns, size, device=dense.device)] // size
        found = {name: part[:, torch.argsort(met)] for name, part in found.items()}
    assert isinstance(grid.codes, Codes)
    parameters: dict[str, Any] = rtn._stored(grid, rtn.Range(**found))
    packed = Codes.of(codes, grid.codes.bits, grid.codes.signed)
    return Weight(replace(grid, codes=packed, group_index=index, **parameters), target.dtype, target.activation)


def cost(rows: int, columns: int, samples: int, length: int, *, mse: float = 0.0) -> Cost:
    """Three factorizations, the corrections of later columns, and some small operations for each column."""
    searched = len(SHRINKING) * 8.0 * rows * columns if mse > 0 else 0.0
    return Cost(2.0 * rows * columns**2 + 4.0 * columns**3, searched + BLOCK * rows * columns, 20.0 * columns)


def _checked(dense: Tensor, target: Weight, order: str, static_groups: bool) -> Grid:
    if order not in ORDERS:
        raise InvalidOption(f"order is {order!r}; it must be one of {', '.join(ORDERS)}")
    grid = target.tree
    if dense.dim() != 2 or not isinstance(grid, Grid) or grid.levels is not None or grid.block[0] != 1:
        raise NotRepresentable(
            "GPTQ fills a grid of integer codes over one matrix, with scales per row; choose another algorithm"
        )
    if (grid.group_index is not None) != (order == "columns") and not static_groups:
        raise NotRepresentable("order='columns' needs a target that names the group of each column, and only it does")
    if not bool(torch.isfinite(dense).all()):
        row, column = torch.nonzero(~torch.isfinite(dense))[0].tolist()
        raise NotRepresentable(
            f"the weight holds {dense[row, column].item()} at row {row}, column {column}, which no code stands for; repair the "
            "checkpoint"
        )
    rtn._checked(dense, Weight(replace(grid, group_index=None), target.dtype, target.activation))
    return grid


def _order(diagonal: Tensor, size: int, order: str) -> Tensor:
    """Columns in the order they are met."""
    columns = len(diagonal)
    if order == "columns":
        return torch.argsort(diagonal, descending=True)
    if order == "natural" or size >= columns:
        return torch.arange(columns, device=diagonal.device)
    whole = columns // size * size
    per_group = diagonal[:whole].view(-1, size)
    inside = torch.argsort(per_group, dim=1, descending=True)
    outside = torch.argsort(per_group.amax(1), descending=True, stable=True)
    start = torch.arange(0, whole, size, device=diagonal.device)
    ordered = (start[:, None] + inside)[outside].reshape(-1)
    return torch.cat([ordered, torch.arange(whole, columns, device=diagonal.device)])  # an incomplete group stays last


def _factor(hessian: Tensor, damp: float, increment: float) -> Tensor:
    """Upper Cholesky factor of the inverse; damping grows until there is one, then the diagonal is lifted."""
    diagonal = torch.diagonal(hessian).clone()
    mean, largest = diagonal.mean(), diagonal.abs().max()
    steps = max(1, math.ceil((1 - damp) / increment)) if increment > 0 else 1
    lifts = [(damp + step * increment) * mean for step in range(steps)]
    lifts += [mean + 1e-6 * largest * 10**power for power in range(FLOORS)]
    for lift in lifts:
        if not bool(torch.isfinite(lift)):
            break
        hessian.diagonal().copy_(diagonal + lift)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and bool(torch.isfinite(upper).all()):
            return upper
    raise NotRepresentable(
        "the inputs of the layer make no usable second moment, even fully damped (constant, or not finite); calibrate with "
        "other text"
    )


# a group's weights [out, size] -> scale, and zero or offset, [out, 1] each
Find = Callable[[Tensor], dict[str, Tensor]]


def _extremes(rule: rtn.Rule, group: Tensor) -> dict[str, Tensor]:
    return rule(group.amin(1, keepdim=True), group.amax(1, keepdim=True))


def _searched(rule: rtn.Rule, grid: Grid, exponent: float, group: Tensor) -> dict[str, Tensor]:
    """Of the group's range and shrunken ones, each row's with the least error; as gptqmodel's mse."""
    assert isinstance(grid.codes, Codes)
    limits = rtn.code_range(grid.codes)
    low, high = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True).clamp(min=0)
    best = rule(low, high)
    least = torch.full_like(low, torch.inf)
    for share in SHRINKING:
        tried = rule(low * share, high * share)
        _, value = _nearest(group, tried, limits)
        error = (value - group).abs_().pow_(exponent).sum(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = {name: torch.where(better, part, best[name]) for name, part in tried.items()}
    return best


def _nearest(numbers: Tensor, found: dict[str, Tensor], limits: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Codes, as floats, and what they stand for."""
    scale, zero, offset = found["scale"], found.get("zero"), found.get("offset")
    code = torch.round((numbers if offset is None else numbers - offset) / scale)
    code = (code if zero is None else code + zero).clamp_(*limits)
    value = (code if zero is None else code - zero) * scale
    return code, value if offset is None else value + offset


def _sweep(
    weight: Tensor, factor: Tensor, grid: Grid, find: Find, group_of: Tensor, static: dict[str, Tensor] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Round every column of `weight` (changed in place) in its order; codes, and the parameters of groups as they were met."""
    rows, columns = weight.shape
    assert isinstance(grid.codes, Codes)
    limits = rtn.code_range(grid.codes)
    codes = torch.empty(rows, columns, dtype=torch.int32, device=weight.device)
    numbers = group_of.tolist()
    found: list[dict[str, Tensor]] = []
    own: dict[str, Tensor] = {}
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block, errors = weight[:, start:stop].clone(), torch.empty(rows, stop - start, device=weight.device)
        inside = factor[start:stop, start:stop]
        for number in range(stop - start):
            column = start + number
            group = numbers[column]
            if static is not None:
                own = {name: part[:, group] for name, part in static.items()}
            elif group == len(found):
                end = column + numbers.count(group)
                found.append(find(weight[:, column:end]))
                own = {name: part[:, 0] for name, part in found[-1].items()}
            value = block[:, number]
            code, meant = _nearest(value, own, limits)
            codes[:, column] = code.to(torch.int32)
            error = (value - meant) / inside[number, number]
            block[:, number:] -= error[:, None] * inside[number, number:]
            errors[:, number] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes, static or {name: torch.cat([part[name] for part in found], dim=1) for name in found[0]}
