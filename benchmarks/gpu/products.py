"""Products with packed weights on a GPU: correctness on fresh random inputs, then time against copying and against bfloat16.

    python benchmarks/gpu/products.py [--shapes 4096x4096,64x2048x1408] [--batches 1,4,16,64,512,4096] [--only nf4] [-o FOLDER]
    python benchmarks/gpu/products.py --tune         tries tiles and writes the best ones into FOLDER/tuned.json
    TRITON_INTERPRET=1 python benchmarks/gpu/products.py --check-only --shapes 48x256   the first half, without a GPU

Writes products.json and products.md into FOLDER (default: here): per family, shape and batch the median milliseconds
(triton.testing.do_bench), packed bytes per second as a share of the copy bandwidth measured in the same run, and the ratio to
torch's bfloat16 product with the dense weight. A shape of three numbers is a stack of experts, and a batch of it so many tokens
for each of 8 of them. `torch int4` and `torch int8` are torch's own products of the same size.

A card is lent for minutes: the script stops after --minutes and goes on where it stopped when it is started again.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import anybit
from anybit.kernels import get
from anybit.kernels._programs import form_of
from anybit.kernels.reference import multiply
from anybit.kernels.triton import interpreted, programs
from anybit.kernels.triton.tuning import Tile
from anybit.weight import Weight, nodes
from anybit.weight.packing import row_bytes

DEVICE = torch.device("cpu" if interpreted() else "cuda")
ROUTED = 8  # experts that a batch goes to
TILES = {
    "inputs": (16, 32, 64, 128),
    "rows": (8, 16, 32, 64, 128),
    "runs": (16, 32, 64, 128),
    "warps": (4, 8),
    "stages": (1, 2, 3, 4),
}
PLANES = {
    "inputs": (8, 16, 32, 64, 128), "rows": (16, 32, 64, 128), "runs": (1,), "warps": (1, 2, 4, 8), "stages": (2, 3, 4, 6),
}  # fmt: skip


def families(rows: int, columns: int, experts: int = 0) -> dict[str, Callable[[], nodes.Node]]:
    """What the files of common methods decode to, with random contents."""
    lead = (experts,) if experts else ()

    def codes(bits: int, width: int = columns, high: int = rows, signed: bool = False, top: int = 256) -> nodes.Codes:
        stored = torch.randint(0, top, (*lead, high, row_bytes(width, bits)), dtype=torch.uint8, device=DEVICE)
        return nodes.Codes(stored, bits, width, signed)

    def scales(group: int, dtype: torch.dtype = torch.float16) -> nodes.Values:
        return nodes.Values((torch.rand(*lead, rows, columns // group, device=DEVICE) * 0.02 + 0.01).to(dtype))

    def zeros(bits: int, group: int) -> nodes.Codes:
        return codes(bits, columns // group)

    def nested(bits: int, group: int, over: int) -> nodes.Grid:
        width = columns // group
        own = torch.rand(*lead, rows, width // over, device=DEVICE) * 0.001
        return nodes.Grid(codes(bits, width), nodes.Values(own.half()), block=(1, over))

    row = nodes.Values(torch.rand(*lead, rows, 1, device=DEVICE) * 0.02)
    block = nodes.Values(torch.rand(*lead, -(-rows // 128), columns // 128, device=DEVICE) * 0.02)
    pairs = torch.randn(1, 256, 1, 2, device=DEVICE)
    powers = nodes.Values(
        torch.randint(110, 130, (*lead, rows, columns // 32), dtype=torch.uint8, device=DEVICE), levels="e8m0"
    )
    found: dict[str, Callable[[], nodes.Node]] = {
        "int4, groups of 128, zero points (GPTQ, AWQ)": lambda: nodes.Grid(
            codes(4), scales(128), zeros(4, 128), block=(1, 128)
        ),
        "nf4, blocks of 64 (bitsandbytes)": lambda: nodes.Grid(
            codes(4), scales(64, torch.float32), levels="nf4", block=(1, 64)
        ),
        "mxfp4, blocks of 32": lambda: nodes.Grid(codes(4), powers, levels="e2m1", block=(1, 32)),
        "int2, groups of 64": lambda: nodes.Grid(codes(2), scales(64), zeros(2, 64), block=(1, 64)),
        "int3, groups of 128": lambda: nodes.Grid(codes(3), scales(128), zeros(3, 128), block=(1, 128)),
        "int6, groups of 16 (Q6_K)": lambda: nodes.Grid(codes(6, signed=True), scales(16), block=(1, 16)),
        "int8, rows (quanto, EETQ, W8A16)": lambda: nodes.Grid(codes(8, signed=True), row, block=(1, columns)),
        "fp8 e4m3, rows": lambda: nodes.Grid(codes(8, top=0x7F), row, levels="e4m3", block=(1, columns)),
        "fp8 e4m3, blocks of 128x128": lambda: nodes.Grid(codes(8, top=0x7F), block, levels="e4m3", block=(128, 128)),
        "int4, nested scales (Q4_K)": lambda: nodes.Grid(
            codes(4), nested(6, 32, 8), None, nested(6, 32, 8), block=(1, 32)
        ),
        "ternary in 2 bits (BitNet)": lambda: nodes.Grid(
            codes(2, top=0xAA), row, nodes.Values(torch.ones_like(row.tensor)), block=(1, columns)
        ),
    }
    if experts:
        return found
    return found | {
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
    assert kernel.refuses(weight, DEVICE) is None, f"{name}: {kernel.refuses(weight, DEVICE)}"
    if len(weight.shape) == 3:
        x, ends = routed(weight, 5)
        ours, wanted = kernel.experts(x, ends, spec, tensors).float(), get("reference").experts(
            x, ends, *get("reference").prepare(weight)).float()  # fmt: skip
        assert (ours - wanted).abs().max() < 2**-6 * wanted.abs().max(), f"{name}, experts"
        return
    for batch, dtype in itertools.product((1, 5, 33), (torch.bfloat16, torch.float16)):
        x = torch.randn(batch, weight.shape[1], device=DEVICE).to(dtype)
        ours, wanted = kernel.linear(x, spec, tensors, None).float(), multiply(weight, x, None).float()
        error = ((ours - wanted).abs().max() / wanted.abs().max()).item()
        assert error < 2**-6, f"{name}, {batch} rows of {dtype}: relative error {error:.2e}"


def routed(weight: Weight, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`batch` tokens for each of some experts, spread over the stack: inputs, and where each expert's rows end."""
    experts = weight.shape[0]
    counts = torch.zeros(experts, dtype=torch.int64, device=DEVICE)
    counts[torch.randperm(experts, device=DEVICE)[:ROUTED]] = batch
    return torch.randn(int(counts.sum()), weight.shape[2], device=DEVICE).bfloat16(), counts.cumsum(0)


def product_of(weight: Weight, batch: int) -> Callable[[], torch.Tensor]:
    """The product that is timed."""
    kernel = get("triton")
    spec, tensors = kernel.prepare(weight)
    if len(weight.shape) == 3:
        x, ends = routed(weight, batch)
        return functools.partial(kernel.experts, x, ends, spec, tensors)
    x = torch.randn(batch, weight.shape[1], device=DEVICE).bfloat16()
    return functools.partial(kernel.linear, x, spec, tensors, None)


def tiles(batch: int, form: str) -> Iterator[Tile]:
    for inputs, rows, runs, warps, stages in itertools.product(*(PLANES if form == "planes" else TILES).values()):
        if form == "planes":
            if inputs // 2 < batch and rows * inputs <= 8192 and warps * 16 <= rows * max(1, inputs // 16):
                for splits in (1, 2, 4, 8) if batch <= 16 else (1, 2):
                    yield Tile(inputs, rows, runs, splits, warps, stages)
        elif batch > 1 and inputs >= min(batch, 16) and rows >= 16 and inputs * rows <= 8192:
            yield Tile(inputs, rows, runs, 1, warps, stages)
        elif batch == 1 and inputs == 16 and rows * runs <= 4096:
            yield from (Tile(1, rows, runs, splits, warps, stages) for splits in (1, 2, 4, 8))


def tune(weight: Weight, name: str, options: argparse.Namespace, found: dict[str, Any], until: float) -> None:
    """The fastest tile of each batch, and from how many rows on decoding pieces is faster than all of them."""
    kernel: Any = get("triton")
    leaf: Any = form_of(kernel, kernel.prepare(weight)[0]).program
    if not isinstance(leaf, programs.Leaf):
        return
    usual_tile, usual_many = programs.tile_for, programs.many
    for batch in options.batches:
        key = f"{name}, {options.shape}, {batch}"
        if key in found or time.time() > until:
            continue
        own, best = product_of(weight, batch), (float("inf"), "")
        programs.many = lambda *_: 1 << 30  # type: ignore[assignment]
        for tile in tiles(batch, leaf.form):
            programs.tile_for = lambda *_, tile=tile: tile  # type: ignore[assignment]
            try:
                best = min(best, (milliseconds(own, 15), repr(tile)))
            except Exception as error:  # too much shared memory, too many registers: not a tile for this card
                print(f"{tile}: {str(error).splitlines()[:1]}", file=sys.stderr)
            if time.time() > until:
                break
        programs.many = lambda *_: 1  # type: ignore[assignment]
        pieces = milliseconds(own, 15) if batch > 16 and len(weight.shape) == 2 else None
        programs.tile_for, programs.many = usual_tile, usual_many
        found[key] = {
            "form": leaf.form,
            "bits": leaf.bits,
            "milliseconds": best[0],
            "tile": best[1],
            "in_pieces": pieces,
        }
        print(json.dumps({key: found[key]}), flush=True)
        save(options, "tuned.json", found)


def milliseconds(product: Callable[[], Any], repetitions: int = 100) -> float:
    """The median; in the interpreter of one call, which says nothing but that it runs."""
    if interpreted():
        start = time.perf_counter()
        product()
        return 1e3 * (time.perf_counter() - start)
    from triton.testing import do_bench

    found: float = do_bench(product, warmup=max(3, repetitions // 4), rep=repetitions, return_mode="median")
    return found


def save(options: argparse.Namespace, name: str, content: Any) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / name).write_text(json.dumps(content, indent=1) + "\n")


def stored(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """What an earlier piece of the same run has measured."""
    file = options.output / name
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() and not options.fresh else {}
    return found


def copy_speed() -> float:
    """GB/s read and written by a copy of 1 GB."""
    source = torch.empty(1 << (20 if interpreted() else 30), dtype=torch.uint8, device=DEVICE)
    return 2 * source.numel() / milliseconds(functools.partial(torch.empty_like(source).copy_, source)) / 1e6


def peers(rows: int, columns: int, batch: int) -> dict[str, Callable[[], Any]]:
    """torch's own products with packed weights, where they run."""
    x = torch.randn(batch, columns, device=DEVICE).bfloat16()
    found: dict[str, Callable[[], Any]] = {}
    try:
        bytes_ = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=DEVICE)
        packed = torch._convert_weight_to_int4pack(bytes_, 8)
        scales = torch.ones(columns // 128, rows, 2, device=DEVICE).bfloat16()
        found["torch int4"] = functools.partial(torch._weight_int4pack_mm, x, packed, 128, scales)
        found["torch int4"]()
    except (RuntimeError, NotImplementedError) as error:
        found.pop("torch int4", None)
        print(f"torch int4: {str(error).splitlines()[0]}", file=sys.stderr)
    try:
        from anybit.weight.integer_products import exact_product

        left = torch.randint(-127, 128, (batch, columns), dtype=torch.int8, device=DEVICE)
        right = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=DEVICE)
        found["torch int8"] = functools.partial(exact_product, left, right)
    except (RuntimeError, NotImplementedError) as error:
        print(f"torch int8: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


def measure(options: argparse.Namespace, until: float) -> dict[str, Any]:
    import triton

    result = stored(options, "products.json") or {
        "date": datetime.date.today().isoformat(),
        "card": "the interpreter" if interpreted() else torch.cuda.get_device_name(),
        "copy_gb_per_second": round(copy_speed()),
        "torch": torch.__version__, "triton": triton.__version__, "anybit": anybit.__version__, "products": [],
    }  # fmt: skip
    done = {(row["family"], row["shape"], row["batch"]) for row in result["products"]}

    def note(name: str, shape: str, batch: int, own: float, bytes_read: int, plain: float) -> None:
        speed = bytes_read / own / 1e6
        result["products"].append({
            "family": name, "shape": shape, "batch": batch, "milliseconds": round(own, 4), "gb_per_second": round(speed),
            "of_copy": round(speed / result["copy_gb_per_second"], 3), "of_bfloat16": round(plain / own, 2),
        })  # fmt: skip
        print(json.dumps(result["products"][-1]), flush=True)
        save(options, "products.json", result)

    for sizes in options.shapes:
        (*lead, rows, columns), shape = sizes, "x".join(map(str, sizes))
        experts = lead[0] if lead else 0
        dense = torch.randn(rows, columns, device=DEVICE).bfloat16()
        plain = {}
        for batch in options.batches:
            x = torch.randn(batch, columns, device=DEVICE).bfloat16()
            plain[batch] = milliseconds(functools.partial(torch.nn.functional.linear, x, dense)) * (
                ROUTED if lead else 1
            )
        for name, make in families(rows, columns, experts).items():
            left = [batch for batch in options.batches if (name, shape, batch) not in done]
            if not left or (options.only and options.only not in name):
                continue
            weight = Weight(make())
            check(weight, name)
            for batch in left:
                if time.time() > until:
                    print("time is up; start again to go on", file=sys.stderr)
                    return result
                share = min(ROUTED, experts) / experts if experts else 1  # of the stack's bytes, those that are read
                own = milliseconds(product_of(weight, batch))
                note(name, shape, batch, own, int(weight.bytes_in_memory * share), plain[batch])
        if not experts and not options.only and not interpreted():
            for batch in options.batches:
                for name, product in peers(rows, columns, batch).items():
                    if (name, shape, batch) not in done and time.time() < until:
                        note(
                            name,
                            shape,
                            batch,
                            milliseconds(product),
                            rows * columns // (2 if "4" in name else 1),
                            plain[batch],
                        )
    return result


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
        "--shapes", default="4096x4096,4096x14336,8192x8192,8192x28672,64x1408x2048",
        type=lambda text: [tuple(int(size) for size in shape.split("x")) for shape in text.split(",")],
    )  # fmt: skip
    parser.add_argument(
        "--batches", default="1,4,16,64,512,4096", type=lambda text: [int(one) for one in text.split(",")]
    )
    parser.add_argument("--only", help="a part of a family's name")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--minutes", type=float, default=9, help="stop then; the next start goes on")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    until = time.time() + 60 * options.minutes
    if options.check_only or options.tune:
        tuned = stored(options, "tuned.json")
        for sizes in options.shapes:
            (*lead, rows, columns), options.shape = sizes, "x".join(map(str, sizes))
            for name, make in families(rows, columns, *lead).items():
                if (not options.only or options.only in name) and time.time() < until:
                    weight = Weight(make())
                    check(weight, name)
                    print(f"{name}, {options.shape}: agrees with the reference", flush=True)
                    if options.tune:
                        tune(weight, name, options, tuned, until)
        return
    result = measure(options, until)
    save(options, "products.json", result)
    (options.output / "products.md").write_text(markdown(result))


if __name__ == "__main__":
    main()
