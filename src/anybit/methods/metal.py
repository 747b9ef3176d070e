"""Metal and MLX. Integer codes of a row in groups: scale * code + offset.

Stored: weight uint32 [out, in*bits/32], each row one little-endian bit stream; scales [out, in/group]; offsets [out, in/group]
named qbiases (transformers) or biases (MLX); bias [out]. MLX's modes mxfp4, mxfp8 and nvfp4 have uint8 scales and no offsets.
MLX's configuration has no quant_method and lies under `quantization`; further keys in it are modules with settings of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

from anybit._lazy import LazyModule
from anybit.errors import ConfigError, InvalidOption, NotRepresentable
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_flags, check_names, check_positive, listed, refuse
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from pathlib import Path

    from anybit.methods import _metal_layout as layouts
    from anybit.weight.layout import Layout, ModuleInfo
else:  # needed for tensors, not to select the backend
    layouts = LazyModule("anybit.methods._metal_layout")

# MLX's mode -> widths; None is transformers' own format
BITS: Mapping[str | None, tuple[int, ...]] = {
    None: (2, 4, 8), "affine": (2, 3, 4, 5, 6, 8), "mxfp4": (4,), "mxfp8": (8,), "nvfp4": (4,),
}  # fmt: skip
# MLX's mode -> sizes of groups, the default first
GROUPS: Mapping[str, tuple[int, ...]] = {"affine": (64, 32, 128), "mxfp4": (32,), "mxfp8": (32,), "nvfp4": (16,)}
# keys of MLX's configuration that are no modules
USUAL = ("bits", "group_size", "quantize_activations")
# MLX's names of stacked experts -> those of transformers' checkpoints
EXPERTS = {"gate_proj": ("gate_proj", "w1"), "down_proj": ("down_proj", "w2"), "up_proj": ("up_proj", "w3")}


@register_quantization_config("metal")
@dataclass(eq=False, repr=False)
class MetalConfig(QuantizationConfigMixin):
    """`mode` is set for files that MLX wrote, and for those only. MLX's settings of single modules are in `extra_fields`."""

    bits: int = 4
    group_size: int = 64
    modules_to_not_convert: list[str] | None = None
    dequantize: bool = False
    mode: str | None = None

    method: ClassVar[str] = "metal"
    config_keys: ClassVar[tuple[str, ...]] = ("quantization_config", "quantization")
    loading_attributes: ClassVar[tuple[str, ...]] = ("dequantize",)
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **{
            f"metal-{bits}bit-g{size}": {"bits": bits, "group_size": size}
            for bits in (2, 4, 8)
            for size in (32, 64, 128)
        },
        **{
            f"mlx-{bits}bit-g{size}": {"bits": bits, "group_size": size, "mode": "affine"}
            for bits in BITS["affine"]
            for size in (32, 64, 128)
        },
        **{
            f"mlx-{mode}": {"bits": BITS[mode][0], "group_size": GROUPS[mode][0], "mode": mode}
            for mode in ("mxfp4", "mxfp8", "nvfp4")
        },
    }

    def post_init(self) -> None:
        check_choice(self, "mode", BITS)
        check_choice(self, "bits", BITS[self.mode])
        check_positive(self, "group_size")
        if self.mode is not None and self.group_size not in GROUPS[self.mode]:
            raise refuse(self, "group_size", f"mode {self.mode!r} has groups of {listed(sorted(GROUPS[self.mode]))}")
        check_names(self, "modules_to_not_convert")
        check_flags(self, "dequantize")

    @classmethod
    def recognizes(cls, config_dict: Mapping[str, Any]) -> bool:
        if config_dict.get("quant_method") is not None or not {"bits", "group_size"} <= config_dict.keys():
            return False
        others = [(name, value) for name, value in config_dict.items() if name not in USUAL]
        return config_dict.get("mode") in tuple(BITS)[1:] or all(
            isinstance(value, dict) or (isinstance(value, bool) and "." in name) for name, value in others
        )

    @classmethod
    def modernize(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        if config_dict.get("mode") is not None:
            config_dict.pop(
                "quant_method", None
            )  # MLX's files have none; with one, transformers would take them for its own
        return {"mode": "affine", **config_dict} if cls.recognizes(config_dict) else config_dict

    @classmethod
    def in_context(cls, config_dict: dict[str, Any], model_config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        asks = config_dict.get("quant_method") is None and model_config.get("quantize_activations")
        return {**config_dict, "quantize_activations": True} if asks else config_dict

    def own_dict(self) -> dict[str, Any]:
        own = super().own_dict()
        written = (
            "bits",
            "group_size",
            *(("quant_method", "modules_to_not_convert") if self.mode is None else ("mode",)),
        )
        return {name: own[name] for name in written}

    def served_by(self) -> tuple[str, ...]:
        return ("transformers",) if self.mode is None else ("mlx",)

    def per_module(self, settings: Mapping[str, Any]) -> QuantizationConfigMixin:
        if self.mode is None:
            raise NotRepresentable(
                "MetalConfig without a mode (transformers' Metal format) has one setting for the whole model. Use an MLX scheme, "
                "e.g. mlx-4bit-g64: its files name settings of single modules"
            )
        made = type(self).from_dict(self.to_dict())
        for module, other in settings.items():
            own = None if other is None else (other.bits, other.group_size, other.mode)
            made.extra_fields[module] = False if own is None else dict(zip(("bits", "group_size", "mode"), own))
        return cast(QuantizationConfigMixin, made)

    def of_module(self, module: str) -> Settings | None:
        """What the file's own key for a module says; None without such a key."""
        own = self.extra_fields.get(module)
        if own is True:
            return Settings(self.bits, self.group_size, self.mode or "affine")
        if not isinstance(own, dict):
            return None
        mode = own.get("mode", "affine")  # not the file's: MLX hands the dictionary over as it is
        if mode not in GROUPS:
            raise InvalidOption(f"MetalConfig: {module!r} has the mode {mode!r}; it must be {listed(GROUPS)}")
        default_bits = 4 if mode == "affine" else BITS[mode][0]
        found = Settings(own.get("bits") or default_bits, own.get("group_size") or GROUPS[mode][0], mode)
        if found.bits not in BITS[mode] or found.group_size not in GROUPS[mode]:
            raise InvalidOption(
                f"MetalConfig: {module!r} has {found.bits} bits in groups of {found.group_size}; mode {mode!r} has "
                f"{listed(BITS[mode])} bits in groups of {listed(sorted(GROUPS[mode]))}"
            )
        return found


class Settings(NamedTuple):
    """Of one module that MLX quantized."""

    bits: int
    group_size: int
    mode: str


@register_quantizer("metal")
class MetalHfQuantizer(HfQuantizer):
    """Layouts of transformers' Metal format and of MLX."""

    layouts_available = True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        super().validate_environment(*args, device_map=device_map, **kwargs)
        if self.quantization_config.extra_fields.get("quantize_activations"):
            raise ConfigError(
                "config.json sets quantize_activations: MLX then quantizes inputs too, by an arithmetic of its GPU kernels that "
                "anybit does not have. Remove the key to run the same weights with inputs as they are"
            )

    def skipped_modules(self) -> Sequence[str] | None:
        config = self.quantization_config
        if config.mode is None:
            return super().skipped_modules()
        # MLX quantizes output layers, embeddings and tied weights too
        return [name for name, value in config.extra_fields.items() if value is False]

    # --- reading ---

    def other_names(self, stored: str) -> Sequence[str]:
        # all experts under one name:  mlp.switch_mlp.up_proj.scales -> mlp.experts.*.up_proj.scales
        head, found, tail = stored.rpartition(".switch_mlp.")
        own, _, relative = tail.partition(".")
        return [f"{head}.experts.*.{name}.{relative}" for name in EXPERTS.get(own, ())] if found else []

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        weight = stored.get("weight")
        if not {"scales", "biases", "qbiases"} & set(stored) and getattr(weight, "dtype", None) != "uint32":
            return None
        config = self.quantization_config
        scales = stored.get("scales")
        scale_dtype = scales.dtype if scales is not None and scales.dtype in SCALES else "float16"
        if config.mode is None:
            return layouts.MetalLayout(module.shape, module.dtype, config.bits, config.group_size, scale_dtype)
        name = next((info.name for info in stored.values()), "").rpartition(".")[0]
        named = config.of_module(name) or config.of_module(module.name)
        settings = named or _settings_of(module.shape[-1], weight, scales)
        usual = Settings(config.bits, config.group_size, config.mode)
        if named is None and settings is not None and settings != usual:
            self.decide(f"tensors say {tuple(settings)}, the configuration {tuple(usual)}: tensors count", module.name)
        return _mlx_layout(module, settings or usual, scale_dtype)

    # --- creating ---

    def model_config(self, config: dict[str, Any]) -> dict[str, Any]:
        made = super().model_config(config)
        # MLX reads this key, and writes the other for those who look for it
        return made if self.quantization_config.mode is None else {**made, "quantization": made["quantization_config"]}

    def file_metadata(self, layouts: Mapping[str, Layout], names: Iterable[str]) -> dict[str, str]:
        return {"format": "pt" if self.quantization_config.mode is None else "mlx"}

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if not self.should_convert(module):
            return None
        config = self.quantization_config
        reason = self._stays_dense(module)
        if reason is not None:
            self.skip_reasons[module.name] = reason
            return None
        dtype = module.dtype if module.dtype in SCALES else "float32"
        if config.mode is None:
            return layouts.MetalLayout(module.shape, module.dtype, config.bits, config.group_size, dtype)
        settings = config.of_module(module.name) or Settings(config.bits, config.group_size, config.mode)
        return _mlx_layout(module, settings, dtype)

    def _stays_dense(self, module: ModuleInfo) -> str | None:
        config = self.quantization_config
        kinds = ("linear",) if config.mode is None else ("linear", "embedding")
        if module.kind not in kinds:
            return f"{'Metal' if config.mode is None else 'MLX'} has no form for a {module.class_name} ({module.kind})"
        settings = config.of_module(module.name)
        size, bits = (settings.group_size, settings.bits) if settings else (config.group_size, config.bits)
        if module.shape[-1] % size or module.shape[-1] * bits % 32:
            return f"its {module.shape[-1]} inputs are no multiple of groups of {size} in 32-bit words"
        return None


# dtypes of scales and offsets; uint8 scales are E8M0 or E4M3
SCALES = ("float16", "bfloat16", "float32")


def _settings_of(columns: int, weight: Any, scales: Any) -> Settings | None:
    """What the shapes and dtypes of a module's tensors say, as MLX reads them; None if they make no sense."""
    if weight is None or scales is None or not weight.shape or not scales.shape or not scales.shape[-1]:
        return None
    bits, rest = divmod(weight.shape[-1] * 32, columns)
    group_size, short = divmod(columns, scales.shape[-1])
    if rest or short:
        return None
    modes = ("affine",) if scales.dtype != "uint8" else ("nvfp4", "mxfp4", "mxfp8")
    for mode in modes:
        if bits in BITS[mode] and group_size in GROUPS[mode]:
            return Settings(bits, group_size, mode)
    return None


def _mlx_layout(module: ModuleInfo, settings: Settings, scale_dtype: str) -> Layout:
    if settings.mode == "affine":
        return layouts.MetalLayout(
            module.shape, module.dtype, settings.bits, settings.group_size, scale_dtype, offsets="biases"
        )
    return layouts.MlxFloatLayout(module.shape, module.dtype, settings.bits, settings.group_size, settings.mode)
