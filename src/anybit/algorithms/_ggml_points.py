"""llama.cpp's searches for its i-quants: which points of a fixed table, with which signs and scales. Iwan Kawrakow's method.

Magnitudes of a block are rounded to odd numbers for a ladder of scales; a group of 8 (or 4) that is no point of the table goes to
the best one, and the scale is refitted. The best scale of the ladder wins. The blocks of a super-block then share d, multiplied
by a small constant that llama.cpp found by trial. llama.cpp looks for the best point among those next to the group only; all of
them, as a product of matrices, take less time here and are never worse.

    IQ2_XXS, IQ2_XS, IQ3_XXS   an even number of minus signs in 8: else the sign that matters least is flipped
    IQ2_S, IQ3_S               a sign for each weight
    IQ1_S, IQ1_M               -1, 0, 1 plus a shift of 1/8 up or down: every cut of the sorted block in three is tried

Where llama.cpp takes a flipped magnitude for 255 when it first fits a scale (IQ2_XXS), it is what it is here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.algorithms.ggml_search import EMPTY, Fields, positive
from anybit.errors import NotRepresentable
from anybit.weight import points

SUPER = 256


# --- tables -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Points as levels 0, 1, ... of every element, float32 [points, wide]. `index`: word of levels (in base `base`) -> point, or
    -1."""

    levels: Tensor
    base: int
    index: Tensor

    def words(self, levels: Tensor) -> Tensor:
        """[..., wide] -> [...]"""
        powers = self.base ** torch.arange(levels.shape[-1], device=levels.device, dtype=torch.float32)
        return (levels @ powers).to(torch.int64)


@functools.lru_cache(maxsize=16)
def _table(name: str, device: str) -> Table:
    stored = points.table(name)[0, :, 0].to(torch.int64)
    values = stored.unique()
    levels = torch.searchsorted(values, stored)
    base, wide = len(values), stored.shape[1]
    index = torch.full((base**wide,), -1)
    index[(levels * base ** torch.arange(wide)).sum(1)] = torch.arange(len(stored))
    return Table(levels.float().to(device), base, index.to(device))


def _closest(values: Tensor, x: Tensor, w: Tensor, scale: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """For groups x [n, wide] the point of least sum w (scale * (value + shift) - x)**2. `scale`, `shift`: [n, 1]."""
    errors = torch.cat([values * values, values], 1).T.contiguous()
    own = torch.cat([w * scale * scale, 2 * w * scale * (scale * shift - x)], 1)
    return torch.cat([_least(part @ errors) for part in own.split(512)])


def _least(numbers: Tensor) -> Tensor:
    """argmin of every row; torch finds the minimum of a run much faster than its place."""
    rows, columns = numbers.shape
    runs = numbers.view(rows, -1, 32 if columns < 1024 else 64)
    best = runs.amin(-1).argmin(1)
    return best * runs.shape[-1] + runs[torch.arange(rows, device=numbers.device), best].argmin(1)


# --- magnitudes on a table --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """`block`: weights that share a scale. `spread`: of the mean square in the weights of errors. `ladder`: steps up and down,
    and their size. `again`: after the ladder, "off": only groups that were no points are rounded anew; "any": all, if one of
    them was none; "all". `stretch`: d is multiplied by it."""

    table: str
    block: int
    spread: float
    even: bool
    ladder: tuple[int, float]
    again: str
    stretch: float


RULES = {
    "IQ2_XXS": Rule("iq2_xxs", 32, 1.0, True, (6, 0.1), "all", 1.0),
    "IQ2_XS": Rule("iq2_xs", 16, 1.0, True, (9, 0.1), "off", 1.0),
    "IQ2_S": Rule("iq2_s", 16, 2.0, False, (9, 0.1), "off", 0.9875),
    "IQ3_XXS": Rule("iq3_xxs", 32, 2.0, True, (15, 0.2), "off", 1.0125),
    "IQ3_S": Rule("iq3_s", 32, 2.0, False, (9, 0.2), "any", 1.033),
}


def _weights(rows: Tensor, importance: Tensor | None, spread: float, name: str) -> Tensor:
    """Of the square errors, like rows."""
    square = rows.unflatten(-1, (-1, SUPER)).square()
    mean = spread * square.mean(-1, keepdim=True)
    if not bool(torch.isfinite(mean).all()):
        raise NotRepresentable(
            "the weight holds NaN, infinity, or numbers too large for float16 scales. Mend it, or leave the module out"
        )
    if importance is None:
        return (square + 0.25 * mean if name == "IQ2_S" else square).flatten(-2)
    return (importance.unflatten(-1, (-1, SUPER)) * (mean + square).sqrt_()).flatten(-2)


def _signs(x: Tensor, w: Tensor, even: bool) -> tuple[Tensor, Tensor]:
    """Magnitudes, and minus signs as integers [n, 8]; with `even`, one of 8 magnitudes may be below zero instead."""
    minus = x < 0
    sizes = x.abs()
    if even:
        odd = minus.sum(-1) % 2 == 1
        least = (w * x * x).argmin(-1, keepdim=True)
        flip = torch.zeros_like(minus).scatter_(-1, least, odd[:, None])
        minus, sizes = minus ^ flip, torch.where(flip, -sizes, sizes)
    return sizes, minus.to(torch.int64)


def _magnitudes(name: str) -> Callable[..., Fields]:
    rule = RULES[name]

    def fields(rows: Tensor, importance: Tensor | None) -> Fields:
        table = _table(rule.table, str(rows.device))
        wide = table.levels.shape[1]
        w = _weights(rows, importance, rule.spread, name)
        sizes, minus = _signs(rows.reshape(-1, 8), w.view(-1, 8), rule.even)
        x, w = sizes.view(-1, rule.block), w.view(-1, rule.block)
        # without importance x * x is the weight of an error: a point would be chosen as if small numbers did not matter
        choice = torch.ones_like(w) if importance is None else w.sqrt()
        search = _Search(table, x, w, choice.view(-1, wide), wide)
        empty = x.amax(-1) < {"IQ3_XXS": 1e-8, "IQ2_S": 1e-8, "IQ3_S": 1e-38}.get(name, EMPTY)
        index, scale = search.best(rule, name, empty)
        flipped = scale < 0  # a block whose magnitudes the flips made negative
        scale = scale.abs()
        minus = minus.view(len(x), -1, 8) ^ flipped[:, None, None].to(torch.int64)
        minus = torch.where(empty[:, None, None], 0, minus)
        d, sc = _shared(scale.view(rows.shape[0], -1, SUPER // rule.block), 31, 15)
        none = (d == 0).repeat_interleave(SUPER // wide, -1)
        index = torch.where(none, 0, index.view(rows.shape[0], -1))
        minus = torch.where((d == 0)[..., None], 0, minus.view(rows.shape[0], -1, SUPER)).view(-1, 8)
        bits = 7 if rule.even else 8
        signs = (minus[:, :bits] << torch.arange(bits, device=rows.device)).sum(-1)
        if not rule.even:  # a bit for each weight
            signs = minus
        return {
            "q": index, "signs": signs.view(rows.shape[0], -1), "sc": sc,
            "d": (d * rule.stretch).to(torch.float16),
        }  # fmt: skip

    return fields


@dataclass
class _Search:
    """Blocks [n, block] of magnitudes and weights, looked up as groups of `wide`; `choice`: weights for that, [groups, wide]."""

    table: Table
    x: Tensor
    w: Tensor
    choice: Tensor
    wide: int

    def __post_init__(self) -> None:
        self.groups = self.x.view(-1, self.wide)
        self.wx = self.w * self.x
        self.odd = 2 * self.table.levels + 1

    def best(self, rule: Rule, name: str, empty: Tensor) -> tuple[Tensor, Tensor]:
        """Points [n, groups of a block] and scales [n]."""
        top = 2 * self.table.base - 1
        largest = self.x.amax(-1)
        scale = largest / top
        steps, size = rule.ladder
        if name == "IQ2_XXS":
            fitted = positive(self.x.T.contiguous(), self.w.T.contiguous(), self.table.base + 1)[0]
            scale, largest = fitted, fitted * self.table.base
            empty |= ~(largest > 0)
        largest = torch.where(empty, 1.0, largest)
        best = torch.zeros_like(scale)
        index = torch.zeros(len(self.x), self.x.shape[1] // self.wide, dtype=torch.int64, device=self.x.device)
        on = torch.full_like(index, name != "IQ3_S", dtype=torch.bool)
        for step in range(-steps, steps + 1):
            inverse = (top + step * size) / largest
            found, hit = self.rounded(inverse)
            first, second = self.sums(found)
            better = (second > 0) & (first * first > best * second)
            scale = torch.where(better, first / second, scale)
            best = torch.where(better, scale * first, best)
            index, on = torch.where(better[:, None], found, index), torch.where(better[:, None], hit, on)
        again = (scale > 0) & ~empty
        if rule.again != "all":
            again &= ~on.all(-1)
        found, _ = self.rounded(torch.where(scale > 0, 1 / scale, 1.0))
        change = again[:, None] & (~on if rule.again == "off" else torch.ones_like(on))
        index = torch.where(change, found, index)
        first, second = self.sums(index)
        scale = torch.where(again & (second > 0), first / second, scale)
        return torch.where(empty[:, None], 0, index), torch.where(empty, 0.0, scale)

    def rounded(self, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Points, and whether a group's levels were a point as they are."""
        table = self.table
        levels = (0.5 * (inverse[:, None] * self.x - 1)).round_().clamp_(0, table.base - 1)
        words = table.words(levels.view(-1, self.wide))
        index = table.index[words]
        hit = index >= 0
        rest = torch.nonzero(~hit).flatten()
        if len(rest):
            scale = (1 / inverse).repeat_interleave(self.x.shape[1] // self.wide)[rest, None]
            index[rest] = _closest(self.odd, self.groups[rest], self.choice[rest], scale)
        shape = (len(self.x), -1)
        return index.view(shape), hit.view(shape)

    def sums(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """sum w x q, sum w q q."""
        q = self.odd[index].view(self.x.shape)
        return (self.wx * q).sum(-1), (self.w * q * q).sum(-1)


def _shared(scales: Tensor, top: int, limit: int) -> tuple[Tensor, Tensor]:
    """[rows, super-blocks, blocks] -> d [rows, super-blocks], and codes for the odd multiples of d nearest to the scales."""
    d = scales.amax(-1) / top
    codes = (0.5 * (torch.where(d > 0, 1 / d, 0.0)[..., None] * scales - 1)).round_().clamp_(0, limit)
    return d, codes.flatten(-2).to(torch.int64)


# --- one bit and a half -----------------------------------------------------------------------------------------------------

SHIFT = 0.125


def _ternary(name: str) -> Callable[..., Fields]:
    """Blocks of 32 with one shift (IQ1_S), or of 16 with one for each half (IQ1_M)."""
    block, halves = (32, 1) if name == "IQ1_S" else (16, 2)

    def fields(rows: Tensor, importance: Tensor | None) -> Fields:
        table = _table("iq1", str(rows.device))
        x = rows.reshape(-1, block)
        w = _weights(rows, importance, 2.0, name).view(-1, block)
        empty = x.abs().amax(-1) < (1e-12 if name == "IQ1_S" else 1e-7)
        levels, scale, shift = _three_parts(x, w, halves)
        levels = torch.where(empty[:, None], 1.0, levels)
        scale = torch.where(empty, 0.0, scale)
        shift = torch.where(empty[:, None], SHIFT, shift)
        each = shift.repeat_interleave(block // 8 // halves, -1).reshape(-1)  # of groups of 8
        words = table.words(levels.view(-1, 8))
        index = table.index[words]
        rest = torch.nonzero(index < 0).flatten()
        if len(rest):
            factor, moved = scale.repeat_interleave(block // 8)[rest, None], each[rest, None]
            choice = w.view(-1, 8)[rest] if importance is not None else torch.ones(len(rest), 8, device=x.device)
            index[rest] = _closest(table.levels - 1, x.view(-1, 8)[rest], choice, factor, moved)
            off = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            off[rest // (block // 8)] = True
            q = (table.levels[index] - 1 + each[:, None]).view(x.shape)
            first, second = (w * q * x).sum(-1), (w * q * q).sum(-1)
            scale = torch.where(off & ~empty & (first > 0) & (second > 0), first / second, scale)
        d, sc = _shared(scale.view(rows.shape[0], -1, SUPER // block), 15, 7)
        down = (shift < 0).to(torch.int64)
        if name == "IQ1_S":
            return {
                "q": index.view(rows.shape[0], -1), "sc": sc, "shift": down.view(rows.shape[0], -1),
                "d": (d * 1.125).to(torch.float16),
            }  # fmt: skip
        q = (table.levels[index] - 1 + each[:, None]).view(-1, SUPER // block, block)
        q = (q * (2 * sc.view(-1, SUPER // block, 1) + 1)).view(-1, SUPER)
        x, w = x.view(-1, SUPER), w.view(-1, SUPER)
        first, second = (w * q * x).sum(-1), (w * q * q).sum(-1)
        fitted = torch.where((second > 0) & (d.view(-1) > 0), first / second, d.view(-1)).view(d.shape)
        return {
            "q": (index + 2048 * down.view(-1)).view(rows.shape[0], -1), "sc": sc,
            "d": (fitted * 1.1125).to(torch.float16),
        }  # fmt: skip

    return fields


def _three_parts(x: Tensor, w: Tensor, halves: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best cut of every sorted block in -1, 0 and 1, each plus a shift: levels [n, block], scales, shifts [n, halves]."""
    count, block = x.shape
    order = x.argsort(dim=-1, stable=True)
    half = order // (block // halves)
    sums = []  # of w x and of w, over the first so many of the sorted block, for each half
    for values in (w * x, w):
        taken = values.gather(-1, order)
        own = [torch.where(half == number, taken, 0.0).cumsum(-1) for number in range(halves)]
        sums.append([torch.cat([total.new_zeros(count, 1), total], -1) for total in own])
    lower, upper = torch.triu_indices(block + 1, block + 1, device=x.device)  # all 0 <= lower <= upper <= block
    found: list[tuple[Tensor, ...]] = []  # for every choice of shifts: gain, scale and number of the best cut
    for signs in range(2**halves):
        first = second = torch.zeros((), device=x.device)
        for number in range(halves):
            shift = -SHIFT if signs >> (halves - 1 - number) & 1 else SHIFT
            below, above = -1 + shift, 1 + shift
            wx, ww = sums[0][number], sums[1][number]
            first = first + above * wx[:, -1:] - wx[:, lower] - wx[:, upper]
            second = second + above * above * ww[:, -1:] + (below * below - shift * shift) * ww[:, lower]
            second = second + (shift * shift - above * above) * ww[:, upper]
        gain, cut = torch.where(second > 0, first * first / second, -1.0).max(-1)
        found.append((gain, (first.gather(-1, cut[:, None]) / second.gather(-1, cut[:, None]))[:, 0], cut))
    gains, scales, cuts = (torch.stack(own) for own in zip(*found, strict=True))
    which = gains.argmax(0, keepdim=True)
    gain, scale, cut = (own.gather(0, which)[0] for own in (gains, scales, cuts))
    place = torch.arange(block, device=x.device)
    sorted_levels = (place >= lower[cut][:, None]).float() + (place >= upper[cut][:, None]).float()
    levels = torch.empty_like(x).scatter_(-1, order, sorted_levels)
    bits = which.T >> torch.arange(halves - 1, -1, -1, device=x.device) & 1
    shifts = torch.where(bits == 1, -SHIFT, SHIFT)
    negative, nothing = (scale < 0)[:, None], (gain <= 0)[:, None]
    return (
        torch.where(nothing, 1.0, torch.where(negative, 2 - levels, levels)),
        torch.where(nothing[:, 0], 0.0, scale.abs()),
        torch.where(nothing, SHIFT, torch.where(negative, -shifts, shifts)),
    )


POINTS: dict[str, Callable[..., Fields]] = {
    **{name: _magnitudes(name) for name in RULES},
    "IQ1_S": _ternary("IQ1_S"),
    "IQ1_M": _ternary("IQ1_M"),
}
