"""GGUF architectures of the first large decoders: Falcon, BLOOM, MPT, GPT-NeoX, StarCoder. A table, and their settings.

Their checkpoints hold queries, keys and values in one matrix, mostly head by head; a file has all queries, all keys, all values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.methods import _gguf_settings as read
from anybit.methods._gguf_architecture import Architecture, Settings, Shape, blocks
from anybit.methods._gguf_metadata import Metadata

if TYPE_CHECKING:
    from torch import Tensor

_ENDS = {"output": "lm_head", "output_norm": "transformer.ln_f"}
_FUSED = {
    "attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense", "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}  # fmt: skip


def by_head(settings: Settings) -> Tensor:
    """[heads, q k v, width] -> [q k v, heads, width]."""
    hidden, heads = settings["hidden_size"], settings.get("num_attention_heads") or settings["n_head"]
    return torch.arange(3 * hidden).view(heads, 3, hidden // heads).transpose(0, 1).flatten()


# --- Falcon ------------------------------------------------------------------------------------------------------------------


def _falcon_groups(settings: Settings) -> int:
    """Heads of keys."""
    if settings.get("new_decoder_architecture"):
        return int(settings["num_kv_heads"])
    return 1 if settings.get("multi_query") else int(settings["num_attention_heads"])


def by_group(settings: Settings) -> Tensor:
    """For each head of keys: its queries, key, value -> all queries, all keys, all values."""
    hidden, heads, groups = settings["hidden_size"], settings["num_attention_heads"], _falcon_groups(settings)
    width, own = hidden // heads, heads // groups
    places = torch.arange(groups * (own + 2) * width).view(groups, own + 2, width)
    return torch.cat([places[:, :own].flatten(), places[:, own].flatten(), places[:, own + 1].flatten()])


def falcon(m: Metadata) -> dict[str, Any]:
    found = read.layer_norm("layer_norm_epsilon")(m)
    heads, groups = found["num_attention_heads"], found.pop("num_key_value_heads")
    width = found.pop("intermediate_size")
    two = m.first("attn_norm_2.weight") is not None
    return {
        **found,
        "num_kv_heads": groups,
        # one norm for both halves of a block: the first kind of model, or the second with num_ln_in_parallel_attn=1
        "new_decoder_architecture": two or 1 < groups < heads,
        "num_ln_in_parallel_attn": 2 if two else 1,
        "multi_query": groups == 1,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "ffn_hidden_size": width,
    }


def _falcon_refusal(settings: Settings) -> str | None:
    if settings.get("alibi") or not settings.get("parallel_attn") or settings.get("bias"):
        return "its Falcon has rotary embeddings, attention and MLP side by side, and no biases"
    return None


def _falcon_extra(settings: Settings, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    return {
        "attention.head_count_kv": _falcon_groups(settings),
        "feed_forward_length": int(settings.get("ffn_hidden_size") or 4 * settings["hidden_size"]),
        "tensor_data_layout": "jploski",
    }


def _falcon(names: Mapping[str, str], two_norms: bool) -> Architecture:
    return Architecture(
        "falcon", "FalconForCausalLM",
        {"token_embd": "transformer.word_embeddings", **_ENDS, **blocks({**names, **_FUSED}, "transformer.h")},
        falcon, rows={"attn_qkv": by_group}, refusal=_falcon_refusal, extra=_falcon_extra,
        # num_kv_heads says nothing in the first kind, num_ln_in_parallel_attn nothing but a default
        free=("num_kv_heads", "num_ln_in_parallel_attn", "multi_query"),
        suits=lambda settings: two_norms == bool(
            settings.get("new_decoder_architecture") and settings.get("num_ln_in_parallel_attn") != 1
        ),
        when=lambda m: two_norms == (m.first("attn_norm_2.weight") is not None),
    )  # fmt: skip


# --- BLOOM, MPT, GPT-NeoX, StarCoder -----------------------------------------------------------------------------------------


def bloom(m: Metadata) -> dict[str, Any]:
    common = read.decoder(m)
    if m.width("feed_forward_length", "ffn_up.weight") != 4 * common["hidden_size"]:
        m.refuse("the MLP of a BLOOM is four times as wide as the model, and this one is not")
    return {
        "vocab_size": common["vocab_size"],
        "hidden_size": common["hidden_size"],
        "n_layer": m.blocks,
        "n_head": common["num_attention_heads"],
        "seq_length": common["max_position_embeddings"],
        "layer_norm_epsilon": m.number("attention.layer_norm_epsilon", 1e-5),
        **{name: common[name] for name in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")},
    }


def _bloom_refusal(settings: Settings) -> str | None:
    return "its residual starts before the norm" if settings.get("apply_residual_connection_post_layernorm") else None


def mpt(m: Metadata) -> dict[str, Any]:
    common = read.decoder(m)
    hidden, heads = common["hidden_size"], common["num_attention_heads"]
    width = m.width("feed_forward_length", "ffn_up.weight")
    if common["num_key_value_heads"] != heads or width % hidden or m.number("attention.max_alibi_bias", 0.0) == 0:
        m.refuse(
            "transformers' MPT has as many heads of keys as of queries, ALiBi, and an MLP of a multiple of its width"
        )
    clip = m.number("attention.clamp_kqv") if m.has("attention.clamp_kqv") else None
    return {
        "vocab_size": common["vocab_size"],
        "d_model": hidden,
        "n_layers": m.blocks,
        "n_heads": heads,
        "max_seq_len": common["max_position_embeddings"],
        "expansion_ratio": width // hidden,
        "layer_norm_epsilon": m.number("attention.layer_norm_epsilon", 1e-5),
        "attn_config": {"alibi": True, "alibi_bias_max": int(m.number("attention.max_alibi_bias")), "clip_qkv": clip},
        **{name: common[name] for name in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")},
    }


def _mpt_extra(settings: Settings, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    attention = settings["attn_config"]
    clip = attention.get("clip_qkv")
    return {
        "feed_forward_length": settings["expansion_ratio"] * settings["d_model"],
        "attention.max_alibi_bias": float(attention["alibi_bias_max"]) if attention["alibi"] else 0.0,
        "attention.clamp_kqv": float(clip) if clip else None,
        "rope.freq_base": None, "rope.dimension_count": None,
    }  # fmt: skip


def _mpt_refusal(settings: Settings) -> str | None:
    attention = settings["attn_config"]
    if not attention["alibi"] or attention.get("qk_ln") or attention.get("softmax_scale"):
        return "its MPT has ALiBi, no norms of queries, and scores divided by the root of a head's width"
    return None


def gptneox(m: Metadata) -> dict[str, Any]:
    found = read.layer_norm("layer_norm_eps")(m)
    if found.pop("num_key_value_heads") != found["num_attention_heads"]:
        m.refuse("transformers' GPT-NeoX has as many heads of keys as of queries")
    return {**found, "use_parallel_residual": m.flag("use_parallel_residual", True)}


def starcoder(m: Metadata) -> dict[str, Any]:
    found = read.gpt2(m)
    if m.uniform("attention.head_count_kv", found["n_head"]) != 1:
        m.refuse("a StarCoder of several heads of keys has another order of rows, which is not known")
    return {**found, "multi_query": True}


def _starcoder_refusal(settings: Settings) -> str | None:
    return None if settings.get("multi_query") else "its StarCoder has one head of keys (multi_query)"


OLDER: dict[str, tuple[Architecture, ...]] = {
    "falcon": (
        _falcon({"attn_norm_2": "ln_attn", "attn_norm": "ln_mlp"}, True),
        _falcon({"attn_norm": "input_layernorm"}, False),
    ),
    "bloom": (Architecture(
        "bloom", "BloomForCausalLM",
        {
            "token_embd": "transformer.word_embeddings", "token_embd_norm": "transformer.word_embeddings_layernorm", **_ENDS,
            **blocks({"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", **_FUSED}, "transformer.h"),
        },
        bloom, rows={"attn_qkv": by_head}, refusal=_bloom_refusal,
        extra=lambda settings, shapes: {
            "context_length": int(settings.get("seq_length") or settings["hidden_size"]),
            "feed_forward_length": 4 * settings["hidden_size"], "rope.freq_base": None, "rope.dimension_count": None,
        },
    ),),
    "mpt": (Architecture(
        "mpt", "MptForCausalLM",
        {
            "token_embd": "transformer.wte", "output_norm": "transformer.norm_f", "output": "lm_head",
            **blocks({
                "attn_norm": "norm_1", "ffn_norm": "norm_2", "attn_qkv": "attn.Wqkv", "attn_output": "attn.out_proj",
                "ffn_up": "ffn.up_proj", "ffn_down": "ffn.down_proj",
            }, "transformer.blocks"),
        },
        mpt, refusal=_mpt_refusal, extra=_mpt_extra, free=("attn_config",),  # the two of them look into it
    ),),
    "gptneox": (Architecture(
        "gpt_neox", "GPTNeoXForCausalLM",
        {
            "token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out",
            **blocks({
                "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
                "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense", "ffn_up": "mlp.dense_h_to_4h",
                "ffn_down": "mlp.dense_4h_to_h",
            }, "gpt_neox.layers"),
        },
        gptneox, rows={"attn_qkv": by_head},
        refusal=lambda settings: None if settings.get("attention_bias", True) else "its GPT-NeoX has biases everywhere",
    ),),
    "starcoder": (Architecture(
        "gpt_bigcode", "GPTBigCodeForCausalLM",
        {
            "token_embd": "transformer.wte", "position_embd": "transformer.wpe", **_ENDS,
            **blocks({
                "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
                "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
            }, "transformer.h"),
        },
        starcoder, refusal=_starcoder_refusal,
        extra=lambda settings, shapes: {"attention.head_count_kv": 1, "rope.freq_base": None, "rope.dimension_count": None},
    ),),
}  # fmt: skip
