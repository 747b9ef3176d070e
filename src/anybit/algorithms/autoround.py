"""AutoRound (SignRound, arXiv 2309.05516): how a block's weights are rounded is trained by the sign of the gradient.

    q = clamp(round(w / scale + v) + zero)      v in [-1/2, 1/2] for each weight
    scale, zero from low * a, high * b          a, b in [0, 1] for each group

so that the quantized block, fed with what quantized blocks before it give, comes close to what the dense block made of dense
inputs. 200 steps, each moves every number by the learning rate, which falls from 1 / steps to 0. Of the best step and the last,
the better one over all samples is kept: the best was so on few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from anybit.algorithms import Cost, rtn
from anybit.errors import NotRepresentable
from anybit.weight import Codes, Grid, Values, Weight

STEPS = 200
BATCH = 8
LOSS_SCALE = 1000  # as auto-round; keeps gradients away from the smallest float32


@dataclass
class Rounding:
    """One matrix [out, in] whose rounding is being trained towards `target`."""

    dense: Tensor
    target: Weight
    ranges: rtn.Rule | None = None
    symmetric: bool = False
    best: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.grid = _checked(self.dense, self.target)
        if self.symmetric or (self.grid.zero is None and self.grid.offset is None and self.ranges is None):
            self.rule = _signed(self.grid)  # uses the lowest code too, which at 2 bits is a quarter of them
        else:
            self.rule = self.ranges or rtn._spanning(self.grid, False)
        assert self.grid.scale is not None
        columns = self.dense.shape[1]
        self.size = self.grid.block[1] if self.grid.scale.shape[1] > 1 else columns
        self.missing = -columns % self.size
        groups = torch.nn.functional.pad(self.dense, (0, self.missing)).unflatten(1, (-1, self.size))
        self.low, self.high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        self.offsets = torch.zeros_like(self.dense, requires_grad=True)
        self.low_share = torch.ones_like(self.low, requires_grad=True)
        self.high_share = torch.ones_like(self.high, requires_grad=True)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.offsets, self.low_share, self.high_share]

    def keep(self) -> None:
        self.best = [parameter.detach().clone() for parameter in self.parameters]

    def value(self) -> Tensor:
        """What the codes stand for; gradients pass through every rounding."""
        return self._rounded()[1]

    def weight(self) -> Weight:
        """The codes of the best offsets and ranges."""
        with torch.no_grad():
            for parameter, best in zip(self.parameters, self.best, strict=True):
                parameter.copy_(best)
            codes, _, parts = self._rounded()
        assert isinstance(self.grid.codes, Codes)
        packed = Codes.of(codes.to(torch.int32), self.grid.codes.bits, self.grid.codes.signed)
        found = rtn._stored(self.grid, rtn.Range(**parts))
        return Weight(replace(self.grid, codes=packed, **found), self.target.dtype, self.target.activation)  # type: ignore[arg-type]

    def _rounded(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        parts = self.rule(self.low * self.low_share.clamp(0, 1), self.high * self.high_share.clamp(0, 1))
        # codes are chosen for the numbers that are stored
        stored = rtn._stored(self.grid, rtn.Range(**{name: part.detach() for name, part in parts.items()}))
        scale = _through(parts["scale"], stored["scale"].dense())
        zero = parts.get("zero") if "zero" in stored else None
        offset = None
        if "offset" in stored:
            meant = parts["offset"] if "offset" in parts else -scale * parts["zero"]
            offset = self._spread(_through(meant, stored["offset"].dense()))
        elif self.grid.zero is None and "zero" in parts and bool(parts["zero"].any()):
            raise NotRepresentable("the rule gives a zero point, and the grid has none")
        scale = self._spread(scale)
        numbers = (self.dense if offset is None else self.dense - offset) / scale + self.offsets
        codes = _through(numbers, numbers.detach().round())
        assert isinstance(self.grid.codes, Codes)
        if zero is not None:
            zero = self._spread(zero)
            codes = codes + zero
        codes = codes.clamp(*rtn.code_range(self.grid.codes))
        value = (codes if zero is None else codes - zero) * scale
        return codes.detach().round(), value if offset is None else value + offset, parts

    def _spread(self, parameter: Tensor) -> Tensor:
        full = parameter.repeat_interleave(self.size, 1) if parameter.shape[1] > 1 else parameter
        return full[:, : self.dense.shape[1]] if full.shape[1] > 1 else full


def tune(
    roundings: Sequence[Rounding],
    loss: Callable[[Tensor], Tensor],
    samples: int,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    seed: int = 0,
) -> Iterator[float]:
    """Train them together: `loss(rows)` is the block's mean error on the samples of these numbers. Gives each step's loss."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for rounding in roundings for parameter in rounding.parameters]
    least = float("inf")
    batch = min(batch, samples)
    waiting = torch.empty(0, dtype=torch.int64)  # every sample comes once before one comes again
    for step in range(steps):
        if len(waiting) < batch:
            waiting = torch.randperm(samples, generator=generator)
        rows, waiting = waiting[:batch], waiting[batch:]
        error = loss(rows)
        now = float(error.detach())
        if not now < float("inf"):
            raise NotRepresentable(
                f"the block's error is {now} in step {step}; calibrate in a wider dtype or with other text"
            )
        if now < least:
            least = now
            for rounding in roundings:
                rounding.keep()
        gradients = torch.autograd.grad(error * LOSS_SCALE, parameters, allow_unused=True)
        rate = (1 - step / steps) / steps
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(gradient.sign_(), alpha=rate)
        yield now
    last = [parameter.detach().clone() for parameter in parameters]
    error_of_last = _whole(loss, samples, batch)
    with torch.no_grad():
        for parameter, best in zip(parameters, [best for own in roundings for best in own.best], strict=True):
            parameter.copy_(best)
        if error_of_last < _whole(loss, samples, batch):
            for parameter, own in zip(parameters, last, strict=True):
                parameter.copy_(own)
    for rounding in roundings:
        rounding.keep()


def _whole(loss: Callable[[Tensor], Tensor], samples: int, batch: int) -> float:
    """The error over all samples."""
    with torch.no_grad():
        parts = torch.arange(samples).split(batch)
        return sum(float(loss(rows)) * len(rows) for rows in parts) / samples


def cost(rows: int, columns: int, samples: int, length: int, *, steps: int = STEPS, batch: int = BATCH) -> Cost:
    """Each step: the product, its gradients by input and weight, and about ninety passes over the numbers that are trained."""
    products = 6.0 * rows * columns * min(batch, samples) * length
    return Cost(steps * products, steps * 90.0 * rows * columns)


def memory(weights: int, widths: int, samples: int, length: int, *, batch: int = BATCH) -> int:
    """What is trained with its gradients, the best and the last of it, and what one step keeps for its gradients."""
    return 4 * (8 * weights + min(batch, samples) * length * widths)


def _through(meant: Tensor, stored: Tensor) -> Tensor:
    """`stored`, with the gradient of `meant`."""
    return meant + (stored - meant).detach()


def _signed(grid: Grid) -> rtn.Rule:
    """AutoRound's symmetric ranges: the largest magnitude, with its sign, lies on the lowest code."""
    codes = grid.codes
    assert isinstance(codes, Codes)
    half = 1 << (codes.bits - 1)
    middle = 0 if codes.signed else half

    def rule(low: Tensor, high: Tensor) -> dict[str, Tensor]:
        largest = torch.maximum(-low, high) / half
        scale = torch.where(high >= -low, -largest.clamp(min=1e-5), largest.clamp(min=1e-5))
        return {"scale": scale, "zero": torch.full_like(scale, middle)}

    return rule


def _checked(dense: Tensor, target: Weight) -> Grid:
    grid = target.tree
    if (
        not isinstance(grid, Grid)
        or not isinstance(grid.codes, Codes)
        or grid.levels is not None
        or grid.group_index is not None
        or grid.block[0] != 1
        or not isinstance(grid.scale, Values)
    ):
        raise NotRepresentable(
            "AutoRound trains grids of integer codes with a stored scale for groups of columns of each row; choose another "
            "algorithm"
        )
    return rtn._checked(dense, target)
