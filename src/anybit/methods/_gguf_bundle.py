"""A GGUF file as the checkpoint transformers would write of the same model: names, order of rows, config.json."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.methods import _gguf_latent as latent
from anybit.methods._gguf_architecture import Architecture, Joined
from anybit.methods._gguf_metadata import BLOCK, Metadata
from anybit.methods._gguf_models import describe
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
    translation = _Translation(metadata, architecture, settings)
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
_MAY_BE_NULL = (
    "sliding_window",
    "final_logit_softcapping",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "q_lora_rank",
)


def _check_split(metadata: Metadata) -> None:
    if not metadata.has("split.tensors.count"):
        return
    count = metadata.whole("split.tensors.count", least=0)
    if count != len(metadata.tensors):
        metadata.fail(f"the parts should hold {count} tensors together, but hold {len(metadata.tensors)}")


class _Translation:
    """Stored tensors one by one. `ignored`: those that nothing is made of, and why."""

    def __init__(self, metadata: Metadata, architecture: Architecture, settings: Mapping[str, Any]):
        self.m, self.architecture, self.settings = metadata, architecture, settings
        self.ignored: dict[str, str] = {}
        self.joined = {owns[0]: (owns, how) for owns, how in architecture.joined.items()}
        self.later = {own for owns in architecture.joined for own in owns[1:]}

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
        match = BLOCK.match(stored)
        number, rest = (int(match[1]), match[2]) if match else (None, stored)
        own, _, kind = rest.rpartition(".")
        key, parameter = (own, stored) if number is None else (f"blk.{{n}}.{own}", f"blk.{{n}}.{rest}")
        if number is not None and number >= self.m.blocks:
            self.ignored[stored] = "it predicts further tokens, which transformers' class does not"
        elif (whole := self.architecture.parameters.get(parameter)) is not None:
            yield self._parameter(stored, parameter, whole.format(n=number))
        elif own == "attn_rot_embd":
            self.ignored[stored] = "recomputed from the configuration"
        elif own in self.later:
            return
        elif own in self.joined:
            yield self._joined(stored, kind, number, *self.joined[own])
        elif self.architecture.latent and own in latent.PARTS:
            if f"blk.{number}.attn_kv_b.weight" in self.m.tensors:
                self.ignored[stored] = "attn_kv_b holds it too"
            elif own == latent.PARTS[0]:
                yield self._latent(stored, number)
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
        elif own in a.rows and kind in ("weight", "bias"):
            make = functools.partial(_in_order, a.rows[own], self.settings)
        elif own in a.shifted and kind == "weight" and not info.encoding:
            make = _minus_one
        elif own in a.transposed and kind == "weight" and not info.encoding and len(shape) > 1:
            shape, make = (*shape[:-2], shape[-1], shape[-2]), _transposed
        return self._made(target, kind, (stored,), shape, make)

    def _joined(self, stored: str, kind: str, number: int | None, owns: tuple[str, ...], how: Joined) -> Named:
        """Rows of this tensor and of those that belong to it."""
        names = tuple(f"blk.{number}.{own}.{kind}" for own in owns)
        info = self.m.tensors[stored]
        axis = len(info.shape) - (2 if kind == "weight" else 1)
        rows = 0
        for name in names:
            other = self.m.tensors.get(name)
            if other is None:
                self.m.fail(f"there is no tensor {name!r} beside {stored!r}")
            if axis < 0 or len(other.shape) != len(info.shape):
                self.m.fail(f"tensors {stored!r} and {name!r} have the shapes {info.shape} and {other.shape}")
            rows += other.shape[axis]
            without = [shape[:axis] + shape[axis + 1 :] for shape in (info.shape, other.shape)]
            if (without[0], info.dtype, info.encoding) != (without[1], other.dtype, other.encoding):
                self.m.refuse(
                    f"{stored!r} is {info.encoding or info.dtype} {info.shape} and {name!r} {other.encoding or other.dtype} "
                    f"{other.shape}; transformers holds both in one tensor, so they must be stored alike"
                )
        shape = (*info.shape[:axis], rows, *info.shape[axis + 1 :])
        turned = owns[0] in self.architecture.transposed and kind == "weight" and not info.encoding
        if turned:
            shape = (*shape[:-2], shape[-1], shape[-2])
        make = functools.partial(_together, axis, turned, how, self.settings)
        return self._made(how.target.format(n=number), kind, names, shape, make)

    def _parameter(self, stored: str, form: str, target: str) -> Named:
        info, change = self.m.tensors[stored], self.architecture.changes.get(form)
        if info.encoding:
            self.m.refuse(f"tensor {stored!r} is {info.encoding}; numbers of this kind are not stored in blocks")
        if change is None:
            return target, Derived((stored,), info.dtype, info.shape)
        shape = change.shape_back(tuple(info.shape), self.settings)
        make = functools.partial(_changed_back, change.back, self.settings)
        return target, Derived((stored,), info.dtype, shape, None, make)

    def _latent(self, stored: str, number: int | None) -> Named:
        """Keys' and values' expansions in one matrix. They are stored along different axes, so blocks are worked out."""
        names = tuple(f"blk.{number}.{part}.weight" for part in latent.PARTS)
        infos = [self.m.tensors[name] for name in names if name in self.m.tensors]
        if len(infos) < len(names):
            self.m.fail(f"there is no tensor {names[1]!r} beside {stored!r}")
        shapes = [self.m.shape(name) for name in names]
        shape = latent.whole_shape(shapes, self.settings)
        if shape is None:
            self.m.fail(f"tensors {names[0]!r} and {names[1]!r} have the shapes {shapes[0]} and {shapes[1]}")
        dense = (
            infos[0].dtype
            if not any(info.encoding for info in infos) and infos[0].dtype == infos[1].dtype
            else "float32"
        )
        make = functools.partial(latent.join, [info.encoding for info in infos], shapes, dense)
        return f"{self.architecture.latent.format(n=number)}.weight", Derived(names, dense, shape, None, make)

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


def _together(axis: int, turned: bool, how: Joined, settings: Mapping[str, Any], tensors: list[Tensor]) -> Tensor:
    whole = torch.cat(tensors, axis)
    if how.order is not None:
        whole = whole.index_select(axis, torch.argsort(how.order(settings, whole.shape[axis])))
    return whole.transpose(-1, -2).contiguous() if turned else whole


def _in_order(
    order: Callable[[Mapping[str, Any]], Tensor], settings: Mapping[str, Any], tensors: list[Tensor]
) -> Tensor:
    return tensors[0][torch.argsort(order(settings))]


def _changed_back(
    back: Callable[[Tensor, Mapping[str, Any]], Tensor], settings: Mapping[str, Any], tensors: list[Tensor]
) -> Tensor:
    return back(tensors[0], settings).contiguous()


def _rows(start: int, count: int, tensors: list[Tensor]) -> Tensor:
    return tensors[0][start : start + count].clone()
