"""Architectures beyond those of test_gguf_architectures: the file is the one llama.cpp's converter makes, and reading it gives the
model back. What llama.cpp does not load is refused."""

from __future__ import annotations

import json
import math
from array import array
from pathlib import Path
from typing import Any

import gguf_converted as c
import gguf_files as g
import pytest
import torch
import transformers
from gguf_converted import COMMON, CONVERTED

import anybit
from anybit import GgufConfig
from anybit.containers import Checkpoint
from anybit.errors import ConfigError
from anybit.methods import _gguf_latent as latent
from anybit.methods._gguf_layout import GgufLayout


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model((torch.arange(24) * 7 % c.VOCABULARY)[None]).logits.float()
    return found


def written(folder: Path, name: str, mix: str = "F32", **change: Any) -> tuple[Path, Any]:
    """The file, and transformers' model."""
    c.write(folder / "dense", {**CONVERTED[name].config, **change})
    anybit.quantize(folder / "dense", folder / mix, GgufConfig(mix=mix))
    return folder / mix, transformers.AutoModelForCausalLM.from_pretrained(folder / "dense").eval()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, array)) else value


@pytest.mark.parametrize("name", CONVERTED)
def test_the_file_is_the_converters(name: str, tmp_path: Path) -> None:
    case = CONVERTED[name]
    folder, model = written(tmp_path, name)
    with Checkpoint.open(folder) as file:
        assert file.values["general.architecture"] == case.architecture
        assert c.digest({stored: file.read(stored) for stored in file.tensors}) == case.digest
        for key, wanted in case.metadata.items():
            found = _plain(file.values.get(f"{case.architecture}.{key}"))
            same = math.isclose(found, wanted, rel_tol=1e-6) if isinstance(wanted, float) else found == wanted
            assert same, f"{key} is {found}, the converter's {wanted}"
    back: Any = anybit.load(folder)
    assert type(back) is type(model) or (name, type(back).__name__) == ("mistral", "LlamaForCausalLM")
    assert (logits(back) - logits(model)).abs().max() < 1e-5 * logits(model).abs().max()


@pytest.mark.parametrize(
    "name", ["falcon-new", "gptneox", "granitemoeshared", "deepseek_v3", "qwen3_next", "gemma3n_text"]
)
def test_blocks_go_there_and_back(name: str, tmp_path: Path) -> None:
    """Rows in another order, matrices cut and joined, stacks and padding, as blocks of 32."""
    folder, model = written(tmp_path, name, "Q8_0")
    back: Any = anybit.load(folder)
    limit = 0.05 if name.startswith("gemma3n") else 0.02  # it cuts off numbers below a limit
    assert (logits(back) - logits(model)).norm() < limit * logits(model).norm()
    back.save_pretrained(tmp_path / "saved")
    anybit.convert(tmp_path / "saved", tmp_path / "again", GgufConfig(mix="Q8_0"))
    with Checkpoint.open(folder) as one, Checkpoint.open(tmp_path / "again") as two:
        assert set(one.tensors) == set(two.tensors)
        blocks = [stored for stored, info in one.tensors.items() if info.encoding]
        assert len(blocks) > 8
        assert all(torch.equal(one.read(stored), two.read(stored)) for stored in blocks)


def test_latent_keys_may_be_stored_in_blocks(tmp_path: Path) -> None:
    """Keys' and values' expansions are stored along different axes: in transformers' one matrix they are dense."""
    rank, nope, value, heads = 64, 32, 24, 3
    settings = {"num_attention_heads": heads, "kv_lora_rank": rank, "qk_nope_head_dim": nope, "v_head_dim": value}
    whole = torch.randn(heads * (nope + value), rank, generator=torch.Generator().manual_seed(0))
    parts = [latent.cut(settings, number, "float32", whole) for number in range(2)]
    assert [tuple(part.shape) for part in parts] == list(latent.part_shapes(settings))
    query = torch.randn(nope)
    keys = whole.view(heads, nope + value, rank)[:, :nope]
    assert torch.allclose(parts[0] @ query, torch.einsum("hnr,n->hr", keys, query), atol=1e-5)
    assert torch.equal(latent.join(["", ""], list(latent.part_shapes(settings)), "float32", parts), whole)
    stored = []
    for part in parts:
        layout = GgufLayout(tuple(part.shape), "float32", "Q8_0")
        weight = anybit.algorithms.get("ggml")(part, layout.scheme(), kind="Q8_0")
        stored.append(layout.encode(weight)["q8_0"])
    found = latent.join(["Q8_0", "Q8_0"], list(latent.part_shapes(settings)), "float32", stored)
    assert (found - whole).norm() < 0.01 * whole.norm()


def rewritten(folder: Path, target: Path, metadata: dict[str, Any], names: dict[str, str], more: list[Any]) -> None:
    """A float32 file with other metadata, names, and further tensors."""
    with Checkpoint.open(folder) as file:
        tensors = [
            (names.get(name, name), info.shape[::-1], 0, file.read(name).numpy().tobytes())
            for name, info in file.tensors.items()
        ]
        kept = {
            key: (g.ARRAY, (g.I32, list(value))) if isinstance(value, array) else value
            for key, value in file.values.items()
        }
    target.write_bytes(g.build({**kept, **metadata}, [*tensors, *more]))


def test_blocks_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    folder, model = written(tmp_path, "glm4_moe")
    more = [
        ("blk.3.nextn.eh_proj.weight", (128, 64), 0, bytes(128 * 64 * 4)),
        ("blk.3.attn_norm.weight", (64,), 0, bytes(256)),
    ]
    metadata = {"glm4moe.block_count": 4, "glm4moe.nextn_predict_layers": 1}
    rewritten(folder, tmp_path / "m.gguf", metadata, {}, more)
    assert (logits(anybit.load(tmp_path / "m.gguf")) - logits(model)).abs().max() < 1e-5


def test_unsplit_latent_matrices_of_older_files_are_read(tmp_path: Path) -> None:
    folder, model = written(tmp_path, "deepseek_v3")
    whole = {
        f"blk.{number}.attn_kv_b.weight": layer.self_attn.kv_b_proj.weight.detach()
        for number, layer in enumerate(model.model.layers)
    }
    more = [(name, tensor.shape[::-1], 0, tensor.numpy().tobytes()) for name, tensor in whole.items()]
    rewritten(folder, tmp_path / "both.gguf", {}, {}, more)
    assert (logits(anybit.load(tmp_path / "both.gguf")) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize("architecture", ["qwen2vl", "qwen3vl"])
def test_language_models_of_those_that_see_are_read(architecture: str, tmp_path: Path) -> None:
    config = {
        "model_type": architecture.removesuffix("vl"),
        **COMMON,
        **({"head_dim": 16} if "3" in architecture else {}),
    }
    c.write(tmp_path / "dense", config)
    anybit.quantize(tmp_path / "dense", tmp_path / "out", GgufConfig(mix="F32"))
    with Checkpoint.open(tmp_path / "out") as file:
        own = config["model_type"] + "."
        metadata = {
            key.replace(own, f"{architecture}."): value for key, value in file.values.items() if key.startswith(own)
        }
    metadata |= {
        "general.architecture": architecture,
        f"{architecture}.rope.dimension_sections": (g.ARRAY, (g.I32, [2, 3, 3, 0])),
    }
    rewritten(tmp_path / "out", tmp_path / "m.gguf", metadata, {}, [])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert (logits(anybit.load(tmp_path / "m.gguf")) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mistral", {"sliding_window": 8}, "sliding_window is 8"),
        ("falcon-old", {"alibi": True}, "rotary"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "residual"),
        ("gpt_bigcode", {"multi_query": False}, "one head of keys"),
        ("deepseek_v3", {"q_lora_rank": None}, "latent vector"),
        ("deepseek_v3", {"rope_interleave": False}, "neighbouring"),
        ("deepseek_v2", {"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}, "groups"),
        ("dots1", {"num_key_value_heads": 2}, "heads of keys"),
        ("mamba2", {"n_groups": 2}, "groups"),
        ("mamba", {"expand": 4, "intermediate_size": 256}, "by 2"),
        ("lfm2", {"conv_bias": True}, "bias"),
        ("ernie4_5_moe", {"moe_layer_interval": 2}, "every block"),
        ("afmoe", {"mup_enabled": False}, "scaled"),
        ("gemma3n_text", {"laurel_rank": 32}, "laurel_rank=64"),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_not_load_is_refused(
    name: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"llama\.cpp has no place for this .*{message}.*safetensors"):
        written(tmp_path, name, **change)
    assert not (tmp_path / "F32").exists()


def test_olmoe_of_fewer_heads_of_keys_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "olmoe", **COMMON, "intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    c.write(tmp_path / "dense", config)
    with pytest.raises(ConfigError, match="as many heads of keys as of queries"):
        anybit.quantize(tmp_path / "dense", tmp_path / "out", GgufConfig(mix="F32"))


def test_windows_that_have_no_period_are_written_one_by_one(tmp_path: Path) -> None:
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    folder, model = written(tmp_path, "olmo3", layer_types=types)
    with Checkpoint.open(folder) as file:
        assert file.values["olmo2.attention.sliding_window_pattern"] == [one == "sliding_attention" for one in types]
    back: Any = anybit.load(folder)
    assert back.config.layer_types == types
    assert json.dumps(back.config.rope_parameters, sort_keys=True) == json.dumps(
        model.config.rope_parameters, sort_keys=True
    )
