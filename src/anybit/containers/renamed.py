"""A checkpoint under other names: what a bundle's tensors are made of, read when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from anybit.containers.checkpoint import Checkpoint
from anybit.containers.info import TensorInfo, shorten
from anybit.errors import MissingTensor, did_you_mean
from anybit.weight.block_types import itemsize

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.quantizers.bundle import Derived


class Renamed(Checkpoint):
    """Reads like the checkpoint it stands for. `ignored`: stored tensors that nothing is made of, under their own names."""

    def __init__(
        self, checkpoint: Checkpoint, derived: Mapping[str, Derived], ignored: Mapping[str, str] | None = None
    ):
        self.path, self.metadata, self.values = checkpoint.path, checkpoint.metadata, checkpoint.values
        self.file_metadata = checkpoint.file_metadata
        self.stored = checkpoint
        self._derived = derived
        self._files = checkpoint._files
        infos = {name: self._info(name, one) for name, one in derived.items()}
        infos.update({name: checkpoint.tensors[name] for name in ignored or ()})
        self.tensors = MappingProxyType(infos)

    def _info(self, name: str, derived: Derived) -> TensorInfo:
        source = self.stored.tensors[derived.sources[0]]
        size = math.prod(derived.shape) * itemsize(derived.dtype)
        return TensorInfo(name, derived.dtype, derived.shape, size, source.file, source.offset)

    def read(self, name: str, *, copy: bool = True) -> Tensor:
        """As `Checkpoint.read`; a tensor that is made, and not only found, owns its memory."""
        derived = self._derived.get(name)
        if derived is None:
            if name in self.tensors:
                return self.stored.read(name, copy=copy)
            raise MissingTensor(f"tensor {shorten(name)} is not in {self.path}{did_you_mean(name, self.tensors)}")
        infos = [_part(self.stored.tensors[source], derived.part) for source in derived.sources]
        tensors = [self.stored.read_at(info, copy=copy) for info in infos]
        if derived.make is not None:
            return derived.make(tensors)
        return tensors[0].view(derived.shape)


def _part(info: TensorInfo, part: int | None) -> TensorInfo:
    """One entry of the first axis of a stored tensor."""
    if part is None:
        return info
    size = info.nbytes // info.shape[0]
    return replace(info, shape=info.shape[1:], nbytes=size, offset=info.offset + part * size)
