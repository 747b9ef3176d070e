"""Properties of every node of the weight tree, and an element-by-element evaluation written apart from it."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.testing import strategies
from anybit.weight import nodes, packing
from anybit.weight.weight import Weight, same

bounded = settings(max_examples=60, deadline=None)


def has(node: nodes.Node, *kinds: type[nodes.Node]) -> bool:
    found: list[nodes.Node] = [node]
    while found:
        one = found.pop()
        if isinstance(one, kinds):
            return True
        for value in vars(one).values():
            found += [
                part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, nodes.Node)
            ]
    return False


def assert_equal(ours: torch.Tensor, wanted: torch.Tensor, node: nodes.Node) -> None:
    """Bit-equal but for the sign of zero; products of rotations are summed in another order for another shape."""
    assert ours.shape == wanted.shape
    if has(node, nodes.Rotate):
        if not wanted.isfinite().all():
            return  # inf - inf, or not: that is the order of the sum, too
        torch.testing.assert_close(ours, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().sum() + 1), equal_nan=True)
    else:
        assert torch.equal(torch.nan_to_num(ours), torch.nan_to_num(wanted))
        assert torch.equal(ours.isnan(), wanted.isnan())


def part_of(size: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, size - 1), st.integers(1, size)).map(
        lambda pair: (min(pair[0], pair[1] - 1), max(pair[0] + 1, pair[1]))
    )


# --- the tree agrees with itself -----------------------------------------------------------------------------------------


@bounded
@given(st.data())
def test_region_is_a_part_of_dense(data: st.DataObject) -> None:
    node = data.draw(strategies.trees())
    dense = node.dense()
    assert tuple(dense.shape) == node.shape
    assert dense.dtype == torch.float32
    top, bottom = data.draw(part_of(node.shape[0]))
    left, right = data.draw(part_of(node.shape[1]))
    assert_equal(node.region(slice(top, bottom), slice(left, right)), dense[top:bottom, left:right], node)


@bounded
@given(st.data())
def test_take_rows_are_rows_of_dense(data: st.DataObject) -> None:
    node = data.draw(strategies.trees())
    index = torch.tensor(
        data.draw(st.lists(st.integers(0, node.shape[0] - 1), min_size=0, max_size=5)), dtype=torch.int64
    )
    assert_equal(node.take_rows(index), node.dense()[index], node)


@bounded
@given(strategies.weights())
def test_structure_and_tensors_build_the_weight_again(weight: Weight) -> None:
    again = Weight.build(weight.structure(), weight.tensors)
    assert same(again, weight)
    assert_equal(again.tree.dense(), weight.tree.dense(), weight.tree)


@bounded
@given(strategies.weights())
def test_structure_and_shape_hold_no_numbers(weight: Weight) -> None:
    empty = weight.to("meta")
    assert empty.structure() == weight.structure()
    assert empty.shape == weight.shape
    assert empty.bytes_in_memory == weight.bytes_in_memory
    assert empty.device.type == "meta"


@bounded
@given(strategies.weights())
def test_map_touches_every_tensor_and_copies(weight: Weight) -> None:
    seen: list[torch.Tensor] = []
    copied = weight.map(lambda tensor: (seen.append(tensor), tensor.clone())[1])
    assert len(seen) == len(weight.tensors)
    assert same(copied, weight)
    assert all(
        a.data_ptr() != b.data_ptr() or a.numel() == 0 for a, b in zip(copied.tensors, weight.tensors, strict=True)
    )


@bounded
@given(st.data())
def test_evaluation_leaves_stored_tensors_alone(data: st.DataObject) -> None:
    weight = data.draw(strategies.weights())
    before = weight.map(torch.clone)
    weight.to_dense()
    weight.tree.take_rows(torch.tensor([0]))
    assert same(weight, before)


@bounded
@given(strategies.weights(), st.sampled_from((None, "float16", torch.bfloat16, "float32")))
def test_to_dense_rounds_once(weight: Weight, dtype: torch.dtype | str | None) -> None:
    dense = weight.to_dense(dtype)
    wanted = (
        getattr(torch, weight.dtype) if dtype is None else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    )
    assert dense.dtype == wanted
    assert torch.equal(dense.nan_to_num(), weight.tree.dense().to(wanted).nan_to_num())


def test_to_dense_of_a_large_weight_goes_by_chunks() -> None:
    columns = 1 << 12
    codes = torch.arange(1200 * columns).view(1200, columns) % 16
    weight = Weight(nodes.Grid(nodes.Codes.of(codes, 4), nodes.Values(torch.tensor([[0.5]]))))
    assert torch.equal(weight.to_dense(), codes.float() * 0.5)


# --- stacks --------------------------------------------------------------------------------------------------------------


@bounded
@given(st.data())
def test_select_of_a_stack(data: st.DataObject) -> None:
    rows, columns = data.draw(strategies.sizes), data.draw(strategies.sizes)
    parts = tuple(data.draw(strategies.trees(rows, columns)) for _ in range(data.draw(st.integers(1, 3))))
    whole = nodes.Stack(parts)
    assert whole.shape == (len(parts), rows, columns)
    dense = whole.dense()
    for expert, part in enumerate(parts):
        assert_equal(dense[expert], part.dense(), part)


def test_leaves_without_an_experts_axis_are_shared() -> None:
    codes = torch.randint(0, 16, (3, 4, 6), generator=torch.Generator().manual_seed(1))
    scale = torch.rand(4, 1) + 0.5
    own_scale = torch.rand(3, 4, 1) + 0.5
    shared = nodes.Grid(nodes.Codes.of(codes, 4), nodes.Values(scale))
    each = nodes.Grid(nodes.Codes.of(codes, 4), nodes.Values(own_scale))
    assert shared.shape == each.shape == (3, 4, 6)
    assert torch.equal(shared.dense(), codes.float() * scale)
    assert torch.equal(each.dense(), codes.float() * own_scale)


def test_experts_with_orders_tables_and_groups_of_their_own() -> None:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 5, (2, 3, 6), generator=generator)
    order = torch.stack([torch.randperm(6, generator=generator) for _ in range(2)]).to(torch.int32)
    levels, groups = (
        torch.randn(2, 5, generator=generator),
        torch.randint(0, 2, (2, 6), generator=generator, dtype=torch.int32),
    )
    scale = torch.rand(2, 3, 2, generator=generator)
    tree = nodes.Permute(
        nodes.Grid(nodes.Codes.of(codes, 3), nodes.Values(scale), levels=levels, group_index=groups), order
    )
    dense = tree.dense()
    for expert in range(2):
        for row in range(3):
            for column in range(6):
                group = int(groups[expert, column])
                wanted = levels[expert, int(codes[expert, row, column])] * scale[expert, row, group]
                assert dense[expert, row, int(order[expert, column])] == wanted


# --- against numbers computed element by element ------------------------------------------------------------------------------


def rounded(number: float | numpy.floating, dtype: str) -> numpy.float32:
    """The nearest number of a dtype, ties to even."""
    if dtype == "float16":
        return numpy.float32(numpy.float16(number))
    single = numpy.float32(number)
    if dtype == "bfloat16" and numpy.isfinite(single):
        bits = int(single.view(numpy.uint32))
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return numpy.uint32(bits).view(numpy.float32)
    return single


def bit(packed: numpy.ndarray, row: int, position: int) -> int:
    return int(packed[row, position // 8]) >> (position % 8) & 1


def code_at(codes: nodes.Codes, row: int, column: int) -> int:
    """One code, read bit by bit from the little-endian stream of its row."""
    packed = codes.packed.numpy()
    value = sum(bit(packed, row, column * codes.bits + index) << index for index in range(codes.bits))
    return value - (1 << codes.bits) if codes.signed and value >> (codes.bits - 1) else value


def stored_at(node: nodes.Node, row: int, column: int) -> numpy.float32:
    """A number of a parameter as it is stored, before inversion."""
    if isinstance(node, nodes.Grid):
        return grid_at(node, row, column)
    assert isinstance(node, nodes.Values)
    if node.levels == "e8m0":
        number = numpy.float32(2.0 ** (int(node.tensor[row, column]) - 127))
    else:
        number = numpy.float32(node.tensor[row, column].float().item())
    return -number if node.negated else number


def parameter_at(node: nodes.Node, row: int, column: int, grid: nodes.Grid | nodes.Codebook) -> numpy.float32:
    height, width = node.shape
    groups = grid.group_index if isinstance(grid, nodes.Grid) else None
    own_row = 0 if height == 1 else row // grid.block[0]
    own_column = 0 if width == 1 else int(groups[column]) if groups is not None else column // grid.block[1]
    return stored_at(node, own_row, own_column)


TABLES = {
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6],
    "ternary": [-1, 0, 1],
    "iq4_nl": [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
    "fp4_bnb": [0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3],
    # QLoRA, appendix E
    "nf4": [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
            -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
}  # fmt: skip


def minifloat(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    bias = (1 << (exponent_bits - 1)) - 1
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent, mantissa = code >> mantissa_bits & (1 << exponent_bits) - 1, code & (1 << mantissa_bits) - 1
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


def level(levels: str | torch.Tensor | None, code: int) -> float:
    if levels is None:
        return code
    if isinstance(levels, torch.Tensor):
        return levels[code].float().item()
    if levels == "fp4_bnb":
        return float(numpy.float32(TABLES[levels][code]) / numpy.float32(12))
    if levels in TABLES:
        return TABLES[levels][code]
    return minifloat(code, *{"e4m3": (4, 3), "e2m3": (2, 3), "e3m2": (3, 2)}[levels])


def grid_at(node: nodes.Grid, row: int, column: int) -> numpy.float32:
    dtype = node.compute
    code = (
        code_at(node.codes, row, column)
        if isinstance(node.codes, nodes.Codes)
        else int(stored_at(node.codes, row, column))
    )
    number = rounded(level(node.levels, code), dtype)
    if node.zero is not None:
        zero = parameter_at(node.zero, row, column, node)
        zero = 1 / zero if isinstance(node.zero, nodes.Values) and node.zero.inverted else zero
        number = rounded(number - rounded(zero, dtype), dtype)
    if node.scale is not None:
        scale = rounded(parameter_at(node.scale, row, column, node), dtype)
        inverted = isinstance(node.scale, nodes.Values) and node.scale.inverted
        number = rounded(number / scale if inverted else number * scale, dtype)
    if node.offset is not None:
        offset = parameter_at(node.offset, row, column, node)
        offset = 1 / offset if isinstance(node.offset, nodes.Values) and node.offset.inverted else offset
        number = rounded(number + rounded(offset, dtype), dtype)
    return number


def by_elements(shape: tuple[int, ...], at: object) -> torch.Tensor:
    return torch.tensor([[float(at(row, column)) for column in range(shape[1])] for row in range(shape[0])])  # type: ignore[operator]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_grid_element_by_element(data: st.DataObject) -> None:
    node = data.draw(strategies.grids(data.draw(strategies.sizes), data.draw(strategies.sizes)))
    with numpy.errstate(all="ignore"):
        wanted = by_elements(node.shape, lambda row, column: grid_at(node, row, column))
    assert torch.equal(node.dense().nan_to_num(), wanted.nan_to_num())


@settings(max_examples=100, deadline=None)
@given(strategies.codebooks())
def test_codebook_element_by_element(node: nodes.Codebook) -> None:
    high, wide = node.vector
    books = node.tables.shape[0]

    def at(row: int, column: int) -> numpy.float32:
        number = None
        for book in range(books):
            code = code_at(node.codes, row // high, column // wide * books + book)
            entry = rounded(node.tables[book, code, row % high, column % wide].float().item(), node.compute)
            number = entry if number is None else rounded(number + entry, node.compute)
        if node.signs is not None and code_at(node.signs, row, column):
            number = -number
        if node.scale is not None:
            scale = rounded(parameter_at(node.scale, row, column, node), node.compute)
            inverted = isinstance(node.scale, nodes.Values) and node.scale.inverted
            number = rounded(number / scale if inverted else number * scale, node.compute)
        return number

    with numpy.errstate(all="ignore"):
        wanted = by_elements(node.shape, at)
    assert torch.equal(node.dense().nan_to_num(), wanted.nan_to_num())


@bounded
@given(st.data())
def test_sparse_and_masked_element_by_element(data: st.DataObject) -> None:
    rows, columns = data.draw(strategies.sizes), data.draw(strategies.sizes)
    node = data.draw(strategies.sparse(rows, columns))
    numbers = node.values.dense()[0] if node.values.shape[1] else torch.empty(0)
    wanted = torch.zeros(rows, columns)
    for row in range(rows):
        for entry in range(int(node.row_offsets[row]), int(node.row_offsets[row + 1])):
            wanted[row, int(node.columns[entry])] = numbers[entry]
    assert torch.equal(node.dense(), wanted)

    node = data.draw(strategies.masked(rows, columns))
    numbers = iter(node.values.tensor.float()[0].tolist())
    wanted = torch.zeros(rows, columns)
    for row in range(rows):
        for column in range(columns):
            if code_at(node.mask, row, column):
                wanted[row, column] = next(numbers)
    assert torch.equal(node.dense(), wanted)


@bounded
@given(st.data())
def test_rotations_element_by_element(data: st.DataObject) -> None:
    size, side = data.draw(st.sampled_from((1, 2, 4, 8))), data.draw(st.sampled_from(("input", "output")))
    child = nodes.Values(torch.randn(8, 16, generator=torch.Generator().manual_seed(data.draw(strategies.seeds))))
    matrix = data.draw(st.sampled_from((None, torch.randn(size, size, generator=torch.Generator().manual_seed(5)))))
    node = nodes.Rotate(child, size, side, matrix)

    def factor(row: int, column: int) -> float:
        if matrix is not None:
            return float(matrix[row, column])
        return (-1) ** (row & column).bit_count() / math.sqrt(size)

    def at(row: int, column: int) -> float:
        numbers = child.tensor.double()
        if side == "input":
            first = column // size * size
            return sum(float(numbers[row, first + i]) * factor(i, column - first) for i in range(size))
        first = row // size * size
        return sum(factor(row - first, i) * float(numbers[first + i, column]) for i in range(size))

    torch.testing.assert_close(node.dense(), by_elements(node.shape, at), rtol=1e-5, atol=1e-5)


def test_hadamard_matrix_is_orthogonal() -> None:
    for size in (1, 2, 16, 128):
        matrix = nodes.hadamard(size)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), rtol=1e-5, atol=1e-5)


def test_opaque_weights_are_read_by_their_decoder() -> None:
    name = "tests.outer_product"
    nodes.OPAQUE_DECODERS[name] = lambda tensors, rows, columns: torch.outer(
        tensors["left"][rows], tensors["right"][columns]
    )
    try:
        left, right = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 7.0])
        weight = Weight(nodes.Opaque(name, ("left", "right"), (left, right), 3, 2))
        assert torch.equal(weight.to_dense(), torch.outer(left, right))
        assert same(Weight.build(weight.structure(), weight.tensors), weight)
    finally:
        del nodes.OPAQUE_DECODERS[name]


# --- packing ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_packing_is_one_little_endian_stream_per_row(data: st.DataObject) -> None:
    bits, rows, columns = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    if bits > 8 and bits not in (12, 16):
        bits = 12
    numbers = torch.randint(
        0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(data.draw(strategies.seeds))
    )
    packed = packing.pack(numbers, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packing.row_bytes(columns, bits))
    for row in range(rows):
        stream = sum(int(number) << (bits * place) for place, number in enumerate(numbers[row]))
        assert bytes(packed[row].tolist()) == stream.to_bytes(packed.shape[1], "little")
    start, stop = data.draw(part_of(columns))
    assert torch.equal(packing.unpack(packed, bits, stop - start, start).to(torch.int64), numbers[:, start:stop])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int64])
def test_words_and_rows_are_the_same_bytes(dtype: torch.dtype) -> None:
    words = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=dtype)
    rows = packing.words_to_rows(words)
    assert rows.shape == (2, 3 * dtype.itemsize)
    assert torch.equal(packing.rows_to_words(rows, dtype), words)
    short = rows[:, : rows.shape[1] - dtype.itemsize + 1]
    assert torch.equal(packing.rows_to_words(short, dtype)[:, :2], words[:, :2])
