"""Orthogonal matrices that spread outliers over all columns, and fast products with them.

A width n = m * 2**k is turned by  D1 (C_m x H_k) D2:  H_k is Sylvester's matrix of 2**k, C_m the cosine transform of the odd
rest m (1 for a power of two), D1 and D2 are diagonals of signs. With signs on both sides a layout that rotates by Hadamard
blocks itself does not undo it, as H H = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.weight.nodes import hadamard


@dataclass(frozen=True)
class Turn:
    """One orthogonal matrix Q [size, size]: the same for the same seed; `seed` None: no signs. Products keep dtype and device."""

    size: int
    seed: int | None = 0

    def columns(self, x: Tensor) -> Tensor:
        """x [..., k * size] -> every run of `size` columns times Q."""
        first, last = self._signs(x)
        runs = x.unflatten(-1, (-1, self.size))
        turned = _spread(runs if first is None else runs * first)
        return (turned if last is None else turned * last).flatten(-2)

    def rows(self, x: Tensor) -> Tensor:
        """x [..., k * size, columns] -> Q^T times every run of `size` rows."""
        return self.columns(x.transpose(-1, -2)).transpose(-1, -2)

    def _signs(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.seed is None:
            return None, None
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(0, 2, (2, self.size), generator=generator).to(like.device, like.dtype) * 2 - 1
        return signs[0], signs[1]


def power_of_two_in(size: int) -> int:
    """The largest power of two that divides it."""
    return size & -size


def _spread(x: Tensor) -> Tensor:
    """x [..., n] times C_m x H_k, normalised."""
    size = x.shape[-1]
    power = power_of_two_in(size)
    bits = power.bit_length() - 1
    # H_k is the Kronecker product of two small ones, which cost 2 * sqrt(2**k) products a number instead of 2**k
    y = x.unflatten(-1, (size // power, 1 << (bits // 2), -1))
    y = _plus_minus(y.shape[-2], x) @ y @ _plus_minus(y.shape[-1], x)
    if size > power:
        y = torch.einsum("...mab,mq->...qab", y, _cosines(size // power, x))
    return y.flatten(-3) / math.sqrt(power)


def _plus_minus(size: int, like: Tensor) -> Tensor:
    """Sylvester's matrix of ones, some negative."""
    return hadamard(size, like.device).sign().to(like.dtype)


def _cosines(size: int, like: Tensor) -> Tensor:
    """The orthonormal discrete cosine transform (DCT-II), [size, size]."""
    place = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (place[:, None] + 0.5) * place) * math.sqrt(2 / size)
    matrix[:, 0] = math.sqrt(1 / size)
    return matrix.to(like.device, like.dtype)
