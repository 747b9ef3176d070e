"""ModelOpt (NVIDIA). FP8, NVFP4, MXFP8 and int4 weights; transformers has no reader for it.

Stored: weight (float8_e4m3fn [out, in]; uint8 [out, in/2] for FP4, low nibble first; uint8 [out/2, in] for int4), weight_scale,
weight_scale_2 (a multiplier, unlike compressed-tensors' global scale), input_scale, pre_quant_scale [in], and k_scale, v_scale
under the projections. The configuration is in config.json, in hf_quant_config.json, or in parts in both.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import LazyModule
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.checkpoint_config import read_json
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.matching import compiled
from anybit.quantizers.options import check_group_size, check_names, check_objects, check_type, refuse
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _cache_scales as cache_scales
    from anybit.methods import _modelopt_layouts as layouts
    from anybit.methods import _modelopt_runtime as runtime
    from anybit.quantizers.measurement import Measurement
    from anybit.weight import Layout, ModuleInfo
else:
    cache_scales = LazyModule("anybit.methods._cache_scales")
    layouts = LazyModule("anybit.methods._modelopt_layouts")
    runtime = LazyModule("anybit.methods._modelopt_runtime")

FILE = "hf_quant_config.json"
MIXED = "MIXED_PRECISION"


class _KeepsSpelling(QuantizationConfigMixin):
    """Remembers, beside the options, which of them a file calls by an older name: they are written back under it."""

    __slots__ = ("_spelled",)
    _spelled: Mapping[str, str]

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        found = super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        config, file = found[0] if return_unused_kwargs else found, cls.modernize(dict(config_dict))
        config._spelled = {new: old for old, new in cls.aliases.items() if old in file and file.get(new) is None}
        for old in config._spelled.values():
            config.extra_fields.pop(old, None)
        return found

    def own_dict(self) -> dict[str, Any]:
        spelled = getattr(self, "_spelled", {})
        return {spelled.get(name, name): value for name, value in super().own_dict().items()}


@register_quantization_config("modelopt")
@dataclass(eq=False, repr=False)
class ModelOptConfig(_KeepsSpelling):
    """`quant_algo` names the format; "MIXED_PRECISION" has one for each module in `quantized_layers`."""

    quant_algo: str | None = None
    ignore: list[str] | None = None
    group_size: int | None = None
    kv_cache_quant_algo: str | None = None
    kv_cache_scheme: dict[str, Any] | str | None = None
    config_groups: dict[str, Any] | None = None
    quantized_layers: dict[str, dict[str, Any]] | None = None
    has_zero_point: bool | None = None
    pre_quant_scale: bool | None = None
    producer: dict[str, Any] | None = None

    method: ClassVar[str] = "modelopt"
    aliases: ClassVar[Mapping[str, str]] = {"exclude_modules": "ignore"}
    side_files: ClassVar[tuple[str, ...]] = (FILE,)
    targets: ClassVar[tuple[str, ...]] = ("vllm",)
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "modelopt-fp8-pc": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        "modelopt-fp8-pb": {"quant_algo": "fp8_pb_wo"},
        "modelopt-mxfp8": {"quant_algo": "MXFP8"},
        "modelopt-w4a16-nvfp4": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "modelopt-w4a16-int4": {"quant_algo": "W4A16_AWQ", "group_size": 128},
        # with calibration data
        "modelopt-fp8": {"quant_algo": "FP8"},
        "modelopt-nvfp4": {"quant_algo": "NVFP4"},
        "modelopt-w4a8-awq": {"quant_algo": "W4A8_AWQ", "group_size": 128},
        "modelopt-w8a8-sq": {"quant_algo": "W8A8_SQ_PER_CHANNEL"},
    }
    optional: ClassVar[tuple[str, ...]] = (
        "group_size", "kv_cache_quant_algo", "kv_cache_scheme", "config_groups", "quantized_layers", "has_zero_point",
        "pre_quant_scale", "producer",
    )  # fmt: skip

    def post_init(self) -> None:
        check_type(self, "quant_algo", str, None)
        if self.group_size is not None:
            check_group_size(self)
        check_type(self, "kv_cache_scheme", dict, str, None)
        check_objects(self, "config_groups", "quantized_layers", "producer")
        check_names(self, "ignore")

    @property
    def cache_algo(self) -> str | None:
        """How keys and values are quantized, in capitals; None when the configuration does not say."""
        return cache_scales.cache_algo(self.kv_cache_quant_algo, self.kv_cache_scheme)

    @classmethod
    def recognizes(cls, config_dict: Mapping[str, Any]) -> bool:
        named = config_dict.get("quant_method")
        if named is not None:
            return str(named).startswith(cls.method)  # such as "modelopt_fp4"
        inside = config_dict.get("quantization", config_dict)
        return isinstance(inside, dict) and "quant_algo" in inside

    @classmethod
    def modernize(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        inside = config_dict.get("quantization")
        if not isinstance(inside, dict):
            return config_dict
        return {**{name: value for name, value in config_dict.items() if name != "quantization"}, **inside}

    @classmethod
    def in_context(cls, config_dict: dict[str, Any], model_config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        if not (folder / FILE).is_file():
            return config_dict
        ours = {cls.aliases.get(name, name) for name in cls.modernize(dict(config_dict))}
        beside = cls.modernize(read_json(folder / FILE))
        missing = {name: value for name, value in beside.items() if cls.aliases.get(name, name) not in ours}
        return {**{name: value for name, value in missing.items() if value is not None}, **config_dict}


@register_quantizer("modelopt")
class ModelOptHfQuantizer(HfQuantizer):
    """ModelOpt's layouts. The tensors decide which; the plan says where the configuration differs."""

    layouts_available = True
    default_algorithm = "minifloat"
    calibrated_algorithm: str | None = "awq"  # type: ignore[misc]  # of one configuration: its recipe's, if it has one

    def __init__(self, quantization_config: QuantizationConfigMixin, *, pre_quantized: bool = True, **kwargs: Any):
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)
        self.calibrated_algorithm = None
        if not pre_quantized:
            self._check_made()

    def _check_made(self) -> None:
        config = self.quantization_config
        named = [config.quant_algo]
        if (config.quant_algo or "").upper() == MIXED:
            named = [_algo(own) for own in (config.quantized_layers or {}).values()] or [None]
        for algo in named:
            if (algo or "").upper() not in layouts.MADE:
                raise refuse(config, "quant_algo", f"it must be one of {', '.join(layouts.MADE)}; {algo!r} is not")
        recipes = {layouts.RECIPES.get(str(algo).upper()) for algo in named}
        self.calibrated_algorithm = recipes.pop() if len(recipes) == 1 else None
        if config.cache_algo not in (None, *cache_scales.KINDS):
            raise refuse(config, "kv_cache_quant_algo", f"caches are made in {' and '.join(cache_scales.KINDS)}")

    # --- which module, which algorithm ---

    def algo_of(self, module: str) -> str | None:
        """The algorithm the configuration names for a module, in capitals."""
        config = self.quantization_config
        named = config.quant_algo
        if config.quantized_layers:
            named = next(
                (found for name in _owners(module) if (found := _algo(config.quantized_layers.get(name)))), None
            )
        return named.upper() if isinstance(named, str) else None

    def skipped_modules(self) -> Sequence[str] | None:
        return None if self.quantization_config.ignore is None else []  # its patterns are not those of other methods

    def _ignored(self, module: str) -> str | None:
        for pattern in self.quantization_config.ignore or ():
            if pattern == module or ("*" in pattern and compiled(fnmatch.translate(pattern)).covers(module)):
                return str(pattern)
        return None

    def begin(self, model: Any, slots: Sequence[Any]) -> None:
        decided = self.decisions
        super().begin(model, slots)
        self.decisions = decided
        config = self.quantization_config
        if not self.pre_quantized:
            if config.ignore is None:
                config.ignore = list(self.modules_to_not_convert)
            _complete(config)

    def attach(self, model: Any, checkpoint: Any, path_of: Callable[[str], str | None]) -> None:
        self.decisions = {}
        if not self.pre_quantized:
            return
        self._compare_files(checkpoint)
        algo = self.quantization_config.cache_algo
        known = algo in cache_scales.KINDS
        found = cache_scales.attach_cache(
            model, checkpoint, path_of, "FP8" if algo is None else algo if known else None, everywhere=known
        )
        for attention in found.unscaled:
            self.decide(f"keys and values: {algo} without stored scales is rounded under scales of 1", attention)
        for attention in found.scaled if not known else ():
            what = (
                "its scales are stored, and used as those of FP8"
                if algo is None
                else f"its scales are kept and not used: {algo} is not supported"
            )
            self.decide(f"keys and values: {what}; the configuration's kv_cache_quant_algo is {algo}", attention)
        side = runtime.attach_sides(model, checkpoint, path_of)
        self.attached, self.folds = found.keys | side.keys, side.folds

    def measurements(self, model: Any) -> Mapping[str, Measurement]:
        algo = self.quantization_config.cache_algo
        if self.pre_quantized or algo is None:
            return {}
        names = ("k_proj.k_scale", "v_proj.v_scale")
        return {path: cache_scales.CacheMeasured(names) for path in cache_scales.attentions(model)}

    def made_files(self, layouts: Mapping[str, Layout]) -> Mapping[str, bytes]:
        """The side file that ModelOpt always writes, and some engines look for."""
        if self.pre_quantized:
            return {}
        config = self.quantization_config
        inside = {
            "quant_algo": config.quant_algo, "kv_cache_quant_algo": config.cache_algo, "group_size": config.group_size,
            "has_zero_point": config.has_zero_point, "pre_quant_scale": config.pre_quant_scale,
            "quantized_layers": config.quantized_layers, "exclude_modules": config.ignore,
        }  # fmt: skip
        kept = {name: value for name, value in inside.items() if value is not None or name == "kv_cache_quant_algo"}
        return {FILE: (json.dumps({"producer": config.producer, "quantization": kept}, indent=4) + "\n").encode()}

    def _compare_files(self, checkpoint: Any) -> None:
        """Say where config.json and the side file disagree; config.json counts, and tensors more than both."""
        folder = Path(checkpoint.path)
        file = (folder if folder.is_dir() else folder.parent) / FILE
        if not file.is_file():
            return
        config = self.quantization_config
        beside = config.modernize(read_json(file))
        for name in ("quant_algo", "kv_cache_quant_algo", "group_size"):
            ours, theirs = getattr(config, name), beside.get(name)
            if ours is not None and theirs is not None and str(ours).upper() != str(theirs).upper():
                self.decide(f"{name} is {ours!r} in config.json and {theirs!r} in the side file", FILE)

    # --- reading and creating ---

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        named = self.algo_of(module.name)
        found = layouts.layout_of(module, stored, named)
        if found is None:
            return None
        name, layout = found
        if named != name and (named, name) not in layouts.SAME_TENSORS:
            self.decide(f"stored as {name}, told from tensors; the configuration says {named}", module.name)
        return layout

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        pattern = self._ignored(module.name)
        if pattern is not None:
            self.skip_reasons.setdefault(module.name, f"{pattern!r} is among the modules to ignore")
        if not self.should_convert(module):
            return None
        layout = layouts.layout_for(module, self.algo_of(module.name) or "", self.quantization_config.group_size)
        if isinstance(layout, str):
            self.skip_reasons[module.name] = layout
            return None
        return layout


# the format is ModelOpt's of this version; engines look for its name
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
SIZES = {"NVFP4": 16, "NVFP4_AWQ": 16, "W4A16_NVFP4": 16, "W4A8_NVFP4_FP8": 32, "W4A16_AWQ": 128, "W4A8_AWQ": 128}


def _complete(config: Any) -> None:
    """What ModelOpt writes beside the name of an algorithm, for a new checkpoint."""
    config.producer = config.producer or dict(PRODUCER)
    algo = str(config.quant_algo).upper()
    if config.group_size is None:
        config.group_size = SIZES.get(algo)
    if algo in layouts.RECIPES and algo != "W8A8_SQ_PER_CHANNEL":
        config.has_zero_point, config.pre_quant_scale = False, True
    if config.cache_algo is not None and config.kv_cache_scheme is None:
        fp8 = {"dynamic": False, "num_bits": 8, "type": "float"}
        config.kv_cache_scheme = fp8 if config.cache_algo == "FP8" else config.cache_algo
    numbers = {"FP8": 8, "NVFP4": 4, "W4A16_NVFP4": 4}.get(algo)
    if numbers is not None and config.config_groups is None:
        part = {"dynamic": False, "num_bits": numbers, "type": "float"}
        part |= {"group_size": config.group_size} if numbers == 4 else {}
        inputs = {} if algo == "W4A16_NVFP4" else {"input_activations": dict(part)}
        config.config_groups = {"group_0": {**inputs, "weights": part, "targets": ["Linear"]}}


def _owners(module: str) -> list[str]:
    """The module's name and those it lies in, innermost first."""
    pieces = module.split(".")
    return [".".join(pieces[:count]) for count in range(len(pieces), 0, -1)]


def _algo(settings: Any) -> str | None:
    found = settings.get("quant_algo") if isinstance(settings, dict) else None
    return found if isinstance(found, str) else None
