"""Small checkpoints with numbers that follow from their names, and what llama.cpp's own converter makes of them.

The table was made once with convert_hf_to_gguf.py of llama.cpp as in llama-cpp-python 0.3.36, from folders that `write` below had
written (with the older names of some settings, which it wants, beside transformers' own). It has a digest of the file's tensors,
and the metadata, without the plain sizes, and without what says nothing (a flag that is off, a period written out).
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

VOCABULARY = 96


@dataclass(frozen=True)
class Converted:
    """`digest`: of the converter's tensors. `metadata`: what it writes, without the architecture's name in front."""

    architecture: str
    config: Mapping[str, Any]
    digest: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def numbers(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers below 0.1 (of norms, about 1) that depend on the name only, the same everywhere."""
    count = max(1, torch.Size(shape).numel())
    places = torch.arange(count, dtype=torch.int64) * 2654435761 + zlib.crc32(name.encode())
    found = ((places % (1 << 32)) >> 16).to(torch.float32) / (1 << 16) - 0.5
    return (found * 0.25 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)).reshape(shape)


def write(folder: Path, config: Mapping[str, Any]) -> None:
    """A checkpoint as transformers writes it."""
    made = transformers.AutoConfig.for_model(**config)
    model: Any = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file({name: numbers(name, tuple(t.shape)) for name, t in load_file(file).items()}, file, {"format": "pt"})


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names and numbers; without exponentials, whose last bit depends on the machine, and without sides of one."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        if not name.endswith("ssm_a"):
            shape = [side for side in tensors[name].shape if side > 1]
            found.update(f"{name} {shape}\n".encode())
            found.update(tensors[name].to(torch.float32).contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip

CONVERTED: dict[str, Converted] = {
    "mistral": Converted(
        "llama", {"model_type": "mistral", **COMMON, "sliding_window": None}, "05f2c9816a10be19",
        {"rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": 1e-06, "attention.key_length": 16,
         "attention.value_length": 16, "rope.dimension_count": 16},
    ),
    "falcon-old": Converted(
        "falcon", {"model_type": "falcon", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "multi_query": True, "parallel_attn": True, "bias": False, "alibi": False, "new_decoder_architecture": False}, "b855b966548c41b9",
        {"tensor_data_layout": "jploski", "attention.layer_norm_epsilon": 1e-05},
    ),
    "falcon-new": Converted(
        "falcon", {"model_type": "falcon", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_kv_heads": 2, "parallel_attn": True, "bias": False, "alibi": False, "new_decoder_architecture": True}, "6a6da2873877cd87",
        {"tensor_data_layout": "jploski", "attention.layer_norm_epsilon": 1e-05},
    ),
    "bloom": Converted(
        "bloom", {"model_type": "bloom", "vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "630049262b63aac3",
        {"attention.layer_norm_epsilon": 1e-05},
    ),
    "mpt": Converted(
        "mpt", {"model_type": "mpt", "vocab_size": 96, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
            "expansion_ratio": 4}, "57d16c359c8126af",
        {"attention.layer_norm_epsilon": 1e-05, "attention.max_alibi_bias": 8.0},
    ),
    "gptneox": Converted(
        "gptneox", {"model_type": "gpt_neox", **COMMON, "num_key_value_heads": 4, "hidden_act": "gelu"}, "2ee5ffa2e28243dd",
        {"rope.dimension_count": 4, "use_parallel_residual": True, "attention.layer_norm_epsilon": 1e-05},
    ),
    "gpt_bigcode": Converted(
        "starcoder", {"model_type": "gpt_bigcode", "vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
            "multi_query": True}, "167d3ebe03d78caa",
        {"attention.layer_norm_epsilon": 1e-05},
    ),
    "granitemoe": Converted(
        "granitemoe", {"model_type": "granitemoe", **COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "embedding_multiplier":
            12.0, "attention_multiplier": 0.0625, "residual_multiplier": 0.25, "logits_scaling": 8.0}, "ba745609f39cdef5",
        {"rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": 1e-06, "expert_count": 4, "expert_used_count": 2,
         "rope.dimension_count": 16, "attention.scale": 0.0625, "embedding_scale": 12.0, "residual_scale": 0.25,
         "logit_scale": 8.0},
    ),
    "granitemoeshared": Converted(
        "granitemoe", {"model_type": "granitemoeshared", **COMMON, "num_local_experts": 4, "num_experts_per_tok": 2,
            "shared_intermediate_size": 96}, "2d11e01925b510c3",
        {"rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": 1e-06, "expert_count": 4, "expert_used_count": 2,
         "rope.dimension_count": 16, "attention.scale": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale":
         1.0, "expert_shared_feed_forward_length": 96},
    ),
    "deepseek_v2": Converted(
        "deepseek2", {"model_type": "deepseek_v2", **COMMON, "num_hidden_layers": 3, "num_key_value_heads": 4, "q_lora_rank": 48,
            "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24, "n_routed_experts": 4,
            "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
            "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": False}, "ce2edba91920c365",
        {"rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": 1e-06, "expert_count": 4, "expert_used_count": 2,
         "expert_group_count": 1, "expert_group_used_count": 1, "expert_gating_func": 1, "attention.key_length": 40,
         "attention.value_length": 32, "leading_dense_block_count": 1, "attention.q_lora_rank": 48, "attention.kv_lora_rank":
         32, "attention.key_length_mla": 24, "attention.value_length_mla": 24, "expert_feed_forward_length": 32,
         "expert_shared_count": 2, "expert_weights_scale": 1.0, "rope.dimension_count": 8},
    ),
    "deepseek_v3": Converted(
        "deepseek2", {"model_type": "deepseek_v3", **COMMON, "num_hidden_layers": 3, "num_key_value_heads": 4, "q_lora_rank": 48,
            "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24, "n_routed_experts": 8,
            "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
            "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}, "91df3cd7973d0a05",
        {"rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": 1e-06, "expert_count": 8, "expert_used_count": 2,
         "expert_group_count": 4, "expert_group_used_count": 2, "expert_gating_func": 2, "attention.key_length": 40,
         "attention.value_length": 32, "leading_dense_block_count": 1, "attention.q_lora_rank": 48, "attention.kv_lora_rank":
         32, "attention.key_length_mla": 24, "attention.value_length_mla": 24, "expert_feed_forward_length": 32,
         "expert_shared_count": 1, "expert_weights_scale": 2.5, "expert_weights_norm": True, "rope.dimension_count": 8},
    ),
    "ernie4_5_moe": Converted(
        "ernie4_5-moe", {"model_type": "ernie4_5_moe", **COMMON, "num_hidden_layers": 3, "moe_num_experts": 4, "moe_k": 2,
            "moe_intermediate_size": 32, "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 2,
            "moe_layer_interval": 1}, "ad64e8c6685498fe",
        {"rope.freq_base": 500000.0, "attention.layer_norm_rms_epsilon": 1e-05, "expert_count": 4, "expert_used_count": 2,
         "interleave_moe_layer_step": 1, "leading_dense_block_count": 1, "expert_feed_forward_length": 32,
         "expert_shared_count": 1},
    ),
    "glm4_moe": Converted(
        "glm4moe", {"model_type": "glm4_moe", **COMMON, "num_hidden_layers": 3, "head_dim": 32, "use_qk_norm": True, "attention_bias":
            True, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True}, "2656e465bd66c07e",
        {"rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": 1e-05, "expert_count": 4, "expert_used_count": 2,
         "expert_group_count": 1, "expert_group_used_count": 1, "attention.key_length": 32, "attention.value_length": 32,
         "rope.dimension_count": 16, "expert_feed_forward_length": 32, "expert_shared_count": 1, "leading_dense_block_count":
         1, "expert_gating_func": 2, "expert_weights_scale": 1.5, "expert_weights_norm": True},
    ),
    "dots1": Converted(
        "dots1", {"model_type": "dots1", **COMMON, "num_hidden_layers": 3, "num_key_value_heads": 4, "head_dim": 32,
            "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True}, "5237d16afb184014",
        {"rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": 1e-06, "expert_count": 4, "expert_used_count": 2,
         "expert_group_count": 1, "expert_group_used_count": 1, "expert_gating_func": 2, "attention.key_length": 32,
         "attention.value_length": 32, "expert_feed_forward_length": 32, "leading_dense_block_count": 1,
         "expert_shared_count": 1, "expert_weights_scale": 1.5, "expert_weights_norm": True},
    ),
    "hunyuan_v1_moe": Converted(
        "hunyuan-moe", {"model_type": "hunyuan_v1_moe", **COMMON, "head_dim": 32, "num_experts": 4, "moe_topk": 2}, "3a9cd54309cffc1c",
        {"rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": 1e-05, "expert_count": 4, "attention.key_length": 32,
         "attention.value_length": 32, "expert_shared_feed_forward_length": 128, "expert_feed_forward_length": 128,
         "expert_used_count": 2, "expert_shared_count": 1},
    ),
    "minimax_m2": Converted(
        "minimax-m2", {"model_type": "minimax_m2", **COMMON, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
            "rotary_dim": 16}, "10b9670a96abdc26",
        {"rope.freq_base": 5000000.0, "attention.layer_norm_rms_epsilon": 1e-06, "expert_count": 4, "expert_used_count": 2,
         "expert_gating_func": 2, "attention.key_length": 32, "attention.value_length": 32, "expert_feed_forward_length": 128,
         "rope.dimension_count": 16},
    ),
    "afmoe": Converted(
        "afmoe", {"model_type": "afmoe", **COMMON, "num_hidden_layers": 4, "head_dim": 32, "num_experts": 4, "num_experts_per_tok":
            2, "num_shared_experts": 1, "moe_intermediate_size": 32, "num_dense_layers": 1, "sliding_window": 8,
            "mup_enabled": True}, "eef8ddbdd0e7e8be",
        {"rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": 1e-05, "expert_count": 4, "expert_used_count": 2,
         "expert_gating_func": 2, "attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32,
         "expert_shared_count": 1, "expert_feed_forward_length": 32, "leading_dense_block_count": 1, "expert_weights_scale":
         1.0, "attention.sliding_window": 8},
    ),
    "exaone_moe": Converted(
        "exaone-moe", {"model_type": "exaone_moe", **COMMON, "num_hidden_layers": 4, "head_dim": 32, "n_routed_experts": 4,
            "num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1, "moe_intermediate_size": 32,
            "sliding_window": 8}, "e988f2405bded4a4",
        {"rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": 1e-05, "expert_count": 4, "expert_used_count": 2,
         "expert_group_count": 1, "expert_group_used_count": 1, "expert_gating_func": 2, "attention.key_length": 32,
         "attention.value_length": 32, "attention.sliding_window": 8, "expert_feed_forward_length": 32, "expert_shared_count":
         1, "expert_shared_feed_forward_length": 32, "expert_weights_scale": 2.5, "expert_weights_norm": True,
         "leading_dense_block_count": 1},
    ),
    "mamba": Converted(
        "mamba", {"model_type": "mamba", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16,
            "conv_kernel": 4, "expand": 2, "time_step_rank": 4}, "e2a5ab59359cc142",
        {"ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 16, "ssm.time_step_rank": 4,
         "attention.layer_norm_rms_epsilon": 1e-05},
    ),
    "falcon_mamba": Converted(
        "mamba", {"model_type": "falcon_mamba", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16,
            "conv_kernel": 4, "expand": 2, "time_step_rank": 4}, "e2a5ab59359cc142",
        {"ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 16, "ssm.time_step_rank": 4,
         "attention.layer_norm_rms_epsilon": 1e-05, "ssm.dt_b_c_rms": True},
    ),
    "mamba2": Converted(
        "mamba2", {"model_type": "mamba2", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16,
            "conv_kernel": 4, "expand": 2, "head_dim": 16, "num_heads": 8, "n_groups": 1, "chunk_size": 16}, "abd051e53adb790d",
        {"ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 16, "ssm.time_step_rank": 8, "ssm.group_count": 1,
         "attention.layer_norm_rms_epsilon": 1e-05},
    ),
    "lfm2": Converted(
        "lfm2", {"model_type": "lfm2", **COMMON, "num_hidden_layers": 3, "block_auto_adjust_ff_dim": False, "layer_types": ["conv",
            "full_attention", "conv"], "conv_L_cache": 3}, "354d475479932527",
        {"rope.freq_base": 1000000.0, "attention.layer_norm_rms_epsilon": 1e-05, "shortconv.l_cache": 3},
    ),
    "lfm2_moe": Converted(
        "lfm2moe", {"model_type": "lfm2_moe", **COMMON, "num_hidden_layers": 3, "tie_word_embeddings": True, "layer_types": ["conv",
            "full_attention", "conv"], "conv_L_cache": 3, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size":
            32, "num_dense_layers": 1}, "af51cd80af54c62e",
        {"rope.freq_base": 1000000.0, "attention.layer_norm_rms_epsilon": 1e-05, "expert_count": 4, "expert_used_count": 2,
         "expert_feed_forward_length": 32, "leading_dense_block_count": 1, "expert_gating_func": 2, "shortconv.l_cache": 3},
    ),
    "olmo3": Converted(
        "olmo2", {"model_type": "olmo3", **COMMON, "num_hidden_layers": 5, "sliding_window": 8}, "9c890091895c35a2",
        {"rope.freq_base": 500000.0, "rope.freq_base_swa": 500000.0, "attention.layer_norm_rms_epsilon": 1e-05,
         "attention.sliding_window": 8},
    ),
    "glm": Converted(
        "chatglm", {"model_type": "glm", **COMMON, "head_dim": 16, "rms_norm_eps": 1e-05}, "ee336a8a7955ca85",
        {"attention.layer_norm_rms_epsilon": 1e-05, "rope.dimension_count": 8, "rope.freq_base": 10000.0},
    ),
    "jais2": Converted(
        "jais2", {"model_type": "jais2", **COMMON, "num_key_value_heads": 4}, "2a549ecedd3b7d21",
        {"rope.freq_base": 10000.0, "attention.layer_norm_epsilon": 1e-05, "attention.key_length": 16,
         "attention.value_length": 16, "rope.dimension_count": 16},
    ),
    "qwen3_next": Converted(
        "qwen3next", {"model_type": "qwen3_next", **COMMON, "num_hidden_layers": 4, "head_dim": 32, "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "linear_conv_kernel_dim": 4}, "2ad2bfe9986f889f",
        {"rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": 1e-06, "expert_count": 4, "expert_used_count": 2,
         "attention.key_length": 32, "attention.value_length": 32, "expert_feed_forward_length": 32,
         "expert_shared_feed_forward_length": 32, "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.group_count": 2,
         "ssm.time_step_rank": 4, "ssm.inner_size": 64, "attention.recurrent_layers": [True, True, True, False],
         "full_attention_interval": 4, "rope.dimension_count": 8},
    ),
    "gemma3n_text": Converted(
        "gemma3n", {"model_type": "gemma3n_text", **COMMON, "num_hidden_layers": 5, "tie_word_embeddings": True, "head_dim": 16,
            "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 256, "num_kv_shared_layers": 0, "laurel_rank":
            64, "activation_sparsity_pattern": [0.95, 0.95, 0.95, 0.95, 0.95], "sliding_window": 8}, "9c5037ced2afcbde",
        {"rope.freq_base": 1000000.0, "rope.freq_base_swa": 10000.0, "attention.layer_norm_rms_epsilon": 1e-06,
         "attention.key_length": 16, "attention.value_length": 16, "final_logit_softcapping": 30.0,
         "attention.sliding_window": 8, "altup.active_idx": 0, "altup.num_inputs": 4, "embedding_length_per_layer_input": 256,
         "attention.shared_kv_layers": 0, "activation_sparsity_scale": [1.6448535919189453, 1.6448535919189453,
         1.6448535919189453, 1.6448535919189453, 1.6448535919189453]},
    ),
}  # fmt: skip
