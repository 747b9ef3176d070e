"""Architectures of GGUF files: names of their tensors and settings, in transformers' words. A table; `describe` reads it.

llama.cpp names tensors after their part in the model (`blk.3.attn_q`), keeps rows of rotary projections in pairs for some
architectures, and stores some norms plus one. Settings are read by `_gguf_settings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from anybit.errors import did_you_mean
from anybit.methods import _gguf_settings as read
from anybit.methods._gguf_metadata import Metadata


@dataclass(frozen=True)
class Architecture:
    """`names`: GGUF module -> module of the checkpoint; {n} is the block, {e} the expert of a stack that is stored whole.

    A target that starts with "=" is a parameter itself, whose bias is called `_bias`. `interleaved`: two stacks whose rows
    alternate in the target. `pieces`: one matrix whose rows are several targets. `turned`: rows in rotary pairs. `shifted`:
    norms stored plus one. `transposed`: dense weights that transformers stores [in, out]. `constants`: metadata that
    transformers builds in and llama.cpp wants to read.
    """

    model_type: str
    model_class: str
    names: Mapping[str, str]
    settings: read.Settings
    interleaved: Mapping[tuple[str, str], str] = field(default_factory=dict)
    pieces: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    turned: tuple[str, ...] = ()
    shifted: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    constants: Mapping[str, float] = field(default_factory=dict)


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
    read.mixtral, turned=_ROTARY,
)  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", _LLAMA, read.llama, turned=_ROTARY),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _LLAMA, read.qwen2),
    "qwen2moe": Architecture(
        "qwen2_moe", "Qwen2MoeForCausalLM", {**_MOE, **_blocks(_SHARED_EXPERT)}, read.qwen2_moe
    ),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _QWEN3, read.qwen3),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", {**_MOE, **_blocks(_HEAD_NORMS)}, read.qwen3_moe),
    "gemma": Architecture("gemma", "GemmaForCausalLM", _LLAMA, read.gemma, shifted=_ALL_NORMS),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _GEMMA2, read.gemma2, shifted=_ALL_NORMS),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", {**_GEMMA2, **_blocks(_HEAD_NORMS)}, read.gemma3, shifted=_ALL_NORMS
    ),
    "phi3": Architecture(
        "phi3", "Phi3ForCausalLM",
        {**_ENDS, **_blocks({
            **_TWO_NORMS, "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        })},
        read.phi3,
    ),
    "gpt-oss": Architecture(
        "gpt_oss", "GptOssForCausalLM",
        {**_ENDS, **_blocks({
            **_ATTENTION, "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "post_attention_layernorm", "attn_sinks": "=self_attn.sinks", "ffn_gate_inp": "mlp.router",
            "ffn_down_exps": "=mlp.experts.down_proj",
        })},
        read.gpt_oss,
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
        read.gpt2,
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
    "phi2": Architecture(
        "phi", "PhiForCausalLM",
        {"token_embd": "model.embed_tokens", "output_norm": "model.final_layernorm", "output": "lm_head", **_blocks({
            "attn_norm": "input_layernorm", "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
            **{f"attn_{own}": f"self_attn.{own}_proj" for own in "qkv"},
        })},
        read.layer_norm("layer_norm_eps"),
        pieces={"attn_qkv": tuple(f"model.layers.{{n}}.self_attn.{own}_proj" for own in "qkv")},
    ),
    "starcoder2": Architecture(
        "starcoder2", "Starcoder2ForCausalLM",
        {**_ENDS, **_blocks({**_TWO_NORMS, **_ATTENTION, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"})},
        read.starcoder2,
    ),
    "stablelm": Architecture("stablelm", "StableLmForCausalLM", _LLAMA, read.stablelm),
    "olmo2": Architecture(
        "olmo2", "Olmo2ForCausalLM",
        {**_ENDS, **_blocks({
            "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm", **_ATTENTION,
            **_HEAD_NORMS, **_MLP,
        })},
        read.gated,
    ),
    "olmoe": Architecture("olmoe", "OlmoeForCausalLM", {**_MOE, **_blocks(_HEAD_NORMS)}, read.olmoe),
    "granite": Architecture("granite", "GraniteForCausalLM", _LLAMA, read.granite, turned=_ROTARY),
    "command-r": Architecture("cohere", "CohereForCausalLM", {**_LLAMA, **_blocks(_HEAD_NORMS)}, read.cohere),
    "nemotron": Architecture(
        "nemotron", "NemotronForCausalLM", _LLAMA, read.nemotron, shifted=("output_norm", "attn_norm", "ffn_norm")
    ),
    "arcee": Architecture("arcee", "ArceeForCausalLM", _LLAMA, read.arcee, turned=_ROTARY),
    "seed_oss": Architecture(
        "seed_oss", "SeedOssForCausalLM",
        {**_ENDS, **_blocks({
            "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm", **_ATTENTION, **_MLP,
        })},
        read.with_biases,
    ),
    "ernie4_5": Architecture("ernie4_5", "Ernie4_5ForCausalLM", _LLAMA, read.ernie),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", _LLAMA, read.smollm3, turned=_ROTARY),
    "olmo": Architecture(
        "olmo", "OlmoForCausalLM", {**_ENDS, **_blocks({**_ATTENTION, **_MLP})}, read.olmo, turned=_ROTARY,
        constants={"attention.layer_norm_epsilon": 1e-5},
    ),
    "cohere2": Architecture("cohere2", "Cohere2ForCausalLM", _LLAMA, read.cohere2),
    "glm4": Architecture(
        "glm4", "Glm4ForCausalLM",
        {**_ENDS, **_blocks({
            "attn_norm": "input_layernorm", "post_attention_norm": "post_self_attn_layernorm",
            "ffn_norm": "post_attention_layernorm", "post_ffw_norm": "post_mlp_layernorm", **_ATTENTION,
            "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj",
        })},
        read.glm4,
    ),
    "exaone4": Architecture(
        "exaone4", "Exaone4ForCausalLM",
        {**_ENDS, **_blocks({
            "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm", **_ATTENTION,
            **_HEAD_NORMS, **_MLP,
        })},
        read.exaone4,
    ),
    "hunyuan-dense": Architecture(
        "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM",
        {**_LLAMA, **_blocks({"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"})},
        read.with_biases,
    ),
}  # fmt: skip
