"""Writing a checkpoint as one file that carries the whole model, where the method has such files (`HfQuantizer.bundled`)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anybit.containers.atomic import atomic_folder
from anybit.containers.gguf_writer import GgufWriter
from anybit.engine.write import Job, Spec

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
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write the file into the new folder `target`, atomically; returns it. FileExistsError unless `force`."""
    with atomic_folder(Path(target), force=force) as folder, GgufWriter(folder, bundled) as writer:
        for number, job in enumerate(jobs):
            made: dict[str, Any] = dict(job.make())
            for name in list(made):
                writer.write(name, made.pop(name))
            if progress is not None:
                progress(job.label, number + 1, len(jobs))
    return Path(target)
