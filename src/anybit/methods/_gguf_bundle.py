"""A GGUF file as the checkpoint transformers would write of the same model: names, order of rows, config.json."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.methods._gguf_metadata import BLOCK, Metadata
from anybit.methods._gguf_models import Architecture, describe
from anybit.methods._gguf_rope import TENSORS as ROPE_TENSORS
from anybit.methods._gguf_tokenizer import TokenizerFiles
from anybit.quantizers.bundle import Bundle, Derived

if TYPE_CHECKING:
    from torch import Tensor

EXPERT = re.compile(r"(.+)\.(\d{1,6})$")
Make = Callable[["list[Tensor]"], "Tensor"]
Named = tuple[str, Derived]


def bundle_of(checkpoint: Any) -> Bundle:
    """What the files of an open checkpoint hold. Raises CheckpointError and ConfigError; reads no weight."""
    metadata = Metadata(checkpoint)
    _check_split(metadata)
    architecture = describe(metadata)
    settings = {"model_type": architecture.model_type, "architectures": [architecture.model_class]}
    settings.update(
        {
            name: value
            for name, value in architecture.settings(metadata).items()
            if value is not None or name in _MAY_BE_NULL
        }
    )
    translation = _Translation(metadata, architecture)
    derived = dict(translation.all())
    ends = [token for name in ("eos", "eot", "eom") if (token := metadata.token(name)) is not None]
    generation = {
        "bos_token_id": metadata.token("bos"),
        "eos_token_id": list(dict.fromkeys(ends)) if len(set(ends)) > 1 else ends[0] if ends else None,
        "pad_token_id": metadata.token("padding"),
    }
    generation = {name: value for name, value in generation.items() if value is not None}
    return Bundle(derived, settings, generation, TokenizerFiles.of(metadata), translation.ignored)


# settings whose default in transformers is not None
_MAY_BE_NULL = ("sliding_window", "final_logit_softcapping", "bos_token_id", "eos_token_id", "pad_token_id")


def _check_split(metadata: Metadata) -> None:
    if not metadata.has("split.tensors.count"):
        return
    count = metadata.whole("split.tensors.count", least=0)
    if count != len(metadata.tensors):
        metadata.fail(f"the parts should hold {count} tensors together, but hold {len(metadata.tensors)}")


class _Translation:
    """Stored tensors one by one. `ignored`: those that nothing is made of, and why."""

    def __init__(self, metadata: Metadata, architecture: Architecture):
        self.m, self.architecture = metadata, architecture
        self.ignored: dict[str, str] = {}
        self.second = {second: first for first, second in architecture.interleaved}

    def all(self) -> Iterator[Named]:
        taken: dict[str, str] = {}
        for stored in self.m.tensors:
            if stored in ROPE_TENSORS:
                self.ignored[stored] = "it is in the configuration, as rope_parameters"
                continue
            for name, derived in self.one(stored):
                if name in taken:
                    self.m.fail(f"tensors {taken[name]!r} and {stored!r} would both be {name!r}")
                taken[name] = stored
                yield name, derived

    def one(self, stored: str) -> Iterator[Named]:
        """The tensors of the checkpoint that a stored one gives."""
        module, _, kind = stored.rpartition(".")
        match = BLOCK.match(module)
        number, own = (int(match[1]), match[2]) if match else (None, module)
        key = own if number is None else f"blk.{{n}}.{own}"
        if own == "attn_rot_embd":
            self.ignored[stored] = "recomputed from the configuration"
        elif own in self.second:
            return
        elif target := next((to for (first, _), to in self.architecture.interleaved.items() if first == own), None):
            yield self._interleaved(stored, kind, number, own, target)
        elif own in self.architecture.pieces:
            yield from self._pieces(stored, kind, number, own)
        elif (target := self.architecture.names.get(key)) is not None:
            info = self.m.tensors[stored]
            if "{e}" in target:
                if not info.shape:
                    self.m.fail(f"tensor {stored!r} is a single number; a stack of experts was expected")
                for expert in range(info.shape[0]):
                    yield self._made(target.format(n=number, e=expert), kind, (stored,), info.shape[1:], part=expert)
            else:
                yield self._plain(stored, kind, own, target.format(n=number))
        elif (
            match and (expert_of := EXPERT.match(own)) and f"blk.{{n}}.{expert_of[1]}.{{e}}" in self.architecture.names
        ):
            target = self.architecture.names[f"blk.{{n}}.{expert_of[1]}.{{e}}"]
            info = self.m.tensors[stored]
            yield self._made(target.format(n=number, e=int(expert_of[2])), kind, (stored,), info.shape)
        else:  # left under its own name, which no model has: the plan refuses it
            info = self.m.tensors[stored]
            yield stored, Derived((stored,), info.dtype, info.shape)

    def _plain(self, stored: str, kind: str, own: str, target: str) -> Named:
        info, a = self.m.tensors[stored], self.architecture
        shape: tuple[int, ...] = info.shape
        make: Make | None = None
        if own in a.turned and kind in ("weight", "bias"):
            heads = self.m.uniform("attention.head_count")
            if own == "attn_k":
                heads = self.m.uniform("attention.head_count_kv", heads)
            if not shape or shape[0] % (2 * heads):
                self.m.fail(f"tensor {stored!r} has the shape {shape}; {heads} heads of pairs do not fit")
            make = functools.partial(_turned, heads)
        elif own in a.shifted and kind == "weight" and not info.encoding:
            make = _minus_one
        elif own in a.transposed and kind == "weight" and not info.encoding and len(shape) > 1:
            shape, make = (*shape[:-2], shape[-1], shape[-2]), _transposed
        return self._made(target, kind, (stored,), shape, make)

    def _interleaved(self, stored: str, kind: str, number: int | None, own: str, target: str) -> Named:
        """Rows of this stack and of its twin by turns."""
        second = next(second for first, second in self.architecture.interleaved if first == own)
        twin = f"blk.{number}.{second}.{kind}"
        info, other = self.m.tensors[stored], self.m.tensors.get(twin)
        if other is None:
            self.m.fail(f"there is no tensor {twin!r} beside {stored!r}")
        if (info.shape, info.dtype, info.encoding) != (other.shape, other.dtype, other.encoding):
            self.m.refuse(
                f"{stored!r} is {info.encoding or info.dtype} {info.shape} and {twin!r} {other.encoding or other.dtype} "
                f"{other.shape}; transformers holds both in one tensor, so they must be stored alike"
            )
        if len(info.shape) < 2:
            self.m.fail(f"tensor {stored!r} has the shape {info.shape}; a stack of experts was expected")
        axis = 1
        shape = (info.shape[0], 2 * info.shape[1], *info.shape[2:])
        turned = own in self.architecture.transposed and kind == "weight" and not info.encoding
        if turned:
            shape = (*shape[:-2], shape[-1], shape[-2])
        return self._made(
            target.format(n=number), kind, (stored, twin), shape, functools.partial(_alternating, axis, turned)
        )

    def _pieces(self, stored: str, kind: str, number: int | None, own: str) -> Iterator[Named]:
        """Equal thirds of the rows."""
        info, targets = self.m.tensors[stored], self.architecture.pieces[own]
        if not info.shape or info.shape[0] % len(targets):
            self.m.fail(f"tensor {stored!r} has the shape {info.shape}, which is not {len(targets)} equal parts")
        rows = info.shape[0] // len(targets)
        for place, target in enumerate(targets):
            make = functools.partial(_rows, place * rows, rows)
            yield self._made(target.format(n=number), kind, (stored,), (rows, *info.shape[1:]), make)

    def _made(
        self, target: str, kind: str, sources: tuple[str, ...], shape: tuple[int, ...], make: Make | None = None,
        part: int | None = None,
    ) -> Named:  # fmt: skip
        info = self.m.tensors[sources[0]]
        blocks = info.encoding.lower() if kind == "weight" else ""
        head, parameter, own = target.rpartition("=")
        if parameter:
            name = head + own + (f".{blocks}" if blocks else "" if kind == "weight" else f"_{kind}")
        else:
            name = f"{own}.{blocks or kind}"
        return name, Derived(sources, info.dtype, tuple(shape), part, make)


# --- what is done to tensors ---------------------------------------------------------------------------------------------------


def _turned(heads: int, tensors: list[Tensor]) -> Tensor:
    """Rows of a head in pairs (2i + r) -> in halves (r * half + i)."""
    rows = tensors[0]
    halves = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _minus_one(tensors: list[Tensor]) -> Tensor:
    return tensors[0] - 1


def _transposed(tensors: list[Tensor]) -> Tensor:
    return tensors[0].transpose(-1, -2).contiguous()


def _alternating(axis: int, turned: bool, tensors: list[Tensor]) -> Tensor:
    mixed = torch.stack(tensors, axis + 1).flatten(axis, axis + 1)
    return mixed.transpose(-1, -2).contiguous() if turned else mixed


def _rows(start: int, count: int, tensors: list[Tensor]) -> Tensor:
    return tensors[0][start : start + count].clone()
