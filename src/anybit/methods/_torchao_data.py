"""torchao's objects as the JSON that torchao writes: {"_type": class, "_data": fields}, and back to plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anybit.errors import NotRepresentable

GRANULARITIES = ("PerRow", "PerTensor", "PerGroup", "PerAxis", "PerBlock", "PerToken")


def kind(value: Any) -> str:
    """The class an object is of; "" for a plain value."""
    return str(value["_type"]) if isinstance(value, Mapping) and isinstance(value.get("_type"), str) else ""


def fields(value: Any) -> Mapping[str, Any]:
    """An object's fields; none for anything else."""
    found = value.get("_data") if isinstance(value, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def name(value: Any, default: str = "") -> str:
    """The name of a dtype or of a member of an enumeration, however it is written; `default` for null."""
    if isinstance(value, Mapping):
        value = value.get("_data")
    return default if value is None else str(value).removeprefix("torch.").rpartition(".")[2]


def dtype(dtype_name: str) -> dict[str, Any]:
    return {"_type": "torch.dtype", "_data": dtype_name}


def member(enumeration: str, value: str) -> dict[str, Any]:
    return {"_type": enumeration, "_data": value}


def block_of(granularity: Any, shape: Sequence[int], what: str) -> tuple[int, ...]:
    """Sides of the blocks that share a scale. NotRepresentable, naming `what`, for a class that is not known."""
    own, sides = fields(granularity), [1] * len(shape)
    match kind(granularity):
        case "PerTensor":
            return tuple(shape)
        case "PerRow":
            axis = own.get("dim", -1)
            sides[axis] = shape[axis]
            return tuple(sides)
        case "PerToken":
            return (*sides[:-1], shape[-1])
        case "PerAxis":
            sides = list(shape)
            sides[own.get("axis", 0)] = 1
            return tuple(sides)
        case "PerGroup":
            return (*sides[:-1], int(own["group_size"]))
        case "PerBlock":
            block = [int(side) for side in own["block_size"]]
            return (*sides[len(block) :], *block)
    raise NotRepresentable(
        f"{what} has the granularity {granularity!r}; known are {', '.join(GRANULARITIES)}, written as "
        "{'_type': 'PerGroup', '_data': {'group_size': 32}}"
    )
