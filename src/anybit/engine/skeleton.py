"""A model without weights: transformers' class on the meta device, and which of its parameters can be packed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anybit.errors import ConfigError
from anybit.modules.proxy import multiplies_once, multiplies_plainly
from anybit.weight import ModuleInfo


@dataclass(frozen=True)
class Slot:
    """One weight of the model that could be packed.

    `parameter` is its key in the model's state dict, `module` the path of the owning layer (for "experts": of the
    parameter itself). `shape` is logical: (out, in), (vocabulary, width), (experts, out, in); `transposed` says that the
    model class holds the last two axes the other way round.
    """

    parameter: str
    module: str
    kind: str
    shape: tuple[int, ...]
    class_name: str
    has_bias: bool = False
    transposed: bool = False

    def info(self, dtype: str) -> ModuleInfo:
        return ModuleInfo(self.module, self.kind, self.shape, dtype, self.has_bias, self.class_name, self.transposed)


def build(config: Any, auto_class: Any = None, **kwargs: Any) -> nn.Module:
    """The model that `config` describes, every tensor on the meta device, in eval mode; ConfigError if unknown.

    `auto_class`: a transformers auto class; default: the class named in the config, else by what the config maps to.
    """
    import transformers
    from transformers import modeling_utils

    dtype = kwargs.pop("dtype", None)
    chosen = auto_class
    if chosen is None:
        for name in config.architectures or []:
            chosen = getattr(transformers, name, None)
            if isinstance(chosen, type) and issubclass(chosen, modeling_utils.PreTrainedModel):
                break
        else:
            chosen = next(
                (
                    auto
                    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel)
                    if type(config) in auto._model_mapping
                ),
                None,
            )
    if chosen is None:
        raise ConfigError(
            f"transformers {transformers.__version__} has no model class for model_type {config.model_type!r} "
            f"(architectures {config.architectures}); upgrade transformers or pass auto_class="
        )
    make = getattr(chosen, "_from_config", None) or chosen.from_config
    with torch.device("meta"):
        model = make(config, dtype=dtype, **kwargs)
    model.eval()
    result: nn.Module = model
    return result


def read_config(path: Path) -> Any:
    """transformers' configuration of a local folder; no code of the folder is run."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(path), trust_remote_code=False)


def config_of(settings: Mapping[str, Any]) -> Any:
    """transformers' configuration of what a config.json would hold; ConfigError where its class refuses it."""
    from transformers import AutoConfig

    own = {name: value for name, value in settings.items() if name != "model_type"}
    try:
        return AutoConfig.for_model(settings["model_type"], **own)
    except Exception as error:  # its classes check values with errors of several libraries
        raise ConfigError(
            f"transformers' configuration of {settings['model_type']!r} refuses the settings: {error}"
        ) from error


def slots(model: nn.Module) -> dict[str, Slot]:
    """Packable weights by state dict key."""
    from transformers.pytorch_utils import Conv1D

    def plain(cls: type[nn.Linear]) -> bool:
        return cls.forward is nn.Linear.forward

    found: dict[str, Slot] = {}
    for name, module in model.named_modules():
        class_name = type(module).__name__
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2:
            bias = getattr(module, "bias", None) is not None
            key = f"{name}.weight"
            if isinstance(module, nn.Linear) and (plain(type(module)) or multiplies_plainly(module)):
                found[key] = Slot(key, name, "linear", tuple(weight.shape), class_name, bias)
            elif isinstance(module, Conv1D):
                found[key] = Slot(key, name, "conv1d", (weight.shape[1], weight.shape[0]), class_name, bias, True)
            elif isinstance(module, nn.Embedding):
                found[key] = Slot(key, name, "embedding", tuple(weight.shape), class_name)
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and own != "weight" and _is_experts(module):
                key = f"{name}.{own}"
                transposed = bool(getattr(module, "is_transposed", _multiplies_from_the_right(module, own)))
                experts, first, second = parameter.shape
                shape = (experts, second, first) if transposed else (experts, first, second)
                found[key] = Slot(key, key, "experts", shape, class_name, False, transposed)
    return found


def packed_routers(model: nn.Module, stored: Iterable[str], path_of: Callable[[str], str | None]) -> dict[str, Slot]:
    """Slots of small layers of classes of their own (a router is not an `nn.Linear`), where a file has more than a weight.

    No method packs them by itself, so they are no slots otherwise. `path_of`: a module's name in the file -> its path.
    """
    from transformers.pytorch_utils import Conv1D

    candidates = {
        path: module
        for path, module in model.named_modules()
        if (weight := module._parameters.get("weight")) is not None
        and weight.dim() == 2
        and not isinstance(module, (nn.Linear, nn.Embedding, Conv1D))
    }
    endings = {path.rpartition(".")[2] for path in candidates}
    found: dict[str, Slot] = {}
    for name in stored if candidates else ():
        owner, _, own = name.rpartition(".")
        if own in ("weight", "bias") or owner.rpartition(".")[2] not in endings:
            continue
        path = path_of(owner)
        module = candidates.get(path) if path is not None else None
        if module is None or own in module._parameters or own in module._buffers or not multiplies_once(module):
            continue
        bias = module._parameters.get("bias") is not None
        shape = tuple(module._parameters["weight"].shape)
        found[f"{path}.weight"] = Slot(f"{path}.weight", str(path), "router", shape, type(module).__name__, bias)
    return found


def _is_experts(module: nn.Module) -> bool:
    return hasattr(module, "is_transposed") or hasattr(module, "num_experts") or "Experts" in type(module).__name__


def _multiplies_from_the_right(module: nn.Module, name: str) -> bool:
    """Whether an experts class without transformers' marker stores [experts, in, out], told from its own widths."""
    parameter = getattr(module, name)
    hidden = getattr(module, "hidden_size", None)
    if hidden is None:
        return False
    return bool(parameter.shape[1] == hidden) if "down" not in name else bool(parameter.shape[2] == hidden)
