"""How the input of a product is quantized before it meets the weight.

The arithmetic of each peer differs in rounding, order and the dtype it happens in, so a rule is named and registered, and a
method file may register its own. A rule sees the whole product: formats quantize outputs and split off outliers too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from anybit.errors import PluginError

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weight.weight import Weight

# product(x) -> float32 x @ W.T, x [tokens, in] of any dtype, never holding the whole dense weight
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

    def select(self, expert: int) -> Activation:
        """What one expert of a stack does to its input."""
        return (
            replace(self, tensors=tuple(tensor[expert] for tensor in self.tensors), stacked=False)
            if self.stacked
            else self
        )

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.names.index(name)]


def activation_rule(name: str) -> Callable[[Rule], Rule]:
    """Register the arithmetic called `name`; a name can be taken once."""

    def register(rule: Rule) -> Rule:
        if name in RULES and RULES[name].__module__ != rule.__module__:
            raise PluginError(f"activation rule {name!r} is already registered by {RULES[name].__module__}")
        RULES[name] = rule
        return rule

    return register
