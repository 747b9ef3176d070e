"""One protocol for every way to choose codes: size, quality, time and memory on the bundled model.

    python benchmarks/quality/scoreboard.py                    writes scoreboard.json and scoreboard.md beside this file
    python benchmarks/quality/scoreboard.py --only 'gptq.*2bit' --text wikitext2-test.txt --tokens 20000
    python benchmarks/quality/scoreboard.py --peer gptqmodel=/tmp/peer/bin/python --peer mlx-lm=...

Each row is a process of its own: `anybit.quantize` file to file, or the vendor's package (peers.py, in the environment that
--peer names), with the same calibration rows; then `anybit.evaluate` of what was written against the dense model. Rows of an
earlier run with the same protocol are kept, so it can be broken off. Bits per weight count everything that is stored for the
weights that are quantized; the file counts everything.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import subprocess
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from ways import GROUP, STEPS, WAYS, Way

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODEL, DATA = ROOT / "examples" / "tiny-llama", ROOT / "examples" / "data"
SAMPLES, LENGTH, SEED, CONTEXT, TOKENS = 24, 256, 0, 256, 5100
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")


def row(way: Way, peers: dict[str, str], reference: Any, text: str, tokens: int, keep: Path | None) -> dict[str, Any]:
    """Make and measure one; what was made stays in the folder `keep`."""
    import anybit
    from anybit import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        used = theirs(way, peers[way.peer], made) if way.peer else ours(way, made)
        source = next(made.glob("*.gguf"), made)
        written = anybit.plan(source, allow_pickle=True)
        packed = [entry for entry in written.entries if entry.action == "packed"]
        if not packed:
            raise ValueError("nothing of this model is quantized")
        model = anybit.load(source, allow_pickle=True)
        result = anybit.evaluate(
            model,
            Path(text),
            reference=reference,
            tokenizer=AutoTokenizer.from_pretrained(MODEL),
            context=CONTEXT,
            max_tokens=tokens,
            batch_size=5,
        )
        if keep is not None:
            shutil.copytree(made, keep / way.key.replace(" ", "-"), dirs_exist_ok=True)
        files = sum(file.stat().st_size for file in made.iterdir() if file.suffix in (".safetensors", ".gguf", ".pt"))
    stored = sum(entry.bytes_stored for entry in packed)
    return {
        "way": way.name,
        "bits": way.bits,
        "by": way.peer or "anybit",
        "bits_per_weight": round(8 * stored / sum(entry.weights for entry in packed), 3),
        "file_mb": round(files / 1e6, 2),
        "perplexity": round(result.perplexity, 3),
        "dense_perplexity": round(result.reference_perplexity or 0, 3),
        "kl": float(f"{result.kl:.4g}"),
        "top1": round(result.top1 or 0, 4),
        **used,
        "coverage": round(written.coverage, 4),
    }


def alone(*arguments: Any) -> dict[str, Any]:
    """`row` in a process of its own, so that its memory is; it begins with the libraries loaded."""
    mine, childs = multiprocessing.get_context("fork").Pipe(duplex=False)

    def work() -> None:
        try:
            childs.send(row(*arguments))
        except Exception as error:
            childs.send({"error": f"{type(error).__name__}: {error}"})

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    childs.close()
    try:
        found: dict[str, Any] = mine.recv()
    except EOFError:
        found = {"error": "the process ended"}
    process.join()
    return found


def ours(way: Way, made: Path) -> dict[str, Any]:
    """Written to the folder `made`; seconds and memory."""
    import anybit
    from anybit.cli.schemes import from_scheme

    kind, _, scheme = way.config.partition(" ")
    config = from_scheme(scheme or way.name) if kind == "scheme" else getattr(anybit, kind)(**way.options)
    calibrated: dict[str, Any] = {}
    if way.algorithm is not None:
        calibrated = {
            "calibration": DATA / "calibration.txt", "algorithm": way.algorithm or None, "algorithm_options": way.arguments,
            "samples": SAMPLES, "sequence_length": LENGTH, "seed": SEED,
        }  # fmt: skip
    before, begin = time.process_time(), time.perf_counter()
    anybit.quantize(MODEL, made, config, **calibrated)
    return {
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(time.process_time() - before, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
    }


def theirs(way: Way, python: str, made: Path) -> dict[str, Any]:
    """The same by a vendor's package, in its own environment."""
    import anybit
    from anybit.engine.calibration import calibration_tokens

    source = MODEL
    if "mix" in way.options:  # llama.cpp begins with a GGUF file
        anybit.quantize(MODEL, made.parent / "f16", anybit.GgufConfig(mix="F16"))
        source = next((made.parent / "f16").glob("*.gguf"))
    rows = calibration_tokens(DATA / "calibration.txt", MODEL, samples=SAMPLES, length=LENGTH, seed=SEED).tolist()
    calibration = made.parent / "calibration.json"
    calibration.write_text(json.dumps(rows))
    command = [
        *python.split(),
        str(HERE / "peers.py"),
        way.peer,
        json.dumps(way.options),
        str(source),
        str(calibration),
        str(made),
    ]
    finished = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        cwd=made.parent,  # some write logs
    )
    if finished.returncode or not made.is_dir():
        raise RuntimeError(f"{way.peer}: {(finished.stderr or finished.stdout).strip()[-400:]}")
    inside = [folder for folder in made.iterdir() if folder.is_dir()]
    if len(inside) == 1 and not list(made.glob("*.safetensors")):  # auto-round names a folder of its own
        for file in list(inside[0].iterdir()):
            file.replace(made / file.name)
    for name in SIDE_FILES:  # which some packages leave out
        if not (made / name).exists() and not list(made.glob("*.gguf")):
            (made / name).write_bytes((MODEL / name).read_bytes())
    used: dict[str, Any] = json.loads(finished.stdout.strip().splitlines()[-1])
    return used


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="rows whose name, e.g. 'gptq 2bit', matches this pattern")
    options.add_argument("--text", default=str(DATA / "evaluation.txt"), help="what is predicted")
    options.add_argument("--tokens", type=int, default=TOKENS)
    options.add_argument("--out", type=Path, default=HERE / "scoreboard.json")
    options.add_argument("--peer", action="append", default=[], help="package=python (repeat)")
    options.add_argument("--keep", type=Path, help="a folder for what is made")
    options.add_argument("--again", action="store_true", help="measure rows that are there once more")
    given = options.parse_args()
    peers = dict(one.split("=", 1) for one in given.peer)
    protocol = {
        "model": "examples/tiny-llama", "text": Path(given.text).name, "tokens": given.tokens, "context": CONTEXT,
        "calibration": f"{SAMPLES} rows of {LENGTH} tokens of examples/data/calibration.txt, seed {SEED}",
        "group_size": GROUP, "autoround_steps": STEPS,
    }  # fmt: skip
    found: dict[str, Any] = {"protocol": protocol, "rows": {}}
    if given.out.is_file() and json.loads(given.out.read_text())["protocol"] == protocol:
        found = json.loads(given.out.read_text())
    import torch

    import anybit

    torch.set_num_threads(1)
    reference = anybit.load(MODEL)
    for way in WAYS:
        wanted = re.search(given.only, way.key) and (given.again or way.key not in found["rows"])
        if not wanted or (way.peer and way.peer not in peers):
            continue
        made = alone(way, peers, reference, given.text, given.tokens, given.keep)
        if "error" in made:
            print(f"{way.key}: {made['error']}", flush=True)
            continue
        found["rows"][way.key] = made
        found["machine"] = machine()
        given.out.write_text(json.dumps(found, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(markdown(found))
        print(made, flush=True)
    if found["rows"]:
        given.out.with_suffix(".md").write_text(markdown(found))


def machine() -> dict[str, Any]:
    """What the seconds were measured on."""
    import torch
    import transformers

    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return {
        "date": date.today().isoformat(), "processor": names[0] if names else platform.processor(), "threads": 1,
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    """The scoreboard, best KL first for each width."""
    machine, protocol = found["machine"], found["protocol"]
    lines = [
        "# Quality of every way to choose codes",
        "",
        f"`python benchmarks/quality/scoreboard.py`, {machine['date']}, one thread of {machine['processor']}, "
        f"Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}.",
        "",
        f"Model {protocol['model']}; calibration: {protocol['calibration']}; groups of {protocol['group_size']} where one can "
        f"choose; measured by `anybit.evaluate` on {protocol['tokens']} tokens of {protocol['text']} in windows of "
        f"{protocol['context']}. AutoRound runs {protocol['autoround_steps']} steps, ours and theirs. KL(dense || quantized) in "
        "nats per token, best first. Bits per weight: everything that is stored for the quantized weights; share: of all "
        "weights, those that are quantized. CPU seconds and peak memory are those of making the file, with the libraries; "
        "~ where other work ran on the machine.",
        "",
        "A row by a vendor's package is the checkpoint that the package itself wrote, read by anybit.",
    ]
    for bits in sorted({own["bits"] for own in found["rows"].values()}, reverse=True):
        rows = sorted((own for own in found["rows"].values() if own["bits"] == bits), key=lambda own: own["kl"])
        lines += [
            "",
            f"## {bits} bits (dense perplexity {rows[0]['dense_perplexity']})",
            "",
            "| way | by | bits per weight | share | file MB | perplexity | KL | top-1 | CPU seconds | peak MB |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for own in rows:
            busy = "~" if own["seconds"] > 1.5 * own["cpu_seconds"] + 1 else ""
            by = own["by"] if own["by"] == "anybit" else f"*{own['by']}*"
            lines.append(
                f"| {own['way']} | {by} | {own['bits_per_weight']} | {own['coverage']:.0%} | {own['file_mb']} | "
                f"{own['perplexity']} | {own['kl']} | {own['top1']:.3f} | {busy}{own['cpu_seconds']} | {own['peak_memory_mb']} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
