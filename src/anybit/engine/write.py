"""One way to write a checkpoint, for saving, quantizing, dequantizing and converting: jobs that make a few tensors each.

Headers are written first, from predicted shapes; then one job's tensors at a time, so memory stays at one job whatever the
size of the model. The folder appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from anybit.containers.atomic import RESULT, atomic_folder, resumable_folder
from anybit.containers.writer import SafetensorsWriter, aligned_order
from anybit.engine.resume import Journal, Resume
from anybit.errors import AnybitError, WriteError

if TYPE_CHECKING:
    from anybit.containers.gguf_writer import GgufWriter

Spec = tuple[str, tuple[int, ...]]  # dtype name, shape

# what a checkpoint folder holds beside weights and configuration, and goes with the model unchanged
SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".md")
NOT_COPIED = ("config.json", "README.md")  # whole names: tokenizer_config.json goes along


@dataclass(frozen=True)
class Job:
    """Makes the tensors whose names and specs it announced. `label` is what progress shows.

    `shrinking`: names of tensors that may turn out shorter than announced. `remark`: what progress adds to the label when the
    tensors are made.
    """

    label: str
    specs: Mapping[str, Spec]
    make: Callable[[], Mapping[str, Tensor]]
    shrinking: frozenset[str] = frozenset()
    remark: Callable[[], str] = str


@dataclass(frozen=True)
class Arrangement:
    """How a checkpoint's tensors lie in its files: name -> file name, in order, and the metadata of the headers."""

    files: Mapping[str, str]
    metadata: Mapping[str, str]


def write_checkpoint(
    target: str | os.PathLike[str],
    jobs: Sequence[Job],
    config: Mapping[str, Any] | bytes,
    *,
    like: Arrangement | None = None,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | str | None = None,
    copy_from: Iterable[Path] = (),
    extra_files: Mapping[str, bytes] | None = None,
    force: bool = False,
    merge: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    resume: Resume | None = None,
) -> Path:
    """Write weights, config.json and side files to the folder `target`, atomically; returns it.

    `like`: lay the same tensors out as they were, unless `max_shard_size` says otherwise; else headers say `metadata`.
    Raises FileExistsError unless `force`; with `merge`, a folder that holds no model yet (a tokenizer, say) is added to.
    Nothing is left behind on any error; with `resume`, what is done stays after one that has no cause in the job itself.
    """
    specs: dict[str, Spec] = {}
    for job in jobs:
        specs.update(job.specs)
    same = like is not None and max_shard_size is None and set(like.files) == set(specs)
    order = list(like.files) if same and like is not None else aligned_order(specs)
    specs = {name: specs[name] for name in order}
    shrinking = frozenset().union(*(job.shrinking for job in jobs))
    target = Path(target)
    if merge and target.is_dir() and not _holds_model(target):
        inside = target / ".anybit-new"
        write_checkpoint(
            inside, jobs, config, like=like, metadata=metadata, max_shard_size=max_shard_size, copy_from=copy_from,
            extra_files=extra_files, force=True, progress=progress,
        )  # fmt: skip
        # config.json makes it a model, so it comes last
        for file in sorted(inside.iterdir(), key=lambda file: file.name == "config.json"):
            if not (target / file.name).exists() or file.suffix != ".json" or file.name == "config.json":
                os.replace(file, target / file.name)
        shutil.rmtree(inside)
        return target
    with contextlib.ExitStack() as stack:
        journal = None
        if resume is None:
            folder = stack.enter_context(atomic_folder(target, force=force))
        else:
            work = stack.enter_context(resumable_folder(target, force=force, restart=resume.restart))
            folder, journal = work / RESULT, Journal(work, resume)
            resume.begin(work)
        # a tensor of unknown length is placed when all are there, so a broken run has to make it again
        kept = {number for number in (journal.done if journal is not None else ()) if not jobs[number].shrinking}
        with SafetensorsWriter(
            folder,
            specs,
            max_shard_size=max_shard_size or "5GB",
            metadata=dict(like.metadata) if same and like is not None else dict(metadata or {"format": "pt"}),
            files=like.files if same and like is not None else None,
            shrinking=shrinking,
            written=None if journal is None else {name for number in kept for name in jobs[number].specs},
        ) as writer:
            run_jobs(jobs, writer, kept, journal, progress)
        for file in copy_from:
            shutil.copyfile(file, folder / file.name)
        for name, content in (extra_files or {}).items():
            (folder / name).write_bytes(content)
        text = config if isinstance(config, bytes) else (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
        (folder / "config.json").write_bytes(text)
        if resume is not None:
            resume.check()
    return target


def run_jobs(
    jobs: Sequence[Job],
    writer: SafetensorsWriter | GgufWriter,
    kept: Collection[int],
    journal: Journal | None,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """Make and write the tensors of every job but those `kept` from a broken run, one job in memory at a time."""
    for number, job in enumerate(jobs):
        if number not in kept:
            try:
                made = dict(job.make())
            except AnybitError as error:
                if journal is not None and not isinstance(error, WriteError):
                    journal.drop()  # the next run would end there as well
                raise
            for name in list(made):
                writer.write(name, made.pop(name))
            if journal is not None:
                journal.finished(number, writer.sync, number + 1 == len(jobs))
        if progress is not None:
            progress(job.label + job.remark(), number + 1, len(jobs))


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or any(folder.glob("*.safetensors"))


def side_files(folder: Path, drop: Iterable[str] = ()) -> list[Path]:
    """Tokenizer, generation config and the like of a checkpoint folder; `drop`: names that no longer hold."""
    if not folder.is_dir():
        return []
    dropped = set(drop)
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.suffix in SIDE_SUFFIXES
        and file.name not in NOT_COPIED
        and not file.name.endswith(".index.json")
        and file.name not in dropped
    ]
