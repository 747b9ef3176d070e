"""Hidden states of all calibration samples, in files, one batch in memory at a time.

They may be many times larger than a decoder block, and they are what a broken run needs to go on. The folder of a set is
renamed to its name when the set is complete.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from anybit.containers.atomic import write_failed
from anybit.errors import WriteError

KINDS = ("hidden", "reference")  # of the quantized blocks so far; of the dense ones


@dataclass
class Work:
    """Where a run keeps its hidden states: a temporary folder unless one is named. `reached`: the block whose inputs are last."""

    named: Path | None = None
    reached: int = 0

    @property
    def folder(self) -> Path:
        if self.named is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="anybit-calibration-")
            self.named = Path(self._temporary.name)
        return self.named

    def states(self, number: int, device: torch.device, kind: str = KINDS[0]) -> HiddenStates:
        """The inputs of a block, as an earlier run left them or to be filled."""
        self.reached = max(self.reached, number)
        return HiddenStates(self.folder / f"{kind}-{number}", device)

    def forget(self) -> None:
        """Remove the inputs of blocks before the last."""
        for folder in self.folder.iterdir():
            kind, _, number = folder.name.partition("-")
            if kind in KINDS and number.isdecimal() and int(number) < self.reached:
                shutil.rmtree(folder, ignore_errors=True)


class HiddenStates(Sequence[Tensor]):
    """The inputs of one decoder block, batch by batch."""

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device = folder, device

    @property
    def there(self) -> bool:
        """Whether they are complete."""
        return self.folder.is_dir()

    @functools.cached_property
    def _count(self) -> int:
        return sum(1 for _ in self.folder.iterdir())

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, batch: Any) -> Any:
        if not 0 <= batch < len(self):
            raise IndexError(batch)
        return load((self.folder / f"{batch}.safetensors").read_bytes())["hidden"].to(self.device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[batch] for batch in range(len(self)))

    def fill(self, batches: Iterable[Tensor]) -> HiddenStates:
        """Keep these, in place of what the folder held."""
        making = self.folder.with_name(self.folder.name + ".new")
        try:
            for old in (making, self.folder):
                if old.exists():
                    shutil.rmtree(old)
            making.mkdir()
            for number, batch in enumerate(batches):
                with open(making / f"{number}.safetensors", "wb") as file:
                    file.write(save({"hidden": batch.detach().cpu().contiguous()}))
                    file.flush()
                    os.fsync(file.fileno())
            os.rename(making, self.folder)
        except OSError as error:
            if isinstance(error, WriteError):
                raise
            raise write_failed(error, f"{making} (hidden states of calibration)", lasting=True) from error
        return self
