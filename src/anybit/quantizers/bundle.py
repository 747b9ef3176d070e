"""A checkpoint whose own files carry the whole model: configuration, tokenizer, and tensors under names of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Derived:
    """A tensor under the name transformers' checkpoints give it, made of stored ones.

    `sources`: their names. `part`: only that entry of their first axis is read. `make`: what to do with them (default: the first
    one as it is). `dtype` and `shape`: of the result.
    """

    sources: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    part: int | None = None
    make: Callable[[list[Tensor]], Tensor] | None = None


@dataclass(frozen=True)
class Bundle:
    """What a quantizer finds in such files. Names are those of a checkpoint that transformers would write.

    `config` and `generation`: contents of config.json and generation_config.json. `files()`: further files by name, tokenizer
    and the like; raises ConfigError if they cannot be made. `ignored`: stored name -> why nothing is made of it.
    """

    tensors: Mapping[str, Derived]
    config: Mapping[str, Any]
    generation: Mapping[str, Any] = field(default_factory=dict)
    files: Callable[[], Mapping[str, bytes]] = dict
    ignored: Mapping[str, str] = field(default_factory=dict)

    def side_files(self) -> dict[str, bytes]:
        """All files but config.json."""
        if not self.generation:
            return dict(self.files())
        text = json.dumps(dict(self.generation), indent=2, sort_keys=True) + "\n"
        return {"generation_config.json": text.encode(), **self.files()}


@dataclass(frozen=True)
class Placed:
    """Where a tensor of a checkpoint goes in a bundle: to `target`, whole or as part number `part` of its first axis.

    `parts`: how many there are, each of the same size; None: each entry of the axis is one. `make`: what to do with it before
    (default: its bytes as they are).
    """

    target: str
    part: int | None = None
    make: Callable[[Tensor], Tensor] | None = None
    parts: int | None = None


@dataclass(frozen=True)
class Bundled:
    """A checkpoint as one file that carries the whole model; the way back of `Bundle`.

    `file`: its name. `values`: metadata by key. `tensors`: stored name -> (type of its blocks, logical shape), in the order of
    their data. `places`: a checkpoint's tensor -> where it goes. `constants`: stored tensors made of settings. `big_endian`: the
    order of bytes in the file.
    """

    file: str
    values: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    places: Mapping[str, tuple[Placed, ...]]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    big_endian: bool = False

    def sources(self) -> dict[str, list[str]]:
        """Stored name -> the checkpoint's tensors it is made of."""
        found: dict[str, list[str]] = {name: [] for name in self.tensors}
        for source, places in self.places.items():
            for place in places:
                found[place.target].append(source)
        return found
