"""Architectures of GGUF files: names of their tensors and settings, in transformers' words. A table; `describe` reads it.

llama.cpp names tensors after their part in the model (`blk.3.attn_q`), keeps rows of rotary projections in pairs for some
architectures, and stores some norms plus one. Settings that it builds in rather than stores are written out here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from anybit.errors import did_you_mean
from anybit.methods._gguf_metadata import Metadata
from anybit.methods._gguf_rope import rope_parameters

Settings = Callable[[Metadata], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """`names`: GGUF module -> module of the checkpoint; {n} is the block, {e} the expert of a stack that is stored whole.

    A target that starts with "=" is a parameter itself, whose bias is called `_bias`. `interleaved`: two stacks whose rows
    alternate in the target. `pieces`: one matrix whose rows are several targets. `turned`: rows in rotary pairs. `shifted`:
    norms stored plus one. `transposed`: dense weights that transformers stores [in, out].
    """

    model_type: str
    model_class: str
    names: Mapping[str, str]
    settings: Settings
    interleaved: Mapping[tuple[str, str], str] = field(default_factory=dict)
    pieces: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    turned: tuple[str, ...] = ()
    shifted: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()


def describe(metadata: Metadata) -> Architecture:
    """The architecture of a file. ConfigError for one that is not in the table."""
    name = metadata.architecture
    if name == "llama" and metadata.has("expert_count") and metadata.whole("expert_count", least=0):
        return MIXTRAL
    found = ARCHITECTURES.get(name)
    if found is None:
        metadata.refuse(
            f"the architecture {name!r} is not known{did_you_mean(name, ARCHITECTURES)}; known are "
            f"{', '.join(sorted(ARCHITECTURES))}. Convert the original checkpoint instead"
        )
    return found


# --- settings ----------------------------------------------------------------------------------------------------------------


def _decoder(m: Metadata) -> dict[str, Any]:
    """What nearly every decoder has."""
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
        "rope_parameters": rope_parameters(m, head_dim(m)),
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


def _rms(m: Metadata) -> dict[str, Any]:
    return {"rms_norm_eps": m.number("attention.layer_norm_rms_epsilon")}


def _gated(m: Metadata) -> dict[str, Any]:
    """Decoder with RMS norms and a gated MLP."""
    return {
        **_decoder(m),
        **_rms(m),
        "head_dim": head_dim(m),
        "intermediate_size": m.width("feed_forward_length", "ffn_up.weight"),
    }


def _biases(m: Metadata) -> dict[str, Any]:
    return {
        "attention_bias": m.first("attn_q.bias") is not None and m.first("attn_output.bias") is not None,
        "mlp_bias": m.first("ffn_up.bias") is not None,
    }


def _experts(m: Metadata) -> dict[str, Any]:
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


def _llama(m: Metadata) -> dict[str, Any]:
    return {**_gated(m), **_biases(m)}


def _mixtral(m: Metadata) -> dict[str, Any]:
    experts = _experts(m)
    return {
        **_decoder(m),
        **_rms(m),
        "head_dim": head_dim(m),
        "intermediate_size": experts["moe_intermediate_size"],
        "num_local_experts": experts["num_experts"],
        "num_experts_per_tok": experts["num_experts_per_tok"],
    }


def _qwen2(m: Metadata) -> dict[str, Any]:
    return {**_gated(m), "use_sliding_window": False, "sliding_window": None}


def _dense_blocks(m: Metadata) -> list[int]:
    return [n for n in range(m.blocks) if f"blk.{n}.ffn_up_exps.weight" not in m.tensors]


def _qwen_moe(m: Metadata, normalized: bool) -> dict[str, Any]:
    dense = _dense_blocks(m)
    experts = _experts(m)
    # without dense blocks the width is of no use, and not always stored
    width = m.width("feed_forward_length", "ffn_up.weight") if dense else m.uniform("feed_forward_length", 1)
    return {
        **_decoder(m),
        **_rms(m),
        **experts,
        "head_dim": head_dim(m),
        "intermediate_size": width,
        "mlp_only_layers": dense,
        "decoder_sparse_step": 1,
        "norm_topk_prob": normalized,  # not stored: llama.cpp's own choice for the architecture
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _qwen2_moe(m: Metadata) -> dict[str, Any]:
    shared = m.width("expert_shared_feed_forward_length", "ffn_up_shexp.weight")
    return {**_qwen_moe(m, False), "shared_expert_intermediate_size": shared}


def _qwen3(m: Metadata) -> dict[str, Any]:
    return {**_qwen2(m), "attention_bias": m.first("attn_q.bias") is not None}


def _qwen3_moe(m: Metadata) -> dict[str, Any]:
    return {**_qwen_moe(m, True), "attention_bias": m.first("attn_q.bias") is not None}


def _gemma(m: Metadata) -> dict[str, Any]:
    return {**_gated(m), "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _query_scale(m: Metadata, largest_model: int) -> float:
    """Not stored. The largest model of the family scales by the width of a head without attention.key_length."""
    if m.blocks == largest_model:
        return m.whole("embedding_length") / m.uniform("attention.head_count")
    return head_dim(m)


def _gemma2(m: Metadata) -> dict[str, Any]:
    scale = _query_scale(m, 46)
    return {
        **_gemma(m),
        "attn_logit_softcapping": m.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": m.number("final_logit_softcapping", 30.0),
        "sliding_window": m.whole("attention.sliding_window", 4096),
        "query_pre_attn_scalar": int(scale) if scale == int(scale) else scale,
    }


def _gemma3(m: Metadata) -> dict[str, Any]:
    scale = _query_scale(m, 62)
    settings = {
        **_gemma(m),
        "sliding_window": m.whole("attention.sliding_window", 1024),
        "query_pre_attn_scalar": int(scale) if scale == int(scale) else scale,
        "final_logit_softcapping": m.number("final_logit_softcapping") if m.has("final_logit_softcapping") else None,
    }
    full = dict(settings["rope_parameters"])
    if not m.has("rope.freq_base"):
        full["rope_theta"] = 1_000_000.0
    local = {"rope_type": "default", "rope_theta": m.number("rope.freq_base_swa", 10_000.0)}
    settings["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
    settings["layer_types"] = _every(m, m.uniform("attention.sliding_window_pattern", 6))
    return settings


def _every(m: Metadata, period: int) -> list[str]:
    """Layer types where every `period`th layer sees everything."""
    return ["sliding_attention" if (n + 1) % period else "full_attention" for n in range(m.blocks)]


def _phi3(m: Metadata) -> dict[str, Any]:
    window = m.whole("attention.sliding_window", 0, least=0)
    settings = {**_decoder(m), **_rms(m), "intermediate_size": m.uniform("feed_forward_length")}
    return {
        **settings,
        "original_max_position_embeddings": m.whole(
            "rope.scaling.original_context_length", settings["max_position_embeddings"]
        ),
        "sliding_window": window or None,
        "partial_rotary_factor": settings["rope_parameters"].get("partial_rotary_factor", 1.0),
    }


def _gpt_oss(m: Metadata) -> dict[str, Any]:
    experts = _experts(m)
    return {
        **_decoder(m),
        **_rms(m),
        "head_dim": head_dim(m),
        "intermediate_size": experts["moe_intermediate_size"],
        "num_local_experts": experts["num_experts"],
        "num_experts_per_tok": experts["num_experts_per_tok"],
        "sliding_window": m.whole("attention.sliding_window", 128),
        "layer_types": _every(m, 2),
        "attention_bias": True,
    }


def _gpt2(m: Metadata) -> dict[str, Any]:
    common = _decoder(m)
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


def _layer_norm(name: str) -> Settings:
    def settings(m: Metadata) -> dict[str, Any]:
        width = m.width("feed_forward_length", "ffn_up.weight")
        return {**_decoder(m), name: m.number("attention.layer_norm_epsilon", 1e-5), "intermediate_size": width}

    return settings


def _starcoder2(m: Metadata) -> dict[str, Any]:
    window = m.whole("attention.sliding_window", 0, least=0)
    bias = m.first("attn_q.bias") is not None
    return {**_layer_norm("norm_epsilon")(m), "sliding_window": window or None, "use_bias": bias}


def _stablelm(m: Metadata) -> dict[str, Any]:
    return {
        **_layer_norm("layer_norm_eps")(m),
        "use_qkv_bias": m.first("attn_q.bias") is not None,
        "use_parallel_residual": m.flag("use_parallel_residual", False),
        "qk_layernorm": False,
    }


def _olmoe(m: Metadata) -> dict[str, Any]:
    experts = _experts(m)
    width = experts.pop("moe_intermediate_size")
    return {**_decoder(m), **_rms(m), **experts, "intermediate_size": width, "norm_topk_prob": False}


def _granite(m: Metadata) -> dict[str, Any]:
    return {
        **_llama(m),
        "embedding_multiplier": m.number("embedding_scale", 1.0),
        "attention_multiplier": m.number("attention.scale", head_dim(m) ** -0.5),
        "residual_multiplier": m.number("residual_scale", 1.0),
        "logits_scaling": m.number("logit_scale", 1.0),
    }


def _cohere(m: Metadata) -> dict[str, Any]:
    return {
        **_layer_norm("layer_norm_eps")(m),
        "logit_scale": m.number("logit_scale"),
        "use_qk_norm": m.first("attn_q_norm.weight") is not None,
        "attention_bias": m.first("attn_q.bias") is not None,
    }


def _nemotron(m: Metadata) -> dict[str, Any]:
    return {**_layer_norm("norm_eps")(m), **_biases(m), "head_dim": head_dim(m)}


# --- names -------------------------------------------------------------------------------------------------------------------

_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def _blocks(names: Mapping[str, str], layers: str = "model.layers") -> dict[str, str]:
    return {f"blk.{{n}}.{own}": f"{layers}.{{n}}.{theirs}" for own, theirs in names.items()}


_ATTENTION = {f"attn_{own}": f"self_attn.{theirs}" for own, theirs in (
    ("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj"),
)}  # fmt: skip
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {f"ffn_{own}": f"mlp.{own}_proj" for own in ("gate", "up", "down")}
_TWO_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    **{f"ffn_{own}_exps": f"mlp.experts.{{e}}.{own}_proj" for own in ("gate", "up", "down")},
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"ffn_{own}_shexp": f"mlp.shared_expert.{own}_proj" for own in ("gate", "up", "down")},
}
_ROTARY = ("attn_q", "attn_k")
_ALL_NORMS = ("output_norm", *_FOUR_NORMS, *_HEAD_NORMS)

_LLAMA = {**_ENDS, **_blocks({**_TWO_NORMS, **_ATTENTION, **_MLP})}
_QWEN3 = {**_LLAMA, **_blocks(_HEAD_NORMS)}
_MOE = {**_ENDS, **_blocks({**_TWO_NORMS, **_ATTENTION, **_MLP, **_EXPERTS})}
_GEMMA2 = {**_ENDS, **_blocks({**_FOUR_NORMS, **_ATTENTION, **_MLP})}

_MIXTRAL_EXPERTS = {
    own: f"block_sparse_moe.experts.{{e}}.{theirs}" for own, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
}

MIXTRAL = Architecture(
    "mixtral", "MixtralForCausalLM",
    {**_ENDS, **_blocks({
        **_TWO_NORMS, **_ATTENTION, "ffn_gate_inp": "block_sparse_moe.gate",
        **{f"ffn_{own}_exps": target for own, target in _MIXTRAL_EXPERTS.items()},
        **{f"ffn_{own}.{{e}}": target for own, target in _MIXTRAL_EXPERTS.items()},  # files from before there were stacks
    })},
    _mixtral, turned=_ROTARY,
)  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", _LLAMA, _llama, turned=_ROTARY),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _LLAMA, _qwen2),
    "qwen2moe": Architecture(
        "qwen2_moe", "Qwen2MoeForCausalLM", {**_MOE, **_blocks(_SHARED_EXPERT)}, _qwen2_moe
    ),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _QWEN3, _qwen3),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", {**_MOE, **_blocks(_HEAD_NORMS)}, _qwen3_moe),
    "gemma": Architecture("gemma", "GemmaForCausalLM", _LLAMA, _gemma, shifted=_ALL_NORMS),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _GEMMA2, _gemma2, shifted=_ALL_NORMS),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", {**_GEMMA2, **_blocks(_HEAD_NORMS)}, _gemma3, shifted=_ALL_NORMS
    ),
    "phi3": Architecture(
        "phi3", "Phi3ForCausalLM",
        {**_ENDS, **_blocks({
            **_TWO_NORMS, "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        })},
        _phi3,
    ),
    "gpt-oss": Architecture(
        "gpt_oss", "GptOssForCausalLM",
        {**_ENDS, **_blocks({
            **_ATTENTION, "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "post_attention_layernorm", "attn_sinks": "=self_attn.sinks", "ffn_gate_inp": "mlp.router",
            "ffn_down_exps": "=mlp.experts.down_proj",
        })},
        _gpt_oss,
        interleaved={("ffn_gate_exps", "ffn_up_exps"): "=model.layers.{n}.mlp.experts.gate_up_proj"},
        transposed=("ffn_down_exps", "ffn_gate_exps"),
    ),
    "gpt2": Architecture(
        "gpt2", "GPT2LMHeadModel",
        {
            "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
            "output": "lm_head",
            **_blocks({
                "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
                "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
            }, "transformer.h"),
        },
        _gpt2,
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
    "phi2": Architecture(
        "phi", "PhiForCausalLM",
        {"token_embd": "model.embed_tokens", "output_norm": "model.final_layernorm", "output": "lm_head", **_blocks({
            "attn_norm": "input_layernorm", "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
            **{f"attn_{own}": f"self_attn.{own}_proj" for own in "qkv"},
        })},
        _layer_norm("layer_norm_eps"),
        pieces={"attn_qkv": tuple(f"model.layers.{{n}}.self_attn.{own}_proj" for own in "qkv")},
    ),
    "starcoder2": Architecture(
        "starcoder2", "Starcoder2ForCausalLM",
        {**_ENDS, **_blocks({**_TWO_NORMS, **_ATTENTION, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"})},
        _starcoder2,
    ),
    "stablelm": Architecture("stablelm", "StableLmForCausalLM", _LLAMA, _stablelm),
    "olmo2": Architecture(
        "olmo2", "Olmo2ForCausalLM",
        {**_ENDS, **_blocks({
            "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm", **_ATTENTION,
            **_HEAD_NORMS, **_MLP,
        })},
        _gated,
    ),
    "olmoe": Architecture("olmoe", "OlmoeForCausalLM", {**_MOE, **_blocks(_HEAD_NORMS)}, _olmoe),
    "granite": Architecture("granite", "GraniteForCausalLM", _LLAMA, _granite, turned=_ROTARY),
    "command-r": Architecture("cohere", "CohereForCausalLM", {**_LLAMA, **_blocks(_HEAD_NORMS)}, _cohere),
    "nemotron": Architecture(
        "nemotron", "NemotronForCausalLM", _LLAMA, _nemotron, shifted=("output_norm", "attn_norm", "ffn_norm")
    ),
}  # fmt: skip
