"""Loading on the CPU: seconds and peak memory, of packed checkpoints and of dense ones that are quantized on the way.

    python benchmarks/cpu/loading.py [--quick] [--peer NAME=PYTHON ...] [--threads 2] [-o FOLDER]

Every load happens in a new process; its peak is the operating system's (VmHWM), minus what was resident after the imports,
whose time is reported apart. Files are read once before, so they lie in the page cache. Candidates are interleaved; medians.
Models: see models.py. The last table shows how time and memory grow with the model; the shape of 8B has --layers-8b layers.
Writes loading.json and loading.md into FOLDER (here). Peers: as in end_to_end.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import models
import running
from running import Candidate

PACKED = [
    Candidate("bitsandbytes NF4", "bitsandbytes", "bitsandbytes", "nf4"),
    Candidate("anybit NF4", "anybit-exact", None, "nf4"),
    Candidate("gptqmodel int4 g128", "gptqmodel", "gptqmodel", "gptq-4bit-g128"),
    Candidate("anybit GPTQ int4 g128", "anybit-exact", None, "gptq-4bit-g128"),
    Candidate("llama.cpp Q4_0", "llama.cpp", "llama.cpp", "gguf-q4_0"),
    Candidate("anybit Q4_0", "anybit-exact", None, "gguf-q4_0"),
    Candidate("llama.cpp Q4_K_M", "llama.cpp", "llama.cpp", "gguf-q4_k_m"),
    Candidate("anybit Q4_K_M", "anybit-exact", None, "gguf-q4_k_m"),
    Candidate("transformers bf16", "transformers", None, "dense"),
]
MADE = [
    Candidate("bitsandbytes NF4", "bitsandbytes-make", "bitsandbytes", "dense"),
    Candidate("anybit NF4", "anybit-exact-make-nf4", None, "dense"),
    Candidate("anybit LLM.int8", "anybit-exact-make-int8", None, "dense"),
    Candidate("anybit quanto int4", "anybit-exact-make-quanto-int4", None, "dense"),
    Candidate("quanto int4", "quanto-make-int4", "quanto", "dense"),
    Candidate("torchao int8", "torchao-make-int8", "torchao", "dense"),
]
GROWTH = [
    Candidate("anybit NF4", "anybit-exact", None, "nf4"),
    Candidate("anybit NF4, made", "anybit-exact-make-nf4", None, "dense"),
]


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def loads(
    candidates: list[Candidate], shape: str, layers: int | None, pythons: dict[str, str], threads: int, repeats: int
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    wanted = [candidate for candidate in candidates if candidate.peer is None or candidate.peer in pythons]
    for candidate in wanted:
        path = models.path(shape, candidate.scheme, layers)
        running.wake(path)
        found.append({"label": candidate.label, "file_bytes": size_of(path), "runs": []})
    for _ in range(repeats):
        for candidate, entry in zip(wanted, found):
            if "failed" in entry:
                continue
            python = sys.executable if candidate.peer is None else pythons[candidate.peer]
            print(f"{shape} {candidate.label} ...", file=sys.stderr, flush=True)
            try:
                one = running.Running(candidate, python, models.path(shape, candidate.scheme, layers), threads)
            except RuntimeError as error:
                entry["failed"] = str(error)
                continue
            entry["runs"].append({name: one.facts[name] for name in ("imports", "load", "before", "peak")})
            entry["versions"] = one.facts["versions"]
            one.stop()
    for entry in found:
        runs = entry["runs"]
        if runs:
            entry["load_seconds"] = round(statistics.median(run["load"] for run in runs), 3)
            entry["fastest_load"] = round(min(run["load"] for run in runs), 3)
            entry["import_seconds"] = round(statistics.median(run["imports"] for run in runs), 2)
            entry["peak_bytes"] = statistics.median(run["peak"] - run["before"] for run in runs)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    pythons, facts = running.interpreters(options.peer), running.machine(options.threads)
    repeats = 2 if options.quick else options.repeats
    made = [candidate for candidate in MADE if not (options.quick and candidate.peer == "quanto")]
    shapes: list[tuple[str, int | None]] = [("0.3B", None), ("1.1B", None)]
    if not options.quick:
        shapes += [("3B", None), ("8B", options.layers_8b)]
    return {
        "machine": facts,
        "repeats": repeats,
        "packed": loads(PACKED, "1.1B", None, pythons, options.threads, repeats),
        "made": loads(made, "1.1B", None, pythons, options.threads, 1 if options.quick else repeats),
        "growth": {
            f"{shape}, {layers or models.SHAPES[shape].layers} layers": loads(
                GROWTH, shape, layers, {}, options.threads, repeats
            )
            for shape, layers in shapes
        },
    }


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# Loading models on the CPU",
        "",
        f"{running.sentence(result['machine'])}; medians of {result['repeats']} interleaved runs, each a new process; files in "
        "the page cache. `peak`: largest resident memory beyond that after the imports, and its share of the files' bytes. "
        "llama.cpp maps its files: its load reads little of them.",
        "",
        "## Packed checkpoints of 1.1B shapes",
        "",
        *_lines(result["packed"]),
        "",
        "## Quantized while a dense checkpoint of 1.1B shapes is loaded",
        "",
        *_lines(result["made"]),
        "",
        "## From 0.3B to 8B shapes",
        "",
    ]
    for shape, entries in result["growth"].items():
        lines += [f"### {shape}", "", *_lines(entries), ""]
    return "\n".join(lines)


def _lines(entries: list[dict[str, Any]]) -> list[str]:
    rows = []
    for entry in entries:
        if "load_seconds" not in entry:
            rows.append([entry["label"], "failed", "", "", "", entry.get("failed", "").replace("|", "/")[:120]])
            continue
        size, peak = entry["file_bytes"], entry["peak_bytes"]
        rows.append([
            entry["label"], f"{entry['load_seconds']:.2f}", f"{size / 1e9:.2f}", f"{peak / 1e9:.2f}", f"{peak / size:.2f}",
            f"{entry['import_seconds']:.1f}",
        ])  # fmt: skip
    return running.table(["", "load s", "files GB", "peak GB", "peak / files", "imports s"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="two runs each, 0.3B and 1.1B only, nothing that takes a minute"
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--layers-8b", type=int, default=8, help="layers of the 8B shape; 32 need 16 GB of disk and of page cache"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    result = measure(options)
    running.write(options.output, "loading", result, markdown(result))


if __name__ == "__main__":
    main()
