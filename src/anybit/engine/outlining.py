"""Plans and checkpoints as a few lines of text: modules that differ only in the numbers of their names are one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def alike(
    items: Iterable[Item], name: Callable[[Item], str], same: Callable[[Item], Hashable]
) -> list[tuple[str, list[Item]]]:
    """Items of equal `same` whose names differ only in numbers, under a name with the numbers' range: "a.{0-1,5}.b"."""
    found: dict[Hashable, list[Item]] = {}
    for item in items:
        found.setdefault((_NUMBER.sub("*", name(item)), same(item)), []).append(item)
    return [(_ranged([name(item) for item in members]), members) for members in found.values()]


def _ranged(names: list[str]) -> str:
    pieces = []
    for column in zip(*(name.split(".") for name in names)):
        values = list(dict.fromkeys(column))
        pieces.append(values[0] if len(values) == 1 else "{" + _spans(sorted(map(int, values))) + "}")
    return ".".join(pieces)


def _spans(values: list[int]) -> str:
    spans: list[list[int]] = []
    for value in values:
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with every column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def size(count: float) -> str:
    """Bytes in decimal units, three digits: "13.6 MB"."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:#.3g} {unit}"
