"""One protocol for every way to choose codes: size, quality, time and memory on the bundled model.

    python benchmarks/quality/scoreboard.py                    writes scoreboard.json and scoreboard.md beside this file
    python benchmarks/quality/scoreboard.py --only 'gptq.*2bit' --text wikitext2-test.txt --tokens 20000

Each row is a process of its own: `anybit.quantize` file to file with the same calibration rows and seed, then
`anybit.evaluate` against the dense model. Rows of an earlier run with the same protocol are kept, so it can be broken off.
Bits per weight count everything that is stored for the weights that are quantized.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODEL, DATA = ROOT / "examples" / "tiny-llama", ROOT / "examples" / "data"
SAMPLES, LENGTH, SEED, CONTEXT, TOKENS = 24, 256, 0, 256, 2550
GROUP = 64
STEPS = 50  # of AutoRound, a quarter of its default: a minute on one core

# name -> configuration class, its options beside bits and group size, algorithm (None: no calibration), its options
WAYS: dict[str, tuple[str, dict[str, Any], str | None, dict[str, Any]]] = {
    "rtn (gptq layout)": ("GPTQConfig", {}, None, {}),
    "hqq": ("HqqConfig", {}, None, {}),
    "rtn (mlx layout)": ("MetalConfig", {}, None, {}),
    "gptq": ("GPTQConfig", {}, "gptq", {}),
    "gptq, mse 2.4": ("GPTQConfig", {}, "gptq", {"mse": 2.4}),
    "gptq (mlx layout)": ("MetalConfig", {}, "gptq", {}),
    "autoround": ("GPTQConfig", {}, "autoround", {"steps": STEPS, "batch": 4}),
    "autoround (auto-round layout)": ("AutoRoundConfig", {}, "autoround", {"steps": STEPS, "batch": 4}),
    "autoround (mlx layout)": ("MetalConfig", {}, "autoround", {"steps": STEPS, "batch": 4}),
    "awq": ("GPTQConfig", {}, "awq", {}),
    "awq+gptq": ("GPTQConfig", {}, "awq+gptq", {}),
}
NAMES_OF_BITS = {"HqqConfig": "nbits"}
BITS = (2, 3, 4, 8)


def row(way: str, bits: int, text: str, tokens: int) -> dict[str, Any]:
    """Make and measure one; in a process of its own."""
    import torch

    import anybit

    torch.set_num_threads(1)
    config_name, options, algorithm, arguments = WAYS[way]
    options = {NAMES_OF_BITS.get(config_name, "bits"): bits, "group_size": GROUP, **options}
    with tempfile.TemporaryDirectory() as folder:
        before, begin = time.process_time(), time.perf_counter()
        calibrated: dict[str, Any] = {}
        if algorithm is not None:
            calibrated = {
                "calibration": DATA / "calibration.txt", "algorithm": algorithm, "algorithm_options": arguments,
                "samples": SAMPLES, "sequence_length": LENGTH, "seed": SEED,
            }  # fmt: skip
        made = Path(folder) / "made"
        plan = anybit.quantize(MODEL, made, getattr(anybit, config_name)(**options), **calibrated)
        seconds, busy = time.perf_counter() - begin, time.process_time() - before
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        written = anybit.plan(made)
        packed = [entry for entry in written.entries if entry.action == "packed"]
        stored = sum(entry.bytes_stored for entry in packed)
        result = anybit.evaluate(made, Path(text), reference=MODEL, context=CONTEXT, max_tokens=tokens)
    return {
        "way": way,
        "bits": bits,
        "bits_per_weight": round(8 * stored / sum(entry.weights for entry in packed), 3),
        "perplexity": round(result.perplexity, 3),
        "dense_perplexity": round(result.reference_perplexity or 0, 3),
        "kl": float(f"{result.kl:.4g}"),
        "top1": round(result.top1 or 0, 4),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(busy, 1),
        "peak_memory_mb": round(peak / 1e6),
        "coverage": round(plan.coverage, 4),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="rows whose name, e.g. 'gptq 2bit', matches this pattern")
    options.add_argument("--text", default=str(DATA / "evaluation.txt"), help="what is predicted")
    options.add_argument("--tokens", type=int, default=TOKENS)
    options.add_argument("--out", type=Path, default=HERE / "scoreboard.json")
    options.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.row:
        print(json.dumps(row(given.row[0], int(given.row[1]), given.text, given.tokens)))
        return
    import torch
    import transformers

    protocol = {
        "model": "examples/tiny-llama", "text": Path(given.text).name, "tokens": given.tokens, "context": CONTEXT,
        "calibration": f"{SAMPLES} rows of {LENGTH} tokens of examples/data/calibration.txt, seed {SEED}",
        "group_size": GROUP, "autoround_steps": STEPS,
    }  # fmt: skip
    found: dict[str, Any] = {"protocol": protocol, "rows": []}
    if given.out.is_file() and json.loads(given.out.read_text())["protocol"] == protocol:
        found = json.loads(given.out.read_text())
    done = {(own["way"], own["bits"]) for own in found["rows"]}
    for bits in BITS:
        for way in WAYS:
            if (way, bits) in done or not re.search(given.only, f"{way} {bits}bit"):
                continue
            command = [
                sys.executable,
                __file__,
                "--row",
                way,
                str(bits),
                "--text",
                given.text,
                "--tokens",
                str(given.tokens),
            ]
            finished = subprocess.run(command, capture_output=True, text=True)
            if finished.returncode:
                print(f"{way} {bits}bit: {finished.stderr.strip().splitlines()[-1][:160]}", flush=True)
                continue
            found["rows"].append(json.loads(finished.stdout.splitlines()[-1]))
            found["machine"] = {
                "date": date.today().isoformat(), "processor": processor(), "threads": 1, "python": platform.python_version(),
                "torch": torch.__version__, "transformers": transformers.__version__,
            }  # fmt: skip
            given.out.write_text(json.dumps(found, indent=1) + "\n")
            given.out.with_suffix(".md").write_text(markdown(found))
            print(found["rows"][-1], flush=True)
    if found["rows"]:
        given.out.with_suffix(".md").write_text(markdown(found))


def processor() -> str:
    """The name in /proc/cpuinfo, or what Python knows."""
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def markdown(found: dict[str, Any]) -> str:
    """The scoreboard, best KL first for each width."""
    machine, protocol = found["machine"], found["protocol"]
    lines = [
        "# Quality of every way to choose codes",
        "",
        f"`python benchmarks/quality/scoreboard.py`, {machine['date']}, one thread of {machine['processor']}, "
        f"Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}.",
        "",
        f"Model {protocol['model']}; calibration: {protocol['calibration']}; groups of {protocol['group_size']}; measured by "
        f"`anybit.evaluate` on {protocol['tokens']} tokens of {protocol['text']} in windows of {protocol['context']}. "
        f"AutoRound runs {protocol['autoround_steps']} steps. KL(dense || quantized) in nats per token.",
    ]
    for bits in sorted({own["bits"] for own in found["rows"]}):
        rows = sorted((own for own in found["rows"] if own["bits"] == bits), key=lambda own: own["kl"])
        lines += [
            "",
            f"## {bits} bits (dense perplexity {rows[0]['dense_perplexity']})",
            "",
            "| way | bits per weight | perplexity | KL | top-1 | CPU seconds | peak MB |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for own in rows:
            lines.append(
                f"| {own['way']} | {own['bits_per_weight']} | {own['perplexity']} | {own['kl']} | {own['top1']} | "
                f"{own['cpu_seconds']} | {own['peak_memory_mb']} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
