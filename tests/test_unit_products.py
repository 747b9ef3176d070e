"""Products of codes by codes on units for them: the same numbers as a product of what the codes stand for, at any size."""

from __future__ import annotations

import pytest
import torch

from anybit.weight import float8_products, integer_products, nodes

SEED = torch.Generator().manual_seed(0)


def e4m3(*shape: int) -> torch.Tensor:
    return (torch.randn(shape, generator=SEED) * 40).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 16, 32), (7, 24, 40), (40, 17, 33), (64, 48, 128)])
def test_e4m3_by_e4m3(rows: int, outputs: int, inputs: int) -> None:
    """torch's product on this machine, sizes that it refuses filled up. Sums of products of 4-bit mantissas: 1e-5 of the largest."""
    left, right = e4m3(rows, inputs), e4m3(outputs, inputs)
    try:
        found = float8_products.multiplied(left, right)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch has no product of 8-bit floats here: {error}")
    wanted = left.double() @ right.double().t()
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_scales_of_rows_and_of_all() -> None:
    codes, numbers = e4m3(32, 64), e4m3(5, 64)
    stored = nodes.Codes(codes.view(torch.uint8), 8, 64)
    rows = torch.rand(32, 1, generator=SEED) + 0.5
    for scale in (nodes.Values(rows), nodes.Values(rows, inverted=True), nodes.Values(rows[:1])):
        tree = nodes.Grid(stored, scale, levels="e4m3", block=(1, 64) if scale.shape[0] > 1 else (32, 64))
        try:
            found = float8_products.scaled_product(nodes.Rows((tree, tree)), numbers)
        except (RuntimeError, NotImplementedError) as error:
            pytest.skip(f"torch has no product of 8-bit floats here: {error}")
        wanted = numbers.float() @ tree.dense().t()
        assert found is not None
        torch.testing.assert_close(found, torch.cat([wanted, wanted], 1), rtol=1e-5, atol=1e-2)
    blocks = nodes.Grid(stored, nodes.Values(torch.ones(2, 2)), levels="e4m3", block=(16, 32))
    assert float8_products.scaled_product(blocks, numbers) is None


def test_why_there_are_no_units() -> None:
    assert "cpu" in str(float8_products.why_not(torch.device("cpu")))


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 8, 16), (1, 9, 15), (16, 24, 40), (17, 33, 1030), (64, 16, 24)]
)
def test_integers_within_the_limits_of_gpus(rows: int, outputs: int, inputs: int) -> None:
    """What a GPU's product is given has at least 17 rows, and inputs and outputs by eights; the numbers stay exact."""
    left = torch.randint(-128, 128, (rows, inputs), generator=SEED, dtype=torch.int8)
    right = torch.randint(-128, 128, (outputs, inputs), generator=SEED, dtype=torch.int8)
    shapes = []

    def product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        shapes.append((*one.shape, other.shape[1]))
        return (one.double() @ other.double()).to(torch.int32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integer_products.torch, "_int_mm", product)
        found = integer_products._filled_product(left, right)
    assert torch.equal(found, (left.double() @ right.double().t()).to(torch.int32))
    ((m, k, n),) = shapes
    assert m >= 17
    assert k % 8 == 0
    assert n % 8 == 0
