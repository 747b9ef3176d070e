"""What the layer classes share: a weight that is kept in a kernel's own form and can always be given back.

The prepared tensors are parameters without gradient, so that `.to(device)`, deepcopy, device maps and offloading treat them
like any weight; `state_dict()` gives the stored tensors under the checkpoint's names, whatever form is in memory. Casting a
model never touches packed bytes: they are not numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from anybit.errors import CheckpointError
from anybit.kernels import Kernel, choose
from anybit.kernels.ops import full_spec
from anybit.weight import Layout, Rows, Stack, Weight
from anybit.weight.layout import join_name

_TENSOR = "_packed_"
_EXTRA = "_extra_"


@dataclass(frozen=True)
class Part:
    """One stored unit of a weight. A fused or stacked weight has several: `name` is the part's place in it.

    `name` is relative to the module ("" for a weight that is stored whole), e.g. "3.gate_proj" of experts; `index` is
    (expert, position among the rows), with None where the weight is not cut that way.
    """

    layout: Layout
    name: str = ""
    index: tuple[int | None, int | None] = (None, None)


class PackedWeight(nn.Module):
    """Base of the layer classes. Not a layer itself."""

    parts: tuple[Part, ...]
    kernel: Kernel
    spec: str

    # --- filling ---

    def set_weights(self, parts: tuple[Part, ...], weights: list[Weight], kernel: Kernel | None = None) -> None:
        """Take the weights of the parts, in order; `kernel`: default the best that accepts them where they are."""
        self.parts = parts
        self._drop(_EXTRA)
        for number, weight in enumerate(weights):
            for name, tensor in weight.extras.items():
                self._hold(f"{_EXTRA}{number}_{name.replace('.', '|')}", tensor)
        self._prepare(_join(parts, weights), kernel)

    def _prepare(self, weight: Weight, kernel: Kernel | None = None) -> None:
        kernel = kernel or choose(weight, weight.device).kernel
        spec, tensors = kernel.prepare(weight)
        self.kernel, self.spec = kernel, full_spec(kernel, spec)
        self._drop(_TENSOR)
        for number, tensor in enumerate(tensors):
            self._hold(f"{_TENSOR}{number}", tensor)

    def _hold(self, name: str, tensor: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def _drop(self, prefix: str) -> None:
        for name in [name for name in self._parameters if name.startswith(prefix)]:
            del self._parameters[name]

    # --- reading ---

    @property
    def packed(self) -> list[Tensor]:
        """The tensors of the kernel's form."""
        return [tensor for name, tensor in self._parameters.items() if name.startswith(_TENSOR) and tensor is not None]

    @property
    def quantized_weight(self) -> Weight:
        """The weight tree, exactly as it was loaded; extras are not part of it."""
        return self.kernel.restore(self.spec.partition("\n")[2], self.packed)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, [out, in] or [experts, out, in], in `dtype` (default: the checkpoint's)."""
        return self.quantized_weight.to_dense(dtype)

    def part_weights(self) -> list[Weight]:
        """The weight of every part, extras included: what the parts' layouts encode."""
        weights = _split(self.parts, self.quantized_weight)
        extras: list[dict[str, Tensor]] = [{} for _ in weights]
        for name, tensor in self._parameters.items():
            if name.startswith(_EXTRA) and tensor is not None:
                number, _, own = name.removeprefix(_EXTRA).partition("_")
                extras[int(number)][own.replace("|", ".")] = tensor.detach()
        return [replace(weight, extras=own) for weight, own in zip(weights, extras, strict=True)]

    def stored_tensors(self) -> dict[str, Tensor]:
        """Stored tensors by name relative to this module, bias aside; byte for byte what was loaded."""
        found: dict[str, Tensor] = {}
        for part, weight in zip(self.parts, self.part_weights(), strict=True):
            for name, tensor in part.layout.encode(weight).items():
                found[join_name(part.name, name) if part.name else name] = tensor
        return found

    # --- nn.Module's protocol ---

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        hidden = {name: self._parameters.pop(name) for name in list(self._parameters) if _is_ours(name)}
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[arg-type]
        self._parameters.update(hidden)
        for name, tensor in self.stored_tensors().items():
            destination[join_name(prefix.removesuffix("."), name)] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = prefix.removesuffix(".")
        tensors: dict[str, dict[str, Tensor]] = {part.name: {} for part in self.parts}
        taken: set[str] = set()
        for part in self.parts:
            for name in [*part.layout.specs(), *self._extra_names(part)]:
                key = join_name(own, join_name(part.name, name) if part.name else name)
                if key in state_dict:
                    tensors[part.name][name] = state_dict[key]
                    taken.add(key)
                elif strict and name in part.layout.specs():
                    missing_keys.append(key)
        rest = {key: value for key, value in state_dict.items() if key not in taken}
        hidden = {name: self._parameters.pop(name) for name in list(self._parameters) if _is_ours(name)}
        super()._load_from_state_dict(  # type: ignore[no-untyped-call]
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._parameters.update(hidden)
        if len(taken) == 0 or any(key.startswith(prefix) for key in missing_keys):
            return
        try:
            device = self.packed[0].device
            weights = [part.layout.decode(tensors[part.name]) for part in self.parts]
            self.set_weights(self.parts, [weight.to(device) for weight in weights])
        except CheckpointError as error:
            error_msgs.append(f"{own}: {error}")

    def _extra_names(self, part: Part) -> list[str]:
        number = self.parts.index(part)
        start = f"{_EXTRA}{number}_"
        return [name.removeprefix(start).replace("|", ".") for name in self._parameters if name.startswith(start)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """Moves packed tensors with the module but never casts them; a new device type may mean another kernel."""
        hidden = {name: self._parameters.pop(name) for name in list(self._parameters) if _is_ours(name)}
        super()._apply(fn, recurse)
        before = after = None
        moved: dict[str, nn.Parameter | None] = {}
        for name, tensor in hidden.items():
            assert tensor is not None
            target = fn(tensor)
            if target.dtype != tensor.dtype:
                target = tensor.to(target.device)
            before, after = tensor.device.type, target.device.type
            moved[name] = nn.Parameter(target, requires_grad=False)
        if before != after and before != "meta" and after != "meta":
            self._parameters.update(hidden)
            weight = self.quantized_weight.to(next(iter(moved.values())).device)  # type: ignore[union-attr]
            self._parameters.update({name: tensor for name, tensor in moved.items() if name.startswith(_EXTRA)})
            self._prepare(weight)
        else:
            self._parameters.update(moved)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]


def _is_ours(name: str) -> bool:
    return name.startswith((_TENSOR, _EXTRA))


def _join(parts: tuple[Part, ...], weights: list[Weight]) -> Weight:
    """One weight of all parts: rows joined within an expert, experts stacked."""
    if len(weights) == 1 and parts[0].index == (None, None):
        return replace(weights[0], extras={})
    by_expert: dict[int | None, list[Weight]] = {}
    for part, weight in zip(parts, weights, strict=True):
        by_expert.setdefault(part.index[0], []).append(weight)
    rows = [own[0].tree if len(own) == 1 else Rows(tuple(weight.tree for weight in own)) for own in by_expert.values()]
    tree = rows[0] if None in by_expert else Stack(tuple(rows))
    return Weight(tree, weights[0].dtype, weights[0].activation)


def _split(parts: tuple[Part, ...], weight: Weight) -> list[Weight]:
    """Inverse of `_join`."""
    if len(parts) == 1 and parts[0].index == (None, None):
        return [weight]
    found = []
    experts = list(dict.fromkeys(part.index[0] for part in parts))
    for expert, position in (part.index for part in parts):
        tree = weight.tree if expert is None else weight.tree.select(experts.index(expert))
        if position is not None and isinstance(tree, Rows):
            tree = tree.parts[position]
        found.append(Weight(tree, weight.dtype, weight.activation))
    return found
