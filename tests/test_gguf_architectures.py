"""A transformers model, written as llama.cpp writes it and loaded from the lone file, gives the model's own logits.

The writer (gguf_models.py) is independent of the library. transformers itself loads several of these wrong without a word:
split files, mixtral, rope_freqs, head_dim and expert widths other than its defaults.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf_models as m
import pytest
import torch
import transformers
from gguf_models import HEADS, HIDDEN, KV_HEADS, LAYERS, LENGTH, VOCABULARY, WIDTH, Case
from torch import Tensor

import anybit

COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": LENGTH,
    "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
METADATA = {
    "block_count": LAYERS, "context_length": LENGTH, "embedding_length": HIDDEN, "feed_forward_length": WIDTH,
    "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
}  # fmt: skip
RMS = {"attention.layer_norm_rms_epsilon": 1e-6}
NORM = {"attention.layer_norm_epsilon": 1e-5}


def heads(width: int) -> dict[str, int]:
    return {"attention.key_length": width, "attention.value_length": width}


def phi_layer(name: str, tensor: Tensor) -> m.Made | None:
    """phi2: q, k and v in one; the parts are collected until all are there."""
    if not any(part in name for part in (".q_proj.", ".k_proj.", ".v_proj.")):
        return None
    layer, own, kind = name.split(".")[2], name.split(".")[4][0], name.rpartition(".")[2]
    kept = _PARTS.setdefault((layer, kind), {})
    kept[own] = tensor
    return [(f"blk.{layer}.attn_qkv.{kind}", torch.cat([kept.pop(one) for one in "qkv"]))] if len(kept) == 3 else []


_PARTS: dict[Any, dict[str, Tensor]] = {}


def gpt2_layer(name: str, tensor: Tensor) -> m.Made | None:
    """Conv1D stores [in, out]."""
    if name.endswith(".weight") and any(own in name for own in ("c_attn", "c_proj", "c_fc")):
        own = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
        return [(f"blk.{name.split('.')[2]}.{own['.'.join(name.split('.')[3:5])]}.weight", tensor.T)]
    return None


def gpt_oss_layer(name: str, tensor: Tensor) -> m.Made | None:
    """Gate and up by turns, [experts, in, out], become two stacks [experts, out, in]."""
    layer, own = (name.split(".")[2] if name.startswith("model.layers") else ""), name.rpartition(".")[2]
    if own == "sinks":
        return [(f"blk.{layer}.attn_sinks.weight", tensor)]
    if ".experts." not in name:
        return None
    target = f"blk.{layer}.ffn_%s_exps.{'bias' if own.endswith('bias') else 'weight'}"
    if own == "gate_up_proj":
        return [(target % part, tensor[..., number::2].transpose(1, 2)) for number, part in enumerate(("gate", "up"))]
    if own == "gate_up_proj_bias":
        return [(target % part, tensor[..., number::2]) for number, part in enumerate(("gate", "up"))]
    return [(target % "down", tensor if own.endswith("bias") else tensor.transpose(1, 2))]


def mixtral_layer(name: str, tensor: Tensor) -> m.Made | None:
    return m.experts(name.replace("block_sparse_moe", "mlp"), tensor)


DIVISORS = [1.0, 1.0, 2.5, 8.0, 3.5, 1.25, 4.0, 6.0]  # no rule gives these
LONG, SHORT = [1.0 + 0.5 * n for n in range(8)], [1.0 + 0.01 * n for n in range(8)]

CASES = {
    "llama": Case(
        "llama", {"model_type": "llama", **COMMON, "rms_norm_eps": 1e-6},
        {**METADATA, **RMS, "rope.freq_base": 10000.0}, rotary_pairs=True,
    ),
    "llama, biases, head_dim 24": Case(
        "llama", {"model_type": "llama", **COMMON, "rms_norm_eps": 1e-6, "head_dim": 24, "attention_bias": True, "mlp_bias": True},
        {**METADATA, **RMS, **heads(24), "rope.dimension_count": 24}, rotary_pairs=True,
    ),
    "llama, tied, linear": Case(
        "llama", {"model_type": "llama", **COMMON, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
                  "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
        {**METADATA, **RMS, "rope.freq_base": 500.0, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        rotary_pairs=True,
    ),
    "llama, yarn": Case(
        "llama", {"model_type": "llama", **COMMON, "rms_norm_eps": 1e-6, "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}},
        {**METADATA, **RMS, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
        rotary_pairs=True,
    ),
    "mixtral, head_dim 24": Case(
        "llama", {"model_type": "mixtral", **COMMON, "rms_norm_eps": 1e-6, "head_dim": 24, "num_local_experts": 4,
                  "num_experts_per_tok": 2},
        {**METADATA, **RMS, **heads(24), "expert_count": 4, "expert_used_count": 2, "rope.freq_base": 1000000.0},
        rotary_pairs=True, special=mixtral_layer, layer={"block_sparse_moe.gate": "ffn_gate_inp"},
    ),
    "qwen2": Case("qwen2", {"model_type": "qwen2", **COMMON}, {**METADATA, **RMS}),
    "qwen3": Case("qwen3", {"model_type": "qwen3", **COMMON, "head_dim": 40}, {**METADATA, **RMS, **heads(40)}),
    "qwen2moe": Case(
        "qwen2moe", {"model_type": "qwen2_moe", **COMMON, "num_experts": 4, "num_experts_per_tok": 2,
                     "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96},
        {**METADATA, **RMS, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32,
         "expert_shared_feed_forward_length": 96},
    ),
    "qwen3moe": Case(
        "qwen3moe", {"model_type": "qwen3_moe", **COMMON, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 24,
                     "moe_intermediate_size": 96, "norm_topk_prob": True},
        {**METADATA, **RMS, **heads(24), "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 96},
    ),
    "gemma": Case(
        "gemma", {"model_type": "gemma", **COMMON, "head_dim": 32, "tie_word_embeddings": True},
        {**METADATA, **RMS, **heads(32)}, norms_plus_one=True,
    ),
    "gemma2": Case(
        "gemma2", {"model_type": "gemma2", **COMMON, "head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 8,
                   "attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0, "tie_word_embeddings": True},
        {**METADATA, **RMS, **heads(24), "attention.sliding_window": 8, "attn_logit_softcapping": 40.0,
         "final_logit_softcapping": 20.0},
        layer=m.SANDWICH, norms_plus_one=True,
    ),
    "gemma3": Case(
        "gemma3", {"model_type": "gemma3_text", **COMMON, "num_hidden_layers": 7, "head_dim": 24, "query_pre_attn_scalar": 24,
                   "sliding_window": 8, "tie_word_embeddings": True, "rope_parameters": {
                       "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                       "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        {**METADATA, **RMS, **heads(24), "block_count": 7, "attention.sliding_window": 8, "rope.freq_base": 1000000.0,
         "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        layer=m.SANDWICH, norms_plus_one=True,
    ),
    "phi3": Case(
        "phi3", {"model_type": "phi3", **COMMON, "rms_norm_eps": 1e-6, "eos_token_id": None, "bos_token_id": None},
        {**METADATA, **RMS, "rope.dimension_count": 16},
        layer={"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
    ),
    "phi3, long factors": Case(
        "phi3", {"model_type": "phi3", **COMMON, "rms_norm_eps": 1e-6, "original_max_position_embeddings": 16, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": LONG, "short_factor": SHORT,
            "original_max_position_embeddings": 16}, "eos_token_id": None, "bos_token_id": None},
        {**METADATA, **RMS, "rope.dimension_count": 16, "rope.scaling.original_context_length": 16,
         "rope.scaling.attn_factor": math.sqrt(1 + math.log(4) / math.log(16))},
        layer={"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
        extra=[("rope_factors_long.weight", torch.tensor(LONG)), ("rope_factors_short.weight", torch.tensor(SHORT))],
    ),
    "gpt-oss": Case(
        "gpt-oss", {"model_type": "gpt_oss", **COMMON, "intermediate_size": 96, "head_dim": 32, "num_local_experts": 4,
                    "num_experts_per_tok": 2, "sliding_window": 8, "rope_parameters": {
                        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                        "original_max_position_embeddings": 4096, "rope_theta": 150000.0}},
        {**METADATA, "attention.layer_norm_rms_epsilon": 1e-5, **heads(32), "expert_count": 4, "expert_used_count": 2,
         "expert_feed_forward_length": 96, "attention.sliding_window": 8, "rope.freq_base": 150000.0,
         "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 4096},
        layer={"mlp.router": "ffn_gate_inp", "post_attention_layernorm": "post_attention_norm"}, special=gpt_oss_layer,
    ),
    "gpt2": Case(
        "gpt2", {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS,
                 "n_positions": LENGTH, "bos_token_id": None, "eos_token_id": None},
        {**METADATA, **NORM, "attention.head_count_kv": HEADS, "feed_forward_length": 4 * HIDDEN},
        ends={"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm"},
        layer={"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
               "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
        special=gpt2_layer,
    ),
    "phi2": Case(
        "phi2", {"model_type": "phi", **COMMON, "num_key_value_heads": HEADS, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        {**METADATA, **NORM, "attention.head_count_kv": HEADS, "rope.dimension_count": 8},
        ends={"model.final_layernorm": "output_norm"},
        layer={"self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}, special=phi_layer,
    ),
    "starcoder2": Case(
        "starcoder2", {"model_type": "starcoder2", **COMMON}, {**METADATA, **NORM},
        layer={"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
    ),
    "stablelm": Case(
        "stablelm", {"model_type": "stablelm", **COMMON, "use_qkv_bias": True, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}},
        {**METADATA, **NORM, "rope.dimension_count": 4},
    ),
    "olmo2": Case(
        "olmo2", {"model_type": "olmo2", **COMMON}, {**METADATA, "attention.layer_norm_rms_epsilon": 1e-5}, layer=m.SANDWICH
    ),
    "olmoe": Case(
        "olmoe", {"model_type": "olmoe", **COMMON, "num_key_value_heads": HEADS, "intermediate_size": 32, "num_experts": 4,
                  "num_experts_per_tok": 2},
        {**METADATA, "attention.head_count_kv": HEADS, "attention.layer_norm_rms_epsilon": 1e-5, "feed_forward_length": 32, "expert_count": 4,
         "expert_used_count": 2},
    ),
    "granite": Case(
        "granite", {"model_type": "granite", **COMMON, "rms_norm_eps": 1e-6, "embedding_multiplier": 12.0,
                    "attention_multiplier": 0.0625, "residual_multiplier": 0.25, "logits_scaling": 8.0},
        {**METADATA, **RMS, "embedding_scale": 12.0, "attention.scale": 0.0625, "residual_scale": 0.25, "logit_scale": 8.0},
        rotary_pairs=True,
    ),
    "command-r": Case(
        "command-r", {"model_type": "cohere", **COMMON, "logit_scale": 0.0625, "tie_word_embeddings": True},
        {**METADATA, **NORM, "logit_scale": 0.0625, "rope.freq_base": 500000.0},
    ),
    "nemotron": Case(
        "nemotron", {"model_type": "nemotron", **COMMON, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        {**METADATA, **NORM, "rope.dimension_count": 8}, norms_plus_one=True,
    ),
    "arcee": Case(
        "arcee", {"model_type": "arcee", **COMMON, "rms_norm_eps": 1e-6, "hidden_act": "relu2"}, {**METADATA, **RMS},
        rotary_pairs=True,
    ),
    "seed_oss": Case(
        "seed_oss", {"model_type": "seed_oss", **COMMON, "head_dim": 24, "attention_bias": True}, {**METADATA, **RMS, **heads(24)},
        layer={"post_attention_layernorm": "post_attention_norm"},
    ),
    "ernie4_5": Case(
        "ernie4_5", {"model_type": "ernie4_5", **COMMON, "head_dim": 24, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
        {**METADATA, **RMS, **heads(24), "rope.freq_base": 500000.0},
    ),
    "smollm3": Case(
        "smollm3", {"model_type": "smollm3", **COMMON, "num_hidden_layers": 5, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
        {**METADATA, **RMS, "block_count": 5, "rope.freq_base": 2000000.0}, rotary_pairs=True,
    ),
    "olmo": Case(
        "olmo", {"model_type": "olmo", **COMMON, "clip_qkv": 0.5}, {**METADATA, **NORM, "attention.clamp_kqv": 0.5},
        rotary_pairs=True,
    ),
    "cohere2": Case(
        "cohere2", {"model_type": "cohere2", **COMMON, "num_hidden_layers": 5, "sliding_window": 8, "logit_scale": 0.25,
                    "tie_word_embeddings": True},
        {**METADATA, **NORM, "block_count": 5, "logit_scale": 0.25, "attention.sliding_window": 8},
    ),
    "glm4": Case(
        "glm4", {"model_type": "glm4", **COMMON, "head_dim": 32, "attention_bias": True, "rms_norm_eps": 1e-6, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        {**METADATA, **RMS, **heads(32), "rope.dimension_count": 16},
        layer={"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm",
               "mlp.gate_up_proj": "ffn_up"},
    ),
    "exaone4": Case(
        "exaone4", {"model_type": "exaone4", **COMMON, "rms_norm_eps": 1e-6, "sliding_window": None,
                    "layer_types": ["full_attention"] * LAYERS},
        {**METADATA, **RMS}, layer=m.SANDWICH,
    ),
    "hunyuan-dense": Case(
        "hunyuan-dense", {"model_type": "hunyuan_v1_dense", **COMMON, "rms_norm_eps": 1e-6, "head_dim": 24},
        {**METADATA, **RMS, **heads(24)},
        layer={"self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm"},
    ),
}  # fmt: skip


def build(case: Case) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**case.config)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * (0.3 if "norm" in name else 0.05))
    return model


def logits(model: Any, length: int = 24) -> Tensor:
    with torch.no_grad():
        ids = (torch.arange(length) * 7 % VOCABULARY)[None]
        result: Tensor = model(ids).logits.float()
    return result


@pytest.mark.parametrize("kind", [m.F32, m.Q8_0], ids=["f32", "q8_0"])
@pytest.mark.parametrize("name", CASES)
def test_the_file_gives_the_models_logits(name: str, kind: int, tmp_path: Path) -> None:
    case = CASES[name]
    model = build(case)
    model.weights_are_turned = case.architecture == "gpt2"
    if case.architecture in ("gpt-oss", "gpt2") and kind == m.Q8_0:
        pytest.skip("the writer of this test quantizes along the other axis")
    m.write(tmp_path / "m.gguf", case, model, kind=kind)
    ours: Any = anybit.load(tmp_path / "m.gguf")
    wanted = logits(model)
    error = (logits(ours) - wanted).abs().max().item()
    assert error < 1e-4 * wanted.abs().max().item(), f"logits differ by {error:.3g}"
    assert type(ours) is type(model)
    if kind == m.Q8_0:
        assert ours.anybit_plan.coverage > 0.8, ours.anybit_plan.coverage


@pytest.mark.parametrize("original", [32, 128, 1024])
def test_llama3_frequencies_come_from_their_tensor(original: int, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": original}  # fmt: skip
    plain = CASES["llama"]
    model = build(Case("llama", {**plain.config, "rope_parameters": rope}, {}))
    dense = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    divisors = dense / model.model.rotary_emb.inv_freq
    assert divisors.max() > 7.9, "the case is no test of the rule"
    assert divisors.min() < 1.1, "the case is no test of the rule"
    case = Case("llama", plain.config, plain.metadata, rotary_pairs=True, extra=[("rope_freqs.weight", divisors)])
    m.write(tmp_path / "m.gguf", case, model)
    ours: Any = anybit.load(tmp_path / "m.gguf")
    assert ours.config.rope_parameters["rope_type"] == "llama3"
    assert torch.allclose(ours.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=1e-5)
    assert (logits(ours) - logits(model)).abs().max() < 1e-4
    assert (logits(build(plain)) - logits(model)).abs().max() > 1e-3, "the frequencies make no difference"


def test_frequencies_that_no_rule_gives_are_taken_as_they_are(tmp_path: Path) -> None:
    plain = CASES["llama"]
    case = Case(
        "llama", plain.config, plain.metadata, rotary_pairs=True, extra=[("rope_freqs.weight", torch.tensor(DIVISORS))]
    )
    model = build(case)
    m.write(tmp_path / "m.gguf", case, model)
    ours: Any = anybit.load(tmp_path / "m.gguf")
    model.model.rotary_emb.inv_freq /= torch.tensor(DIVISORS)
    assert (logits(ours) - logits(model)).abs().max() < 1e-4
    ours.save_pretrained(tmp_path / "saved")
    assert (logits(anybit.load(tmp_path / "saved")) - logits(model)).abs().max() < 1e-4


def test_mixtral_from_before_there_were_stacks(tmp_path: Path) -> None:
    case = CASES["mixtral, head_dim 24"]

    def one_by_one(name: str, tensor: Tensor) -> m.Made | None:
        made = mixtral_layer(name, tensor)
        if made is None:
            return None
        return [
            (f"{stored.replace('_exps.weight', '')}.{number}.weight", matrix)
            for stored, stack in made
            for number, matrix in enumerate(stack)
        ]

    old = Case(case.architecture, case.config, case.metadata, rotary_pairs=True, special=one_by_one, layer=case.layer)
    model = build(old)
    m.write(tmp_path / "m.gguf", old, model, kind=m.Q8_0)
    ours: Any = anybit.load(tmp_path / "m.gguf")
    assert type(ours).__name__ == "MixtralForCausalLM"
    assert (logits(ours) - logits(model)).abs().max() < 1e-4
