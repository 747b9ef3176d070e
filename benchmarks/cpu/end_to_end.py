"""Whole models on the CPU: milliseconds a token and seconds for a prompt, anybit beside transformers, its peers and llama.cpp.

    python benchmarks/cpu/end_to_end.py [--quick] [--peer NAME=PYTHON ...] [--threads 2] [--shape 1.1B] [--layers N] [-o FOLDER]

Models are Llamas that `models.py` makes in $ANYBIT_BENCHMARK_CACHE and anybit packs: every program reads the same numbers, and
the GGUF files are anybit's. Each candidate runs in a process of its own, a group of them at a time, with decoding and prefill
interleaved over the group; groups hold anybit and those it is compared with, so ratios come from one run. Medians. Decoding:
batch 1, a static cache of 512 where there is one; prefill: 256 tokens. Writes end_to_end.json and .md into FOLDER (here).

Peers run in their own environments: --peer bitsandbytes=..., gptqmodel=..., torchao=..., quanto=..., hqq=..., llama.cpp=... name
the interpreters; those that are not named are left out, those that fail are reported with their last words.
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

GROUPS: dict[str, list[Candidate]] = {
    "4 bits": [
        Candidate("transformers bf16", "transformers", None, "dense"),
        Candidate("bitsandbytes NF4", "bitsandbytes", "bitsandbytes", "nf4"),
        Candidate("anybit NF4", "anybit-exact", None, "nf4"),
        Candidate("anybit NF4, fast", "anybit-fast", None, "nf4"),
        Candidate("gptqmodel int4 g128", "gptqmodel", "gptqmodel", "gptq-4bit-g128"),
        Candidate("anybit GPTQ int4 g128", "anybit-exact", None, "gptq-4bit-g128"),
        Candidate("anybit GPTQ int4 g128, fast", "anybit-fast", None, "gptq-4bit-g128"),
        Candidate("quanto int4", "quanto-make-int4", "quanto", "dense"),
        Candidate("hqq int4", "hqq-make-int4", "hqq", "dense"),
    ],
    "Q4_0": [
        Candidate("llama.cpp Q4_0", "llama.cpp", "llama.cpp", "gguf-q4_0"),
        Candidate("anybit Q4_0", "anybit-exact", None, "gguf-q4_0"),
        Candidate("anybit Q4_0, fast", "anybit-fast", None, "gguf-q4_0"),
    ],
    "Q4_K_M": [
        Candidate("llama.cpp Q4_K_M", "llama.cpp", "llama.cpp", "gguf-q4_k_m"),
        Candidate("anybit Q4_K_M", "anybit-exact", None, "gguf-q4_k_m"),
        Candidate("anybit Q4_K_M, fast", "anybit-fast", None, "gguf-q4_k_m"),
    ],
    "8 bits": [
        Candidate("llama.cpp Q8_0", "llama.cpp", "llama.cpp", "gguf-q8_0"),
        Candidate("anybit Q8_0", "anybit-exact", None, "gguf-q8_0"),
        Candidate("anybit Q8_0, fast", "anybit-fast", None, "gguf-q8_0"),
        Candidate("torchao int8", "torchao-make-int8", "torchao", "dense"),
    ],
}
SLOW = {"quanto int4", "hqq int4"}  # a minute and more to quantize: not in --quick


def measure(options: argparse.Namespace) -> dict[str, Any]:
    pythons = running.interpreters(options.peer)
    facts, groups = running.machine(options.threads), {}
    repeats, tokens = (3, 8) if options.quick else (options.repeats, 16)
    for name, candidates in GROUPS.items():
        if options.only and name not in options.only.split(","):
            continue
        wanted = [
            candidate
            for candidate in candidates
            if (candidate.peer is None or candidate.peer in pythons) and not (options.quick and candidate.label in SLOW)
        ]
        groups[name] = run_group(wanted, pythons, options, repeats, tokens)
    return {"machine": facts, "shape": options.shape, "layers": options.layers, "prompt": options.prompt,
            "repeats": repeats, "tokens": tokens, "groups": groups}  # fmt: skip


def run_group(
    candidates: list[Candidate], pythons: dict[str, str], options: argparse.Namespace, repeats: int, tokens: int
) -> list[dict[str, Any]]:
    started: list[running.Running] = []
    found: dict[str, dict[str, Any]] = {candidate.label: {"label": candidate.label} for candidate in candidates}
    try:
        for candidate in candidates:
            path = models.path(options.shape, candidate.scheme, options.layers)
            python = sys.executable if candidate.peer is None else pythons[candidate.peer]
            print(f"{candidate.label} ...", file=sys.stderr, flush=True)
            try:
                one = running.Running(candidate, python, path, options.threads)
            except RuntimeError as error:
                found[candidate.label]["failed"] = str(error)
                print(f"  {error}", file=sys.stderr, flush=True)
                continue
            started.append(one)
            found[candidate.label]["versions"] = one.facts["versions"]
        decoding: dict[str, list[float]] = {one.candidate.label: [] for one in started}
        prefill: dict[str, list[float]] = {one.candidate.label: [] for one in started}
        for repeat in range(-1, repeats):  # the first round warms up
            for one in list(started):
                label = one.candidate.label
                try:
                    seconds = one.do("decode", 3 if repeat < 0 else tokens)
                    prompt = one.do("prefill", options.prompt)
                except RuntimeError as error:
                    found[label]["failed"] = str(error)
                    print(f"  {error}", file=sys.stderr, flush=True)
                    started.remove(one)
                    continue
                if repeat >= 0:
                    decoding[label] += seconds
                    prefill[label].append(prompt)
        for one in started:
            label = one.candidate.label
            found[label]["milliseconds_per_token"] = round(statistics.median(decoding[label]) * 1e3, 2)
            found[label]["fastest_token"] = round(min(decoding[label]) * 1e3, 2)
            found[label]["prefill_seconds"] = round(statistics.median(prefill[label]), 3)
    finally:
        for one in started:
            one.stop()
    return list(found.values())


def markdown(result: dict[str, Any]) -> str:
    facts = result["machine"]
    lines = [
        f"# A Llama of {result['shape']} shapes on the CPU",
        "",
        f"{running.sentence(facts)}; medians of "
        f"{result['repeats']} interleaved rounds of {result['tokens']} tokens, batch 1; a prompt of {result['prompt']} tokens. "
        "`x`: how many times faster anybit is than this line, in the same group, without and with `fast`; for 4 bits as NF4 "
        "(bitsandbytes, transformers, quanto, hqq) or GPTQ (gptqmodel).",
        "",
    ]
    for name, entries in result["groups"].items():
        rows = []
        for entry in entries:
            if "failed" in entry:
                rows.append([entry["label"], "failed", "", "", "", entry["failed"].replace("|", "/")[:120]])
            else:
                ratios = [_ratio(entry, entries, what) for what in ("milliseconds_per_token", "prefill_seconds")]
                versions = ", ".join(
                    f"{package} {version}"
                    for package, version in entry["versions"].items()
                    if package not in ("torch",)
                )
                rows.append([
                    entry["label"], f"{entry['milliseconds_per_token']:.1f}", ratios[0], f"{entry['prefill_seconds']:.2f}",
                    ratios[1], versions,
                ])  # fmt: skip
        lines += [f"## {name}", "", *running.table(["", "ms a token", "x", "prefill s", "x", "versions"], rows), ""]
    return "\n".join(lines)


def _ratio(entry: dict[str, Any], entries: list[dict[str, Any]], what: str) -> str:
    if entry["label"].startswith("anybit"):
        return ""
    own = "GPTQ" if "gptqmodel" in entry["label"] else ""
    ours = [other for other in entries if other["label"].startswith("anybit") and what in other]
    ours = [other for other in ours if own in other["label"]][:2]
    return " / ".join(f"{entry[what] / other[what]:.2f}" for other in ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds, and no candidates that quantize for a minute"
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", default="1.1B", choices=sorted(models.SHAPES))
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the shape has")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", help=f"groups, separated by commas: {', '.join(GROUPS)}")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    result = measure(options)
    running.write(options.output, "end_to_end", result, markdown(result))


if __name__ == "__main__":
    main()
