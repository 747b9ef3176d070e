"""AutoRound (Intel). GPTQ or AWQ tensors with codes chosen by signed gradient descent; `packing_format` names the layout.

Stored: qweight, qzeros, scales, bias as in GPTQ (without g_idx; continuous bit streams also for 5, 6 and 7 bits) or as in AWQ
gemm. Symmetric files have negative scales. "auto_round:gptq" and "auto_round:auto_gptq" store zero - 1, "auto_round" and
"auto_round:gptqmodel" store the zero, "auto_round:awq" and "auto_round:auto_awq" are AWQ's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from anybit._lazy import LazyModule
from anybit.errors import CheckpointError, ConfigError, InvalidOption, NotRepresentable, ShapeMismatch
from anybit.methods._per_module import Settings, check_stored, stays_dense
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import (
    check_choice,
    check_flags,
    check_group_size,
    check_objects,
    check_type,
    listed,
    refuse,
)
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _auto_round_layouts as layouts
    from anybit.methods import _gptq_evidence as gptq_evidence
    from anybit.weight.layout import Layout, ModuleInfo
else:  # needed for tensors, not to select the backend
    layouts, gptq_evidence = (
        LazyModule("anybit.methods._auto_round_layouts"),
        LazyModule("anybit.methods._gptq_evidence"),
    )

TUNING_STEPS = 200
DEFAULT_FORMAT = "auto_round:gptq"
# packing_format -> the tensors' arrangement: GPTQ with zero - 1, GPTQ with the zero, the same with g_idx, AWQ gemm
FORMATS = {
    "auto": "gptq", "auto_round:gptq": "gptq", "auto_round:auto_gptq": "gptq", "auto_round": "plain",
    "auto_round:gptqmodel": "indexed", "auto_round:awq": "awq", "auto_round:auto_awq": "awq",
}  # fmt: skip
# settings of a file that change what its numbers mean, beyond what the tensors of a weight-only integer layout can say
CHANGING = ("rotation_config", "spinquant_config", "super_bits")


@register_quantization_config("auto-round")
@dataclass(eq=False, repr=False)
class AutoRoundConfig(QuantizationConfigMixin):
    """`extra_config` overrides the options for single modules. Passed for a GPTQ or AWQ checkpoint, it takes that over."""

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    backend: str = "auto"
    packing_format: str = DEFAULT_FORMAT
    extra_config: dict[str, Any] | None = None
    data_type: str | None = None
    block_name_to_quantize: str | list[Any] | None = None
    iters: int | None = None  # steps of tuning; 0: none
    nsamples: int | None = None
    seqlen: int | None = None
    batch_size: int | None = None

    method: ClassVar[str] = "auto-round"
    side_files: ClassVar[tuple[str, ...]] = ("quantization_config.json",)
    loading_attributes: ClassVar[tuple[str, ...]] = ("backend",)
    tuning: ClassVar[tuple[str, ...]] = ("iters", "nsamples", "seqlen", "batch_size")
    optional: ClassVar[tuple[str, ...]] = ("extra_config", "data_type", "block_name_to_quantize", *tuning)
    targets: ClassVar[tuple[str, ...]] = ("transformers", "vllm")
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"auto-round-{bits}bit-g{group_size}": {"bits": bits, "group_size": group_size}
        for bits in (2, 3, 4, 8)
        for group_size in (32, 64, 128)
    }

    def post_init(self) -> None:
        check_choice(self, "bits", range(2, 9))
        check_group_size(self)
        check_flags(self, "sym")
        check_type(self, "backend", str)
        check_type(self, "packing_format", str)
        check_objects(self, "extra_config")
        for name in self.tuning:
            check_type(self, name, int, None)
            if (getattr(self, name) or 0) < 0:
                raise refuse(self, name, "it cannot be negative")

    def per_module(self, settings: Mapping[str, QuantizationConfigMixin | None]) -> QuantizationConfigMixin:
        made = type(self).from_dict(self.to_dict())
        names = ("bits", "group_size", "sym")
        own = {
            module: {"bits": 16} if other is None else {name: getattr(other, name) for name in names}
            for module, other in settings.items()
        }
        made.extra_config = {**(self.extra_config or {}), **own} or None
        made.post_init()
        return cast(QuantizationConfigMixin, made)

    @classmethod
    def recognizes(cls, config_dict: Mapping[str, Any]) -> bool:
        return _is_own(config_dict.get("quant_method"))

    @classmethod
    def modernize(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        written_by = str(getattr(config_dict.get("quant_method"), "value", config_dict.get("quant_method", cls.method)))
        if _is_own(written_by):
            return config_dict
        if written_by not in ("gptq", "awq"):
            raise InvalidOption(
                f"AutoRoundConfig: it takes checkpoints of auto-round, gptq and awq, not of {written_by!r}"
            )
        version = str(config_dict.get("version", "gemm")).lower()
        if config_dict.get("meta") is not None or version != "gemm":
            raise InvalidOption(
                "AutoRoundConfig: it takes gptq checkpoints of version 1 and awq checkpoints of version 'gemm', but this is "
                f"another kind of {written_by}. Load it without a configuration: it is read as what it is"
            )
        return {**config_dict, "packing_format": f"auto_round:{written_by}"}

    def adopt(self, stored: QuantizationConfigMixin) -> QuantizationConfigMixin | None:
        made: QuantizationConfigMixin | None = (
            None if isinstance(stored, AutoRoundConfig) else self.from_dict(stored.to_dict())
        )
        return made


def _is_own(quant_method: Any) -> bool:
    """Also "intel/auto-round", of its first versions, and other spellings."""
    return "autoround" in str(quant_method).replace("-", "").replace("_", "")


def _settings_of(config: AutoRoundConfig, *names: str) -> Settings | None:
    """A module's settings, looked up under its names; None when it stays dense."""
    override = _override(config, names)
    chosen = {
        name: override[name] if override.get(name) is not None else getattr(config, name)
        for name in ("bits", "group_size", "sym")
    }
    if isinstance(chosen["bits"], int) and chosen["bits"] >= 16:
        return None
    data_type, act_bits = (
        override.get("data_type") or config.data_type or "int",
        override.get("act_bits") or config.extra_fields.get("act_bits") or 16,
    )
    if not str(data_type).startswith("int") or act_bits < 16:
        what = f"data_type {data_type!r}" if act_bits >= 16 else f"inputs of {act_bits} bits"
        raise NotRepresentable(
            f"{names[0]}: the configuration says {what}; of auto-round's formats anybit reads integer weights with plain inputs. "
            "Export the model as compressed-tensors (auto-round's llm_compressor format)"
        )
    try:
        checked = AutoRoundConfig(**chosen)
    except InvalidOption as error:
        raise InvalidOption(f"extra_config for {names[0]}: {error}") from error
    return Settings(checked.bits, checked.group_size, checked.sym, config.packing_format, False)


def _override(config: AutoRoundConfig, names: Sequence[str]) -> Mapping[str, Any]:
    """What extra_config says of a module: under its own name, else by the first regular expression found in it."""
    entries = config.extra_config or {}
    for name in names:
        if entries.get(name):
            return _checked_override(name, entries[name])
    from anybit.quantizers.matching import compiled

    for pattern, values in entries.items():
        if set("*^$|()[]?+\\") & set(pattern) and values:
            search = compiled(pattern)
            if any(search.searches(name) for name in names):
                return _checked_override(pattern, values)
    return {}


def _checked_override(name: str, values: Any) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise InvalidOption(
            f"AutoRoundConfig: extra_config[{name!r}] is {values!r}; it must be an object, e.g. {{'bits': 8}}"
        )
    return values


@register_quantizer("auto-round")
class AutoRoundQuantizer(HfQuantizer):
    """AutoRound's layouts. Without calibration data: its data-free modes, a search for scales (sym) or plain rounding."""

    layouts_available = True
    calibrated_algorithm = "autoround"

    def __init__(self, quantization_config: QuantizationConfigMixin, *, pre_quantized: bool = True, **kwargs: Any):
        # what was run is written into the configuration, and the caller's may be used for another model
        given = quantization_config if pre_quantized else copy.deepcopy(quantization_config)
        super().__init__(given, pre_quantized=pre_quantized, **kwargs)
        self.original: HfQuantizer | None = None
        config = self.quantization_config
        if (
            pre_quantized and "desc_act" in config.extra_fields
        ):  # a GPTQ or AWQ checkpoint, which its own method reads best
            from anybit.quantizers.auto import AutoHfQuantizer

            own = {name: getattr(config, name) for name in ("bits", "group_size", "sym")}
            method = config.packing_format.rpartition(":")[2].removeprefix("auto_")
            self.original = AutoHfQuantizer.from_config({**config.extra_fields, **own, "quant_method": method})

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        super().validate_environment(*args, device_map=device_map, **kwargs)
        config = self.quantization_config
        if self.original is not None:
            self.original.validate_environment(*args, device_map=device_map, **kwargs)
        if config.packing_format not in FORMATS:
            raise ConfigError(
                f"the checkpoint's packing_format is {config.packing_format!r}; of auto-round's formats anybit reads those with "
                f"integer weights: {listed(FORMATS)}"
            )
        for name in CHANGING:
            if config.extra_fields.get(name):
                raise ConfigError(
                    f"the checkpoint's configuration has {name} {config.extra_fields[name]!r}, which changes what the stored "
                    "weights mean; anybit cannot apply it and will not leave it out. Quantize the model again without it"
                )

    def begin(self, model: Any, slots: Sequence[Any]) -> None:
        super().begin(model, slots)
        config = self.quantization_config
        if self.original is not None:
            self.original.begin(model, slots)
        if self.pre_quantized:
            return
        tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        for slot in slots:  # an output layer with an entry of its own is quantized
            if slot.module in (config.extra_config or {}) and slot.parameter not in {*tied, *tied.values()}:
                self.skip_reasons.pop(slot.module, None)
        self._choose_format()
        self.steps = TUNING_STEPS if config.iters is None else config.iters
        config.iters = 0  # what was run: no tuning, unless `calibration_options` are asked for

    def calibration_options(self) -> dict[str, Any]:
        config = self.quantization_config
        if self.steps == 0:
            raise ConfigError(
                "AutoRoundConfig: iters is 0, which is no tuning, and there is calibration data to tune with. Leave one out"
            )
        config.iters = self.steps
        return {"steps": self.steps, **({"batch": config.batch_size} if config.batch_size else {})}

    def calibration_size(self) -> tuple[int | None, int | None]:
        return self.quantization_config.nsamples, self.quantization_config.seqlen

    steps = 0

    def _choose_format(self) -> None:
        """auto-round's own choice of a packing format for zero points that differ, unless the user made one."""
        config = self.quantization_config
        overrides = [_checked_override(name, values) for name, values in (config.extra_config or {}).items()]
        symmetric = [config.sym, *(bool(values.get("sym", config.sym)) for values in overrides)]
        if all(symmetric):
            return
        if "packing_format" not in config._given:
            widths = {config.bits, *(values.get("bits", config.bits) for values in overrides)} - {16, 32}
            config.packing_format = "auto_round:auto_awq" if widths == {4} and not any(symmetric) else "auto_round"
        elif FORMATS.get(config.packing_format) == "gptq":
            raise InvalidOption(
                f"AutoRoundConfig: packing_format is {config.packing_format!r}, which cannot store a zero point of 0, and sym is "
                "False for some modules; choose 'auto_round' or 'auto_round:auto_awq'"
            )

    def claims(self, tensor_name: str) -> str | None:
        return self.original.claims(tensor_name) if self.original is not None else super().claims(tensor_name)

    # --- reading ---

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        if self.original is not None:
            return self.original.layout_of(module, stored, peek)
        others = {"weight_packed", "weight_scale", "input_global_scale"} & set(stored)
        if others:
            raise NotRepresentable(
                f"{module.name} stores {', '.join(sorted(others))}; that is not auto-round's integer layout, and anybit reads "
                "no other one under this configuration"
            )
        if not {"qweight", "qzeros", "scales"} & set(stored):
            return None
        if module.kind not in ("linear", "conv1d", "router"):
            raise NotRepresentable(
                f"{module.name} is a packed {module.kind}; auto-round stores linear layers one by one"
            )
        named = next(stored[name].name.removesuffix(f".{name}") for name in stored if stored[name].name.endswith(name))
        settings = _settings_of(self.quantization_config, module.name, named)
        if settings is None:
            raise ShapeMismatch(
                f"{module.name} is stored packed, but the configuration's extra_config says that it has 16 bits"
            )
        shown = _shown_by(module, stored, settings)
        if shown is not None:
            self.decide(
                f"stored with {shown.bits} bits in groups of {shown.group_size}, although the configuration says {settings.bits} "
                f"bits in groups of {settings.group_size}: read as stored",
                module.name,
            )
            settings = shown
        arrangement = self._arrangement(module, settings, peek)
        layout = self._layout(module, settings, arrangement)
        dtype = getattr(stored.get("scales"), "dtype", None)
        if dtype in ("float16", "bfloat16", "float32"):
            layout = replace(layout, scale_dtype=dtype)
        if isinstance(layout, layouts.GptqLayout):
            hint = gptq_evidence.resemblance(stored, *module.shape)
            layout = replace(layout, index="absent")
            check_stored(module, stored, settings, layout.specs(), hint)
            return layouts.with_evidence(layout, module, stored, peek)
        check_stored(module, stored, settings, layout.specs())
        return layout

    def _arrangement(self, module: ModuleInfo, settings: Settings, peek: Callable[[str], Any]) -> str:
        config = self.quantization_config
        if "packing_format" in config._given or not config.backend.startswith("auto_round"):
            return FORMATS[settings.format]
        # first versions named the arrangement in `backend`; what zero points they stored, symmetric ones show
        found = layouts.stored_middle(peek("qzeros"), settings.bits, module.shape[0]) if settings.symmetric else None
        if found is not None and "awq" not in config.backend:
            return found
        middle = 1 << settings.bits - 1
        raise CheckpointError(
            f"the configuration has no packing_format, and backend {config.backend!r} does not tell how zero points are "
            f"stored: tensor '{module.name}.qzeros' holds neither {middle - 1} nor {middle} throughout. Add packing_format, "
            f"one of {listed(FORMATS)}"
        )

    def _layout(self, module: ModuleInfo, settings: Settings, arrangement: str) -> Any:
        problem = _obstacle(module, settings, arrangement)
        if problem is not None:
            raise ShapeMismatch(
                f"{module.name} is stored packed, but {problem}; config.json and tensors contradict each other"
            )
        group_size = module.shape[1] if settings.group_size == -1 else settings.group_size
        return layouts.layout(module, arrangement, settings.bits, group_size, settings.symmetric)

    # --- creating ---

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if not self.should_convert(module):
            return None
        config = self.quantization_config
        settings = _settings_of(config, module.name)
        reason = self._stays_dense(module) or ("extra_config leaves it at 16 bits" if settings is None else None)
        if settings is not None and reason is None:
            reason = _obstacle(module, settings, FORMATS[config.packing_format])
        if settings is None or reason is not None:
            self.skip_reasons[module.name] = str(reason)
            return None
        made: Layout = self._layout(module, settings, FORMATS[config.packing_format])
        return made

    def _stays_dense(self, module: ModuleInfo) -> str | None:
        config = self.quantization_config
        if module.kind in ("linear", "conv1d") and module.name in (config.extra_config or {}):
            return None
        blocks = config.block_name_to_quantize
        prefixes = _flat(blocks.split(",") if isinstance(blocks, str) else blocks or [])
        if prefixes and not any(module.name.startswith(prefix) for prefix in prefixes):
            return f"it lies outside {', '.join(map(repr, prefixes))}, the configuration's block_name_to_quantize"
        return stays_dense(module)


def _flat(names: Any) -> list[str]:
    if isinstance(names, str):
        return [names.strip()]
    return [name for entry in names for name in _flat(entry)]


def _shown_by(module: ModuleInfo, stored: Mapping[str, Any], settings: Settings) -> Settings | None:
    """Width and group size that all tensors agree upon, where the configuration says something else; its keys may not fit the
    names of the model's modules any more."""
    shapes = [tuple(stored[name].shape) if name in stored else () for name in ("qweight", "qzeros", "scales")]
    if any(len(shape) != 2 for shape in shapes):
        return None
    (first, second), (groups, zero_words), scales = shapes
    rows, columns = module.shape
    awq = FORMATS[settings.format] == "awq"
    words, codes = (second, rows) if awq else (first, columns)
    bits = 32 * words // codes
    whole = 32 * words == bits * codes and 32 * zero_words == bits * rows and 2 <= bits <= 8
    if not whole or scales != (groups, rows) or (first if awq else second) != (columns if awq else rows):
        return None
    size = columns if settings.group_size == -1 else settings.group_size
    if -(-columns // size) != groups:
        if columns % groups:
            return None
        size = columns // groups
    elif bits == settings.bits:
        return None
    return replace(settings, bits=bits, group_size=size)


def _obstacle(module: ModuleInfo, settings: Settings, arrangement: str) -> str | None:
    """Why no weight of this shape can have these settings."""
    rows, columns = module.shape
    if arrangement == "awq":
        if settings.bits not in (4, 5, 6, 7):
            return f"auto-round's AWQ packing holds 4 to 7 bits, not {settings.bits}"
        if settings.group_size != -1 and columns % settings.group_size:
            return f"its {columns} inputs are no whole number of groups of {settings.group_size}"
        step = 8 if settings.bits == 4 else 32
        return f"AWQ packs {step} outputs together, its shape is {module.shape}" if rows % step else None
    return (
        f"32 rows and columns are packed together, its shape is {module.shape}" if rows % 32 or columns % 32 else None
    )
