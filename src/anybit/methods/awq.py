"""AWQ. Groups of weights along the input share a scale and a zero point; four arrangements of the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import LazyModule
from anybit.errors import InvalidOption, NotRepresentable, ShapeMismatch
from anybit.methods._per_module import (
    Settings,
    check_dynamic,
    check_stored,
    refuse_calibration,
    settings_of,
    stays_dense,
)
from anybit.methods.gptq import BITS, GPTQConfig
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_group_size, check_names, check_type
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _awq_activation as activation
    from anybit.methods import _awq_layout as layouts
    from anybit.methods import _words as words
    from anybit.weight.layout import Layout, ModuleInfo
else:  # needed for tensors, not to select the backend
    layouts, words = LazyModule("anybit.methods._awq_layout"), LazyModule("anybit.methods._words")
    activation = LazyModule("anybit.methods._awq_activation")


class AwqFormat(str, Enum):
    """How the tensors are arranged."""

    GEMM = "gemm"
    GEMV = "gemv"
    GEMV_FAST = "gemv_fast"
    LLM_AWQ = "llm-awq"


class AwqBackend(str, Enum):
    """Kernels of transformers' loader; kept, and without influence here."""

    LEGACY_AWQ = "autoawq"
    AUTO = "auto"
    AUTO_TRAINABLE = "auto_trainable"
    MACHETE = "machete"
    MARLIN = "marlin"
    EXLLAMA_V2 = "exllama_v2"
    EXLLAMA_V1 = "exllama_v1"
    GEMM = "gemm"
    GEMM_TRITON = "gemm_triton"
    GEMV = "gemv"
    GEMV_FAST = "gemv_fast"
    TORCH_AWQ = "torch_awq"
    TORCH_FUSED_AWQ = "torch_fused_awq"


@register_quantization_config("awq")
class AwqConfig(GPTQConfig):
    """`version` is the older name of `format`; a backend of "llm-awq" means that format. Other options are GPTQConfig's."""

    method: ClassVar[str] = "awq"
    side_files: ClassVar[tuple[str, ...]] = ("quant_config.json", "quantize_config.json")
    optional: ClassVar[tuple[str, ...]] = ("dynamic", "checkpoint_format")
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"awq-4bit-g{group_size}": {"bits": 4, "group_size": group_size} for group_size in (32, 64, 128)
    }

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        zero_point: bool = True,
        backend: AwqBackend | str = AwqBackend.AUTO,
        modules_to_not_convert: list[str] | None = None,
        *,
        version: str | None = None,
        format: AwqFormat | str = AwqFormat.GEMM,
        checkpoint_format: str | None = None,
        **options: Any,
    ):
        self.zero_point = zero_point
        self.modules_to_not_convert = modules_to_not_convert
        named = next((name for name in (checkpoint_format, version, format) if name is not None), AwqFormat.GEMM)
        super().__init__(bits=bits, group_size=group_size, backend=backend, format=named, **options)
        self.checkpoint_format = self.format if checkpoint_format is not None else None

    def post_init(self) -> None:
        for name in ("backend", "format"):
            value = getattr(getattr(self, name), "value", getattr(self, name))
            setattr(self, name, value.lower() if isinstance(value, str) else value)
        if self.backend in (None, AwqBackend.LEGACY_AWQ.value, "llm-awq"):
            self.format = AwqFormat.LLM_AWQ.value if self.backend == "llm-awq" else self.format
            self.backend = AwqBackend.AUTO.value
        check_choice(self, "bits", BITS)
        check_group_size(self)
        check_type(self, "zero_point", bool)
        check_names(self, "modules_to_not_convert")
        check_choice(self, "format", [form.value for form in AwqFormat])
        check_choice(self, "backend", [backend.value for backend in AwqBackend])
        check_dynamic(self)
        if self.bits != 4 and self.format != AwqFormat.GEMM.value:
            raise InvalidOption(
                f"AwqConfig: bits is {self.bits}, but the format {self.format!r} holds 4 bits; choose 'gemm'"
            )

    @property
    def symmetric(self) -> bool:
        return not self.zero_point

    @classmethod
    def recognizes(cls, config_dict: Mapping[str, Any]) -> bool:
        width = {"bits", "w_bit"} & set(config_dict)
        return config_dict.get("quant_method") is None and "zero_point" in config_dict and bool(width)

    @classmethod
    def modernize(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        if config_dict.get("zero_point") is None:
            config_dict.pop("zero_point", None)
        return super().modernize(config_dict)

    def own_dict(self) -> dict[str, Any]:
        own = {**super().own_dict(), "version": self.format}
        if self.checkpoint_format is None:
            del own["checkpoint_format"]
        return own


# --- quantizer -----------------------------------------------------------------------------------------------------------

# the layout of each format and what rows and columns must be multiples of
LAYOUTS: Mapping[str, tuple[str, int, int]] = {
    "gemm": ("AwqGemmLayout", 8, 1),
    "gemv": ("AwqGemvLayout", 1, 32),
    "gemv_fast": ("AwqGemvFastLayout", 4, 64),
    "llm-awq": ("AwqGemvFastLayout", 4, 64),
}


@register_quantizer("awq")
class AwqQuantizer(HfQuantizer):
    """AWQ's layouts. Without calibration data codes are rounded to nearest, without the search for scales and clips."""

    layouts_available = True
    default_algorithm = "rtn"
    calibrated_algorithm = "awq"

    def __init__(self, quantization_config: QuantizationConfigMixin, *, pre_quantized: bool = True, **kwargs: Any):
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)
        if not pre_quantized:
            refuse_calibration(self.quantization_config)

    @staticmethod
    def get_modules_to_not_convert(
        model: Any,
        skip_modules: Sequence[str] | None = None,
        keep_in_fp32_modules: Sequence[str] | None = None,
        add_default_skips: bool = True,
    ) -> list[str]:
        """As in transformers, given names are added to the default ones."""
        return HfQuantizer.get_modules_to_not_convert(model, skip_modules, keep_in_fp32_modules, add_default_skips)

    def attach(self, model: Any, checkpoint: Any, path_of: Callable[[str], str | None]) -> None:
        if self.pre_quantized:
            self.attached, self.folds = activation.attach_scales(model, checkpoint, path_of)

    # --- reading ---

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        if not {"qweight", "qzeros", "scales", "scaled_zeros"} & set(stored):
            return None
        settings = settings_of(self.quantization_config, module.name)
        if settings is None or module.kind not in ("linear", "conv1d"):
            what = (
                f"a packed {module.kind}"
                if settings is not None
                else "packed, but 'dynamic' of the configuration leaves it dense"
            )
            raise NotRepresentable(f"{module.name} is {what}; AWQ's layouts of linear layers do not describe it")
        problem = _obstacle(module, settings)
        if problem is not None:
            raise ShapeMismatch(
                f"{module.name} is stored packed, but {problem}; config.json and tensors contradict each other"
            )
        layout = self._layout(module, settings)
        if "scales" in stored and stored["scales"].dtype in ("float16", "bfloat16", "float32"):
            layout = replace(layout, scale_dtype=stored["scales"].dtype)
        found = _format_of(stored, layout)
        hint = f"the tensors are arranged as {found!r}" if found not in (None, settings.format) else ""
        check_stored(module, stored, settings, layout.specs(), hint)
        return layout

    def _layout(self, module: ModuleInfo, settings: Settings) -> layouts.AwqLayout:
        group_size = module.shape[1] if settings.group_size == -1 else settings.group_size
        cls: type[layouts.AwqLayout] = getattr(layouts, LAYOUTS[settings.format][0])
        layout = cls(module.shape, module.dtype, settings.bits, group_size, symmetric=settings.symmetric)
        if isinstance(layout, layouts.AwqGemmLayout):
            from_auto_round = self.quantization_config.extra_fields.get("provider") == "auto-round"
            return replace(layout, interleaved=settings.bits == 4 or (settings.bits in (5, 6, 7) and from_auto_round))
        if isinstance(layout, layouts.AwqGemvFastLayout) and settings.format == "llm-awq":
            return replace(layout, zeros_name="scaled_zeros")
        return layout

    # --- creating ---

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if not self.should_convert(module):
            return None
        settings = settings_of(self.quantization_config, module.name)
        reason = stays_dense(module) or ("the configuration's 'dynamic' leaves it dense" if settings is None else None)
        reason = reason or _obstacle(module, settings)  # type: ignore[arg-type]
        if settings is None or reason is not None:
            self.skip_reasons[module.name] = str(reason)
            return None
        return self._layout(module, settings)


def _obstacle(module: ModuleInfo, settings: Settings) -> str | None:
    """Why no weight of this shape can have these settings."""
    rows, columns = module.shape
    _, row_step, column_step = LAYOUTS[settings.format]
    group_size = columns if settings.group_size == -1 else settings.group_size
    if columns % group_size:
        return f"its {columns} inputs are no whole number of groups of {group_size}"
    if rows % row_step or columns % column_step:
        return (
            f"{settings.format} packs {row_step} outputs and {column_step} inputs together, its shape is {module.shape}"
        )
    if settings.format != "gemm" and group_size < 128 and group_size not in (16, 32, 64):
        return f"{settings.format} has groups of 16, 32, 64 or at least 128 inputs, not {group_size}"
    return None


def _format_of(stored: Mapping[str, Any], layout: layouts.AwqLayout) -> str | None:
    """The format that the tensors themselves show, if they show one."""
    rows, columns = layout.shape
    dtype, shape = getattr(stored.get("qweight"), "dtype", None), getattr(stored.get("qweight"), "shape", ())
    scales = tuple(getattr(stored.get("scales"), "shape", ()))
    if dtype == "int16":
        return "llm-awq" if "scaled_zeros" in stored else "gemv_fast"
    if dtype == "int32" and tuple(shape) == (columns, words.word_count(rows, layout.bits)) and scales[1:] == (rows,):
        return "gemm"
    if dtype == "int32" and tuple(shape) == (rows, columns // 8) and scales[:1] == (rows,):
        return "gemv"
    return None
