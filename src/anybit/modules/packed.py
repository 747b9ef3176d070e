"""What the layer classes share: a weight that is kept in a kernel's own form and can always be given back.

The prepared tensors are parameters without gradient, so that `.to(device)`, deepcopy, device maps and offloading treat them
like any weight; `state_dict()` gives the stored tensors under the checkpoint's names, whatever form is in memory. Casting a
model never touches packed bytes: they are not numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from anybit.errors import CheckpointError
from anybit.kernels import Kernel, choose, ops
from anybit.kernels._direct import Bound, unobserved
from anybit.kernels.ops import full_spec
from anybit.modules.proxy import PackedTensor
from anybit.weight import Layout, Weight
from anybit.weight.joining import Alternating, alternate_rows, join_rows, split_alternating, split_rows, stack
from anybit.weight.layout import join_name

_TENSOR = "_packed_"
_EXTRA = "_extra_"
Index = tuple["int | None", "int | None"]  # (expert, position among the rows); None where a weight is not cut that way
WHOLE: Index = (None, None)


@dataclass(frozen=True)
class Part:
    """One stored unit of a weight. A fused or stacked weight has several.

    `prefix` is the unit's name in the checkpoint, "" for the module's own; `index` its place in the weight.
    """

    layout: Layout
    prefix: str = ""
    index: Index = WHOLE

    @property
    def name(self) -> str:
        """Relative to the module, in its state dict: "" for a weight that is stored whole, else e.g. "3.0"."""
        return ".".join(str(place) for place in self.index if place is not None)


class PackedWeight(nn.Module):
    """Base of the layer classes. Not a layer itself."""

    parts: tuple[Part, ...]
    kernel: Kernel
    spec: str
    quantized_shape: tuple[int, ...]  # (out, in) or (experts, out, in)
    _bound: Bound | None = None

    # --- filling ---

    def set_weights(self, parts: tuple[Part, ...], weights: list[Weight], kernel: Kernel | None = None) -> None:
        """Take the weights of the parts, in order; `kernel`: default the best that accepts them where they are."""
        self.parts = parts
        self._drop(_EXTRA)
        for number, weight in enumerate(weights):
            for name, tensor in weight.extras.items():
                self._hold(f"{_EXTRA}{number}_{name.replace('.', '|')}", tensor)
        on_meta = weights[0].device.type == "meta"
        indexes = tuple(part.index for part in parts)
        whole = _scheme(tuple(part.layout for part in parts), indexes) if on_meta else joined(indexes, weights)
        self._prepare(whole, kernel)

    def take_form(self, parts: tuple[Part, ...], other: PackedWeight) -> None:
        """What `set_weights` with the parts' schemes does, copied from a layer on the meta device whose parts are alike."""
        self.parts = parts
        self._drop(_EXTRA)
        self._drop(_TENSOR)
        self.kernel, self.spec, self._bound = other.kernel, other.spec, None
        self.quantized_shape = other.quantized_shape
        for name, tensor in other._parameters.items():
            if _is_ours(name) and tensor is not None:
                self._hold(name, tensor.detach())

    def _prepare(self, weight: Weight, kernel: Kernel | None = None) -> None:
        kernel = kernel or choose(weight, weight.device).kernel
        self.quantized_shape = tuple(weight.shape)
        spec, tensors = kernel.prepare(weight)
        self.kernel, self.spec, self._bound = kernel, full_spec(kernel, spec), None
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
    def weight(self) -> Tensor:
        """Shape, dtype and device of the dense weight, and products with it; see `proxy`."""
        device = next((tensor.device for tensor in self.packed), torch.device("meta"))
        return PackedTensor(self.product, self.quantized_shape, getattr(torch, self.parts[0].layout.dtype), device)

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] -> x @ W.T [..., out], without bias."""
        return self.multiply(x, None)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in] -> x @ W.T + bias [..., out]."""
        rows = self.quantized_shape[-2]
        if not unobserved(x):
            result: Tensor = torch.ops.anybit.linear(x, self.packed, bias, self.spec, rows)
            return result
        bound = self._bound
        if bound is None or not bound.holds(self._parameters, bias):
            names = [name for name in self._parameters if name.startswith(_TENSOR)]
            tensors = self.packed
            product = self.kernel.bound(self.spec.partition("\n")[2], tensors, bias)
            if product is None:
                return ops.linear(x, tensors, bias, self.spec, rows)
            self._bound = bound = Bound(product, self._parameters, names, bias)
        return bound.product(x)

    @property
    def form(self) -> str:
        """How the weight is kept, for `repr`."""
        return f"layout={type(self.parts[0].layout).__name__}, kernel={self.kernel.name}"

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
        super()._save_to_state_dict(destination, prefix, keep_vars)
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
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
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


def _is_ours(name: str) -> bool:
    return name.startswith((_TENSOR, _EXTRA))


def joined(indexes: Sequence[Index], weights: Sequence[Weight]) -> Weight:
    """One weight of all parts: rows joined within an expert, experts stacked. Extras are left behind."""
    if list(indexes) == [WHOLE]:
        return replace(weights[0], extras={})
    by_expert: dict[int | None, list[Weight]] = {}
    for (expert, _), weight in zip(indexes, weights, strict=True):
        by_expert.setdefault(expert, []).append(weight)
    join = alternate_rows if isinstance(indexes[0][1], Alternating) else join_rows
    rows = [join(own) for own in by_expert.values()]
    return rows[0] if None in by_expert else stack(rows)


@functools.lru_cache(maxsize=64)
def _scheme(layouts: tuple[Layout, ...], indexes: tuple[Index, ...]) -> Weight:
    """`joined` of what layouts promise. Layers of a model repeat each other, and may have hundreds of parts."""
    return joined(indexes, [layout.scheme() for layout in layouts])


def _split(parts: tuple[Part, ...], weight: Weight) -> list[Weight]:
    """Inverse of `joined`."""
    if [part.index for part in parts] == [WHOLE]:
        return [weight]
    heights: dict[int | None, list[int]] = {}
    for part in parts:
        heights.setdefault(part.index[0], []).append(part.layout.shape[-2])
    found: list[Weight] = []
    for number, (expert, own) in enumerate(heights.items()):
        matrix = weight if expert is None else weight.select(number)
        if isinstance(parts[0].index[1], Alternating):
            found += split_alternating(matrix, len(own))
        else:
            found += split_rows(matrix, own) if len(own) > 1 else [matrix]
    return found
