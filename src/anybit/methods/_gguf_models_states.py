"""GGUF architectures with state-space or convolution blocks: Mamba, Mamba 2, LFM2. A table, and their settings."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

from anybit._lazy import torch
from anybit.methods import _gguf_settings as read
from anybit.methods._gguf_architecture import (
    ATTENTION,
    ENDS,
    EXPERTS,
    HEAD_NORMS,
    MLP,
    SHARED_EXPERT,
    Architecture,
    Change,
    Joined,
    Settings,
    Shape,
    blocks,
)  # fmt: skip
from anybit.methods._gguf_metadata import Metadata
from anybit.methods._gguf_rope import rope_parameters

# --- parameters that a file keeps otherwise ----------------------------------------------------------------------------------

# a convolution of one channel each: [channels, 1, width] <-> [channels, width]
_CHANNELS = Change(
    lambda t, s: t.squeeze(1), lambda t, s: t.unsqueeze(1), lambda shape, s: (shape[0], shape[-1]),
    lambda shape, s: (shape[0], 1, shape[-1]),
)  # fmt: skip
# the decay itself for its logarithm
_DECAY = Change(lambda t, s: -torch.exp(t), lambda t, s: torch.log(-t))
# [heads] <-> [heads, 1]
_COLUMN = Change(
    lambda t, s: t[:, None], lambda t, s: t.flatten(), lambda shape, s: (*shape, 1), lambda shape, s: shape[:1]
)
_DECAY_COLUMN = Change(
    lambda t, s: -torch.exp(t[:, None]), lambda t, s: torch.log(-t.flatten()), lambda shape, s: (*shape, 1),
    lambda shape, s: shape[:1],
)  # fmt: skip
# a norm over groups of channels: [channels] <-> [groups, channels of one]
_GROUPED = Change(
    lambda t, s: t.view(s["n_groups"], -1), lambda t, s: t.flatten(),
    lambda shape, s: (s["n_groups"], shape[0] // s["n_groups"]), lambda shape, s: (shape[0] * shape[-1],),
)  # fmt: skip
_CONVOLUTION = "blk.{n}.ssm_conv1d.weight"


# --- Mamba -------------------------------------------------------------------------------------------------------------------


def _common(m: Metadata) -> dict[str, Any]:
    hidden = m.whole("embedding_length")
    inner = m.whole("ssm.inner_size")
    if inner % hidden:
        m.refuse(f"the state has {inner} channels, no multiple of the model's {hidden}")
    return {
        "vocab_size": m.vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": m.blocks,
        "state_size": m.whole("ssm.state_size"),
        "conv_kernel": m.whole("ssm.conv_kernel"),
        "expand": inner // hidden,
        "layer_norm_epsilon": m.number("attention.layer_norm_rms_epsilon"),
        "use_bias": m.first("ssm_in.bias") is not None,
        "use_conv_bias": m.first("ssm_conv1d.bias") is not None,
        "tie_word_embeddings": "output.weight" not in m.tensors,
        **{f"{name}_token_id": m.token(own) for name, own in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))},
    }


def mamba(m: Metadata) -> dict[str, Any]:
    found = _common(m)
    return {**found, "intermediate_size": m.whole("ssm.inner_size"), "time_step_rank": m.whole("ssm.time_step_rank")}


def mamba2(m: Metadata) -> dict[str, Any]:
    heads, inner = m.whole("ssm.time_step_rank"), m.whole("ssm.inner_size")
    if inner % heads:
        m.fail(f"{heads} heads do not divide the state's {inner} channels")
    return {**_common(m), "num_heads": heads, "head_dim": inner // heads, "n_groups": m.whole("ssm.group_count")}


def _mamba_extra(settings: Settings, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    inner = settings["expand"] * settings["hidden_size"]
    found = {
        "context_length": 1 << 20,  # there is no limit; llama.cpp wants one
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "attention.head_count_kv": None,
        "attention.layer_norm_rms_epsilon": float(settings["layer_norm_epsilon"]),
        "attention.layer_norm_epsilon": None,
        "attention.key_length": None,
        "attention.value_length": None,
        "ssm.conv_kernel": settings["conv_kernel"],
        "ssm.inner_size": inner,
        "ssm.state_size": settings["state_size"],
        "ssm.time_step_rank": settings.get("num_heads") or settings["time_step_rank"],
    }
    if "n_groups" in settings:
        found["ssm.group_count"] = settings["n_groups"]
    elif settings["model_type"] == "falcon_mamba":
        found["ssm.dt_b_c_rms"] = True
    return found


def _mamba_refusal(settings: Settings) -> str | None:
    if settings["expand"] != 2:
        return f"its Mamba expands a model's channels by 2, not {settings['expand']}"
    if settings.get("use_bias") or not settings.get("use_conv_bias", True):
        return "its Mamba has a bias in the convolution and in no projection"
    if settings.get("n_groups", 1) > 1:
        return f"it normalizes the {settings['n_groups']} groups of the state one by one, transformers all of them together"
    return None


_MIXER = {"attn_norm": "norm", "ssm_in": "mixer.in_proj", "ssm_out": "mixer.out_proj"}
_MAMBA_ENDS = {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"}


def _mixer(names: Mapping[str, str]) -> dict[str, str]:
    return {f"blk.{{n}}.{own}": f"backbone.layers.{{n}}.mixer.{theirs}" for own, theirs in names.items()}


def _mamba1(model_type: str, model_class: str, normed: bool) -> Architecture:
    return Architecture(
        model_type, model_class,
        {**_MAMBA_ENDS, **blocks({**_MIXER, "ssm_x": "mixer.x_proj", "ssm_dt": "mixer.dt_proj"}, "backbone.layers")},
        mamba,
        parameters=_mixer({
            "ssm_a": "A_log", "ssm_d": "D", "ssm_conv1d.weight": "conv1d.weight", "ssm_conv1d.bias": "conv1d.bias",
        }),
        changes={"blk.{n}.ssm_a": _DECAY, _CONVOLUTION: _CHANNELS}, extra=_mamba_extra, refusal=_mamba_refusal,
        when=lambda m: m.flag("ssm.dt_b_c_rms", False) == normed,
    )  # fmt: skip


# --- LFM2 --------------------------------------------------------------------------------------------------------------------


def lfm2(m: Metadata) -> dict[str, Any]:
    types = ["full_attention" if f"blk.{n}.attn_q.weight" in m.tensors else "conv" for n in range(m.blocks)]
    heads, hidden = m.uniform("attention.head_count"), m.whole("embedding_length")
    keys = m.first("attn_k.weight")
    if keys is None or hidden % heads:
        m.refuse(f"no block has attention, or {heads} heads do not divide {hidden} channels")
    return {
        "vocab_size": m.vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": m.blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": m.shape(keys)[0] // (hidden // heads),
        "max_position_embeddings": m.whole("context_length"),
        "norm_eps": m.number("attention.layer_norm_rms_epsilon"),
        "intermediate_size": m.width("feed_forward_length", "ffn_up.weight"),
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": m.whole("shortconv.l_cache"),
        "conv_bias": False,
        "layer_types": types,
        "rope_parameters": rope_parameters(m, hidden // heads),
        "tie_word_embeddings": "output.weight" not in m.tensors,
        **{f"{name}_token_id": m.token(own) for name, own in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))},
    }


def lfm2_moe(m: Metadata) -> dict[str, Any]:
    stack, found = read.experts(m), lfm2(m)
    return {
        **{name: value for name, value in found.items() if not name.startswith("block_")},
        **stack,
        "num_dense_layers": len(read.dense_blocks(m)),
        "norm_topk_prob": True,
        "use_expert_bias": True,
        "routed_scaling_factor": m.number("expert_weights_scale", 1.0) or 1.0,
    }


def _lfm2_extra(settings: Settings, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    dense = next((shape for name, shape in shapes.items() if name.endswith(".ffn_up.weight")), None)
    return {
        "attention.head_count_kv": array(
            "i",
            [settings["num_key_value_heads"] if kind == "full_attention" else 0 for kind in settings["layer_types"]],
        ),
        "attention.layer_norm_rms_epsilon": float(settings["norm_eps"]),
        "attention.layer_norm_epsilon": None,
        "feed_forward_length": dense[0] if dense is not None else None,
        "shortconv.l_cache": settings["conv_L_cache"],
    }


def _lfm2_moe_extra(settings: Settings, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    return {
        **_lfm2_extra(settings, shapes),
        "leading_dense_block_count": settings["num_dense_layers"],
        "expert_gating_func": 2,
    }


def _lfm2_refusal(settings: Settings) -> str | None:
    if settings.get("conv_bias"):
        return "its LFM2 has no bias in the convolution"
    if settings["model_type"] == "lfm2_moe" and not (
        settings["norm_topk_prob"] and settings["use_expert_bias"] and settings["routed_scaling_factor"] == 1
    ):
        return "the weights of its LFM2's experts sum to one, and a bias helps to choose them"
    return None


_LFM2 = {
    "token_embd": "model.embed_tokens", "token_embd_norm": "model.embedding_norm", "output": "lm_head",
    **blocks({
        "attn_norm": "operator_norm", "ffn_norm": "ffn_norm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.out_proj", "attn_q_norm": "self_attn.q_layernorm",
        "attn_k_norm": "self_attn.k_layernorm", "shortconv.in_proj": "conv.in_proj", "shortconv.out_proj": "conv.out_proj",
        "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3",
    }),
}  # fmt: skip
_SHORT = "blk.{n}.shortconv.conv.weight"

# --- Qwen3-Next --------------------------------------------------------------------------------------------------------------


def qwen3_next(m: Metadata) -> dict[str, Any]:
    found, key, heads = read.qwen_moe(m, True), m.whole("ssm.state_size"), m.whole("ssm.time_step_rank")
    inner = m.whole("ssm.inner_size")
    if inner % heads:
        m.fail(f"{heads} heads do not divide the state's {inner} channels")
    types = ["full_attention" if f"blk.{n}.attn_q.weight" in m.tensors else "linear_attention" for n in range(m.blocks)]
    return {
        **{name: value for name, value in found.items() if "sliding" not in name},
        "shared_expert_intermediate_size": m.width("expert_shared_feed_forward_length", "ffn_up_shexp.weight"),
        "linear_num_key_heads": m.whole("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": key,
        "linear_value_head_dim": inner // heads,
        "linear_conv_kernel_dim": m.whole("ssm.conv_kernel"),
        "layer_types": types,
        "attention_bias": m.first("attn_q.bias") is not None,
    }


def _qwen3_next_extra(settings: Settings, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    types = settings["layer_types"]
    return {
        "ssm.conv_kernel": settings["linear_conv_kernel_dim"],
        "ssm.state_size": settings["linear_key_head_dim"],
        "ssm.group_count": settings["linear_num_key_heads"],
        "ssm.time_step_rank": settings["linear_num_value_heads"],
        "ssm.inner_size": settings["linear_num_value_heads"] * settings["linear_value_head_dim"],
        "attention.recurrent_layers": [kind == "linear_attention" for kind in types],
        "full_attention_interval": types.index("full_attention") + 1 if "full_attention" in types else 4,
        "expert_weights_scale": None,
    }


def _qwen3_next_refusal(settings: Settings) -> str | None:
    if settings["linear_key_head_dim"] != settings["linear_value_head_dim"]:
        return "its linear attention has keys as wide as values"
    return None if settings.get("norm_topk_prob") else "the weights of its Qwen3-Next's experts sum to one"


def _linear_sizes(settings: Settings) -> tuple[int, int]:
    """Rows of queries, keys and values; rows of the gate."""
    keys = settings["linear_num_key_heads"] * settings["linear_key_head_dim"]
    values = settings["linear_num_value_heads"] * settings["linear_value_head_dim"]
    return 2 * keys + values, values


def _linear_order(settings: Settings, rows: int) -> Any:
    """For each head of keys: query, key, its values, their gates -> all queries, all keys, all values, all gates."""
    groups, key = settings["linear_num_key_heads"], settings["linear_key_head_dim"]
    values = settings["linear_num_value_heads"] // groups * settings["linear_value_head_dim"]
    parts = torch.arange(rows).view(groups, -1).split([key, key, values, values], 1)
    return torch.cat([part.flatten() for part in parts])


_LINEAR = "model.layers.{n}.linear_attn."

STATES: dict[str, tuple[Architecture, ...]] = {
    "mamba": (
        _mamba1("falcon_mamba", "FalconMambaForCausalLM", True),
        _mamba1("mamba", "MambaForCausalLM", False),
    ),
    "mamba2": (Architecture(
        "mamba2", "Mamba2ForCausalLM", {**_MAMBA_ENDS, **blocks(_MIXER, "backbone.layers")}, mamba2,
        parameters=_mixer({
            "ssm_a": "A_log", "ssm_d": "D", "ssm_conv1d.weight": "conv1d.weight", "ssm_conv1d.bias": "conv1d.bias",
            "ssm_dt.bias": "dt_bias", "ssm_norm.weight": "norm.weight",
        }),
        changes={
            "blk.{n}.ssm_a": _DECAY_COLUMN, "blk.{n}.ssm_d": _COLUMN, _CONVOLUTION: _CHANNELS,
            "blk.{n}.ssm_norm.weight": _GROUPED,
        },
        extra=_mamba_extra, refusal=_mamba_refusal, free=("chunk_size",),
    ),),
    "lfm2": (Architecture(
        "lfm2", "Lfm2ForCausalLM", _LFM2, lfm2, parameters={_SHORT: "model.layers.{n}.conv.conv.weight"},
        changes={_SHORT: _CHANNELS}, extra=_lfm2_extra, refusal=_lfm2_refusal,
        free=("block_auto_adjust_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of", "block_ff_dim", "full_attn_idxs"),
    ),),
    "lfm2moe": (Architecture(
        "lfm2_moe", "Lfm2MoeForCausalLM",
        {**_LFM2, **blocks({
            "ffn_gate_inp": "feed_forward.gate",
            **{f"ffn_{own}_exps": f"feed_forward.experts.{{e}}.{w}" for own, w in (("gate", "w1"), ("down", "w2"), ("up", "w3"))},
        })},
        lfm2_moe,
        parameters={
            _SHORT: "model.layers.{n}.conv.conv.weight",
            "blk.{n}.exp_probs_b.bias": "model.layers.{n}.feed_forward.expert_bias",
        },
        changes={_SHORT: _CHANNELS}, extra=_lfm2_moe_extra, refusal=_lfm2_refusal,
    ),),
    "qwen3next": (Architecture(
        "qwen3_next", "Qwen3NextForCausalLM",
        {**ENDS, **blocks({
            "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm", **ATTENTION, **HEAD_NORMS,
            **MLP,
            **EXPERTS, **SHARED_EXPERT, "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
            "ssm_ba": "linear_attn.in_proj_ba", "ssm_out": "linear_attn.out_proj",
        })},
        qwen3_next,
        joined={("attn_qkv", "attn_gate"): Joined(f"{_LINEAR}in_proj_qkvz", _linear_order, _linear_sizes)},
        parameters={
            "blk.{n}.ssm_a": f"{_LINEAR}A_log", "blk.{n}.ssm_dt.bias": f"{_LINEAR}dt_bias",
            "blk.{n}.ssm_conv1d.weight": f"{_LINEAR}conv1d.weight", "blk.{n}.ssm_norm.weight": f"{_LINEAR}norm.weight",
        },
        changes={"blk.{n}.ssm_a": _DECAY, _CONVOLUTION: _CHANNELS},
        shifted=("output_norm", "attn_norm", "post_attention_norm", *HEAD_NORMS), extra=_qwen3_next_extra,
        refusal=_qwen3_next_refusal, free=("full_attention_interval",),
    ),),
}  # fmt: skip
