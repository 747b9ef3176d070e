"""Products with packed weights on a GPU: correctness on fresh random inputs, then time against copying and against bfloat16.

    python benchmarks/gpu/products.py [--shapes 4096x4096,8192x28672] [--batches 1,4,16,64,512,4096] [--only nf4] [-o FOLDER]
    python benchmarks/gpu/products.py --tune         tries tiles and prints entries for kernels/triton/tuning.json
    TRITON_INTERPRET=1 python benchmarks/gpu/products.py --check-only --shapes 48x128   the first half, without a GPU

Writes products.json and products.md into FOLDER (default: here): per family, shape and batch the median milliseconds
(triton.testing.do_bench), packed bytes per second as a share of the copy bandwidth measured in the same run, and the ratio to
torch's bfloat16 product with the dense weight.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import anybit
from anybit.kernels import get
from anybit.kernels.reference import multiply
from anybit.kernels.triton import interpreted, programs
from anybit.kernels.triton.tuning import Tile
from anybit.weight import Weight, nodes
from anybit.weight.packing import row_bytes

DEVICE = torch.device("cpu" if interpreted() else "cuda")
TILES = {
    "inputs": (16, 32, 64, 128), "rows": (8, 16, 32, 64, 128), "runs": (16, 32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3, 4),
}  # fmt: skip


def families(rows: int, columns: int) -> dict[str, Callable[[], nodes.Node]]:
    """What the files of common methods decode to, with random contents."""

    def codes(bits: int, width: int = columns, high: int = rows, signed: bool = False, top: int = 256) -> nodes.Codes:
        stored = torch.randint(0, top, (high, row_bytes(width, bits)), dtype=torch.uint8, device=DEVICE)
        return nodes.Codes(stored, bits, width, signed)

    def scales(group: int, dtype: torch.dtype = torch.float16) -> nodes.Values:
        return nodes.Values((torch.rand(rows, columns // group, device=DEVICE) * 0.02 + 0.01).to(dtype))

    def zeros(bits: int, group: int) -> nodes.Codes:
        return codes(bits, columns // group)

    row = nodes.Values(torch.rand(rows, 1, device=DEVICE) * 0.02)
    pairs = torch.randn(1, 256, 1, 2, device=DEVICE)
    powers = nodes.Values(
        torch.randint(110, 130, (rows, columns // 32), dtype=torch.uint8, device=DEVICE), levels="e8m0"
    )
    return {
        "int4, groups of 128, zero points (GPTQ, AWQ)": lambda: nodes.Grid(codes(4), scales(128), zeros(4, 128), block=(1, 128)),
        "nf4, blocks of 64 (bitsandbytes)": lambda: nodes.Grid(codes(4), scales(64, torch.float32), levels="nf4", block=(1, 64)),
        "mxfp4, blocks of 32": lambda: nodes.Grid(codes(4), powers, levels="e2m1", block=(1, 32)),
        "int2, groups of 64": lambda: nodes.Grid(codes(2), scales(64), zeros(2, 64), block=(1, 64)),
        "int3, groups of 128": lambda: nodes.Grid(codes(3), scales(128), zeros(3, 128), block=(1, 128)),
        "int6, groups of 16 (Q6_K)": lambda: nodes.Grid(codes(6, signed=True), scales(16), block=(1, 16)),
        "int8, rows (quanto, EETQ, W8A16)": lambda: nodes.Grid(codes(8, signed=True), row, block=(1, columns)),
        "fp8 e4m3, rows": lambda: nodes.Grid(codes(8, top=0x7F), row, levels="e4m3", block=(1, columns)),
        "AQLM 1x16": lambda: nodes.Codebook(
            codes(16, columns // 8), torch.randn(1, 1 << 16, 1, 8, device=DEVICE).half(), (1, 8), row, block=(1, columns)
        ),
        "HIGGS 4 bit, pairs": lambda: nodes.Rotate(
            nodes.Codebook(codes(8, columns // 2), pairs, (1, 2), scales(64), block=(1, 64)), 128
        ),
    }  # fmt: skip


def check(weight: Weight, name: str) -> None:
    """Raises AssertionError where a product differs from the reference's."""
    kernel = get("triton")
    spec, tensors = kernel.prepare(weight)
    for batch, dtype in itertools.product((1, 5, 33), (torch.bfloat16, torch.float16)):
        x = torch.randn(batch, weight.shape[1], device=DEVICE).to(dtype)
        ours, wanted = kernel.linear(x, spec, tensors, None).float(), multiply(weight, x, None).float()
        error = ((ours - wanted).abs().max() / wanted.abs().max()).item()
        assert error < 2**-6, f"{name}, {batch} rows of {dtype}: relative error {error:.2e}"


def tiles(batch: int) -> Iterator[Tile]:
    for inputs, rows, runs, warps, stages in itertools.product(*TILES.values()):
        if batch > 1 and inputs >= min(batch, 16) and rows >= 16 and inputs * rows <= 8192:
            yield Tile(inputs, rows, runs, 1, warps, stages)
        elif batch == 1 and inputs == 16 and rows * runs <= 4096:
            yield from (Tile(1, rows, runs, splits, warps, stages) for splits in (1, 2, 4, 8))


def tune(weight: Weight, batches: list[int]) -> None:
    """The fastest tile of each batch."""
    from triton.testing import do_bench

    kernel = get("triton")
    spec, tensors = kernel.prepare(weight)
    for batch in batches:
        if batch >= programs.MANY:
            continue
        x, best = torch.randn(batch, weight.shape[1], device=DEVICE).bfloat16(), (float("inf"), "")
        for tile in tiles(batch):
            programs.tile_for = lambda *_, tile=tile: tile  # type: ignore[assignment]
            try:
                seconds = do_bench(functools.partial(kernel.linear, x, spec, tensors, None), warmup=3, rep=15)
                best = min(best, (seconds, repr(tile)))
            except Exception as error:  # too much shared memory, too many registers: not a tile for this card
                print(f"{tile}: {error}", file=sys.stderr)
        print(json.dumps({"batch": batch, "milliseconds": best[0], "tile": best[1]}), flush=True)


def copy_speed() -> float:
    """GB/s read and written by a copy of 1 GB."""
    from triton.testing import do_bench

    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    milliseconds: float = do_bench(functools.partial(torch.empty_like(source).copy_, source), return_mode="median")
    return 2 * source.numel() / milliseconds / 1e6


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from triton.testing import do_bench

    copy = copy_speed()
    kernel, found = get("triton"), []
    for rows, columns in options.shapes:
        dense = torch.randn(rows, columns, device=DEVICE).bfloat16()
        for name, make in families(rows, columns).items():
            if options.only and options.only not in name:
                continue
            weight = Weight(make())
            check(weight, name)
            spec, tensors = kernel.prepare(weight)
            for batch in options.batches:
                x = torch.randn(batch, columns, device=DEVICE).bfloat16()
                ours = do_bench(functools.partial(kernel.linear, x, spec, tensors, None), return_mode="median")
                plain = do_bench(functools.partial(torch.nn.functional.linear, x, dense), return_mode="median")
                speed = weight.bytes_in_memory / ours / 1e6
                shape = f"{rows}x{columns}"
                found.append({
                    "family": name, "shape": shape, "batch": batch, "milliseconds": round(ours, 4), "gb_per_second": round(speed),
                    "of_copy": round(speed / copy, 3), "of_bfloat16": round(plain / ours, 2),
                })  # fmt: skip
                print(json.dumps(found[-1]), flush=True)
    import triton

    return {
        "date": datetime.date.today().isoformat(), "card": torch.cuda.get_device_name(), "copy_gb_per_second": round(copy),
        "torch": torch.__version__, "triton": triton.__version__, "anybit": anybit.__version__, "products": found,
    }  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"{result['card']}, {result['date']}, torch {result['torch']}, Triton {result['triton']}. "
        f"Copying: {result['copy_gb_per_second']} GB/s.\n",
        "| family | shape | rows of input | ms | GB/s | of copying | times bfloat16 |\n|---|---|---|---|---|---|---|",
    ]
    for row in result["products"]:
        lines.append("| " + " | ".join(str(value) for value in row.values()) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", default="4096x4096,4096x14336,8192x8192,8192x28672",
        type=lambda text: [tuple(int(size) for size in shape.split("x")) for shape in text.split(",")],
    )  # fmt: skip
    parser.add_argument(
        "--batches", default="1,4,16,64,512,4096", type=lambda text: [int(one) for one in text.split(",")]
    )
    parser.add_argument("--only", help="a part of a family's name")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    if options.check_only or options.tune:
        for rows, columns in options.shapes:
            for name, make in families(rows, columns).items():
                if not options.only or options.only in name:
                    weight = Weight(make())
                    check(weight, name)
                    print(f"{name}, {rows}x{columns}: agrees with the reference", flush=True)
                    if options.tune:
                        tune(weight, options.batches)
        return
    result = measure(options)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "products.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.output / "products.md").write_text(markdown(result))


if __name__ == "__main__":
    main()
