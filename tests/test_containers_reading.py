"""Checkpoints as they should be: the same tensors as the safetensors package reads, from every layout of a folder."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
from io import FileIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anybit.containers import Checkpoint
from anybit.containers.info import STORED_TYPES
from anybit.errors import CheckpointError, MissingTensor

GOLDEN = Path(__file__).parent / "golden"


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1).view(torch.uint8)

    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(as_bytes(left), as_bytes(right))


def random_bytes(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype)


@pytest.mark.parametrize("copy", [True, False])
def test_every_dtype_the_package_writes(tmp_path, copy):
    kinds = [kind for kind in STORED_TYPES if hasattr(torch, kind.torch)]
    assert len(kinds) >= 18  # all but F6, and F4 or E8M0 with an old torch
    tensors = {kind.torch: random_bytes(getattr(torch, kind.torch), 3, 5) for kind in kinds}
    empty = {f"empty_{name}": tensor[:0].clone() for name, tensor in tensors.items()}
    scalar = {f"scalar_{name}": tensor[0, 0].clone() for name, tensor in tensors.items() if "float4" not in name}
    tensors |= empty | scalar
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": "ä"})
    expected = load_file(path)
    with Checkpoint.open(path) as checkpoint:
        assert set(checkpoint.tensors) == set(expected)
        assert checkpoint.metadata == {"format": "pt", "note": "ä"}
        for name, tensor in expected.items():
            info = checkpoint.tensors[name]
            assert getattr(torch, info.dtype) == tensor.dtype
            assert info.shape == tuple(tensor.shape)
            assert info.nbytes == tensor.numel() * tensor.element_size()
            assert info.file == str(path)
            assert same(checkpoint.read(name, copy=copy), tensor), name


@pytest.mark.parametrize(
    "path", sorted(GOLDEN.glob("*/*/model.safetensors")), ids=lambda path: "/".join(path.parts[-3:-1])
)
def test_goldens_read_as_the_package_reads_them(path):
    expected = load_file(path)
    with Checkpoint.open(path) as checkpoint:
        assert set(checkpoint.tensors) == set(expected)
        assert all(same(checkpoint.read(name), tensor) for name, tensor in expected.items())


def test_tensors_are_listed_in_the_order_of_their_data(tmp_path):
    save_file(
        {"a": torch.ones(1).half(), "b": torch.ones(1), "c": torch.ones(0), "d": torch.ones(1).double()},
        tmp_path / "model.safetensors",
    )
    infos = list(Checkpoint.open(tmp_path).tensors.values())
    assert [info.name for info in infos] == ["d", "b", "c", "a"]
    assert [info.offset for info in infos] == sorted(info.offset for info in infos)


def test_names_that_json_must_escape(tmp_path):
    names = [
        'quote"',
        "back\\slash",
        "line\nbreak",
        "tab\t",
        "\x7f",
        "ünï",
        "日本",
        "🙂",
        "",
        "a.b.c",
        "{}",
        "[1],",
        "w:",
    ]
    save_file({name: torch.full((1,), float(i)) for i, name in enumerate(names)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert {name: checkpoint.read(name).item() for name in checkpoint.tensors} == {
            name: i for i, name in enumerate(names)
        }


def test_a_header_of_another_style(tmp_path):
    """Members in another order, spaces, no padding, data that is not aligned, a key of somebody's own, null metadata."""
    header = (
        b'{ "__metadata__" : null,\n "w":{"data_offsets":[ 0,3 ],"shape":[3], "mine": "x", "dtype":"U8"}  ,'
        b'\t"v": {"shape":[2],"dtype":"F32","data_offsets":[3,11]} }\r\n'
    )
    data = bytes([1, 2, 3]) + torch.tensor([1.5, -2.0]).numpy().tobytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    with Checkpoint.open(path) as checkpoint:
        for copy in (True, False):
            assert checkpoint.read("w", copy=copy).tolist() == [1, 2, 3]
            found = checkpoint.read("v", copy=copy)
            assert found.tolist() == [1.5, -2.0]
            assert found.data_ptr() % 4 == 0


def test_an_unknown_name_is_named_with_the_closest(tmp_path):
    save_file({"model.norm.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(MissingTensor, match=r"'model\.norm\.weigth' is not in .*; did you mean 'model\.norm\.weight'"):
        Checkpoint.open(tmp_path).read("model.norm.weigth")


def test_opening_needs_no_torch(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    code = (
        "import sys; from anybit.containers import Checkpoint\n"
        f"assert Checkpoint.open({str(tmp_path)!r}).tensors['w'].shape == (2,)\n"
        "assert not {'torch', 'numpy', 'safetensors', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- which files ----------------------------------------------------------------------------------------------------------


def put(folder: Path, name: str, *tensors: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({tensor: torch.ones(2) for tensor in tensors}, folder / name, metadata={"format": "pt", "file": name})


def put_index(folder: Path, weight_map: dict[str, str], name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder / name


def test_shards_with_an_index(tmp_path):
    put(tmp_path, "model-00001-of-00002.safetensors", "a", "b")
    put(tmp_path, "model-00002-of-00002.safetensors", "c", "extra")
    put(tmp_path, "consolidated.safetensors", "a", "b", "c")
    files = dict.fromkeys("ab", "model-00001-of-00002.safetensors") | {"c": "model-00002-of-00002.safetensors"}
    index = put_index(tmp_path, files)
    for path in (tmp_path, index, str(index)):
        with Checkpoint.open(path) as checkpoint:
            assert list(checkpoint.tensors) == [
                "a",
                "b",
                "c",
                "extra",
            ]  # headers are the truth, also where the index is silent
            assert Path(checkpoint.tensors["c"].file).name == "model-00002-of-00002.safetensors"
            assert all(checkpoint.read(name).sum() == 2 for name in checkpoint.tensors)
            assert checkpoint.metadata == {"format": "pt", "file": "model-00001-of-00002.safetensors"}
            assert [item["file"] for item in checkpoint.file_metadata.values()] == sorted(set(files.values()))


def test_shards_without_an_index(tmp_path):
    for number in (1, 2, 3):
        put(tmp_path, f"model-{number:05d}-of-00003.safetensors", f"t{number}")
    put(tmp_path, "consolidated.safetensors", "other")
    assert list(Checkpoint.open(tmp_path).tensors) == ["t1", "t2", "t3"]


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["model.safetensors"], "model.safetensors"),
        (["gptq_model-4bit-128g.safetensors"], "gptq_model-4bit-128g.safetensors"),
        (["consolidated.safetensors", "model.safetensors"], "model.safetensors"),
        (["adapter_model.safetensors", "consolidated.safetensors", "model.safetensors"], "model.safetensors"),
    ],
)
def test_which_file_of_a_folder(tmp_path, files, chosen):
    for name in files:
        put(tmp_path, name, name)
    assert list(Checkpoint.open(tmp_path).tensors) == [chosen]


def test_one_file_of_many_by_name(tmp_path):
    put(tmp_path, "a.safetensors", "a")
    put(tmp_path, "b.safetensors", "b")
    assert list(Checkpoint.open(tmp_path / "b.safetensors").tensors) == ["b"]


def test_an_index_of_another_name(tmp_path):
    put(tmp_path, "x.safetensors", "a")
    put_index(tmp_path, {"a": "x.safetensors"}, "diffusion_model.safetensors.index.json")
    assert list(Checkpoint.open(tmp_path).tensors) == ["a"]
    put_index(tmp_path, {"a": "x.safetensors"}, "other_model.safetensors.index.json")
    with pytest.raises(CheckpointError, match="several indexes"):
        Checkpoint.open(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_links_that_are_allowed(tmp_path):
    """The hub cache, links inside the folder, links to the folder, and whatever the user names."""
    repository = tmp_path / "models--owner--name"
    put(repository / "blobs", "0123abc", "w")
    snapshot = repository / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    os.symlink("../../blobs/0123abc", snapshot / "model-00001-of-00001.safetensors")
    (repository / "blobs" / "index").write_text(json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}}))
    os.symlink("../../blobs/index", snapshot / "model.safetensors.index.json")
    assert Checkpoint.open(snapshot).read("w").sum() == 2
    assert Checkpoint.open(snapshot / "model.safetensors.index.json").read("w").sum() == 2

    os.symlink(snapshot, tmp_path / "latest")
    assert Checkpoint.open(tmp_path / "latest").read("w").sum() == 2

    put(tmp_path / "own" / "weights", "w.safetensors", "w")
    os.symlink("weights/w.safetensors", tmp_path / "own" / "model.safetensors")
    assert Checkpoint.open(tmp_path / "own").read("w").sum() == 2

    os.symlink(tmp_path / "own" / "weights" / "w.safetensors", tmp_path / "named.safetensors")
    assert Checkpoint.open(tmp_path / "named.safetensors").read("w").sum() == 2


# --- memory and lifetime -------------------------------------------------------------------------------------------------


def test_a_copy_outlives_its_file(tmp_path):
    save_file({"w": torch.arange(1000.0)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        copied, mapped = checkpoint.read("w"), checkpoint.read("w", copy=False)
    os.unlink(tmp_path / "model.safetensors")
    del checkpoint
    gc.collect()
    assert copied.equal(torch.arange(1000.0))
    assert mapped.equal(torch.arange(1000.0))


@pytest.mark.parametrize("copy", [True, False])
def test_writing_into_a_tensor_never_reaches_the_file(tmp_path, copy, recwarn):
    save_file({"w": torch.ones(1000)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.read("w", copy=copy).zero_()
        checkpoint.release()
        assert checkpoint.read("w", copy=copy).sum() == 1000
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not recwarn.list


def test_views_share_the_map_and_copies_do_not(tmp_path):
    save_file({"a": torch.ones(1000), "b": torch.ones(1000)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        first, second = (checkpoint.read(name, copy=False) for name in "ab")
        assert second.data_ptr() - first.data_ptr() == 4000
        assert checkpoint.read("a").untyped_storage().nbytes() == 4000


def test_reading_again_after_release(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for _ in range(3):
        assert checkpoint.read("w").sum() == 3
        checkpoint.release()


def test_files_are_opened_once_for_many_tensors_and_few_at_a_time(tmp_path, monkeypatch):
    for number in range(1, 6):
        put(tmp_path, f"model-{number:05d}-of-00005.safetensors", *(f"{number}.{letter}" for letter in "abcdef"))
    checkpoint = Checkpoint.open(tmp_path)
    opened: list[str] = []

    def counted(path: Path, mode: str, buffering: int) -> FileIO:
        opened.append(str(path))
        return FileIO(path, mode)

    monkeypatch.setattr("anybit.containers.rawfile.open", counted, raising=False)
    monkeypatch.setattr("anybit.containers.checkpoint.MAX_OPEN_FILES", 2)
    for name in checkpoint.tensors:
        checkpoint.read(name)
    assert len(opened) == 5
    if Path("/proc/self/fd").is_dir():
        held = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        assert sum(str(tmp_path) in target for target in held) == 2
    checkpoint.release()


def test_threads(tmp_path):
    tensors = {f"t{i}": torch.full((5000,), float(i)) for i in range(40)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint, wrong = Checkpoint.open(tmp_path), []

    def read(start: int) -> None:
        for i in range(40):
            name = f"t{(i + start) % 40}"
            if not checkpoint.read(name, copy=bool(i % 3)).equal(tensors[name]):
                wrong.append(name)

    threads = [threading.Thread(target=read, args=(7 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


MEMORY = """
import resource, sys
import torch
from anybit._memory import peak_resident_bytes
from anybit.containers import Checkpoint

MB = 1 << 20
torch.ones(10).sum()
checkpoint = Checkpoint.open(sys.argv[1])

def resident(field=1):
    with open("/proc/self/statm") as file:
        return int(file.read().split()[field]) * resource.getpagesize()

# Copies: no more than one tensor at a time.
checkpoint.read("1.0")
before = peak_resident_bytes()
for name in checkpoint.tensors:
    assert checkpoint.read(name)[0].item() == float(name[2:])
peak = peak_resident_bytes() - before
assert peak < 40 * MB, peak  # of 128, with what the allocator keeps

# Maps: nothing until touched, everything once touched, nothing after release.
checkpoint.release()
before = resident()
kept = [checkpoint.read(name, copy=False) for name in checkpoint.tensors]
assert resident() - before < 8 * MB, resident() - before
assert sum(tensor.sum().item() for tensor in kept) == 2 * 28 * (1 << 21)
assert resident() - before > 100 * MB
del kept
checkpoint.release()
assert resident() - before < 8 * MB, resident() - before

# A limit under which a shard of 64 MB cannot be mapped: copies take over.
resource.setrlimit(resource.RLIMIT_AS, (resident(0) + 60 * MB, -1))
for name in checkpoint.tensors:
    for copy in (True, False):
        assert checkpoint.read(name, copy=copy)[-1].item() == float(name[2:])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory(tmp_path):
    """Two shards of 8 tensors of 8 MB, read in a process of its own."""
    weight_map = {}
    for shard in (1, 2):
        name = f"model-{shard:05d}-of-00002.safetensors"
        tensors = {f"{shard}.{i}": torch.full((1 << 21,), float(i)) for i in range(8)}
        save_file(tensors, tmp_path / name)
        weight_map |= dict.fromkeys(tensors, name)
    put_index(tmp_path, weight_map)
    # what is freed goes back to the system: glibc may otherwise keep several tensors' worth, by how its heap happens to lie
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"},
    )  # fmt: skip
    shutil.rmtree(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
