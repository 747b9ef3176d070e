"""GGUF's low-bit types made from dense weights: held against llama.cpp's own codes, numbers and choices of types."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import gguf_files as g
import pytest
import torch
import transformers
from safetensors.torch import load_file

import anybit
from anybit import GgufConfig, algorithms
from anybit.containers import Checkpoint
from anybit.errors import CalibrationNeeded, ConfigError, NotRepresentable
from anybit.methods._gguf_layout import GgufLayout
from anybit.methods._gguf_mixes import MIXES, Facts, needs_importance

TINY = Path(__file__).parent.parent / "examples" / "tiny-llama"
IMPORTANCE = torch.arange(256) % 7 + 1.0
# relative error of llama.cpp 0.3.36's own codes for the rows below, without and with that importance (ggml_quantize_chunk)
THEIRS = {
    "IQ2_XXS": (None, 0.32421), "IQ2_XS": (None, 0.28116), "IQ2_S": (0.26217, 0.23826), "IQ3_XXS": (0.21408, 0.17002),
    "IQ3_S": (0.16563, 0.12994), "IQ1_S": (None, 0.46639), "IQ1_M": (0.57920, 0.42489), "NVFP4": (0.09722, 0.09764),
    "Q1_0": (0.59891, 0.59802), "Q2_0": (0.71913, 0.71888),
}  # fmt: skip
LOW = [name for name in THEIRS if name.startswith("IQ")]


@pytest.fixture(scope="module")
def matrix() -> torch.Tensor:
    return load_file(TINY / "model.safetensors")["model.layers.0.mlp.gate_proj.weight"][:64].float()


def made(matrix: torch.Tensor, name: str, **options: Any) -> tuple[torch.Tensor, bytes]:
    layout = GgufLayout(tuple(matrix.shape), "float32", name)
    weight = algorithms.get("ggml")(matrix, layout.scheme(), kind=name, **options)
    stored = layout.encode(weight)
    assert torch.equal(layout.decode(stored).to_dense(), weight.to_dense())
    return weight.to_dense(torch.float32), stored[name.lower()].numpy().tobytes()


@pytest.mark.parametrize("name", THEIRS)
def test_errors_are_llama_cpps_or_less(name: str, matrix: torch.Tensor) -> None:
    for importance, theirs in zip((None, IMPORTANCE), THEIRS[name], strict=True):
        if theirs is not None:
            weight = 1.0 if importance is None else importance
            found = made(matrix, name, importance=importance)[0]
            error = (((found - matrix).square() * weight).sum() / (matrix.square() * weight).sum()).sqrt()
            assert error < theirs * 1.0001


@pytest.mark.parametrize(
    ("name", "digest"), [("NVFP4", "524c5b6d70d733f3"), ("Q1_0", "71438dbb23e330de"), ("Q2_0", "57079a9a272ceff1")]
)
def test_bytes_are_llama_cpps(name: str, digest: str, matrix: torch.Tensor) -> None:
    """The hashes are of ggml_quantize_chunk's output for the same rows."""
    assert hashlib.sha256(made(matrix, name)[1]).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", THEIRS)
def test_odd_blocks_have_codes(name: str) -> None:
    """Zeros, one number everywhere, one sign only, a number alone, tiny numbers: finite, and no worse than the block's range."""
    rows = torch.zeros(6, 256)
    rows[1], rows[2] = -0.5, torch.arange(256) / 100 + 1
    rows[3, 17], rows[4] = 3.0, 1e-7
    rows[5, ::2] = -1.0
    for importance in (None, IMPORTANCE, IMPORTANCE * 0):
        found = made(rows, name, importance=importance)[0]
        assert torch.isfinite(found).all()
        assert torch.equal(found[0], rows[0])
        limit = 1.6 if name.startswith("IQ1") else 1.1  # a shift of one sign, and a scale stretched by an eighth
        assert ((found - rows).abs().amax(-1) <= limit * rows.abs().amax(-1) + 1e-6).all()
    for bad in (float("nan"), float("inf"), 1e30):
        with pytest.raises(NotRepresentable, match=r"NaN|infinity"):
            made(torch.where(rows == 3, bad, rows), name, importance=IMPORTANCE)


@pytest.mark.parametrize("name", LOW)
def test_stacks_have_an_importance_for_each_expert(name: str, matrix: torch.Tensor) -> None:
    stack, importance = matrix[:16].view(2, 8, 256), torch.stack([IMPORTANCE, IMPORTANCE.flip(0)])
    layout = GgufLayout((2, 8, 256), "float32", name)
    whole = algorithms.get("ggml")(stack, layout.scheme(), kind=name, importance=importance).to_dense(torch.float32)
    for number in range(2):
        assert torch.equal(whole[number], made(stack[number], name, importance=importance[number])[0])


# --- mixes -----------------------------------------------------------------------------------------------------------------

CHOSEN = json.loads((Path(__file__).parent / "data" / "gguf_mixes.json").read_text())


@pytest.mark.parametrize("case", CHOSEN["models"])
def test_types_are_those_llama_cpp_chooses(case: str) -> None:
    """For every tensor of models of 17 blocks; where it refuses for want of an importance matrix, so does this."""
    shared, experts, tied = CHOSEN["models"][case]
    mixes = {key.partition("|")[0] for key in CHOSEN[case]}
    assert mixes == {name for name, (_, base) in MIXES.items() if base and name != "NVFP4"}  # NVFP4 is no mix of theirs
    for key, chosen in CHOSEN[case].items():
        mix, weighted = key.split("|")
        facts = Facts(mix, "llama", 17, shared, experts, tied, weighted == "with imatrix")
        needed = False
        for own, runs in chosen.items():
            if own == "refused":
                continue
            kinds = [kind for run in runs.split() for kind in [run.split("*")[0]] * int(run.split("*")[1])]
            for block, kind in enumerate(kinds):
                name = f"blk.{block}.{own}.weight" if own not in ("token_embd", "output") else f"{own}.weight"
                assert facts.type_of(name, 256, own.endswith("_exps")) == kind, (key, name)
                needed |= weighted == "without" and needs_importance(name, kind, mix)
        assert needed == chosen["refused"], key


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of random weights with rows of 256."""
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    modules = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = [f"blk.{block}.{own}.weight" for block in range(2) for own in modules]
    tensors = []
    for name in names:
        sums = torch.rand(256, generator=torch.Generator().manual_seed(len(tensors))) + 0.1
        tensors += [(f"{name}.in_sum2", (256, 1), 0, sums.numpy().tobytes())]
        tensors += [(f"{name}.counts", (1, 1), 0, struct.pack("<f", 1.0))]
    (folder / "im.gguf").write_bytes(g.build({"general.type": "imatrix"}, tensors))
    return folder


@pytest.mark.parametrize(
    "mix", ["IQ1_S", "IQ1_M", "IQ2_XS", "IQ2_M", "IQ3_XXS", "IQ3_M", "Q2_K_S", "NVFP4", "Q1_0", "Q2_0"]
)
def test_low_mixes_make_files_that_load(mix: str, llama: Path, tmp_path: Path) -> None:
    if mix.startswith(("IQ1", "IQ2", "IQ3_XXS", "Q2_K_S")):
        with pytest.raises(CalibrationNeeded, match=r"what the layer's inputs weigh.*imatrix"):
            anybit.quantize(llama, tmp_path / "out", GgufConfig(mix=mix))
        assert not (tmp_path / "out").exists()
    anybit.quantize(llama, tmp_path / "out", GgufConfig(mix=mix, imatrix=str(llama / "im.gguf")))
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert checkpoint.values["general.file_type"] == MIXES[mix][0]
        assert MIXES[mix][1] in {info.encoding for info in checkpoint.tensors.values()}
    ids = torch.arange(12)[None]
    wanted = transformers.LlamaForCausalLM.from_pretrained(llama)(ids).logits
    found = anybit.load(tmp_path / "out")(ids).logits
    limit = 1.2 if mix.startswith(("IQ1", "Q1")) else 1.6 if mix == "Q2_0" else 0.7
    assert (found - wanted).norm() < limit * wanted.norm()


def test_one_block_type_wants_an_importance_too(llama: Path) -> None:
    with pytest.raises(CalibrationNeeded, match="IQ2_XXS"):
        anybit.load(llama, GgufConfig(block_type="IQ2_XXS"))
    model: Any = anybit.load(llama, GgufConfig(block_type="IQ2_XXS", imatrix=str(llama / "im.gguf")))
    assert model.anybit_plan.coverage > 0.8


# --- settings of single modules ----------------------------------------------------------------------------------------------


def test_modules_have_settings_of_their_own(llama: Path, tmp_path: Path) -> None:
    """What `anybit allocate` writes into a recipe reaches the file."""
    base = GgufConfig(mix="Q4_K_S")
    config = base.per_module({
        "model.layers.0.mlp.down_proj": GgufConfig(mix="Q6_K"), "model.layers.1.self_attn.q_proj": GgufConfig(block_type="Q8_0"),
        "model.layers.1.mlp.up_proj": None,
    })  # fmt: skip
    assert base.module_settings is None
    again = GgufConfig.from_dict(json.loads(config.to_json_string()))
    anybit.quantize(llama, tmp_path / "out", again)
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        found = {name: info.encoding or info.dtype for name, info in checkpoint.tensors.items()}
    assert found["blk.0.ffn_down.weight"] == "Q6_K"
    assert found["blk.1.attn_q.weight"] == "Q8_0"
    assert found["blk.1.ffn_up.weight"] == "float32"
    assert found["blk.0.ffn_up.weight"] == "Q4_K"
    for wrong in ({"x": {"mix": "Q9"}}, {"x": {"kind": "Q4_0"}}, {"x": "Q4_0"}):
        with pytest.raises(ConfigError, match=r"Q9|module_settings"):
            GgufConfig(module_settings=wrong)  # type: ignore[arg-type]
