"""Writing a checkpoint as one file that carries the whole model, where the method has such files (`HfQuantizer.bundled`)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from anybit.containers.atomic import RESULT, atomic_folder, resumable_folder
from anybit.containers.gguf_writer import GgufWriter
from anybit.engine.resume import Journal, Resume
from anybit.engine.write import Job, Spec, run_jobs

if TYPE_CHECKING:
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
            run_jobs(jobs, writer, kept, journal, progress)
        if resume is not None:
            resume.check()
    return target
