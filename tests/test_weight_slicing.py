"""Cutting and joining weights never changes a number."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_weight_nodes import assert_equal, part_of

from anybit.errors import NotRepresentable
from anybit.kernels.reference import multiply
from anybit.testing import strategies
from anybit.weight import nodes
from anybit.weight.activation import Activation, activation_rule
from anybit.weight.joining import join_rows, split_rows, stack, unstack
from anybit.weight.slicing import slice_columns, slice_rows
from anybit.weight.weight import Weight, same

bounded = settings(max_examples=100, deadline=None)


@bounded
@given(st.data(), st.sampled_from((0, 1)))
def test_a_slice_has_the_numbers_of_its_place(data: st.DataObject, axis: int) -> None:
    weight = data.draw(strategies.weights())
    cut = (slice_rows, slice_columns)[axis]
    start, stop = data.draw(part_of(weight.shape[axis]))
    try:
        part = cut(weight, start, stop)
    except NotRepresentable as error:
        if "cut at" not in str(error) and "dequantize" not in str(error):
            pytest.fail(f"no cure in {error}")
        multiple = re.search(r"multiples of (\d+), or", str(error))
        if multiple is None:
            return
        start, stop = int(multiple[1]), min(2 * int(multiple[1]), weight.shape[axis])
        part = cut(weight, start, stop)  # what the message promises
    wanted = weight.tree.dense().narrow(axis, start, stop - start)
    assert part.dtype == weight.dtype
    assert_equal(part.tree.dense(), wanted, weight.tree)
    assert part.shape == wanted.shape


@bounded
@given(st.data(), st.sampled_from((0, 1)))
def test_a_grid_is_cut_at_every_block(data: st.DataObject, axis: int) -> None:
    """No NotRepresentable where the design promises a cut."""
    node = data.draw(strategies.grids(12, 12, depth=0))
    block = node.block[axis]
    start = data.draw(st.integers(0, 11 // block)) * block
    stop = data.draw(st.integers(start + 1, 12))
    part = (slice_rows, slice_columns)[axis](Weight(node), start, stop)
    assert torch.equal(part.tree.dense().nan_to_num(), node.dense().narrow(axis, start, stop - start).nan_to_num())


def grid(rows: int, columns: int, block: tuple[int, int], seed: int = 0) -> nodes.Grid:
    generator = torch.Generator().manual_seed(seed)
    codes = nodes.Codes.of(torch.randint(0, 16, (rows, columns), generator=generator), 4)
    return nodes.Grid(
        codes, nodes.Values(torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=generator)), block=block
    )


def test_the_error_says_where_a_cut_is_possible() -> None:
    weight = Weight(grid(256, 64, (128, 64)))
    with pytest.raises(NotRepresentable, match=r"rows 64\.\.256 .* multiples of 128"):
        slice_rows(weight, 64, 256)
    assert torch.equal(slice_rows(weight, 128, 256).to_dense(), weight.to_dense()[128:])
    assert torch.equal(slice_rows(weight, 130, 140).to_dense(), weight.to_dense()[130:140])  # inside one block
    for start, stop in ((3, 3), (-1, 5), (0, 257)):
        with pytest.raises(NotRepresentable, match=r"choose a range inside 0\.\.256"):
            slice_rows(weight, start, stop)


def test_flattened_groups_are_cut_where_they_end() -> None:
    """bitsandbytes' form: runs of 64 over the flattened weight, scales quantized in runs of 4 of these."""
    generator = torch.Generator().manual_seed(3)
    scale = nodes.Grid(
        nodes.Codes.of(torch.randint(0, 256, (8, 4), generator=generator), 8),
        nodes.Values(torch.rand(8, 1)),
        block=(1, 4),
    )
    flat = nodes.Grid(
        nodes.Codes.of(torch.randint(0, 16, (32, 64), generator=generator), 4),
        nodes.View(scale, 32, 1),
        levels="nf4",
        block=(1, 64),
    )
    weight = Weight(nodes.View(flat, 16, 128))
    dense = weight.to_dense()
    assert torch.equal(slice_rows(weight, 2, 6).to_dense(), dense[2:6])
    with pytest.raises(NotRepresentable, match="multiples of 2"):
        slice_rows(weight, 1, 6)
    plain = Weight(
        nodes.View(
            nodes.Grid(flat.codes, nodes.Values(scale.dense().reshape(32, 1)), levels="nf4", block=(1, 64)), 16, 128
        )
    )
    assert torch.equal(slice_columns(plain, 64, 128).to_dense(), dense[:, 64:])
    assert torch.equal(slice_rows(plain, 1, 6).to_dense(), dense[1:6])
    with pytest.raises(NotRepresentable, match="multiples of 64"):
        slice_columns(plain, 32, 128)


def test_reordered_columns_can_be_cut_anywhere() -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(4)).to(torch.int32)
    weight = Weight(nodes.Permute(grid(8, 64, (1, 16)), order))
    assert torch.equal(slice_columns(weight, 5, 37).to_dense(), weight.to_dense()[:, 5:37])


def test_a_stack_is_cut_in_every_expert() -> None:
    weight = stack([Weight(grid(8, 64, (1, 16), seed)) for seed in range(3)])
    assert torch.equal(slice_rows(weight, 3, 7).to_dense(), weight.to_dense()[:, 3:7])
    assert torch.equal(slice_columns(weight, 16, 48).to_dense(), weight.to_dense()[:, :, 16:48])


def test_slices_are_views_where_bytes_allow() -> None:
    weight = Weight(grid(8, 64, (1, 16)))
    part = slice_rows(weight, 2, 6)
    assert part.tensors[0].untyped_storage().data_ptr() == weight.tensors[0].untyped_storage().data_ptr()


def test_static_input_scales_that_nobody_can_cut() -> None:
    each = Activation("tests.per_channel", names=("smooth",), tensors=(torch.ones(64),))
    with pytest.raises(NotRepresentable, match="smooth"):
        slice_columns(Weight(grid(8, 64, (1, 16)), activation=each), 0, 32)
    grouped = Activation("tests.grouped", granularity="group", group_size=32)
    with pytest.raises(NotRepresentable, match="multiples of 32"):
        slice_columns(Weight(grid(8, 64, (1, 16)), activation=grouped), 16, 48)


# --- joining -------------------------------------------------------------------------------------------------------------------


@bounded
@given(st.data())
def test_stack_and_unstack(data: st.DataObject) -> None:
    rows, columns, count = data.draw(strategies.sizes), data.draw(strategies.sizes), data.draw(st.integers(1, 3))
    if data.draw(st.booleans()):
        parts = [data.draw(strategies.weights(rows, columns)) for _ in range(count)]
        parts = [Weight(part.tree, parts[0].dtype) for part in parts]
    else:  # one form, other numbers
        first = data.draw(strategies.weights(rows, columns))
        parts = [first] + [first.map(torch.clone) for _ in range(count - 1)]
    whole = stack(parts)
    assert whole.shape == (count, rows, columns)
    for ours, part in zip(unstack(whole), parts, strict=True):
        assert same(ours, part)
    assert torch.equal(whole.to_dense().nan_to_num(), torch.stack([part.to_dense() for part in parts]).nan_to_num())
    assert same(Weight.build(whole.structure(), whole.tensors), whole)


@bounded
@given(st.data())
def test_join_and_split_rows(data: st.DataObject) -> None:
    columns, heights = data.draw(strategies.sizes), data.draw(st.lists(strategies.sizes, min_size=1, max_size=3))
    if data.draw(st.booleans()):
        heights = heights[:1] * data.draw(st.integers(1, 3))
        first = data.draw(strategies.weights(heights[0], columns))
        parts = [first.map(torch.clone) for _ in heights]
    else:
        parts = [data.draw(strategies.weights(rows, columns)) for rows in heights]
        parts = [Weight(part.tree, parts[0].dtype) for part in parts]
    whole = join_rows(parts)
    assert whole.shape == (sum(heights), columns)
    assert_equal(whole.tree.dense(), torch.cat([part.tree.dense() for part in parts]), whole.tree)
    for ours, part in zip(split_rows(whole, heights), parts, strict=True):
        assert same(ours, part)
    empty = join_rows([part.to("meta") for part in parts])
    assert empty.structure() == whole.structure()
    assert [tensor.shape for tensor in empty.tensors] == [tensor.shape for tensor in whole.tensors]


def test_equal_forms_become_one_leaf() -> None:
    joined = join_rows([Weight(grid(8, 64, (1, 16), 1)), Weight(grid(24, 64, (1, 16), 2))])
    assert isinstance(joined.tree, nodes.Grid)
    assert isinstance(joined.tree.codes, nodes.Codes)
    pairs = [[Weight(grid(8, 64, (1, 16), seed)), Weight(grid(8, 64, (1, 16), seed + 9))] for seed in range(4)]
    experts = stack([join_rows(pair) for pair in pairs])
    assert isinstance(experts.tree, nodes.Grid)
    assert experts.tree.codes.shape == (4, 16, 64)


def test_a_scale_of_the_whole_matrix_keeps_the_parts_apart() -> None:
    def per_tensor(scale: float) -> Weight:
        return Weight(nodes.Grid(grid(8, 64, (1, 1)).codes, nodes.Values(torch.tensor([[scale]]))))

    parts = [per_tensor(0.5), per_tensor(0.25)]
    joined = join_rows(parts)
    assert isinstance(joined.tree, nodes.Rows)
    assert torch.equal(joined.to_dense(), torch.cat([part.to_dense() for part in parts]))


def test_input_scales_follow_their_expert() -> None:
    def static(scale: float) -> Activation:
        return Activation("tests.static", names=("input_scale",), tensors=(torch.tensor([scale]),))

    parts = [Weight(grid(8, 64, (1, 16), seed), activation=static(seed + 1.0)) for seed in range(3)]
    whole = stack(parts)
    assert [float(weight.activation["input_scale"]) for weight in unstack(whole)] == [1.0, 2.0, 3.0]
    for ours, part in zip(unstack(whole), parts, strict=True):
        assert same(ours, part)


@activation_rule("tests.times")
def times(x: torch.Tensor, weight: Weight, bias: Any, product: Any) -> torch.Tensor:
    """An input quantization of which one can see the static scale."""
    assert weight.activation is not None
    return product(x * weight.activation["input_scale"])  # type: ignore[no-any-return]


@pytest.mark.parametrize("scales", [(2.0, 2.0), (2.0, 3.0)])
def test_parts_with_static_scales_of_their_own_stay_apart(scales: tuple[float, float]) -> None:
    """Gate and up of an expert: each part of the rows sees the input by its own scale, joined, cut and stacked."""

    def part(rows: int, scale: float) -> Weight:
        own = Activation("tests.times", granularity="tensor", names=("input_scale",), tensors=(torch.tensor(scale),))
        return Weight(grid(rows, 64, (1, 16), int(10 * scale) + rows), activation=own)

    parts = [part(8, scales[0]), part(24, scales[1])]
    whole, x = join_rows(parts), torch.randn(5, 64)
    wanted = torch.cat([x @ own.to_dense().T * scale for own, scale in zip(parts, scales)], dim=1)
    assert torch.allclose(multiply(whole, x, None), wanted, rtol=1e-5, atol=1e-4)
    assert all(same(own, back) for own, back in zip(parts, split_rows(whole, [8, 24])))
    cut = slice_rows(whole, 4, 20)
    assert torch.allclose(multiply(cut, x, None), wanted[:, 4:20], rtol=1e-5, atol=1e-4)
    assert same(Weight.build(whole.structure(), whole.tensors), whole)
    stacked = stack([whole, join_rows([part(8, 5.0), part(24, 7.0)])])
    assert torch.allclose(multiply(stacked.select(0), x, None), wanted, rtol=1e-5, atol=1e-4)
    assert [float(own["input_scale"]) for own in stacked.select(1).activation.parts] == [5.0, 7.0]  # type: ignore[union-attr]


def test_weights_that_cannot_be_one() -> None:
    plain, dynamic = Weight(grid(8, 64, (1, 16))), Weight(grid(8, 64, (1, 16)), activation=Activation("tests.dynamic"))
    with pytest.raises(NotRepresentable, match="different ways"):
        stack([plain, dynamic])
    with pytest.raises(NotRepresentable, match="different ways"):
        join_rows([plain, dynamic])
    with pytest.raises(NotRepresentable, match="one shape"):
        stack([plain, Weight(grid(4, 64, (1, 16)))])
    with pytest.raises(NotRepresentable, match="different widths"):
        join_rows([plain, Weight(grid(8, 32, (1, 16)))])
    with pytest.raises(NotRepresentable, match="do not make up"):
        split_rows(plain, [4, 5])
