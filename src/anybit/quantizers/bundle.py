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
