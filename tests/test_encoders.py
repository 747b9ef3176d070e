"""Native encoders give the bits of the torch code they stand for, at every instruction-set level, whatever the numbers are.

The torch code is the referee here; what it makes is held against vendors' bytes in the tests of the methods.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from anybit import algorithms
from anybit.algorithms import _loops, absmax, ggml_search, minifloat
from anybit.errors import NotRepresentable
from anybit.kernels.cpu import encoding, native
from anybit.methods._gguf_layout import GgufLayout, blocks_of, fields_of_blocks
from anybit.weight import packing
from anybit.weight.encoders import torch_only

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"needs the native library: {native.why_not()}")
# avx512vbmi has the encoders of avx512
LEVELS = [name for name in native.levels() if name != "avx512vbmi"] if native.why_not() is None else ["none"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    native.use_level(request.param)
    yield request.param
    native.use_level(native.levels()[-1])


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Rows of ordinary numbers, of ties, zeros of both signs, equal numbers, one sign, subnormals, and very unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, columns, generator=generator) * 0.05
    kinds = [
        lambda row: row.zero_(),
        lambda row: row.zero_().neg_(),
        lambda row: row.mul_(64).round_().div_(64),
        lambda row: row.fill_(0.25),
        lambda row: row.abs_(),
        lambda row: row.abs_().neg_(),
        lambda row: row.mul_(torch.exp2(torch.randint(-30, 12, (columns,), generator=generator))),
        lambda row: row.sign_(),
        lambda row: row[: columns // 2].zero_(),
        lambda row: row.mul_(torch.rand(columns, generator=generator) < 0.02),
        lambda row: row[::7].zero_().neg_(),
        lambda row: row.mul_(1e-38),
    ]
    for number, change in enumerate(kinds):
        if 2 * number + 1 < rows:
            change(found[2 * number + 1])
    return found.to(dtype)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def both(loop, *arguments, **options):
    """What the twin and the torch code make; the twin must not decline."""
    assert encoding.ENCODERS[loop.__name__](*arguments, **options) is not NotImplemented
    with torch_only():
        wanted = loop(*arguments, **options)
    return loop(*arguments, **options), wanted


# --- llama.cpp's block types ---------------------------------------------------------------------------------------------


def blocks(weight: torch.Tensor, kind: str, importance: torch.Tensor | None) -> torch.Tensor:
    layout = GgufLayout(tuple(weight.shape), "float32", kind)
    made = algorithms.get("ggml")(weight, layout.scheme(), kind=kind, importance=importance)
    return layout.encode(made)[kind.lower()]


@functools.lru_cache(maxsize=64)
def wanted_blocks(kind: str, weighted: bool, dtype: torch.dtype, columns: int) -> tuple[torch.Tensor, ...]:
    weight = matrix(26, columns, dtype, seed=columns)
    importance = None
    if weighted:
        importance = torch.rand(columns, generator=torch.Generator().manual_seed(1)) ** 4 * 3
        importance[5] = 0
    with torch_only():
        return weight, importance, blocks(weight, kind, importance)


@pytest.mark.parametrize(
    ("kind", "weighted"),
    [(kind, weighted) for kind in encoding.BLOCKS for weighted in (False, True)
     if not weighted or kind in ggml_search.WEIGHTED or kind in ggml_search.KINDS],
)  # fmt: skip
def test_block_types(kind: str, weighted: bool, level: str) -> None:
    for dtype, columns in ((torch.float32, 2304), (torch.bfloat16, 256)):
        weight, importance, wanted = wanted_blocks(kind, weighted, dtype, columns)
        found = blocks(weight, kind, importance)
        different = (found.view(26, -1) != wanted.view(26, -1)).sum(1)
        assert not different.any(), (dtype, columns, different)


@pytest.mark.parametrize("kind", list(encoding.BLOCKS))
def test_bytes_of_blocks(kind: str, level: str) -> None:
    """Any bytes: into fields and back."""
    size, _, _ = encoding.BLOCKS[kind]
    stored = torch.randint(0, 256, (70, 9 * size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch_only():
        wanted = fields_of_blocks(kind, stored)
        back = blocks_of(kind, wanted, torch.empty_like(stored))
    found = fields_of_blocks(kind, stored)
    assert found is not NotImplemented
    assert {name: same(field, wanted[name]) for name, field in found.items()} == dict.fromkeys(wanted, True)
    assert torch.equal(encoding.blocks_of(kind, wanted, torch.empty_like(stored)), back)


def test_odd_rows_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose quotients leave float32 go to the torch code, and only they."""
    weight, seen = matrix(26, 256), []
    weight[4, 7], weight[9] = 3e-39, 1e-36

    def again(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(rows)
        return {
            "q": torch.zeros(len(rows), 128, dtype=torch.uint8),
            "d": torch.zeros(len(rows), 8, dtype=torch.float16),
        }

    encoding.block_fields(weight, "Q4_0", None, again)
    assert torch.equal(seen[0], weight[[9, 23]])
    for wrong in (float("nan"), float("inf"), 3e38):
        weight[4, 7] = wrong
        with pytest.raises(NotRepresentable, match="NaN, infinity"):
            blocks(weight, "Q4_0", None)


# --- loops ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 8))
def test_packing(bits: int, level: str) -> None:
    for rows, columns in ((3, 2000), (70, 61), (5000, 1), (33, 129)):
        codes = torch.randint(-300, 300, (rows, columns), dtype=torch.int16)
        found, wanted = both(packing.pack, codes, bits)
        assert same(found, wanted)
        if found.numel() < encoding.FEW:
            continue
        for start, count in ((0, columns), (columns // 3, columns // 2)):
            assert same(*both(packing.unpack, found, bits, count, start))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranges(dtype: torch.dtype, level: str) -> None:
    for columns, across in ((256, 32), (300, 128), (2100, 2100), (4096, 16), (100, 7), (4099, 4097)):
        weight = matrix(26, columns, dtype)
        for casts in ((), (torch.bfloat16,), (torch.bfloat16, torch.float16)):
            for found, wanted in zip(*both(_loops.row_ranges, weight, across, casts)):
                assert same(found, wanted)
            assert same(*both(_loops.row_largest, weight, across, casts))
        for wrong in (float("nan"), float("inf"), -float("inf")):
            broken = weight.clone()
            broken[3, columns // 2] = wrong
            found, wanted = (torch.isfinite(low + high) for low, high in both(_loops.row_ranges, broken, across))
            assert torch.equal(found, wanted)
            assert not torch.isfinite(_loops.row_largest(broken, across)[3, columns // 2 // across])
    turned = matrix(26, 64, dtype)[:, 8:40]
    assert same(*both(_loops.row_largest, turned, 32))


def test_places(level: str) -> None:
    """Sides that no tile divides, rows of a wider matrix, words of two dtypes."""
    for rows, columns in ((64, 64), (100, 70), (17, 513), (2, 5000), (5000, 2), (256, 2048)):
        for dtype in (torch.int32, torch.float32):
            stored = torch.randint(-(1 << 31), (1 << 31) - 1, (rows, columns + 3), dtype=torch.int32).view(dtype)
            for words in (stored.T, stored[:, 1:-1].T):
                assert same(*both(packing.turned, words))
    assert encoding.turned(torch.zeros(64, 64, 2).mT) is NotImplemented
    assert encoding.turned(torch.zeros(100, 100)) is NotImplemented
    for count in (4096, 5001, 3 << 20):
        stored = torch.randint(0, 256, (count,), dtype=torch.uint8)
        found, wanted = both(packing.halves_swapped, stored)
        assert same(found, wanted)
        assert int(found[1]) == int(f"{int(stored[1]):02x}"[::-1], 16)


@pytest.mark.parametrize("arithmetic", DTYPES)
@pytest.mark.parametrize("ties", ["even", "away"])
def test_integers(ties: str, arithmetic: torch.dtype, level: str) -> None:
    for bits, limits, columns, block in (
        (4, (0, 15), 256, (1, 32)),
        (8, (-128, 127), 300, (1, 300)),
        (3, (0, 7), 100, (2, 48)),
    ):
        weight = matrix(26, columns, torch.bfloat16)
        shape = (-(-26 // block[0]), -(-columns // block[1]))
        generator = torch.Generator().manual_seed(bits)
        scale = (torch.rand(shape, generator=generator) * 0.02).to(arithmetic)
        scale[1] = 0
        zero = torch.randint(0, 9, shape, generator=generator).to(arithmetic)
        options = {"ties": ties, "arithmetic": arithmetic}
        for own in (
            {}, {"zero": zero, "zero_after": True}, {"zero": zero}, {"offset": zero / 64}, {"multiply": True},
            {"zero": zero + 0.3, "offset": -zero / 50, "multiply": True}, {"casts": (torch.float16,)},
        ):  # fmt: skip
            used = 1 / scale.clamp(min=1e-3) if own.get("multiply") else scale
            found, wanted = both(_loops.integer_codes, weight, bits, block, limits, used, **options, **own)
            assert same(found, wanted), (bits, own)
        own = scale.clamp(min=1e-3)
        for other in DTYPES:  # numbers of one dtype, scales of another
            found, wanted = both(_loops.integer_codes, weight, bits, block, limits, own, ties=ties, arithmetic=other)
            assert same(found, wanted), (bits, other)


@pytest.mark.parametrize("levels", list(minifloat.FORMATS))
def test_small_floats(levels: str, level: str) -> None:
    bits = {"e2m1": 4, "e2m3": 6, "e3m2": 6}.get(levels, 8)
    for dtype in DTYPES:
        for columns, block in ((256, (1, 32)), (300, (2, 128)), (2100, (26, 2100))):
            weight = matrix(26, columns, dtype)
            largest = _loops.over_rows(_loops.row_largest(weight, block[1]), block[0], "amax")
            for ties, zeros, quotient in (
                ("even", "signed", torch.float32), ("away", "plain", torch.bfloat16), ("zero", "below", torch.float32),
                ("even", "below", torch.float16),
            ):  # fmt: skip
                for multiply in (False, True):
                    by = largest / minifloat.FORMATS[levels][2] * 0.9
                    by = 1 / by.clamp(min=1e-20) if multiply else by
                    options = {"multiply": multiply, "casts": (), "quotient": quotient, "ties": ties, "zeros": zeros}
                    assert same(*both(minifloat.small_float_codes, weight, levels, bits, block, by, **options))


@pytest.mark.parametrize("name", ["nf4", "fp4_bnb"])
def test_levels_of_a_table(name: str, level: str) -> None:
    """Every number beside the middle of two levels, too."""
    middles, order = absmax._middles(name, "cpu")
    beside = torch.cat(
        [middles, torch.nextafter(middles, torch.tensor(9.0)), torch.nextafter(middles, torch.tensor(-9.0))]
    )
    row = torch.nn.functional.pad(torch.cat([beside, torch.tensor([1.0])]), (0, 18))
    for dtype in DTYPES:
        for casts in ((), (torch.bfloat16,), (torch.float16,)):
            flat = torch.cat([matrix(26, 512, dtype).reshape(-1), row.to(dtype)])
            for size in (64, 16):
                for found, wanted in zip(*both(_loops.table_blocks, flat, size, middles, order, casts)):
                    assert same(found, wanted)
    assert same(both(_loops.table_blocks, matrix(24, 4096).reshape(-1), 4096, middles, order)[0][0],
                both(_loops.table_blocks, matrix(24, 4096).reshape(-1), 4096, middles, order)[1][0])  # fmt: skip


def test_threads_change_nothing(level: str) -> None:
    weight, before = matrix(200, 512, torch.bfloat16), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _loops.row_largest(weight, 32)
        torch.set_num_threads(3)
        assert same(alone, _loops.row_largest(weight, 32))
    finally:
        torch.set_num_threads(before)


def test_what_is_not_plain_is_left_to_torch() -> None:
    weight = matrix(26, 256)
    assert encoding.row_largest(weight.T, 26) is NotImplemented
    assert encoding.row_largest(weight.double(), 32) is NotImplemented
    assert encoding.row_largest(weight.to("meta"), 32) is NotImplemented
    assert encoding.row_largest(weight[:0], 32) is NotImplemented
    assert _loops.row_largest(weight.T, 26).shape == (256, 1)
    assert encoding.pack(torch.zeros(2, 4096, dtype=torch.int32), 12) is NotImplemented


@pytest.mark.parametrize(("value", "found"), [("none", "torch"), ("scalar", "scalar"), ("avx2", "avx2")])
def test_the_environment_holds_for_encoders(value: str, found: str) -> None:
    if value not in (*LEVELS, "none"):
        pytest.skip(f"no {value} here")
    command = (
        "from anybit.kernels.cpu import encoding, native; import torch\n"
        "made = encoding.row_largest(torch.ones(2, 32), 32)\n"
        "print('torch' if made is NotImplemented else encoding.level())"
    )
    environment = {**os.environ, native.LEVEL_VARIABLE: value}
    printed = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == found
