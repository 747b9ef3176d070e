"""FP8 keys and values with one stored scale each, at the attention module (k_scale, v_scale) or at its projections."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.algorithms import minifloat
from anybit.errors import CorruptFile, ShapeMismatch
from anybit.methods._kv_cache import RoundedCache, has_cache
from anybit.quantizers.attachments import attach_before

if TYPE_CHECKING:
    from torch import Tensor

SCALE = re.compile(r"(.+)\.([kv]_scale)")


def cache_algo(named: Any, scheme: Any) -> str | None:
    """What kv_cache_quant_algo and kv_cache_scheme (an object, or a text) say, in capitals; None when neither says anything."""
    if named is None and isinstance(scheme, dict):
        named = {8: "FP8", 4: "NVFP4"}.get(scheme.get("num_bits"), f"{scheme.get('num_bits')} bits")  # type: ignore[arg-type]
    if named is None:
        named = scheme
    if not isinstance(named, str):
        return None
    return "FP8" if named.lower().startswith("fp8") or named == "static" else named.upper()


@dataclass
class RoundedToFp8:
    """States as E4M3 numbers times their scale; `holder`: the child that has the scale, "" for attention itself."""

    name: str
    holder: str | None

    def __call__(self, attention: Any, states: Tensor) -> Tensor:
        if self.holder is None:
            return states
        scale = (attention._modules[self.holder] if self.holder else attention)._buffers[self.name]
        scale = scale.to(torch.float32).reshape(())
        return (minifloat.nearest(states.to(torch.float32) / scale, "e4m3") * scale).to(states.dtype)


def attach_cache(
    model: Any, checkpoint: Any, path_of: Callable[[str], str | None], rounds: bool = True
) -> tuple[set[str], list[str]]:
    """Buffers for all stored scales and, if `rounds`, hooks that use them: (state dict keys, attention modules found)."""
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
    for attention, found in holders.items() if rounds else ():
        states = [RoundedToFp8(name, found.get(name)) for name in ("k_scale", "v_scale")]
        attach_before(model.get_submodule(attention), RoundedCache(*states), with_kwargs=True)
    return keys, list(holders)


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
