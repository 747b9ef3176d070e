"""HQQ's half-quadratic solver: extremes give the scale, and 20 steps of shrinkage move the zero point to the least |W - R|^0.7.

    Q = round(W / scale + zero)    R = (Q - zero) * scale    E = shrink(W - R)    zero = mean(Q - (W - E) / scale)

As in hqq 0.2 the last step's zero point is kept, and steps end at the first that does not lower the mean error of the whole
weight. Arithmetic is float32 on every device (hqq uses float16 on GPUs), its order is hqq's, so codes are hqq's on the CPU.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from anybit.errors import NotRepresentable
from anybit.weight import Codes, Grid, Node, Values, View, Weight, packing
from anybit.weight.weight import row_chunks

NORM, BETA, STEPS = 0.7, 10.0, 20
SMALLEST_RANGE, LARGEST_INVERSE = 1e-4, 2e4


def quantize(
    dense: Tensor,
    target: Weight,
    *,
    top: int,
    group: int,
    axis: int = 1,
    round_zero: bool = False,
    optimize: bool = True,
) -> Weight:
    """Codes 0 .. `top` in groups of `group` of the flattened weight, along `axis` of its matrix of groups.

    `round_zero`: start from a whole zero point; `optimize`: take the steps. Raises NotRepresentable for a weight that is not
    finite, and for trees of another form.
    """
    grid = _checked(dense, target, group)
    bad = next((start for start, stop in row_chunks(*dense.shape) if not torch.isfinite(dense[start:stop]).all()), None)
    if bad is not None:
        raise NotRepresentable(
            f"the weight is not finite near row {bad}, which no code stands for; repair the checkpoint"
        )
    # one chunk unless the weight is large: the mean error then has hqq's own order of summation
    matrix = dense.reshape(-1, group) if axis == 1 else dense.reshape(group, -1)
    solver = _Solver(matrix, axis, top)
    solver.start(round_zero)
    if optimize:
        solver.improve()
    return Weight(_filled(target.tree, grid, solver), target.dtype, target.activation)


class _Solver:
    """`inverse` and `zero` of every group of a matrix, whose columns (axis 1) or rows (axis 0) are the members of a group."""

    def __init__(self, matrix: Tensor, axis: int, top: int):
        self.matrix, self.axis, self.top = matrix, axis, top
        rows, columns = matrix.shape
        groups = rows if axis == 1 else columns
        self.chunks = row_chunks(groups, matrix.numel() // groups)
        self.inverse = self.zero = torch.empty(0)

    def part(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """The groups start .. stop of a matrix or of a parameter."""
        return tensor[start:stop] if self.axis == 1 else tensor[:, start:stop]

    def numbers(self, start: int, stop: int) -> Tensor:
        return self.part(self.matrix, start, stop).to(torch.float32)

    def start(self, round_zero: bool) -> None:
        """Scale and zero point that span each group."""
        found = []
        for chunk in self.chunks:
            numbers = self.numbers(*chunk)
            found.append((numbers.amin(self.axis, keepdim=True), numbers.amax(self.axis, keepdim=True)))
        low, high = (torch.cat(parts, dim=1 - self.axis) for parts in zip(*found, strict=True))
        width = high - low
        inverse = torch.where(width.abs() <= SMALLEST_RANGE, 1.0, self.top / width).clamp(max=LARGEST_INVERSE)
        zero = -low * inverse
        self.inverse, self.zero = inverse, torch.round(zero) if round_zero else zero

    def codes(self, start: int, stop: int) -> Tensor:
        inverse, zero = (self.part(tensor, start, stop) for tensor in (self.inverse, self.zero))
        return torch.round(self.numbers(start, stop) * inverse + zero).clamp_(0, self.top)

    def improve(self) -> None:
        best = torch.inf
        for _ in range(STEPS):
            total, zeros = 0.0, []
            for chunk in self.chunks:
                error, zero = self._step(*chunk)
                total += error
                zeros.append(zero)
            self.zero = torch.cat(zeros, dim=1 - self.axis)
            if not total < best:
                break
            best = total

    def _step(self, start: int, stop: int) -> tuple[float, Tensor]:
        """(this chunk's share of the mean error, its next zero point)."""
        numbers, codes = self.numbers(start, stop), self.codes(start, stop)
        inverse, zero = (self.part(tensor, start, stop) for tensor in (self.inverse, self.zero))
        rest = numbers - (codes - zero) / inverse
        size = rest.abs()
        error = size.mean().item() if len(self.chunks) == 1 else size.sum(dtype=torch.float64).item()
        size.sub_((1.0 / BETA) * size.pow(NORM - 1)).clamp_min_(0.0).mul_(torch.sign(rest))
        return error, torch.mean(codes - (numbers - size) * inverse, dim=self.axis, keepdim=True)


def _filled(tree: Node, grid: Grid, solver: _Solver) -> Node:
    assert isinstance(grid.codes, Codes)
    width = grid.codes.columns
    codes = torch.empty(solver.matrix.shape, dtype=torch.uint8, device=solver.matrix.device)
    for chunk in solver.chunks:
        solver.part(codes, *chunk).copy_(solver.codes(*chunk))
    codes = codes.view(-1, width)
    packed = torch.empty(len(codes), packing.row_bytes(width, grid.codes.bits), dtype=torch.uint8, device=codes.device)
    for start, stop in row_chunks(len(codes), width):
        packed[start:stop] = packing.pack(codes[start:stop], grid.codes.bits)
    parts: dict[str, Node] = {}
    for name, node, numbers in (("scale", grid.scale, 1.0 / solver.inverse), ("zero", grid.zero, solver.zero)):
        assert isinstance(node, Values)
        stored = numbers.to(node.tensor.dtype)
        if not bool(torch.isfinite(stored).all()):
            raise NotRepresentable(
                f"a {name} of {numbers.abs().max().item():g} is too large for {stored.dtype}; scale the weight down"
            )
        parts[name] = replace(node, tensor=stored.reshape(node.tensor.shape))
    filled = replace(grid, codes=replace(grid.codes, packed=packed), **parts)  # type: ignore[arg-type]
    return replace(tree, child=filled) if isinstance(tree, View) else filled


def _checked(dense: Tensor, target: Weight, group: int) -> Grid:
    """The target's grid, if it is one this algorithm can fill."""
    if tuple(dense.shape) != tuple(target.shape):
        raise NotRepresentable(
            f"a dense weight {tuple(dense.shape)} does not fill a target of shape {tuple(target.shape)}"
        )
    grid = target.tree.child if isinstance(target.tree, View) else target.tree
    match grid:
        case Grid(
            codes=Codes(signed=False), scale=Values(inverted=False, levels=None) as scale,
            zero=Values(inverted=False, levels=None) as zero, offset=None, levels=None, group_index=None,
        ) if dense.dim() == 2 and scale.tensor.numel() * group == zero.tensor.numel() * group == dense.numel():  # fmt: skip
            return grid
    raise NotRepresentable(
        "HQQ's solver fills a grid of unsigned codes with a plain scale and zero point for each group, not this "
        f"{type(grid).__name__}; choose another algorithm"
    )
