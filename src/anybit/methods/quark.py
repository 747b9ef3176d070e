"""Quark (AMD). One dialect for int8, int4, FP8 and MX weights; a specification for each kind of tensor, per layer pattern.

Stored: weight (int8, float8_e4m3fn, int32 [in, out/8] for 4-bit groups, uint8 for MXFP4 and MXFP6), weight_scale,
weight_zero_point, input_scale, output_scale, bias; a second level ends in _2. Files may call themselves "fp8" or "awq": an
`export` entry says that Quark wrote them.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from anybit._lazy import LazyModule
from anybit.errors import InvalidOption, NotRepresentable
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.matching import compiled
from anybit.quantizers.options import check_names, check_objects, check_type
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _quark_creation as creation
    from anybit.methods import _quark_layouts as layouts
    from anybit.methods import _quark_states as states
    from anybit.quantizers.measurement import Measurement
    from anybit.weight import Layout, ModuleInfo
else:
    creation = LazyModule("anybit.methods._quark_creation")
    layouts = LazyModule("anybit.methods._quark_layouts")
    states = LazyModule("anybit.methods._quark_states")

EXPORT = {
    "weight_format": "real_quantized", "pack_method": "reorder", "kv_cache_group": [], "min_kv_scale": 0.0,
    "weight_merge_groups": None,
}  # fmt: skip
WRITTEN_VERSION = "0.13"  # of Quark, whose files ours are like


def specification(dtype: str, qscheme: str, **settings: Any) -> dict[str, Any]:
    """What a configuration of Quark says of one kind of tensor, with every key that its reader wants."""
    plain = {
        "block_size": None, "ch_axis": None, "dtype": dtype, "enable_buffer_reuse": False, "group_size": None,
        "is_dynamic": False, "is_scale_quant": False, "max_input_numel": 4194304, "mx_element_dtype": None,
        "observer_cls": OBSERVERS[qscheme], "qscheme": qscheme, "round_method": "half_even",
        "scale_calculation_mode": None, "scale_format": None, "scale_type": "float", "symmetric": True,
        "zero_point_type": "int32",
    }  # fmt: skip
    return {**plain, **settings}


CLASSES = {"linear": "Linear", "embedding": "Embedding"}  # as layer_type_quant_config names them
OBSERVERS = {
    "per_tensor": "PerTensorMinMaxObserver",
    "per_channel": "PerChannelMinMaxObserver",
    "per_group": "PerGroupMinMaxObserver",
}


def _scheme(weight: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Options of a configuration that treats all linear layers alike."""
    parts = {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None, "target_device": None}
    return {"global_quant_config": parts}


def _mx(dtype: str) -> dict[str, Any]:
    settings = {
        "ch_axis": -1, "group_size": 32, "scale_format": "e8m0", "scale_calculation_mode": "even", "symmetric": None,
        "observer_cls": "PerBlockMXObserver",
    }  # fmt: skip
    weight = specification(dtype, "per_group", **settings)
    return _scheme(weight, {**weight, "is_dynamic": True})


def _fp8(qscheme: str, inputs: str) -> dict[str, Any]:
    axis = {"per_channel": 0, "per_tensor": None}
    return _scheme(
        specification("fp8_e4m3", qscheme, ch_axis=axis[qscheme]),
        specification("fp8_e4m3", inputs, ch_axis=1 if inputs == "per_channel" else None, is_dynamic=True),
    )


@register_quantization_config("quark")
@dataclass(eq=False, repr=False)
class QuarkConfig(QuantizationConfigMixin):
    """The content of a file, as it is. `quant_method` may be "fp8" or "awq", which selects other keys than "quark" has."""

    quant_method: str = "quark"
    version: str | None = None
    quant_mode: str | None = None
    global_quant_config: dict[str, Any] | None = None
    layer_quant_config: dict[str, Any] | None = None
    layer_type_quant_config: dict[str, Any] | None = None
    exclude: list[str] | None = None
    algo_config: list[Any] | dict[str, Any] | None = None
    softmax_quant_spec: dict[str, Any] | None = None
    kv_cache_quant_config: dict[str, Any] | None = None
    kv_cache_post_rope: bool | None = None
    export: dict[str, Any] | None = None
    activation_scheme: str | None = None
    ignored_layers: list[str] | None = None
    kv_cache_scheme: str | dict[str, Any] | None = None
    bits: int | None = None
    group_size: int | None = None
    zero_point: bool | None = None
    modules_to_not_convert: list[str] | None = None
    pack_method: str | None = None

    method: ClassVar[str] = "quark"
    claims: ClassVar[tuple[str, ...]] = ("export",)
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quark-int4-g128": _scheme(specification("int4", "per_group", ch_axis=-1, group_size=128)),
        "quark-uint4-g128": _scheme(specification("uint4", "per_group", ch_axis=-1, group_size=128, symmetric=False)),
        "quark-uint4-g32": _scheme(specification("uint4", "per_group", ch_axis=-1, group_size=32, symmetric=False)),
        "quark-int8": _scheme(specification("int8", "per_channel", ch_axis=0)),
        "quark-fp8": _fp8("per_tensor", "per_tensor"),
        "quark-fp8-ptpc": _fp8("per_channel", "per_channel"),
        "quark-mxfp4": _mx("fp4"),
        "quark-mxfp6-e3m2": _mx("fp6_e3m2"),
        "quark-mxfp6-e2m3": _mx("fp6_e2m3"),
    }
    optional: ClassVar[tuple[str, ...]] = (
        "version", "quant_mode", "global_quant_config", "layer_quant_config", "layer_type_quant_config", "exclude", "algo_config",
        "softmax_quant_spec", "kv_cache_quant_config", "kv_cache_post_rope", "export", "activation_scheme", "ignored_layers",
        "kv_cache_scheme", "bits", "group_size", "zero_point", "modules_to_not_convert", "pack_method",
    )  # fmt: skip

    def __post_init__(self) -> None:
        self.custom_mode = str(getattr(self.quant_method, "value", self.quant_method))
        super().__post_init__()

    def post_init(self) -> None:
        check_objects(
            self,
            "global_quant_config",
            "layer_quant_config",
            "layer_type_quant_config",
            "kv_cache_quant_config",
            "export",
        )
        check_type(self, "bits", int, None)
        check_type(self, "group_size", int, None)
        for name in ("exclude", "ignored_layers", "modules_to_not_convert"):
            check_names(self, name)

    def per_module(self, settings: Mapping[str, QuantizationConfigMixin | None]) -> QuantizationConfigMixin:
        if self.custom_mode != "quark" or not self.global_quant_config:
            raise NotRepresentable(
                f"QuarkConfig: a file of quant_method {self.custom_mode!r} without global_quant_config has one setting for all "
                "modules. Start from a scheme, e.g. quark-int4-g128"
            )
        own = {
            module: dict.fromkeys(self.global_quant_config) if other is None else cast(Any, other).global_quant_config
            for module, other in settings.items()
        }
        made = type(self).from_dict(self.to_dict())
        made.layer_quant_config = {
            **copy.deepcopy(own),
            **(made.layer_quant_config or {}),
        } or None  # the first one counts
        made.post_init()
        return cast(QuantizationConfigMixin, made)

    @property
    def legacy(self) -> bool:
        """Whether the file has no `export` entry: written before Quark 1.0, or by hand."""
        return self.export is None

    def own_dict(self) -> dict[str, Any]:
        own = super().own_dict()
        return {**own, "quant_method": own.pop("custom_mode")}


@register_quantizer("quark")
class QuarkHfQuantizer(HfQuantizer):
    """Quark's layouts. Patterns of modules are those of a shell, the first that matches counts."""

    layouts_available = True

    def __init__(self, quantization_config: QuantizationConfigMixin, *, pre_quantized: bool = True, **kwargs: Any):
        # what is found out about a model is written into the configuration, and the caller's may be used for another one
        own = quantization_config if pre_quantized else copy.deepcopy(quantization_config)
        super().__init__(own, pre_quantized=pre_quantized, **kwargs)
        if pre_quantized:
            return
        config = self.quantization_config
        creation.refuse(config)
        config.export = {**EXPORT, **(config.export or {})}
        if config.custom_mode == "quark":
            config.version, config.quant_mode = WRITTEN_VERSION, config.quant_mode or "eager_mode"

    @property
    def pack_method(self) -> str:
        """How eight 4-bit codes lie in a word: "reorder" or "order"."""
        config = self.quantization_config
        return str((config.export or {}).get("pack_method") or config.pack_method or "reorder")

    @property
    def weight_format(self) -> str:
        """ "real_quantized", or "fake_quantized" for weights that were rounded and kept dense."""
        return str((self.quantization_config.export or {}).get("weight_format") or "real_quantized")

    def spec_of(self, module: str, part: str, kind: str = "linear") -> Mapping[str, Any] | None:
        """What the configuration says of "weight", "input_tensors" or "output_tensors" of a module, if it has one level."""
        found = self.levels_of(module, part, kind)
        if len(found) > 1:
            raise InvalidOption(
                f"QuarkConfig: {part} of {module} is quantized in {len(found)} levels; of weights two are read, and of others one"
            )
        return found[0] if found else None

    def levels_of(self, module: str, part: str, kind: str = "linear") -> list[Mapping[str, Any]]:
        """The same with all its levels, the first one applied first; none where nothing is quantized.

        Settings for all modules are meant for linear layers; those of an embedding name it, or its class.
        """
        config = self.quantization_config
        if config.custom_mode == "fp8":
            own = self._fp8_mode(module, part)
            return [] if own is None else [own]
        kept_output = part == "output_tensors" and _first(module, config.kv_cache_quant_config or ()) is not None
        if _first(module, config.exclude or ()) is not None and not kept_output:
            return []
        named = _first(module, config.layer_quant_config or ())
        settings = config.layer_quant_config[named] if named is not None else None
        if settings is None:
            settings = (config.layer_type_quant_config or {}).get(CLASSES.get(kind, kind))
        if settings is None and kind == "linear":
            settings = config.global_quant_config
        found = (settings or {}).get(part)
        return found if isinstance(found, list) else [found] if found else []

    def _fp8_mode(self, module: str, part: str) -> Mapping[str, Any] | None:
        config = self.quantization_config
        if _first(module, config.ignored_layers or ()) is not None:
            return None
        scheme = {"weight": "static", "input_tensors": config.activation_scheme}.get(part)
        return {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": scheme == "dynamic"} if scheme else None

    # --- creating ---

    @property
    def _excluding(self) -> str:
        """The option that names what stays dense."""
        return "ignored_layers" if self.quantization_config.custom_mode == "fp8" else "exclude"

    def skipped_modules(self) -> Sequence[str] | None:
        # its patterns are not those of other methods
        return None if getattr(self.quantization_config, self._excluding) is None else []

    def begin(self, model: Any, slots: Sequence[Any]) -> None:
        super().begin(model, slots)
        if self.pre_quantized:
            return
        config = self.quantization_config
        if getattr(config, self._excluding) is None:
            setattr(config, self._excluding, list(self.modules_to_not_convert))

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        config = self.quantization_config
        pattern = _first(module.name, getattr(config, self._excluding) or ())
        if pattern is not None:
            self.skip_reasons.setdefault(module.name, f"{pattern!r} is among the modules to exclude")
        if not self.should_convert(module):
            return None
        found = creation.layout_for(self, module)
        if not isinstance(found, str):
            return found
        self.skip_reasons[module.name] = found
        named = _first(module.name, config.layer_quant_config or ()) is not None  # and left dense by it
        if named or self.spec_of(module.name, "weight", module.kind) is not None:
            setattr(config, self._excluding, [*(getattr(config, self._excluding) or ()), module.name])
        return None

    def measurements(self, model: Any) -> Mapping[str, Measurement]:
        if self.pre_quantized:
            return {}
        dtype = str(model.dtype).removeprefix("torch.")
        found: dict[str, Measurement] = {}
        for name, module in model.named_modules():
            spec = self.spec_of(name, "output_tensors") if hasattr(module, "in_features") else None
            if spec is not None:
                found[name] = states.OutputMeasured(spec, dtype)
        return found

    # --- reading ---

    def spelled_out(self, checkpoint: Any) -> Any:
        return layouts.mended_names(checkpoint) if self.quantization_config.custom_mode == "awq" else checkpoint

    def attach(self, model: Any, checkpoint: Any, path_of: Callable[[str], str | None]) -> None:
        self.attached = states.attach_outputs(
            model,
            checkpoint,
            path_of,
            lambda name: self.spec_of(name, "output_tensors"),
            bool(self.quantization_config.kv_cache_post_rope),
        )

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        if self.quantization_config.custom_mode == "awq":
            return layouts.awq_layout_of(self, module, stored)
        outputs = self.spec_of(module.name, "output_tensors")
        if outputs is not None and outputs.get("is_dynamic"):
            raise InvalidOption(
                f"QuarkConfig: the outputs of {module.name} are quantized dynamically ({outputs.get('dtype')}), which is not "
                "applied here; only outputs with a stored scale are. Export the model with static output scales"
            )
        return layouts.layout_of(self, module, stored)


def _first(module: str, patterns: Iterable[str]) -> str | None:
    """The first pattern of a shell that is the module's name."""
    for pattern in patterns:
        if pattern == module or compiled(fnmatch.translate(pattern)).covers(module):
            return pattern
    return None
