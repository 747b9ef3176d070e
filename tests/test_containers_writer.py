"""Writing: the bytes of the safetensors package, one tensor in memory, and a folder that is complete or not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from anybit.containers import Checkpoint
from anybit.containers.info import STORED_TYPES
from anybit.containers.shards import parse_size
from anybit.containers.writer import SafetensorsWriter, aligned_order, split
from anybit.errors import (
    InvalidOption,
    MissingTensor,
    NotRepresentable,
    ShapeMismatch,
    UnexpectedTensor,
)

GOLDEN = Path(__file__).parent / "golden"


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(folder: Path, tensors: dict[str, torch.Tensor], **options: object) -> None:
    with SafetensorsWriter(folder, specs_of(tensors), **options) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def visible(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# --- bytes ----------------------------------------------------------------------------------------------------------------


def test_the_bytes_of_the_package(tmp_path):
    """Every dtype, empty and scalar tensors, names to escape, metadata."""
    tensors: dict[str, torch.Tensor] = {}
    for kind in STORED_TYPES:
        if hasattr(torch, kind.torch):
            raw = (
                torch.zeros(6, 8, dtype=torch.uint8)
                if kind.torch == "bool"
                else torch.randint(0, 256, (6, 8), dtype=torch.uint8)
            )
            tensors[f"x.{kind.torch}"] = raw.view(getattr(torch, kind.torch))
    tensors |= {
        'quote"\n\x1f\x7fé🙂': torch.ones(1),
        "empty": torch.ones(0, 3).half(),
        "scalar": torch.tensor(2.0).double(),
    }
    save_file(tensors, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    ordered = {name: tensors[name] for name in aligned_order(specs_of(tensors))}
    write(tmp_path, ordered, metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64]),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        max_size=6,
    ),
    st.dictionaries(st.just("key"), st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=1),
    st.randoms(),
)
def test_random_files_are_those_of_the_package(tmp_path_factory, specs, metadata, random_order):
    folder = tmp_path_factory.mktemp("random")
    tensors = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in specs.items()}
    save_file(tensors, folder / "expected.safetensors", metadata=metadata or None)
    names = list(tensors)
    random_order.shuffle(names)
    order = aligned_order(specs_of(tensors))
    with SafetensorsWriter(folder, {name: specs_of(tensors)[name] for name in order}, metadata=metadata) as writer:
        for name in names:
            writer.write(name, tensors[name])
    assert (folder / "model.safetensors").read_bytes() == (folder / "expected.safetensors").read_bytes()


def test_the_given_order_is_kept(tmp_path):
    tensors = {"b": torch.ones(3, dtype=torch.uint8), "a": torch.ones(2), "c": torch.ones(1).double()}
    write(tmp_path, tensors)
    assert list(Checkpoint.open(tmp_path).tensors) == ["b", "a", "c"]
    assert {name: tensor.tolist() for name, tensor in load_file(tmp_path / "model.safetensors").items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


def is_in_usual_style(path: Path) -> bool:
    """Whether the header is the JSON that the safetensors package writes; MLX has a writer of its own."""
    raw = path.read_bytes()
    text = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    return (
        json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False).encode() == text.rstrip()
        and len(text) % 8 == 0
    )


USUAL = [path for path in sorted(GOLDEN.glob("*/*/model.safetensors")) if is_in_usual_style(path)]


def test_most_goldens_are_in_the_usual_style():
    assert len(USUAL) > 0.8 * len(list(GOLDEN.glob("*/*/model.safetensors")))


@pytest.mark.parametrize("path", USUAL, ids=lambda path: "/".join(path.parts[-3:-1]))
def test_goldens_are_rewritten_byte_for_byte(tmp_path, path):
    with Checkpoint.open(path) as checkpoint:
        specs = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
        with SafetensorsWriter(tmp_path, specs, metadata=checkpoint.metadata) as writer:
            for name in reversed(list(specs)):
                writer.write(name, checkpoint.read(name, copy=False))
    assert (tmp_path / "model.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(100.0)[3:90:7],
        torch.arange(4.0).expand(3, 4),
        torch.nn.Parameter(torch.ones(2, 2)),
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        torch.tensor(True),
    ],
    ids=["transposed", "strided", "expanded", "parameter", "conjugate", "negative", "bool scalar"],
)
def test_tensors_that_are_views(tmp_path, tensor):
    write(tmp_path, {"w": tensor})
    assert load_file(tmp_path / "model.safetensors")["w"].equal(tensor.detach().resolve_conj().resolve_neg())


# --- shards ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=12), st.integers(1, 40))
def test_split_is_that_of_huggingface_hub(sizes, limit):
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = {f"t{i}": torch.zeros(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    tensors = tensors or {"t": torch.zeros(1, dtype=torch.uint8)}
    expected = split_torch_state_dict_into_shards(
        tensors, max_shard_size=limit, filename_pattern="model{suffix}.safetensors"
    )
    assert split(specs_of(tensors), limit) == expected.tensor_to_filename


def test_shards_and_index(tmp_path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    write(tmp_path, tensors, max_shard_size=80, metadata={"format": "pt"}, index_metadata={"total_parameters": 50})
    assert visible(tmp_path) == [
        *(f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    text = (tmp_path / "model.safetensors.index.json").read_text()
    assert json.loads(text)["metadata"] == {"total_parameters": 50, "total_size": 200}
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"  # as transformers writes it
    for name, file in json.loads(text)["weight_map"].items():
        assert load_file(tmp_path / file)[name].equal(tensors[name])
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == list(tensors)


def test_a_division_given_by_the_caller(tmp_path):
    tensors = {name: torch.ones(2) for name in "abc"}
    write(tmp_path, tensors, files={"a": "x.safetensors", "b": "y.safetensors", "c": "x.safetensors"})
    assert set(load_file(tmp_path / "x.safetensors")) == {"a", "c"}
    with pytest.raises(InvalidOption, match="no plain file name"):
        SafetensorsWriter(tmp_path, specs_of(tensors), files=dict.fromkeys("abc", "../x.safetensors"))
    with pytest.raises(UnexpectedTensor, match="'c' has a file or a shape, but not both"):
        SafetensorsWriter(tmp_path, specs_of(tensors), files=dict.fromkeys("ab", "x.safetensors"))


def test_tensors_whose_length_is_known_when_they_are_made(tmp_path):
    """Announced as the longest they can be, written shorter: the file is the one of their real lengths."""
    specs = {"state": ("uint8", [100]), "w": ("float32", [2, 2]), "other": ("uint8", [9]), "empty": ("uint8", [5])}
    tensors = {
        "w": torch.ones(2, 2),
        "state": torch.arange(37, dtype=torch.uint8),
        "other": torch.arange(200, dtype=torch.uint8)[7::200],
        "empty": torch.zeros(0, dtype=torch.uint8),
    }
    for limit in ("5GB", 60):
        folder = tmp_path / str(limit)
        folder.mkdir()
        with SafetensorsWriter(folder, specs, limit, shrinking=["state", "other", "empty"]) as writer:
            for name in ("empty", "state", "other", "w"):
                writer.write(name, tensors[name])
        with Checkpoint.open(folder) as checkpoint:
            assert {name: checkpoint.read(name).tolist() for name in checkpoint.tensors} == {
                name: tensor.tolist() for name, tensor in tensors.items()
            }
        index = folder / "model.safetensors.index.json"
        if limit == 60:
            assert json.loads(index.read_text())["metadata"]["total_size"] == 16 + 37 + 1
    with (
        pytest.raises(ShapeMismatch, match=r"'state' is uint8 \[101\]"),
        SafetensorsWriter(tmp_path, specs, shrinking=["state"]) as writer,
    ):
        writer.write("state", torch.zeros(101, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2MiB", 2 << 20), (77, 77), ("77", 77), ("1TB", 10**12)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5 apples", "", "-1", 0, "GB", "1e9", None, "0.1B"])
def test_sizes_that_are_none(text):
    with pytest.raises(InvalidOption, match="max_shard_size"):
        parse_size(text)


def test_one_tensor_in_memory(tmp_path):
    """64 MB in 8 tensors, in a process that may only grow by a few tensors."""
    code = f"""
import torch
from anybit._memory import peak_resident_bytes
from anybit.containers.writer import SafetensorsWriter
specs = {{f"t{{i}}": ("float32", (1 << 21,)) for i in range(8)}}
torch.ones(10).view(torch.uint8).numpy()
with SafetensorsWriter({str(tmp_path)!r}, specs) as writer:
    before = peak_resident_bytes()
    for i in range(8):
        writer.write(f"t{{i}}", torch.full((1 << 21,), float(i)))
grown = peak_resident_bytes() - before
assert grown < 24 << 20, grown
"""
    # what is freed goes back to the system: glibc may otherwise keep several tensors' worth, by how its heap happens to lie
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)
    assert load_file(tmp_path / "model.safetensors")["t7"][-1] == 7


# --- mistakes of the caller ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (
            lambda writer: writer.write("w", torch.ones(3)),
            ShapeMismatch,
            r"'w' is float32 \[3\], but was announced as float32 \[2\]",
        ),
        (lambda writer: writer.write("w", torch.ones(2).half()), ShapeMismatch, "'w' is float16"),
        (lambda writer: writer.write("x", torch.ones(2)), UnexpectedTensor, "'x' was not announced"),
        (
            lambda writer: [writer.write("w", torch.ones(2)) for _ in range(2)],
            UnexpectedTensor,
            "'w' was written .* before",
        ),
        (lambda writer: writer.write("v", torch.ones(2)), MissingTensor, "1 of 2 tensors .* 'w'"),
        (lambda writer: writer.write("w", torch.ones(2, device="meta")), NotRepresentable, "'w' is meta"),
        (lambda writer: writer.write("w", torch.ones(2).to_sparse()), NotRepresentable, "'w' is torch.sparse"),
        (lambda writer: 1 / 0, ZeroDivisionError, "division"),
    ],
)
def test_mistakes_leave_nothing_behind(tmp_path, make, error, says):
    def mistaken() -> None:
        with SafetensorsWriter(tmp_path, {"v": ("float32", [2]), "w": ("float32", [2])}, 8) as writer:
            assert len(visible(tmp_path)) == 2
            make(writer)

    with pytest.raises(error, match=says):
        mistaken()
    assert visible(tmp_path) == []


@pytest.mark.parametrize(
    ("specs", "error", "says"),
    [
        ({"w": ("complex128", [1])}, NotRepresentable, "'w' is complex128, which safetensors cannot hold"),
        ({"w": ("float6_e2m3fn", [4])}, NotRepresentable, "'w'"),
        ({"w": (torch.qint8, [4])}, NotRepresentable, "'w' is qint8"),
        ({"w": ("float32", [-1])}, ShapeMismatch, "'w'"),
        ({"w": ("float32", [1 << 40, 1 << 40])}, ShapeMismatch, "'w'"),
        ({"__metadata__": ("float32", [1])}, NotRepresentable, "__metadata__"),
    ],
)
def test_specs_that_cannot_be(tmp_path, specs, error, says):
    with pytest.raises(error, match=says):
        SafetensorsWriter(tmp_path, specs)
    assert visible(tmp_path) == []


def test_metadata_must_be_text(tmp_path):
    with pytest.raises(InvalidOption, match="not text"):
        SafetensorsWriter(tmp_path, {}, metadata={"a": 1})


def test_no_tensors(tmp_path):
    write(tmp_path, {})
    assert load_file(tmp_path / "model.safetensors") == {}
    assert dict(Checkpoint.open(tmp_path).tensors) == {}


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match=r"model\.safetensors exists"):
        write(tmp_path, {"w": torch.ones(1)})
    assert (tmp_path / "model.safetensors").read_text() == "mine"
