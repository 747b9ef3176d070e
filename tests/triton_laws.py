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


# --- laws ------------------------------------------------------------------------------------------------------------------


def assert_close(ours: Tensor, wanted: Tensor, what: str) -> None:
    assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype), what
    error = (ours.cpu().float() - wanted.float()).abs().max().item()
    limit = TOLERANCE[wanted.dtype] * wanted.float().abs().max().item()
    assert error <= limit, f"{what}: differs by {error:.3g}, allowed {limit:.3g}"


def check(weight: Weight, counts: tuple[int, ...] = (1, 20), dtypes: Any = tuple(TOLERANCE)) -> None:
    """Products, and the weight itself, are what they were."""
    kernel = get("triton")
    assert kernel.refuses(weight, DEVICE) is None
    spec, tensors = kernel.prepare(weight.to(DEVICE))
    assert same(kernel.restore(spec, tensors).to("cpu"), weight)
    for count in counts:
        for dtype in dtypes:
            x, bias = numbers(count, weight.shape[-1], seed=count).to(dtype), numbers(weight.shape[-2]).to(dtype)
            own = None if dtype == torch.float16 else bias
            ours = kernel.linear(x.to(DEVICE), spec, tensors, None if own is None else own.to(DEVICE))
            assert_close(ours, multiply(weight, x, own), f"{count} rows, {dtype}, bias {own is not None}")


@pytest.mark.parametrize("name", WEIGHTS)
def test_products(name: str) -> None:
    check(Weight(WEIGHTS[name]()))


@pytest.mark.parametrize(
    "name", ["int4, zeros", "act-order", "cropped", "columns", "rotated inputs", "AQLM 2x8", "rows"]
)
def test_many_rows_and_gradients_go_by_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from anybit.kernels.triton import programs

    monkeypatch.setattr(programs, "MANY", 8)
    monkeypatch.setattr(programs, "PIECE", 16 * 64)
    weight = Weight(WEIGHTS[name]())
    check(weight, counts=(20,))
    kernel, reference = get("triton"), get("reference")
    spec, tensors = kernel.prepare(weight.to(DEVICE))
    for dtype in (torch.float32, torch.bfloat16):
        gradient = numbers(6, weight.shape[0]).to(dtype)
        assert_close(
            kernel.input_gradient(gradient.to(DEVICE), spec, tensors),
            reference.input_gradient(gradient, *reference.prepare(weight)),
            f"gradient in {dtype}",
        )


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("ends", [[0, 3, 3, 40, 41], [0, 0, 0, 0, 7], [41, 41, 41, 41, 41], [1, 2, 3, 4, 5]])
def test_experts_in_one_launch(bits: int, ends: list[int]) -> None:
    weight = Weight(grid(bits, 24, 64, 32, lead=(5,), zero="codes"))
    kernel, reference = get("triton"), get("reference")
    spec, tensors = kernel.prepare(weight.to(DEVICE))
    stops = torch.tensor(ends)
    for dtype in TOLERANCE:
        x = numbers(ends[-1], 64).to(dtype)
        ours = kernel.experts(x.to(DEVICE), stops.to(DEVICE), spec, tensors)
        assert_close(ours, reference.experts(x, stops, *reference.prepare(weight)), f"experts, {dtype}")


def test_columns_are_split_and_added_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from anybit.kernels.triton import programs
    from anybit.kernels.triton.tuning import Tile

    monkeypatch.setattr(programs, "tile_for", lambda count, *_: Tile(1 if count == 1 else 16, 16, 16, 3, 4, 2))
    check(Weight(grid(4, 40, 264, 8, zero="codes")), counts=(1, 5), dtypes=(torch.float32, torch.bfloat16))


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
            return check(weight, counts=(2,), dtypes=(torch.float32,))
    pytest.skip(
        "; ".join(str(kernel.refuses(unit.layout.decode(unit.tensors), DEVICE)) for unit in samples(Golden(folder)))[
            :200
        ]
    )
