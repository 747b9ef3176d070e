"""Native CPU kernels against the reference, over random weights of every family they accept, at every instruction-set level."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit import kernels
from anybit.errors import InvalidOption
from anybit.kernels import available, choose, get
from anybit.kernels.cpu import native
from anybit.testing.kernel_laws import TOLERANCE
from anybit.weight import Activation, Weight, levels, nodes
from anybit.weight.activation import RULES, activation_rule
from anybit.weight.weight import same

BUILT = native.why_not() is None
needs_library = pytest.mark.skipif(not BUILT, reason=f"needs the native library: {native.why_not()}")
LEVELS = native.levels() if BUILT else ["none"]
CPU = torch.device("cpu")
BATCHES = (1, 2, 3, 7, native.MANY_SMALL_FLOATS + 5)  # the last one decodes the weight once, whatever its kind
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# codes that name no number, or a number that overflows any sum
BELOW = {"ternary": 3, "e4m3": 0x7F, "e5m2": 0x70, "e4m3fnuz": 0x80, "e5m2fnuz": 0x70, "e8m0": 140}


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    native.use_level(request.param)
    yield request.param
    native.use_level(LEVELS[-1])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def positive(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape, generator=generator(seed)) * 0.03 + 0.01).to(dtype)


def codes(*shape: int, bits: int, signed: bool = False, below: int | None = None, seed: int = 1) -> nodes.Codes:
    return nodes.Codes.of(torch.randint(0, below or 1 << bits, shape, generator=generator(seed)), bits, signed)


def check(tree: Any, batches: tuple[int, ...] = BATCHES, activation: Activation | None = None) -> None:
    """Laws 6 and 7 for one weight."""
    kernel, reference, weight = get("cpu"), get("reference"), Weight(tree, activation=activation)
    assert kernel.refuses(weight, CPU) is None
    before = weight.map(torch.clone)
    spec, tensors = kernel.prepare(weight)
    largest = largest_sums_of(tree)
    assert same(kernel.restore(spec, tensors), weight), "restore"
    assert same(weight, before), "prepare wrote into the weight"
    plain_spec, plain = reference.prepare(weight)
    rows, columns = weight.shape
    index = torch.tensor([0, rows - 1, rows // 2])
    assert torch.equal(kernel.take_rows(index, spec, tensors), reference.take_rows(index, plain_spec, plain)), (
        "take_rows"
    )
    for batch, dtype in itertools.product(batches, TOLERANCE):
        x = torch.randn(batch, columns, generator=generator(batch)).to(dtype)
        bias = torch.linspace(-1, 1, rows).to(dtype) if batch % 2 else None
        cancelled = 0.0 if largest is None else (x.double().abs() @ largest.T).max().item()
        ours, wanted = kernel.linear(x, spec, tensors, bias), reference.linear(x, plain_spec, plain, bias)
        assert_close(ours, wanted, f"batch {batch}", cancelled)
    gradient = torch.randn(5, rows, generator=generator(5))
    assert_close(
        kernel.input_gradient(gradient, spec, tensors),
        reference.input_gradient(gradient, plain_spec, plain),
        "gradient",
    )


def largest_sums_of(tree: Any) -> torch.Tensor | None:
    """Weights as large as they get before a zero point or an offset is taken away; None for other trees."""
    if not isinstance(tree, nodes.Grid) or tree.levels is not None or not isinstance(tree.codes, nodes.Codes):
        return None
    top = torch.full(tree.shape, (1 << tree.codes.bits) - 1)
    return replace(tree, codes=nodes.Codes.of(top, tree.codes.bits), zero=None, offset=None).dense().abs().double()


def assert_close(ours: torch.Tensor, wanted: torch.Tensor, what: str, cancelled: float = 0.0) -> None:
    """`cancelled`: size of the sums that a zero point and an offset are taken from; their own rounding stays behind."""
    assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype), what
    error = (ours.double() - wanted.double()).abs().max().item()
    limit = TOLERANCE[wanted.dtype] * max(wanted.double().abs().max().item(), 1e-30) + 1e-6 * cancelled
    assert error <= limit, f"{what}, {ours.dtype}: differs by {error:.3g}, allowed {limit:.3g}"


# --- families -----------------------------------------------------------------------------------------------------------------


@st.composite
def integer_grids(draw: Any) -> nodes.Grid:
    """Codes of 1 to 8 bits; scales, zeros and offsets in every form; groups that end with the row or do not."""
    bits, signed = draw(st.integers(1, 8)), draw(st.booleans())
    rows, columns = draw(st.integers(1, 13)), draw(st.integers(1, 700))
    group = draw(st.sampled_from((8, 16, 24, 32, 64, 96, 128, 256, 1024)))
    high = draw(st.sampled_from((1, 1, 1, 4)))
    seed, dtype = draw(st.integers(0, 999)), draw(st.sampled_from(FLOATS))
    down, groups = -(-rows // high), -(-columns // group)
    shape = draw(st.sampled_from(((down, groups), (down, groups), (1, 1), (down, 1), (1, groups))))
    parts: dict[str, Any] = {}
    inverted = draw(st.booleans())
    scale = positive(*shape, seed=seed)
    parts["scale"] = nodes.Values((1 / scale if inverted else scale).to(dtype), inverted=inverted)
    zero = draw(st.sampled_from(("none", "codes", "shifted codes", "floats")))
    if zero == "codes":
        parts["zero"] = codes(down, groups, bits=bits, seed=seed)
    elif zero == "shifted codes":
        parts["zero"] = nodes.Grid(codes(down, groups, bits=bits, seed=seed), offset=nodes.Values(torch.ones(1, 1)))
    elif zero == "floats":
        parts["zero"] = nodes.Values((torch.rand(down, groups, generator=generator(seed)) * (1 << bits)).to(dtype))
    if draw(st.booleans()):
        parts["offset"] = nodes.Values(positive(*shape, seed=seed + 1, dtype=dtype), negated=draw(st.booleans()))
    if not draw(st.integers(0, 4)):
        del parts["scale"]
    compute = draw(st.sampled_from(("float32", "float32", "bfloat16", "float16")))
    return nodes.Grid(
        codes(rows, columns, bits=bits, signed=signed, seed=seed), block=(high, group), compute=compute, **parts
    )


@st.composite
def table_grids(draw: Any) -> nodes.Grid:
    """Every named table, and stored ones, with scales as stored values, bytes of a table, or grids."""
    name = draw(st.sampled_from([*sorted(levels.BITS), "stored"]))
    bits = draw(st.integers(1, 8)) if name == "stored" else levels.BITS[name]
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 500))
    group, seed = draw(st.sampled_from((8, 16, 32, 64, 128, 512))), draw(st.integers(0, 999))
    groups = -(-columns // group)
    kind = draw(st.sampled_from(("floats", "e8m0", "nested")))
    scale: Any = nodes.Values(positive(rows, groups, seed=seed, dtype=draw(st.sampled_from(FLOATS))))
    if kind == "e8m0":
        numbers = torch.randint(0, 130, (rows, groups), generator=generator(seed), dtype=torch.uint8)
        scale = nodes.Values(numbers, levels="e8m0")
    elif kind == "nested":
        scale = nodes.Grid(codes(rows, groups, bits=8, below=0x7E), nodes.Values(positive(1, 1)), levels="e4m3")
    table: Any = torch.randn(1 << bits, generator=generator(seed)) if name == "stored" else name
    own = codes(rows, columns, bits=bits, below=BELOW.get(name), seed=seed)
    return nodes.Grid(
        own, scale, levels=table, block=(1, group), compute=draw(st.sampled_from(("float32", "bfloat16")))
    )


@needs_library
@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("family", [integer_grids(), table_grids()], ids=["integers", "tables"])
def test_random_grids_agree_with_the_reference(level: str, family: Any) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(family)
    def run(tree: Any) -> None:
        check(tree, (1, 3, 6, native.MANY_SMALL_FLOATS + 1))

    run()


def double_quantized(rows: int = 12, columns: int = 192) -> Any:
    """bitsandbytes' nested NF4: blocks of 64 over the flattened weight, their scales 8-bit codes with scales of their own."""
    blocks = rows * columns // 64
    nested = nodes.Grid(
        codes(blocks, 1, bits=8), nodes.Values(positive(-(-blocks // 16), 1)), offset=nodes.Values(positive(1, 1)),
        levels=torch.linspace(-1, 1, 256), block=(16, 1),
    )  # fmt: skip
    return nodes.View(nodes.Grid(codes(blocks, 64, bits=4), nested, levels="nf4", block=(1, 64)), rows, columns)


def act_order(bits: int, uneven: bool) -> Any:
    columns = 250 if uneven else 256
    index = (
        torch.randint(0, 8, (columns,), generator=generator(3))
        if uneven
        else torch.randperm(columns, generator=generator(3)) // 32
    )
    return nodes.Grid(
        codes(10, columns, bits=bits), nodes.Values(positive(10, 8, dtype=torch.float16)), codes(10, 8, bits=bits),
        group_index=index.to(torch.int32),
    )  # fmt: skip


def plain(rows: int, columns: int, bits: int = 4, group: int = 32) -> nodes.Grid:
    return nodes.Grid(
        codes(rows, columns, bits=bits), nodes.Values(positive(rows, -(-columns // group))), block=(1, group)
    )


def with_minimums(bits: int, scale_bits: int, group: int, columns: int, rows: int = 9) -> nodes.Grid:
    """llama.cpp's Q4_K and its like: scales and minimums are codes, every 256 columns have a scale for each."""
    groups, blocks = columns // group, columns // 256
    scale = nodes.Grid(
        codes(rows, groups, bits=scale_bits),
        nodes.Values(positive(rows, blocks, dtype=torch.float16)),
        block=(1, 256 // group),
    )
    minimum = nodes.Grid(
        codes(rows, groups, bits=scale_bits, seed=2), nodes.Values(positive(rows, blocks, seed=2, dtype=torch.float16), negated=True),
        block=(1, 256 // group),
    )  # fmt: skip
    return nodes.Grid(codes(rows, columns, bits=bits), scale, offset=minimum, block=(1, group))


def with_signed_scales(bits: int, scale_bits: int, group: int, columns: int, levels: str | None = None) -> nodes.Grid:
    """Q6_K, Q3_K and IQ4_XS."""
    scale = nodes.Grid(
        codes(7, columns // group, bits=scale_bits, signed=True), nodes.Values(positive(7, columns // 256, dtype=torch.float16)),
        block=(1, 256 // group),
    )  # fmt: skip
    return nodes.Grid(codes(7, columns, bits=bits, signed=levels is None), scale, levels=levels, block=(1, group))


def mlx(rows: int, columns: int, group: int) -> nodes.Grid:
    groups = -(-columns // group)
    return nodes.Grid(
        codes(rows, columns, bits=4), nodes.Values(positive(rows, groups, dtype=torch.bfloat16)),
        offset=nodes.Values(positive(rows, groups, seed=2, dtype=torch.bfloat16)), block=(1, group), compute="bfloat16",
    )  # fmt: skip


def spqr(rows: int, columns: int) -> nodes.Grid:
    """Tiles of 16 x 16: codes of three bits, their scales and zeros again, all in half precision."""

    def fine(seed: int, scale: float) -> nodes.Grid:
        factor = (positive(rows // 16, -(-columns // 16), seed=seed) * scale).half()
        return nodes.Grid(
            codes(rows, -(-columns // 16), bits=3, seed=seed), nodes.Values(factor), nodes.Values(torch.full_like(factor, -1.5)),
            block=(16, 1), compute="float16",
        )  # fmt: skip

    return nodes.Grid(codes(rows, columns, bits=3), fine(2, 1), fine(3, 20), block=(1, 16), compute="float16")


def outliers(rows: int, columns: int) -> nodes.Sparse:
    """Some rows have none, some name a place twice."""
    counts = torch.randint(0, 5, (rows,), generator=generator(6)) * 2
    places = torch.randint(0, columns, (int(counts.sum()),), generator=generator(7))
    places[1::6] = places[::6][: len(places[1::6])]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    numbers = torch.randn(1, len(places), generator=generator(8)).half()
    return nodes.Sparse(offsets, places.to(torch.int32), nodes.Values(numbers), columns)


NESTED = {
    "Q4_K": with_minimums(4, 6, 32, 512),
    "Q4_K, wide": with_minimums(4, 6, 32, 8960, 3),
    "Q5_K": with_minimums(5, 6, 32, 768),
    "Q2_K": with_minimums(2, 4, 16, 512),
    "Q6_K": with_signed_scales(6, 8, 16, 768),
    "Q3_K": with_signed_scales(3, 6, 16, 512),
    "IQ4_XS": with_signed_scales(4, 6, 32, 512, "iq4_nl"),
    "scales of straddling blocks": double_quantized(6, 64 * 13),
    "small floats with one scale": nodes.Grid(
        codes(5, 320, bits=4),
        nodes.Grid(codes(5, 20, bits=8, below=0x7F), nodes.Values(positive(1, 1)), levels="e4m3"), levels="e2m1", block=(1, 16),
    ),
    "scales as one row": nodes.Grid(
        codes(6, 256, bits=4),
        nodes.View(
            nodes.Grid(
                codes(1, 24, bits=8), nodes.Values(positive(1, 2)), offset=nodes.Values(positive(1, 1)),
                levels=torch.linspace(-1, 1, 256), block=(1, 16),
            ), 6, 4,
        ),
        levels="nf4", block=(1, 64),
    ),
    "nested zeros": nodes.Grid(
        codes(5, 256, bits=3), nodes.Values(positive(5, 16)),
        nodes.Grid(codes(5, 16, bits=3), nodes.Values(positive(5, 1)), block=(1, 16)), block=(1, 16),
    ),
}  # fmt: skip
TREES = {
    **NESTED,
    "nested nf4": double_quantized(),
    "blocks of whole rows": nodes.View(nodes.Grid(codes(6, 64, bits=4), nodes.Values(positive(6, 1)), levels="nf4"), 12, 32),
    "one flat row": nodes.View(
        nodes.Grid(codes(1, 2304, bits=4), nodes.Values(positive(1, 36)), levels="fp4_bnb", block=(1, 64)), 12, 192
    ),
    "act-order": act_order(4, uneven=False),
    "act-order, 3 bits": act_order(3, uneven=False),
    "uneven act-order": act_order(4, uneven=True),
    "permuted": nodes.Permute(plain(10, 256), torch.randperm(256, generator=generator(4)).to(torch.int32)),
    "rows": nodes.Rows((plain(10, 256), plain(5, 256, 8), plain(3, 256, 5, 1024))),
    "columns": nodes.Columns((plain(10, 256), plain(10, 100, 8, 1024))),
    "cropped": nodes.Crop(plain(10, 256), 7, 199),
    "cropped view": nodes.Crop(double_quantized(), 11, 130),
    "bytes as values": nodes.Grid(
        nodes.Values(torch.randint(-128, 127, (9, 100), generator=generator(5), dtype=torch.int8)), nodes.Values(positive(9, 1))
    ),
    "blocks of rows and columns": nodes.Grid(
        codes(70, 200, bits=8, below=0x7F), nodes.Values(positive(3, 2)), levels="e4m3", block=(32, 128)
    ),
    "sum": nodes.Sum((plain(10, 256), plain(10, 256, 3, 64))),
    "rotated inputs": nodes.Rotate(plain(10, 256), 64),
    "rotated outputs": nodes.Rotate(plain(16, 64), 8, "output", torch.randn(8, 8, generator=generator(6))),
    "cropped rotation": nodes.Crop(nodes.Rotate(plain(16, 128), 32), 13, 100),
    "scaled inputs (SINQ)": nodes.Scaled(plain(10, 256), nodes.Values(positive(1, 256))),
    "scaled outputs": nodes.Scaled(plain(10, 256), nodes.Values(positive(10, 1))),
    "scaled by one number (LLM.int8)": nodes.Scaled(plain(10, 256, 8), nodes.Values(positive(1, 1))),
    "columns of what is turned": nodes.Columns((nodes.Rotate(plain(10, 64), 64), plain(10, 100, 8, 1024))),
    "bfloat16 arithmetic (MLX)": mlx(9, 1000, 64),
    "bfloat16 arithmetic, wide groups": mlx(5, 1200, 256),
    "bfloat16 arithmetic, one scale a row": mlx(5, 1200, 1200),
    "outliers (SpQR)": nodes.Permute(
        nodes.Sum((spqr(32, 100), outliers(32, 100)), "float16"), torch.randperm(100, generator=generator(4)).to(torch.int32)
    ),
    "outliers beside a sum in float32": nodes.Sum((plain(10, 256), outliers(10, 256))),
    "more groups than a run": plain(5, 5000, 4, 8),
    "more columns than a block": nodes.Grid(codes(5, 2500, bits=3), nodes.Values(positive(5, 40)), block=(1, 64), compute="bfloat16"),
}  # fmt: skip


@needs_library
@pytest.mark.parametrize("name", TREES)
def test_trees_around_grids_agree_with_the_reference(level: str, name: str) -> None:
    check(TREES[name])


@needs_library
@pytest.mark.parametrize("name", NESTED)
def test_nested_scales_stay_as_small_as_they_are(name: str) -> None:
    weight = Weight(NESTED[name])
    _, tensors = get("cpu").prepare(weight)
    tables = 1024  # bytes: of 256 numbers
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= weight.bytes_in_memory + tables


# --- inputs rounded to bytes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ANYBIT_CPU_ACCURACY", "fast")
    return get("cpu_fast")


def in_bytes(x: torch.Tensor) -> torch.Tensor:
    """x in steps of the largest number over 127, of every 32 columns."""
    columns = x.shape[1]
    blocks = torch.nn.functional.pad(x.float(), (0, -columns % 32)).unflatten(1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    steps = blocks * torch.where(scale > 0, 1 / scale, 0)
    return ((steps + torch.where(steps < 0, -0.5, 0.5)).trunc() * scale).flatten(1)[:, :columns]


FAST = {
    **{f"{bits} bits": plain(9, 704, bits, 32) for bits in range(1, 9)},
    **{f"{bits} bits, groups of 128": plain(6, 1100, bits, 128) for bits in (2, 3, 4, 6, 8)},
    "signed, zeros, an odd width": nodes.Grid(
        codes(10, 333, bits=4, signed=True), nodes.Values(positive(10, 14)), codes(10, 14, bits=3), block=(1, 24)
    ),
    "one scale a row": plain(5, 1000, 8, 1024),
    "e2m1": nodes.Grid(codes(6, 320, bits=4), nodes.Values(positive(6, 10)), levels="e2m1", block=(1, 32)),
    **{name: tree for name, tree in NESTED.items() if name not in ("scales of straddling blocks", "scales as one row")},
}  # fmt: skip


@needs_library
@pytest.mark.parametrize("name", FAST)
def test_fast_is_the_reference_with_rounded_inputs(level: str, fast: Any, name: str) -> None:
    weight = Weight(FAST[name])
    assert fast.refuses(weight, CPU) is None
    spec, tensors = fast.prepare(weight)
    assert same(fast.restore(spec, tensors), weight)
    dense, largest = weight.to_dense(torch.float32), largest_sums_of(weight.tree)
    for batch in (1, 2, 5):
        x = torch.randn(batch, weight.shape[1], generator=generator(batch))
        cancelled = 0.0 if largest is None else (x.double().abs() @ largest.T).max().item()
        assert_close(fast.linear(x, spec, tensors, None), in_bytes(x) @ dense.T, name, cancelled)
    many = torch.randn(native.MANY, weight.shape[1], generator=generator(9))
    assert_close(fast.linear(many, spec, tensors, None), many @ dense.T, "many rows are not rounded", 30 * cancelled)


@needs_library
def test_fast_rounds_tables_too(level: str, fast: Any) -> None:
    """NF4's numbers are no multiples of one; in 8 bits they are off by at most a 254th of the largest."""
    weight = Weight(double_quantized(16, 512))
    spec, tensors = fast.prepare(weight)
    x = torch.randn(1, 512, generator=generator(1))
    wanted = x @ weight.to_dense(torch.float32).T
    ours = fast.linear(x, spec, tensors, None)
    assert (ours - wanted).norm() <= 0.015 * wanted.norm()
    assert not torch.equal(ours, wanted)


@needs_library
def test_fast_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Weight(plain(4, 64))
    assert choose(weight, CPU).kernel.name == "cpu"
    assert "set_accuracy" in (get("cpu_fast").refuses(weight, CPU) or "")
    monkeypatch.setattr("anybit.kernels.cpu._wanted", [])
    kernels.set_accuracy("fast")
    choice = choose(weight, CPU)
    assert choice.kernel.name == "cpu_fast"
    assert "cpu: the fast kernel was asked for" in choice.reason
    bytes_of_floats = Weight(nodes.Grid(codes(4, 64, bits=8, below=0x7F), levels="e4m3"))
    assert choose(bytes_of_floats, CPU).kernel.name == "cpu"
    with pytest.raises(InvalidOption, match="'quick'"):
        kernels.set_accuracy("quick")


@needs_library
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fast_does_not_hide_what_is_no_number(level: str, fast: Any, value: float) -> None:
    spec, tensors = fast.prepare(Weight(plain(4, 64)))
    x = torch.ones(1, 64)
    x[0, 40] = value
    assert not fast.linear(x, spec, tensors, None).isfinite().any()


# --- inputs as whole numbers -----------------------------------------------------------------------------------------------------


WHOLE = {
    **{f"{bits} bits, {kind}": nodes.Grid(codes(11, 320, bits=bits, signed=kind == "signed"), block=(1, 320)) for bits in range(1, 8) for kind in ("signed", "unsigned")},
    "e2m1": nodes.Grid(codes(11, 320, bits=4), nodes.Values(torch.full((11, 10), 2.0)), levels="e2m1", block=(1, 32)),
    "iq4_nl": nodes.Grid(codes(11, 320, bits=4), nodes.Values(torch.ones(11, 10)), levels="iq4_nl", block=(1, 32)),
}  # fmt: skip


@needs_library
@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_are_multiplied_exactly(level: str, name: str) -> None:
    """Every sum is below 2**24, so that nothing may be rounded, whatever the order."""
    weight, kernel = Weight(WHOLE[name]), get("cpu")
    spec, tensors = kernel.prepare(weight)
    for batch in (1, 2, 3, 4):
        x = torch.randint(-300, 300, (batch, 320), generator=generator(batch)).float()
        wanted = x.double() @ weight.to_dense(torch.float32).double().T
        assert torch.equal(kernel.linear(x, spec, tensors, None).double(), wanted), batch


@needs_library
@pytest.mark.parametrize("bits", range(1, 8))
def test_small_inputs_beside_large_ones(level: str, bits: int) -> None:
    """An input is off by at most 1.01 * 2**-23 of the largest of its 32 neighbours, which meets a weight of zero here."""
    columns, rows = 1024, 8
    own = torch.randint(0, 1 << bits, (rows, columns), generator=generator(bits))
    own[:, ::32] = 0
    tree = nodes.Grid(nodes.Codes.of(own, bits, signed=True), block=(1, columns))
    x = torch.randn(1, columns, generator=generator(1)) * 2.0**-17
    x[:, ::32] = torch.linspace(0.5, 1.999, columns // 32)
    dense, kernel = Weight(tree).to_dense(torch.float32).double(), get("cpu")
    wanted = x.double() @ dense.T
    ours = kernel.linear(x, *kernel.prepare(Weight(tree)), None).double()
    largest = x.abs().unflatten(1, (-1, 32)).amax(-1).repeat_interleave(32, -1).double()
    allowed = 1.01 * 2.0**-23 * (largest @ dense.abs().T) + 2.0**-22 * (x.abs().double() @ dense.abs().T)
    assert bool(((ours - wanted).abs() <= allowed).all())


@needs_library
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_exact_does_not_hide_what_is_no_number(level: str, value: float) -> None:
    kernel = get("cpu")
    for bits in (2, 4, 6):
        spec, tensors = kernel.prepare(Weight(plain(4, 128, bits)))
        x = torch.ones(1, 128)
        x[0, 40] = value
        assert not kernel.linear(x, spec, tensors, None).isfinite().any()
    tiny = torch.full((1, 128), 1e-42)  # below what a step can be: off by half of the smallest normal number
    assert kernel.linear(tiny, spec, tensors, None).abs().max() < 1e-36


@needs_library
def test_nan_codes_stay_nan(level: str) -> None:
    tree = nodes.Grid(nodes.Codes.of(torch.tensor([[0x7F, 0x30], [0x31, 0x32]]), 8), levels="e4m3")
    kernel = get("cpu")
    y = kernel.linear(torch.ones(1, 2), *kernel.prepare(Weight(tree)), None)
    assert y[0, 0].isnan()
    assert y[0, 1] == Weight(tree).to_dense(torch.float32)[1].sum()


@needs_library
def test_large_inputs_keep_a_zero_point_harmless(level: str) -> None:
    """With every x equal, sum(q * x) - zero * sum(x) is a small difference of large numbers."""
    rows, columns = 16, 4096
    tree = nodes.Grid(
        codes(rows, columns, bits=8), nodes.Values(positive(rows, 32)), codes(rows, 32, bits=8), block=(1, 128)
    )
    x, weight, kernel = torch.full((1, columns), 3.7), Weight(tree), get("cpu")
    wanted = x.double() @ weight.to_dense(torch.float32).double().T
    ours = kernel.linear(x, *kernel.prepare(weight), None)
    assert (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@needs_library
@pytest.mark.parametrize("batch", [1, 7, native.MANY])
def test_inputs_with_gaps(level: str, batch: int) -> None:
    kernel, weight = get("cpu"), Weight(plain(9, 200))
    spec, tensors = kernel.prepare(weight)
    wide = torch.randn(batch, 400, generator=generator(1))
    for x in (
        wide[:, ::2],
        wide[:, :200],
        torch.randn(200, batch, generator=generator(2)).T,
        wide[:1, :200].expand(batch, 200),
    ):
        before = x.clone()
        assert_close(kernel.linear(x, spec, tensors, None), x @ weight.to_dense(torch.float32).T, str(x.stride()))
        assert torch.equal(x, before)


@needs_library
def test_sizes_that_do_not_fit_are_errors() -> None:
    kernel = get("cpu")
    spec, tensors = kernel.prepare(Weight(plain(9, 64)))
    with pytest.raises(RuntimeError, match="64 columns"):
        kernel.linear(torch.ones(1, 63), spec, tensors, None)
    with pytest.raises(RuntimeError, match="9 outputs"):
        kernel.linear(torch.ones(1, 64), spec, tensors, torch.ones(8))
    for row in (-1, 9):
        with pytest.raises(IndexError):
            kernel.take_rows(torch.tensor([0, row]), spec, tensors)
    with pytest.raises(ValueError, match="columns outside 0"):
        kernel.prepare(Weight(nodes.Permute(plain(9, 64), torch.full((64,), 64, dtype=torch.int32))))


@needs_library
def test_experts_touch_only_what_is_routed(level: str) -> None:
    experts, rows, columns = 4, 10, 96
    stacked = nodes.Grid(
        codes(experts, rows, columns, bits=4), nodes.Values(positive(experts, rows, 3)), codes(experts, rows, 3, bits=4),
        block=(1, 32),
    )  # fmt: skip
    several = nodes.Stack(tuple(plain(rows, columns, bits, 32) for bits in (2, 4, 8, 3)))
    kernel, reference = get("cpu"), get("reference")
    ends = torch.tensor([1, 1, 40, 42])
    x = torch.randn(42, columns, generator=generator(6))
    for tree in (stacked, several):
        weight = Weight(tree)
        spec, tensors = kernel.prepare(weight)
        assert same(kernel.restore(spec, tensors), weight)
        assert_close(
            kernel.experts(x, ends, spec, tensors), reference.experts(x, ends, *reference.prepare(weight)), "experts"
        )
    spec, tensors = kernel.prepare(Weight(stacked))
    for wrong in ([1, 1, 40, 43], [1, 0, 40, 42], [1, 1, 40, 41, 42]):
        with pytest.raises(RuntimeError, match="4 experts and 42 rows"):
            kernel.experts(x, torch.tensor(wrong), spec, tensors)


@needs_library
def test_an_activation_rule_is_run_around_the_product(level: str) -> None:
    if "cpu_kernel_test" not in RULES:

        @activation_rule("cpu_kernel_test")
        def rule(x: Any, weight: Weight, bias: Any, product: Any) -> torch.Tensor:
            scale = x.float().abs().amax(1, keepdim=True) / 127
            return (product((x.float() / scale).round()) * scale + (0 if bias is None else bias.float())).to(x.dtype)

    check(plain(10, 256, 8, 1024), activation=Activation("cpu_kernel_test"))


# --- what is refused, and why ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (nodes.Grid(codes(4, 60, bits=4), nodes.Values(positive(4, 5)), block=(1, 12)), "groups of 12 columns"),
        (nodes.Grid(codes(4, 60, bits=12), nodes.Values(positive(4, 1))), "codes of 12 bits"),
        (nodes.Transpose(plain(64, 64)), "the tree is a Transpose"),
        (nodes.View(plain(3, 64, 4, 64), 4, 48), "straddle"),
        (nodes.Grid(nodes.Values(torch.ones(4, 8)), nodes.Values(positive(4, 1))), "codes kept as torch.float32"),
    ],
)  # fmt: skip
def test_refusals_say_why(tree: Any, reason: str) -> None:
    said = get("cpu").refuses(Weight(tree), CPU)
    assert said is not None
    assert reason in said


def test_other_devices_are_refused() -> None:
    assert "not on cuda" in (get("cpu").refuses(Weight(plain(4, 64)), torch.device("cuda")) or "")


def test_the_answer_is_the_same_on_meta() -> None:
    for name, tree in TREES.items():
        scheme = Weight(tree).map(lambda tensor: tensor.to("meta"))
        assert get("cpu").refuses(scheme, CPU) == get("cpu").refuses(Weight(tree), CPU), name


@needs_library
def test_chosen_before_the_reference() -> None:
    assert choose(Weight(plain(4, 64)), CPU).kernel.name == "cpu"
    other = choose(Weight(nodes.Transpose(plain(64, 64))), CPU)
    assert other.kernel.name == "reference"
    assert "cpu: the tree is a Transpose" in other.reason


# --- the library ---------------------------------------------------------------------------------------------------------------------


def test_without_the_library_everything_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "nothing.so")
    native._load.cache_clear()
    try:
        why = {kernel.name: reason for kernel, reason in available()}["cpu"]
        assert why is not None
        assert "not built" in why
        assert choose(Weight(plain(4, 64)), CPU).kernel.name == "reference"
    finally:
        native._load.cache_clear()


@needs_library
def test_a_library_of_other_sources_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    native._load.cache_clear()
    try:
        assert "other sources" in (native.why_not() or "")
    finally:
        native._load.cache_clear()


def _levels_with(value: str) -> str:
    command = "from anybit.kernels.cpu import native; print(native.why_not())"
    environment = {**os.environ, native.LEVEL_VARIABLE: value}
    return subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True
    ).stdout


@needs_library
def test_the_variable_forces_a_level() -> None:
    assert _levels_with("scalar").strip() == "None"
    assert "'avx3'" in _levels_with("avx3")


@needs_library
def test_many_threads_give_the_same_numbers() -> None:
    """torch's threads inside a product, and products from several Python threads at once."""
    kernel, weight = get("cpu"), Weight(plain(600, 512))
    spec, tensors = kernel.prepare(weight)
    x = torch.randn(4, 512, generator=generator(7))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = kernel.linear(x, spec, tensors, None)
        torch.set_num_threads(3)
        found: list[torch.Tensor] = []
        workers = [
            threading.Thread(target=lambda: found.append(kernel.linear(x, spec, tensors, None))) for _ in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(before)
    assert len(found) == 4
    assert all(torch.equal(one, wanted) for one in found)


@needs_library
def test_the_pool_of_our_own_gives_the_same_numbers() -> None:
    """Where torch brings no GNU-compatible OpenMP the library shares the work among threads of its own."""
    command = (
        "import torch; from anybit.kernels.cpu import native\n"
        "native._gomp_parallel = lambda: None\n"
        "from anybit.kernels import get; from anybit.weight import Weight, nodes\n"
        "codes = nodes.Codes.of(torch.arange(600 * 512).view(600, 512) % 16, 4)\n"
        "weight = Weight(nodes.Grid(codes, nodes.Values(torch.ones(600, 1))))\n"
        "kernel = get('cpu'); spec, tensors = kernel.prepare(weight); x = torch.ones(4, 512)\n"
        "torch.set_num_threads(1); wanted = kernel.linear(x, spec, tensors, None); torch.set_num_threads(3)\n"
        "print(all(torch.equal(kernel.linear(x, spec, tensors, None), wanted) for _ in range(50)))"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
