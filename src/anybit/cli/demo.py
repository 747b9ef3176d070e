"""`anybit demo`: one small trained model, four ways to quantize it, one table of what was measured just now."""

from __future__ import annotations

import shutil
import sys
import tempfile
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from anybit.cli.errors import UsageMistake
from anybit.cli.options import Debug, Device, Json, Quiet
from anybit.cli.report import Output, duration, number, percent, size, table

SCHEMES = ("nf4", "int8", "gptq-4bit-g128", "awq-4bit-g128")
# the bundled model was trained on windows of 256 positions, and its README's figures are measured on them
CONTEXT = 256
PROMPT = "The history of the city begins with"
LEGEND = (
    "bits: per weight of what is quantized, scales included. file: weights on disk. memory: weights after loading, still "
    "packed. perplexity: lower is better; its change against the dense model. top-1: how often the most likely token is the "
    "dense model's. KL: against the dense model, nats per token. tokens/s: reading text, 4 windows at a time."
)


@dataclass(frozen=True)
class Row:
    """One line of the table, measured in this run."""

    method: str
    bits_per_weight: float
    bytes_on_disk: int
    bytes_in_memory: int
    perplexity: float
    top1: float | None
    kl: float | None
    tokens_per_second: float
    path: str


def demo(
    model: Annotated[
        Path | None, typer.Option("--model", help="A dense checkpoint.  [default: examples/tiny-llama]", metavar="PATH")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="A text to measure on.  [default: examples/data/evaluation.txt]", metavar="FILE"),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=2, help="Measure on the text's first tokens.", metavar="N")
    ] = 12_240,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Where to put the checkpoints.  [default: a temporary folder]", metavar="FOLDER"
        ),
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize a small model four ways and compare them."""
    source, words = _inputs(model, text)
    out = Output(as_json, quiet)
    begin = time.perf_counter()
    folder = output or Path(tempfile.mkdtemp(prefix="anybit-demo-"))
    say = out.remark
    say(f"{source}, measured on the first {tokens:,} tokens of {words.name}; half a minute on two idle cores")

    from anybit.cli.generating import continue_text
    from anybit.engine.evaluate import evaluate, find_tokenizer
    from anybit.engine.load import load

    tokenizer = find_tokenizer(source)
    reference = load(source, device_map=device)
    context = min(CONTEXT, getattr(reference.config, "max_position_embeddings", CONTEXT))
    common: dict[str, Any] = {"tokenizer": tokenizer, "context": context, "max_tokens": tokens, "batch_size": 4}
    with out.progress("dense") as report:
        dense = evaluate(reference, words, **common, progress=report)
    rows = [_row(str(reference.dtype).removeprefix("torch."), reference, source, dense)]
    sample = None
    for name in SCHEMES:
        target = _quantized(source, folder / name, name, device, out)
        with out.progress(f"load {name}") as report:
            packed = load(target, device_map=device, progress=report)
        with out.progress(name) as report:
            found = evaluate(packed, words, reference=reference, **common, progress=report)
        rows.append(_row(name, packed, target, found))
        if sample is None:
            sampling = {"do_sample": True, "temperature": 0.7}
            sample = continue_text(packed, tokenizer, PROMPT, 40, sampling, seed=2, stream=False)
    assert sample is not None
    seconds = time.perf_counter() - begin
    program = _program()
    next_steps = [
        f'{program} run {folder / SCHEMES[0]} -p "{PROMPT}" --temperature 0.7',
        f"{program} inspect {folder / SCHEMES[2]}",
        f"{program} plan {folder / SCHEMES[1]}",
        f"{program} eval {folder / SCHEMES[3]} --reference {source} --text {words} --context {context} --per-module",
        f"{program} quantize PATH -o FOLDER --scheme nf4    ({program} methods lists the schemes)",
    ]
    out.result(
        {
            "model": str(source), "text": str(words), "protocol": dense.protocol, "rows": [asdict(row) for row in rows],
            "sample": {"scheme": SCHEMES[0], **sample.to_dict()}, "folder": str(folder), "seconds": seconds,
        },
        "",
        _table(rows),
        "",
        *_wrapped(LEGEND),
        "",
        *_wrapped(f"Measured in this run: {dense.protocol}."),
        "",
        f"{SCHEMES[0]} writes ({sample.tokens} tokens, {number(sample.tokens_per_second, 1)} tokens/s):",
        *_wrapped(" ".join(sample.text.split()), "  "),
        "",
        f"Done in {duration(seconds)}. The checkpoints stay in {folder}",
        "until you delete it. Try next:",
        *(f"  {line}" for line in next_steps),
    )  # fmt: skip


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 80, initial_indent=indent, subsequent_indent=indent, break_long_words=False)


def _program() -> str:
    """How to start this program again: its name, or its place where the name alone would not find it."""
    started = Path(sys.argv[0])
    if started.name != "anybit" or shutil.which("anybit") == str(started.absolute()):
        return "anybit"
    return str(_near(started.absolute()))


def _near(path: Path) -> Path:
    """The path from here, if it lies below the current folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _inputs(model: Path | None, text: Path | None) -> tuple[Path, Path]:
    """The model and the text: given, or the source checkout's own."""
    examples = Path(__file__).resolve().parents[3] / "examples"
    source = model if model is not None else examples / "tiny-llama"
    words = text if text is not None else examples / "data" / "evaluation.txt"
    for given, path, option in ((model, source, "--model PATH"), (text, words, "--text FILE")):
        if not path.exists():
            raise UsageMistake(
                f"{path} does not exist"
                if given is not None
                else f"{path} is not there: the demo's model and text come with the source code, not with the installed package. "
                f"Run `make demo` in a checkout of the sources, or pass {option}"
            )
    return _near(source), _near(words)


def _quantized(source: Path, target: Path, scheme: str, device: str, out: Output) -> Path:
    from anybit.cli.making import main_device
    from anybit.cli.schemes import from_scheme
    from anybit.engine.quantize import quantize

    begin = time.perf_counter()
    with out.progress(f"quantize to {scheme}") as report:
        quantize(source, target, from_scheme(scheme), device=main_device(device), force=True, progress=report)
    out.remark(f"quantized to {scheme} in {duration(time.perf_counter() - begin)}")
    return target


def _row(name: str, model: Any, path: Path, found: Any) -> Row:
    from anybit.cli.making import weight_bytes

    entries = model.anybit_plan.entries
    counted = [entry for entry in entries if entry.action != "dense"] or entries
    bits = 8 * sum(entry.bytes_memory for entry in counted) / sum(entry.weights for entry in counted)
    return Row(
        name, bits, weight_bytes(path), model.get_memory_footprint(), found.perplexity, found.top1, found.kl,
        found.tokens_per_second, str(path),
    )  # fmt: skip


def _table(rows: list[Row]) -> Any:
    dense = rows[0].perplexity

    def change(row: Row) -> str:
        return number(row.perplexity, 2) + ("" if row is rows[0] else f" {100 * (row.perplexity / dense - 1):+.2f}%")

    return table(
        ["method", ">bits", ">file", ">memory", ">perplexity", ">top-1", ">KL", ">tokens/s"],
        [
            (
                row.method, number(row.bits_per_weight, 2), size(row.bytes_on_disk), size(row.bytes_in_memory), change(row),
                percent(row.top1), number(row.kl, 4), number(row.tokens_per_second, 0),
            )
            for row in rows
        ],
    )  # fmt: skip


COMMANDS = (demo,)
