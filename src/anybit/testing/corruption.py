"""Damage to one stored tensor of a golden, and reading the golden with it as `load` would."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from anybit.testing.goldens import Golden, Unit, prepared
from anybit.weight.layout import join_name

if TYPE_CHECKING:
    from torch import Tensor

MUTATIONS = {
    "missing": "is not there",
    "renamed": "has another name",
    "transposed": "is transposed",
    "truncated": "lacks its last row",
    "extended": "has one row too many",
    "nan": "holds a NaN",
    "off_by_one": "holds an index beyond the last",
}
_NAN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e8m0fnu)


def mutations(unit: Unit) -> Iterator[tuple[str, str]]:
    """(relative name, mutation) for each damage that makes sense for a tensor of the unit."""
    for name, tensor in unit.tensors.items():
        for mutation in MUTATIONS:
            if mutation in ("missing", "renamed") or damage(tensor, mutation) is not None:
                yield name, mutation


def damage(tensor: Tensor, mutation: str) -> Tensor | None:
    """The damaged tensor, or None where the damage would be none (a square matrix transposed, ...)."""
    if mutation == "transposed" and tensor.dim() >= 2 and tensor.shape[-1] != tensor.shape[-2]:
        return tensor.transpose(-1, -2).contiguous()
    if mutation == "truncated" and tensor.dim() >= 1 and tensor.shape[0] > 1:
        return tensor[:-1].clone()
    if mutation == "extended" and tensor.dim() >= 1 and tensor.shape[0] >= 1:
        return torch.cat([tensor, tensor[-1:]])
    if mutation == "nan" and tensor.dtype in _NAN_DTYPES and tensor.numel():
        damaged = tensor.clone().reshape(-1)
        if tensor.dtype == torch.float8_e8m0fnu:
            damaged.view(torch.uint8)[tensor.numel() // 2] = 255
        else:
            damaged[tensor.numel() // 2] = float("nan")
        return damaged.view(tensor.shape)
    if (
        mutation == "off_by_one"
        and tensor.dim() == 1
        and tensor.dtype in (torch.int32, torch.int64)
        and tensor.numel() > 1
    ):
        damaged = tensor.clone()
        damaged[-1] = tensor.max() + 1
        return damaged
    return None


class Corrupted:
    """A golden with one tensor damaged, in memory. As a context: None if the tensor is no tensor of the checkpoint."""

    def __init__(self, golden: Golden, unit: Unit, name: str, mutation: str):
        self.golden, self.unit, self.mutation = golden, unit, mutation
        self.name = name
        self.full_name = join_name(unit.name, name)
        self.new_name = self.full_name + "_misnamed"

    def __enter__(self) -> Corrupted | None:
        return self if self.full_name in prepared(self.golden).checkpoint.tensors else None

    def __exit__(self, *_: object) -> None:
        return None

    def read(self) -> None:
        """Plan the whole checkpoint and decode the damaged unit; raises what `load` would raise."""
        from anybit.engine.plan import build_plan

        ready = prepared(self.golden)
        checkpoint: Any = _Altered(ready.checkpoint, self)
        plan = build_plan(checkpoint, ready.model, ready.names.slots, ready.names, ready.quantizer, ready.plan.dtype)
        for entry in plan.entries:
            for part in entry.parts:
                if part.prefix == self.unit.name and part.layout is not None:
                    part.layout.decode({name: checkpoint.read(info.name) for name, info in part.stored.items()})

    def named_in(self, message: str) -> bool:
        names = [self.name, self.full_name, self.new_name]
        if len(self.unit.tensors) == 1:  # without it nothing is left of the weight but its name
            names.append(join_name(self.unit.name, "weight"))
        return any(name and name in message for name in names)


class _Altered:
    """A checkpoint in which one tensor is another."""

    def __init__(self, checkpoint: Any, change: Corrupted):
        self._checkpoint = checkpoint
        self._replaced: dict[str, Tensor] = {}
        self.tensors: Mapping[str, Any] = self._alter(dict(checkpoint.tensors), change)

    def _alter(self, tensors: dict[str, Any], change: Corrupted) -> dict[str, Any]:
        info = tensors.pop(change.full_name)
        if change.mutation == "missing":
            return tensors
        original = change.unit.tensors[change.name]
        damaged = original if change.mutation == "renamed" else damage(original, change.mutation)
        assert damaged is not None
        name = change.new_name if change.mutation == "renamed" else change.full_name
        self._replaced[name] = damaged
        size = damaged.numel() * damaged.element_size()
        known = {field.name for field in dataclasses.fields(info)}
        new = {"name": name, "shape": tuple(damaged.shape), "nbytes": size}
        tensors[name] = dataclasses.replace(info, **{key: value for key, value in new.items() if key in known})
        return tensors

    def read(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        return self._replaced[name].clone() if name in self._replaced else self._checkpoint.read(name, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)
