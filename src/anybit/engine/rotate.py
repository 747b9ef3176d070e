"""A dense checkpoint, rotated: the same model with other weights, file to file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from anybit.engine.load import Progress, prepare
from anybit.engine.plan import Plan
from anybit.engine.quantize import copy_job, source_config, stored_of
from anybit.engine.rotation import rotated, steps, untied
from anybit.engine.write import write_checkpoint
from anybit.errors import InvalidOption


def rotate(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    rotations: str | bool = True,
    *,
    dtype: torch.dtype | str | None = "auto",
    max_shard_size: int | str | None = None,
    force: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    hub_options: Mapping[str, Any] | None = None,
) -> Plan:
    """Write the dense checkpoint `src` with its weights rotated to the new folder `dst`, one weight in memory at a time.

    `rotations`: "r1", "r2" or "r1+r2" (True), see `rotation`; r4 happens at run time, which a dense checkpoint cannot say.
    `dtype`: of the new weights (default: as stored). The model computes what it did, up to the rounding of its weights.
    Raises NotRepresentable for a layer that cannot be rotated, ConfigError for a quantized source, FileExistsError without
    `force`.
    """
    wanted = steps(rotations)
    if not wanted or "r4" in wanted:
        raise InvalidOption(f"rotations is {rotations!r}; a dense checkpoint holds r1, r2 or r1+r2")
    options: dict[str, Any] = {"dtype": dtype, "allow_pickle": allow_pickle, "hub_options": hub_options}
    plain = prepare(src, **options)
    seen = rotated(plain, wanted)
    ready = prepare(src, through=seen.through, config=untied(plain.model.config, seen), **options)
    ready.plan.notes += seen.notes
    keep = None if dtype in ("auto", None) else ready.plan.dtype
    infos = [info for entry in ready.plan.entries for info in stored_of(entry)]
    infos += [info for plain_infos in ready.plan.plain.values() for info in plain_infos]
    jobs = [copy_job(ready.checkpoint, info, keep) for info in {info.name: info for info in infos}.values()]
    config = {**source_config(ready), **seen.config}
    if keep is not None:
        config["dtype"] = str(keep).removeprefix("torch.")
    write_checkpoint(
        dst, jobs, config, max_shard_size=max_shard_size, copy_from=ready.side_files(), extra_files=ready.extra_files(),
        force=force, progress=progress,
    )  # fmt: skip
    ready.checkpoint.release()
    return ready.plan
