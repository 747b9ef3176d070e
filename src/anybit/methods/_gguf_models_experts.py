"""GGUF architectures whose MLPs are experts: Mixtral, DeepSeek 2 and 3, Granite, ERNIE 4.5, GLM 4.5 and others, and settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anybit.methods import _gguf_settings as read
from anybit.methods._gguf_architecture import (
    ATTENTION,
    ENDS,
    EXPERTS,
    HEAD_NORMS,
    MLP,
    MOE,
    ROTARY,
    ROW,
    SHARED_EXPERTS,
    TWO_NORMS,
    Architecture,
    Joined,
    Settings,
    Shape,
    blocks,
)  # fmt: skip
from anybit.methods._gguf_metadata import Metadata

SOFTMAX, SIGMOID = 1, 2  # expert_gating_func
_BIAS = {"blk.{n}.exp_probs_b.bias": "model.layers.{n}.mlp.gate.e_score_correction_bias"}
_W_EXPERTS = {
    own: f"block_sparse_moe.experts.{{e}}.{theirs}" for own, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
}
_W_STACKS = {"ffn_gate_inp": "block_sparse_moe.gate", **{f"ffn_{own}_exps": name for own, name in _W_EXPERTS.items()}}


# --- settings of routers -----------------------------------------------------------------------------------------------------


def leading(m: Metadata) -> int:
    """Blocks without experts, which come first."""
    dense = read.dense_blocks(m)
    if dense != list(range(len(dense))):
        m.refuse(f"blocks {dense} have no experts; transformers' class has such blocks only at the start")
    return len(dense)


def routed(m: Metadata, width: int | None = None) -> dict[str, Any]:
    """A decoder with experts in DeepSeek's words. `width`: as of `decoder`."""
    stack = read.experts(m)
    dense = leading(m)
    return {
        **read.decoder(m, width),
        **read.rms(m),
        "intermediate_size": m.width("feed_forward_length", "ffn_up.weight")
        if dense
        else m.uniform("feed_forward_length", 1),
        "moe_intermediate_size": stack["moe_intermediate_size"],
        "n_routed_experts": stack["num_experts"],
        "num_experts_per_tok": stack["num_experts_per_tok"],
        "n_shared_experts": m.whole("expert_shared_count", 0, least=0),
        "first_k_dense_replace": dense,
        "n_group": m.whole("expert_group_count", 1),
        "topk_group": m.whole("expert_group_used_count", 1),
        "routed_scaling_factor": m.number("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": m.flag("expert_weights_norm", False),
    }


def _routed(settings: Settings, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Back, for experts chosen by a sigmoid and a bias."""
    return {
        "expert_shared_count": settings["n_shared_experts"],
        "leading_dense_block_count": settings["first_k_dense_replace"],
        "expert_group_count": settings.get("n_group") or 1,
        "expert_group_used_count": settings.get("topk_group") or 1,
        "expert_weights_scale": float(settings["routed_scaling_factor"]),
        "expert_weights_norm": bool(settings["norm_topk_prob"]),
        "expert_gating_func": SIGMOID,
    }


# --- DeepSeek ----------------------------------------------------------------------------------------------------------------


def deepseek(m: Metadata) -> dict[str, Any]:
    """Attention from a latent vector. Newer files describe it as one head of keys of the latent width."""
    newer = m.has("attention.key_length_mla")
    rotated, rank = m.whole("rope.dimension_count"), m.whole("attention.kv_lora_rank")
    keys = m.whole("attention.key_length_mla" if newer else "attention.key_length")
    if keys <= rotated:
        m.fail(f"keys have {keys} channels, of which {rotated} are turned; some must not be")
    found = routed(m, rotated)
    rope = found["rope_parameters"]
    if rope["rope_type"] == "yarn" and m.has("rope.scaling.yarn_log_multiplier"):
        # a tenth of it is stored; the two settings are equal in all models, or llama.cpp would have no place for one
        rope["mscale"] = rope["mscale_all_dim"] = round(10 * m.number("rope.scaling.yarn_log_multiplier"), 6)
        rope["truncate"] = True
    return {
        **found,
        "num_key_value_heads": found["num_attention_heads"],
        "q_lora_rank": m.whole("attention.q_lora_rank") if m.first("attn_q_a.weight") is not None else None,
        "kv_lora_rank": rank,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": keys - rotated,
        "v_head_dim": m.whole("attention.value_length_mla" if newer else "attention.value_length"),
        "head_dim": rotated,
        "attention_bias": False,
    }


def deepseek2(m: Metadata) -> dict[str, Any]:
    found = deepseek(m)
    grouped = found["n_group"] > 1
    return {**found, "topk_method": "group_limited_greedy" if grouped else "greedy"}


def deepseek3(m: Metadata) -> dict[str, Any]:
    return {**deepseek(m), "rope_interleave": True}


def _deepseek_extra(settings: Settings, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    rank, rotated = settings["kv_lora_rank"], settings["qk_rope_head_dim"]
    rope = settings.get("rope_parameters") or {}
    found: dict[str, Any] = {
        **_routed(settings, shapes),
        "expert_gating_func": SIGMOID if settings["model_type"] == "deepseek_v3" else SOFTMAX,
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rotated,
        "attention.value_length": rank,
        "attention.key_length_mla": settings["qk_nope_head_dim"] + rotated,
        "attention.value_length_mla": settings["v_head_dim"],
        "attention.kv_lora_rank": rank,
        "attention.q_lora_rank": settings.get("q_lora_rank"),
        "rope.dimension_count": rotated,
    }
    if rope.get("mscale_all_dim"):
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * float(rope["mscale_all_dim"])
    return found


def _deepseek_refusal(settings: Settings) -> str | None:
    if settings.get("rope_interleave") is False:
        return "its DeepSeek turns neighbouring channels, and rope_interleave is False"
    if settings["model_type"] == "deepseek_v2" and (settings.get("n_group") or 1) > 1:
        return "it ranks groups of experts by the sum of their two best, DeepSeek 2 by the best"
    layers, direct = settings["num_hidden_layers"], settings.get("q_lora_rank") is None
    if direct != (layers in (26, 27) or (layers == 48 and settings["vocab_size"] == 128256)):
        return f"it knows from their number, {layers}, whether the queries of its blocks come from a latent vector (q_lora_rank)"
    if settings.get("attention_bias"):
        return "its DeepSeek has no biases in the attention"
    rope = settings.get("rope_parameters") or {}
    if rope.get("mscale") != rope.get("mscale_all_dim"):
        return f"it has one number for mscale ({rope.get('mscale')}) and mscale_all_dim ({rope.get('mscale_all_dim')})"
    return None


_DEEPSEEK = {
    **ENDS,
    **blocks({
        **TWO_NORMS, **MLP, **EXPERTS, **SHARED_EXPERTS, "attn_q": "self_attn.q_proj", "attn_q_a": "self_attn.q_a_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_q_b": "self_attn.q_b_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa", "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_kv_b": "self_attn.kv_b_proj", "attn_output": "self_attn.o_proj",
    }),
}  # fmt: skip
_LATENT = "model.layers.{n}.self_attn.kv_b_proj"


# --- others ------------------------------------------------------------------------------------------------------------------


def granite(m: Metadata) -> dict[str, Any]:
    stack, common = read.experts(m), read.decoder(m)
    found = {
        **common,
        **read.rms(m),
        "intermediate_size": stack["moe_intermediate_size"],
        "num_local_experts": stack["num_experts"],
        "num_experts_per_tok": stack["num_experts_per_tok"],
        "attention_bias": m.first("attn_q.bias") is not None,
        **read.multipliers(m),
    }
    if m.first("ffn_up_shexp.weight") is not None:
        found["shared_intermediate_size"] = m.width("expert_shared_feed_forward_length", "ffn_up_shexp.weight")
    return found


def _granite(model_type: str, model_class: str, shared: bool) -> Architecture:
    names = {"ffn_gate_inp": "block_sparse_moe.router.layer", "ffn_down_exps": "block_sparse_moe.output_linear"}
    halves: dict[tuple[str, ...], Joined] = {
        ("ffn_gate_exps", "ffn_up_exps"): Joined("model.layers.{n}.block_sparse_moe.input_linear")
    }
    if shared:
        names["ffn_down_shexp"] = "shared_mlp.output_linear"
        halves["ffn_gate_shexp", "ffn_up_shexp"] = Joined("model.layers.{n}.shared_mlp.input_linear")
    return Architecture(
        model_type, model_class, {**ENDS, **blocks({**TWO_NORMS, **ATTENTION, **names})}, granite, joined=halves,
        turned=ROTARY, when=lambda m: shared == (m.first("ffn_up_shexp.weight") is not None),
        extra=lambda settings, shapes: {
            "expert_shared_feed_forward_length": settings["shared_intermediate_size"] if shared else None,
        },
    )  # fmt: skip


def ernie(m: Metadata) -> dict[str, Any]:
    stack, dense = read.experts(m), leading(m)
    shared = m.first("ffn_up_shexp.weight")
    width = stack["moe_intermediate_size"]
    return {
        **read.decoder(m),
        **read.rms(m),
        "head_dim": read.head_dim(m),
        "intermediate_size": m.width("feed_forward_length", "ffn_up.weight")
        if dense
        else m.uniform("feed_forward_length", 1),
        "use_bias": m.first("attn_q.bias") is not None,
        "moe_intermediate_size": width,
        "moe_num_experts": stack["num_experts"],
        "moe_k": stack["num_experts_per_tok"],
        "moe_num_shared_experts": m.shape(shared)[0] // width if shared is not None else 0,
        "moe_layer_start_index": dense,
        "moe_layer_end_index": m.blocks - 1,
        "moe_layer_interval": 1,
    }


def _ernie_refusal(settings: Settings) -> str | None:
    end = settings["moe_layer_end_index"]
    if settings["moe_layer_interval"] != 1 or end not in (-1, settings["num_hidden_layers"] - 1):
        return "it has experts in every block from the first one on"
    return "its ERNIE of experts has no biases" if settings.get("use_bias") else None


def _ernie_extra(settings: Settings, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    shared = settings["moe_num_shared_experts"]
    return {
        "interleave_moe_layer_step": 1,
        "leading_dense_block_count": settings["moe_layer_start_index"],
        "expert_shared_count": shared,
        "expert_shared_feed_forward_length": shared * settings["moe_intermediate_size"],
    }


def glm4(m: Metadata) -> dict[str, Any]:
    return {
        **routed(m),
        "head_dim": read.head_dim(m),
        "use_qk_norm": m.first("attn_q_norm.weight") is not None,
        "attention_bias": m.first("attn_q.bias") is not None,
    }


def dots1(m: Metadata) -> dict[str, Any]:
    return {
        **routed(m),
        "head_dim": read.head_dim(m),
        "sliding_window": None,
        "layer_types": ["full_attention"] * m.blocks,
    }


def _dots1_refusal(settings: Settings) -> str | None:
    if settings["num_key_value_heads"] != settings["num_attention_heads"]:
        return "its dots1 has as many heads of keys as of queries"
    return "its dots1 has a head of its own (tie_word_embeddings)" if settings.get("tie_word_embeddings") else None


def hunyuan(m: Metadata) -> dict[str, Any]:
    stack = read.experts(m)
    return {
        **read.decoder(m),
        **read.rms(m),
        "head_dim": read.head_dim(m),
        "intermediate_size": stack["moe_intermediate_size"],
        "num_experts": stack["num_experts"],
        "moe_topk": stack["num_experts_per_tok"],
        "attention_bias": m.first("attn_q.bias") is not None,
    }


def minimax(m: Metadata) -> dict[str, Any]:
    stack = read.experts(m)
    return {
        **read.decoder(m),
        **read.rms(m),
        "head_dim": read.head_dim(m),
        "intermediate_size": stack["moe_intermediate_size"],
        "num_local_experts": stack["num_experts"],
        "num_experts_per_tok": stack["num_experts_per_tok"],
    }


def afmoe(m: Metadata) -> dict[str, Any]:
    found = routed(m)
    return {
        **{
            name: value
            for name, value in found.items()
            if not name.startswith(("n_", "topk", "norm", "routed", "first"))
        },
        "head_dim": read.head_dim(m),
        "num_experts": found["n_routed_experts"],
        "num_shared_experts": found["n_shared_experts"],
        "num_dense_layers": found["first_k_dense_replace"],
        "route_scale": found["routed_scaling_factor"],
        "mup_enabled": True,
        "sliding_window": m.whole("attention.sliding_window"),
        "layer_types": read.windows(m, 4),
    }


def _afmoe_extra(settings: Settings, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    return {
        "expert_shared_count": settings["num_shared_experts"],
        "leading_dense_block_count": settings["num_dense_layers"],
        "expert_weights_scale": float(settings["route_scale"]),
        "expert_weights_norm": True,
        "expert_gating_func": SIGMOID,
    }


def _afmoe_refusal(settings: Settings) -> str | None:
    return None if settings.get("mup_enabled") else "its embeddings are scaled by the root of their width (mup_enabled)"


def exaone(m: Metadata) -> dict[str, Any]:
    found = routed(m)
    dense = found["first_k_dense_replace"]
    types = read.windows(m, 4)
    return {
        **{name: value for name, value in found.items() if name not in ("n_routed_experts", "n_shared_experts")},
        "head_dim": read.head_dim(m),
        "num_experts": found["n_routed_experts"],
        "num_shared_experts": found["n_shared_experts"],
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (m.blocks - dense),
        "sliding_window": m.whole("attention.sliding_window"),
        "layer_types": types,
    }


def _exaone_extra(settings: Settings, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    types = settings["mlp_layer_types"]
    return {
        **_routed(
            {
                **settings,
                "n_shared_experts": settings["num_shared_experts"],
                "first_k_dense_replace": types.count("dense"),
            },
            shapes,
        ),
        "expert_shared_feed_forward_length": settings["num_shared_experts"] * settings["moe_intermediate_size"],
    }


MIXTURES: dict[str, tuple[Architecture, ...]] = {
    "llama": (Architecture(
        "mixtral", "MixtralForCausalLM",
        {**ENDS, **blocks({
            **TWO_NORMS, **ATTENTION, **_W_STACKS,
            **{f"ffn_{own}.{{e}}": target for own, target in _W_EXPERTS.items()},  # files from before there were stacks
        })},
        read.mixtral, turned=ROTARY,
        when=lambda m: m.has("expert_count") and m.whole("expert_count", least=0) > 0,
    ),),
    "deepseek2": (
        Architecture(
            "deepseek_v3", "DeepseekV3ForCausalLM", _DEEPSEEK, deepseek3, parameters=_BIAS, latent=_LATENT,
            extra=_deepseek_extra, refusal=_deepseek_refusal, free=("num_mtp_layers", "n_group", "topk_group"),
            when=lambda m: m.whole("expert_gating_func", SOFTMAX) == SIGMOID or m.first("exp_probs_b.bias") is not None,
        ),
        Architecture(
            "deepseek_v2", "DeepseekV2ForCausalLM", _DEEPSEEK, deepseek2, latent=_LATENT, extra=_deepseek_extra,
            refusal=_deepseek_refusal, free=("n_group", "topk_group", "topk_method"),
        ),
    ),
    "granitemoe": (
        _granite("granitemoeshared", "GraniteMoeSharedForCausalLM", True),
        _granite("granitemoe", "GraniteMoeForCausalLM", False),
    ),
    "ernie4_5-moe": (Architecture(
        "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", {**MOE, **blocks(SHARED_EXPERTS)}, ernie,
        parameters={"blk.{n}.exp_probs_b.bias": "model.layers.{n}.mlp.moe_statics.e_score_correction_bias"},
        changes={"blk.{n}.exp_probs_b.bias": ROW}, refusal=_ernie_refusal, extra=_ernie_extra,
        free=("moe_layer_end_index",),
    ),),
    "glm4moe": (Architecture(
        "glm4_moe", "Glm4MoeForCausalLM",
        {**ENDS, **blocks({
            "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm", **ATTENTION, **HEAD_NORMS,
            **MLP, **EXPERTS, **SHARED_EXPERTS,
        })},
        glm4, parameters=_BIAS, extra=_routed, free=("num_mtp_layers",),
    ),),
    "dots1": (Architecture(
        "dots1", "Dots1ForCausalLM", {**MOE, **blocks({**HEAD_NORMS, **SHARED_EXPERTS})}, dots1, parameters=_BIAS,
        extra=lambda settings, shapes: {**_routed(settings, shapes), "attention.sliding_window": None},
        refusal=_dots1_refusal, free=("sliding_window",),
    ),),
    "hunyuan-moe": (Architecture(
        "hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM",
        {**MOE, **blocks({
            "attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm",
            "ffn_gate_inp": "mlp.gate.wg", **{f"ffn_{own}_shexp": f"mlp.shared_mlp.{own}_proj" for own in ("gate", "up", "down")},
        })},
        hunyuan,
        extra=lambda settings, shapes: {
            "expert_shared_count": 1, "expert_shared_feed_forward_length": settings["intermediate_size"],
        },
    ),),
    "minimax-m2": (Architecture(
        "minimax_m2", "MiniMaxM2ForCausalLM", {**ENDS, **blocks({**TWO_NORMS, **ATTENTION, **HEAD_NORMS, **_W_STACKS})}, minimax,
        parameters={"blk.{n}.exp_probs_b.bias": "model.layers.{n}.block_sparse_moe.e_score_correction_bias"},
        constants={"expert_gating_func": SIGMOID},
        refusal=lambda settings: "its MiniMax-M2 has a head of its own" if settings.get("tie_word_embeddings") else None,
    ),),
    "afmoe": (Architecture(
        "afmoe", "AfmoeForCausalLM",
        {**ENDS, **blocks({
            "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_mlp_layernorm",
            "post_ffw_norm": "post_mlp_layernorm", **ATTENTION, **HEAD_NORMS, "attn_gate": "self_attn.gate_proj", **MLP,
            **EXPERTS, **SHARED_EXPERTS, "ffn_gate_inp": "mlp.router.gate",
        })},
        afmoe, parameters={"blk.{n}.exp_probs_b.bias": "model.layers.{n}.mlp.expert_bias"}, extra=_afmoe_extra,
        refusal=_afmoe_refusal, free=("global_attn_every_n_layers",),
    ),),
    "exaone-moe": (Architecture(
        "exaone_moe", "ExaoneMoeForCausalLM", {**MOE, **blocks({**HEAD_NORMS, **SHARED_EXPERTS})}, exaone,
        parameters={"blk.{n}.exp_probs_b.bias": "model.layers.{n}.mlp.e_score_correction_bias"}, extra=_exaone_extra,
        free=("sliding_window_pattern", "first_k_dense_replace"),
    ),),
    # the language model of one that sees: for text its three kinds of positions are one
    "qwen3vlmoe": (Architecture(
        "qwen3_moe", "Qwen3MoeForCausalLM", {**MOE, **blocks(HEAD_NORMS)}, read.qwen3_moe, suits=lambda settings: False,
    ),),
}  # fmt: skip
