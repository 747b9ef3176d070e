"""Sums of products of 8-bit integers are exact, on whatever unit adds them; expected numbers are 64-bit integers' own."""

import pytest
import torch
from torch import Tensor

import anybit.methods._torchao_inputs  # noqa: F401  registers its rules
from anybit import kernels
from anybit.kernels import registry
from anybit.weight import Weight, integer_products, nodes
from anybit.weight.activation import Activation

SHAPES = [(1, 1, 1), (1, 8, 64), (3, 7, 33), (17, 24, 1024), (40, 5, 1025), (2, 16, 5632)]


def codes(rows: int, columns: int, seed: int) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    found = torch.randint(-128, 128, (rows, columns), generator=numbers, dtype=torch.int8)
    found[0] = -128  # the largest sums there are
    return found


def wanted(left: Tensor, right: Tensor) -> Tensor:
    return (left.long() @ right.long().t()).to(torch.int32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("own", [True, False], ids=["torch's integers", "floats"])
def test_sums_are_exact(shape: tuple[int, int, int], own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, rows, columns = shape
    left, right = codes(tokens, columns, 1), codes(rows, columns, 2)
    if not own:
        monkeypatch.setattr(integer_products, "_is_exact", lambda device: False)
    assert torch.equal(integer_products.exact_product(left, right), wanted(left, right))


def test_a_product_that_saturates_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(left: Tensor, right: Tensor) -> Tensor:
        return (left.long() @ right.long()).clamp(-(2**15), 2**15 - 1).to(torch.int32)

    integer_products._is_exact.cache_clear()
    monkeypatch.setattr(integer_products.torch, "_int_mm", saturating)
    try:
        left, right = codes(20, 64, 1), codes(8, 64, 2)
        assert torch.equal(integer_products.exact_product(left, right), wanted(left, right))
        assert not integer_products._is_exact(torch.device("cpu"))
    finally:
        integer_products._is_exact.cache_clear()


def test_kernels_hand_integers_to_it_and_others_to_floats() -> None:
    """A rule that gives int8 gets exact sums times the scales; a weight of another form is multiplied as numbers."""
    inputs, left = codes(9, 64, 1), codes(12, 64, 2)
    scales = torch.rand(12, 1) + 0.5
    rows = nodes.Grid(nodes.Codes.of(left, 8, signed=True), nodes.Values(scales))
    found = integer_products.scaled_product(nodes.Rows((rows, rows)), inputs)
    assert found is not None
    assert torch.equal(found, (wanted(inputs, left).to(torch.float32) * scales.t()).repeat(1, 2))
    groups = nodes.Grid(nodes.Codes.of(left, 8, signed=True), nodes.Values(torch.ones(12, 2)), block=(1, 32))
    assert integer_products.scaled_product(groups, inputs) is None
    for tree in (rows, groups):
        weight = Weight(tree, activation=Activation("torchao_int8"))
        x = torch.randn(9, 64)
        kernel = registry.choose(weight, "cpu").kernel
        spec, tensors = kernel.prepare(weight)
        reference = kernels.get("reference")
        expected = reference.linear(x, *reference.prepare(weight), None)
        assert torch.allclose(kernel.linear(x, spec, tensors, None), expected, rtol=1e-5, atol=1e-4)
