"""Products with packed weights: every family the native kernels read, against memory bandwidth and torch's dense products.

    python benchmarks/cpu/products.py [--rows 11008 --columns 4096] [--batches 1,4,8,16,64] [--only nf4,int4] [-o FOLDER]

Writes products.json and products.md into FOLDER (default: here). Per family and batch: milliseconds, for one row of input
also packed bytes per second as a share of a streaming read measured in the same run, and the ratio to torch's product with the
dense bfloat16 and float32 weight. Repeats of all candidates are interleaved, and medians are reported: a busy machine slows
all of them alike. The weight is larger than the last cache level unless it is made small. On a machine that others use,
`--clock thread` counts the CPU time of one thread instead of the wall clock: waiting for a turn is not measured, memory is.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import anybit
from anybit.kernels import get
from anybit.kernels.cpu import native
from anybit.methods._gguf_layout import GgufLayout
from anybit.weight import Weight, nodes
from anybit.weight.block_types import BY_NAME

Candidate = Callable[[], Any]


def families(rows: int, columns: int) -> dict[str, Callable[[], nodes.Node]]:
    """What the files of common methods decode to, with random contents."""

    def codes(bits: int, signed: bool = False, top: int = 256) -> nodes.Codes:
        return nodes.Codes(torch.randint(0, top, (rows, columns * bits // 8), dtype=torch.uint8), bits, columns, signed)

    def scales(group: int, dtype: torch.dtype = torch.float16) -> nodes.Values:
        return nodes.Values((torch.rand(rows, columns // group) * 0.02 + 0.01).to(dtype))

    def zeros(bits: int, group: int) -> nodes.Codes:
        return nodes.Codes.of(torch.randint(0, 1 << bits, (rows, columns // group)), bits)

    def powers(group: int) -> nodes.Values:
        return nodes.Values(torch.randint(110, 130, (rows, columns // group), dtype=torch.uint8), levels="e8m0")

    def scale_codes(group: int, bits: int, signed: bool = False) -> nodes.Codes:
        return nodes.Codes.of(torch.randint(0, 1 << bits, (rows, columns // group)), bits, signed)

    def super_scales(group: int, count: int) -> nodes.Values:
        return nodes.Values((torch.rand(rows, -(-columns // group // count)) * 0.02 + 0.01).half())

    def nested(group: int, bits: int, count: int, signed: bool = False) -> nodes.Grid:
        return nodes.Grid(scale_codes(group, bits, signed), super_scales(group, count), block=(1, count))

    def book(bits: int, books: int, vector: tuple[int, int], group: int | None = None) -> nodes.Codebook:
        high, wide = vector
        count = columns // wide * books
        own = nodes.Codes(torch.randint(0, 256, (rows // high, count * bits // 8), dtype=torch.uint8), bits, count)
        scale = None if group is None else scales(group)
        return nodes.Codebook(own, torch.randn(books, 1 << bits, *vector).half(), vector, scale, block=(1, group or 1))

    def lattice(kind: str) -> nodes.Node:
        block = BY_NAME[kind]
        stored = torch.randint(0, 256, (rows, columns // block.elements, block.bytes), dtype=torch.uint8)
        stored[..., :2] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
        return GgufLayout((rows, columns), torch.float32, encoding=kind).decode({kind.lower(): stored.flatten(1)}).tree

    def spqr() -> nodes.Sum:
        def fine() -> nodes.Grid:
            half = (torch.rand(rows // 16, columns // 16) * 0.02).half()
            return nodes.Grid(
                scale_codes(16, 3), nodes.Values(half), nodes.Values(half), block=(16, 1), compute="float16"
            )

        each = columns // 100  # outliers of a row
        places = torch.rand(rows, columns).topk(each, dim=1).indices.sort(1).values.flatten().to(torch.int32)
        outliers = nodes.Values(torch.randn(1, len(places)).half())
        offsets = torch.arange(0, len(places) + 1, each, dtype=torch.int32)
        grid = nodes.Grid(codes(3), fine(), fine(), block=(1, 16), compute="float16")
        return nodes.Sum((grid, nodes.Sparse(offsets, places, outliers, columns)), "float16")

    row = nodes.Values(torch.rand(rows, 1) * 0.02)
    return {
        "int4, groups of 128, zero points (GPTQ, AWQ)": lambda: nodes.Grid(codes(4), scales(128), zeros(4, 128), block=(1, 128)),
        "int4, groups of 32 (Q4_0)": lambda: nodes.Grid(codes(4), scales(32), block=(1, 32)),
        "nf4, blocks of 64 (bitsandbytes)": lambda: nodes.Grid(codes(4), scales(64, torch.float32), levels="nf4", block=(1, 64)),
        "nf4, nested scales (bitsandbytes)": lambda: nodes.Grid(
            codes(4),
            nodes.Grid(scale_codes(64, 8), super_scales(64, 64), offset=nodes.Values(torch.rand(1, 1)), block=(1, 64)),
            levels="nf4", block=(1, 64),
        ),
        "Q4_K": lambda: nodes.Grid(codes(4), nested(32, 6, 8), offset=nested(32, 6, 8), block=(1, 32)),
        "Q5_K": lambda: nodes.Grid(codes(5), nested(32, 6, 8), offset=nested(32, 6, 8), block=(1, 32)),
        "Q6_K": lambda: nodes.Grid(codes(6, True), nested(16, 8, 16, True), block=(1, 16)),
        "mxfp4, blocks of 32": lambda: nodes.Grid(codes(4), powers(32), levels="e2m1", block=(1, 32)),
        "int2, groups of 64": lambda: nodes.Grid(codes(2), scales(64), zeros(2, 64), block=(1, 64)),
        "int3, groups of 128": lambda: nodes.Grid(codes(3), scales(128), zeros(3, 128), block=(1, 128)),
        "int5, groups of 128": lambda: nodes.Grid(codes(5), scales(128), block=(1, 128)),
        "int6, groups of 128": lambda: nodes.Grid(codes(6), scales(128), block=(1, 128)),
        "int8, rows (quanto, EETQ, W8A16)": lambda: nodes.Grid(codes(8, True), row, block=(1, columns)),
        "int8, groups of 32 (Q8_0)": lambda: nodes.Grid(codes(8, True), scales(32), block=(1, 32)),
        "fp8 e4m3, rows": lambda: nodes.Grid(codes(8, top=0x7F), row, levels="e4m3", block=(1, columns)),
        "fp8 e4m3, blocks of 128 x 128": lambda: nodes.Grid(
            codes(8, top=0x7F), nodes.Values(torch.rand(-(-rows // 128), columns // 128)), levels="e4m3", block=(128, 128)
        ),
        "int4, groups of 64, bfloat16 arithmetic (MLX)": lambda: nodes.Grid(
            codes(4), scales(64, torch.bfloat16), offset=scales(64, torch.bfloat16), block=(1, 64), compute="bfloat16"
        ),
        "AQLM, one book of 16 bits": lambda: book(16, 1, (1, 8), columns),
        "AQLM, two books of 8 bits": lambda: book(8, 2, (1, 8), columns),
        "VPTQ, 12 bits and a residual of 8": lambda: nodes.Sum((book(12, 1, (8, 1)), book(8, 1, (8, 1)))),
        "HIGGS, 4 bits": lambda: book(8, 1, (1, 2), 256),
        "HIGGS, 3 bits": lambda: book(6, 1, (1, 2), 256),
        "HIGGS, 2 bits": lambda: book(4, 1, (1, 2), 256),
        **{kind: functools.partial(lattice, kind) for kind in ("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")},
        "SpQR, 1 % outliers": spqr,
    }  # fmt: skip


def kernel_rounds(spec: str) -> bool:
    """Whether the fast kernel rounds inputs of this weight: one grid of integers, or of a table of 16 numbers."""
    grid = json.loads(spec)["program"].get("grid")
    return (
        grid is not None
        and grid["compute"] == 0
        and (grid["levels"] in (0, 1) or (grid["levels"], grid["bits"]) == (2, 4))
    )


def medians(candidates: dict[str, Candidate], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each, interleaved."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(repeats):
        for name, run in candidates.items():
            start = clock()
            run()
            found[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in found.items()}


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "levels": native.levels(),
        "torch": torch.__version__,
        "anybit": getattr(anybit, "__version__", None),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    rows, columns = options.rows, options.columns
    kernel = get("cpu")
    clock = time.perf_counter
    if options.clock == "thread":
        torch.set_num_threads(1)
        clock = time.thread_time
    stream = torch.ones(options.stream_mib << 18)
    dense = {torch.bfloat16: torch.randn(rows, columns).bfloat16(), torch.float32: torch.randn(rows, columns)}
    facts, found = machine(), []
    wanted = [word.strip() for word in options.only.split(",")] if options.only else []
    for name, make in families(rows, columns).items():
        if wanted and not any(word in name for word in wanted):
            continue
        weight = Weight(make())
        spec, tensors = kernel.prepare(weight)
        for batch in options.batches:
            inputs = {dtype: torch.randn(batch, columns).to(dtype) for dtype in dense}
            candidates: dict[str, Candidate] = {"read": stream.sum} if batch == 1 else {}
            for dtype, x in inputs.items():
                label = str(dtype).removeprefix("torch.")
                candidates[label] = functools.partial(kernel.linear, x, spec, tensors, None)
                if dtype == torch.bfloat16 and kernel_rounds(spec):
                    candidates["fast"] = functools.partial(get("cpu_fast").linear, x, spec, tensors, None)
                candidates[f"dense {label}"] = functools.partial(torch.nn.functional.linear, x, dense[dtype])
            seconds = medians(candidates, options.repeats, clock)
            entry: dict[str, Any] = {"family": name, "batch": batch, "bytes": weight.bytes_in_memory}
            for label in ("bfloat16", "float32"):
                entry[label] = {
                    "milliseconds": round(seconds[label] * 1e3, 3),
                    "dense_milliseconds": round(seconds[f"dense {label}"] * 1e3, 3),
                }
            if "fast" in seconds:
                entry["fast"] = {
                    "milliseconds": round(seconds["fast"] * 1e3, 3),
                    "dense_milliseconds": round(seconds["dense bfloat16"] * 1e3, 3),
                }
            if batch == 1:
                entry["read_gb_per_second"] = round(stream.numel() * 4 / seconds["read"] / 1e9, 2)
                for label in ("bfloat16", "float32", "fast"):
                    if label not in entry:
                        continue
                    entry[label]["gb_per_second"] = round(weight.bytes_in_memory / seconds[label] / 1e9, 2)
            found.append(entry)
            print(json.dumps(entry), flush=True)
    return {
        "machine": facts,
        "clock": options.clock,
        "rows": rows,
        "columns": columns,
        "repeats": options.repeats,
        "products": found,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    facts = result["machine"]
    lines = [
        f"# Products with a {result['rows']} x {result['columns']} weight",
        "",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, load {facts['load_before']} before the run, "
        f"level {facts['levels'][-1]}, torch {facts['torch']}; medians of {result['repeats']} interleaved repeats, "
        f"{'CPU time of one thread' if result['clock'] == 'thread' else 'wall clock'}. "
        "`read`: packed bytes per second over a streaming read's, one row of input. `x dense`: torch's time with the dense "
        "weight of the input's dtype over ours. `fast`: a bfloat16 input that cpu_fast rounds to bytes.",
        "",
        "| family | rows of x | bf16 ms | x dense | read | f32 ms | x dense | read | fast ms | x dense | read |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for entry in result["products"]:
        cells = [entry["family"], str(entry["batch"])]
        for label in ("bfloat16", "float32", "fast"):
            if label not in entry:
                cells += ["", "", ""]
                continue
            own = entry[label]
            share = f"{own['gb_per_second'] / entry['read_gb_per_second']:.0%}" if "gb_per_second" in own else ""
            ratio = own["dense_milliseconds"] / own["milliseconds"]
            cells += [f"{own['milliseconds']:.2f}", f"{ratio:.2f}", share]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=11008)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument(
        "--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 8, 16, 64]
    )
    parser.add_argument("--only", default="", help="families whose names contain one of these words, comma-separated")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=["wall", "thread"], default="wall")
    parser.add_argument("--stream-mib", type=int, default=256, help="size of the streaming read")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    result = measure(options)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "products.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.output / "products.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
