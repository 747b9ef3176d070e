"""Commands that write checkpoints: quantize, dequantize, convert."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from anybit.cli.errors import UsageMistake
from anybit.cli.options import (
    ConfigFile,
    Debug,
    Device,
    Dtype,
    Force,
    Json,
    Method,
    Quiet,
    Scheme,
    Setting,
    Shard,
    Source,
    Target,
    complete_scheme,
)
from anybit.cli.progress import peak_memory
from anybit.cli.report import Output, duration, pairs, percent, size, table
from anybit.cli.schemes import chosen, parse_setting


def quantize(
    path: Source,
    output: Target,
    scheme: Scheme = None,
    method: Method = None,
    set_: Setting = None,
    config: ConfigFile = None,
    calib: Annotated[
        Path | None,
        typer.Option("--calib", help="Calibration text: .txt, .jsonl, .parquet.", metavar="FILE", dir_okay=False),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(
            "--algorithm",
            help="With --calib: another than the method's own, e.g. gptq, or several: awq+gptq.",
            metavar="NAME",
        ),
    ] = None,
    algorithm_set: Annotated[
        list[str] | None,
        typer.Option(
            "--algorithm-set",
            help="An option of the rounding, e.g. mse=2.4 of gptq; may be repeated.",
            metavar="NAME=VALUE",
        ),
    ] = None,
    rotate: Annotated[
        str,
        typer.Option(
            "--rotate",
            help="Turn the weights by Hadamard matrices first: r1+r2, or with r4 where the method can say so.",
            metavar="NAMES",
        ),
    ] = "",
    lora_init: Annotated[
        str | None,
        typer.Option("--lora-init", help="loftq: also a LoRA adapter that starts from what is lost.", metavar="NAME"),
    ] = None,
    rank: Annotated[int, typer.Option("--rank", help="Of that adapter.", min=1, metavar="N")] = 16,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Rows of calibration text.  [default: 128]", min=1, metavar="N")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option("--sequence-length", help="Tokens of a row.  [default: 512]", min=2, metavar="N")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Which rows are drawn.  [default: 0]", metavar="N")] = None,
    max_memory: Annotated[
        str | None,
        typer.Option("--max-memory", help="Most to take beside the libraries' own memory, e.g. 8GB.", metavar="SIZE"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would take: time, memory, size.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop what a broken run left in OUTPUT.partial, instead of going on.")
    ] = False,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe", help="A file that says all of this, module by module.", metavar="FILE", dir_okay=False
        ),
    ] = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="Also write a report (report.html) and a model card (README.md) into the output."
        ),
    ] = False,
    report_text: Annotated[
        Path | None,
        typer.Option(
            "--report-text", help="With --report: measure quality on this text.", metavar="FILE", dir_okay=False
        ),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    max_shard_size: Shard = "5GB",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize a dense checkpoint file to file. A run that was broken off is gone on with by the same command.

    One weight is in memory at a time (with --calib, one decoder block), and the output appears only when it is complete.

    anybit quantize meta-llama/Llama-3.2-1B -o llama-nf4 --scheme nf4
    """
    drawn: dict[str, Any] = {"samples": samples, "sequence_length": sequence_length, "seed": seed}
    drawn = {name: value for name, value in drawn.items() if value is not None}
    calibrating = {
        "--algorithm": algorithm,
        "--algorithm-set": algorithm_set,
        **{f"--{name.replace('_', '-')}": value for name, value in drawn.items()},
    }
    if recipe is not None:
        given = {"--scheme": scheme, "--method": method, "--set": set_, "--config": config, "--calib": calib}
        given = {**given, **calibrating, "--rotate": rotate, "--lora-init": lora_init}
        for option in [name for name, value in given.items() if value not in (None, "")]:
            raise UsageMistake(f"--recipe and {option} exclude each other; write it into the recipe")
    wanted = chosen(scheme, method, set_, config, required=recipe is None)
    if calib is None and getattr(wanted, "dataset", None) is None:  # a configuration may bring its own texts
        for option in [name for name, value in calibrating.items() if value is not None]:
            raise UsageMistake(f"{option} says how to use calibration text; name one with --calib")
    if report_text is not None and not report:
        raise UsageMistake("--report-text goes with --report")
    out = Output(as_json, quiet)
    from anybit.engine.quantize import quantize as run

    def announce(ahead: Any) -> bool:
        if dry_run:
            _ahead(out, ahead)
        return not dry_run

    begin = time.perf_counter()
    with out.progress("quantize") as progress:
        options: dict[str, Any] = {
            "dtype": dtype,
            "device": main_device(device),
            "max_shard_size": max_shard_size,
            "force": force,
            "restart": restart,
            "max_memory": max_memory,
            "announce": announce,
            "progress": progress,
        }
        if recipe is not None:
            from anybit.engine.recipe import quantize_by_recipe, read_recipe

            plan = quantize_by_recipe(path, output, read_recipe(recipe), **options)
        else:
            plan = run(
                path,
                output,
                wanted,
                calibration=calib,
                algorithm=algorithm,
                algorithm_options=dict(map(parse_setting, algorithm_set or [])),
                rotate=rotate or False,
                lora_init=lora_init,
                rank=rank,
                **drawn,
                **options,
            )
    if dry_run:
        return
    _written(out, "quantized", plan, output, time.perf_counter() - begin)
    command = shlex.join(["anybit", *sys.argv[1:]])
    if report:
        from anybit.reporting import first_words, gather, write_card, write_page

        with out.progress("report") as progress:
            facts = gather(
                output,
                command=command,
                reference=path,
                text=report_text,
                prompts=[first_words(report_text)] if report_text is not None else (),
                progress=progress,
            )
        write_page(facts, output / "report.html")
        write_card(facts, output, force=True)
        out.remark(f"report: {output / 'report.html'}")
    elif recipe is not None and output.is_dir():
        from anybit.reporting import brief, write_card

        write_card(brief(output, command=command, reference=path), output, force=True)


def dequantize(
    path: Source,
    output: Target,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    max_shard_size: Shard = "5GB",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a quantized checkpoint as a dense one.

    anybit dequantize llama-nf4 -o llama-dense --dtype bfloat16
    """
    out = Output(as_json, quiet)
    from anybit.engine.dequantize import dequantize as run

    begin = time.perf_counter()
    with out.progress("dequantize") as report:
        plan = run(
            path,
            output,
            dtype=dtype,
            device=main_device(device),
            max_shard_size=max_shard_size,
            force=force,
            progress=report,
        )
    _written(out, "dequantized", plan, output, time.perf_counter() - begin)


def convert(
    path: Source,
    output: Target,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", help="A named scheme; `anybit methods` lists them.", metavar="NAME", autocompletion=complete_scheme
        ),
    ] = None,
    method: Method = None,
    set_: Setting = None,
    config: ConfigFile = None,
    allow_requantize: Annotated[
        bool,
        typer.Option("--allow-requantize", help="Choose codes anew where they cannot be kept; the error is stated."),
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    max_shard_size: Shard = "5GB",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a quantized checkpoint in another method.

    Codes are kept where the other method can hold them; each module is exact, rescaled or requantized, and says so.

    anybit convert llama-awq -o llama-gptq --to gptq-4bit-g128
    """
    wanted = chosen(to, method, set_, config, required=True)
    out = Output(as_json, quiet)
    from anybit.engine.convert import convert as run

    begin = time.perf_counter()
    with out.progress("convert") as report:
        done = run(
            path,
            output,
            wanted,
            allow_requantize=allow_requantize,
            dtype=dtype,
            device=main_device(device),
            max_shard_size=max_shard_size,
            force=force,
            progress=report,
        )
    seconds = time.perf_counter() - begin
    worst = sorted((module for module in done.modules if module.error), key=lambda module: -module.error)[:8]
    rows = [(module.name, module.kind, f"{module.error:.2e}", module.reason) for module in worst]
    out.result(
        {**done.to_dict(), "output": str(output), "seconds": seconds, "peak_memory_bytes": peak_memory()},
        pairs(
            [
                ("written", output),
                ("methods", f"{done.source} -> {done.target}"),
                ("modules", ", ".join(f"{count} {kind}" for kind, count in done.counts.items())),
                ("largest error", f"{done.largest_error:.2e}, of the weights of a module"),
                *[("inputs", text) for text in sorted({module.inputs for module in done.modules} - {""})],
                *(
                    [("left out", f"{len(done.left_out)} tensors beside weights: {done.left_out[0]}, ...")]
                    if done.left_out
                    else []
                ),
                ("took", f"{duration(seconds)}, peak memory {size(peak_memory())}"),
            ]
        ),
        *(["", table(["module", "kind", "error", "why it is not exact"], rows)] if rows else []),
    )


def merge(
    path: Source,
    adapter: Annotated[Path, typer.Argument(help="The folder of a PEFT adapter.", metavar="ADAPTER", file_okay=False)],
    output: Target,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="Write the merged weights dense.")] = False,
    device: Device = "cpu",
    max_shard_size: Shard = "5GB",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge a LoRA adapter into a checkpoint of any method.

    Changed weights are rounded anew in the layout they had; the error of each is stated. The others keep their bytes.

    anybit merge llama-nf4 my-adapter -o llama-merged
    """
    out = Output(as_json, quiet)
    from anybit.engine.merge import merge as run

    begin = time.perf_counter()
    with out.progress("merge") as progress:
        done = run(
            path,
            adapter,
            output,
            dequantize=dequantize,
            device=main_device(device),
            max_shard_size=max_shard_size,
            force=force,
            progress=progress,
        )
    seconds = time.perf_counter() - begin
    worst = sorted(done.modules, key=lambda module: -module.share)[:8]
    rows = [(module.name, f"{module.error:.2e}", f"{module.share:.2e}") for module in worst]
    out.result(
        {**done.to_dict(), "output": str(output), "seconds": seconds, "peak_memory_bytes": peak_memory()},
        pairs(
            [
                ("written", output),
                ("method", "dense" if dequantize else done.method),
                ("merged", f"{len(done.modules)} modules"),
                ("took", f"{duration(seconds)}, peak memory {size(peak_memory())}"),
            ]
        ),
        "",
        table(["module", "error of the weight", "of the change"], rows),
    )


def main_device(name: str) -> Any:
    """The one device to compute on."""
    from anybit.engine import devices

    return devices.main_device(name)


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf", ".bin"))


def _ahead(out: Output, ahead: Any) -> None:
    out.result(
        asdict(ahead),
        pairs(
            [
                ("time", f"about {duration(ahead.seconds)}, from a sample of this machine's speed"),
                ("memory", f"{size(ahead.memory_bytes)} beside the libraries, {ahead.batch} samples at once"),
                ("weights", f"{size(ahead.bytes_read)} -> {size(ahead.bytes_written)}"),
                ("disk meanwhile", f"{size(ahead.hidden_bytes)} of hidden states beside the result"),
            ]
        ),
    )


def _written(out: Output, done: str, plan: Any, output: Path, seconds: float) -> None:
    before, after, peak = plan.bytes_on_disk, weight_bytes(output), peak_memory()
    out.result(
        {
            **plan.to_dict(),
            "output": str(output),
            "bytes_read": before,
            "bytes_written": after,
            "seconds": seconds,
            "peak_memory_bytes": peak,
        },
        pairs(
            [
                ("written", output),
                ("method", plan.method),
                ("weights", f"{size(before)} -> {size(after)}"),
                (done, f"{percent(plan.coverage)} of the weights, embeddings and output layer counted"),
                ("took", f"{duration(seconds)}, peak memory {size(peak)}"),
            ]
        ),
    )


COMMANDS = (quantize, dequantize, convert, merge)
