"""Triton kernels against the reference kernel: on a GPU, or in Triton's interpreter. Run by test_triton_kernels.py.

Directly: [TRITON_INTERPRET=1] python -m pytest tests/triton_laws.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anybit.kernels import get
from anybit.kernels.reference import multiply
from anybit.testing.goldens import Golden, samples
from anybit.weight import Weight, nodes
from anybit.weight.activation import RULES
from anybit.weight.weight import same

GOLDEN = Path(__file__).parent / "golden"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# relative to the largest output: order of summation; two roundings of a half-width output, weights rounded to its dtype
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}

# --- weights ---------------------------------------------------------------------------------------------------------------


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def grid(bits: int, rows: int, columns: int, group: int, lead: tuple[int, ...] = (), **options: Any) -> nodes.Grid:
    """Random codes with positive scales; `zero`, `offset`: "codes" or "numbers"."""
    shape = (*lead, rows, -(-columns // group))
    dtype = options.pop("dtype", torch.float32)
    parts: dict[str, Any] = {"scale": nodes.Values((numbers(*shape).abs() + 0.1).to(dtype))}
    for name in ("zero", "offset"):
        kind = options.pop(name, None)
        if kind == "codes":
            parts[name] = nodes.Codes.of(integers(1 << bits, *shape, seed=2), bits)
        elif kind == "numbers":
            parts[name] = nodes.Values(numbers(*shape, seed=3).to(dtype))
    codes = nodes.Codes.of(integers(1 << bits, *lead, rows, columns), bits, options.pop("signed", False))
    return nodes.Grid(codes, block=(1, group), **parts, **options)


def fp8(dtype: torch.dtype, levels: str) -> nodes.Grid:
    return replace(
        grid(8, 16, 64, 64),
        codes=nodes.Codes((numbers(16, 64) * 50).to(dtype).view(torch.uint8), 8, 64),
        levels=levels,
    )


def codebook(bits: int, books: int, vector: tuple[int, int], rows: int, columns: int, **options: Any) -> nodes.Codebook:
    high, wide = vector
    codes = nodes.Codes.of(integers(1 << bits, rows // high, columns // wide * books), bits)
    tables = numbers(books, 1 << bits, high, wide)
    return nodes.Codebook(codes, tables, vector, nodes.Values(numbers(rows, 1, seed=4)), block=(1, columns), **options)


WEIGHTS = {
    **{f"{bits} bits": lambda bits=bits: grid(bits, 17, 104, 8, signed=bits > 1) for bits in range(1, 9)},
    "int4, zeros": lambda: grid(4, 40, 128, 32, zero="codes", dtype=torch.float16),
    "int4, one group": lambda: grid(4, 33, 96, 96, zero="numbers"),
    "int4, bfloat16 arithmetic, offsets": lambda: grid(
        4, 16, 128, 64, offset="numbers", dtype=torch.bfloat16, compute="bfloat16"
    ),
    "int2, float16 arithmetic": lambda: grid(2, 16, 128, 32, zero="numbers", dtype=torch.float16, compute="float16"),
    "NF4": lambda: grid(4, 33, 128, 64, levels="nf4"),
    "stored table": lambda: grid(3, 16, 64, 64, levels=numbers(8)),
    "MXFP4": lambda: nodes.Grid(
        nodes.Codes.of(integers(16, 16, 64), 4),
        nodes.Values(integers(8, 16, 2).add(121).to(torch.uint8), levels="e8m0"),
        levels="e2m1",
        block=(1, 32),
    ),
    "E4M3": lambda: fp8(torch.float8_e4m3fn, "e4m3"),
    "E5M2": lambda: fp8(torch.float8_e5m2, "e5m2"),
    "act-order": lambda: replace(
        grid(4, 24, 128, 32, zero="codes"), group_index=integers(4, 128, seed=5).to(torch.int32)
    ),
    "permuted": lambda: nodes.Permute(
        grid(4, 16, 64, 16), torch.randperm(64, generator=torch.Generator().manual_seed(0)).int()
    ),
    "cropped": lambda: nodes.Crop(grid(4, 24, 128, 32), 13, 100),
    "rows": lambda: nodes.Rows((grid(4, 16, 64, 32), grid(3, 8, 64, 64))),
    "columns": lambda: nodes.Columns((grid(4, 16, 64, 32), grid(8, 16, 32, 32))),
    "sum": lambda: nodes.Sum((grid(4, 16, 64, 32), grid(2, 16, 64, 64))),
    "rotated inputs": lambda: nodes.Rotate(grid(4, 16, 64, 32), 32),
    "rotated outputs": lambda: nodes.Rotate(grid(4, 16, 64, 32), 8, "output", numbers(8, 8)),
    "scaled inputs": lambda: nodes.Scaled(grid(4, 16, 64, 32), nodes.Values(numbers(1, 64))),
    "scaled outputs": lambda: nodes.Scaled(grid(8, 16, 64, 64), nodes.Values(numbers(16, 1).abs() + 1, inverted=True)),
    "AQLM 2x8": lambda: codebook(8, 2, (1, 8), 16, 64),
    "AQLM 1x12, float16": lambda: codebook(12, 1, (1, 8), 16, 64, compute="float16"),
    "VPTQ: vectors of outputs": lambda: codebook(6, 1, (4, 1), 16, 64),
    "HIGGS": lambda: nodes.Crop(nodes.Rotate(codebook(4, 1, (1, 2), 16, 64), 64), 16, 60),
    "IQ2_XXS": lambda: nodes.Codebook(
        nodes.Codes.of(integers(256, 16, 32), 8), "iq2_xxs", (1, 8),
        nodes.Values(numbers(16, 8)), nodes.Codebook(nodes.Codes.of(integers(128, 16, 32), 7), "even_signs", (1, 8)), (1, 32),
    ),
}  # fmt: skip


def nested(rows: int, columns: int, group: int) -> nodes.Grid:
    """Scales that are 6-bit codes below a scale of their own, as in k-quants."""
    return nodes.Grid(
        nodes.Codes.of(integers(64, rows, columns // group, seed=6), 6), nodes.Values(numbers(rows, columns // group // 8).half()),
        block=(1, 8),
    )  # fmt: skip


def doubly_quantized(rows: int, columns: int) -> nodes.View:
    """NF4 with 8-bit scales below a table and an offset, as bitsandbytes writes them."""
    count = rows * columns // 64
    levels = numbers(256, seed=7).sort().values
    scales = nodes.Grid(
        nodes.Codes.of(integers(256, 1, count, seed=8), 8), nodes.Values(numbers(1, -(-count // 256)).abs() + 0.1), None,
        nodes.Values(torch.full((1, 1), 0.5)), levels=levels, block=(1, 256),
    )  # fmt: skip
    codes = nodes.Codes.of(integers(16, count, 64), 4)
    return nodes.View(nodes.Grid(codes, nodes.View(scales, count, 1), levels="nf4", block=(1, 64)), rows, columns)


# codes that lie in planes: whole blocks of columns, or a last block that is filled up
PLANES = {
    **{f"{bits} bits in planes": lambda bits=bits: grid(bits, 20, 512, 128, zero="codes") for bits in range(1, 9)},
    **{f"{bits} signed bits": lambda bits=bits: grid(bits, 17, 512, 32, signed=True, dtype=torch.float16) for bits in (2, 3, 8)},
    "int4, groups of 16, offsets": lambda: grid(4, 33, 256, 16, offset="numbers"),
    "int4, group across blocks": lambda: grid(4, 16, 512, 256, zero="numbers"),
    "int4, short": lambda: grid(4, 16, 480, 32, zero="codes"),
    "int4, one scale a row": lambda: grid(4, 16, 256, 256, zero="codes"),
    "int4, act-order": lambda: replace(
        grid(4, 24, 256, 32, zero="codes"), group_index=torch.arange(256).remainder(8).to(torch.int32)
    ),
    "int4, cropped": lambda: nodes.Crop(grid(4, 24, 256, 32), 13, 250),
    "NF4 in planes": lambda: grid(4, 33, 256, 64, levels="nf4"),
    "3-bit table": lambda: grid(3, 16, 512, 64, levels=numbers(8)),
    "NF4, nested scales": lambda: doubly_quantized(32, 512),
    "Q4_K": lambda: nodes.Grid(
        nodes.Codes.of(integers(16, 16, 256), 4), nested(16, 256, 32), None, nested(16, 256, 32), block=(1, 32)
    ),
    "Q6_K": lambda: nodes.Grid(
        nodes.Codes.of(integers(64, 16, 256), 6, True),
        nodes.Grid(nodes.Codes.of(integers(256, 16, 16), 8, True), nodes.Values(numbers(16, 1).half() / 64), block=(1, 16)),
        block=(1, 16),
    ),
    "MXFP4 in planes": lambda: nodes.Grid(
        nodes.Codes.of(integers(16, 16, 256), 4),
        nodes.Values(integers(8, 16, 8).add(121).to(torch.uint8), levels="e8m0"),
        levels="e2m1",
        block=(1, 32),
    ),
    "E4M3, blocks": lambda: nodes.Grid(
        nodes.Codes((numbers(16, 256) * 50).to(torch.float8_e4m3fn).view(torch.uint8), 8, 256),
        nodes.Values(numbers(2, 4).abs() + 0.1), levels="e4m3", block=(8, 64),
    ),
    "E5M2, rows": lambda: nodes.Grid(
        nodes.Codes((numbers(16, 128) * 50).to(torch.float8_e5m2).view(torch.uint8), 8, 128),
        nodes.Values(numbers(16, 1).abs() + 0.1, inverted=True), levels="e5m2", block=(1, 128),
    ),
}  # fmt: skip
WEIGHTS |= PLANES


def outliers(rows: int, columns: int) -> nodes.Sparse:
    """One number in twenty."""
    full = torch.where(numbers(rows, columns, seed=9) > 1.6, numbers(rows, columns, seed=10), 0.0)
    full[1] = 0
    row, column = full.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(row, minlength=rows).cumsum(0)]).to(
        torch.int32
    )
    return nodes.Sparse(offsets, column.to(torch.int32), nodes.Values(full[row, column][None].half()), columns)


WEIGHTS["outliers"] = lambda: nodes.Sum((grid(4, 16, 256, 32), outliers(16, 256)))
WEIGHTS["SpQR"] = lambda: nodes.Permute(
    nodes.Sum((grid(3, 16, 512, 16, zero="numbers", compute="float16"), outliers(16, 512)), "float16"),
    torch.randperm(512, generator=torch.Generator().manual_seed(0)).int(),
)

# --- laws ------------------------------------------------------------------------------------------------------------------


def assert_close(ours: Tensor, wanted: Tensor, what: str) -> None:
    assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype), what
    error = (ours.cpu().float() - wanted.float()).abs().max().item()
    limit = TOLERANCE[wanted.dtype] * wanted.float().abs().max().item()
    assert error <= limit, f"{what}: differs by {error:.3g}, allowed {limit:.3g}"


RUNS = ((1, torch.bfloat16), (20, torch.float16), (1, torch.float32), (20, torch.bfloat16))


def check(weight: Weight, runs: Any = RUNS) -> None:
    """Products, and the weight itself, are what they were."""
    kernel = get("triton")
    assert kernel.refuses(weight, DEVICE) is None
    spec, tensors = kernel.prepare(weight.to(DEVICE))
    assert same(kernel.restore(spec, tensors).to("cpu"), weight)
    for count, dtype in runs:
        x, bias = numbers(count, weight.shape[-1], seed=count).to(dtype), numbers(weight.shape[-2]).to(dtype)
        own = None if dtype == torch.float16 else bias
        ours = kernel.linear(x.to(DEVICE), spec, tensors, None if own is None else own.to(DEVICE))
        assert_close(ours, multiply(weight, x, own), f"{count} rows, {dtype}, bias {own is not None}")


@pytest.mark.parametrize("name", WEIGHTS)
def test_products(name: str) -> None:
    check(Weight(WEIGHTS[name]()))


@pytest.mark.parametrize(
    "name",
    ["act-order", "cropped", "columns", "rotated inputs", "AQLM 2x8", "int4, act-order", "int4, short", "outliers"],
)
def test_many_rows_and_gradients_go_by_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from anybit.kernels.triton import programs

    monkeypatch.setattr(programs, "many", lambda *_: 8)
    monkeypatch.setattr(programs, "PIECE", 16 * 64)
    weight = Weight(WEIGHTS[name]())
    check(weight, ((20, torch.float32), (20, torch.bfloat16)))
    kernel, reference = get("triton"), get("reference")
    spec, tensors = kernel.prepare(weight.to(DEVICE))
    for dtype in (torch.float32, torch.bfloat16):
        gradient = numbers(6, weight.shape[0]).to(dtype)
        assert_close(
            kernel.input_gradient(gradient.to(DEVICE), spec, tensors),
            reference.input_gradient(gradient, *reference.prepare(weight)),
            f"gradient in {dtype}",
        )


@pytest.mark.parametrize("columns", [96, 128])
@pytest.mark.parametrize("ends", [[0, 3, 3, 40, 41], [0, 0, 0, 0, 7], [41, 41, 41, 41, 41], [1, 2, 3, 4, 5]])
def test_experts_in_one_launch(columns: int, ends: list[int]) -> None:
    weight = Weight(grid(4, 24, columns, 32, lead=(5,), zero="codes"))
    kernel, reference = get("triton"), get("reference")
    spec, tensors = kernel.prepare(weight.to(DEVICE))
    stops = torch.tensor(ends)
    for dtype in (torch.float16, torch.bfloat16):
        x = numbers(ends[-1], columns).to(dtype)
        ours = kernel.experts(x.to(DEVICE), stops.to(DEVICE), spec, tensors)
        assert_close(ours, reference.experts(x, stops, *reference.prepare(weight)), f"experts, {dtype}")


@pytest.mark.parametrize("columns", [264, 384, 640])
def test_columns_are_split_and_added_in_order(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from anybit.kernels.triton import programs
    from anybit.kernels.triton.tuning import Tile

    monkeypatch.setattr(programs, "tile_for", lambda count, *_: Tile(1 if count == 1 else 16, 16, 16, 3, 4, 2))
    check(
        Weight(grid(4, 40, columns, 8 if columns == 264 else 32, zero="codes")),
        ((1, torch.float32), (5, torch.bfloat16)),
    )


def test_rows_of_planes_are_looked_up() -> None:
    """An embedding: rows by their numbers, some twice, without the rest of the weight."""
    kernel = get("triton")
    for name in ("int4, short", "int4, act-order", "Q6_K"):
        weight, index = Weight(WEIGHTS[name]()), torch.tensor([3, 0, 15, 3])
        found = kernel.take_rows(index.to(DEVICE), *kernel.prepare(weight.to(DEVICE)))
        assert_close(found, weight.tree.take_rows(index), name)


@pytest.mark.parametrize("folder", sorted(path for path in GOLDEN.glob("*/*") if (path / "reference.safetensors").exists()),
                         ids=lambda path: f"{path.parent.name}-{path.name}")  # fmt: skip
def test_vendors_weights(folder: Path) -> None:
    """One weight of every golden that a program exists for, with its own activation arithmetic."""
    kernel = get("triton")
    for unit in samples(Golden(folder)):
        weight = unit.layout.decode(unit.tensors)
        weight = weight.select(0) if len(weight.shape) == 3 else weight
        weight = Weight(weight.tree, weight.dtype, weight.activation)
        if kernel.refuses(weight, DEVICE) is None and (weight.activation is None or weight.activation.rule in RULES):
            return check(weight, ((2, torch.float32),))
    pytest.skip(
        "; ".join(str(kernel.refuses(unit.layout.decode(unit.tensors), DEVICE)) for unit in samples(Golden(folder)))[
            :200
        ]
    )


@pytest.mark.parametrize("name", ["e4m3_token", "int8_static"])
def test_codes_of_inputs_meet_codes_of_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules hand over codes where a device multiplies them, and the weight they see has its codes as they were stored."""
    from anybit.methods import _activations
    from anybit.weight import float8_products
    from anybit.weight.activation import Activation

    assert name in RULES
    if DEVICE.type == "cpu":  # torch's product there, as if it were a GPU's
        monkeypatch.setattr(float8_products, "why_not", lambda device: None)
    assert _activations.float8_products is float8_products
    static = (torch.tensor(0.02),) if name == "int8_static" else ()
    activation = Activation(name, names=("input_scale",) * len(static), tensors=static)
    tree = grid(8, 16, 64, 64, signed=True) if static else fp8(torch.float8_e4m3fn, "e4m3")
    check(Weight(tree, activation=activation), ((3, torch.bfloat16),))


def test_rules_see_no_codes_in_planes() -> None:
    """An input rule of a 4-bit weight costs no restoring of codes: they are nowhere but in planes."""
    from anybit.weight.activation import Activation

    weight = Weight(grid(4, 16, 256, 32), activation=Activation("mx_e4m3", "e4m3", "group", 32))
    kernel: Any = get("triton")
    spec, tensors = kernel.prepare(weight.to(DEVICE))
    assert [tensor.device.type for tensor in kernel.seen_by_rules(spec, tensors).tensors].count("meta") == 1
    check(weight, ((2, torch.bfloat16),))
