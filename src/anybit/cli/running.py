"""Commands that run a model: run, eval."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from anybit.cli.errors import UsageMistake
from anybit.cli.options import ConfigFile, Debug, Device, Dtype, Json, Method, Quiet, Scheme, Setting, Source
from anybit.cli.progress import peak_memory
from anybit.cli.report import Output, duration, number, pairs, percent, shape, size, table
from anybit.cli.schemes import chosen


def run(
    path: Source,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="What the text begins with; - reads it from stdin.", metavar="TEXT")
    ],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest continuation.", metavar="N")
    ] = 100,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the most likely token.")] = False,
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", min=0.0, help="Sample; higher is wilder.", metavar="X")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="The same seed gives the same sample.", metavar="N")
    ] = None,
    scheme: Scheme = None,
    method: Method = None,
    set_: Setting = None,
    config: ConfigFile = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Load a model packed and continue a text.

    A dense model is quantized while it loads when a scheme is named.

    anybit run llama-nf4 -p "Once upon a time" --greedy
    """
    if greedy and temperature:
        raise UsageMistake("--greedy and --temperature exclude each other")
    wanted = chosen(scheme, method, set_, config)
    text = sys.stdin.read() if prompt == "-" else prompt
    out = Output(as_json, quiet)
    from anybit.cli.generating import continue_text

    model, tokenizer = load_both(path, wanted, device, dtype, out)
    sampling = (
        {"do_sample": False} if greedy or temperature == 0 else {"do_sample": True, "temperature": temperature or 1.0}
    )
    done = continue_text(model, tokenizer, text, max_new_tokens, sampling, seed, stream=not as_json)
    memory = model.get_memory_footprint()
    data = {
        **done.to_dict(),
        "prompt": text,
        "memory_bytes": memory,
        "peak_memory_bytes": peak_memory(),
        "device": str(model.device),
    }
    if as_json:
        out.result(data)
    out.remark(
        f"\n{done.tokens} tokens in {duration(done.seconds)}, {number(done.tokens_per_second, 1)} tokens/s "
        f"(the first after {duration(done.first_seconds)}); model {size(memory)}, peak memory {size(data['peak_memory_bytes'])}"
    )


def eval_(
    path: Source,
    text: Annotated[str, typer.Option("--text", "-t", help="A UTF-8 text file, or the text itself.", metavar="FILE")],
    reference: Annotated[
        str | None,
        typer.Option("--reference", "-r", help="Compare with this model, e.g. the dense one.", metavar="PATH"),
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=2, help="Positions per window.  [default: at most 2048]", metavar="N")
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", min=1, help="New tokens per window.  [default: no overlap]", metavar="N")
    ] = None,
    bos: Annotated[
        bool | None, typer.Option("--bos/--no-bos", help="Begin windows with BOS.  [default: as the tokenizer does]")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=2, help="Only the first tokens of the text.", metavar="N")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Windows at a time.", metavar="N")] = 1,
    per_module: Annotated[
        bool, typer.Option("--per-module", help="Weight and output error of every packed module.")
    ] = False,
    scheme: Scheme = None,
    method: Method = None,
    set_: Setting = None,
    config: ConfigFile = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a model: perplexity, KL, top-1 agreement.

    KL, top-1 agreement and errors per module compare with a reference.

    anybit eval llama-nf4 --text wiki.txt --reference meta-llama/Llama-3.2-1B
    """
    wanted = chosen(scheme, method, set_, config)
    out = Output(as_json, quiet)
    from anybit.engine.evaluate import evaluate

    given: Any = path
    if wanted is not None:
        given, _ = load_both(path, wanted, device, dtype, out, tokenizer=False)
    with out.progress("eval") as report:
        found = evaluate(
            given, Path(text) if Path(text).suffix == ".txt" else text, reference=reference, context=context, stride=stride,
            bos=bos, max_tokens=max_tokens, batch_size=batch_size, per_module=per_module, device_map=device, dtype=dtype,
            progress=report,
        )  # fmt: skip
    rows: list[tuple[str, Any]] = [
        ("perplexity", number(found.perplexity)),
        ("of the reference", number(found.reference_perplexity) if reference else None),
        ("bits per byte", number(found.bits_per_byte, 4)),
    ]
    if reference:
        rows += [
            ("KL(reference || model)", f"{found.kl:.6f} nats per token, at most {found.kl_max:.4f}"),
            ("top-1 agreement", percent(found.top1, 2)),
            ("weight error", percent(found.weight_error, 2) if found.modules else None),
        ]
    rows += [("tokens/s", number(found.tokens_per_second, 0)), ("protocol", found.protocol)]
    peak = peak_memory()
    lines = [pairs(rows)]
    if per_module:
        lines += ["", module_table(found.modules)]
    out.result({"path": path, "reference": reference, **found.to_dict(), "peak_memory_bytes": peak}, *lines)
    out.remark(f"took {duration(found.seconds)} in the model, peak memory {size(peak)}")


def module_table(modules: Any) -> Any:
    """Errors of each module, the worst output first."""
    worst = sorted(modules, key=lambda module: -(module.output_error or 0.0))
    return table(
        ["module", ">shape", ">bits", ">weight", ">SNR dB", ">output"],
        [
            (
                module.module, shape(module.shape), number(module.bits_per_weight, 2), percent(module.weight_error, 2),
                number(module.snr_db, 1), percent(module.output_error, 2),
            )
            for module in worst
        ],
    )  # fmt: skip


def load_both(path: str, config: Any, device: str, dtype: str, out: Output, tokenizer: bool = True) -> tuple[Any, Any]:
    """A packed model and its tokenizer."""
    from anybit.engine.evaluate import find_tokenizer
    from anybit.engine.load import load

    words = find_tokenizer(path) if tokenizer else None  # the cheap failure first
    begin = time.perf_counter()
    with out.progress("load") as report:
        model: Any = load(path, config, device_map=device, dtype=dtype, progress=report)
    out.remark(
        f"loaded {path} in {duration(time.perf_counter() - begin)}, {size(model.get_memory_footprint())} of weights"
    )
    return model, words


COMMANDS = (run, eval_)
