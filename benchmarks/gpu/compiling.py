"""Compiles the Triton kernels for cards that nobody has here, and says what a compiler can say of them.

    python benchmarks/gpu/compiling.py [--target 90] [--only nf4] [-o FOLDER]

Per family and tile of kernels/triton/tuning.json: registers, bytes spilled, shared memory, and machine instructions of the inner
loop for each weight. The last says what is possible: an H200 issues 128 lanes x 132 processors x 1.75 GHz = 30e12 of them a
second, and reads 4.3e12 bytes; so 4-bit codes at its full speed leave 3.4 instructions for a weight, 8-bit codes 6.9.
Nothing runs; no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from anybit.kernels import get
from anybit.kernels._programs import form_of
from anybit.kernels.triton import tuning
from anybit.kernels.triton.programs import Leaf
from anybit.weight import Weight, nodes
from anybit.weight.packing import row_bytes

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int8: "*i8",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ROWS, COLUMNS = 4096, 4096


@dataclass
class Compiled:
    """What became of one launch."""

    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    loop: int  # instructions of the longest loop; 0 where the target's code is not read
    code: str


def target_of(name: str) -> GPUTarget:
    """ "90" or "gfx942"."""
    return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name), 32)


def compiled(function: Any, arguments: dict[str, Any], target: GPUTarget, warps: int, stages: int) -> Compiled:
    """As a launch with these arguments would compile it: pointers and sizes that divide by 16 are known to."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for number, parameter in enumerate(function.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or (not isinstance(value, Tensor) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    found = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    shared = found.metadata.shared
    if target.backend == "hip":
        text = found.asm["amdgcn"]
        numbers = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count): +(\d+)", text)}
        return Compiled(numbers["vgpr_count"], 4 * numbers["vgpr_spill_count"], shared, 0, text)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "--dump-resource-usage", file.name)
        text = _output("nvdisasm", "-c", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Compiled(numbers["REG"], numbers["STACK"], shared, _longest_loop(text), text)


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _longest_loop(text: str) -> int:
    labels: dict[str, int] = {}
    longest = number = 0
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = number
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            number += 1
            jump = re.search(r"BRA.*`\((\.L_\w+)\)", instruction[1])
            if jump and jump[1] in labels:
                longest = max(longest, number - labels[jump[1]])
    return longest


def families() -> dict[str, Callable[[], nodes.Node]]:
    """Trees of common methods over zeros."""

    def codes(bits: int, width: int = COLUMNS, signed: bool = False) -> nodes.Codes:
        return nodes.Codes(torch.zeros(ROWS, row_bytes(width, bits), dtype=torch.uint8), bits, width, signed)

    def scales(group: int, dtype: torch.dtype = torch.float16) -> nodes.Values:
        return nodes.Values(torch.ones(ROWS, COLUMNS // group, dtype=dtype))

    def nested(bits: int, group: int, over: int) -> nodes.Grid:
        width = COLUMNS // group
        return nodes.Grid(codes(bits, width), nodes.Values(torch.ones(ROWS, width // over).half()), block=(1, over))

    row = nodes.Values(torch.ones(ROWS, 1))
    powers = nodes.Values(torch.zeros(ROWS, COLUMNS // 32, dtype=torch.uint8), levels="e8m0")
    return {
        "int4 g128": lambda: nodes.Grid(codes(4), scales(128), codes(4, COLUMNS // 128), block=(1, 128)),
        "int4 g32": lambda: nodes.Grid(codes(4), scales(32), block=(1, 32)),
        "nf4": lambda: nodes.Grid(codes(4), scales(64, torch.float32), levels="nf4", block=(1, 64)),
        "mxfp4": lambda: nodes.Grid(codes(4), powers, levels="e2m1", block=(1, 32)),
        "q4_K": lambda: nodes.Grid(codes(4), nested(6, 32, 8), None, nested(6, 32, 8), block=(1, 32)),
        "q6_K": lambda: nodes.Grid(codes(6, signed=True), nested(8, 16, 16), block=(1, 16)),
        "int8 rows": lambda: nodes.Grid(codes(8, signed=True), row, block=(1, COLUMNS)),
        "fp8 rows": lambda: nodes.Grid(codes(8), row, levels="e4m3", block=(1, COLUMNS)),
        "fp8 blocks": lambda: nodes.Grid(
            codes(8), nodes.Values(torch.ones(ROWS // 128, COLUMNS // 128)), levels="e4m3", block=(128, 128)
        ),
        "int1 g128": lambda: nodes.Grid(codes(1), scales(128), scales(128), block=(1, 128)),
        "int2 g64": lambda: nodes.Grid(codes(2), scales(64), codes(2, COLUMNS // 64), block=(1, 64)),
        "int3 g128": lambda: nodes.Grid(codes(3), scales(128), codes(3, COLUMNS // 128), block=(1, 128)),
        "hqq (bfloat16 arithmetic)": lambda: nodes.Grid(
            codes(4), scales(64, torch.bfloat16), scales(64, torch.bfloat16), block=(1, 64), compute="bfloat16"
        ),
        "aqlm 1x16": lambda: nodes.Codebook(
            codes(16, COLUMNS // 8), torch.zeros(1, 1 << 16, 1, 8).half(), (1, 8), row, block=(1, COLUMNS)
        ),
        "iq2_xxs": lambda: nodes.Codebook(
            codes(8, COLUMNS // 8), "iq2_xxs", (1, 8), scales(32),
            nodes.Codebook(codes(7, COLUMNS // 8), "even_signs", (1, 8)), (1, 32),
        ),
    }  # fmt: skip


def launches(leaf: Leaf, card: str | None) -> list[tuple[int, tuple[int, int], tuple[int, int, int]]]:
    """(rows of x, (inputs, rows) of the tile, (runs, warps, stages)) of every entry of the table that such a leaf takes."""
    found = []
    for count in (1, 8, 16, 32, 64):
        for entry in tuning.entries():
            fits = entry["form"] == leaf.form and entry["itemsize"] in (None, 2)
            fits = fits and (entry["card"] is None or (card or "").startswith(entry["card"]))
            if fits and leaf.bits in (entry["bits"] or (leaf.bits,)) and count <= (entry["count"] or count):
                launch = (count, (entry["inputs"], entry["rows"]), (entry["runs"], entry["warps"], entry["stages"]))
                if launch[1:] not in [one[1:] for one in found]:
                    found.append(launch)
                break
    return found


def compile_family(node: nodes.Node, name: str, dtype: torch.dtype = torch.bfloat16) -> list[dict[str, Any]]:
    """Every launch of one weight for the target `name`, and its decoding."""
    kernel: Any = get("triton")
    weight = Weight(node)
    spec, tensors = kernel.prepare(weight)
    leaf: Any = form_of(kernel, spec).program
    card = name if name.startswith("gfx") else f"{name[:-1]}.{name[-1]}"
    found = []
    for count, (inputs, rows), (runs, warps, stages) in launches(leaf, card):
        tile = tuning.Tile(inputs, rows, runs, 4, warps, stages)
        x = torch.empty(count, weight.shape[1], dtype=dtype)
        y = torch.empty(4, count, weight.shape[0])
        one = compiled(
            leaf.product_function(), leaf.arguments(x, tensors, None, y, tile, 4, None), target_of(name), warps, stages
        )
        weights = rows * (leaf.per if leaf.form == "planes" else runs * leaf.per)
        found.append({
            "form": leaf.form, "inputs": inputs, "rows": rows, "warps": warps, "registers": one.registers,
            "spilled": one.spilled, "shared": one.shared, "per_weight": round(one.loop * warps * 32 / weights, 2),
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="90", help='"80", "86", "90", "gfx942"')
    parser.add_argument("--only", default="", help="a part of a family's name")
    parser.add_argument("-o", "--output", type=Path, help="a folder for compiled.json and compiled.md")
    options = parser.parse_args()
    rows = []
    for name, make in families().items():
        if options.only in name:
            for one in compile_family(make(), options.target):
                rows.append({"family": name, **one})
                print(json.dumps(rows[-1]), flush=True)
    if options.output:
        head = f"Triton {triton.__version__}, target {options.target}, {ROWS} x {COLUMNS}, bfloat16. Compiled, never run.\n\n"
        head += "| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|\n"
        text = head + "".join("| " + " | ".join(str(value) for value in row.values()) + " |\n" for row in rows)
        (options.output / "compiled.md").write_text(text)
        (options.output / "compiled.json").write_text(json.dumps({"triton": triton.__version__, "target": options.target,
                                                                  "launches": rows}, indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
