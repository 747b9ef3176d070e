"""A LoRA adapter as PEFT saves it: what it does to each weight, and what it asks for beside that.

Everything in it is either done by `merge` or refused by its name: a part that was passed over would give another model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybit.containers import Checkpoint
from anybit.errors import CheckpointError, ConfigError, UnexpectedTensor
from anybit.quantizers.checkpoint_config import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?(\.bias)?"
)
# what an adapter's configuration may ask for beyond this, with the values that ask for nothing
NEUTRAL: Mapping[str, Any] = {
    "layer_replication": None, "target_parameters": None, "alora_invocation_tokens": None, "use_qalora": False,
    "trainable_token_indices": None, "use_bdlora": None, "velora_config": None, "monteclora_config": None, "arrow_config": None,
}  # fmt: skip
# what it may say without changing what the finished adapter does: how it was trained, started or is run
IGNORED = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_dora", "use_rslora",
})  # fmt: skip
# starts that take something out of the base; PEFT can save such an adapter for the base as it was, and then says so
CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga")
ELSEWHERE = "Merge with PEFT into the dense base, then quantize"


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one weight: scaling * up @ down, float32 [out, in]; DoRA then sets the length of each row.

    `base`: the weight that it is added to, where the adapter brings its own (an embedding that was saved with it).
    """

    down: Tensor
    up: Tensor
    scaling: float
    magnitude: Tensor | None = None
    base: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def merged(self, dense: Tensor) -> Tensor:
        """The float32 weight with the adapter in it."""
        dense = dense if self.base is None else self.base.to(dense.device)
        changed = dense + (self.up @ self.down).to(dense.device) * self.scaling
        if self.magnitude is None:
            return changed
        length = changed.norm(dim=1, keepdim=True)
        return changed * (self.magnitude.to(dense.device).reshape(-1, 1) / length)


@dataclass(frozen=True)
class Replaced:
    """A weight that was trained itself, beside the adapter (`modules_to_save`), float32."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def merged(self, dense: Tensor) -> Tensor:
        return self.weight.to(dense.device)


@dataclass
class Adapter:
    """`weights`: by module. `plain`: tensors of the model (biases, norms) by key: (tensor, whether it is added or takes the
    place of the stored one)."""

    file: Path
    weights: dict[str, Delta | Replaced] = field(default_factory=dict)
    plain: dict[str, tuple[Tensor, bool]] = field(default_factory=dict)


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder. Raises ConfigError for what it asks beyond LoRA, CheckpointError for damaged files."""
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG}, so it is no PEFT adapter; name the folder that save_pretrained wrote"
        )
    config = read_json(file)
    _check_config(file, config)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS}; save the adapter with safe_serialization=True")
    parts: dict[str, dict[str, Tensor]] = {}
    adapter = Adapter(file)
    with Checkpoint.open(folder / WEIGHTS) as checkpoint:
        for name in checkpoint.tensors:
            tensor = checkpoint.read(name).to(torch.float32).clone()
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{folder / WEIGHTS}: {name} has NaN or infinite numbers; the adapter is damaged")
            key = name.removeprefix(PREFIX)
            match = PARTS.fullmatch(key)
            if not name.startswith(PREFIX) or (match is None and not _is_saved(key, config)):
                raise UnexpectedTensor(
                    f"{folder / WEIGHTS}: {name} is no part of a LoRA adapter, and of nothing that its {CONFIG} says is saved"
                )
            if match is None and key.endswith(".base_layer.weight"):
                parts.setdefault(key.removesuffix(".base_layer.weight"), {})["base"] = tensor
            elif match is None:
                _take_saved(adapter, key, tensor)
            else:
                parts.setdefault(match[1], {})[match[2] + (match[3] or "")] = tensor
    if not parts and not adapter.weights and not adapter.plain:
        raise CheckpointError(f"{folder / WEIGHTS} holds no tensors")
    for name in config.get("modules_to_save") or ():
        if not any(_names(name, own) for own in (*adapter.weights, *adapter.plain)):
            raise CheckpointError(f"{file}: modules_to_save names {name!r}, of which {WEIGHTS} has no tensor")
    for module, own in parts.items():
        if module in adapter.weights:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {module} is both adapted and saved whole; one of them was meant"
            )
        adapter.weights[module] = _delta(adapter, config, module, own)
    return adapter


def _check_config(file: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{file}: peft_type is {config.get('peft_type')!r}; only LORA adapters are merged")
    for key, value in config.items():
        if key not in IGNORED and value not in (NEUTRAL.get(key), None, False, [], {}, ""):
            raise ConfigError(f"{file}: {key} is {value!r}, which is not merged. {ELSEWHERE}")
    start = str(config.get("init_lora_weights") or "")
    if start.startswith(CHANGE_THE_BASE):
        raise ConfigError(
            f"{file}: init_lora_weights is {start!r}: such a start takes a part out of the base's weights, so the adapter is "
            "not one for the base as it is stored. Save it with path_initial_model_for_weight_conversion, which makes it one"
        )
    if config.get("bias") not in (None, "none", "all", "lora_only"):
        raise ConfigError(f"{file}: bias is {config['bias']!r}; known are none, all, lora_only")


def _is_saved(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor of the model is saved whole: of a module to save, or a trained bias."""
    module, _, own = key.rpartition(".")
    inside = any(_names(name, module) for name in config.get("modules_to_save") or ())
    own_base = key.endswith(".base_layer.weight")  # PEFT saves embeddings that it adapts, or that grew
    return inside or own_base or (own == "bias" and config.get("bias") in ("all", "lora_only"))


def _names(name: str, path: str) -> bool:
    """PEFT's rule: a module to save is every one whose path ends so; its tensors lie in it or in modules of it."""
    pieces = path.split(".")
    return any(".".join(pieces[:cut]).endswith(name) for cut in range(1, len(pieces) + 1))


def _take_saved(adapter: Adapter, key: str, tensor: Tensor) -> None:
    module, _, own = key.rpartition(".")
    module = re.sub(r"\.(modules_to_save(\.default)?|base_layer|original_module)$", "", module)
    if own == "weight" and tensor.dim() == 2:
        adapter.weights[module] = Replaced(tensor)
    else:
        adapter.plain[f"{module}.{own}"] = tensor, False


def _delta(adapter: Adapter, config: Mapping[str, Any], module: str, own: Mapping[str, Tensor]) -> Delta:
    file = adapter.file
    down, up, magnitude = own.get("lora_A"), own.get("lora_B"), own.get("lora_magnitude_vector")
    if (
        "lora_embedding_A" in own or "lora_embedding_B" in own
    ):  # [r, vocabulary] and [width, r], of the table turned round
        first, second = own.get("lora_embedding_A"), own.get("lora_embedding_B")
        down = second.T if second is not None and second.dim() == 2 else None
        up = first.T if first is not None and first.dim() == 2 else None
        if magnitude is not None:
            raise ConfigError(f"{file}: {module} is an embedding with use_dora, which is not merged. {ELSEWHERE}")
    if down is None or up is None or down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
        raise CheckpointError(
            f"{file.parent / WEIGHTS}: {module} needs lora_A [r, in] and lora_B [out, r] (an embedding lora_embedding_A "
            "[r, vocabulary] and lora_embedding_B [width, r])"
        )
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise CheckpointError(f"{file}: use_dora is {config.get('use_dora')}, but {module} says otherwise")
    rank = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if rank != down.shape[0] or not isinstance(alpha, (int, float)):
        raise CheckpointError(
            f"{file}: {module} has rank {down.shape[0]}; the configuration says rank {rank}, alpha {alpha}"
        )
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    bias = own.get("lora_B.bias")
    if bias is not None:
        if magnitude is not None:
            raise ConfigError(f"{file}: {module} has lora_bias and use_dora, which is not merged. {ELSEWHERE}")
        adapter.plain[f"{module}.bias"] = bias * scaling, True
    return Delta(down, up, scaling, magnitude, own.get("base"))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that is the end of the path, at a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
