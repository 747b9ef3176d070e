"""GGUF files beyond the plain one: several parts, the other byte order, broken runs that are gone on with."""

from __future__ import annotations

import importlib
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_gguf_architectures import CASES, build
from test_resume import CALIBRATED, TEXT, TINY, broken, content

import anybit
from anybit import GgufConfig
from anybit.containers import Checkpoint
from anybit.engine import resume
from anybit.errors import ConfigError
from anybit.methods._gguf_imatrix import read


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def logits(path: Path) -> torch.Tensor:
    model: Any = anybit.load(path)
    found: torch.Tensor = model(torch.arange(12)[None]).logits
    return found


# --- several parts ---------------------------------------------------------------------------------------------------------


def test_a_large_model_is_cut_as_llama_cpp_cuts_it(llama: Path, tmp_path: Path) -> None:
    anybit.quantize(llama, tmp_path / "one", GgufConfig(mix="Q8_0"))
    anybit.quantize(llama, tmp_path / "parts", GgufConfig(mix="Q8_0"), max_shard_size="300KB")
    files = sorted((tmp_path / "parts").iterdir())
    stem = next((tmp_path / "one").iterdir()).stem
    assert [file.name for file in files] == [f"{stem}-{n + 1:05d}-of-{len(files):05d}.gguf" for n in range(len(files))]
    assert len(files) > 4
    with Checkpoint.open(tmp_path / "one") as whole, Checkpoint.open(files[0]) as first:
        count = len(whole.tensors)
        assert (
            dict(first.values).keys() - {"split.no", "split.count", "split.tensors.count"} == dict(whole.values).keys()
        )
        assert first.values["split.tensors.count"] == count
    for number, file in enumerate(files):
        raw = file.read_bytes()
        assert (b"general.architecture" in raw) == (number == 0)
        # key, type 2 (uint16), number
        assert b"split.no" + struct.pack("<IH", 2, number) in raw
        assert b"split.count" + struct.pack("<IH", 2, len(files)) in raw
        assert b"split.tensors.count" + struct.pack("<Ii", 5, count) in raw
        assert len(raw) < 320_000
    for path in (tmp_path / "parts", files[0], files[2]):
        assert torch.equal(logits(path), logits(tmp_path / "one"))
    (tmp_path / "parts" / files[1].name).unlink()
    with pytest.raises(anybit.errors.MissingTensor, match=r"missing: 2"):
        anybit.load(tmp_path / "parts")


def test_a_converted_model_is_cut_too(llama: Path, tmp_path: Path) -> None:
    anybit.quantize(llama, tmp_path / "one", GgufConfig(mix="Q4_K_M"))
    anybit.convert(tmp_path / "one", tmp_path / "parts", GgufConfig(mix="Q4_K_M"), max_shard_size="300KB")
    assert len(list((tmp_path / "parts").iterdir())) > 2
    assert torch.equal(logits(tmp_path / "parts"), logits(tmp_path / "one"))


# --- the other byte order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", ["BF16", "Q4_K_M", "Q5_1", "IQ4_XS", "TQ1_0"])
def test_big_endian_files_hold_the_same_model(mix: str, llama: Path, tmp_path: Path) -> None:
    anybit.quantize(llama, tmp_path / "little", GgufConfig(mix=mix))
    anybit.quantize(llama, tmp_path / "big", GgufConfig(mix=mix, big_endian=True))
    raw = next((tmp_path / "big").iterdir()).read_bytes()
    assert raw[:8] == b"GGUF\0\0\0\3"
    with Checkpoint.open(tmp_path / "little") as one, Checkpoint.open(tmp_path / "big") as two:
        assert list(one.tensors) == list(two.tensors)
        assert one.values == two.values
        for name in one.tensors:
            assert torch.equal(one.read(name), two.read(name)), name
        norm = two.tensors["output_norm.weight"]
        found = struct.unpack_from(f">{norm.shape[0]}f", raw, norm.offset)
    wanted = load_file(llama / "model.safetensors")["model.norm.weight"]
    assert torch.equal(torch.tensor(found), wanted)
    assert torch.equal(logits(tmp_path / "big"), logits(tmp_path / "little"))


def test_parts_may_be_big_endian(llama: Path, tmp_path: Path) -> None:
    anybit.quantize(llama, tmp_path / "one", GgufConfig(mix="Q6_K"))
    anybit.quantize(llama, tmp_path / "parts", GgufConfig(mix="Q6_K", big_endian=True), max_shard_size="300KB")
    assert torch.equal(logits(tmp_path / "parts"), logits(tmp_path / "one"))


# --- broken runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _every_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "SECONDS_BETWEEN_STATES", 0.0)


@pytest.mark.usefixtures("_every_job")
@pytest.mark.parametrize(
    ("mix", "options", "jobs"),
    [("Q4_0", {}, 5), ("Q4_0", {"max_shard_size": "1MB"}, 9), ("Q4_K_S", CALIBRATED, 2)],
    ids=["plain", "in parts", "calibrated"],
)
def test_a_broken_run_ends_in_the_same_bytes(mix: str, options: Any, jobs: int, tmp_path: Path) -> None:
    anybit.quantize(TINY, tmp_path / "whole", GgufConfig(mix=mix), **options)
    broken(tmp_path / "out", GgufConfig(mix=mix), jobs, **options)
    seen: list[int] = []
    anybit.quantize(TINY, tmp_path / "out", GgufConfig(mix=mix), progress=lambda *at: seen.append(at[1]), **options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
def test_killed_at_random_moments_the_file_stays_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL while a calibrated run writes a .gguf file."""
    monkeypatch.syspath_prepend(str(TINY.parents[1] / "benchmarks"))
    script: Any = importlib.import_module("kill_and_resume")

    def run(target: Path) -> None:
        anybit.quantize(TINY, target, GgufConfig(mix="Q4_0"), calibration=TEXT, samples=2, sequence_length=32)

    assert script.kill_at_random(tmp_path, kills=2, seed=2, run=run).states >= 1


@pytest.mark.usefixtures("_every_job")
def test_what_was_done_is_not_done_again(tmp_path: Path) -> None:
    work = broken(tmp_path / "out", GgufConfig(mix="Q4_0"), 5)
    file = next((work / "result").iterdir())
    before = file.stat()
    made: list[str] = []
    original = anybit.engine.quantize.make_weight

    def counted(*args: Any) -> Any:
        made.append(args[2].prefix)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anybit.engine.quantize.make_weight", counted)
        plan = anybit.quantize(TINY, tmp_path / "out", GgufConfig(mix="Q4_0"))
    assert len(made) == sum(entry.action == "quantize" for entry in plan.entries) - 5
    after = next((tmp_path / "out").iterdir()).stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)


@pytest.mark.usefixtures("_every_job")
def test_a_run_for_another_file_is_refused(tmp_path: Path) -> None:
    broken(tmp_path / "out", GgufConfig(mix="Q4_0"), 3)
    for other, words in ((GgufConfig(mix="Q4_1"), "mix"), (GgufConfig(mix="Q4_0", big_endian=True), "big_endian")):
        with pytest.raises(ConfigError, match=rf"broken run that differs from this one.*{words}"):
            anybit.quantize(TINY, tmp_path / "out", other)
    anybit.quantize(TINY, tmp_path / "out", GgufConfig(mix="Q4_1"), restart=True)


# --- importance matrices -----------------------------------------------------------------------------------------------------


def test_an_importance_matrix_holds_the_mean_squares_of_inputs(llama: Path, tmp_path: Path) -> None:
    """Against transformers' own model; the file is read again by what reads llama.cpp's."""
    tokens = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(5))
    file = anybit.importance_matrix(llama, tmp_path / "im.gguf", tokens)
    seen: dict[str, torch.Tensor] = {}
    dense = transformers.LlamaForCausalLM.from_pretrained(llama)
    own = {"blk.0.attn_q": "layers.0.self_attn.q_proj", "blk.0.ffn_up": "layers.0.mlp.up_proj"}
    own |= {"blk.1.ffn_down": "layers.1.mlp.down_proj", "blk.1.attn_output": "layers.1.self_attn.o_proj"}
    for name, module in own.items():

        def note(_: Any, args: Any, name: str = name) -> None:
            seen[name] = args[0].flatten(0, 1).square().mean(0)

        dense.model.get_submodule(module).register_forward_pre_hook(note)
    with torch.no_grad():
        dense(tokens)
    found = read(str(file), Checkpoint.another)
    assert len(found) == 14
    for name, wanted in seen.items():
        assert torch.allclose(found[f"{name}.weight"][0], wanted, rtol=1e-4)
    with Checkpoint.open(file) as checkpoint:
        assert checkpoint.values["general.type"] == "imatrix"
        assert (checkpoint.values["imatrix.chunk_count"], checkpoint.values["imatrix.chunk_size"]) == (4, 32)
        assert float(checkpoint.read("blk.0.attn_q.weight.counts")) == 128
    anybit.quantize(llama, tmp_path / "out", GgufConfig(mix="IQ2_XXS", imatrix=str(file)))
    with pytest.raises(FileExistsError):
        anybit.importance_matrix(llama, file, tokens)
    with pytest.raises(ConfigError, match=r"\.gguf"):
        anybit.importance_matrix(llama, tmp_path / "im.dat", tokens)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["im.gguf", "out"]


def test_calibration_makes_what_an_importance_matrix_makes(llama: Path, tmp_path: Path) -> None:
    """The types are those of a weighted file, and nothing is refused."""
    tokens = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(5))
    config = GgufConfig(mix="IQ3_XXS", tensor_types={"ffn|attn_q|attn_k|attn_output|embd|^output": "Q8_0"})
    anybit.quantize(llama, tmp_path / "seen", config, calibration=tokens)
    file = anybit.importance_matrix(llama, tmp_path / "im.gguf", tokens)
    config.imatrix = str(file)
    anybit.quantize(llama, tmp_path / "given", config)
    with Checkpoint.open(tmp_path / "seen") as one, Checkpoint.open(tmp_path / "given") as two:
        types = [{name: info.encoding for name, info in own.tensors.items()} for own in (one, two)]
        assert types[0] == types[1]
        assert types[0]["blk.0.attn_v.weight"] == "IQ3_XXS"  # IQ3_S where nothing is known of the inputs
        assert torch.equal(
            one.read("blk.0.attn_v.weight"), two.read("blk.0.attn_v.weight")
        )  # the first layers see the same


def test_stacks_of_experts_have_a_row_for_each(tmp_path: Path) -> None:
    model = build(CASES["gpt-oss"])
    model.save_pretrained(tmp_path / "dense")
    tokens = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(5))
    found = read(str(anybit.importance_matrix(tmp_path / "dense", tmp_path / "im.gguf", tokens)), Checkpoint.another)
    assert found["blk.0.ffn_gate_exps.weight"].shape == found["blk.0.ffn_up_exps.weight"].shape == (4, 64)
    assert found["blk.1.ffn_down_exps.weight"].shape == (4, 96)
