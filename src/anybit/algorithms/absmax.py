"""bitsandbytes' own rule: each block (or row) is divided by its largest magnitude and rounded to the nearest level.

Every operation, constant and tie is that of bitsandbytes' CPU code (0.50), so the codes are its bytes. Two of its habits
show: a short last block is divided by its scale while full blocks are multiplied by its reciprocal, and nested scales are
rounded by way of a table of 65536 steps, not to the nearest entry of their map.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anybit.errors import NotRepresentable
from anybit.weight import levels, nodes, packing
from anybit.weight.nodes import Node
from anybit.weight.weight import Weight, row_chunks

CHUNK = 1 << 18  # weights worked on at once: temporaries of 1 MB stay in the cache
SMALLEST = 1e-38  # a scale of zero is taken for this one
STEPS = 65536  # of the table that finds the code of a nested scale


def quantize(dense: Tensor, target: Weight, *, through: str | None = None, nested_block: int = 256) -> Weight:
    """Blocks of a value table whose largest magnitude is 1 (NF4, FP4), or rows of signed integers (LLM.int8).

    `through`: a dtype the weight is rounded to first. `nested_block`: scales that share a scale of their own, counted over the
    whole weight. Raises NotRepresentable for a weight that is not finite, and for trees of another form.
    """
    tree, turned = (target.tree.child, True) if isinstance(target.tree, nodes.Transpose) else (target.tree, False)
    source = dense.transpose(-1, -2) if turned else dense
    casts = [getattr(torch, name) for name in (target.dtype, through) if name is not None]
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


def _cast(piece: Tensor, casts: list[torch.dtype]) -> Tensor:
    for dtype in casts:
        piece = piece.to(dtype)
    return piece


def _check_finite(scales: Tensor, casts: list[torch.dtype]) -> None:
    bad = ~torch.isfinite(scales)
    if bool(bad.any()):
        raise NotRepresentable(
            f"{int(bad.sum())} of {bad.numel()} blocks hold NaN or infinity once rounded to {casts[-1]}, and have no scale. "
            "Mend the weight, or leave the module out"
        )


# --- blocks of a value table ---------------------------------------------------------------------------------------------


def _blocks(dense: Tensor, tree: Any, casts: list[torch.dtype], nested_block: int) -> Node:
    grid: Any = tree.child if isinstance(tree, nodes.View) else tree
    find = _Nearest(levels.table(str(grid.levels), str(dense.device)), str(grid.levels))
    matrices = dense if dense.dim() == 3 else dense[None]
    weights, size = matrices[0].numel(), grid.block[1]
    packed = torch.empty(len(matrices), (weights + 1) // 2, dtype=torch.uint8, device=dense.device)
    scales = torch.empty(len(matrices), -(-weights // size), dtype=torch.float32, device=dense.device)
    step = max(CHUNK // (2 * size), 1) * 2 * size
    for matrix, own_codes, own_scales in zip(matrices, packed, scales):
        flat = matrix.reshape(-1)
        for start in range(0, weights, step):
            piece = _cast(flat[start : start + step], casts).to(torch.float32)
            numbers = _scaled(piece, size, own_scales[start // size : -(-(start + len(piece)) // size)], casts)
            numbers = torch.nn.functional.pad(numbers, (0, len(numbers) % 2))  # the spare nibble holds the code of 0
            own_codes[start // 2 : (start + len(numbers)) // 2] = packing.pack(find.codes(numbers), 4)
    codes = replace(grid.codes, packed=packed.view(grid.codes.packed.shape))
    filled = replace(grid, codes=codes, scale=_scale(scales, grid.scale, nested_block))
    return replace(tree, child=filled) if isinstance(tree, nodes.View) else filled


def _scaled(piece: Tensor, size: int, scales: Tensor, casts: list[torch.dtype]) -> Tensor:
    """Numbers in [-1, 1]; writes the blocks' scales."""
    full = len(piece) // size
    head, tail = piece[: full * size].view(full, size), piece[full * size :]
    scales[:full] = head.abs().amax(1)
    if len(tail):
        scales[full] = tail.abs().max().clamp(min=SMALLEST)
    _check_finite(scales, casts)
    numbers = (head * (1.0 / scales[:full].clamp(min=SMALLEST))[:, None]).clamp_(-1, 1).view(-1)
    return torch.cat([numbers, (tail / scales[full:]).clamp_(-1, 1)]) if len(tail) else numbers


class _Nearest:
    """Codes of the nearest level; half way between two levels, the lower one.

    [-1, 1] is cut into steps, and a table tells the code of each: five times faster than a binary search. The few numbers
    that share a step with the middle of two levels are searched for.
    """

    STEPS, UNSURE = 4096, 255

    def __init__(self, table: Tensor, name: str):
        if float(table.abs().max()) != 1.0:
            raise NotRepresentable(f"absmax scales to levels between -1 and 1, and those of {name!r} go further")
        order = torch.argsort(table, stable=True)
        self.middles = (table[order[:-1]] + table[order[1:]]) / 2
        self.order = order.to(torch.uint8)
        steps = torch.arange(self.STEPS + 1, dtype=torch.int32, device=table.device)
        places = self._step(self.middles)  # rounding keeps the order, so a later step is a larger number
        self.code_of_step = self.order.index_select(0, torch.searchsorted(places, steps, out_int32=True))
        self.code_of_step[places.long()] = self.UNSURE

    def _step(self, numbers: Tensor) -> Tensor:
        return ((numbers + 1) * (self.STEPS / 2)).to(torch.int32)

    def codes(self, numbers: Tensor) -> Tensor:
        """uint8 codes of numbers between -1 and 1."""
        codes = self.code_of_step.index_select(0, self._step(numbers))
        unsure = (codes == self.UNSURE).nonzero()[:, 0]
        codes[unsure] = self.order[torch.bucketize(numbers[unsure], self.middles)]
        return codes


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
    table = dynamic_map().to(scales.device)
    count = -(-len(scales) // block)
    apart = torch.nn.functional.pad(scales - middle, (0, count * block - len(scales))).view(count, block)
    largest = apart.abs().amax(1)
    numbers = (apart * (1.0 / largest)[:, None]).clamp_(-1, 1)
    steps = ((numbers + 1) * 0.5 * (STEPS - 1) + 0.5).to(torch.int32)
    places = torch.arange(STEPS, device=scales.device)
    code_of_step = torch.bucketize(-1.0 + (2.0 * places) / (STEPS - 1), (table[:-1] + table[1:]) * 0.5)
    codes = code_of_step.to(torch.uint8).index_select(0, steps.clamp_(0, STEPS - 1).view(-1)).view(count, block)
    codes[largest == 0] = 0
    return codes.view(-1)[: len(scales)], largest, middle, table


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


def _rows(dense: Tensor, tree: Any, casts: list[torch.dtype]) -> Node:
    grid = tree.child
    matrices = dense if dense.dim() == 3 else dense[None]
    rows, columns = matrices.shape[1:]
    top = float((1 << (grid.codes.bits - 1)) - 1)
    scales = torch.empty(matrices.shape[:-1], dtype=torch.float32, device=dense.device)
    packed = torch.empty(grid.codes.packed.shape, dtype=torch.uint8, device=dense.device)
    for matrix, own_scales, own_codes in zip(matrices, scales, packed.view(len(matrices), rows, -1)):
        for start, stop in row_chunks(rows, columns, CHUNK):
            piece = _cast(matrix[start:stop], casts)
            largest = piece.abs().amax(1).to(torch.float32)
            own_scales[start:stop] = largest
            codes = torch.round(piece * (top / largest)[:, None]).masked_fill_((largest == 0)[:, None], 0)
            own_codes[start:stop] = packing.pack(codes.to(torch.int8).view(torch.uint8), grid.codes.bits)
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
