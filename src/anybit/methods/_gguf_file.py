"""A checkpoint as a GGUF file: transformers' names and settings in llama.cpp's words. The way back of `_gguf_bundle`.

The settings are read back before anything is written: a model that llama.cpp's words would make another one of is refused.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

from anybit._lazy import torch
from anybit.errors import AnybitError, ConfigError
from anybit.methods._gguf_bundle import bundle_of
from anybit.methods._gguf_mixes import FILE_TYPES, NEVER
from anybit.methods._gguf_models import ARCHITECTURES, MIXTRAL, Architecture
from anybit.methods._gguf_rope import llama3_divisors
from anybit.methods._gguf_vocabulary import vocabulary
from anybit.quantizers.bundle import Bundled, Placed
from anybit.weight.block_types import BY_NAME

if TYPE_CHECKING:
    from torch import Tensor

Settings = Mapping[str, Any]
DENSE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F32"}
# names of the number of experts in configurations
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
OTHERWISE = (
    "Keep the blocks in safetensors instead: load the model with this configuration and save it with save_pretrained"
)


def architecture_of(model_type: str) -> tuple[str, Architecture] | None:
    """GGUF's name of a model type, and its words; None for one that is not written."""
    if model_type == "mixtral":
        return "llama", MIXTRAL
    return next(((name, found) for name, found in ARCHITECTURES.items() if found.model_type == model_type), None)


class Names:
    """Checkpoint module -> GGUF module, and the expert's number in a stack."""

    def __init__(self, architecture: Architecture):
        self._plain: dict[str, str] = {}
        self._piece: dict[str, tuple[int, int]] = {}
        for own, target in architecture.names.items():
            if "{e}" not in own:
                self._plain.setdefault(target.replace("=", ""), own)
        self._twins = dict(architecture.interleaved)
        for (first, _), target in architecture.interleaved.items():
            self._plain[target.replace("=", "")] = f"blk.{{n}}.{first}"
        for own, targets in architecture.pieces.items():
            for place, target in enumerate(targets):
                self._plain[target] = f"blk.{{n}}.{own}"
                self._piece[target] = place, len(targets)

    def find(self, module: str) -> tuple[str, int | None] | None:
        """`model.layers.3.mlp.experts.5.up_proj` -> ("blk.3.ffn_up_exps", 5)."""
        form, numbers = _form(module)
        own = self._plain.get(form)
        if own is None:
            return None
        expert = int(numbers[1]) if len(numbers) > 1 else None
        return (own.format(n=numbers[0]) if numbers else own), expert

    def everywhere(self, module: str) -> list[str]:
        """All GGUF modules that hold rows of this one."""
        where = self.find(module)
        if where is None:
            return []
        head, _, own = where[0].rpartition(".")
        twins = [f"{head}.{second}" for first, second in self._twins if first == own]
        return [where[0], *twins]

    def piece(self, module: str) -> tuple[int, int] | None:
        """Of a module that is a part of a GGUF matrix: which, of how many."""
        return self._piece.get(_form(module)[0])


def _form(module: str) -> tuple[str, list[str]]:
    """With {n} and {e} for the numbers."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", module)
    for form in ("{n}", "{e}"):
        module = re.sub(r"(?<=\.)\d+(?=\.|$)", form, module, count=1)
    return module, numbers


# names that some classes have of their own for the same settings
OTHER_NAMES = {
    "num_hidden_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}  # fmt: skip


def standard(settings: Settings) -> dict[str, Any]:
    """With transformers' most common names beside a class's own."""
    found = {name: settings[other] for name, other in OTHER_NAMES.items() if other in settings and name not in settings}
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
    found = architecture_of(model_type)
    if found is None:
        known = sorted(one.model_type for one in (*ARCHITECTURES.values(), MIXTRAL) if architecture_of(one.model_type))
        raise ConfigError(
            f"a {model_type!r} model cannot be written as a GGUF file; {', '.join(known)} can. {OTHERWISE}"
        )
    kind, architecture = found
    settings = standard(settings)
    tensors, places = _tensors(settings, architecture, specs, mix)
    rows = tensors["token_embd.weight"][1][0] if "token_embd.weight" in tensors else 0
    values: dict[str, Any] = {
        "general.architecture": kind,
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[mix],
        "general.quantization_version": 2,
    }
    values.update({f"{kind}.{key}": value for key, value in _values(settings, architecture, rows).items()})
    stack = tensors.get("blk.0.ffn_down_exps.weight")
    if stack is not None:
        values.setdefault(f"{kind}.expert_feed_forward_length", stack[1][-1])
    scaling, divisors = _rope(settings)
    values.update({f"{kind}.{key}": value for key, value in scaling.items()})
    constants = {key: torch.tensor(numbers, dtype=torch.float32) for key, numbers in divisors.items()}
    tensors.update({key: ("F32", tuple(tensor.shape)) for key, tensor in constants.items()})
    context = int(settings.get("max_position_embeddings") or 0)
    values.update(vocabulary(read, rows, context))
    made = Bundled(
        f"{name}-{mix}.gguf", values, dict(sorted(tensors.items(), key=_order)), places, constants, big_endian
    )
    _check(made, settings)
    return made


def _order(item: tuple[str, Any]) -> tuple[int, str]:
    match = re.match(r"blk\.(\d+)\.", item[0])
    return (int(match[1]) if match else -1), item[0]


# --- tensors ------------------------------------------------------------------------------------------------------------------


def _tensors(
    settings: Settings, architecture: Architecture, specs: Mapping[str, tuple[str, tuple[int, ...]]], mix: str
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, tuple[Placed, ...]]]:
    names = Names(architecture)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    places: dict[str, tuple[Placed, ...]] = {}
    experts: dict[str, set[int]] = {}
    for source, (dtype, shape) in specs.items():
        module, own, block = _parted(source, dtype, names)
        where = names.find(module)
        if settings.get("tie_word_embeddings") and where == ("output", None):
            places[source] = ()  # llama.cpp takes the embedding
            continue
        if where is None or not (block or own in ("weight", "bias")):
            raise ConfigError(
                f"tensor {source!r} has no name in a GGUF file of {architecture.model_type!r}. Vision towers, adapters and other "
                f"parts beside the language model are not written. {OTHERWISE}"
            )
        place, expert = where
        head, _, kind_of = place.rpartition(".")
        turned = kind_of in architecture.transposed and own == "weight" and not block and len(shape) > 1
        if turned:
            shape = (*shape[:-2], shape[-1], shape[-2])
        twin = next((two for one, two in architecture.interleaved if one == kind_of), None)
        if twin is not None:  # rows by turns
            shape = (shape[0], shape[1] // 2, *shape[2:])
        made: list[Placed] = []
        for number, name in enumerate([kind_of] if twin is None else [kind_of, twin]):
            target = f"{head}.{name}.{own}" if head else f"{name}.{own}"
            if block:
                kind, logical = block, (*shape[:-1], shape[-1] // BY_NAME[block].bytes * BY_NAME[block].elements)
            else:
                kind, logical = _dense_type(target, dtype, shape, mix), shape
            piece = names.piece(module)
            make = _make(settings, architecture, kind_of, own, None if block else BY_NAME[kind].dtype)
            if turned or twin is not None:
                make = functools.partial(_cut, turned, number if twin is not None else None, make)
            if piece is not None:
                made.append(Placed(target, piece[0], make, piece[1]))
                logical = (logical[0] * piece[1], *logical[1:])
            else:
                made.append(Placed(target, expert, make))
            if expert is None:
                if tensors.setdefault(target, (kind, logical)) != (kind, logical):
                    raise ConfigError(
                        f"the parts of {target!r} would be {tensors[target]} and {(kind, logical)}; a GGUF file holds them "
                        "in one tensor, so they must be alike"
                    )
                continue
            count = next((int(settings[key]) for key in EXPERTS if settings.get(key)), 0)
            experts.setdefault(target, set()).add(expert)
            whole = kind, (count, *logical)
            if tensors.setdefault(target, whole) != whole:
                raise ConfigError(
                    f"the experts of {target!r} would be {tensors[target]} and {whole}; a GGUF file has one type for all of them"
                )
        places[source] = tuple(made)
    for target, numbers in experts.items():
        if numbers != set(range(tensors[target][1][0])):
            raise ConfigError(
                f"{target!r} holds {tensors[target][1][0]} experts, but {len(numbers)} are in the checkpoint"
            )
    return tensors, places


def _parted(source: str, dtype: str, names: Names) -> tuple[str, str, str]:
    """Module, "weight" or "bias", and the block type of a stored tensor, "" for a dense one."""
    if names.find(source) is not None:  # a parameter of its own
        return source, "weight", ""
    if source.endswith("_bias") and names.find(source.removesuffix("_bias")) is not None:
        return source.removesuffix("_bias"), "bias", ""
    module, _, own = source.rpartition(".")
    if own.upper() in BY_NAME and dtype == "uint8":
        return module, "weight", own.upper()
    return module, own, ""


def _dense_type(target: str, dtype: str, shape: tuple[int, ...], mix: str) -> str:
    """llama.cpp computes with vectors, norms and routers in float32; a matrix keeps its dtype, or gets the mix's."""
    if len(shape) < 2 or NEVER.search(target) or not target.endswith(".weight"):
        return "F32"
    return mix if mix in DENSE.values() else DENSE.get(dtype, "F32")


def _make(
    settings: Settings, architecture: Architecture, module: str, own: str, dtype: str | None
) -> Callable[[Tensor], Tensor]:
    """`dtype`: of a dense tensor in the file; None for blocks."""
    heads = 0
    if module in architecture.turned:
        heads = int(settings["num_attention_heads"])
        if module == "attn_k":
            heads = int(settings.get("num_key_value_heads") or heads)
    return functools.partial(_changed, heads, module in architecture.shifted and own == "weight", dtype)


def _cut(turned: bool, half: int | None, then: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """[.., in, out] -> [.., out, in]; every other row of a stack, from `half` on."""
    if turned:
        tensor = tensor.transpose(-1, -2)
    return then(tensor[:, half::2].contiguous() if half is not None else tensor.contiguous())


def _changed(heads: int, shift: bool, dtype: str | None, tensor: Tensor) -> Tensor:
    """Rows of a head in halves (r * half + i) -> in pairs (2i + r); norms plus one."""
    if dtype is not None:
        tensor = (tensor.to(torch.float32) + 1 if shift else tensor).to(getattr(torch, dtype))
    if heads:
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        tensor = halves.transpose(1, 2).reshape(tensor.shape)
    return tensor


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
    width = _head_dim(settings)
    found["attention.key_length"] = found["attention.value_length"] = width
    found["vocab_size"] = rows
    types = settings.get("layer_types") or []
    if "attention.sliding_window" in found and "full_attention" in types and "sliding_attention" in types:
        found["attention.sliding_window_pattern"] = types.index("full_attention") + 1
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
        if local.get("rope_theta", 10_000.0) != 10_000.0:
            values["rope.freq_base_swa"] = float(local.get("rope_theta", 0.0))
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


def _check(made: Bundled, settings: Settings) -> None:
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
    for key, value in back.items():
        if key not in FREE and key in settings and not _alike(settings[key], value):
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
