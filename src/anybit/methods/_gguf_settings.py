"""Settings of models in GGUF files, in the words of transformers' configurations: a function for each class that differs.

What llama.cpp builds into an architecture rather than storing it is written out here.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from anybit.methods._gguf_metadata import Metadata
from anybit.methods._gguf_rope import rope_parameters

Settings = Callable[[Metadata], dict[str, Any]]


def decoder(m: Metadata, width: int | None = None) -> dict[str, Any]:
    """What nearly every decoder has. `width`: of the part of a head that is turned, where the metadata says it otherwise."""
    heads = m.uniform("attention.head_count")
    hidden = m.whole("embedding_length")
    shape = m.shape("token_embd.weight")
    if len(shape) != 2 or shape[1] != hidden:
        m.fail(f"embedding_length is {hidden}, but 'token_embd.weight' has the shape {shape}")
    settings: dict[str, Any] = {
        "vocab_size": m.vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": m.blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": m.uniform("attention.head_count_kv", heads),
        "max_position_embeddings": m.whole("context_length"),
        "tie_word_embeddings": "output.weight" not in m.tensors,
        "rope_parameters": rope_parameters(m, head_dim(m) if width is None else width),
        **{f"{name}_token_id": m.token(own) for name, own in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))},
    }
    return settings


def head_dim(m: Metadata) -> int:
    """Width of an attention head."""
    heads, hidden = m.uniform("attention.head_count"), m.whole("embedding_length")
    if not m.has("attention.key_length") and hidden % heads:
        m.fail(f"{heads} heads do not divide {hidden} channels, and there is no attention.key_length")
    width = m.whole("attention.key_length", hidden // heads)
    values = m.whole("attention.value_length", width)
    if values != width:
        m.refuse(f"keys of {width} and values of {values} channels: transformers' class has one head_dim for both")
    return width


def rms(m: Metadata) -> dict[str, Any]:
    return {"rms_norm_eps": m.number("attention.layer_norm_rms_epsilon")}


def gated(m: Metadata) -> dict[str, Any]:
    """Decoder with RMS norms and a gated MLP."""
    return {
        **decoder(m),
        **rms(m),
        "head_dim": head_dim(m),
        "intermediate_size": m.width("feed_forward_length", "ffn_up.weight"),
    }


def biases(m: Metadata) -> dict[str, Any]:
    return {
        "attention_bias": m.first("attn_q.bias") is not None and m.first("attn_output.bias") is not None,
        "mlp_bias": m.first("ffn_up.bias") is not None,
    }


def experts(m: Metadata) -> dict[str, Any]:
    """Sizes of a stack of experts under transformers' most common names."""
    tensor = m.first("ffn_up_exps.weight")
    count = m.whole("expert_count")
    stored = "ffn_up_exps.weight" if tensor is not None else "ffn_up.0.weight"  # before there were stacks
    if tensor is not None and m.shape(tensor)[0] != count:
        m.fail(f"expert_count is {count}, but tensor {tensor!r} has the shape {m.shape(tensor)}")
    return {
        "num_experts": count,
        "num_experts_per_tok": m.whole("expert_used_count", largest=count),
        "moe_intermediate_size": m.width("expert_feed_forward_length", stored),
    }


def llama(m: Metadata) -> dict[str, Any]:
    return {**gated(m), **biases(m)}


def mixtral(m: Metadata) -> dict[str, Any]:
    stack = experts(m)
    return {
        **decoder(m),
        **rms(m),
        "head_dim": head_dim(m),
        "intermediate_size": stack["moe_intermediate_size"],
        "num_local_experts": stack["num_experts"],
        "num_experts_per_tok": stack["num_experts_per_tok"],
    }


def qwen2(m: Metadata) -> dict[str, Any]:
    return {**gated(m), "use_sliding_window": False, "sliding_window": None}


def dense_blocks(m: Metadata) -> list[int]:
    return [n for n in range(m.blocks) if f"blk.{n}.ffn_up_exps.weight" not in m.tensors]


def qwen_moe(m: Metadata, normalized: bool) -> dict[str, Any]:
    dense = dense_blocks(m)
    stack = experts(m)
    # without dense blocks the width is of no use, and not always stored
    width = m.width("feed_forward_length", "ffn_up.weight") if dense else m.uniform("feed_forward_length", 1)
    return {
        **decoder(m),
        **rms(m),
        **stack,
        "head_dim": head_dim(m),
        "intermediate_size": width,
        "mlp_only_layers": dense,
        "decoder_sparse_step": 1,
        "norm_topk_prob": normalized,  # not stored: llama.cpp's own choice for the architecture
        "use_sliding_window": False,
        "sliding_window": None,
    }


def qwen2_moe(m: Metadata) -> dict[str, Any]:
    shared = m.width("expert_shared_feed_forward_length", "ffn_up_shexp.weight")
    return {**qwen_moe(m, False), "shared_expert_intermediate_size": shared}


def qwen3(m: Metadata) -> dict[str, Any]:
    return {**qwen2(m), "attention_bias": m.first("attn_q.bias") is not None}


def qwen3_moe(m: Metadata) -> dict[str, Any]:
    return {**qwen_moe(m, True), "attention_bias": m.first("attn_q.bias") is not None}


def gemma(m: Metadata) -> dict[str, Any]:
    return {**gated(m), "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def query_scale(m: Metadata, largest_model: int) -> float:
    """Not stored. The largest model of the family scales by the width of a head without attention.key_length."""
    if m.blocks == largest_model:
        return m.whole("embedding_length") / m.uniform("attention.head_count")
    return head_dim(m)


def gemma2(m: Metadata) -> dict[str, Any]:
    scale = query_scale(m, 46)
    return {
        **gemma(m),
        "attn_logit_softcapping": m.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": m.number("final_logit_softcapping", 30.0),
        "sliding_window": m.whole("attention.sliding_window", 4096),
        "layer_types": windows(m, 2),
        "query_pre_attn_scalar": int(scale) if scale == int(scale) else scale,
    }


def gemma3(m: Metadata) -> dict[str, Any]:
    scale = query_scale(m, 62)
    settings = {
        **gemma(m),
        "sliding_window": m.whole("attention.sliding_window", 1024),
        "query_pre_attn_scalar": int(scale) if scale == int(scale) else scale,
        "final_logit_softcapping": m.number("final_logit_softcapping") if m.has("final_logit_softcapping") else None,
    }
    full = dict(settings["rope_parameters"])
    if not m.has("rope.freq_base"):
        full["rope_theta"] = 1_000_000.0
    local = {"rope_type": "default", "rope_theta": m.number("rope.freq_base_swa", 10_000.0)}
    settings["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
    settings["layer_types"] = windows(m, 6)
    return settings


def windows(m: Metadata, period: int) -> list[str]:
    """Layer types: which see a window only is stored one by one, or as a period; nothing stored is llama.cpp's `period`."""
    stored = m.values.get(f"{m.architecture}.attention.sliding_window_pattern")
    if (
        isinstance(stored, (list, array))
        and len(stored) >= m.blocks
        and all(type(one) in (bool, int) for one in stored)
    ):
        return ["sliding_attention" if one else "full_attention" for one in stored[: m.blocks]]
    return every(m, m.uniform("attention.sliding_window_pattern", period))


def every(m: Metadata, period: int) -> list[str]:
    """Layer types where every `period`th layer sees everything."""
    return ["sliding_attention" if (n + 1) % period else "full_attention" for n in range(m.blocks)]


def phi3(m: Metadata) -> dict[str, Any]:
    window = m.whole("attention.sliding_window", 0, least=0)
    settings = {**decoder(m), **rms(m), "intermediate_size": m.uniform("feed_forward_length")}
    return {
        **settings,
        "original_max_position_embeddings": m.whole(
            "rope.scaling.original_context_length", settings["max_position_embeddings"]
        ),
        "sliding_window": window or None,
        "partial_rotary_factor": settings["rope_parameters"].get("partial_rotary_factor", 1.0),
    }


def gpt_oss(m: Metadata) -> dict[str, Any]:
    stack = experts(m)
    return {
        **decoder(m),
        **rms(m),
        "head_dim": head_dim(m),
        "intermediate_size": stack["moe_intermediate_size"],
        "num_local_experts": stack["num_experts"],
        "num_experts_per_tok": stack["num_experts_per_tok"],
        "sliding_window": m.whole("attention.sliding_window", 128),
        "layer_types": windows(m, 2),
        "attention_bias": True,
    }


def gpt2(m: Metadata) -> dict[str, Any]:
    common = decoder(m)
    return {
        "vocab_size": common["vocab_size"],
        "n_positions": m.shape("position_embd.weight")[0],
        "n_embd": common["hidden_size"],
        "n_layer": m.blocks,
        "n_head": common["num_attention_heads"],
        "n_inner": m.width("feed_forward_length", "ffn_up.weight"),
        "layer_norm_epsilon": m.number("attention.layer_norm_epsilon", 1e-5),
        **{name: common[name] for name in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")},
    }


def layer_norm(name: str) -> Settings:
    def settings(m: Metadata) -> dict[str, Any]:
        width = m.width("feed_forward_length", "ffn_up.weight")
        return {**decoder(m), name: m.number("attention.layer_norm_epsilon", 1e-5), "intermediate_size": width}

    return settings


def starcoder2(m: Metadata) -> dict[str, Any]:
    window = m.whole("attention.sliding_window", 0, least=0)
    bias = m.first("attn_q.bias") is not None
    return {**layer_norm("norm_epsilon")(m), "sliding_window": window or None, "use_bias": bias}


def stablelm(m: Metadata) -> dict[str, Any]:
    return {
        **layer_norm("layer_norm_eps")(m),
        "use_qkv_bias": m.first("attn_q.bias") is not None,
        "use_parallel_residual": m.flag("use_parallel_residual", False),
        "qk_layernorm": False,
    }


def olmoe(m: Metadata) -> dict[str, Any]:
    stack = experts(m)
    width = stack.pop("moe_intermediate_size")
    return {**decoder(m), **rms(m), **stack, "intermediate_size": width, "norm_topk_prob": False}


def granite(m: Metadata) -> dict[str, Any]:
    return {**llama(m), **multipliers(m)}


def multipliers(m: Metadata) -> dict[str, Any]:
    return {
        "embedding_multiplier": m.number("embedding_scale", 1.0),
        "attention_multiplier": m.number("attention.scale", head_dim(m) ** -0.5),
        "residual_multiplier": m.number("residual_scale", 1.0),
        "logits_scaling": m.number("logit_scale", 1.0),
    }


def cohere(m: Metadata) -> dict[str, Any]:
    return {
        **layer_norm("layer_norm_eps")(m),
        "logit_scale": m.number("logit_scale"),
        "use_qk_norm": m.first("attn_q_norm.weight") is not None,
        "attention_bias": m.first("attn_q.bias") is not None,
    }


def nemotron(m: Metadata) -> dict[str, Any]:
    return {**layer_norm("norm_eps")(m), **biases(m), "head_dim": head_dim(m)}


def arcee(m: Metadata) -> dict[str, Any]:
    return {**gated(m), **biases(m), "hidden_act": "relu2"}


def with_biases(m: Metadata) -> dict[str, Any]:
    """Of q, k and v, or of the output too."""
    return {
        **gated(m),
        "attention_bias": m.first("attn_q.bias") is not None,
        "attention_out_bias": m.first("attn_output.bias") is not None,
    }


def ernie(m: Metadata) -> dict[str, Any]:
    return {**gated(m), "use_bias": m.first("attn_q.bias") is not None}


def smollm3(m: Metadata) -> dict[str, Any]:
    """Every fourth block has no rotary embedding; that is built in."""
    return {**llama(m), "no_rope_layers": [int((n + 1) % 4 != 0) for n in range(m.blocks)], "no_rope_layer_interval": 4}


def olmo(m: Metadata) -> dict[str, Any]:
    return {
        **decoder(m),
        "intermediate_size": m.width("feed_forward_length", "ffn_up.weight"),
        "clip_qkv": m.number("attention.clamp_kqv") if m.has("attention.clamp_kqv") else None,
    }


def cohere2(m: Metadata) -> dict[str, Any]:
    found = {**layer_norm("layer_norm_eps")(m), "logit_scale": m.number("logit_scale"), "head_dim": head_dim(m)}
    return {**found, "sliding_window": m.whole("attention.sliding_window"), "layer_types": windows(m, 4)}


def olmo3(m: Metadata) -> dict[str, Any]:
    """Only the layers that see everything have stretched frequencies."""
    found = gated(m)
    theta = m.number("rope.freq_base_swa", found["rope_parameters"]["rope_theta"])
    local = {"rope_type": "default", "rope_theta": theta}
    return {
        **found,
        "rope_parameters": {"full_attention": found["rope_parameters"], "sliding_attention": local},
        "sliding_window": m.whole("attention.sliding_window"),
        "layer_types": windows(m, 4),
    }


def jais2(m: Metadata) -> dict[str, Any]:
    return {**layer_norm("layer_norm_eps")(m), "head_dim": head_dim(m), "hidden_act": "relu2"}


def glm4(m: Metadata) -> dict[str, Any]:
    """Gate and up are one matrix."""
    found = {**decoder(m), **rms(m), "head_dim": head_dim(m), "attention_bias": m.first("attn_q.bias") is not None}
    return {**found, "intermediate_size": m.width("feed_forward_length", "ffn_down.weight", axis=-1)}


def exaone4(m: Metadata) -> dict[str, Any]:
    """The model of 64 blocks has a sliding window in three of four; the others, as in llama.cpp, in none."""
    window = m.whole("attention.sliding_window", 4096) if m.blocks == 64 else None
    types = every(m, 4) if window else ["full_attention"] * m.blocks
    return {**gated(m), "sliding_window": window, "layer_types": types, "sliding_window_pattern": 4 if window else 0}
