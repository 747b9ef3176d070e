"""Writing a checkpoint as one file that carries the whole model, where the method has such files (`HfQuantizer.bundled`)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from anybit.containers.atomic import RESULT, atomic_folder, resumable_folder
from anybit.containers.gguf_writer import GgufWriter
from anybit.engine.resume import Journal, Resume
from anybit.engine.write import Job, Spec
from anybit.errors import AnybitError, WriteError

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.engine.load import Prepared
    from anybit.quantizers.base import HfQuantizer
    from anybit.quantizers.bundle import Bundled


def bundle_for(
    quantizer: HfQuantizer, ready: Prepared, jobs: Sequence[Job], src: str | os.PathLike[str]
) -> Bundled | None:
    """What the file will be; None where the method's checkpoints are safetensors."""
    beside = {file.name: file for file in ready.side_files()}
    inside: dict[str, bytes] = {}

    def read(name: str) -> bytes | None:
        if name in beside:
            return beside[name].read_bytes()
        if not inside and ready.bundle is not None:
            inside.update({"": b"", **ready.extra_files()})
        return inside.get(name)

    specs: dict[str, Spec] = {}
    for job in jobs:
        specs.update(job.specs)
    name = re.sub(r"[^\w.+-]+", "-", Path(src).resolve().stem if Path(src).is_file() else Path(src).resolve().name)
    return quantizer.bundled(ready.model.config.to_dict(), specs, read, name.strip("-.") or "model")


def write_bundle(
    target: str | os.PathLike[str],
    jobs: Sequence[Job],
    bundled: Bundled,
    *,
    max_shard_size: int | str | None = None,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    resume: Resume | None = None,
) -> Path:
    """Write the file into the new folder `target`, atomically; returns it. FileExistsError unless `force`.

    `max_shard_size`: several files, no larger than that where tensors allow. `resume`: as for `write_checkpoint`.
    """
    target = Path(target)
    with contextlib.ExitStack() as stack:
        journal = None
        if resume is None:
            folder = stack.enter_context(atomic_folder(target, force=force))
        else:
            content = (bundled.file, dict(bundled.values), dict(bundled.tensors), bundled.constants, bundled.big_endian)
            digest = hashlib.sha256(repr(content).encode(errors="surrogateescape")).hexdigest()
            resume = replace(resume, identity={**resume.identity, "header": digest})
            work = stack.enter_context(resumable_folder(target, force=force, restart=resume.restart))
            folder, journal = work / RESULT, Journal(work, resume)
            resume.begin(work)
        kept = set() if journal is None else set(journal.done)
        written = None if journal is None else {name for number in kept for name in jobs[number].specs}
        with GgufWriter(folder, bundled, max_shard_size=max_shard_size, written=written) as writer:
            for number, job in enumerate(jobs):
                if number not in kept:
                    for name, tensor in _made(job, journal):
                        writer.write(name, tensor)
                    if journal is not None:
                        journal.finished(number, writer.sync, number + 1 == len(jobs))
                if progress is not None:
                    progress(job.label, number + 1, len(jobs))
        if resume is not None:
            resume.check()
    return target


def _made(job: Job, journal: Journal | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a job, none of them held here."""
    try:
        made = dict(job.make())
    except AnybitError as error:
        if journal is not None and not isinstance(error, WriteError):
            journal.drop()  # the next run would end there as well
        raise
    for name in list(made):
        yield name, made.pop(name)
