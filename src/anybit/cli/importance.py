"""The command that computes an importance matrix."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from anybit.cli.making import main_device
from anybit.cli.options import Debug, Device, Json, Quiet, Source
from anybit.cli.progress import peak_memory
from anybit.cli.report import Output, duration, pairs, size


def imatrix(
    path: Source,
    calib: Annotated[
        Path, typer.Option("--calib", help="Text to read: .txt, .jsonl, .parquet.", metavar="FILE", dir_okay=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new file.", metavar="FILE.gguf", dir_okay=False)],
    samples: Annotated[
        int | None, typer.Option("--samples", help="Rows of the text.  [default: 128]", min=1, metavar="N")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option("--sequence-length", help="Tokens of a row.  [default: 512]", min=2, metavar="N")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Which rows are drawn.  [default: 0]", metavar="N")] = None,
    device: Device = "cpu",
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the file if it exists.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure on a text what every input of a dense model's layers weighs, for GGUF's smallest types.

    The file is in the form of llama.cpp's tool of that name. `quantize --set imatrix=FILE` takes it; `quantize --calib` does
    both in one go.

    anybit imatrix llama --calib text.txt -o llama-imatrix.gguf
    """
    out = Output(as_json, quiet)
    from anybit.engine.importance import importance_matrix as run

    drawn: dict[str, Any] = {"samples": samples, "sequence_length": sequence_length, "seed": seed}
    begin = time.perf_counter()
    with out.progress("imatrix") as progress:
        run(
            path,
            output,
            calib,
            **{name: value for name, value in drawn.items() if value is not None},
            device=main_device(device),
            force=force,
            progress=progress,
        )
    seconds = time.perf_counter() - begin
    out.result(
        {
            "output": str(output),
            "bytes_written": output.stat().st_size,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory(),
        },
        pairs(
            [
                ("written", output),
                ("use it", f"anybit quantize {path} -o FOLDER --scheme gguf-iq2_m --set imatrix={output}"),
                ("took", f"{duration(seconds)}, peak memory {size(peak_memory())}"),
            ]
        ),
    )


COMMANDS = (imatrix,)
