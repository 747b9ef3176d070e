"""The command that writes a dense checkpoint with rotated weights."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from anybit.cli.options import Debug, Dtype, Force, Json, Quiet, Shard, Source, Target
from anybit.cli.progress import peak_memory
from anybit.cli.report import Output, duration, pairs, size


def rotate(
    path: Source,
    output: Target,
    rotations: Annotated[
        str, typer.Option("--rotations", help="r1 (residual stream), r2 (heads) or both.", metavar="NAMES")
    ] = "r1+r2",
    dtype: Dtype = "auto",
    max_shard_size: Shard = "5GB",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rotate a dense checkpoint: easier to quantize.

    Its weights are multiplied by Hadamard matrices (QuaRot, SpinQuant); what the model computes stays the same.

    anybit rotate llama -o llama-rotated
    """
    out = Output(as_json, quiet)
    from anybit.engine.rotate import rotate as run

    begin = time.perf_counter()
    with out.progress("rotate") as progress:
        plan = run(path, output, rotations, dtype=dtype, max_shard_size=max_shard_size, force=force, progress=progress)
    seconds = time.perf_counter() - begin
    out.result(
        {"output": str(output), "notes": plan.notes, "seconds": seconds, "peak_memory_bytes": peak_memory()},
        pairs(
            [
                ("written", output),
                *(("", note) for note in plan.notes),
                ("took", f"{duration(seconds)}, peak memory {size(peak_memory())}"),
            ]
        ),
    )


COMMANDS = (rotate,)
