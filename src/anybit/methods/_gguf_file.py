"""A checkpoint as a GGUF file: transformers' names and settings in llama.cpp's words. The way back of `_gguf_bundle`.

The settings are read back before anything is written: a model that llama.cpp's words would make another one of is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NoReturn

from anybit._lazy import torch
from anybit.errors import AnybitError, ConfigError
from anybit.methods._gguf_architecture import Architecture, Settings
from anybit.methods._gguf_bundle import bundle_of
from anybit.methods._gguf_mixes import FILE_TYPES
from anybit.methods._gguf_models import ARCHITECTURES
from anybit.methods._gguf_places import EXPERTS, OTHERWISE, Places
from anybit.methods._gguf_rope import llama3_divisors
from anybit.methods._gguf_vocabulary import vocabulary
from anybit.quantizers.bundle import Bundled
from anybit.weight.block_types import BY_NAME


def architecture_of(settings: Settings) -> tuple[str, Architecture] | None:
    """GGUF's name for a model of these settings, and its words; None for one that is not written."""
    model_type = str(settings.get("model_type"))
    return next(
        (
            (name, one)
            for name, several in ARCHITECTURES.items()
            for one in several
            if model_type in (one.model_type, *one.others) and one.suits(settings)
        ),
        None,
    )


# names that some classes have of their own for the same settings
OTHER_NAMES = {
    "num_hidden_layers": ("n_layer", "n_layers"), "hidden_size": ("n_embd", "d_model"),
    "num_attention_heads": ("n_head", "n_heads"), "max_position_embeddings": ("n_positions", "max_seq_len"),
    "num_experts_per_tok": ("moe_k", "moe_topk"),
}  # fmt: skip


def standard(settings: Settings) -> dict[str, Any]:
    """With transformers' most common names beside a class's own."""
    found = {
        name: settings[other]
        for name, others in OTHER_NAMES.items()
        for other in others
        if other in settings and name not in settings
    }
    if "n_embd" in settings:
        found["n_inner"] = found["intermediate_size"] = settings.get("n_inner") or 4 * settings["n_embd"]
    return {**settings, **found}


def bundled(
    settings: Settings,
    specs: Mapping[str, tuple[str, tuple[int, ...]]],
    read: Callable[[str], bytes | None],
    name: str,
    mix: str,
    big_endian: bool = False,
) -> Bundled:
    """The file `name`-`mix`.gguf. `specs`: dtype and shape of the checkpoint's tensors; `settings`: of its whole config."""
    model_type = str(settings.get("model_type"))
    found = architecture_of(settings)
    if found is None:
        known = sorted(
            {kind for several in ARCHITECTURES.values() for one in several for kind in (one.model_type, *one.others)}
        )
        raise ConfigError(
            f"a {model_type!r} model cannot be written as a GGUF file; {', '.join(known)} can. {OTHERWISE}"
        )
    kind, architecture = found
    settings = standard(settings)
    reason = architecture.refusal(settings)
    if reason is not None:
        raise ConfigError(f"llama.cpp has no place for this {model_type!r} model: {reason}. {OTHERWISE}")
    placed = Places(settings, architecture, specs, mix)
    tensors, places = placed.tensors, placed.places
    rows = tensors["token_embd.weight"][1][0] if "token_embd.weight" in tensors else 0
    values: dict[str, Any] = {
        "general.architecture": kind,
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[mix],
        "general.quantization_version": 2,
    }
    values.update({f"{kind}.{key}": value for key, value in _values(settings, architecture, rows).items()})
    stack = next((shape for name, (_, shape) in tensors.items() if name.endswith(".ffn_down_exps.weight")), None)
    if stack is not None:
        values.setdefault(f"{kind}.expert_feed_forward_length", stack[-1])
    scaling, divisors = _rope(settings) if "num_attention_heads" in settings else ({}, {})
    values.update({f"{kind}.{key}": value for key, value in scaling.items()})
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    for key, value in architecture.extra(settings, shapes).items():
        values.pop(f"{kind}.{key}", None) if value is None else values.update({f"{kind}.{key}": value})
    constants = {key: torch.tensor(numbers, dtype=torch.float32) for key, numbers in divisors.items()}
    tensors.update({key: ("F32", tuple(tensor.shape)) for key, tensor in constants.items()})
    context = int(settings.get("max_position_embeddings") or 0)
    values.update(vocabulary(read, rows, context))
    made = Bundled(
        f"{name}-{mix}.gguf", values, dict(sorted(tensors.items(), key=_order)), places, constants, big_endian
    )
    _check(made, settings, architecture)
    return made


def _order(item: tuple[str, Any]) -> tuple[int, str]:
    match = re.match(r"blk\.(\d+)\.", item[0])
    return (int(match[1]) if match else -1), item[0]


# --- settings -----------------------------------------------------------------------------------------------------------------

# GGUF's key -> transformers' names of it, the first that is there; written when it is a number or a flag
KEYS: dict[str, tuple[str, ...]] = {
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "expert_count": EXPERTS,
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("norm_epsilon", "layer_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.clamp_kqv": ("clip_qkv",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention.sliding_window": ("sliding_window",),
    "embedding_scale": ("embedding_multiplier",),
    "attention.scale": ("attention_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling", "logit_scale"),
    "use_parallel_residual": ("use_parallel_residual",),
}
FLOATS = ("epsilon", "scale", "clamp_kqv", "softcapping", "freq_base", "factor")


def _number(key: str, value: Any) -> Any:
    return float(value) if key.endswith(FLOATS) else value


def _values(settings: Settings, architecture: Architecture, rows: int) -> dict[str, Any]:
    found: dict[str, Any] = dict(architecture.constants)
    for key, names in KEYS.items():
        value = next((settings[name] for name in names if settings.get(name) is not None), None)
        if isinstance(value, (int, float)):
            found[key] = _number(key, value)
    if settings.get("use_sliding_window") is False:
        found.pop("attention.sliding_window", None)
    if settings.get("num_attention_heads"):
        found["attention.key_length"] = found["attention.value_length"] = _head_dim(settings)
    found["vocab_size"] = rows
    types = settings.get("layer_types") or []
    if "attention.sliding_window" in found and "full_attention" in types and "sliding_attention" in types:
        period = types.index("full_attention") + 1
        windows = [kind == "sliding_attention" for kind in types]
        regular = windows == [(number + 1) % period != 0 for number in range(len(types))]
        found["attention.sliding_window_pattern"] = period if regular else windows
    return found


def _head_dim(settings: Settings) -> int:
    return int(settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"])


def _rope(settings: Settings) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Metadata, and tensors of divisors."""
    rope = dict(settings.get("rope_parameters") or {})
    values: dict[str, Any] = {}
    if "full_attention" in rope:
        local = rope.get("sliding_attention") or {}
        rope = dict(rope["full_attention"])
        values["rope.freq_base_swa"] = float(local.get("rope_theta", 10_000.0))
    theta = float(rope.get("rope_theta") or settings.get("rope_theta") or 10_000.0)
    width = int(
        _head_dim(settings) * float(rope.get("partial_rotary_factor") or settings.get("partial_rotary_factor") or 1.0)
    )
    values.update({"rope.freq_base": theta, "rope.dimension_count": width})
    kind, factor = rope.get("rope_type", "default"), float(rope.get("factor") or 1.0)
    original = rope.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")
    if kind in ("linear", "yarn"):
        values.update({"rope.scaling.type": kind, "rope.scaling.factor": factor})
        if kind == "yarn":
            values["rope.scaling.original_context_length"] = int(original or settings["max_position_embeddings"])
            for own in ("beta_fast", "beta_slow"):
                if rope.get(own) is not None:
                    values[f"rope.scaling.yarn_{own}"] = float(rope[own])
    elif kind == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return values, {"rope_freqs.weight": llama3_divisors(theta, width, factor, low, high, int(original or 0))}
    elif kind == "longrope":
        original = int(original or settings["max_position_embeddings"])
        values["rope.scaling.original_context_length"] = original
        scale = settings["max_position_embeddings"] / original
        attention = rope.get("attention_factor") or (
            math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        )
        values["rope.scaling.attn_factor"] = float(attention)
        return values, {
            f"rope_factors_{own}.weight": list(map(float, rope[f"{own}_factor"])) for own in ("long", "short")
        }
    elif kind == "default" and settings.get("original_max_position_embeddings"):
        values["rope.scaling.original_context_length"] = int(settings["original_max_position_embeddings"])
    elif kind != "default":
        raise ConfigError(f"rope_type {kind!r} has no form in a GGUF file. {OTHERWISE}")
    return values, {}


# --- what a reader makes of it ------------------------------------------------------------------------------------------------

# settings that change nothing about what the model computes from tokens, or that repeat others
FREE = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range",
    "pad_token_id",
    "bos_token_id", "eos_token_id", "pretraining_tp", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
    "max_window_layers", "use_sliding_window", "embedding_dropout", "residual_dropout", "attention_dropout", "hidden_dropout",
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "rope_theta", "rope_scaling", "use_bidirectional_attention",
    "cache_implementation", "quantization_config", "decoder_sparse_step", "intermediate_size", "hidden_act", "hidden_activation",
}  # fmt: skip
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "swish": "silu"}


def _check(made: Bundled, settings: Settings, architecture: Architecture) -> None:
    from transformers import AutoConfig

    def info(name: str) -> Any:
        kind, shape = made.tensors[name]
        block = BY_NAME[kind]
        encoding = kind if block.dtype == "uint8" else ""
        stored = (*shape[:-1], shape[-1] // block.elements * block.bytes) if encoding else shape
        return SimpleNamespace(name=name, dtype=block.dtype, shape=stored, encoding=encoding)

    file = SimpleNamespace(
        values=made.values,
        tensors={name: info(name) for name in made.tensors},
        read=made.constants.__getitem__,
        path=made.file,
    )
    try:
        read = dict(bundle_of(file).config)
        back = AutoConfig.for_model(read.pop("model_type"), **read).to_dict()
    except AnybitError as error:
        raise ConfigError(f"the model does not fit into a GGUF file: {error}. {OTHERWISE}") from error
    settings = {**settings, "head_dim": _head_dim(settings)} if "head_dim" in settings else settings
    # a type that is written in another's words is compared in what both have
    free = {*architecture.free, *(("model_type",) if settings["model_type"] in architecture.others else ())}
    for key, value in back.items():
        if key not in FREE and key not in free and key in settings and not _alike(settings[key], value):
            _differs(key, settings[key], value)
    for key in ("hidden_act", "hidden_activation"):
        ours, theirs = settings.get(key), back.get(key)
        if ours and theirs and ACTIVATIONS.get(ours, ours) != ACTIVATIONS.get(theirs, theirs):
            _differs(key, ours, theirs)


def _alike(one: Any, two: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        shared = {key for key in one if key in two}
        extra = {key for key, value in one.items() if key not in two and value is not None} - _UNUSED
        return not extra and all(_alike(one[key], two[key]) for key in shared)
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return len(one) == len(two) and all(_alike(*pair) for pair in zip(one, two, strict=True))
    if isinstance(one, (int, float)) and isinstance(two, (int, float)) and not isinstance(one, bool):
        return math.isclose(one, two, rel_tol=1e-6)
    return bool(one == two)


# of rope_parameters: they say again what others say, or what is so anyway
_UNUSED = {
    "type",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "truncate",
    "beta_fast",
    "beta_slow",
    "factor",
}


def _differs(key: str, ours: Any, theirs: Any) -> NoReturn:
    raise ConfigError(
        f"{key} is {ours!r} in this model, and a GGUF file of its architecture would be read as {theirs!r}: llama.cpp has no "
        f"place for it. {OTHERWISE}"
    )
