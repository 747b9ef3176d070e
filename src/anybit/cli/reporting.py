"""The command that writes a report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from anybit.cli.options import Debug, Device, Json, Quiet, Source
from anybit.cli.report import Output, pairs


def report(
    path: Source,
    reference: Annotated[
        str | None, typer.Option("--reference", "-r", help="The dense model it was made from.", metavar="PATH")
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", "-t", help="A UTF-8 text file, or the text itself.", metavar="FILE")
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare",
            help="Another quantized model for the chart of size against quality; may be repeated.",
            metavar="PATH",
        ),
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(
            "--costs",
            help="What `anybit sensitivity --cache` wrote: the curve of what each module costs.",
            metavar="FILE.json",
            dir_okay=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="Show how it is continued; may be repeated.", metavar="TEXT"),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=2, help="Only the first tokens of the text.", metavar="N")
    ] = 4096,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page.  [default: report.html in the model's folder]", metavar="FILE"),
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Also write the model card, README.md in the model's folder.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Replace a model card that anybit did not write.")
    ] = False,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write what became of a model as one HTML page.

    Sizes, coverage, errors by module, distributions, quality and texts; without a reference or a text, less of it.

    anybit report llama-nf4 --reference meta-llama/Llama-3.2-1B --text wiki.txt -p "Once upon a time" --card
    """
    out = Output(as_json, quiet)
    from anybit.cli.making import main_device
    from anybit.reporting import gather, write_card, write_page

    parts = ["anybit", "report", path]
    parts += [
        word
        for name, value in (("--reference", reference), ("--text", text), ("--costs", costs))
        if value
        for word in (name, str(value))
    ]
    parts += [
        word
        for name, values in (("--compare", compare), ("--prompt", prompt))
        for value in values or []
        for word in (name, value)
    ]
    with out.progress("report") as progress:
        facts = gather(
            path,
            command=shlex.join(parts),
            reference=reference,
            text=Path(text) if text and Path(text).suffix == ".txt" else text,
            compare=compare or (),
            prompts=prompt or (),
            costs=costs,
            max_tokens=max_tokens,
            device_map=main_device(device),
            progress=progress,
        )
    target = output if output is not None else Path(path) / "report.html"
    write_page(facts, target)
    written = [("page", target)]
    if card:
        written.append(("model card", write_card(facts, Path(path), force)))
    out.result({**facts.to_dict(), "page": str(target)}, pairs(written))


COMMANDS = (report,)
