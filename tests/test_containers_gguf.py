"""GGUF headers: what the format allows is read, what it does not is refused by name, quickly and in little memory."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
import tracemalloc
from pathlib import Path

import gguf_files as g
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from anybit.containers import Checkpoint
from anybit.errors import AnybitError, CheckpointError, CorruptFile, MissingTensor, UnsafeFile
from anybit.weight.block_types import TYPES

GOLDEN = Path(__file__).parent / "golden" / "gguf_files"
CORPUS = Path(__file__).parent / "data" / "gguf_corpus"
NUMBERS = torch.arange(64, dtype=torch.float32)
MATRIX = ("a.weight", (32, 2), 0, NUMBERS.numpy().tobytes())


def opened(tmp_path: Path, content: bytes, name: str = "model.gguf") -> Checkpoint:
    (tmp_path / name).write_bytes(content)
    return Checkpoint.open(tmp_path / name)


def refused(tmp_path: Path, content: bytes, *words: str, error: type[Exception] = CorruptFile) -> None:
    """The file is refused within a second and a few megabytes, by an error that holds `words` and the file's name."""
    (tmp_path / "bad.gguf").write_bytes(content)
    tracemalloc.start()
    before = time.perf_counter()
    with pytest.raises(error) as caught:
        Checkpoint.open(tmp_path / "bad.gguf")
    took, (_, peak) = time.perf_counter() - before, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took < 1, f"took {took:.1f} s"
    assert peak < (8 << 20) + 8 * len(content), f"took {peak >> 20} MB for {len(content)} bytes"
    for word in (*words, "bad.gguf"):
        assert word in str(caught.value), str(caught.value)


# --- right files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["container_v2", "container_v3_align64"])
def test_every_kind_of_value_and_tensor(variant: str) -> None:
    with Checkpoint.open(GOLDEN / variant / "model.gguf") as checkpoint:
        wanted = json.loads((GOLDEN / variant / "metadata.json").read_text())
        for key, expected in wanted.items():
            found = checkpoint.values[key]
            assert (found if isinstance(expected, (str, int, float)) else list(found)) == expected, key
            assert type(found) is type(expected) or isinstance(expected, list), key
        for name, tensor in load_file(GOLDEN / variant / "tensors.safetensors").items():
            if not checkpoint.tensors[name].encoding:
                assert torch.equal(checkpoint.read(name), tensor), name
        info = checkpoint.tensors["c_exps.weight"]
        assert (info.dtype, info.shape, info.encoding) == ("uint8", (2, 3, 34), "Q8_0")


@pytest.mark.parametrize("alignment", [1, 8, 32, 64, 4096])
def test_any_alignment_and_order_of_data(tmp_path: Path, alignment: int) -> None:
    tensors = [("b", (3,), 24, b"\1\2\3"), MATRIX, ("empty", (0, 4), 0, b""), ("c", (), 0, struct.pack("<f", 7))]
    checkpoint = opened(tmp_path, g.build({"general.alignment": alignment}, tensors, alignment=alignment))
    assert checkpoint.read("b").tolist() == [1, 2, 3]
    assert torch.equal(checkpoint.read("a.weight"), NUMBERS.view(2, 32))
    assert checkpoint.read("empty").shape == (4, 0)
    assert checkpoint.read("c").item() == 7
    for copy in (True, False):
        assert torch.equal(checkpoint.read("a.weight", copy=copy).flatten(), NUMBERS)


def test_nested_arrays_and_arrays_of_everything(tmp_path: Path) -> None:
    nested = (g.ARRAY, (g.ARRAY, [(g.I16, [1, -2]), (g.STRING, ["a", ""]), (g.ARRAY, [(g.BOOL, [True, False])])]))
    found = opened(tmp_path, g.build({"n": nested, "e": (g.ARRAY, (g.F64, []))})).values
    assert [list(part) for part in found["n"]] == [[1, -2], ["a", ""], [[True, False]]]
    assert list(found["e"]) == []


@pytest.mark.parametrize("number", sorted(TYPES))
def test_big_endian_words_inside_blocks(tmp_path: Path, number: int) -> None:
    """The same numbers in a file of either byte order are the same bytes once read."""
    kind = TYPES[number]
    block = bytes(range(1, kind.bytes + 1)) if kind.bytes < 256 else bytes(i % 255 for i in range(kind.bytes))
    turned, place = b"", 0
    for width in kind.words:
        turned += block[place : place + width][::-1]
        place += width
    values = {"u": 7, "f": 0.5, "t": "text", "l": (g.ARRAY, (g.I32, [1, -2])), "s": ["a", "b"]}
    little = opened(tmp_path, g.build(values, [("x", (kind.elements * 2, 3), number, block * 6)]))
    big = opened(tmp_path, g.build(values, [("x", (kind.elements * 2, 3), number, turned * 6)], big=True), "big.gguf")
    assert {key: list(v) if key == "l" else v for key, v in little.values.items()} == {
        key: list(v) if key == "l" else v for key, v in big.values.items()
    }
    ours, theirs = (c.read("x").reshape(-1).view(torch.uint8) for c in (big, little))
    assert torch.equal(ours, theirs)
    assert torch.equal(big.read("x", copy=False).reshape(-1).view(torch.uint8), theirs)


def split_files(tmp_path: Path, parts: int = 3) -> list[Path]:
    files = []
    for number in range(parts):
        keys = {"split.no": (g.U16, number), "split.count": (g.U16, parts), "split.tensors.count": (g.I32, parts)}
        extra = {"general.architecture": "llama"} if number == 0 else {}
        data = struct.pack("<f", number)
        files.append(tmp_path / f"m-{number + 1:05d}-of-{parts:05d}.gguf")
        files[-1].write_bytes(g.build({**extra, **keys}, [(f"t{number}", (1,), 0, data)]))
    return files


@pytest.mark.parametrize("named", [0, 1, 2, None])
def test_all_parts_of_a_split_model_are_read(tmp_path: Path, named: int | None) -> None:
    files = split_files(tmp_path)
    checkpoint = Checkpoint.open(tmp_path if named is None else files[named])
    assert [checkpoint.read(f"t{number}").item() for number in range(3)] == [0, 1, 2]
    assert checkpoint.values["general.architecture"] == "llama"


def test_split_models_that_are_not_whole(tmp_path: Path) -> None:
    files = split_files(tmp_path)
    files[1].rename(tmp_path / "hidden")
    with pytest.raises(MissingTensor, match=r"m-00002-of-00003\.gguf"):
        Checkpoint.open(files[0])
    with pytest.raises(MissingTensor, match=r"missing: 2"):
        Checkpoint.open(tmp_path)
    files[0].rename(tmp_path / "model.gguf")
    with pytest.raises(CorruptFile, match=r"part 1 of 3.*NAME-00001-of-00003"):
        Checkpoint.open(tmp_path / "model.gguf")
    os.rename(tmp_path / "hidden", files[0])
    os.rename(tmp_path / "model.gguf", files[1])
    with pytest.raises(CorruptFile, match=r"says that it is part 2 of 3"):
        Checkpoint.open(files[2])
    (tmp_path / "x-00009-of-00003.gguf").write_bytes(g.build())
    with pytest.raises(CorruptFile, match="part 9 of 3"):
        Checkpoint.open(tmp_path / "x-00009-of-00003.gguf")
    (tmp_path / "x-00001-of-99999.gguf").write_bytes(g.build())
    with pytest.raises(CorruptFile, match="of 99999"):
        Checkpoint.open(tmp_path / "x-00001-of-99999.gguf")


def test_a_part_may_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    files = split_files(tmp_path)
    (tmp_path / "outside").mkdir()
    home = tmp_path / "home"
    home.mkdir()
    files[0].rename(home / files[0].name)
    files[2].rename(home / files[2].name)
    os.symlink(files[1], home / files[1].name)
    with pytest.raises(UnsafeFile):
        Checkpoint.open(home / files[0].name)


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(g.build({}, [MATRIX]))
    assert set(Checkpoint.open(tmp_path).tensors) == {"a.weight"}
    (tmp_path / "b.gguf").write_bytes(g.build({}, [MATRIX]))
    with pytest.raises(CheckpointError, match=r"a\.gguf, b\.gguf"):
        Checkpoint.open(tmp_path)
    (tmp_path / "UP.GGUF").write_bytes(g.build({}, [MATRIX]))
    assert set(Checkpoint.open(tmp_path / "UP.GGUF").tensors) == {"a.weight"}


# --- wrong files -----------------------------------------------------------------------------------------------------------

HUGE = (1 << 64) - 1
BAD_HEADERS = {
    "empty magic": (b"GGML" + b"\0" * 60, ("no GGUF file",)),
    "only the magic": (b"GGUF", ("ends at byte 4",)),
    "version 1": (g.build(version=1), ("version 1",)),
    "version 0": (g.build(version=0), ("version 0",)),
    "version 4": (g.build(version=4), ("version 4",)),
    "big-endian version 9": (g.build(version=9, big=True), ("version 9",)),
    "tensor count": (g.build(counts=(HUGE, 0)) + b"\0" * 1000, (str(HUGE), "tensors")),
    "pair count": (g.build(counts=(0, HUGE)) + b"\0" * 1000, (str(HUGE), "metadata")),
    "one tensor too many": (g.build({}, [MATRIX], counts=(2, 0)), ("tensor 2 of 2",)),
    "one pair too many": (g.build({"a": 1}, counts=(0, 2)) + b"\xff" * 100, ("metadata 2 of 2",)),
    "key length": (g.build(counts=(0, 1))[:24] + struct.pack("<Q", HUGE) + b"\0" * 99, ("key of", str(HUGE))),
    "text length": (
        g.build(counts=(0, 1))[:24] + g.text("k") + struct.pack("<IQ", 8, 1 << 40) + b"\0" * 99,
        ("'k'", str(1 << 40)),
    ),
    "array count": (
        g.build(counts=(0, 1))[:24] + g.text("k") + struct.pack("<IIQ", 9, 4, 1 << 61) + b"\0" * 99,
        ("'k'", str(1 << 61)),
    ),
    "array of texts": (
        g.build(counts=(0, 1))[:24] + g.text("k") + struct.pack("<IIQ", 9, 8, 1 << 61) + b"\0" * 99,
        ("'k'", str(1 << 61)),
    ),
    "value type": (g.build(counts=(0, 1))[:24] + g.text("k") + struct.pack("<IQ", 13, 0) + b"\0" * 99, ("type 13",)),
    "array item type": (
        g.build(counts=(0, 1))[:24] + g.text("k") + struct.pack("<IIQ", 9, 77, 1) + b"\0" * 99,
        ("type 77",),
    ),
    "bool 2": (
        g.build({"k": (g.U8, 2)}).replace(struct.pack("<I", 0) + b"\2", struct.pack("<I", 7) + b"\2"),
        ("bool",),
    ),
    "key not UTF-8": (g.build([(b"\xff\xfe", 1)]), ("UTF-8",)),  # type: ignore[list-item]
    "text not UTF-8": (g.build({"k": (g.STRING, b"\xff\xfe")}), ("'k'", "UTF-8")),
    "key twice": (g.build([("k", 1), ("k", 2)]), ("'k'", "twice")),
    "name twice": (g.build({}, [MATRIX, MATRIX]), ("'a.weight'", "twice")),
    "dimensions": (g.build({}, [("x", (1,) * 5, 0, b"\0" * 4)]), ("5 dimensions",)),
    "million dimensions": (
        g.build(counts=(1, 0))[:24] + g.text("x") + struct.pack("<I", 1 << 31) + b"\0" * 99,
        ("'x'",),
    ),
    "overflowing sides": (g.build({}, [("x", (1 << 32, 1 << 32, 1 << 32), 0, b"")]), ("64 bits",)),
    "overflow to a small size": (g.build({}, [("x", (1 << 62, 4), 0, b"")]), ("64 bits",)),
    "side of 2^64 - 1": (g.build({}, [("x", (HUGE,), 0, b"")]), ("64 bits",)),
    "unknown type": (g.build({}, [("x", (32,), 99, b"")]), ("'x'", "type 99")),
    "removed type": (g.build({}, [("x", (32,), 31, b"")]), ("Q4_0_4_4",)),
    "rows that are not blocks": (g.build({}, [("x", (48, 2), 2, b"\0" * 54)]), ("48", "Q4_0")),
    "offset off the grid": (g.build({}, [MATRIX], offsets={"a.weight": 4}) + b"\0" * 64, ("multiple of 32",)),
    "offset beyond the end": (g.build({}, [MATRIX], offsets={"a.weight": 1 << 40}), ("'a.weight'",)),
    "offset of 2^64 - 32": (g.build({}, [MATRIX], offsets={"a.weight": HUGE - 31}), ("'a.weight'",)),
    "overlap": (
        g.build({}, [MATRIX, ("b.weight", (32, 2), 0, b"\0" * 256)], offsets={"b.weight": 32}),
        ("overlaps", "b.weight"),
    ),
    "same data twice": (
        g.build({}, [MATRIX, ("b.weight", (32, 2), 0, b"\0" * 256)], offsets={"b.weight": 0}),
        ("overlaps",),
    ),
    "short data": (g.build({}, [MATRIX])[:-1], ("truncated",)),
    "no data": (g.build({}, [MATRIX])[:-256], ("truncated",)),
    "alignment 0": (g.build({"general.alignment": 0}, [MATRIX]), ("alignment",)),
    "alignment 24": (g.build({"general.alignment": 24}, [MATRIX]), ("alignment",)),
    "alignment of 2^31": (g.build({"general.alignment": 1 << 31}, [MATRIX]), ("alignment",)),
    "alignment as text": (g.build({"general.alignment": "32"}, [MATRIX]), ("alignment",)),
    "alignment as a float": (g.build({"general.alignment": 32.0}, [MATRIX]), ("alignment",)),
    "alignment as bool": (g.build({"general.alignment": True}, [MATRIX]), ("alignment",)),
    "split count as text": (g.build({"split.count": "2"}, [MATRIX]), ("split.count",)),
}


@pytest.mark.parametrize("case", BAD_HEADERS, ids=str)
def test_a_wrong_header_is_refused(tmp_path: Path, case: str) -> None:
    content, words = BAD_HEADERS[case]
    refused(tmp_path, content, *words)


def test_nesting_is_bounded(tmp_path: Path) -> None:
    deep = struct.pack("<IQ", 9, 1) * 100_000
    refused(tmp_path, g.build(counts=(0, 1))[:24] + g.text("k") + struct.pack("<I", 9) + deep, "deeper")


def test_many_small_things_are_bounded(tmp_path: Path) -> None:
    texts = g.build(counts=(0, 1))[:24] + g.text("k") + struct.pack("<IIQ", 9, 8, 3 << 20) + b"\0" * (25 << 20)
    refused(tmp_path, texts, "more than")
    arrays = g.build(counts=(0, 1))[:24] + g.text("k") + struct.pack("<IIQ", 9, 9, 3 << 20) + b"\0" * (37 << 20)
    refused(tmp_path, arrays, "more than")
    tensors = g.build(counts=(1 << 20, 0))[:24] + b"\0" * (25 << 20)
    refused(tmp_path, tensors, str(1 << 20))


def test_a_header_of_gigabytes_costs_nothing(tmp_path: Path) -> None:
    """A sparse file of 20 GB that claims an array of 10 GB."""
    head = g.build(counts=(0, 1))[:24] + g.text("k") + struct.pack("<IIQ", 9, 0, 10 << 30)
    with open(tmp_path / "bad.gguf", "wb") as file:
        file.write(head)
        file.truncate(20 << 30)
    before = time.perf_counter()
    with pytest.raises(CorruptFile, match="header goes on"):
        Checkpoint.open(tmp_path / "bad.gguf")
    assert time.perf_counter() - before < 1


def test_other_formats_under_the_name(tmp_path: Path) -> None:
    refused(tmp_path, b"PK\x03\x04" + b"\0" * 60, "pickle", error=UnsafeFile)
    refused(tmp_path, b"version https://git-lfs.github.com/spec/v1\n", "LFS")
    refused(tmp_path, b"", "empty")


def test_every_truncation_of_a_header_is_refused(tmp_path: Path) -> None:
    whole = g.build({"a": 1, "b": "text", "c": [1, 2], "d": ["x", "y"]}, [MATRIX])
    for length in range(1, len(whole), 3):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(CorruptFile, match=r"cut\.gguf"):
            Checkpoint.open(tmp_path / "cut.gguf")


# --- fuzzing ----------------------------------------------------------------------------------------------------------------


def corpus() -> list[bytes]:
    found = [file.read_bytes() for file in sorted(CORPUS.glob("*.gguf"))]
    assert found, f"no corpus in {CORPUS}"
    return found


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz_headers(tmp_path: Path, data: st.DataObject) -> None:
    """Damaged files either open, with every tensor inside the file, or are refused by an error of ours."""
    content = bytearray(data.draw(st.sampled_from(corpus())))
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, min(len(content) - 1, 2000)))
        damage = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=9),
                st.sampled_from([struct.pack("<Q", n) for n in (0, 1, 1 << 31, 1 << 32, 1 << 63, HUGE)]),
                st.sampled_from([struct.pack("<I", n) for n in (*range(14), 99, 1 << 31)]),
            )
        )
        if data.draw(st.booleans()):
            content[place : place + len(damage)] = damage
        else:
            del content[place : place + len(damage)]
    (tmp_path / "fuzz.gguf").write_bytes(bytes(content) or b"\0")
    before = time.perf_counter()
    with contextlib.suppress(AnybitError):  # any other error fails the test
        checkpoint = Checkpoint.open(tmp_path / "fuzz.gguf")
        for name, info in checkpoint.tensors.items():
            assert info.offset + info.nbytes <= len(content)
            assert checkpoint.read(name).nbytes == info.nbytes
    assert time.perf_counter() - before < 1
