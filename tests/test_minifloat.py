"""Rounding to small floats: every code, every tie, every neighbour of a tie, scales of every kind, filling of grids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from anybit.algorithms import minifloat
from anybit.errors import NotRepresentable
from anybit.weight import Activation, Codes, Grid, Transpose, Values, Weight
from anybit.weight.layout import meta

UP, DOWN = torch.tensor(torch.inf), torch.tensor(0.0)


def positive(levels: str) -> torch.Tensor:
    """The finite positive numbers of a format, in order."""
    exponent_bits, mantissa_bits, top = minifloat.FORMATS[levels]
    numbers = minifloat.numbers_of(torch.arange(1 << (exponent_bits + mantissa_bits), dtype=torch.uint8), levels)
    return numbers[numbers <= top]


@pytest.mark.parametrize("levels", minifloat.FORMATS)
def test_every_number_has_its_own_code(levels: str) -> None:
    exponent_bits, mantissa_bits, top = minifloat.FORMATS[levels]
    sign = 1 << (exponent_bits + mantissa_bits)
    numbers = positive(levels)
    own = torch.arange(len(numbers), dtype=torch.uint8)
    assert numbers[-1] == top
    assert torch.equal(minifloat.codes(numbers, levels), own)
    assert torch.equal(minifloat.codes(-numbers, levels), own | sign)
    beyond = torch.tensor([top * 1.01, 1e30, torch.inf])
    assert torch.equal(minifloat.codes(beyond, levels), own[-1:].expand(3))


@pytest.mark.parametrize("ties", ["even", "away", "zero"])
@pytest.mark.parametrize("levels", minifloat.FORMATS)
def test_ties_and_their_neighbours(levels: str, ties: str) -> None:
    numbers = positive(levels).double()
    middles = ((numbers[1:] + numbers[:-1]) / 2).float()
    below = torch.arange(len(middles))
    wanted = {"even": below + below % 2, "away": below + 1, "zero": below}[ties]
    for sign in (1, -1):
        codes = minifloat.codes(sign * middles, levels, ties)
        assert torch.equal(minifloat.numbers_of(codes, levels), sign * positive(levels)[wanted])
    assert torch.equal(minifloat.codes(torch.nextafter(middles, UP), levels, ties).long(), below + 1)
    assert torch.equal(minifloat.codes(torch.nextafter(middles, DOWN), levels, ties).long(), below)


@pytest.mark.parametrize(("levels", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_the_same_as_torchs_cast_of_what_fits(levels: str, dtype: torch.dtype) -> None:
    top = minifloat.FORMATS[levels][2]
    numbers = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * top / 3
    wanted = numbers.clamp(-top, top).to(dtype).view(torch.uint8)
    assert torch.equal(minifloat.codes(numbers, levels), wanted)


@pytest.mark.parametrize(("zeros", "wanted"), [("signed", [8, 8, 0]), ("below", [8, 0, 0]), ("plain", [0, 0, 0])])
def test_signs_of_zero(zeros: str, wanted: list[int]) -> None:
    assert minifloat.codes(torch.tensor([-0.1, -0.0, 0.0]), "e2m1", zeros=zeros).tolist() == wanted


def test_e4m3_saturates_and_keeps_nan() -> None:
    found = minifloat.e4m3(torch.tensor([464.1, -1e9, torch.inf, torch.nan, 432.0]))
    assert found.view(torch.uint8).tolist() == [0x7E, 0xFE, 0x7E, 0x7F, 0x7E]


@pytest.mark.parametrize(
    ("rounding", "wanted"),
    [
        ("floor", [127, 127, 127, 127, 127, 128, 0]),
        ("ceil", [127, 128, 128, 128, 128, 128, 0]),
        ("nearest", [127, 127, 128, 128, 128, 128, 0]),
        ("even_1", [127, 127, 127, 128, 128, 128, 0]),
        ("even_3", [127, 127, 127, 127, 128, 128, 0]),
    ],
)
def test_powers_of_two(rounding: str, wanted: list[int]) -> None:
    numbers = torch.tensor([1.0, 1.0000001, 1.5, 1.75, 1.9375, 2.0, 0.0])
    assert minifloat.e8m0(numbers, rounding).tolist() == wanted


def test_powers_of_two_and_back() -> None:
    bytes_ = torch.arange(255, dtype=torch.uint8)
    numbers = minifloat.e8m0_numbers(bytes_)
    assert torch.equal(numbers.double(), torch.exp2(bytes_.double() - 127))
    assert torch.equal(minifloat.e8m0(numbers, "floor"), bytes_)
    assert minifloat.e8m0_numbers(torch.tensor([255], dtype=torch.uint8)).isnan()
    assert minifloat.e8m0(torch.tensor([3e38]), "ceil") == 254  # 255 would be NaN


@pytest.mark.parametrize("block", [(4, 8), (1, 16), (3, 5), (100, 100), (1, 1)])
@pytest.mark.parametrize("chunk", [16, 1 << 18])
def test_largest_of_blocks(block: tuple[int, int], chunk: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(minifloat, "CHUNK", chunk)
    matrix = torch.randn(11, 23)
    found = minifloat.largest(matrix, block)
    down, across = min(block[0], 11), min(block[1], 23)
    for row in range(found.shape[0]):
        for column in range(found.shape[1]):
            part = matrix[row * down : (row + 1) * down, column * across : (column + 1) * across]
            assert found[row, column] == part.abs().max()


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_not_finite_is_named(number: float) -> None:
    matrix = torch.zeros(9, 9)
    matrix[7, 3] = number
    with pytest.raises(NotRepresentable, match="row 7, column 3"):
        minifloat.largest(matrix, (2, 2))


def by_six(largest: torch.Tensor) -> minifloat.Scales:
    return minifloat.Scales((largest / 6).masked_fill(largest == 0, 1.0))


def grid(rows: int, columns: int, block: tuple[int, int]) -> Grid:
    shape = (-(-rows // block[0]), -(-columns // block[1]))
    return Grid(Codes(meta("uint8", rows, (columns + 1) // 2), 4, columns), Values(meta("float32", *shape)), levels="e2m1",
                block=block)  # fmt: skip


@pytest.mark.parametrize("block", [(1, 16), (4, 8), (8, 24), (3, 5)])
@pytest.mark.parametrize("chunk", [16, 1 << 18])
def test_filling_takes_the_nearest_numbers(block: tuple[int, int], chunk: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(minifloat, "CHUNK", chunk)
    dense = torch.randn(8, 24, generator=torch.Generator().manual_seed(2))
    filled = minifloat.fill(dense, grid(8, 24, block), by_six)
    assert filled.scale is not None
    spread = filled.scale.dense().repeat_interleave(block[0], 0)[:8].repeat_interleave(block[1], 1)[:, :24]
    levels = torch.cat([positive("e2m1"), -positive("e2m1")])
    best = ((dense / spread)[..., None] - levels).abs().amin(-1) * spread
    assert torch.allclose((filled.dense() - dense).abs(), best, atol=1e-6)


def test_stacks_and_turned_grids_are_filled_matrix_by_matrix() -> None:
    dense = torch.randn(2, 24, 8)
    target = Weight(Transpose(replace(grid(8, 24, (1, 16)), codes=Codes(meta("uint8", 2, 8, 12), 4, 24),
                                      scale=Values(meta("float32", 2, 8, 2)))), "float32")  # fmt: skip
    weight = minifloat.quantize(dense, target, rule=by_six)
    for expert in range(2):
        own = minifloat.fill(dense[expert].T, grid(8, 24, (1, 16)), by_six)
        assert torch.equal(weight.select(expert).to_dense(), own.dense().T)


def test_what_it_cannot_fill_is_said() -> None:
    plain = Weight(grid(8, 24, (1, 16)), "float32")
    with pytest.raises(NotRepresentable, match="shape"):
        minifloat.quantize(torch.zeros(8, 25), plain, rule=by_six)
    static = replace(plain, activation=Activation("e4m3_static", names=("s",), tensors=(meta("float32"),)))
    with pytest.raises(NotRepresentable, match="static input scales"):
        minifloat.quantize(torch.zeros(8, 24), static, rule=by_six)
    integers = Weight(replace(grid(8, 24, (1, 16)), levels=None), "float32")
    with pytest.raises(NotRepresentable, match="e2m1"):
        minifloat.quantize(torch.zeros(8, 24), integers, rule=by_six)
    with pytest.raises(NotRepresentable, match="two levels"):
        minifloat.quantize(torch.zeros(8, 24), plain, rule=lambda top: minifloat.Scales(top, common=torch.tensor(1.0)))
    with pytest.raises(ValueError, match="ties"):
        minifloat.codes(torch.zeros(1), "e2m1", ties="up")
    with pytest.raises(ValueError, match="zeros"):
        minifloat.codes(torch.zeros(1), "e2m1", zeros="none")
