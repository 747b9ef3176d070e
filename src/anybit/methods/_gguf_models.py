"""Architectures of GGUF files: names of their tensors and settings, in transformers' words. A table; `describe` reads it.

llama.cpp names tensors after their part in the model (`blk.3.attn_q`), keeps rows of rotary projections in pairs for some
architectures, and stores some norms plus one. Settings are read by `_gguf_settings`.
"""

from __future__ import annotations

from anybit.errors import did_you_mean
from anybit.methods import _gguf_gemma3n as gemma3n
from anybit.methods import _gguf_settings as read
from anybit.methods._gguf_architecture import (
    ALL_NORMS,
    ATTENTION,
    ENDS,
    FOUR_NORMS,
    HEAD_NORMS,
    LLAMA,
    MLP,
    MOE,
    ROTARY,
    SHARED_EXPERT,
    TWO_NORMS,
    Architecture,
    Joined,
    Settings,
    blocks,
    every_other,
)  # fmt: skip
from anybit.methods._gguf_metadata import Metadata
from anybit.methods._gguf_models_experts import MIXTURES
from anybit.methods._gguf_models_older import OLDER
from anybit.methods._gguf_models_states import STATES


def describe(metadata: Metadata) -> Architecture:
    """The architecture of a file. ConfigError for one that is not in the table."""
    name = metadata.architecture
    found = next((one for one in ARCHITECTURES.get(name, ()) if one.when(metadata)), None)
    if found is None:
        metadata.refuse(
            f"the architecture {name!r} is not known{did_you_mean(name, ARCHITECTURES)}; known are "
            f"{', '.join(sorted(ARCHITECTURES))}. Convert the original checkpoint instead"
        )
    return found


def _window(settings: Settings) -> str | None:
    """Mistral's first model."""
    window = settings.get("sliding_window")
    if window is None or window >= settings["max_position_embeddings"]:
        return None
    return (
        f"its Llama sees the whole text, and sliding_window is {window}; for texts no longer than that, set it to null"
    )


_QWEN3 = {**LLAMA, **blocks(HEAD_NORMS)}
_GEMMA2 = {**ENDS, **blocks({**FOUR_NORMS, **ATTENTION, **MLP})}

_DENSE: dict[str, Architecture] = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", LLAMA, read.llama, turned=ROTARY, others=("mistral",), refusal=_window,
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", LLAMA, read.qwen2),
    "qwen2moe": Architecture(
        "qwen2_moe", "Qwen2MoeForCausalLM", {**MOE, **blocks({**SHARED_EXPERT, "ffn_gate_inp_shexp": "mlp.shared_expert_gate"})},
        read.qwen2_moe,
    ),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _QWEN3, read.qwen3),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", {**MOE, **blocks(HEAD_NORMS)}, read.qwen3_moe),
    "gemma": Architecture("gemma", "GemmaForCausalLM", LLAMA, read.gemma, shifted=ALL_NORMS),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _GEMMA2, read.gemma2, shifted=ALL_NORMS),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", {**_GEMMA2, **blocks(HEAD_NORMS)}, read.gemma3, shifted=ALL_NORMS
    ),
    "phi3": Architecture(
        "phi3", "Phi3ForCausalLM",
        {**ENDS, **blocks({
            **TWO_NORMS, "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        })},
        read.phi3,
    ),
    "gpt-oss": Architecture(
        "gpt_oss", "GptOssForCausalLM",
        {**ENDS, **blocks({
            **ATTENTION, "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "post_attention_layernorm", "attn_sinks": "=self_attn.sinks", "ffn_gate_inp": "mlp.router",
            "ffn_down_exps": "=mlp.experts.down_proj",
        })},
        read.gpt_oss,
        joined={("ffn_gate_exps", "ffn_up_exps"): Joined("=model.layers.{n}.mlp.experts.gate_up_proj", every_other)},
        transposed=("ffn_down_exps", "ffn_gate_exps"),
    ),
    "gpt2": Architecture(
        "gpt2", "GPT2LMHeadModel",
        {
            "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
            "output": "lm_head",
            **blocks({
                "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
                "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
            }, "transformer.h"),
        },
        read.gpt2,
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
    "phi2": Architecture(
        "phi", "PhiForCausalLM",
        {"token_embd": "model.embed_tokens", "output_norm": "model.final_layernorm", "output": "lm_head", **blocks({
            "attn_norm": "input_layernorm", "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
            **{f"attn_{own}": f"self_attn.{own}_proj" for own in "qkv"},
        })},
        read.layer_norm("layer_norm_eps"),
        pieces={"attn_qkv": tuple(f"model.layers.{{n}}.self_attn.{own}_proj" for own in "qkv")},
    ),
    "starcoder2": Architecture(
        "starcoder2", "Starcoder2ForCausalLM",
        {**ENDS, **blocks({**TWO_NORMS, **ATTENTION, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"})},
        read.starcoder2,
    ),
    "stablelm": Architecture("stablelm", "StableLmForCausalLM", LLAMA, read.stablelm),
    "olmo2": Architecture(
        "olmo2", "Olmo2ForCausalLM",
        {**ENDS, **blocks({
            "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm", **ATTENTION,
            **HEAD_NORMS, **MLP,
        })},
        read.gated,
    ),
    "olmoe": Architecture(
        "olmoe", "OlmoeForCausalLM", {**MOE, **blocks(HEAD_NORMS)}, read.olmoe,
        refusal=lambda settings: None if settings["num_key_value_heads"] == settings["num_attention_heads"]
        else "its OLMoE has as many heads of keys as of queries",
    ),
    # the language models of those that see: for text their three kinds of positions are one
    "qwen2vl": Architecture("qwen2", "Qwen2ForCausalLM", LLAMA, read.qwen2, suits=lambda settings: False),
    "qwen3vl": Architecture("qwen3", "Qwen3ForCausalLM", _QWEN3, read.qwen3, suits=lambda settings: False),
    "granite": Architecture("granite", "GraniteForCausalLM", LLAMA, read.granite, turned=ROTARY),
    "command-r": Architecture("cohere", "CohereForCausalLM", {**LLAMA, **blocks(HEAD_NORMS)}, read.cohere),
    "nemotron": Architecture(
        "nemotron", "NemotronForCausalLM", LLAMA, read.nemotron, shifted=("output_norm", "attn_norm", "ffn_norm")
    ),
    "arcee": Architecture("arcee", "ArceeForCausalLM", LLAMA, read.arcee, turned=ROTARY),
    "seed_oss": Architecture(
        "seed_oss", "SeedOssForCausalLM",
        {**ENDS, **blocks({
            "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm", **ATTENTION, **MLP,
        })},
        read.with_biases,
    ),
    "ernie4_5": Architecture("ernie4_5", "Ernie4_5ForCausalLM", LLAMA, read.ernie),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", LLAMA, read.smollm3, turned=ROTARY),
    "olmo": Architecture(
        "olmo", "OlmoForCausalLM", {**ENDS, **blocks({**ATTENTION, **MLP})}, read.olmo, turned=ROTARY,
        constants={"attention.layer_norm_epsilon": 1e-5},
    ),
    "cohere2": Architecture("cohere2", "Cohere2ForCausalLM", LLAMA, read.cohere2),
    "glm4": Architecture(
        "glm4", "Glm4ForCausalLM",
        {**ENDS, **blocks({
            "attn_norm": "input_layernorm", "post_attention_norm": "post_self_attn_layernorm",
            "ffn_norm": "post_attention_layernorm", "post_ffw_norm": "post_mlp_layernorm", **ATTENTION,
            "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj",
        })},
        read.glm4,
    ),
    "chatglm": Architecture(
        "glm", "GlmForCausalLM",
        {**ENDS, **blocks({**TWO_NORMS, **ATTENTION, "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"})}, read.glm4,
    ),
    "jais2": Architecture(
        "jais2", "Jais2ForCausalLM", {**ENDS, **blocks({
            **TWO_NORMS, **ATTENTION, "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        })}, read.jais2,
    ),
    "exaone4": Architecture(
        "exaone4", "Exaone4ForCausalLM",
        {**ENDS, **blocks({
            "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm", **ATTENTION,
            **HEAD_NORMS, **MLP,
        })},
        read.exaone4,
    ),
    "hunyuan-dense": Architecture(
        "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM",
        {**LLAMA, **blocks({"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"})},
        read.with_biases,
    ),
}  # fmt: skip

_OLMO3 = Architecture(
    "olmo3", "Olmo3ForCausalLM", _DENSE["olmo2"].names, read.olmo3,
    when=lambda m: m.whole("attention.sliding_window", 0, least=0) > 0,
    refusal=lambda settings: "its OLMo 3 has a head of its own" if settings.get("tie_word_embeddings") else None,
)  # fmt: skip

_GEMMA3N = Architecture(
    "gemma3n_text", "Gemma3nForCausalLM",
    {
        **_GEMMA2, **blocks({
            **HEAD_NORMS, "altup_correct_coef": "altup.correction_coefs", "altup_correct_scale": "=altup.correct_output_scale",
            "altup_predict_coef": "altup.prediction_coefs", "altup_router": "altup.modality_router",
            "altup_router_norm": "altup.router_norm", "laurel_l": "laurel.linear_left", "laurel_r": "laurel.linear_right",
            "laurel_post_norm": "laurel.post_laurel_norm", "inp_gate": "per_layer_input_gate", "proj": "per_layer_projection",
            "post_norm": "post_per_layer_input_norm",
        }),
        "per_layer_token_embd": "model.embed_tokens_per_layer", "per_layer_model_proj": "model.per_layer_model_projection",
        "per_layer_proj_norm": "model.per_layer_projection_norm", "altup_proj": "model.altup_projections.{e}",
        "altup_unembd_proj": "model.altup_unembed_projections.{e}",
    },
    gemma3n.read_settings, extra=gemma3n.extra, refusal=gemma3n.refusal, padded=("per_layer_token_embd",),
    free=("vocab_size_per_layer_input",),
)  # fmt: skip

# those of one name: the first that a file is (`Architecture.when`)
ARCHITECTURES: dict[str, tuple[Architecture, ...]] = {name: (one,) for name, one in _DENSE.items()}
for table in (MIXTURES, OLDER, STATES, {"olmo2": (_OLMO3,), "gemma3n": (_GEMMA3N,)}):
    for name, several in table.items():
        ARCHITECTURES[name] = (*several, *ARCHITECTURES.get(name, ()))
