"""llama.cpp's searches for the scales of k-quants, IQ4 and weighted blocks: the candidates it tries, in its order of sums.

A block is a column of a float32 matrix [elements, blocks], so that all blocks are searched at once. Every search minimises the
weighted square error (Q2_K without importance: the weighted absolute error) over a ladder of scales, each refitted by least
squares. Weights of the error come from the numbers themselves, and from `importance`, the mean square of each input.

    symmetric    x ~ scale * q, q from -half to half - 1       Q6_K, Q3_K and Q4_0, Q5_0 with importance
    descent      the same, one code at a time                  Q3_K
    ranged       x ~ scale * q + minimum, minimum <= 0         Q2_K, Q4_K, Q5_K and Q4_1, Q5_1 with importance
    positive     the same without a minimum                    scales of scales, with importance
    table        x ~ scale * table[q]                          IQ4_NL, IQ4_XS
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from anybit.weight.levels import table

Fields = dict[str, Tensor]  # numbers [rows, n] and integer codes [rows, n] by the names of the layout's leaves
EMPTY = 1e-15  # a block whose largest magnitude is less is all zeros


# --- searches -------------------------------------------------------------------------------------------------------------


def _extreme(x: Tensor) -> Tensor:
    """Of each block the number of largest magnitude; of equal ones the first."""
    return x.gather(0, x.abs().argmax(0, keepdim=True))[0]


def _sum(numbers: Tensor) -> Tensor:
    """[elements, blocks] -> [blocks]: sixteen after one another, then the next sixteen; the same on every machine."""
    total = torch.zeros_like(numbers[0])
    for part in numbers.split(16):
        own = part[0].clone()
        for row in part[1:]:
            own += row
        total += own
    return total


def _root(numbers: Tensor) -> Tensor:
    """Square roots, rounded correctly: torch's own of float32 are not on every machine."""
    return numbers.to(torch.float64).sqrt_().to(torch.float32)


def _sum_across(numbers: Tensor) -> Tensor:
    """[..., n] -> [..., 1]: sixteen running sums, folded in halves."""
    running = numbers.unflatten(-1, (-1, 16)).movedim(-2, 0)
    total = torch.zeros_like(running[0])
    for part in running:
        total = total + part
    for half in (8, 4, 2, 1):
        total = total[..., :half] + total[..., half:]
    return total


def _refit(x: Tensor, wx: Tensor, w: Tensor, codes: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """sum w x q, sum w q q."""
    first = _sum(torch.mul(wx, codes, out=room))
    return first, _sum(torch.mul(w, codes, out=room).mul_(codes))


def symmetric(x: Tensor, w: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Scales, and codes from 0 to 2 half - 1."""
    largest = _extreme(x)
    empty = largest.abs() < EMPTY
    largest = torch.where(empty, 1.0, largest)
    wx, codes, room = w * x, torch.empty_like(x), torch.empty_like(x)
    best_inverse, scale, best = -half / largest, None, None
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(half + 0.1 * step) / largest
        torch.mul(x, inverse, out=codes).round_().clamp_(-half, half - 1)
        first, second = _refit(x, wx, w, codes, room)
        if scale is None or best is None:
            scale = torch.where(second > 0, first / second, 0.0)
            best = scale * first
            continue
        better = (second > 0) & (first * first > best * second)
        scale = torch.where(better, first / second, scale)
        best = torch.where(better, scale * first, best)
        best_inverse = torch.where(better, inverse, best_inverse)
    torch.mul(x, best_inverse, out=codes).round_().clamp_(-half, half - 1).add_(half)
    assert scale is not None
    return torch.where(empty, 0.0, scale), torch.where(empty, 0.0, codes)


def descent(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """As `symmetric` with weights x * x: from one scale, codes are moved one by one while that lowers the error."""
    largest = _extreme(x)
    empty = largest.abs() < EMPTY
    codes = (x * (-half / torch.where(empty, 1.0, largest))).round_().clamp_(-half, half - 1)
    w = x * x
    wx = w * x
    first, second = _refit(x, wx, w, codes, torch.empty_like(x))
    for _ in range(5):
        changed = False
        for place in range(x.shape[0]):
            own, mine = codes[place], x[place]
            one, two = first - wx[place] * own, second - w[place] * own * own
            moved = (mine * two / one).round_().clamp_(-half, half - 1)
            one_moved, two_moved = one + wx[place] * moved, two + w[place] * moved * moved
            better = (one > 0) & (moved != own) & (two_moved > 0)
            better &= one_moved * one_moved * second > first * first * two_moved
            if bool(better.any()):
                changed = True
                codes[place] = torch.where(better, moved, own)
                first, second = torch.where(better, one_moved, first), torch.where(better, two_moved, second)
        if not changed:
            break
    scale = torch.where(second > 0, first / second, 0.0)
    return torch.where(empty, 0.0, scale), torch.where(empty, 0.0, codes + half)


def ranged(
    x: Tensor, w: Tensor, highest: int, start: float, step: float, steps: int, *, absolute: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, minimums times -1, codes from 0 to `highest`. `absolute`: the error is not squared."""
    low, high = x.amin(0).clamp_(max=0), x.amax(0)
    empty = high <= low
    width = torch.where(empty, 1.0, high - low)
    above = x - low  # fits are done from the minimum on: sums of small numbers
    total, total_above = _sum(w), _sum(w * above)
    wa, codes, room = w * above, torch.empty_like(x), torch.empty_like(x)
    energy = _sum(wa * above)

    def error(scale: Tensor, offset: Tensor, sums: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """`offset`: minimum less `low`."""
        if absolute:
            torch.mul(codes, scale, out=room).add_(offset).sub_(above).abs_().mul_(w)
            return _sum(room)
        one, two, cross = sums
        return (
            energy + scale * (scale * two - 2 * cross + 2 * offset * one) + offset * (offset * total - 2 * total_above)
        )

    def rounded(inverse: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sum w q, sum w q q, sum w q x (x from the minimum on)."""
        torch.sub(above, start, out=codes).mul_(inverse).round_().clamp_(0, highest)
        torch.mul(w, codes, out=room)
        one = _sum(room)
        two = _sum(room.mul_(codes))
        return one, two, _sum(torch.mul(wa, codes, out=room))

    inverse, offset = highest / width, torch.zeros_like(low)
    scale = 1 / inverse
    best = error(scale, offset, rounded(inverse, offset))
    chosen = inverse, offset
    for number in range(steps + 1):
        inverse = (start + step * number + highest) / (width - offset)  # from the best minimum so far
        sums = one, two, cross = rounded(inverse, offset)
        spread = total * two - one * one
        fitted = (total * cross - total_above * one) / spread
        moved = (two * total_above - one * cross) / spread
        positive = moved + low > 0  # a minimum above zero cannot be stored
        fitted = torch.where(positive, (cross + low * one) / two, fitted)
        moved = torch.where(positive, -low, moved)
        found = error(fitted, moved, sums)
        better = (spread > 0) & (found < best)
        best, scale = torch.where(better, found, best), torch.where(better, fitted, scale)
        chosen = torch.where(better, inverse, chosen[0]), torch.where(better, offset, chosen[1])
        offset = torch.where(better, moved, offset)
    torch.sub(above, chosen[1], out=codes).mul_(chosen[0]).round_().clamp_(0, highest)
    return (
        torch.where(empty, 0.0, scale),
        -(low + torch.where(empty, 0.0, offset)),
        torch.where(empty, 0.0, codes),
    )


def positive(x: Tensor, w: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """One scale for numbers that are not negative, and codes from 0 to `highest`."""
    largest = x.amax(0).clamp_(min=0)
    empty = largest < EMPTY
    largest = torch.where(empty, 1.0, largest)
    best_inverse, best = highest / largest, None
    for step in (0, *range(-4, 0), *range(1, 5)):
        inverse = (0.1 * step + highest) / largest
        codes = (x * inverse).round_().clamp_(max=highest)
        error = _sum(w * (x - codes / inverse).square_())
        if best is None:
            best = error
            continue
        better = error < best
        best, best_inverse = torch.where(better, error, best), torch.where(better, inverse, best_inverse)
    codes = (x * best_inverse).round_().clamp_(0, highest)
    wx = w * x
    first, second = _refit(x, wx, w, codes, torch.empty_like(x))
    for _ in range(5):
        changed = False
        for place in range(x.shape[0]):
            own = codes[place]
            one, two = first - wx[place] * own, second - w[place] * own * own
            moved = (x[place] * two / one).round_().clamp_(0, highest)
            one_moved, two_moved = one + wx[place] * moved, two + w[place] * moved * moved
            better = (one > 0) & (two > 0) & (moved != own)
            better &= one_moved * one_moved * second > first * first * two_moved
            if bool(better.any()):
                changed = True
                codes[place] = torch.where(better, moved, own)
                first, second = torch.where(better, one_moved, first), torch.where(better, two_moved, second)
        if not changed:
            break
    scale = torch.where(second > 0, first / second, 0.0)
    return torch.where(empty, 0.0, scale), torch.where(empty, 0.0, codes)


@functools.lru_cache(maxsize=4)
def _nearest(device: str) -> tuple[Tensor, Tensor]:
    """Code and value of the table entry nearest to (n - 256) / 2; borders lie at halves, and belong to the upper entry."""
    values = table("iq4_nl").to(torch.float32)
    borders = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(torch.arange(-256, 256) / 2, borders, right=True)
    return codes.to(device), values[codes].to(device)


def _places(x: Tensor, inverse: Tensor) -> Tensor:
    """Where `_nearest` has each number."""
    return (x * (2 * inverse)).floor_().clamp_(-256, 255).add_(256).to(torch.int32)


def _at(values: Tensor, places: Tensor) -> Tensor:
    return values.index_select(0, places.view(-1)).view(places.shape)


def in_table(x: Tensor, w: Tensor) -> Tensor:
    """Scales for IQ4's table."""
    values = _nearest(str(x.device))[1]
    lowest = float(values[0])
    largest = _extreme(x)
    empty = largest.abs() < EMPTY
    largest = torch.where(empty, 1.0, largest)
    wx, room = w * x, torch.empty_like(x)
    scale = best = None
    for lower in (-lowest, *(lowest + step for step in range(-7, 8))):
        inverse = lower / largest
        first, second = _refit(x, wx, w, _at(values, _places(x, inverse)), room)
        if scale is None or best is None:
            scale = torch.where(second > 0, first / second, 0.0)
            best = scale * first
            continue
        better = (second > 0) & (first * first > best * second)
        scale = torch.where(better, first / second, scale)
        best = torch.where(better, scale * first, best)
    assert scale is not None
    return torch.where(empty, 0.0, scale)


# --- types ----------------------------------------------------------------------------------------------------------------


def _columns(rows: Tensor, width: int) -> Tensor:
    """[rows, in] -> [width, blocks], row after row."""
    return rows.reshape(-1, width).T.contiguous()


def _weights(rows: Tensor, importance: Tensor, over: int, factor: float) -> Tensor:
    """importance * sqrt(factor * mean square of `over` numbers + x * x), like rows."""
    groups = rows.unflatten(-1, (-1, over))
    square = groups * groups
    mean = _sum_across(square) / over
    return (importance.unflatten(-1, (-1, over)) * _root(factor * mean + square)).flatten(-2)


def _half(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """As stored, and as read; a zero is 0.0."""
    stored = (numbers + 0.0).to(torch.float16)
    return stored, stored.to(torch.float32)


def _inverse(numbers: Tensor) -> Tensor:
    return torch.where(numbers == 0, 0.0, 1 / numbers)


def _largest_first(scales: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """[in a super-block, super-blocks] -> one scale and codes up to `limit`: the largest is exact."""
    largest = scales.amax(0).clamp_(min=0)
    codes = (torch.where(largest > 0, limit / largest, 0.0) * scales).round_().clamp_(0, limit)
    return largest / limit, codes


def _signed_first(scales: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """The same for scales of both signs, and codes from -half."""
    largest = _extreme(scales)
    inverse = torch.where(largest.abs() < EMPTY, 0.0, -half / largest)
    return _inverse(inverse), (inverse * scales).round_().clamp_(-half, half - 1)


def _grid(rows: Tensor, codes: Tensor) -> Tensor:
    """Codes of [width, blocks] as integers [rows, in]."""
    return codes.T.reshape(rows.shape).to(torch.int16)


def _of_rows(rows: Tensor, values: Tensor) -> Tensor:
    """[in a super-block, super-blocks] -> [rows, n]."""
    return values.T.reshape(rows.shape[0], -1)


def _per_block(values: Tensor) -> Tensor:
    """[in a super-block, super-blocks] -> [blocks]."""
    return values.T.reshape(-1)


def _with_minimum(
    width: int, highest: int, limit: int, ladder: tuple[float, float, int], factor: float
) -> Callable[..., Fields]:
    """Q2_K, Q4_K, Q5_K. `ladder`: without importance. `factor`: of the mean square, with it."""

    def fields(rows: Tensor, importance: Tensor | None) -> Fields:
        x, many = _columns(rows, width), 256 // width
        if importance is not None:
            w = _columns(_weights(rows, importance, 256, factor), width)
            scale, minimum, codes = ranged(x, w, highest, -0.9, 0.05, 36)
            heavy = _sum(w).view(-1, many).T
            d, sc = positive(scale.view(-1, many).T.contiguous(), heavy, limit)
            dmin, mn = positive(minimum.view(-1, many).T.contiguous(), heavy, limit)
        else:
            absolute = highest == 3
            w = x.abs() if absolute else x.abs() + _root(_sum(x * x) / width)
            scale, minimum, codes = ranged(x, w, highest, *ladder, absolute=absolute)
            d, sc = _largest_first(scale.view(-1, many).T, limit)
            dmin, mn = _largest_first(minimum.view(-1, many).T, limit)
        (d, wide), (dmin, wide_min) = _half(d), _half(dmin)
        effective, below = _per_block(wide * sc), _per_block(wide_min * mn)
        again = ((x + below) / effective).round_().clamp_(0, highest)
        codes = torch.where(effective == 0, codes, again)
        return {
            "q": _grid(rows, codes), "sc": _of_rows(rows, sc).to(torch.int16), "mn": _of_rows(rows, mn).to(torch.int16),
            "d": d.view(rows.shape[0], -1), "dmin": dmin.view(rows.shape[0], -1),
        }  # fmt: skip

    return fields


def _q3_k(rows: Tensor, importance: Tensor | None) -> Fields:
    x = _columns(rows, 16)
    if importance is not None:
        w = _columns(_weights(rows, importance, 256, 2.0), 16)
        scale, codes = symmetric(x, w, 4)
        d, sc = symmetric(scale.view(-1, 16).T.contiguous(), _sum(w).view(-1, 16).T, 32)
        sc = sc - 32
    else:
        scale, codes = descent(x, 4)
        d, sc = _signed_first(scale.view(-1, 16).T, 32)
        sc = torch.where(d == 0, -32.0, sc)  # as llama.cpp leaves it
    return _signed_fields(rows, x, codes, d, sc, 4)


def _q6_k(rows: Tensor, importance: Tensor | None) -> Fields:
    x = _columns(rows, 16)
    w = x * x if importance is None else _columns(importance.expand_as(rows), 16)
    scale, codes = symmetric(x, w, 32)
    d, sc = _signed_first(scale.view(-1, 16).T, 128)
    codes = torch.where(_per_block((d == 0).expand_as(sc)), 0.0, codes)
    return _signed_fields(rows, x, codes, d, sc, 32)


def _signed_fields(rows: Tensor, x: Tensor, codes: Tensor, d: Tensor, sc: Tensor, half: int) -> Fields:
    """Codes chosen again for the scales as they are stored."""
    d, wide = _half(d)
    effective = _per_block(wide * sc)
    again = (x / effective).round_().clamp_(-half, half - 1)
    return {
        "q": _grid(rows, torch.where(effective == 0, codes - half, again)),
        "sc": _of_rows(rows, sc).to(torch.int16),
        "d": d.view(rows.shape[0], -1),
    }


def _iq4_weights(rows: Tensor, importance: Tensor | None, over: int) -> Tensor:
    return _columns(rows * rows if importance is None else _weights(rows, importance, over, 2.0), 32)


def _iq4_nl(rows: Tensor, importance: Tensor | None) -> Fields:
    x = _columns(rows, 32)
    scale = in_table(x, _iq4_weights(rows, importance, 32))
    codes = _at(_nearest(str(x.device))[0], _places(x, _inverse(scale)))
    return {"q": _grid(rows, codes), "d": scale.to(torch.float16).view(rows.shape[0], -1)}


def _iq4_xs(rows: Tensor, importance: Tensor | None) -> Fields:
    x = _columns(rows, 32)
    scale = in_table(x, _iq4_weights(rows, importance, 256)).view(-1, 8).T
    d = -_extreme(scale) / 32
    sc = (_inverse(d) * scale).round_().clamp_(-32, 31)
    codes = _at(_nearest(str(x.device))[0], _places(x, _inverse(_per_block(d * sc))))
    return {
        "q": _grid(rows, codes),
        "sc": _of_rows(rows, sc).to(torch.int16),
        "d": d.to(torch.float16).view(rows.shape[0], -1),
    }


def _weighted_largest(half: int) -> Callable[..., Fields]:
    def fields(rows: Tensor, importance: Tensor) -> Fields:
        x = _columns(rows, 32)
        w = _columns(_weights(rows, importance, rows.shape[-1], 1.0), 32)
        scale, codes = symmetric(x, w, half)
        return {"q": _grid(rows, codes - half), "d": scale.to(torch.float16).view(rows.shape[0], -1)}

    return fields


def _weighted_range(highest: int) -> Callable[..., Fields]:
    def fields(rows: Tensor, importance: Tensor) -> Fields:
        x = _columns(rows, 32)
        w = _columns(_weights(rows, importance, rows.shape[-1], 1.0), 32)
        scale, minimum, codes = ranged(x, w, highest, -0.9, 0.05, 36)
        numbers = (part.to(torch.float16).view(rows.shape[0], -1) for part in (scale, -minimum))
        return {"q": _grid(rows, codes), **dict(zip(("d", "m"), numbers))}

    return fields


KINDS: dict[str, Callable[..., Fields]] = {
    "Q2_K": _with_minimum(16, 3, 15, (-0.5, 0.1, 15), 1.0),
    "Q3_K": _q3_k,
    "Q4_K": _with_minimum(32, 15, 63, (-1.0, 0.1, 20), 2.0),
    "Q5_K": _with_minimum(32, 31, 63, (-0.5, 0.1, 15), 2.0),
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
WEIGHTED: dict[str, Callable[..., Fields]] = {
    "Q4_0": _weighted_largest(8),
    "Q5_0": _weighted_largest(16),
    "Q4_1": _weighted_range(15),
    "Q5_1": _weighted_range(31),
}
