"""Fine-tuning of what is continuous in rounded weights: codes stay, codebooks, scales, offsets and outliers are trained (Adam).

The last step of AQLM (arXiv 2401.06118, 3.3) and of VPTQ (arXiv 2409.17066, 3.3), here for every weight tree: all weights of a
decoder block together, so that the block, fed with what quantized blocks before it give, comes close to what the dense block made
of dense inputs. Zero points and codes are integers, and tables that a format fixes are its own: they stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from anybit.errors import NotRepresentable
from anybit.weight import Codebook, Node, Values, Weight
from anybit.weight.nodes import Grid, Sum, map_nodes

STEPS, RATE, BATCH = 100, 0.01, 8


@dataclass
class Tuned:
    """One rounded matrix or stack whose numbers are being trained. `fixed_tables`: those of codebooks belong to the format."""

    weight: Weight
    fixed_tables: bool = False
    parameters: list[Tensor] = field(default_factory=list)
    stored: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        def collect(tensor: Tensor) -> Tensor:
            self.stored.append(tensor)
            self.parameters.append(tensor.to(torch.float32).clone().requires_grad_())
            return tensor

        self._trained(self.weight.tree, collect)
        if not self.parameters:
            raise NotRepresentable("the weight has no number that could be trained; leave out finetune")

    def value(self) -> Tensor:
        """The dense weight, float32; gradients pass through the rounding to what is stored."""
        numbers = iter(self.parameters)
        dtypes = iter(self.stored)

        def current(_: Tensor) -> Tensor:
            meant, dtype = next(numbers), next(dtypes).dtype
            return meant + (meant.to(dtype).to(torch.float32) - meant).detach()

        made = replace(self.weight, tree=_in_float32(self._trained(self.weight.tree, current)))
        parts = [made] if len(made.shape) == 2 else [made.select(expert) for expert in range(made.shape[0])]
        found = [part.tree.region(slice(0, part.shape[0]), slice(0, part.shape[1])) for part in parts]
        return found[0] if len(made.shape) == 2 else torch.stack(found)

    def finished(self) -> Weight:
        """The weight as it is stored."""
        numbers = iter([own.detach().to(old.dtype) for own, old in zip(self.parameters, self.stored, strict=True)])
        return replace(self.weight, tree=self._trained(self.weight.tree, lambda _: next(numbers)))

    def _trained(self, tree: Node, change: Callable[[Tensor], Tensor]) -> Node:
        """The tree with every tensor that is trained replaced, always in the same order."""

        def each(node: Node) -> Node | None:
            if isinstance(node, Values):
                # one number may be shared by several weights of a model
                is_trained = node.levels is None and node.tensor.is_floating_point() and node.tensor.numel() > 1
                return replace(node, tensor=change(node.tensor)) if is_trained else node
            if isinstance(node, Codebook) and not self.fixed_tables and not isinstance(node.tables, str):
                tables = change(node.tables)
                return replace(node, tables=tables, scale=None if node.scale is None else map_nodes(node.scale, each))
            return None

        return map_nodes(tree, each)


def _in_float32(tree: Node) -> Node:
    """The same numbers without the format's own rounding of each operation, through which no gradient of use comes."""

    def each(node: Node) -> Node | None:
        if isinstance(node, (Grid, Sum, Codebook)) and node.compute != "float32":
            return map_nodes(replace(node, compute="float32"), each)
        return None

    return map_nodes(tree, each)


def refine(
    tuned: Sequence[Tuned],
    loss: Callable[[Tensor], Tensor],
    samples: int,
    *,
    tuning_steps: int = STEPS,
    tuning_rate: float = RATE,
    tuning_batch: int = BATCH,
    tuning_seed: int = 0,
) -> tuple[float, float]:
    """Train them together; `loss(rows)` is the block's error on the samples of these numbers. The error on all before and after.

    Numbers of one tensor move by up to `tuning_rate` of their root mean square in a step; the rate falls to 0. Where the error on
    all samples is not smaller afterwards, everything is as it was.
    """
    generator = torch.Generator().manual_seed(tuning_seed)
    parameters = [parameter for own in tuned for parameter in own.parameters]
    first = [parameter.detach().clone() for parameter in parameters]
    rates = [float(tuning_rate * parameter.square().mean().sqrt().clamp(min=1e-12)) for parameter in first]
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in zip(parameters, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    before = _error(loss, samples, tuning_batch)
    batches = _batches(samples, tuning_batch, generator)
    for step in range(tuning_steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / tuning_steps)
        error = loss(next(batches))
        gradients = torch.autograd.grad(error, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    after = _error(loss, samples, tuning_batch)
    if not after < before:  # NaN included
        with torch.no_grad():
            for parameter, old in zip(parameters, first, strict=True):
                parameter.copy_(old)
        after = before
    return before, after


def _batches(samples: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """All samples in another order each time."""
    while True:
        yield from torch.randperm(samples, generator=generator).split(min(batch, samples))


def _error(loss: Callable[[Tensor], Tensor], samples: int, batch: int) -> float:
    with torch.no_grad():
        parts = [(len(rows), float(loss(rows))) for rows in torch.arange(samples).split(batch)]
    return sum(count * error for count, error in parts) / samples
