"""The root of a weight tree, and the two forms it travels in: a structure (a string) plus a list of tensors."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.weight.activation import Activation
from anybit.weight.nodes import NODES, Node, field_names, map_tensors, tensors_of

if TYPE_CHECKING:
    from torch import Tensor

_EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Weight:
    """The numbers of one matrix [out, in] or of one stack [experts, out, in], and how its input is quantized.

    `dtype` is the dtype of the dense weight that the checkpoint stands for. `extras` are stored tensors that carry no
    number of the weight (a format marker, a trivial index); a layout writes them back.
    """

    tree: Node
    dtype: str = "float32"
    activation: Activation | None = None
    extras: Mapping[str, Tensor] = field(default_factory=lambda: _EMPTY)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tree.shape

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors a product needs: the tree's and the activation's, not the extras."""
        return tensors_of(self.tree) + list(self.activation.tensors if self.activation else ())

    @property
    def bytes_in_memory(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def to_dense(self, dtype: torch.dtype | str | None = None) -> Tensor:
        """The dense weight in its logical shape; computed in float32, then rounded once to `dtype` (default: own)."""
        target = dtype if dtype is not None else self.dtype
        target = getattr(torch, target) if isinstance(target, str) else target
        if len(self.shape) == 3:
            return torch.stack([self.select(expert).to_dense(target) for expert in range(self.shape[0])])
        rows, columns = self.shape
        full = torch.empty(rows, columns, dtype=target, device=self.device)
        for start, stop in row_chunks(rows, columns):
            full[start:stop] = self.tree.region(slice(start, stop), slice(0, columns)).to(target)
        return full

    def select(self, expert: int) -> Weight:
        """The matrix of one expert."""
        activation = self.activation.select(expert) if self.activation is not None else None
        return Weight(self.tree.select(expert), self.dtype, activation)

    def map(self, change: Callable[[Tensor], Tensor]) -> Weight:
        """The same weight with every tensor, extras included, replaced by `change(tensor)`."""
        activation = self.activation
        if activation is not None:
            activation = replace(activation, tensors=tuple(change(tensor) for tensor in activation.tensors))
        extras = {name: change(tensor) for name, tensor in self.extras.items()}
        return Weight(map_tensors(self.tree, change), self.dtype, activation, extras)

    def to(self, device: torch.device | str) -> Weight:
        return self.map(lambda tensor: tensor.to(device))

    def structure(self) -> str:
        """The tree without its numbers, as JSON; `Weight.build(structure, tensors)` puts it together again."""
        counter = iter(range(1 << 30))
        parts: dict[str, Any] = {"dtype": self.dtype, "tree": _describe(self.tree, counter)}
        if self.activation is not None:
            parts["activation"] = _describe(self.activation, counter)
        return json.dumps(parts, separators=(",", ":"))

    @staticmethod
    def build(structure: str, tensors: list[Tensor]) -> Weight:
        """Inverse of (`structure()`, `tensors`)."""
        parts = _parse(structure)
        activation = _construct(parts["activation"], tensors) if "activation" in parts else None
        return Weight(_construct(parts["tree"], tensors), parts["dtype"], activation)


def row_chunks(rows: int, columns: int, elements: int = 1 << 21) -> list[tuple[int, int]]:
    """Row ranges of about `elements` weights each, so that temporaries stay near 8 MB of float32."""
    step = max(1, elements // max(columns, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def same(left: Weight, right: Weight) -> bool:
    """Same structure and bit-equal tensors (NaN payloads included)."""
    if left.structure() != right.structure() or len(left.tensors) != len(right.tensors):
        return False

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1)

    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
        for a, b in zip(left.tensors, right.tensors, strict=True)
    )


# --- structure: nodes as JSON, tensors as running numbers ----------------------------------------------------------------

_parse = functools.lru_cache(maxsize=4096)(json.loads)


def _describe(value: Any, counter: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"t": next(counter)}
    if isinstance(value, (Node, Activation)):
        kept = {name: getattr(value, name) for name in field_names(type(value))}
        return {
            "n": type(value).__name__,
            **{name: _describe(part, counter) for name, part in kept.items() if part is not None},
        }
    if isinstance(value, tuple):
        return [_describe(part, counter) for part in value]
    return value


def _construct(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, dict):
        if "t" in value:
            return tensors[value["t"]]
        kind = Activation if value["n"] == "Activation" else NODES[value["n"]]
        return kind(**{name: _construct(part, tensors) for name, part in value.items() if name != "n"})
    if isinstance(value, list):
        return tuple(_construct(part, tensors) for part in value)
    return value
