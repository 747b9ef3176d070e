"""GPTQ. Columns share a scale and a zero point per group; with act-order, `g_idx` names the group of each column.

Stored: qweight int32 [in*bits/32, out], qzeros int32 [groups, out*bits/32], scales [groups, out], g_idx int32 [in].
Zero points: `gptq_v2` and `gptq_p` store z, `gptq` (v1) stores z - 1. The writers disagree on v1's z = 0 (`_read_zeros`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import LazyModule
from anybit.errors import (
    ConfigError,
    NotRepresentable,
    ShapeMismatch,
)
from anybit.methods._per_module import (
    Settings,
    check_dynamic,
    check_stored,
    refuse_calibration,
    settings_of,
    stays_dense,
    with_dynamic,
)
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_group_size, check_type, listed, refuse
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _gptq_evidence as evidence
    from anybit.methods import _gptq_layout as layouts
    from anybit.weight.layout import Layout, ModuleInfo
else:  # needed for tensors, not to select the backend
    evidence, layouts = LazyModule("anybit.methods._gptq_evidence"), LazyModule("anybit.methods._gptq_layout")

# transformers takes 2, 3, 4 and 8; gptqmodel also writes 5, 6 and 7 (planar)
BITS = (2, 3, 4, 5, 6, 7, 8)
DATASETS = ("wikitext2", "c4", "c4-new")
FORMATS = ("gptq", "gptq_v2", "gptq_p")
# run-time repackings that old files name as their method
REPACKED = ("marlin", "bitblas")


@register_quantization_config("gptq")
@dataclass(eq=False, repr=False)
class GPTQConfig(QuantizationConfigMixin):
    """`bits` and `group_size` of the stored codes; the other options tell how they were, or are to be, chosen."""

    bits: int
    tokenizer: Any = None
    dataset: list[str] | str | None = None
    group_size: int = 128
    damp_percent: float = 0.1
    desc_act: bool = False
    act_group_aware: bool = True
    sym: bool = True
    true_sequential: bool = True
    format: str = "gptq"
    meta: dict[str, Any] | None = None
    backend: str | None = None
    model_seqlen: int | None = None
    block_name_to_quantize: str | None = None
    module_name_preceding_first_block: list[str] | None = None
    batch_size: int = 1
    pad_token_id: int | None = None
    max_input_length: int | None = None
    cache_block_outputs: bool = True
    modules_in_block_to_quantize: list[list[str]] | None = None
    checkpoint_format: str | None = None
    dynamic: dict[str, dict[str, Any]] | None = None

    method: ClassVar[str] = "gptq"
    aliases: ClassVar[Mapping[str, str]] = {"w_bit": "bits", "wbits": "bits", "q_group_size": "group_size"}
    side_files: ClassVar[tuple[str, ...]] = ("quantize_config.json",)
    loading_attributes: ClassVar[tuple[str, ...]] = ("max_input_length", "backend")
    optional: ClassVar[tuple[str, ...]] = ("dynamic",)
    targets: ClassVar[tuple[str, ...]] = ("transformers", "vllm")
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"gptq-{bits}bit-g{group_size}": {"bits": bits, "group_size": group_size}
        for bits in (2, 3, 4, 8)
        for group_size in (32, 64, 128)
    }

    def __post_init__(self) -> None:
        checkpoint_format = self.__dict__.pop("checkpoint_format", None)  # the older name of `format` wins
        self.format = checkpoint_format if checkpoint_format is not None else self.format
        super().__post_init__()

    def post_init(self) -> None:
        check_choice(self, "bits", BITS)
        check_group_size(self)
        if not (isinstance(self.damp_percent, (int, float)) and 0 < self.damp_percent < 1):
            raise refuse(self, "damp_percent", "it must lie between 0 and 1")
        if isinstance(self.dataset, str):
            check_choice(self, "dataset", DATASETS)
        check_type(self, "dataset", str, list, None)
        check_type(self, "format", str)
        self.format = self.format.lower()
        self.backend = self.backend.lower() if isinstance(self.backend, str) else self.backend or "auto"
        if self.desc_act:
            self.act_group_aware = False  # they exclude each other
        check_dynamic(self)

    def per_module(self, settings: Mapping[str, QuantizationConfigMixin | None]) -> QuantizationConfigMixin:
        return with_dynamic(self, settings)

    @property
    def symmetric(self) -> bool:
        """Whether zero points lie in the middle of the codes."""
        return bool(self.sym)

    @classmethod
    def recognizes(cls, config_dict: Mapping[str, Any]) -> bool:
        if config_dict.get("quant_method") is not None:
            return config_dict["quant_method"] in REPACKED
        if {"zero_point", "version"} & set(config_dict):
            return False
        return any(name in config_dict for name in ("bits", "w_bit", "wbits")) and bool(
            {"desc_act", "damp_percent", "sym", "true_sequential"} & set(config_dict)
        )

    @classmethod
    def modernize(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        repacked = config_dict.get("quant_method")
        if repacked in REPACKED:
            config_dict.setdefault("checkpoint_format", repacked)
        # optional settings that tools write as null mean the default
        for name in ("damp_percent", "act_group_aware", "format", "group_size", "sym", "desc_act", "true_sequential"):
            if name in config_dict and config_dict[name] is None:
                del config_dict[name]
        return _without_foreign_dataset(config_dict)

    def own_dict(self) -> dict[str, Any]:
        tokenizer = self.tokenizer if isinstance(self.tokenizer, str) else getattr(self.tokenizer, "name_or_path", None)
        kept = {name: value for name, value in self.__dict__.items() if name not in ("tokenizer", "extra_fields")}
        own = {name: value for name, value in kept.items() if value is not None or name not in self.optional}
        return {**copy.deepcopy(own), "tokenizer": tokenizer, "checkpoint_format": self.format}

    def to_dict_optimum(self) -> dict[str, Any]:
        """The dictionary optimum expects; the same."""
        return self.to_dict()

    @classmethod
    def from_dict_optimum(cls, config_dict: Mapping[str, Any]) -> Any:
        """From optimum's dictionary; the same."""
        return cls.from_dict(config_dict)


def _without_foreign_dataset(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A finished checkpoint may name any calibration set; only a choice to be run is checked."""
    if isinstance(config_dict.get("dataset"), str) and config_dict["dataset"] not in DATASETS:
        config_dict["dataset"] = [config_dict["dataset"]]
    return config_dict


# --- quantizer -----------------------------------------------------------------------------------------------------------


@register_quantizer("gptq")
class GptqHfQuantizer(HfQuantizer):
    """GPTQ's layouts. From a dense checkpoint, without calibration data, codes are rounded to nearest."""

    layouts_available = True
    default_algorithm = "rtn"
    calibrated_algorithm = "gptq"

    def calibration_options(self) -> dict[str, Any]:
        config = self.quantization_config
        order = "columns" if config.desc_act else "groups" if config.act_group_aware else "natural"
        return {"damp": config.damp_percent, "order": order}

    def calibration_size(self) -> tuple[int | None, int | None]:
        return None, self.quantization_config.model_seqlen

    def __init__(self, quantization_config: QuantizationConfigMixin, *, pre_quantized: bool = True, **kwargs: Any):
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)
        if not pre_quantized:
            refuse_calibration(self.quantization_config)

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        super().validate_environment(*args, device_map=device_map, **kwargs)
        config = self.quantization_config
        if config.format in REPACKED or config.extra_fields.get("is_marlin_format"):
            name = config.format if config.format in REPACKED else "marlin"
            raise ConfigError(
                f"the checkpoint's configuration names the format {name!r} (checkpoint_format or is_marlin_format): its weights "
                "are rearranged for one GPU kernel. Use the original GPTQ checkpoint, of which such files are copies"
            )
        if config.format not in FORMATS:
            raise refuse(config, "format", f"it must be {listed(FORMATS)}")

    def begin(self, model: Any, slots: Sequence[Any]) -> None:
        super().begin(model, slots)
        config = self.quantization_config
        if self.pre_quantized:
            return
        if config.extra_fields.get("lm_head") is True and hasattr(model, "get_output_embeddings"):
            output = model.get_output_embeddings()
            tied = getattr(model, "all_tied_weights_keys", None) or {}
            for name, module in model.named_modules():
                if module is output and f"{name}.weight" not in {*tied, *dict(tied).values()}:
                    self.skip_reasons.pop(name, None)
                    self.output_layer = name
        from anybit import __version__

        # readers decide by the maker what a v1 zero point of 0 looks like
        config.meta = {**(config.meta or {}), "quantizer": [f"anybit:{__version__}"]}

    output_layer: str | None = None

    # --- reading ---

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        if {"B", "s"} <= set(stored):
            raise NotRepresentable(
                f"{module.name} stores B and s, Marlin's rearranged form; use the original GPTQ checkpoint"
            )
        if not {"qweight", "qzeros", "scales"} & set(stored):
            return None
        settings, config = self._settings(module), self.quantization_config
        columns = module.shape[1]
        dtype = getattr(stored.get("scales"), "dtype", None)
        layout = layouts.GptqLayout(
            module.shape,
            module.dtype,
            bits=settings.bits,
            group_size=columns if settings.group_size == -1 else settings.group_size,
            scale_dtype=dtype if dtype in ("float16", "bfloat16", "float32") else "float16",
            planar=evidence.is_planar(settings),
            index="absent",
            symmetric=settings.symmetric,
            zero_bias=stored["bias"].dtype if "bias" in stored else None,
        )
        check_stored(module, stored, settings, layout.specs(), evidence.resemblance(stored, *module.shape))
        if "bias" in stored and bool(peek("bias").any()):
            raise ShapeMismatch(
                f"tensor '{module.name}.bias' holds numbers, but the model's {module.class_name} has no bias"
            )
        index = evidence.index_kind(config, module, settings, stored, peek, layout.group_size)
        zeros = evidence.zero_convention(config, module, settings, peek)
        if index == "unused":
            self.decide("g_idx is all zero and desc_act is false: groups are runs of columns", module.name)
        if zeros == "v1_unmasked":
            self.decide("zero points are read as AutoGPTQ computes them, stored + 1 up to 2**bits", module.name)
        if layout.zero_bias is not None:
            self.decide("a bias of zeros is stored for a layer that has none, and kept", module.name)
        return replace(layout, index=index, zeros=zeros)

    def _settings(self, module: ModuleInfo) -> Settings:
        settings = settings_of(self.quantization_config, module.name)
        if settings is None:
            raise ShapeMismatch(
                f"{module.name} is stored packed, but the configuration's 'dynamic' says that it stays dense"
            )
        if module.kind not in ("linear", "conv1d"):
            raise NotRepresentable(
                f"{module.name} is a packed {module.kind}; GPTQ's layout of linear layers does not describe it"
            )
        return settings

    # --- creating ---

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if not self.should_convert(module):
            return None
        settings = settings_of(self.quantization_config, module.name)
        reason = self._stays_dense(module, settings)
        if settings is None or reason is not None:
            self.skip_reasons[module.name] = reason or "the configuration's 'dynamic' leaves it dense"
            return None
        group_size = module.shape[1] if settings.group_size == -1 else settings.group_size
        return layouts.GptqLayout(
            module.shape,
            module.dtype,
            bits=settings.bits,
            group_size=group_size,
            zeros="v1" if settings.format == "gptq" else "v2",
            planar=evidence.is_planar(settings),
            symmetric=settings.symmetric,
        )

    def _stays_dense(self, module: ModuleInfo, settings: Settings | None) -> str | None:
        config = self.quantization_config
        block, chosen = config.block_name_to_quantize, config.modules_in_block_to_quantize
        if module.name != self.output_layer:
            reason = stays_dense(module)
            if reason is not None:
                return reason
            if block is not None and not module.name.startswith(f"{block}."):
                return f"it lies outside {block!r}, the configuration's block_name_to_quantize"
            if chosen is not None and not any(module.name.endswith(f".{name}") for names in chosen for name in names):
                return "it is not among the configuration's modules_in_block_to_quantize"
        if any(size % 32 for size in module.shape):
            return f"GPTQ packs 32 rows and columns together, its shape is {module.shape}"
        return None
