"""bitsandbytes' own rule: each block (or row) is divided by its largest magnitude and rounded to the nearest level.

Every operation, constant and tie is that of bitsandbytes' CPU code (0.50), so the codes are its bytes. Two of its habits
show: a short last block is divided by its scale while full blocks are multiplied by its reciprocal, and nested scales are
rounded by way of a table of 65536 steps, not to the nearest entry of their map.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anybit.algorithms._loops import SMALLEST, cast, integer_codes, row_largest, table_blocks
from anybit.errors import NotRepresentable
from anybit.weight import levels, nodes, packing
from anybit.weight.nodes import Node
from anybit.weight.weight import Weight

STEPS = 65536  # of the table that finds the code of a nested scale


def quantize(dense: Tensor, target: Weight, *, through: str | None = None, nested_block: int = 256) -> Weight:
    """Blocks of a value table whose largest magnitude is 1 (NF4, FP4), or rows of signed integers (LLM.int8).

    `through`: a dtype the weight is rounded to first. `nested_block`: scales that share a scale of their own, counted over the
    whole weight. Raises NotRepresentable for a weight that is not finite, and for trees of another form.
    """
    tree, turned = (target.tree.child, True) if isinstance(target.tree, nodes.Transpose) else (target.tree, False)
    source = dense.transpose(-1, -2) if turned else dense
    casts = tuple(getattr(torch, name) for name in (target.dtype, through) if name is not None)
    match tree:
        case nodes.Scaled(child=nodes.Grid(levels=None, codes=nodes.Codes(signed=True), scale=nodes.Values())):
            filled: Node = _rows(source, tree, casts)
        case nodes.Grid(levels=str()) | nodes.View(child=nodes.Grid(levels=str())):
            filled = _blocks(source, tree, casts, nested_block)
        case _:
            raise NotRepresentable(
                f"absmax fills blocks of a value table or rows of signed integers, not a {type(tree).__name__}"
            )
    return Weight(nodes.Transpose(filled) if turned else filled, target.dtype, target.activation)


def _check_finite(scales: Tensor, casts: tuple[torch.dtype, ...]) -> None:
    bad = ~torch.isfinite(scales)
    if bool(bad.any()):
        raise NotRepresentable(
            f"{int(bad.sum())} of {bad.numel()} blocks hold NaN or infinity once rounded to {casts[-1]}, and have no scale. "
            "Mend the weight, or leave the module out"
        )


# --- blocks of a value table ---------------------------------------------------------------------------------------------


def _blocks(dense: Tensor, tree: Any, casts: tuple[torch.dtype, ...], nested_block: int) -> Node:
    grid: Any = tree.child if isinstance(tree, nodes.View) else tree
    middles, order = _middles(str(grid.levels), str(dense.device))
    matrices = dense if dense.dim() == 3 else dense[None]
    weights, size = matrices[0].numel(), grid.block[1]
    packed = torch.empty(len(matrices), (weights + 1) // 2, dtype=torch.uint8, device=dense.device)
    scales = torch.empty(len(matrices), -(-weights // size), dtype=torch.float32, device=dense.device)
    whole = weights // (2 * size) * 2 * size  # so that what is left starts on a byte
    for matrix, own_codes, own_scales in zip(matrices, packed, scales):
        flat = matrix.reshape(-1)
        own_codes[: whole // 2], own_scales[: whole // size] = table_blocks(flat[:whole], size, middles, order, casts)
        if whole < weights:
            own_codes[whole // 2 :], own_scales[whole // size :] = _rest(flat[whole:], size, middles, order, casts)
    _check_finite(scales, casts)
    codes = replace(grid.codes, packed=packed.view(grid.codes.packed.shape))
    filled = replace(grid, codes=codes, scale=_scale(scales, grid.scale, nested_block))
    return replace(tree, child=filled) if isinstance(tree, nodes.View) else filled


def _rest(
    flat: Tensor, size: int, middles: Tensor, order: Tensor, casts: tuple[torch.dtype, ...]
) -> tuple[Tensor, Tensor]:
    """The last blocks: one may be whole, and a short one is divided by its scale."""
    piece = cast(flat, casts).to(torch.float32)
    parts, scales = [], []
    for block in piece.split(size):
        largest = block.abs().max()
        own = largest.clamp(min=SMALLEST)
        parts.append((block * (1.0 / own) if len(block) == size else block / own).clamp_(-1, 1))
        scales.append(largest if len(block) == size else own)
    numbers = torch.nn.functional.pad(torch.cat(parts), (0, len(piece) % 2))  # the spare nibble holds the code of 0
    codes = order.to(torch.uint8)[torch.bucketize(numbers, middles)]
    return packing.pack(codes, 4), torch.stack(scales)


@functools.lru_cache(maxsize=8)
def _middles(name: str, device: str) -> tuple[Tensor, Tensor]:
    """Half ways between the levels of a table, and its codes, both by ascending level."""
    table = levels.table(name, device)
    if float(table.abs().max()) != 1.0:
        raise NotRepresentable(f"absmax scales to levels between -1 and 1, and those of {name!r} go further")
    order = torch.argsort(table, stable=True)
    return (table[order[:-1]] + table[order[1:]]) / 2, order


# --- scales of scales ----------------------------------------------------------------------------------------------------


def _scale(scales: Tensor, like: Node | None, nested_block: int) -> Node:
    """`scales` [matrices, blocks] in the form of `like`: stored as they are, or as 8-bit codes around their mean."""
    grid = like.child if isinstance(like, nodes.View) else like
    if isinstance(grid, nodes.Values):
        return nodes.Values(scales.view(grid.tensor.shape))
    if (
        not isinstance(grid, nodes.Grid)
        or not isinstance(grid.codes, nodes.Codes)
        or not isinstance(grid.scale, nodes.Values)
    ):
        raise NotRepresentable(f"absmax stores scales as numbers or as 8-bit codes, not as a {type(grid).__name__}")
    codes, largest, middle, table = nested(scales.view(-1), nested_block)
    repeated = largest.repeat_interleave(nested_block // grid.block[1])  # a stack cuts groups where its experts end
    filled = replace(
        grid,
        codes=replace(grid.codes, packed=codes.view(grid.codes.packed.shape)),
        scale=nodes.Values(repeated[: grid.scale.tensor.numel()].view(grid.scale.tensor.shape)),
        offset=nodes.Values(middle.view(1, 1)),
        levels=table,
    )
    return replace(like, child=filled) if isinstance(like, nodes.View) else filled


def nested(scales: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float32 scales [n] -> (codes uint8 [n], a scale for each block, their common offset, the table of the codes)."""
    middle = scales.mean()
    table, code_of_step = _nested_codes(str(scales.device))
    count = -(-len(scales) // block)
    apart = torch.nn.functional.pad(scales - middle, (0, count * block - len(scales))).view(count, block)
    largest = apart.abs().amax(1)
    numbers = (apart * (1.0 / largest)[:, None]).clamp_(-1, 1)
    steps = ((numbers + 1) * 0.5 * (STEPS - 1) + 0.5).to(torch.int32)
    codes = code_of_step.index_select(0, steps.clamp_(0, STEPS - 1).view(-1)).view(count, block)
    codes[largest == 0] = 0
    return codes.view(-1)[: len(scales)], largest, middle, table


@functools.lru_cache(maxsize=4)
def _nested_codes(device: str) -> tuple[Tensor, Tensor]:
    """The dynamic map, and the code of each of the steps between -1 and 1."""
    table = dynamic_map().to(device)
    places = torch.arange(STEPS, device=device)
    return table, torch.bucketize(-1.0 + (2.0 * places) / (STEPS - 1), (table[:-1] + table[1:]) * 0.5).to(torch.uint8)


def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic type (arXiv 1511.04561), float32 [256]: 2**i evenly spaced numbers in the decade 10**(i-6).

    bitsandbytes has torch space them, which differs from machine to machine in the last bit; these are a PC's, as in its files.
    """
    numbers = [0.0, 1.0]
    first = torch.tensor(0.1)
    for exponent in range(7):
        count = 1 << exponent
        place = torch.arange(count + 1, dtype=torch.float64)
        step = ((1 - first) / count).double()  # in float64 a product and a sum are one rounding to float32, a fused one
        edges = torch.where(
            place < (count + 1) // 2, first.double() + step * place, 1.0 - step * (count - place)
        ).float()
        middles = (edges[:-1] + edges[1:]) / 2.0
        numbers += (10 ** (exponent - 6) * middles).tolist() + (-(10 ** (exponent - 6)) * middles).tolist()
    return torch.tensor(sorted(numbers), dtype=torch.float32)


# --- rows of integers ----------------------------------------------------------------------------------------------------


def _rows(dense: Tensor, tree: Any, casts: tuple[torch.dtype, ...]) -> Node:
    grid = tree.child
    matrices = dense if dense.dim() == 3 else dense[None]
    columns = matrices.shape[-1]
    top = (1 << (grid.codes.bits - 1)) - 1
    scales = torch.empty(matrices.shape[:-1], dtype=torch.float32, device=dense.device)
    parts = []
    for matrix, own_scales in zip(matrices, scales):
        largest = row_largest(matrix, columns, casts)
        own_scales[:] = largest[:, 0]
        factor = (float(top) / largest).masked_fill_(largest == 0, 0)
        limits = (-top - 1, top)
        parts.append(
            integer_codes(
                matrix,
                grid.codes.bits,
                (1, columns),
                limits,
                factor,
                arithmetic=torch.float32,
                casts=casts,
                multiply=True,
            )
        )
    packed = torch.stack(parts) if dense.dim() == 3 else parts[0]
    _check_finite(scales, casts)
    filled = replace(
        grid,
        codes=replace(grid.codes, packed=packed),
        scale=nodes.Values(scales.view(grid.scale.tensor.shape)),
    )
    filled_tree: Node = replace(
        tree, child=filled, scale=nodes.Values(torch.full((1, 1), 1.0 / top, device=dense.device))
    )
    return filled_tree
