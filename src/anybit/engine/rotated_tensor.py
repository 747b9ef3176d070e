"""What a rotation does to one stored tensor: rows, columns and the gain of the norm in front, a run of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.algorithms._hadamard import Turn

ELEMENTS = 1 << 22  # numbers of a temporary


@dataclass(frozen=True)
class Change:
    """What is done to one stored tensor [..., rows, columns] or vector: in this order, every part that is there."""

    gain: Callable[[Tensor], Tensor] | None = None  # the stored norm -> what columns are multiplied by
    columns: tuple[Turn, ...] = ()
    rows: tuple[tuple[Turn, int], ...] = ()  # turns of the rows from that number on
    transposed: bool = False
    constant: float | None = None  # the tensor becomes this number everywhere

    def run(self, tensors: list[Tensor]) -> Tensor:
        """`tensors`: the stored one and, for `gain`, that of the norm in front."""
        stored = tensors[0]
        if self.constant is not None:
            return torch.full_like(stored, self.constant)
        gain = None if self.gain is None else self.gain(tensors[1])
        compute = torch.float64 if stored.dtype == torch.float64 else torch.float32
        if stored.dim() == 1:
            return self._turned_rows(stored.to(compute)[:, None])[:, 0].to(stored.dtype)
        made = torch.empty_like(stored)
        source, target = (stored.mT, made.mT) if self.transposed else (stored, made)
        source, target = source.reshape(-1, *source.shape[-2:]), target.view(-1, *target.shape[-2:])
        for matrix, place in zip(source, target, strict=True):
            for part in _runs(matrix, whole=bool(self.rows)):
                numbers = matrix[part].to(compute)
                if gain is not None:
                    numbers = numbers * gain.to(compute)
                for turn in self.columns:
                    numbers = turn.columns(numbers)
                place[part] = self._turned_rows(numbers).to(stored.dtype)
        return made

    def _turned_rows(self, numbers: Tensor) -> Tensor:
        for turn, start in self.rows:
            numbers = torch.cat([numbers[:start], turn.rows(numbers[start:])])
        return numbers


def _runs(matrix: Tensor, whole: bool) -> Iterator[slice]:
    rows = len(matrix)
    step = rows if whole else max(1, ELEMENTS // matrix.shape[1])
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def as_stored(weight: Tensor) -> Tensor:
    """A norm multiplies by its weight."""
    return weight


def one_more(weight: Tensor) -> Tensor:
    """Gemma's multiply by 1 + weight."""
    return weight.double() + 1
