"""Commands that help to decide: recommend, sensitivity, allocate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anybit.cli.options import Debug, Device, Json, Quiet, Source, complete_device
from anybit.cli.report import Output, pairs, size, table


def _complete_target(incomplete: str) -> list[str]:
    return [name for name in ("transformers", "vllm", "llama.cpp", "mlx") if name.startswith(incomplete)]


Memory = Annotated[
    str | None, typer.Option("--memory", help="What there is, e.g. 8GB.  [default: what is free]", metavar="SIZE")
]


def recommend(
    path: Source,
    memory: Memory = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="cpu, cuda, mps, ...; also one that is not here.",
            autocompletion=complete_device,
            metavar="NAME",
        ),
    ] = "auto",
    train: Annotated[bool, typer.Option("--train", help="To train LoRA on it (QLoRA).")] = False,
    no_calibration: Annotated[bool, typer.Option("--no-calibration", help="There is no text to calibrate on.")] = False,
    batch: Annotated[int, typer.Option("--batch", help="Sequences at a time.", min=1, metavar="N")] = 1,
    context: Annotated[
        int | None,
        typer.Option("--context", help="Positions of a sequence.  [default: 2048, training 512]", min=1, metavar="N"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="What is to serve it: transformers, vllm, llama.cpp, mlx.",
            metavar="NAME",
            autocompletion=_complete_target,
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", "-a", help="Every scheme, not only the best of each method.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rank the methods for a model, from its headers.

    What fits, how good and how fast it is to be expected, and the command that makes it.

    anybit recommend meta-llama/Llama-3.1-8B --memory 8GB --target vllm
    """
    from anybit.engine.recommend import recommend as run

    found = run(
        path, memory=memory, device=device, train=train, calibration=not no_calibration, batch=batch, context=context,
        target=target,
    )  # fmt: skip
    out = Output(as_json, quiet)
    facts = [
        ("device", found.device),
        ("memory", size(found.memory) if found.memory is not None else "not known"),
        ("for", f"{found.batch} x {found.context} positions" + (", QLoRA training" if train else "")),
    ]
    if found.present is not None:
        _quantized(out, path, target, found, facts)
        return
    shown = list(found.choices) if every else _best_of_each(found.choices)
    lines_of: list[tuple[Any, ...]] = [
        (number + 1, one.scheme, size(one.bytes_written), size(one.bytes_needed), one.quality, one.speed, one.why)
        for number, one in enumerate(shown)
    ]
    lines: list[Any] = [pairs(facts), ""]
    if shown:
        best = shown[0]
        hidden = len(found.choices) - len(shown)
        lines += [
            table([">", "scheme", ">files", ">needs", "quality", "speed", "why here"], lines_of),
            "",
            pairs(
                [
                    ("the first one", best.command),
                    ("quality", f"{best.quality}: {best.quality_basis}"),
                    ("speed", f"at most {best.tokens_per_second:,.0f} tokens/s, by memory bandwidth"),
                    ("read by", ", ".join(best.targets)),
                    ("trains", "yes, as a base for LoRA" if best.trainable else "no"),
                    ("calibration", best.calibration),
                    ("not shown", f"{hidden} more schemes of these methods: --all" if hidden else None),
                ]
            ),
            "",
        ]
    else:
        smallest = found.smallest
        lines += [
            "nothing fits these wishes"
            + (f"; the smallest is {smallest.scheme}, which needs {size(smallest.bytes_needed)}" if smallest else ""),
            "",
        ]
    excluded: dict[str, list[str]] = {}
    for one in found.candidates:
        if one.obstacle:
            excluded.setdefault("does not fit" if one.wished else one.obstacle, []).append(
                f"{one.scheme} ({size(one.bytes_needed)})" if one.wished else one.scheme
            )
    for name, why in found.others:
        excluded.setdefault(why, []).append(name)
    rows = [(why, _some(names, every)) for why, names in excluded.items()]
    if rows:
        lines += [table(["left out, because", "which"], rows), ""]
    out.result(found.to_dict(), *lines, *_remarks(found))
    if not shown:
        from anybit.cli.errors import IMPOSSIBLE

        raise typer.Exit(IMPOSSIBLE)


def _quantized(out: Output, path: str, target: str | None, found: Any, facts: list[tuple[str, str]]) -> None:
    """What a checkpoint that is quantized already needs and can become."""
    fits = found.memory is None or found.present_needs <= found.memory
    facts += [
        ("method", f"{found.present}; it is quantized already"),
        ("needs", f"{size(found.present_needs)}: {'it fits' if fits else 'it does not fit'}"),
        ("read by", ", ".join(found.present_targets)),
        ("trains", "yes, as a base for LoRA" if found.present_trains else "no"),
    ]
    rows = [(name, kind, f"anybit convert {path} -o OUT --to {name}") for name, kind in found.conversions]
    reader = f" that {target} reads" if target else ""
    out.result(
        found.to_dict(),
        pairs(facts),
        "",
        table(["converts to", "how", "command"], rows)
        if rows
        else f"no other method{reader} holds its codes as they are",
        "",
        *_remarks(found),
    )


def _best_of_each(candidates: Any) -> list[Any]:
    """The first of each method."""
    from anybit.engine.advice_judge import placed

    found: dict[str, Any] = {}
    for one in candidates:
        found.setdefault(one.method, one)
    return placed(list(found.values()))


def _some(names: list[str], every: bool) -> str:
    return ", ".join(names) if every or len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _remarks(found: Any) -> list[Any]:
    return ["taken for granted", pairs([("", note) for note in found.assumptions])] if found.assumptions else []


# --- sensitivity, allocate --------------------------------------------------------------------------------------------------

Calib = Annotated[
    Path, typer.Option("--calib", help="Calibration text: .txt, .jsonl, .parquet.", metavar="FILE", dir_okay=False)
]
Schemes = Annotated[str | None, typer.Option("--schemes", help="Candidates, separated by commas.", metavar="A,B,C")]
Samples = Annotated[int, typer.Option("--samples", help="Rows of calibration text.", min=1, metavar="N")]
Length = Annotated[int, typer.Option("--sequence-length", help="Tokens of a row.", min=2, metavar="N")]
Seed = Annotated[int, typer.Option("--seed", help="Which rows are drawn.", metavar="N")]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache", help="Keep costs here, and do not measure them again.", metavar="FILE.json", dir_okay=False
    ),
]
USUAL_SCHEMES = "gptq-2bit-g64,gptq-3bit-g64,gptq-4bit-g64,gptq-8bit-g64"


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def sensitivity(
    path: Source,
    calib: Calib,
    schemes: Annotated[
        str,
        typer.Option(
            "--schemes",
            help="Candidates, separated by commas.  [default: gptq with 2, 3, 4 and 8 bits in groups of 64]",
            metavar="A,B,C",
            show_default=False,
        ),
    ] = USUAL_SCHEMES,
    no_kl: Annotated[
        bool, typer.Option("--no-kl", help="Only errors of weights and outputs, which need one pass over the text.")
    ] = False,
    algorithm: Annotated[
        str | None,
        typer.Option("--algorithm", help="One that rounds by the inputs, e.g. gptq.", metavar="NAME"),
    ] = None,
    every: Annotated[bool, typer.Option("--all", "-a", help="Every module, not only the most sensitive ones.")] = False,
    samples: Samples = 8,
    sequence_length: Length = 256,
    seed: Seed = 0,
    cache: Cache = None,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure what quantizing each module costs.

    One module at a time, in each of some schemes: errors of weight and output, and KL of the model's words.

    anybit sensitivity llama --calib text.txt --schemes gptq-4bit-g64,gptq-8bit-g64 --cache llama-costs.json
    """
    from anybit.cli.making import main_device
    from anybit.engine.sensitivity import sensitivity as run

    out = Output(as_json, quiet)
    with out.progress("measure") as progress:
        found = run(
            path, calib, _names(schemes), kl=not no_kl, algorithm=algorithm, samples=samples,
            sequence_length=sequence_length, seed=seed,
            cache=cache, device=main_device(device), progress=progress,
        )  # fmt: skip

    def worst(cost: Any) -> float:
        return float(cost.kl if cost.kl is not None else cost.output_error or cost.weight_error)

    ordered = sorted(found.costs, key=worst, reverse=True)
    shown = ordered if every else ordered[:12]
    rows = [
        (
            cost.module, cost.scheme, size(cost.bytes), f"{cost.weight_error:.4f}",
            "-" if cost.output_error is None else f"{cost.output_error:.4f}", "-" if cost.kl is None else f"{cost.kl:.2e}",
        )
        for cost in shown
    ]  # fmt: skip
    totals = [
        (name, size(sum(cost.bytes for cost in own)), "-" if no_kl else f"{sum(cost.kl or 0.0 for cost in own):.2e}")
        for name in found.schemes
        for own in [[cost for cost in found.costs if cost.scheme == name]]
    ]
    out.result(
        found.to_dict(),
        table(["module", "scheme", ">bytes", ">weight", ">output", ">KL"], rows),
        *([] if len(ordered) <= len(shown) else [f"and {len(ordered) - len(shown)} less sensitive: --all"]),
        "",
        table(["all modules in", ">bytes", ">sum of KL"], totals),
        "",
        f"relative errors; KL in nats per token, on {found.tokens:,} tokens; {found.from_cache} of {len(found.costs)} cached",
    )


def allocate(
    path: Source,
    calib: Calib,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The recipe to write.", metavar="FILE.json", dir_okay=False)
    ] = Path("recipe.json"),
    memory: Annotated[
        str | None, typer.Option("--memory", help="Bytes of all tensors, e.g. 4GB.", metavar="SIZE")
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option("--bits", help="Stored bits per quantized weight, e.g. 4.25.", min=0.1, max=32, metavar="X"),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", "-m", help="Choose among all its schemes.  [default: auto-round]", metavar="NAME"),
    ] = None,
    schemes: Schemes = None,
    metric: Annotated[
        str, typer.Option("--metric", help="kl, or output: faster to measure, and coarser.", metavar="NAME")
    ] = "kl",
    dense: Annotated[bool, typer.Option("--dense", help="Modules may also stay dense.")] = False,
    algorithm: Annotated[
        str | None,
        typer.Option(
            "--algorithm",
            help="Calibrated, e.g. gptq: makes what is compared, and stands in the recipe.",
            metavar="NAME",
        ),
    ] = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not compare with the best single scheme.")] = False,
    samples: Samples = 8,
    sequence_length: Length = 256,
    seed: Seed = 0,
    cache: Cache = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the recipe if it exists.")] = False,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find the mix of schemes that loses least at a size.

    One scheme for each module, by measured costs, exactly; then compared with the best single scheme on text that no cost was
    measured on. The better one becomes a recipe for `anybit quantize --recipe`.

    anybit allocate llama --bits 4.25 --calib text.txt -o llama.json
    """
    from anybit.cli.making import main_device
    from anybit.engine.allocate import allocate as run

    if output.exists() and not force:
        raise FileExistsError(f"{output} exists already. Use --force to replace it, or another -o")
    out = Output(as_json, quiet)
    with out.progress("measure") as progress:
        found = run(
            path, calib, memory=memory, bits=bits, method=method, schemes=_names(schemes), metric=metric, dense=dense,
            check=not no_check, algorithm=algorithm, samples=samples, sequence_length=sequence_length, seed=seed, cache=cache,
            device=main_device(device), progress=progress,
        )  # fmt: skip
    output.write_text(found.recipe.to_json(), encoding="utf-8")

    def row(what: str, count: int, width: float, loss: float, perplexity: float | None) -> tuple[str, ...]:
        return what, size(count), f"{width:.3f}", f"{loss:.3e}", "-" if perplexity is None else f"{perplexity:.3f}"

    rows = [row("mix", found.bytes, found.bits, found.predicted, found.perplexity)]
    if found.uniform is not None:
        own = found.uniform_bytes, found.uniform_bits, found.uniform_predicted, found.uniform_perplexity
        rows.append(row(found.uniform, *own))
    out.result(
        {**found.to_dict(), "output": str(output)},
        table(["", ">tensors", ">bits", ">predicted loss", ">perplexity"], rows),
        "",
        pairs(
            [
                ("budget", size(found.budget)),
                ("result", found.verdict),
                ("recipe", ", ".join(f"{count} x {name}" for name, count in found.counts.items())),
                ("written", output),
                ("next", f"anybit quantize {path} -o OUT --recipe {output}"),
            ]
        ),
    )


COMMANDS = (recommend, sensitivity, allocate)
