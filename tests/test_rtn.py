"""Round to nearest on grids of every block shape: really nearest, the same in pieces, and clear about what it cannot do."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit import algorithms
from anybit.algorithms import rtn
from anybit.errors import NotRepresentable
from anybit.weight import Activation, Codes, Grid, Permute, Values, Weight
from anybit.weight.layout import meta
from anybit.weight.packing import row_bytes
from anybit.weight.weight import same


def target(
    rows: int,
    columns: int,
    bits: int = 4,
    block: tuple[int, int] = (1, 8),
    signed: bool = False,
    zero: str | None = "codes",
    offset: bool = False,
    dtype: str = "float32",
    inverted: bool = False,
    counts: tuple[int, int] | None = None,
    experts: int | None = None,
) -> Weight:
    """A scheme; `counts`: of parameters, default one per block."""
    lead = () if experts is None else (experts,)
    shape = (*lead, *(counts or (-(-rows // block[0]), -(-columns // block[1]))))
    zeros = {
        None: None,
        "codes": Codes(meta("uint8", *shape[:-1], row_bytes(shape[-1], bits)), bits, shape[-1], signed),
        "values": Values(meta(dtype, *shape)),
    }
    grid = Grid(
        Codes(meta("uint8", *lead, rows, row_bytes(columns, bits)), bits, columns, signed),
        Values(meta(dtype, *shape), inverted=inverted),
        zeros[zero],
        Values(meta(dtype, *shape)) if offset else None,
        block=block,
    )
    return Weight(grid, "float32")


def dense(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


FORMS: dict[str, dict[str, Any]] = {
    "groups": {},
    "short last group": {"columns": 21},
    "tiles, short on both sides": {"rows": 11, "columns": 21, "block": (4, 8)},
    "per row": {"counts": (12, 1)},
    "per column": {"counts": (1, 20), "block": (1, 1)},
    "per tensor": {"counts": (1, 1)},
    "signed, no zero point": {"signed": True, "zero": None},
    "float zero point": {"zero": "values"},
    "offset instead of zero point": {"zero": None, "offset": True},
    "divisor instead of scale": {"inverted": True},
    "3 bits": {"bits": 3, "columns": 21},
    "8 bits, signed": {"bits": 8, "signed": True},
    "2 bits": {"bits": 2},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_code_is_the_nearest(form: str, symmetric: bool) -> None:
    options = {"rows": 12, "columns": 20, **FORMS[form]}
    scheme = target(**options)
    weight = dense(options["rows"], options["columns"])
    found = rtn.quantize(weight, scheme, symmetric=symmetric)
    assert found.structure() == scheme.structure()
    assert [(t.dtype, t.shape) for t in found.tensors] == [(t.dtype, t.shape) for t in scheme.tensors]
    grid: Any = found.tree
    first, last = rtn.code_range(grid.codes)
    unit = torch.full(weight.shape, 0, dtype=torch.int32)
    every = torch.stack(
        [
            replace(
                grid, codes=Codes.of((unit + code) & ((1 << grid.codes.bits) - 1), grid.codes.bits, grid.codes.signed)
            ).dense()
            for code in range(first, last + 1)
        ]
    )
    best = (every - weight).abs().amin(0)
    error = (grid.dense() - weight).abs()
    # a tie may fall to either side, decided in another order of operations
    assert (error <= best + 1e-6).all(), float((error - best).max())
    if not symmetric and options.get("zero", "codes") is not None:
        step = (every[1] - every[0]).abs()
        assert (error <= 0.5 * step + 1e-6).all(), "inside the range no weight is further than half a step away"


@pytest.mark.parametrize("signed", [False, True])
def test_zero_stays_zero(signed: bool) -> None:
    weight = dense(8, 32)
    weight[:, ::3] = 0
    weight[0] = 0
    found = rtn.quantize(weight, target(8, 32, signed=signed)).to_dense()
    assert (found[weight == 0] == 0).all()


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 33),
    block=st.tuples(st.integers(1, 5), st.integers(1, 40)),
    bits=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8]),
    seed=st.integers(0, 1 << 20),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_in_any_pieces(rows: int, columns: int, block: tuple[int, int], bits: int, seed: int) -> None:
    scheme, weight = target(rows, columns, bits, block), dense(rows, columns, seed=seed)
    before = weight.clone()
    found = rtn.quantize(weight, scheme)
    assert torch.equal(weight, before)
    patch = pytest.MonkeyPatch()
    patch.setattr(rtn, "row_chunks", lambda rows, columns: [(start, start + 1) for start in range(rows)])
    assert same(rtn.quantize(weight, scheme), found)
    patch.undo()
    assert same(rtn.quantize(weight.T.contiguous().T, scheme), found)


def test_a_stack_is_its_experts() -> None:
    weight = dense(3, 12, 20)
    found = rtn.quantize(weight, target(12, 20, bits=3, experts=3))
    for expert in range(3):
        assert same(found.select(expert), rtn.quantize(weight[expert], target(12, 20, bits=3)))


def test_codes_for_the_scale_as_it_is_stored() -> None:
    """An 8-bit code times a scale rounded to bfloat16: codes chosen for the exact scale are up to a quarter step off."""
    weight, scheme = dense(32, 64).clamp(-0.1, 0.1), target(32, 64, bits=8, dtype="bfloat16", block=(1, 64))
    worst = []
    for as_stored in (False, True):
        found = rtn.quantize(weight, scheme, as_stored=as_stored)
        grid: Any = found.tree
        inside = (grid.codes.integers() > 0) & (grid.codes.integers() < 255)
        steps = (found.to_dense() - weight).abs() / grid.scale.dense()
        worst.append(float(steps[inside].max()))
    assert worst[0] > 0.6
    assert worst[1] <= 0.5001


def test_a_rule_of_the_format() -> None:
    def halves(low: torch.Tensor, high: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scale": torch.full_like(low, 0.5), "offset": torch.full_like(low, -1.0)}

    found = rtn.quantize(
        torch.tensor([[-1.0, -0.3, 0.2, 9.0]]), target(1, 4, bits=2, zero=None, offset=True), ranges=halves
    )
    assert found.to_dense().tolist() == [[-1.0, -0.5, 0.0, 0.5]]
    grid: Any = found.tree
    assert grid.codes.integers().tolist() == [[0, 1, 2, 3]]


def test_arithmetic_in_half_precision_rounds_each_step() -> None:
    weight, scheme = dense(16, 64, seed=3), target(16, 64, bits=8, dtype="float16", block=(1, 64))
    half, single = (rtn.quantize(weight, scheme, arithmetic=dtype) for dtype in ("float16", "float32"))
    assert not same(half, single)
    low, high = (extreme.clamp(max=0) if sign else extreme.clamp(min=0) for sign, extreme in (
        (True, weight.half().amin(1, keepdim=True)), (False, weight.half().amax(1, keepdim=True))))  # fmt: skip
    grid: Any = half.tree
    assert torch.equal(grid.scale.tensor, (high - low) / 255)


def test_found_by_its_name() -> None:
    assert algorithms.get("rtn") is rtn.quantize
    with pytest.raises(TypeError, match="symetric"):
        algorithms.get("rtn")(dense(4, 8), target(4, 8), symetric=True)


REFUSED: dict[str, tuple[Any, str]] = {
    "a table": (lambda w: replace(w, tree=replace(w.tree, levels="nf4")), "table"),
    "act-order": (lambda w: replace(w, tree=replace(w.tree, group_index=meta("int32", 16))), "index"),
    "no grid": (lambda w: replace(w, tree=Permute(w.tree, meta("int32", 16))), "Permute"),
    "nested scale": (lambda w: replace(w, tree=replace(w.tree, scale=w.tree)), "scale"),
    "no scale": (lambda w: replace(w, tree=replace(w.tree, scale=None)), "scale"),
    "a scale read through a table": (
        lambda w: replace(w, tree=replace(w.tree, scale=Values(meta("uint8", 8, 2), levels="e8m0"))), "scale"
    ),
    "zero points of another shape": (
        lambda w: replace(w, tree=replace(w.tree, zero=Values(meta("float32", 8, 1)))), "zero point for each scale"
    ),
    "no place for a zero": (lambda w: replace(w, tree=replace(w.tree, zero=None)), "unsigned"),
    "another shape": (lambda _: target(4, 4), r"\(8, 16\)"),
    "static input scales": (
        lambda w: replace(w, activation=Activation("int8_static", names=("s",), tensors=(meta("float32", 1),))), "calibrates"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_fill_is_refused(case: str) -> None:
    change, words = REFUSED[case]
    with pytest.raises(NotRepresentable, match=words):
        rtn.quantize(dense(8, 16), change(target(8, 16)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(bad: float) -> None:
    weight = dense(8, 16)
    weight[5, 3] = bad
    with pytest.raises(NotRepresentable, match=f"{bad} at row 5, column 3"):
        rtn.quantize(weight, target(8, 16))


def test_a_scale_too_large_for_its_dtype_is_refused() -> None:
    with pytest.raises(NotRepresentable, match="too large for torch"):
        rtn.quantize(dense(8, 16) * 1e8, target(8, 16, dtype="float16"))


def test_denormal_weights_do_not_divide_by_zero() -> None:
    found = rtn.quantize(torch.full((1, 8), 1e-45), target(1, 8))
    assert torch.isfinite(found.to_dense()).all()
