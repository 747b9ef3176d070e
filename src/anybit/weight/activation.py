"""How the input of a product is quantized before it meets the weight.

The arithmetic of each peer differs in rounding, order and the dtype it happens in, so a rule is named and registered, and a
method file may register its own. A rule sees the whole product: formats quantize outputs and split off outliers too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.errors import PluginError

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weight.weight import Weight

# product(x) -> float32 x @ W.T, x [tokens, in] of any dtype, never holding the whole dense weight; integers come as int8, and
# E4M3 numbers as float8_e4m3fn where the device has units for them (float8_products), so that units can have them
Product = Callable[["Tensor"], "Tensor"]
# rule(x [tokens, in], weight, bias or None, product) -> [tokens, out] in x's dtype
Rule = Callable[["Tensor", "Weight", "Tensor | None", Product], "Tensor"]

RULES: dict[str, Rule] = {}


@dataclass(frozen=True, eq=False)
class Activation:
    """`rule` names the exact arithmetic; the other fields say what kernels and reports need to know of it.

    dtype: "int8", "e4m3", "e2m1", ...; granularity: "tensor", "token" or "group" (of `group_size` inputs);
    `names`/`tensors`: static scales and the like, as stored; `threshold`: inputs at least this large stay unquantized.
    `stacked`: the tensors of a stack of experts have a leading experts axis of their own. `limit`: scales are chosen as if no
    input were larger, so larger ones are clipped. `least`: as if some input were at least that large.

    `rows`: of a weight put together from parts with static scales of their own (gate and up), the rows of each part; then
    `rule` is "rows", `base` the rule of the parts, and `tensors` holds theirs one after the other.
    """

    rule: str
    dtype: str = "int8"
    granularity: str = "token"
    group_size: int | None = None
    symmetric: bool = True
    threshold: float = 0.0
    names: tuple[str, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    stacked: bool = False
    limit: float | None = None
    least: float | None = None
    rows: tuple[int, ...] = ()
    base: str = ""

    @property
    def parts(self) -> list[Activation]:
        """What each part of the rows does to the input; this one alone where there are no parts."""
        if not self.rows:
            return [self]
        count = len(self.tensors) // len(self.rows)
        return [
            replace(
                self,
                rule=self.base,
                names=self.names[:count],
                tensors=self.tensors[start : start + count],
                rows=(),
                base="",
            )
            for start in range(0, len(self.tensors), count)
        ]

    def of_rows(self, start: int, stop: int) -> Activation:
        """For the rows start .. stop of the weight alone."""
        found, first = [], 0
        for part, height in zip(self.parts, self.rows or (stop,), strict=True):
            own = min(stop, first + height) - max(start, first)
            if own > 0:
                found.append((part, own))
            first += height
        return found[0][0] if len(found) == 1 else beside([part for part, _ in found], [own for _, own in found])

    def select(self, expert: int) -> Activation:
        """What one expert of a stack does to its input."""
        return (
            replace(self, tensors=tuple(tensor[expert] for tensor in self.tensors), stacked=False)
            if self.stacked
            else self
        )

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.names.index(name)]


def beside(parts: Sequence[Activation], rows: Sequence[int]) -> Activation:
    """One of several that differ in their tensors only, for the rows of each part of a weight."""
    first = parts[0]
    names, tensors = ([item for part in parts for item in getattr(part, own)] for own in ("names", "tensors"))
    return replace(first, rule="rows", base=first.rule, names=tuple(names), tensors=tuple(tensors), rows=tuple(rows))


def activation_rule(name: str) -> Callable[[Rule], Rule]:
    """Register the arithmetic called `name`; a name can be taken once."""

    def register(rule: Rule) -> Rule:
        if name in RULES and RULES[name].__module__ != rule.__module__:
            raise PluginError(f"activation rule {name!r} is already registered by {RULES[name].__module__}")
        RULES[name] = rule
        return rule

    return register


@activation_rule("rows")
def rows_apart(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """Each part of the rows by its own static scales; in one go where they are equal, as writers mostly make them."""
    joined = weight.activation
    assert joined is not None
    rule, parts = RULES[joined.base], joined.parts
    first = parts[0].tensors
    if all(torch.equal(one, other) for part in parts[1:] for one, other in zip(first, part.tensors)):
        return rule(x, replace(weight, activation=parts[0]), bias, product)
    ends = list(itertools.accumulate(joined.rows))
    found = [rule(x, replace(weight, activation=part), bias, product) for part in parts]
    return torch.cat([y[:, stop - rows : stop] for y, rows, stop in zip(found, joined.rows, ends)], dim=1)
