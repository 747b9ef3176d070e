"""Files that lie: every way to be wrong is one row, and each gives its own error, quickly and in little memory."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file

from anybit.containers import Checkpoint
from anybit.errors import AnybitError, CheckpointError, CorruptFile, MissingTensor, UnsafeFile

SECONDS = 5.0  # far more than any row needs, so that a busy machine does not fail the suite
MEGABYTES = 80  # reading a JSON file takes a buffer of 64 MB, whatever its size

Build = Callable[[Path], Path]


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def pack(header: bytes | str | dict[str, object], data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = (
        json.dumps(header).encode()
        if isinstance(header, dict)
        else header.encode()
        if isinstance(header, str)
        else header
    )
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def as_file(content: bytes, name: str = "model.safetensors") -> Build:
    def build(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return build


def one(data: bytes = b"\0" * 8, **fields: object) -> Build:
    """A file with the one tensor 'w'."""
    return as_file(pack({"w": entry(**fields)}, data))  # type: ignore[arg-type]


def raw(header: bytes | str, data: bytes = b"\0" * 8) -> Build:
    return as_file(pack(header, data))


VALID = pack({"w": entry()})
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
W = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'

# name of the row, file, error, what the message says beside the file's name
FILES: list[tuple[str, Build, type[CheckpointError], list[str]]] = [
    ("empty", as_file(b""), CorruptFile, ["is empty"]),
    ("seven bytes", as_file(b"\0" * 7), CorruptFile, ["has 7 bytes"]),
    ("zero header", as_file(b"\0" * 8), CorruptFile, ["opening brace"]),
    ("header beyond file", as_file(pack("{}", b"", length=1000)), CorruptFile, ["header of 1000 bytes", "10 bytes in all"]),
    ("header above limit", as_file(pack("{}", b"", length=100_000_001)), CorruptFile, ["100000001", "limit is 100000000"]),
    ("header length 2^63", as_file(pack("{}", b"", length=1 << 63)), CorruptFile, ["9223372036854775808"]),
    ("header length 2^64 - 1", as_file(b"\xff" * 64), CorruptFile, ["limit"]),
    ("not JSON", raw("{weights}"), CorruptFile, ["not a name"]),
    ("a list", raw("[1, 2]"), CorruptFile, ["opening brace"]),
    ("leading space", raw(" {}"), CorruptFile, ["opening brace"]),
    ("cut JSON", raw('{"w":' + W), CorruptFile, ["comma or the end"]),
    ("cut name", raw('{"w'), CorruptFile, ["not a name"]),
    ("text behind", raw('{"w":' + W + "} {}"), CorruptFile, ["goes on after its closing brace"]),
    ("NUL padding", raw('{"w":' + W + "}\0\0"), CorruptFile, ["goes on"]),
    ("trailing comma", raw('{"w":' + W + ",}"), CorruptFile, ["not a name"]),
    ("name twice", raw(f'{{"w":{W},"w":{W}}}'), CorruptFile, ["'w'", "twice"]),
    ("name twice by escape", raw(f'{{"w":{W},"\\u0077":{W}}}'), CorruptFile, ["'w'", "twice"]),
    ("key twice", raw('{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), CorruptFile, ["'w'", "twice"]),
    ("metadata twice", raw('{"__metadata__":{},"__metadata__":{}}', b""), CorruptFile, ["__metadata__", "twice"]),
    ("metadata key twice", raw('{"__metadata__":{"a":"1","a":"2"}}', b""), CorruptFile, ["'a'", "twice"]),
    ("metadata number", raw('{"__metadata__":{"a":1}}', b""), CorruptFile, ["'a'", "not text"]),
    ("metadata object", raw('{"__metadata__":{"a":{"b":"c"}}}', b""), CorruptFile, ["'a'", "not text"]),
    ("metadata text", raw('{"__metadata__":"pt"}', b""), CorruptFile, ["start of an object"]),
    ("name not UTF-8", raw(b'{"\xff\xfe":' + W.encode() + b"}"), CorruptFile, ["not valid text"]),
    ("name half a surrogate pair", raw(f'{{"\\ud800":{W}}}'), CorruptFile, ["not valid text"]),
    ("name with a bad escape", raw(f'{{"\\q":{W}}}'), CorruptFile, ["not valid text"]),
    ("name with a line break", raw(f'{{"a\nb":{W}}}'), CorruptFile, ["not a name"]),
    ("tensor is a number", raw('{"w":1}'), CorruptFile, ["'w'", "flat object"]),
    ("tensor is null", raw('{"w":null}'), CorruptFile, ["'w'", "flat object"]),
    ("tensor nests objects", raw('{"w":{"dtype":{"a":"F32"}}}'), CorruptFile, ["'w'", "flat object"]),
    ("deep nesting", raw('{"w":{"shape":' + "[" * 2000 + "]" * 2000 + "}}"), CorruptFile, ["'w'", "not valid JSON"]),
    ("deep nesting outside", raw('{"w":' + "[" * 100_000), CorruptFile, ["'w'", "flat object"]),
    ("long entry", raw('{"w":{"shape":[' + "1," * 5000 + "1]}}"), CorruptFile, ["'w'", "4096 bytes"]),
    ("dtype unknown", one(dtype="BF_16"), CorruptFile, ["'w'", "BF_16", "did you mean 'BF16'"]),
    ("dtype a number", one(dtype=7), CorruptFile, ["'w'", "unknown dtype 7"]),
    ("dtype a list", one(dtype=["F32"]), CorruptFile, ["'w'", "unknown dtype"]),
    ("no dtype", raw('{"w":{"shape":[2],"data_offsets":[0,8]}}'), CorruptFile, ["'w'", "no 'dtype'"]),
    ("no shape", raw('{"w":{"dtype":"F32","data_offsets":[0,8]}}'), CorruptFile, ["'w'", "no 'shape'"]),
    ("no offsets", raw('{"w":{"dtype":"F32","shape":[2]}}'), CorruptFile, ["'w'", "no 'data_offsets'"]),
    ("shape negative", one(shape=[-2]), CorruptFile, ["'w'", "-2"]),
    ("shape twice negative", one(shape=[-1, -2]), CorruptFile, ["'w'", "-1"]),
    ("shape a float", one(shape=[2.0]), CorruptFile, ["'w'", "2.0"]),
    ("shape a bool", one(shape=[True]), CorruptFile, ["'w'", "True"]),
    ("shape text", one(shape="2"), CorruptFile, ["'w'", "shape '2'"]),
    ("shape null", one(shape=None), CorruptFile, ["'w'", "shape None"]),
    ("shape NaN", raw('{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'), CorruptFile, ["'w'", "NaN"]),
    ("shape overflows 64 bits", one(shape=[1 << 32, 1 << 32]), CorruptFile, ["'w'", "64 bits"]),
    ("shape wraps to 8 bytes", one(shape=[(1 << 62) + 2]), CorruptFile, ["'w'", "64 bits"]),
    ("shape overflows though empty", one(b"", shape=[0, 1 << 62, 1 << 62], offsets=[0, 0]), CorruptFile, ["64 bits"]),
    ("shape side of 2^64", one(shape=[1 << 64]), CorruptFile, ["'w'", "2^63 - 1"]),
    ("shape of 5000 digits", one(shape=[int("9" * 1000)]), CorruptFile, ["'w'", "2^63 - 1"]),
    ("shape of 65 dimensions", one(shape=[1] * 64 + [2]), CorruptFile, ["'w'", "65 dimensions"]),
    ("shape huge, file small", one(shape=[1 << 40], offsets=[0, 1 << 42]), CorruptFile, ["'w'", "truncated"]),
    ("offsets reversed", one(shape=[0], offsets=[8, 0]), CorruptFile, ["'w'", "begin and an end"]),
    ("offsets three", one(offsets=[0, 4, 8]), CorruptFile, ["'w'", "begin and an end"]),
    ("offsets negative", one(offsets=[-8, 0]), CorruptFile, ["'w'", "-8"]),
    ("offsets beyond 64 bits", one(offsets=[0, 1 << 70]), CorruptFile, ["'w'", "2^63 - 1"]),
    ("size differs from shape", one(shape=[3]), CorruptFile, ["'w'", "takes 12 bytes", "give it 8"]),
    ("data truncated", one(b"\0" * 7), CorruptFile, ["truncated", "'w'"]),
    ("data missing", one(b""), CorruptFile, ["truncated", "'w'"]),
    ("data overlaps", as_file(pack({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12)),
     CorruptFile, ["'b'", "overlaps", "'a'"]),
    ("same data twice", as_file(pack({"a": entry(), "b": entry()})), CorruptFile, ["'b'", "overlaps"]),
    ("gap", as_file(pack({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20)), CorruptFile, ["'b'", "4 unused bytes"]),
    ("gap at the start", one(b"\0" * 9, offsets=[1, 9]), CorruptFile, ["'w'", "1 unused bytes"]),
    ("bytes behind", one(b"\0" * 9), CorruptFile, ["1 bytes after the last tensor"]),
    ("no tensors, but data", raw("{}", b"\0"), CorruptFile, ["1 bytes after"]),
    ("F4 not in pairs", one(b"\0" * 3, dtype="F4", shape=[2, 3], offsets=[0, 3]), CorruptFile, ["'w'", "whole bytes"]),
    ("F4 scalar", one(b"\0", dtype="F4", shape=[], offsets=[0, 1]), CorruptFile, ["'w'", "whole bytes"]),
    ("F6 not whole bytes", one(b"\0" * 2, dtype="F6_E2M3", shape=[2], offsets=[0, 2]), CorruptFile, ["'w'", "whole bytes"]),
    ("LFS pointer", as_file(LFS), CorruptFile, ["Git LFS", "git lfs pull"]),
    ("web page", as_file(b"<!DOCTYPE html><html>404</html>"), CorruptFile, ["web page"]),
    ("zip in disguise", as_file(b"PK\x03\x04" + b"\x14" * 60), UnsafeFile, ["is a pickle"]),
    ("pickle in disguise", as_file(b"\x80\x02}q\x00X\x01\x00\x00\x00a"), UnsafeFile, ["is a pickle"]),
    ("unknown suffix", as_file(VALID, "model.weights"), CheckpointError, ["no known kind", ".safetensors"]),
]  # fmt: skip


def open_and_read(path: Path) -> None:
    with Checkpoint.open(path) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name)


def opened_quickly(path: Path) -> CheckpointError:
    """The error of opening and reading everything, with proof that it took little time and memory."""
    tracemalloc.start()
    began = time.perf_counter()
    try:
        with pytest.raises(CheckpointError) as caught:
            open_and_read(path)
        assert time.perf_counter() - began < SECONDS
        assert tracemalloc.get_traced_memory()[1] < MEGABYTES << 20
    finally:
        tracemalloc.stop()
    return caught.value


@pytest.mark.parametrize(("build", "kind", "says"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_hostile_file(tmp_path, build, kind, says):
    path = build(tmp_path)
    error = opened_quickly(path)
    assert type(error) is kind, error
    for text in [path.name, *says]:
        assert text in str(error)
    assert len(str(error)) < 1000, "a name out of the file must not flood the message"


# --- folders --------------------------------------------------------------------------------------------------------------


def tensors(*names: str) -> bytes:
    return pack({name: entry(offsets=(8 * i, 8 * i + 8)) for i, name in enumerate(names)}, b"\0" * 8 * len(names))


def index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def shards(weight_map: dict[str, str], **files: bytes) -> Build:
    """A folder with an index and the files a.safetensors, b.safetensors, ..."""

    def build(folder: Path) -> Path:
        for name, content in files.items():
            (folder / f"{name}.safetensors").write_bytes(content)
        return index(folder, weight_map)

    return build


def files(**contents: bytes) -> Build:
    def build(folder: Path) -> Path:
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        return folder

    return build


def linked(where: str) -> Build:
    """model.safetensors is a link out of the folder."""

    def build(folder: Path) -> Path:
        inner, outer = folder / "model", folder / "outside"
        inner.mkdir(), outer.mkdir()
        (outer / "secret.safetensors").write_bytes(VALID)
        os.symlink(where.format(outer=outer), inner / "model.safetensors")
        return inner

    return build


def linked_shard(folder: Path) -> Path:
    (folder / "secret.safetensors").write_bytes(VALID)
    (folder / "model").mkdir()
    os.symlink("../secret.safetensors", folder / "model" / "a.safetensors")
    return index(folder / "model", {"w": "a.safetensors"})


def false_cache(folder: Path) -> Path:
    """Laid out like a hub cache, but `blobs` itself leads elsewhere."""
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "abc").write_bytes(VALID)
    snapshot = folder / "models--a--b" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    os.symlink("../elsewhere", folder / "models--a--b" / "blobs")
    os.symlink("../../blobs/abc", snapshot / "model.safetensors")
    return snapshot


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "model.safetensors")
    return folder


def pipe_for_index(folder: Path) -> Path:
    os.mkfifo(folder / "model.safetensors.index.json")
    return folder


def directory_as_file(folder: Path) -> Path:
    (folder / "model.safetensors").mkdir()
    return folder


def pickled_shard(folder: Path) -> Path:
    (folder / "a.bin").write_bytes(b"\x80\x02N.")
    return index(folder, {"w": "a.bin"})


def raw_index(content: bytes) -> Build:
    def build(folder: Path) -> Path:
        (folder / "model.safetensors.index.json").write_bytes(content)
        return folder

    return build


A, B = "a.safetensors", "b.safetensors"
FOLDERS: list[tuple[str, Build, type[CheckpointError], list[str]]] = [
    ("does not exist", lambda folder: folder / "nowhere", CheckpointError, ["no such file", "nowhere"]),
    ("empty folder", lambda folder: folder, CheckpointError, ["holds no weights", "found nothing"]),
    ("only a config", files(**{"config.json": b"{}"}), CheckpointError, ["holds no weights", "config.json"]),
    ("only a pickle", files(**{"pytorch_model.bin": b"\x80\x02N."}), UnsafeFile, ["pytorch_model.bin", "allow_pickle=True"]),
    ("a folder as file", directory_as_file, CheckpointError, ["model.safetensors", "is a folder"]),
    ("a pipe as file", pipe, CheckpointError, ["model.safetensors", "not a regular file"]),
    ("a pipe as index", pipe_for_index, CheckpointError, ["index.json", "not a regular file"]),
    ("a dangling link", linked("gone.safetensors"), CheckpointError, ["model.safetensors", "gone.safetensors", "does not exist"]),
    ("a link out", linked("../outside/secret.safetensors"), UnsafeFile, ["secret.safetensors", "outside of"]),
    ("an absolute link out", linked("{outer}/secret.safetensors"), UnsafeFile, ["secret.safetensors", "outside of"]),
    ("a shard linked out", linked_shard, UnsafeFile, ["a.safetensors", "secret.safetensors", "outside of"]),
    ("a false hub cache", false_cache, UnsafeFile, ["model.safetensors", "outside of"]),
    ("index is not JSON", raw_index(b"{"), CorruptFile, ["index.json", "not valid JSON"]),
    ("index is a list", raw_index(b"[]"), CorruptFile, ["index.json", "list"]),
    ("index nests", raw_index(b'{"weight_map":' + b"[" * 5000 + b"]" * 5000 + b"}"), CorruptFile, ["index.json", "levels"]),
    ("index without map", raw_index(b'{"metadata": {}}'), CorruptFile, ["index.json", "no weight_map"]),
    ("index with a list", lambda folder: index(folder, ["w"]), CorruptFile, ["index.json", "no weight_map"]),
    ("index with an empty map", lambda folder: index(folder, {}), CorruptFile, ["index.json", "no weight_map"]),
    ("index with a number", lambda folder: index(folder, {"w": 3}), CorruptFile, ["index.json", "'w'", "3"]),
    ("shard absolute", shards({"w": "/etc/passwd"}), UnsafeFile, ["index.json", "'w'", "/etc/passwd"]),
    ("shard above", shards({"w": "../a.safetensors"}), UnsafeFile, ["'w'", "../a.safetensors"]),
    ("shard above, later", shards({"w": "x/../../a.safetensors"}), UnsafeFile, ["'w'", "x/../../a.safetensors"]),
    ("shard with a drive", shards({"w": "C:\\a.safetensors"}), UnsafeFile, ["'w'"]),
    ("shard with a backslash", shards({"w": "..\\a.safetensors"}), UnsafeFile, ["'w'"]),
    ("shard with a NUL", shards({"w": "a\0.safetensors"}), UnsafeFile, ["'w'"]),
    ("shard without a name", shards({"w": ""}), UnsafeFile, ["'w'"]),
    ("shard is the folder", shards({"w": "."}), CheckpointError, ["no known kind"]),
    ("shard is a pickle", pickled_shard, UnsafeFile, ["a.bin", "allow_pickle=True"]),
    ("shard missing", shards({"v": A, "w": B}, a=tensors("v")), MissingTensor, ["b.safetensors", "'w'"]),
    ("shard truncated", shards({"w": "a.safetensors"}, a=VALID[:-1]), CorruptFile, ["a.safetensors", "'w'", "truncated"]),
    ("shard is an LFS pointer", shards({"w": A}, a=LFS), CorruptFile, ["a.safetensors", "LFS"]),
    ("tensor in no shard", shards({"v": A, "w": A}, a=tensors("v")), MissingTensor, ["'w'", A]),
    ("tensor in another shard", shards({"v": A, "w": A, "u": B}, a=tensors("v"), b=tensors("u", "w")), CorruptFile, ["'w'", B]),
    ("tensor in two shards", shards({"v": A, "w": B}, a=tensors("v", "w"), b=tensors("w")), CorruptFile, ["'w'", A, B]),
    ("several files", files(**{A: tensors("a"), B: tensors("b")}), CheckpointError, [A, B, "no index"]),
    ("shards 1 and 3 of 3", files(**{f"model-0000{i}-of-00003.safetensors": tensors(f"t{i}") for i in (1, 3)}),
     MissingTensor, ["2 of the 3 shards", "missing: 2"]),
]  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")
@pytest.mark.parametrize(("build", "kind", "says"), [row[1:] for row in FOLDERS], ids=[row[0] for row in FOLDERS])
def test_hostile_folder(tmp_path, build, kind, says):
    path = build(tmp_path)
    error = opened_quickly(path)
    assert type(error) is kind, error
    for text in [path.name, *says]:
        assert text in str(error)


def test_a_long_name_does_not_flood_the_message(tmp_path):
    path = as_file(pack({"n" * 1_000_000: entry(dtype="F99")}))(tmp_path)
    error = opened_quickly(path)
    assert len(str(error)) < 1000


def test_a_sparse_file_with_a_large_header_is_refused_quickly(tmp_path):
    """90 MB of NULs cost nothing on disk."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000) + b'{"w":' + W.encode())
        file.truncate(1 << 40)
    began = time.perf_counter()
    with pytest.raises(CorruptFile, match="comma or the end"):
        Checkpoint.open(path)
    assert time.perf_counter() - began < SECONDS


def test_memory_stays_near_the_header_size_for_a_header_that_would_explode(tmp_path):
    """As one JSON value, these 6 MB would be 130 MB of Python lists."""
    path = as_file(pack('{"w":[' + "[]," * 2_000_000 + "[]]}"))(tmp_path)
    error = opened_quickly(path)
    assert "'w'" in str(error)


def test_bool_bytes_other_than_0_and_1(tmp_path):
    path = one(b"\x01\x02", dtype="BOOL", shape=[2], offsets=[0, 2])(tmp_path)
    checkpoint = Checkpoint.open(path)
    for copy in (True, False):
        with pytest.raises(CorruptFile, match=r"tensor 'w' in .*model\.safetensors is bool"):
            checkpoint.read("w", copy=copy)


def test_f6_is_listed_but_cannot_be_read(tmp_path):
    path = one(b"\0" * 3, dtype="F6_E2M3", shape=[4], offsets=[0, 3])(tmp_path)
    checkpoint = Checkpoint.open(path)
    assert checkpoint.tensors["w"].nbytes == 3
    with pytest.raises(
        CheckpointError, match=r"'w' in .*model\.safetensors is float6_e2m3fn, a dtype this torch does not have"
    ):
        checkpoint.read("w")


def test_a_file_that_changed_after_opening(tmp_path):
    path = as_file(VALID)(tmp_path)
    checkpoint = Checkpoint.open(path)
    path.write_bytes(VALID[:-1])
    with pytest.raises(CorruptFile, match="has changed since its header was read"):
        checkpoint.read("w")


def test_a_file_that_shrinks_while_open(tmp_path):
    path = as_file(tensors("v", "w"))(tmp_path)
    checkpoint = Checkpoint.open(path)
    checkpoint.read("v")
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CorruptFile, match="something shortened it"):
        checkpoint.read("w")


# --- fuzz -----------------------------------------------------------------------------------------------------------------

SMALL = {
    "a": torch.arange(6, dtype=torch.int32).reshape(2, 3),
    "b.weight": torch.ones(3, dtype=torch.bfloat16),
    "e": torch.zeros(0, 2),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    save_file(SMALL, path, metadata={"format": "pt"})
    return path


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_never_raise_anything_unforeseen(small, data):
    """Flip, cut, insert: an AnybitError, or exactly what the safetensors package reads."""
    content = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 4), label="changes")):
        position = data.draw(st.integers(0, max(len(content) - 1, 0)), label="position")
        change = data.draw(st.sampled_from(["flip", "cut", "insert", "drop", "digit"]), label="change")
        if change == "flip" and content:
            content[position] ^= 1 << data.draw(st.integers(0, 7))
        elif change == "cut":
            del content[position:]
        elif change == "insert":
            content[position:position] = data.draw(st.binary(min_size=1, max_size=4))
        elif change == "drop":
            del content[position : position + data.draw(st.integers(1, 8))]
        elif content:
            content[position] = data.draw(st.sampled_from(list(b'0123456789,[]{}":\\')))
    path = small.with_name("damaged.safetensors")
    path.write_bytes(content)
    found, error = outcome(path)
    if error is not None:
        assert "damaged.safetensors" in str(error)
        return
    expected = load(bytes(content))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def outcome(path: Path) -> tuple[dict[str, torch.Tensor], AnybitError | None]:
    try:
        checkpoint = Checkpoint.open(path)
        return {name: checkpoint.read(name) for name in checkpoint.tensors}, None
    except AnybitError as error:
        return {}, error
