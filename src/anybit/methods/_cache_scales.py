"""Keys and values in FP8 or NVFP4 under one stored scale each, at the attention module (k_scale, v_scale) or its projections.

Keys come with their rotary embedding. A cache that is named without scales is one whose scales are 1, as engines take it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.algorithms import minifloat
from anybit.errors import CalibrationNeeded, CorruptFile, ShapeMismatch
from anybit.methods._activations import rounded_nvfp4
from anybit.methods._kv_cache import RoundedCache, has_cache
from anybit.quantizers.attachments import attach_before
from anybit.quantizers.measurement import Measurement

if TYPE_CHECKING:
    from torch import Tensor

SCALE = re.compile(r"(.+)\.([kv]_scale)")
GROUP = 16
KINDS = ("FP8", "NVFP4")
TOP = 448.0  # what the largest magnitude is divided by for its scale, in both kinds


def cache_algo(named: Any, scheme: Any) -> str | None:
    """What kv_cache_quant_algo and kv_cache_scheme (an object, or a text) say, in capitals; None when neither says anything."""
    if named is None and isinstance(scheme, dict):
        named = {8: "FP8", 4: "NVFP4"}.get(scheme.get("num_bits"), f"{scheme.get('num_bits')} bits")  # type: ignore[arg-type]
    if named is None:
        named = scheme
    if not isinstance(named, str):
        return None
    return "FP8" if named.lower().startswith("fp8") or named == "static" else named.upper()


def rounded_states(states: Tensor, scale: Tensor | float, kind: str) -> Tensor:
    """States [.., head_dim] as numbers of the cache times their scale, in their dtype."""
    numbers = states.to(torch.float32)
    if kind == "FP8":
        return (minifloat.nearest(numbers / scale, "e4m3") * scale).to(states.dtype)
    width = numbers.shape[-1]
    common = torch.as_tensor(scale, dtype=torch.float32, device=states.device)
    return rounded_nvfp4(numbers.reshape(-1, width), GROUP, common).view(states.shape).to(states.dtype)


@dataclass
class RoundedState:
    """Keys or values. `holder`: the child that has the scale, "" for attention itself, None for a scale of 1."""

    name: str
    holder: str | None
    kind: str = "FP8"

    def __call__(self, attention: Any, states: Tensor) -> Tensor:
        if self.holder is None:
            return rounded_states(states, 1.0, self.kind)
        scale = (attention._modules[self.holder] if self.holder else attention)._buffers[self.name]
        return rounded_states(states, scale.to(torch.float32).reshape(()), self.kind)


def unchanged(attention: Any, states: Tensor) -> Tensor:
    """States that are not quantized."""
    return states


@dataclass(frozen=True)
class Attached:
    """`keys` of buffers in the state dict; attention modules with stored scales, and those that were given none."""

    keys: set[str]
    scaled: list[str]
    unscaled: list[str]


def attach_cache(
    model: Any,
    checkpoint: Any,
    path_of: Callable[[str], str | None],
    kind: str | None = "FP8",
    everywhere: bool = False,
) -> Attached:
    """Buffers for all stored scales, and hooks that round by them to `kind`, one of `KINDS`; None keeps the scales alone.

    `everywhere`: what has no stored scale is rounded under a scale of 1.
    """
    keys: set[str] = set()
    holders: dict[str, dict[str, str]] = {}
    for key, info in checkpoint.tensors.items():
        match = SCALE.fullmatch(key)
        path = path_of(match.group(1)) if match is not None else None
        if match is None or path is None:
            continue
        name, module = match.group(2), model.get_submodule(path)
        attention, holder = (path, "") if has_cache(module) else path.rpartition(".")[::2]
        if not has_cache(model.get_submodule(attention)):
            continue
        _check(key, info, checkpoint)
        module.register_buffer(name, torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta"))
        keys.add(f"{path}.{name}")
        holders.setdefault(attention, {})[name] = holder
    scaled = list(holders)
    unscaled = [path for path in attentions(model) if path not in holders] if everywhere else []
    for attention in [*scaled, *unscaled] if kind is not None else ():
        found = holders.get(attention, {})
        rounds = [
            RoundedState(name, found.get(name), str(kind)) if name in found or everywhere else unchanged
            for name in ("k_scale", "v_scale")
        ]
        attach_before(model.get_submodule(attention), RoundedCache(*rounds), with_kwargs=True)
    return Attached(keys, scaled, unscaled)


def attentions(model: Any) -> list[str]:
    """Paths of the attention modules that cache projected keys."""
    return [
        name
        for name, module in model.named_modules()
        if has_cache(module) and any("k" in own for own in module._modules)
    ]


def _check(key: str, info: Any, checkpoint: Any) -> None:
    if info.dtype not in ("float32", "bfloat16", "float16") or tuple(info.shape) not in ((), (1,)):
        raise ShapeMismatch(
            f"tensor {key!r} in {info.file} is {info.dtype} {tuple(info.shape)}; the scale of a cache is one number"
        )
    number = checkpoint.read(key).to(torch.float32).reshape(())
    if not bool(torch.isfinite(number) & (number > 0)):
        raise CorruptFile(
            f"tensor {key!r} in {info.file} is {float(number)}; the scale of a cache is a positive number"
        )


# --- measured ------------------------------------------------------------------------------------------------------------------


class CacheMeasured(Measurement):
    """One scale for all keys of an attention module and one for its values: the largest magnitude / 448.

    `names`: of the two in the checkpoint, below the module.
    """

    def __init__(self, names: tuple[str, str]):
        self.specs: Mapping[str, Any] = dict.fromkeys(names, ("float32", ()))
        self.largest: list[Tensor | None] = [None, None]

    def listen(self, module: Any) -> Any:
        return module.register_forward_pre_hook(RoundedCache(self._taker(0), self._taker(1)), with_kwargs=True)

    def _taker(self, number: int) -> Any:
        def take(attention: Any, states: Tensor) -> Tensor:
            found, before = states.detach().abs().amax().float(), self.largest[number]
            self.largest[number] = found if before is None else torch.maximum(before, found)
            return states

        return take

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for name, largest in zip(self.specs, self.largest, strict=True):
            if largest is None:
                raise CalibrationNeeded(f"{name}: no key or value came by, so its scale is unknown")
            found[name] = torch.where(largest > 0, largest / TOP, 1.0)
        return found
