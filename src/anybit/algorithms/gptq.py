"""GPTQ (arXiv 2210.17323): columns are rounded one after the other, and the error of each is made up for by those to come.

    H = 2 / tokens * sum x x^T     what the layer's inputs say about which errors matter
    U = upper Cholesky factor of H^-1
    for column i:  q = round(w_i);  w_j -= (w_i - q) / U[i, i] * U[i, j]  for all j > i

Scales and zero points of a group are found when its first column comes, from weights that carry the corrections of earlier
blocks of columns (not of the block being worked on, as in gptqmodel 7.6, whose steps these are).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anybit.algorithms import rtn
from anybit.errors import InvalidOption, NotRepresentable
from anybit.weight import Codes, Grid, Weight

BLOCK = 128
ORDERS = ("natural", "groups", "columns")


def quantize(
    dense: Tensor,
    target: Weight,
    *,
    hessian: Tensor,
    damp: float = 0.05,
    order: str = "groups",
    ranges: rtn.Rule | None = None,
    symmetric: bool = False,
) -> Weight:
    """Codes of `target`'s grid for one matrix [out, in], given `hessian` float32 [in, in].

    `damp`: share of the mean diagonal that is added to it. `order`: "natural"; "groups": groups of large inputs first, and
    large inputs first inside a group (gptqmodel's act_group_aware); "columns": large inputs first, groups named by an index
    (desc_act; the target needs one). `ranges`, `symmetric`: how extremes become scale and zero, as for `rtn`.
    """
    grid = _checked(dense, target, order)
    rule = ranges or rtn._spanning(grid, symmetric)
    weight = dense.to(torch.float32).clone()
    hessian = hessian.to(torch.float32).clone()
    dead = torch.diagonal(hessian) == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    columns = weight.shape[1]
    assert grid.scale is not None
    groups = grid.scale.shape[1]
    size = -(-columns // groups) if grid.group_index is not None else grid.block[1] if groups > 1 else columns
    permutation = _order(torch.diagonal(hessian), size, order)
    weight, hessian = weight[:, permutation], hessian[permutation][:, permutation]
    codes, found = _sweep(weight, _factor(hessian, damp), grid, rule, size, groups)
    back = torch.argsort(permutation)
    codes = codes[:, back]
    index = None
    if order == "columns":
        index = (torch.arange(columns, device=dense.device) // size)[back].to(torch.int32)
    elif order == "groups":  # groups were met in another order than they are stored in
        met = permutation[torch.arange(0, columns, size, device=dense.device)] // size
        found = {name: part[:, torch.argsort(met)] for name, part in found.items()}
    assert isinstance(grid.codes, Codes)
    parameters: dict[str, Any] = rtn._stored(grid, rtn.Range(**found))
    packed = Codes.of(codes, grid.codes.bits, grid.codes.signed)
    return Weight(replace(grid, codes=packed, group_index=index, **parameters), target.dtype, target.activation)


def _checked(dense: Tensor, target: Weight, order: str) -> Grid:
    if order not in ORDERS:
        raise InvalidOption(f"order is {order!r}; it must be one of {', '.join(ORDERS)}")
    grid = target.tree
    if dense.dim() != 2 or not isinstance(grid, Grid) or grid.levels is not None or grid.block[0] != 1:
        raise NotRepresentable(
            "GPTQ fills a grid of integer codes over one matrix, with scales per row; choose another algorithm"
        )
    if (grid.group_index is not None) != (order == "columns"):
        raise NotRepresentable("order='columns' needs a target that names the group of each column, and only it does")
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


def _factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of the inverse; damping grows until there is one."""
    diagonal, mean = torch.diagonal(hessian).clone(), torch.diagonal(hessian).mean()
    amount = damp
    while amount < 1:
        hessian.diagonal().copy_(diagonal + amount * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and bool(torch.isfinite(upper).all()):
            return upper
        amount += 0.01
    raise NotRepresentable(
        "the inputs of the layer make no usable second moment, even fully damped (constant, or not finite); calibrate with "
        "other text"
    )


def _sweep(
    weight: Tensor, factor: Tensor, grid: Grid, rule: rtn.Rule, size: int, groups: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Round every column of `weight` (changed in place) in its order; codes, and the parameters of groups as they were met."""
    rows, columns = weight.shape
    assert isinstance(grid.codes, Codes)
    first, last = rtn.code_range(grid.codes)
    codes = torch.empty(rows, columns, dtype=torch.int32, device=weight.device)
    found: list[dict[str, Tensor]] = []
    scale = zero = offset = torch.empty(0)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block, errors = weight[:, start:stop].clone(), torch.empty(rows, stop - start, device=weight.device)
        own = factor[start:stop, start:stop]
        for number in range(stop - start):
            column = start + number
            if column % size == 0 and len(found) < groups:
                group = weight[:, column : min(column + size, columns)]
                parameters = rule(group.amin(1, keepdim=True), group.amax(1, keepdim=True))
                found.append(parameters)
                scale = parameters["scale"][:, 0]
                zero = parameters.get("zero", torch.zeros(rows, 1, device=weight.device))[:, 0]
                offset = parameters.get("offset", torch.zeros(rows, 1, device=weight.device))[:, 0]
            value = block[:, number]
            code = (torch.round((value - offset) / scale) + zero).clamp_(first, last)
            codes[:, column] = code.to(torch.int32)
            error = (value - ((code - zero) * scale + offset)) / own[number, number]
            block[:, number:] -= error[:, None] * own[number, number:]
            errors[:, number] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes, {name: torch.cat([own[name] for own in found], dim=1) for name in found[0]}
