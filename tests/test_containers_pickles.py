"""torch.save files: read without running anything, refused when they want something run."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anybit.containers import Checkpoint
from anybit.errors import AnybitError, CheckpointError, CorruptFile, MissingTensor, UnsafeFile


def example() -> dict[str, object]:
    base = torch.arange(100.0)
    return {
        "contiguous": torch.arange(12, dtype=torch.int32).reshape(3, 4),
        "transposed": torch.arange(12.0).reshape(3, 4).t(),
        "part": base[10:20],
        "every_second": base[15:40:2],
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "bfloat16": torch.randn(5).bfloat16(),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "uint16": torch.arange(4).to(torch.uint16),
        "bool": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j]),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        "nested": collections.OrderedDict(
            weight=torch.ones(1), bits=4, shape=torch.Size((1, 2)), dtype=torch.float16, none=None
        ),
        "list": [torch.ones(2), torch.zeros(1)],
    }


def flat(value: object) -> dict[str, torch.Tensor]:
    found = {name: item for name, item in value.items() if isinstance(item, torch.Tensor)}
    return {**found, "nested.weight": value["nested"]["weight"], "list.0": value["list"][0], "list.1": value["list"][1]}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(as_bytes(left), as_bytes(right))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("as_zip", [True, False])
def test_reads_what_torch_reads(tmp_path, as_zip, protocol):
    path, value = tmp_path / "model.pt", example()
    torch.save(value, path, _use_new_zipfile_serialization=as_zip, pickle_protocol=protocol)
    # torch's own restricted reader takes protocol 2 only, and no uint16 or float8 in the legacy layout
    expected = flat(torch.load(path, weights_only=True) if as_zip and protocol == 2 else value)
    with Checkpoint.open(path, allow_pickle=True) as checkpoint:
        assert set(checkpoint.tensors) == set(expected)
        for name, tensor in expected.items():
            assert checkpoint.tensors[name].nbytes == tensor.numel() * tensor.element_size()
            for copy in (True, False):
                assert same(checkpoint.read(name, copy=copy), tensor), name
    assert checkpoint.values == {
        "nested.bits": 4,
        "nested.shape": (1, 2),
        "nested.dtype": "float16",
        "nested.none": None,
    }


def test_reading_a_part_leaves_the_rest_of_its_storage_alone(tmp_path):
    torch.save({"w": torch.zeros(1000, 1000)[0]}, tmp_path / "model.pt")
    with Checkpoint.open(tmp_path / "model.pt", allow_pickle=True) as checkpoint:
        assert checkpoint.read("w").untyped_storage().nbytes() == 4000


def test_a_state_dict_of_a_module(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")  # an OrderedDict with a _metadata attribute
    with Checkpoint.open(tmp_path, allow_pickle=True) as checkpoint:
        assert all(same(checkpoint.read(name), tensor) for name, tensor in module.state_dict().items())
        assert len(checkpoint.tensors) == len(module.state_dict())


def test_shards_of_an_index(tmp_path):
    first, second = {"a": torch.ones(2)}, {"b": torch.zeros(3)}
    torch.save(first, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(second, tmp_path / "pytorch_model-00002-of-00002.bin")
    torch.save({"lr": 1.0}, tmp_path / "training_args.bin")
    files = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(UnsafeFile, match=r"pytorch_model-00001-of-00002\.bin is a pickle.*allow_pickle=True"):
        Checkpoint.open(tmp_path)
    with pytest.raises(UnsafeFile, match="allow_pickle=True"):
        Checkpoint.open(tmp_path / "pytorch_model.bin.index.json")
    with Checkpoint.open(tmp_path, allow_pickle=True) as checkpoint:
        assert same(checkpoint.read("a"), first["a"])
        assert same(checkpoint.read("b"), second["b"])
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    assert set(Checkpoint.open(tmp_path, allow_pickle=True).tensors) == {"a", "b"}
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(MissingTensor, match="missing: 2"):
        Checkpoint.open(tmp_path, allow_pickle=True)


def test_headers_of_a_pickle_need_no_torch(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pt")
    code = (
        "import sys; from anybit.containers import Checkpoint\n"
        f"checkpoint = Checkpoint.open({str(tmp_path / 'model.pt')!r}, allow_pickle=True)\n"
        "assert checkpoint.tensors['w'].shape == (2,)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- refused --------------------------------------------------------------------------------------------------------------


class Runs:
    """A pickle of this leaves a file behind wherever it is loaded."""

    def __init__(self, function: object, *arguments: object):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.function, self.arguments


def archive(
    data: bytes | None, entries: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        if data is not None:
            file.writestr("archive/data.pkl", data)
        for name, content in (entries or {}).items():
            file.writestr(name, content)
    return buffer.getvalue()


class Claims:
    """A tensor as a pickle describes it: any storage, any numbers."""

    def __init__(self, offset: object, shape: object, stride: object, count: object = 2, key: object = "0"):
        self.numbers, self.storage = (offset, shape, stride), ("storage", torch.FloatStorage, key, "cpu", count)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        storage = Storage(self.storage)
        return torch._utils._rebuild_tensor_v2, (storage, *self.numbers, False, collections.OrderedDict())


class Storage:
    def __init__(self, claim: tuple[object, ...]):
        self.claim = claim


class Pickler(pickle.Pickler):
    def persistent_id(self, item: object) -> object:
        return item.claim if isinstance(item, Storage) else None


def dump(value: object, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


DATA = {"archive/data/0": struct.pack("<2f", 1, 2)}
GOOD = dump({"w": Claims(0, (2,), (1,))})


def claims(*numbers: object, **more: object) -> bytes:
    return archive(dump({"w": Claims(*numbers, **more)}), DATA)


MAGIC = 0x1950A86A20F9469CFC6C


def legacy(value: bytes, keys: bytes, storages: bytes = b"") -> bytes:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    return dump(MAGIC) + dump(1001) + dump(system) + value + keys + storages


def cyclic() -> dict[str, object]:
    value: dict[str, object] = {}
    value["self"] = value
    return value


def laughs() -> dict[str, object]:
    """Two to the power of 16 leaves in a few hundred bytes."""
    value: dict[str, object] = {"leaf": 1}
    for _ in range(16):
        value = {"a": value, "b": value}
    return value


TWO = struct.pack("<q2f", 2, 1, 2)
REFUSED: list[tuple[str, bytes, type[CheckpointError], list[str]]] = [
    ("runs os.system", archive(dump({"w": Runs(os.system, "touch ran")})), UnsafeFile, ["posix.system"]),
    ("runs eval, protocol 4", archive(dump({"w": Runs(eval, "open('ran', 'w')")}, 4)), UnsafeFile, ["builtins.eval"]),
    ("runs eval, legacy", dump(Runs(eval, "open('ran', 'w')")), UnsafeFile, ["builtin", "eval"]),
    ("runs in the fourth pickle", legacy(dump({"w": Runs(os.system, "touch ran")}), dump([])), UnsafeFile, ["posix.system"]),
    ("a numpy array", archive(b"\x80\x02cnumpy._core.multiarray\n_reconstruct\n."), UnsafeFile, ["multiarray._reconstruct"]),
    ("a whole module", archive(b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81."), UnsafeFile, ["linear.Linear"]),
    ("a dotted name", archive(b"\x80\x04\x8c\x05torch\x8c\x10hub.load_state_x\x93."), UnsafeFile, ["torch.hub.load_state_x"]),
    ("the opcode INST", archive(b"(S'touch ran'\nios\nsystem\n."), UnsafeFile, ["opcode"]),
    ("an extension code", archive(b"\x80\x02\x82\x01."), UnsafeFile, ["opcode EXT1"]),
    ("calls a storage class", archive(b"\x80\x02ctorch\nFloatStorage\n)R."), UnsafeFile, ["calls", "torch.FloatStorage"]),
    ("calls a text", archive(b"\x80\x02X\x01\x00\x00\x00a)R."), UnsafeFile, ["calls", "'a'"]),
    ("sets attributes of a tensor", archive(b"\x80\x02K\x01}b."), CorruptFile, ["dict expected"]),
    ("path upwards", archive(GOOD, {"../../etc/cron.d/x": b"", **DATA}), UnsafeFile, ["../../etc/cron.d/x"]),
    ("path absolute", archive(GOOD, {"/etc/passwd": b"", **DATA}), UnsafeFile, ["/etc/passwd"]),
    ("compressed", archive(GOOD, {"archive/data/0": b"\0" * 100_000_000}, zipfile.ZIP_DEFLATED), CorruptFile, ["compressed"]),
    ("no data.pkl", archive(None, DATA), CorruptFile, ["data.pkl"]),
    ("two data.pkl", archive(GOOD, {"other/data.pkl": GOOD}), CorruptFile, ["data.pkl"]),
    ("not a zip after all", b"PK\x03\x04" + b"\0" * 100, CorruptFile, ["damaged zip"]),
    ("cut zip", archive(GOOD, DATA)[:-30], CorruptFile, ["damaged zip"]),
    ("big endian", archive(GOOD, {"archive/byteorder": b"big", **DATA}), CorruptFile, ["big-endian"]),
    ("storage missing", archive(GOOD), CorruptFile, ["'w'", "storage '0' is not in the file"]),
    ("storage short", archive(GOOD, {"archive/data/0": b"\0" * 7}), CorruptFile, ["'w'", "beyond its storage of 7 bytes"]),
    ("shape beyond storage", claims(0, (3,), (1,)), CorruptFile, ["'w'", "beyond"]),
    ("offset beyond storage", claims(1, (2,), (1,)), CorruptFile, ["'w'", "beyond"]),
    ("stride beyond storage", claims(0, (2,), (1 << 40,)), CorruptFile, ["'w'", "beyond"]),
    ("expanded to a terabyte", claims(0, (1 << 40,), (0,)), CorruptFile, ["'w'", "beyond"]),
    ("overflowing shape", claims(0, (1 << 40, 1 << 40), (0, 0)), CorruptFile, ["'w'", "beyond"]),
    ("negative offset", claims(-1, (1,), (1,)), CorruptFile, ["'w'", "cannot be"]),
    ("negative stride", claims(1, (2,), (-1,)), CorruptFile, ["'w'", "cannot be"]),
    ("shape of text", claims(0, ("2",), (1,)), CorruptFile, ["'w'", "cannot be"]),
    ("shape without strides", claims(0, (1, 2), (1,)), CorruptFile, ["'w'"]),
    ("shape a number", claims(0, 2, 1), CorruptFile, ["not a pickle that torch.save wrote"]),
    ("storage of a negative count", claims(0, (2,), (1,), count=-2), CorruptFile, ["not a pickle that torch.save wrote"]),
    ("no storage", archive(dump({"w": Runs(torch._utils._rebuild_tensor, None, 0, (2,), (1,))})), CorruptFile, ["not a pickle"]),
    ("a list", archive(dump([1, 2])), CorruptFile, ["holds a list"]),
    ("a tensor alone", archive(dump(Claims(0, (2,), (1,))), DATA), CorruptFile, ["holds a Pickled"]),
    ("a class as value", archive(b"\x80\x02}X\x01\x00\x00\x00actorch\nFloatStorage\ns."), CorruptFile, ["'a'", "neither a"]),
    ("holds itself", archive(dump(cyclic())), CorruptFile, ["deep"]),
    ("a billion laughs", archive(dump(laughs())), CorruptFile, ["repeats"]),
    ("key a tuple", archive(dump({(1, 2): 3})), CorruptFile, ["(1, 2)"]),
    ("key unhashable", archive(b"\x80\x02}]K\x01s."), CorruptFile, ["unhashable"]),
    ("no stop", archive(GOOD[:-1], DATA), CorruptFile, ["not a pickle"]),
    ("stack empty", archive(b"\x80\x020."), CorruptFile, ["not a pickle"]),
    ("no mark", archive(b"\x80\x02t."), CorruptFile, ["mark"]),
    ("memo unset", archive(b"\x80\x02h\x07."), CorruptFile, ["not a pickle"]),
    ("protocol 9", archive(b"\x80\x09}."), CorruptFile, ["protocol 9"]),
    ("text of 2^60 bytes", archive(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"a."), CorruptFile, ["not a pickle"]),
    ("random bytes", b"\x80\x02" + bytes(range(256)), CheckpointError, []),
    ("text", b"weights, honestly", CorruptFile, ["no torch.save file"]),
    ("a plain pickle", dump({"a": 1}), CorruptFile, ["not one that torch.save wrote"]),
    ("legacy, cut", legacy(GOOD, dump(["0"]), TWO[:-1]), CorruptFile, ["'0'", "2 elements"]),
    ("legacy, no data", legacy(GOOD, dump(["0"])), CorruptFile, ["truncated", "'0'"]),
    ("legacy, bytes behind", legacy(GOOD, dump(["0"]), TWO + b"x"), CorruptFile, ["1 bytes after"]),
    ("legacy, other count", legacy(GOOD, dump(["0"]), struct.pack("<q", 1 << 62)), CorruptFile, ["'0'", str(1 << 62)]),
    ("legacy, unknown storage", legacy(GOOD, dump(["1"]), TWO), CorruptFile, ["list of storages"]),
    ("legacy, big endian", dump(MAGIC) + dump(1001) + dump({"little_endian": False}), CorruptFile, ["not supported"]),
]  # fmt: skip


def open_and_read(path: Path) -> dict[str, torch.Tensor]:
    with Checkpoint.open(path, allow_pickle=True) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.mark.parametrize(("content", "kind", "says"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(tmp_path, monkeypatch, content, kind, says):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    began = time.perf_counter()
    with pytest.raises(kind) as caught:
        open_and_read(path)
    assert time.perf_counter() - began < 5
    for text in ["model.bin", *says]:
        assert text in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert not (tmp_path / "ran").exists()


def test_the_rows_above_would_be_fine_without_the_fault(tmp_path):
    (tmp_path / "model.bin").write_bytes(archive(GOOD, DATA))
    assert Checkpoint.open(tmp_path, allow_pickle=True).read("w").tolist() == [1, 2]
    (tmp_path / "model.bin").write_bytes(legacy(GOOD, dump(["0"]), TWO))
    assert Checkpoint.open(tmp_path, allow_pickle=True).read("w").tolist() == [1, 2]


def test_not_read_unless_asked(tmp_path):
    (tmp_path / "model.pth").write_bytes(archive(GOOD, DATA))
    for path in (tmp_path, tmp_path / "model.pth"):
        with pytest.raises(UnsafeFile, match=r"model\.pth is a pickle.*allow_pickle=True"):
            Checkpoint.open(path)


def test_overlapping_storages(tmp_path):
    """The directory names the same bytes twice."""
    content = bytearray(archive(GOOD, {"archive/data/0": DATA["archive/data/0"], "archive/data/1": b"\1" * 8}))
    with zipfile.ZipFile(io.BytesIO(bytes(content))) as file:
        first, second = file.getinfo("archive/data/0"), file.getinfo("archive/data/1")
    content = content.replace(
        struct.pack("<L", second.header_offset) + b"archive/data/1",
        struct.pack("<L", first.header_offset) + b"archive/data/1",
    )
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"model\.bin: storages '0' and '1' overlap"):
        Checkpoint.open(tmp_path, allow_pickle=True)


def test_too_many_opcodes(tmp_path, monkeypatch):
    monkeypatch.setattr("anybit.containers.unpickle.MAX_OPCODES", 10_000)
    (tmp_path / "model.bin").write_bytes(archive(b"\x80\x02" + b"}0" * 10_000 + b"}."))
    with pytest.raises(CorruptFile, match="more than 10000 pickle opcodes"):
        Checkpoint.open(tmp_path, allow_pickle=True)


def test_a_zip_directory_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("anybit.containers.pickles.MAX_DIRECTORY_BYTES", 70_000)
    (tmp_path / "model.bin").write_bytes(archive(GOOD, {f"archive/data/{i}": b"" for i in range(2000)}))
    with pytest.raises(CorruptFile, match=r"model\.bin: a directory or pickle of \d+ bytes, the limit is 70000"):
        Checkpoint.open(tmp_path, allow_pickle=True)


# --- fuzz -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    folder, value = (
        tmp_path_factory.mktemp("fuzz"),
        {"a": torch.arange(6.0).reshape(2, 3), "b": {"c": torch.ones(3).half(), "d": 1}},
    )
    contents = {}
    for kind in ("zip", "legacy"):
        torch.save(value, folder / kind, _use_new_zipfile_serialization=kind == "zip")
        contents[kind] = (folder / kind).read_bytes()
    return folder, contents


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_never_raise_anything_unforeseen(saved, data):
    folder, contents = saved
    content = bytearray(contents[data.draw(st.sampled_from(["zip", "legacy"]))])
    opcodes = sorted(ord(code.code) for code in pickletools.opcodes)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        change = data.draw(st.sampled_from(["flip", "opcode", "insert", "drop"]))
        if change == "flip":
            content[position] ^= 1 << data.draw(st.integers(0, 7))
        elif change == "opcode":
            content[position] = data.draw(st.sampled_from(opcodes))
        elif change == "insert":
            content[position:position] = data.draw(st.binary(min_size=1, max_size=4))
        else:
            del content[position : position + data.draw(st.integers(1, 8))]
    path = folder / "damaged.bin"
    path.write_bytes(content)
    error = refusal(path)
    assert error is None or "damaged.bin" in str(error)


def refusal(path: Path) -> AnybitError | None:
    try:
        open_and_read(path)
    except AnybitError as error:
        return error
    return None
