"""How the tensors of a checkpoint are spread over files, as Hugging Face's libraries do it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from anybit.containers.info import BY_TORCH_NAME, STORED_TYPES, elements, shorten
from anybit.errors import InvalidOption, NotRepresentable, ShapeMismatch

Spec = tuple[object, Sequence[int]]  # dtype (a torch.dtype or its name) and shape

_UNITS = {"": 1, "B": 1}
_UNITS.update({f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)})
_UNITS.update({f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)})
_RANK = {kind.torch: number for number, kind in enumerate(STORED_TYPES)}


def parse_size(size: int | str, what: str = "max_shard_size") -> int:
    """Bytes of 5_000_000_000, "5GB" (decimal, as in huggingface_hub) or "5GiB". `what`: the option, for errors."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]{0,3})\s*", str(size))
    if match is None or match[2].upper() not in _UNITS or int(float(match[1]) * _UNITS[match[2].upper()]) < 1:
        raise InvalidOption(f"{what} is {size!r}; it must be a number of bytes or a text such as '5GB' or '500MB'")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def dtype_name(dtype: object) -> str:
    """torch's name of a dtype, from the dtype or its name."""
    return str(dtype).removeprefix("torch.")


def bytes_of(name: str, spec: Spec) -> int:
    """Bytes of the data of a tensor; raises if the format cannot hold such a tensor."""
    dtype, shape = dtype_name(spec[0]), tuple(spec[1])
    kind = BY_TORCH_NAME.get(dtype)
    if kind is None or (kind.bits % 8 and not kind.pair):
        raise NotRepresentable(
            f"tensor {shorten(name)} is {dtype}, which safetensors cannot hold; it holds {', '.join(BY_TORCH_NAME)}"
        )
    count = elements(shape) if all(type(side) is int and side >= 0 for side in shape) else None
    if count is None or (kind.pair and not shape):
        raise ShapeMismatch(f"tensor {shorten(name)} cannot have the shape {list(shape)} as {dtype}")
    return count * kind.itemsize


def split(specs: Mapping[str, Spec], max_shard_size: int | str = "5GB", stem: str = "model") -> dict[str, str]:
    """File of each tensor: the same files that huggingface_hub makes of tensors in this order."""
    limit = parse_size(max_shard_size)
    shards: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for name, spec in specs.items():
        size = bytes_of(name, spec)
        if size > limit:  # a shard of its own, before the one being filled
            shards.append([name])
            continue
        if filled + size > limit:
            shards.append(current)
            current, filled = [], 0
        current.append(name)
        filled += size
    if current or not shards:
        shards.append(current)
    if len(shards) == 1:
        return dict.fromkeys(specs, f"{stem}.safetensors")
    where = {name: number for number, shard in enumerate(shards, 1) for name in shard}
    return {name: f"{stem}-{where[name]:05d}-of-{len(shards):05d}.safetensors" for name in specs}


def aligned_order(specs: Mapping[str, Spec]) -> list[str]:
    """Names in the order the safetensors package writes them: widest dtype first, then by name."""
    return sorted(specs, key=lambda name: (_RANK.get(dtype_name(specs[name][0]), len(_RANK)), name))
