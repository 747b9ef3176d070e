"""Native codebook products against the reference, at every instruction-set level: vectors, books, signs, scales of every family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_kernels import CPU, LEVELS, check, codes, generator, level, needs_library, outliers, positive, spqr

from anybit.kernels import get
from anybit.kernels.cpu import native
from anybit.methods._gguf_layout import GgufLayout
from anybit.weight import Weight, nodes
from anybit.weight.block_types import BY_NAME

__all__ = ["level"]  # a fixture

I_QUANTS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")


def tables(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def book(
    rows: int,
    columns: int,
    bits: int,
    books: int,
    vector: tuple[int, int],
    dtype: torch.dtype = torch.float16,
    **parts: Any,
) -> nodes.Codebook:
    high, wide = vector
    own = codes(rows // high, columns // wide * books, bits=bits)
    return nodes.Codebook(own, tables(books, 1 << bits, *vector, dtype=dtype), vector, **parts)


def scale(rows: int, wide: int = 1) -> nodes.Values:
    return nodes.Values(positive(rows, wide, dtype=torch.float16))


def lattice(kind: str, rows: int = 5, columns: int = 2560) -> Any:
    """Blocks of random bytes with scales that are numbers."""
    block = BY_NAME[kind]
    stored = torch.randint(
        0, 256, (rows, columns // block.elements, block.bytes), generator=generator(8), dtype=torch.uint8
    )
    if kind == "IQ1_M":  # a nibble of d in each of four words
        stored[..., 49::2] &= 0x0F
        stored[..., 55] |= 0x20
    else:
        stored[..., :2] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    return GgufLayout((rows, columns), torch.float32, encoding=kind).decode({kind.lower(): stored.flatten(1)}).tree


TREES = {
    "AQLM 1x16": book(7, 256, 16, 1, (1, 8), scale=scale(7), block=(1, 256)),
    "AQLM 1x16 in bfloat16": book(7, 256, 16, 1, (1, 8), torch.bfloat16, scale=scale(7), block=(1, 256)),
    "AQLM 2x8": book(9, 3000, 8, 2, (1, 8), scale=scale(9), block=(1, 3000)),
    "AQLM 4x8": book(6, 256, 8, 4, (1, 8), scale=scale(6), block=(1, 256)),
    "AQLM 8x8 with scales of tiles": book(6, 256, 8, 8, (1, 8), scale=scale(6, 32), block=(1, 8)),
    "AQLM, tiles of two rows": book(10, 96, 8, 2, (2, 8), scale=scale(5), block=(2, 96)),
    "AQLM, vectors of 16": book(5, 2080, 12, 1, (1, 16), scale=scale(5), block=(1, 2080)),
    "HIGGS 4 bits": nodes.Rotate(book(8, 512, 8, 1, (1, 2), scale=scale(8, 4), block=(1, 128)), 256),
    "HIGGS 3 bits": book(8, 512, 6, 1, (1, 2), scale=scale(8, 4), block=(1, 128)),
    "HIGGS 2 bits": nodes.Crop(book(8, 512, 4, 1, (1, 2), scale=scale(8, 2), block=(1, 256)), 8, 500),
    "VPTQ, eight rows": book(32, 300, 8, 1, (8, 1)),
    "VPTQ, many entries": book(16, 2500, 13, 1, (8, 1)),
    "VPTQ, six rows": book(18, 70, 9, 1, (6, 1)),
    "VPTQ, twelve rows, many entries": book(24, 70, 12, 1, (12, 1)),
    "VPTQ, sixteen rows": book(64, 70, 12, 1, (16, 1), scale=scale(64), block=(1, 70)),
    "VPTQ, two books": book(32, 4100, 6, 2, (8, 1)),
    "VPTQ with all parts": nodes.Scaled(
        nodes.Permute(
            nodes.Columns((
                nodes.Crop(book(36, 10, 7, 1, (4, 1)), 35, 10),
                nodes.Crop(nodes.Sum((book(40, 90, 8, 1, (8, 1)), book(40, 90, 5, 1, (8, 1)))), 35, 90),
            )),
            torch.randperm(100, generator=generator(5)).to(torch.int32),
        ),
        nodes.Values(positive(1, 100)), nodes.Values(tables(1, 100)),
    ),
    "scaled and shifted outputs": nodes.Scaled(book(32, 100, 8, 1, (8, 1)), nodes.Values(positive(32, 1)), nodes.Values(tables(32, 1))),
    "shifted inputs": nodes.Scaled(book(32, 100, 8, 1, (8, 1)), None, nodes.Values(tables(1, 100))),
    "vectors of four rows and two columns": book(12, 64, 7, 2, (4, 2), scale=scale(12, 2), block=(1, 32)),
    "numbers in float32": book(6, 136, 5, 3, (1, 4), torch.float32, scale=scale(6), block=(1, 136)),
    "a bit of sign for each": book(6, 128, 5, 1, (1, 2), signs=codes(6, 128, bits=1), scale=scale(6, 4), block=(1, 32)),
    "signs on an odd width": book(6, 60, 8, 1, (1, 4), signs=codes(6, 60, bits=1), scale=scale(6), block=(1, 60)),
    "signs of tall vectors": book(8, 60, 8, 1, (4, 1), signs=codes(8, 60, bits=1), scale=scale(8), block=(1, 60)),
    "SpQR, wide": nodes.Sum((spqr(16, 2152), outliers(16, 2152)), "float16"),
    "SpQR, two bits": replace(spqr(16, 1000), codes=codes(16, 1000, bits=2)),
    "HIGGS in bfloat16": book(5, 512, 8, 1, (1, 2), torch.bfloat16, scale=scale(5, 4), block=(1, 128)),
    "HIGGS in float32": book(5, 512, 6, 1, (1, 2), torch.float32, scale=scale(5, 4), block=(1, 128)),
    **{kind: lattice(kind) for kind in I_QUANTS},
    **{f"{kind}, many groups": lattice(kind, 2, 8960) for kind in ("IQ1_S", "IQ2_S", "IQ3_XXS")},
}  # fmt: skip


@needs_library
@pytest.mark.parametrize("name", TREES)
def test_codebooks_agree_with_the_reference(level: str, name: str) -> None:
    check(TREES[name])


@st.composite
def codebooks(draw: Any) -> nodes.Codebook:
    """Every width of codes, one to four books, every shape of vectors that are read, with scales in groups or not."""
    bits, books = draw(st.integers(2, 16)), draw(st.integers(1, 4))
    high, wide = draw(
        st.sampled_from(((1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (2, 4), (3, 1), (4, 1), (8, 1), (10, 1)))
    )
    rows, columns = high * draw(st.integers(1, 5)), wide * draw(st.integers(1, 60))
    group = draw(st.sampled_from((16, 32, 64, columns)))
    dtype = draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32)))
    parts: dict[str, Any] = {}
    if draw(st.booleans()):
        parts = {"scale": nodes.Values(positive(rows, -(-columns // group), dtype=dtype)), "block": (1, group)}
    return book(rows, columns, min(bits, 12) if books > 2 else bits, books, (high, wide), dtype, **parts)


@needs_library
@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_random_codebooks_agree_with_the_reference(level: str) -> None:
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(codebooks())
    def run(tree: Any) -> None:
        check(tree, (1, 2, 5, native.MANY_VECTORS + 2))

    run()


@needs_library
def test_a_stack_of_codebooks_touches_only_what_is_routed(level: str) -> None:
    experts = 3
    tree = nodes.Codebook(
        codes(experts, 6, 32, bits=8),
        tables(experts, 1, 256, 1, 8),
        (1, 8),
        nodes.Values(positive(experts, 6, 1)),
        block=(1, 256),
    )
    kernel, weight = get("cpu"), Weight(tree)
    assert kernel.refuses(weight, CPU) is None
    spec, tensors = kernel.prepare(weight)
    x, ends = torch.randn(20, 256, generator=generator(3)), torch.tensor([1, 1, 20])
    wanted = get("reference").experts(x, ends, *get("reference").prepare(weight))
    assert (kernel.experts(x, ends, spec, tensors) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@needs_library
@pytest.mark.parametrize("kind", I_QUANTS)
@pytest.mark.parametrize("size", [float("nan"), float("inf"), 1e35, 1e-30, 1e-42, 0.0])
def test_lattices_meet_inputs_of_any_size(level: str, kind: str, size: float) -> None:
    """Inputs become integers where CPUs multiply bytes: what is no number stays none, the largest and the smallest survive."""
    weight = Weight(lattice(kind, 3, 512))
    x = torch.randn(2, 512, generator=generator(1))
    x[0, 40] = size
    x[1] = (x[1] / 8).clamp(-1, 1) * (size if size < 1 else 1e34)
    spec, tensors = get("cpu").prepare(weight)
    ours, wanted = get("cpu").linear(x, spec, tensors, None), x.double() @ weight.to_dense(torch.float32).double().T
    assert ours[0].isfinite().any() == (size == size and size != float("inf"))
    error = (ours[1] - wanted[1]).abs().max()
    assert error <= 1e-5 * wanted[1].abs().max() + 1e-37
    if size < 1e36:
        assert (ours[0] - wanted[0]).abs().max() <= 1e-5 * wanted[0].abs().max()


@needs_library
def test_codes_beyond_a_table_are_an_error() -> None:
    tree = nodes.Codebook(nodes.Codes.of(torch.full((2, 8), 200), 8), tables(1, 200, 1, 8), (1, 8))
    assert get("cpu").refuses(Weight(tree), CPU) is None
    with pytest.raises(ValueError, match="entry 200 of a codebook with 200"):
        get("cpu").prepare(Weight(tree))


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (book(4, 60, 8, 1, (1, 32 // 8 * 3)), "vectors of 12 columns"),
        (book(4, 64, 8, 1, (1, 32)), "vectors of 32 columns"),
        (book(4, 64, 4, 9, (1, 8)), "9 codebooks"),
        (nodes.Scaled(book(4, 64, 8, 1, (1, 8)), nodes.Values(positive(4, 64))), "a second scale of (4, 64) values"),
    ],
)  # fmt: skip
def test_refusals_say_why(tree: Any, reason: str) -> None:
    assert reason in (get("cpu").refuses(Weight(tree), CPU) or "")
