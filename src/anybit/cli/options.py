"""Options that several commands share, and the completions of their values. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anybit.cli import schemes


def _starting(incomplete: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def complete_scheme(incomplete: str) -> list[str]:
    return _starting(incomplete, list(schemes.schemes()))


def complete_method(incomplete: str) -> list[str]:
    return _starting(incomplete, schemes.methods())


def complete_dtype(incomplete: str) -> list[str]:
    return _starting(incomplete, ["auto", "bfloat16", "float16", "float32"])


def complete_device(incomplete: str) -> list[str]:
    return _starting(incomplete, ["auto", "cpu", "cuda", "cuda:0", "mps", "xpu"])


Source = Annotated[str, typer.Argument(help="A folder, a .safetensors file, or a hub id (owner/name).", metavar="PATH")]
Target = Annotated[Path, typer.Option("--output", "-o", help="The new folder.", metavar="FOLDER")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no remarks; only the result.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show Python's traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace the output folder if it exists.")]
Shard = Annotated[str, typer.Option("--max-shard-size", help="Largest file to write, e.g. 5GB.", metavar="SIZE")]
Device = Annotated[
    str,
    typer.Option(
        "--device", help="cpu, cuda, cuda:0, mps, ... or auto.", metavar="NAME", autocompletion=complete_device
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", help="Of what is not quantized: auto (as stored), bfloat16, float16, float32.", metavar="NAME",
        autocompletion=complete_dtype,
    ),
]  # fmt: skip
Scheme = Annotated[
    str | None,
    typer.Option(
        "--scheme", "-s", help="A named configuration; `anybit methods` lists them.", metavar="NAME",
        autocompletion=complete_scheme,
    ),
]  # fmt: skip
Method = Annotated[
    str | None,
    typer.Option(
        "--method", "-m", help="A method, with --set for its options.", metavar="NAME", autocompletion=complete_method
    ),
]
Setting = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="An option of the method, e.g. --set group_size=64; may be repeated.", metavar="NAME=VALUE"
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="A JSON file with a quantization configuration.", metavar="FILE.json", dir_okay=False
    ),
]
