"""Static parameters that compressed-tensors measures beside inputs of layers: keys, values, queries, outputs.

Smallest and largest over all data (the observer "static_minmax"), or averages that move by 1 % with each sample ("minmax").
A range always includes 0; parameters are worked out and stored in the dtype of the states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.errors import CalibrationNeeded, InvalidOption
from anybit.methods._compressed_inputs import parameters
from anybit.methods._compressed_schemes import Arguments, Matcher
from anybit.methods._kv_cache import RoundedCache, RoundedQueries, has_cache
from anybit.quantizers.measurement import Measurement

if TYPE_CHECKING:
    from torch import Tensor

PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")


class States:
    """Extremes of one kind of state: of all of it, or [heads, 1, 1] of states [batch, heads, length, head_dim]."""

    def __init__(self, args: Arguments, heads: int | None):
        self.args, self.heads = args, heads
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def __call__(self, module: Any, states: Tensor) -> Tensor:
        """Take note of states, and give them back."""
        for own in states.detach() if self.args.averaging else (states.detach(),):
            low, high = (self._over(own, take) for take in (torch.amin, torch.amax))
            if self.low is None or self.high is None:
                self.low, self.high = low, high
            elif self.args.averaging:
                step = self.args.averaging
                self.low, self.high = self.low.lerp(low, step), self.high.lerp(high, step)
            else:
                self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        return states

    def _over(self, states: Tensor, take: Any) -> Tensor:
        if self.heads is None:
            found: Tensor = take(states).reshape(1)
            return found
        axes = tuple(axis for axis in range(states.dim()) if axis != states.dim() - 3)
        found = take(states, axes)
        return found.view(-1, 1, 1)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        if self.low is None or self.high is None:
            raise CalibrationNeeded(f"{prefix}_scale: no such state came by, so its scale is unknown")
        scale, zero = parameters(self.low, self.high, self.args)
        found = {f"{prefix}_scale": scale}
        return found if zero is None else {**found, f"{prefix}_zero_point": zero.to(torch.int8)}


class StatesMeasured(Measurement):
    """`states` by prefix: "k" and "v", "q" of attention, "output" of a layer. `dtype`: the model's."""

    def __init__(self, states: Mapping[str, States], dtype: str):
        self.states = states
        self.specs = {}
        for prefix, own in states.items():
            shape = (1,) if own.heads is None else (own.heads, 1, 1)
            self.specs[f"{prefix}_scale"] = (dtype, shape)
            if not own.args.symmetric:
                self.specs[f"{prefix}_zero_point"] = ("int8", shape)

    def listen(self, module: Any) -> Any:
        if "output" in self.states:
            own = self.states["output"]
            return _Handles([module.register_forward_hook(lambda module, _, output: (own(module, output), None)[1])])
        cache = RoundedCache(self.states["k"], self.states["v"])
        handles = [module.register_forward_pre_hook(cache, with_kwargs=True)]
        if "q" in self.states:
            hook = RoundedQueries(self.states["q"])
            handles += [
                module.register_forward_pre_hook(hook),
                module.register_forward_hook(hook, always_call=True),
            ]
        return _Handles(handles)

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for prefix, own in self.states.items() for name, tensor in own.tensors(prefix).items()}


class _Handles:
    def __init__(self, handles: list[Any]):
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def measurements(model: Any, matcher: Matcher, cache: Arguments | None, dtype: str) -> dict[str, Measurement]:
    """What must be measured of a model, by module."""
    found: dict[str, Measurement] = {}
    for name, module in model.named_modules():
        classes = tuple(cls.__name__ for cls in type(module).__mro__)
        scheme = None if matcher.ignored(name, classes) else matcher.scheme(name, classes)
        if scheme is not None and scheme.outputs is not None and hasattr(module, "weight"):
            if scheme.outputs.dynamic != "yes":
                found[name] = StatesMeasured({"output": States(scheme.outputs, None)}, dtype)
            continue
        if not (has_cache(module) and any(own in module._modules for own in PROJECTIONS)):
            continue
        named = scheme is not None and scheme.weights is None and scheme.inputs is not None
        args = scheme.inputs if scheme is not None and named else cache
        if args is None or args.dynamic == "yes":
            continue
        if args.dynamic == "local" or args.strategy not in ("tensor", "attn_head"):
            raise InvalidOption(
                f"{name}: static scales of keys and values are made with strategy 'tensor' or 'attn_head', not {args}"
            )
        heads = _heads(module) if args.strategy == "attn_head" else (None, None)
        own = {"k": States(args, heads[1]), "v": States(args, heads[1])}
        if named:
            own["q"] = States(args, heads[0])
        found[name] = StatesMeasured(own, dtype)
    return found


def _heads(module: Any) -> tuple[int, int]:
    """Heads of queries and of keys."""
    config = module.config
    queries = int(config.num_attention_heads)
    return queries, int(getattr(config, "num_key_value_heads", None) or queries)
