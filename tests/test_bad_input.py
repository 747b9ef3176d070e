"""Damaged checkpoints, impossible settings, full disks, killed writers: one row per case.

Every row must give a typed error that names what is wrong, soon and before memory is spent, and leave the source untouched and
nothing half-written behind.
"""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import anybit
from anybit import AwqConfig, BitsAndBytesConfig, GPTQConfig
from anybit.errors import (
    AnybitError,
    CheckpointError,
    ConfigError,
    CorruptFile,
    InvalidOption,
    MissingTensor,
    ShapeMismatch,
    UnexpectedTensor,
    UnknownMethod,
    UnsafeFile,
)

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
TINY = ROOT / "examples" / "tiny-llama"
QUARTER = {"gptq": "w4_g32_asym_desc_act", "awq": "w4_g128_zp_gemm", "bitsandbytes": "nf4_double_quant"}
Q = "model.layers.0.self_attn.q_proj"
Change = Callable[[Path], None]


def edit_config(**changes: Any) -> Change:
    """Set keys of quantization_config; None removes a key, `_top` replaces the whole."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        quantization = config["quantization_config"]
        for name, value in changes.items():
            if name == "_top":
                config["quantization_config"] = value
            elif value is None:
                quantization.pop(name, None)
            else:
                quantization[name] = value
        (folder / "config.json").write_text(json.dumps(config))
        for side in folder.glob("quantize_config.json"):
            side.unlink()

    return change


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def edit_bytes(change: Callable[[bytes], bytes], name: str = "model.safetensors") -> Change:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return apply


def edit_header(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(raw: bytes) -> bytes:
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + raw[8 + size :]

    return edit_bytes(apply)


def set_nan(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name].view(-1)[3] = float("nan")


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


def overlap(header: dict[str, Any]) -> None:
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def first(header: dict[str, Any]) -> dict[str, Any]:
    return next(value for name, value in header.items() if name != "__metadata__")  # type: ignore[no-any-return]


# method of the golden, damage, error, what the message must say
ROWS: dict[str, tuple[str, Change, type[AnybitError], str]] = {
    # files
    "truncated": ("gptq", edit_bytes(lambda raw: raw[:-1000]), CorruptFile, r"model\.safetensors"),
    "empty": ("gptq", edit_bytes(lambda raw: b""), CorruptFile, "empty"),
    "seven bytes": ("gptq", edit_bytes(lambda raw: raw[:7]), CorruptFile, r"model\.safetensors"),
    "header longer than the file": ("gptq", edit_bytes(lambda raw: struct.pack("<Q", 1 << 40) + raw[8:]), CorruptFile, "header"),
    "header of 2**63": ("gptq", edit_bytes(lambda raw: struct.pack("<Q", 1 << 63) + raw[8:]), CorruptFile, "header"),
    "header that is no json": ("gptq", edit_bytes(lambda raw: raw[:8] + b"\xff" * 64 + raw[72:]), CorruptFile, r"model\.safetensors"),
    "overlapping tensors": ("gptq", edit_header(overlap), CorruptFile, "model"),
    "shape that overflows": ("gptq", edit_header(lambda h: first(h).update(shape=[1 << 40, 1 << 40])), CorruptFile, "shape|elements"),
    "negative shape": ("gptq", edit_header(lambda h: first(h).update(shape=[-1, 8])), CorruptFile, "shape|-1"),
    "unknown dtype": ("gptq", edit_header(lambda h: first(h).update(dtype="Q7")), CorruptFile, "Q7"),
    "offsets beyond the file": ("gptq", edit_header(lambda h: first(h).update(data_offsets=[0, 1 << 50])), CorruptFile, "model"),
    "config.json is no json": ("gptq", edit_bytes(lambda raw: b"{", "config.json"), CorruptFile, r"config\.json"),
    "config.json is a list": ("gptq", edit_bytes(lambda raw: b"[]", "config.json"), CorruptFile, "list"),
    "config.json nests 100,000 levels": ("gptq", edit_bytes(lambda raw: b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "config.json"), CorruptFile, "nest"),
    "no weights": ("gptq", lambda folder: (folder / "model.safetensors").unlink(), CheckpointError, "safetensors"),
    "pickled weights": ("gptq", lambda folder: os.rename(folder / "model.safetensors", folder / "pytorch_model.bin"), UnsafeFile, "allow_pickle"),
    "index leads out of the folder": (
        "gptq",
        lambda folder: (folder / "model.safetensors").rename(folder.parent / "out.safetensors")
        and (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../out.safetensors"}})),
        UnsafeFile, r"\.\./out",
    ),
    # tensors
    "missing qweight": ("gptq", edit_tensors(lambda t: t.pop(f"{Q}.qweight")), MissingTensor, f"{Q}.*qweight"),
    "missing scales": ("awq", edit_tensors(lambda t: t.pop(f"{Q}.scales")), MissingTensor, f"{Q}.*scales"),
    "missing absmax": ("bitsandbytes", edit_tensors(lambda t: t.pop(f"{Q}.weight.absmax")), MissingTensor, f"{Q}.*absmax"),
    "missing norm": ("gptq", edit_tensors(lambda t: t.pop("model.norm.weight")), MissingTensor, r"model\.norm\.weight"),
    "missing layer": ("gptq", edit_tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith(Q)]), MissingTensor, Q),
    "extra tensor": ("gptq", edit_tensors(lambda t: t.update({"model.surprise": torch.zeros(3)})), UnexpectedTensor, "surprise"),
    "extra tensor of a layer": ("gptq", edit_tensors(lambda t: t.update({f"{Q}.zeros": torch.zeros(3)})), UnexpectedTensor, "zeros"),
    "renamed tensor": ("gptq", edit_tensors(lambda t: rename(t, f"{Q}.scales", f"{Q}.scale")), MissingTensor, "scales"),
    "transposed qweight": ("gptq", edit_tensors(lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].T.contiguous()})), ShapeMismatch, "qweight"),
    "transposed norm": ("gptq", edit_tensors(lambda t: t.update({"model.norm.weight": torch.zeros(1, 256)})), ShapeMismatch, "norm"),
    "NaN scale": ("gptq", edit_tensors(lambda t: set_nan(t, f"{Q}.scales")), CorruptFile, f"{Q}.*scales"),
    "NaN scale, awq": ("awq", edit_tensors(lambda t: set_nan(t, f"{Q}.scales")), CorruptFile, f"{Q}.*scales"),
    "NaN nested absmax": ("bitsandbytes", edit_tensors(lambda t: set_nan(t, f"{Q}.weight.nested_absmax")), CorruptFile, f"{Q}.*absmax"),
    "g_idx out of range": ("gptq", edit_tensors(lambda t: t[f"{Q}.g_idx"].fill_(10_000)), CorruptFile, f"{Q}.*g_idx"),
    "negative g_idx": ("gptq", edit_tensors(lambda t: t[f"{Q}.g_idx"].fill_(-1)), CorruptFile, f"{Q}.*g_idx"),
    "scales of integers": ("gptq", edit_tensors(lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].int()})), ShapeMismatch, "scales"),
    # configuration
    "bits 0": ("gptq", edit_config(bits=0), InvalidOption, "bits"),
    "bits '4'": ("gptq", edit_config(bits="4"), InvalidOption, "bits"),
    "bits 17": ("gptq", edit_config(bits=17), InvalidOption, "bits"),
    "bits 8 on 4-bit tensors": ("gptq", edit_config(bits=8), CheckpointError, "qweight|bits"),
    "group_size 0": ("gptq", edit_config(group_size=0), InvalidOption, "group_size"),
    "group_size of another": ("awq", edit_config(group_size=32), CheckpointError, "qzeros|scales|group"),
    "both widths": ("bitsandbytes", edit_config(load_in_8bit=True), InvalidOption, "load_in_4bit"),
    "neither width": ("bitsandbytes", edit_config(load_in_4bit=False, _load_in_4bit=None), ConfigError, "load_in"),
    "unknown method": ("gptq", edit_config(quant_method="gptqq"), UnknownMethod, "did you mean 'gptq'"),
    "method is null and nothing else": ("gptq", edit_config(_top={"quant_method": None}), ConfigError, "quant_method"),
    "configuration is a list": ("gptq", edit_config(_top=["gptq"]), ConfigError, "object"),
    "configuration of another method": ("gptq", edit_config(_top={"quant_method": "awq", "bits": 4, "group_size": 32}), CheckpointError, Q),
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("row", ROWS)
def test_damage_is_named(row: str, tmp_path: Path) -> None:
    method, change, error, words = ROWS[row]
    folder = tmp_path / "model"
    shutil.copytree(
        GOLDEN / method / QUARTER[method],
        folder,
        ignore=shutil.ignore_patterns("reference.safetensors", "fixture.json"),
    )
    change(folder)
    before = contents(folder)
    start = time.perf_counter()
    with pytest.raises(error, match=words) as caught:
        anybit.load(folder)
    assert (
        time.perf_counter() - start < 10
    )  # a second on a quiet machine; far less than reading terabytes that are not there
    assert len(str(caught.value)) < 3000
    assert contents(folder) == before
    with pytest.raises(AnybitError):
        anybit.dequantize(folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "out.safetensors"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BitsAndBytesConfig(load_in_4bit=True, load_in_8bit=True), "load_in_4bit and load_in_8bit"),
        (lambda: BitsAndBytesConfig(load_in_4bit="yes"), "load_in_4bit"),
        (lambda: GPTQConfig(bits=5.0), "bits"),
        (lambda: GPTQConfig(bits=4, group_size=-2), "group_size"),
        (lambda: AwqConfig(bits=4, versoin="gemm"), "did you mean 'version'"),
        (lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_typ="nf4"), "did you mean 'bnb_4bit_quant_type'"),
    ],
)
def test_impossible_configurations(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_configuration_without_a_width_cannot_quantize(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither load_in_4bit nor load_in_8bit"):
        anybit.quantize(TINY, tmp_path / "out", BitsAndBytesConfig())


# --- output ----------------------------------------------------------------------------------------------------------------


def test_an_existing_output_is_refused_and_left_alone(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "gptq" / "w4_g128_sym", tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(FileExistsError, match="force"):
        anybit.quantize(TINY, tmp_path / "out", GPTQConfig(bits=4))
    assert contents(tmp_path / "out") == before
    model: Any = anybit.load(GOLDEN / "awq" / "w4_g128_zp_gemm")
    with pytest.raises(FileExistsError, match="force"):
        model.save_pretrained(tmp_path / "out")
    assert contents(tmp_path / "out") == before
    anybit.quantize(TINY, tmp_path / "out", GPTQConfig(bits=4), force=True)
    assert anybit.inspect(tmp_path / "out", layouts=False).method == "gptq"


def test_a_tokenizer_saved_first_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    model: Any = anybit.load(GOLDEN / "awq" / "w4_g128_zp_gemm")
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert anybit.inspect(tmp_path / "out").problems == ()
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_the_source_cannot_be_the_output(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    before = contents(tmp_path / "model")
    with pytest.raises((FileExistsError, AnybitError)):
        anybit.quantize(tmp_path / "model", tmp_path / "model", GPTQConfig(bits=4))
    assert contents(tmp_path / "model") == before


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import anybit
try:
    anybit.quantize(sys.argv[1], sys.argv[2], anybit.GPTQConfig(bits=4))
except OSError as error:
    print(type(error).__name__, error)
"""


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """The largest file the child may write is smaller than the output: the system then refuses like a full disk."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(TINY), str(tmp_path / "out")], capture_output=True, text=True, timeout=120
    )
    assert "safetensors" in done.stdout, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


SLOW = """
import sys, time
import anybit
from anybit.engine import quantize as module
anybit.quantize(sys.argv[1], sys.argv[2], anybit.GPTQConfig(bits=4), progress=lambda *_: (print("step", flush=True), time.sleep(0.05)))
"""


def test_a_killed_writer_leaves_no_output_and_the_next_one_succeeds(tmp_path: Path) -> None:
    for steps in (1, 7, 20):
        child = subprocess.Popen(
            [sys.executable, "-c", SLOW, str(TINY), str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for _ in range(steps):
            child.stdout.readline()
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert not (tmp_path / "out").exists()
    anybit.quantize(TINY, tmp_path / "out", GPTQConfig(bits=4))
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "what the killed writers left is cleaned up"
    anybit.quantize(TINY, tmp_path / "again", GPTQConfig(bits=4))
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
