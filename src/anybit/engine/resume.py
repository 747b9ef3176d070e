"""What a run leaves beside its output so that the next one goes on where it broke off.

`NAME.partial` holds `result` (the checkpoint, partly written), `state.json` (what the run was, and which jobs are done) and
hidden states of calibration. The state is replaced only after everything it speaks of is on the disk, so a run can be killed at
any moment. It is used for the same source, settings and versions only.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import anybit
from anybit.containers import Checkpoint
from anybit.containers.atomic import NEW_STATE, STATE
from anybit.errors import ConfigError

SECONDS_BETWEEN_STATES = 1.0


@dataclass(frozen=True)
class Resume:
    """How a run can be gone on with. `identity`: plain data; a state is used only where it is equal.

    `begin(folder)` is told where to keep more, `saved()` that the state is on the disk; `notes()` and `take(notes)`: what else
    a state holds, as plain data.
    """

    identity: Mapping[str, Any]
    restart: bool = False
    begin: Callable[[Path], None] = lambda folder: None
    saved: Callable[[], None] = lambda: None
    notes: Callable[[], Mapping[str, Any]] = dict
    take: Callable[[Mapping[str, Any]], None] = lambda notes: None
    check: Callable[[], None] = lambda: None  # raises if the source is not what it was


class Journal:
    """The state file of one folder of work."""

    def __init__(self, folder: Path, resume: Resume):
        self.path = folder / STATE
        self.resume = resume
        self.done: set[int] = set()
        self.last = time.monotonic()
        if self.path.exists():  # there is none before the first job is done: nothing is worth keeping then
            self._read()

    def _read(self) -> None:
        try:
            state = json.loads(self.path.read_text(encoding="utf-8"))
            identity, done, notes = state["identity"], {int(number) for number in state["done"]}, dict(state["notes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.path} is not readable ({error}). Pass restart=True (--restart) to begin anew"
            ) from error
        differing = difference(identity, json.loads(json.dumps(self.resume.identity)))
        if differing:
            raise ConfigError(
                f"{self.path.parent} was left by a broken run that differs from this one: {differing}. Run that one again, "
                "or pass restart=True (--restart) to drop what it did"
            )
        self.done = done
        self.resume.take(notes)

    def finished(self, number: int, sync: Callable[[], None], last: bool) -> None:
        """Job `number` is written. Now and then that is put on the disk."""
        self.done.add(number)
        if not last and time.monotonic() - self.last < SECONDS_BETWEEN_STATES:
            return
        sync()
        self._write()
        self.last = time.monotonic()
        self.resume.saved()

    def _write(self) -> None:
        state = {"identity": self.resume.identity, "done": sorted(self.done), "notes": self.resume.notes()}
        new = self.path.with_name(NEW_STATE)
        with open(new, "w", encoding="utf-8") as file:
            json.dump(state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path)

    def drop(self) -> None:
        """Nothing is kept for another run."""
        self.path.unlink(missing_ok=True)


def identity_of(source: Mapping[str, Any], settings: Mapping[str, Any], specs: Iterable[Any]) -> dict[str, Any]:
    """Everything on which a result depends."""
    return {
        "versions": {"anybit": anybit.__version__, "torch": torch.__version__},
        "source": dict(source),
        "settings": dict(settings),
        "tensors": hashlib.sha256(repr(list(specs)).encode()).hexdigest(),
    }


def source_identity(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """The files of a source by name, size, time of change and the hash of what describes their content."""
    files: dict[str, Any] = {}
    for name in sorted({info.file for info in checkpoint.tensors.values()} | {str(folder / "config.json")}):
        path = Path(name)
        if path.is_file():
            status = path.stat()
            files[path.name] = [status.st_size, status.st_mtime_ns, _head(path)]
    return files


def _head(path: Path) -> str:
    """Hash of a file's first bytes: of all of a configuration, of the header of a file of weights."""
    with open(path, "rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        return hashlib.sha256(first + file.read(min(length, 1 << 24))).hexdigest()


def difference(old: Any, new: Any, where: str = "") -> str:
    """The first difference of two plain values, in words; nothing when they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            found = difference(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
            if found:
                return found
        return ""
    if old == new:
        return ""
    return f"{where} was {_short(old)} and is {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
