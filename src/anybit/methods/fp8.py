"""Fine-grained FP8. E4M3 codes with a scale for each block of rows and columns, or for the whole matrix.

Stored: weight float8_e4m3fn [out, in], weight_scale_inv (also named scale or qscale_weight) float32, float8_e8m0fnu or E8M0 bytes
[ceil(out/rows), ceil(in/columns)] or a scalar, activation_scale float32 for static inputs, bias [out]. In spite of its name
weight_scale_inv is multiplied. Experts with expert_dtype "fp4": int8 [out, in/2], low nibble first, and scales [out, in/32].
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from anybit.errors import CalibrationNeeded
from anybit.methods._float_evidence import (
    FLOATS,
    MX,
    POWERS,
    WHOLE,
    Reading,
    contradiction,
    first_stored,
    missing,
    nvfp4_layout,
    read_scale,
)
from anybit.methods._fp8_layouts import Fp4ExpertLayout, Fp8Layout, fp8_without_config
from anybit.methods._scaled_floats import Inputs, Spec
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin, method_of
from anybit.quantizers.matching import matching_pattern
from anybit.quantizers.options import check_choice, check_flags, check_names, check_type, refuse
from anybit.quantizers.registry import register_quantization_config, register_quantizer
from anybit.weight.layout import Layout, ModuleInfo

# what a file of these methods means when it says nothing
FILE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"mxfp8": {"weight_block_size": [1, 32], "scale_fmt": "ue8m0"}}


@register_quantization_config("fp8")
@dataclass(eq=False, repr=False)
class FineGrainedFP8Config(QuantizationConfigMixin):
    """`weight_block_size` is (rows, columns), None for one scale per matrix. Also the configuration of "mxfp8"."""

    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] | list[int] | None = (128, 128)
    dequantize: bool = False
    modules_to_not_convert: list[str] | None = None
    modules_to_convert: list[str] | None = None
    scale_fmt: str = "float"
    expert_dtype: str = "fp8"
    ignored_layers: list[str] | None = None  # MiniMax's name of modules_to_not_convert
    quant_method: str = "fp8"

    method: ClassVar[str] = "fp8"
    loading_attributes: ClassVar[tuple[str, ...]] = ("dequantize", "modules_to_not_convert")
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fp8": {},
        "fp8-ue8m0": {"scale_fmt": "ue8m0"},
        "fp8-tensor": {"weight_block_size": None},
        "mxfp8": {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
    }

    def __post_init__(self) -> None:
        ignored, method = self.__dict__.pop("ignored_layers", None), self.quant_method
        if self.modules_to_not_convert is None:
            self.modules_to_not_convert = ignored
        super().__post_init__()
        self.quant_method = method_of(method)

    def post_init(self) -> None:
        check_type(self, "activation_scheme", str)
        self.activation_scheme = self.activation_scheme.lower()
        check_choice(self, "activation_scheme", ("dynamic", "static"))
        check_type(self, "weight_block_size", tuple, list, None)
        block = self.weight_block_size
        if block is not None and (len(block) != 2 or not all(type(size) is int and size > 0 for size in block)):
            raise refuse(self, "weight_block_size", "it must be two positive whole numbers, rows and columns, or null")
        check_choice(self, "scale_fmt", ("float", "ue8m0"))
        check_choice(self, "expert_dtype", ("fp8", "fp4"))
        check_flags(self, "dequantize")
        check_names(self, "modules_to_not_convert")
        check_names(self, "modules_to_convert")

    @classmethod
    def found_in(cls, folder: Path, model_config: Mapping[str, Any]) -> dict[str, Any] | None:
        return super().found_in(folder, model_config) or fp8_without_config(folder)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        found = super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        config = found[0] if return_unused_kwargs else found
        if "ignored_layers" in config_dict:  # written back under the name the file has
            config.extra_fields["ignored_layers"] = copy.deepcopy(config_dict["ignored_layers"])
        return found

    @classmethod
    def modernize(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        return {**FILE_DEFAULTS.get(str(config_dict.get("quant_method")), {}), **config_dict}

    @classmethod
    def in_context(cls, config_dict: dict[str, Any], model_config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        outside = model_config.get("expert_dtype")  # DeepSeek-V4 keeps it beside quantization_config
        return {"expert_dtype": outside, **config_dict} if outside is not None else config_dict


# --- quantizer -----------------------------------------------------------------------------------------------------------

# a linear's scale, and that of a stack of experts that is a parameter of its own
SCALE_NAMES = {"weight": ("weight_scale_inv", "scale", "qscale_weight", "weight_scale"), "": ("_scale_inv", "_scale")}
INPUT_SCALES = {"weight": ("activation_scale", "input_scale"), "": ("_activation_scale",)}
EXPERT = re.compile(r"\.experts\.\d+\.")


@register_quantizer("fp8")
class FineGrainedFP8HfQuantizer(HfQuantizer):
    """Layouts of fine-grained FP8 and of MXFP8. The tensors decide which; the plan says where the configuration differs."""

    layouts_available = True
    default_algorithm = "minifloat"

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale; (0, 0) for all of a matrix."""
        block = self.quantization_config.weight_block_size
        return (block[0], block[1]) if block is not None else WHOLE

    # --- reading ---

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        own = "" if module.kind == "experts" else "weight"
        info = stored.get(own)
        if info is None or info.dtype not in ("float8_e4m3fn", "int8", "uint8"):
            return None
        name = first_stored(stored, SCALE_NAMES[own])
        if name is None:
            raise missing(module, SCALE_NAMES[own][0], f"{info.name!r} is {info.dtype} and has no meaning without it")
        foreign = nvfp4_layout(module, stored)
        if foreign is not None:
            self.decide(
                f"stored as {type(foreign).__name__} although quant_method is {self.method_name!r}", module.name
            )
            return foreign
        if info.dtype != "float8_e4m3fn":
            return self._fp4(module, stored, own, name)
        reading = read_scale(module, stored[name], self.block)
        if reading is None or stored[name].dtype not in (*POWERS, *FLOATS):
            raise contradiction(module, stored, (own, name), f"E4M3 with blocks of {list(self.block)}")
        if not reading.as_expected:
            expected = self.quantization_config.weight_block_size
            self.decide(f"{reading}, told from its shape; weight_block_size is {expected}", module.name)
        inputs, unused = self._inputs(module, stored, own, reading)
        return Fp8Layout(
            module.shape, module.dtype, block=reading.block, weight_name=own, scale_name=name,
            scale_dtype=stored[name].dtype, scale_form=reading.form, inputs=inputs, unused=unused,
            powers=stored[name].dtype in POWERS,
        )  # fmt: skip

    def _fp4(self, module: ModuleInfo, stored: Mapping[str, Any], own: str, name: str) -> Layout:
        scale = stored[name]
        reading = read_scale(module, scale, MX) if scale.dtype in POWERS else None
        if reading is None or reading.block != MX:
            raise contradiction(module, stored, (own, name), "FP4 experts (int8 [out, in/2], E8M0 [out, in/32])")
        if self.quantization_config.expert_dtype != "fp4":
            self.decide("FP4 experts, told from dtype and shape; expert_dtype is not 'fp4'", module.name)
        return Fp4ExpertLayout(
            module.shape, module.dtype, weight_name=own, weight_dtype=stored[own].dtype, scale_name=name,
            scale_dtype=scale.dtype, inputs=self._mx_inputs(module, stored, own),
        )  # fmt: skip

    def _mx_inputs(self, module: ModuleInfo, stored: Mapping[str, Any], own: str) -> Inputs | None:
        static = first_stored(stored, INPUT_SCALES[own])
        if static is not None:
            raise contradiction(
                module, stored, (own, static), "weights in groups of 32, whose inputs have no stored scale"
            )
        return None if module.kind == "embedding" else Inputs("mx_e4m3", granularity="group", group_size=MX[1])

    def _inputs(
        self, module: ModuleInfo, stored: Mapping[str, Any], own: str, reading: Reading
    ) -> tuple[Inputs | None, tuple[Spec, ...]]:
        """What happens to the input, and stored scales that have no part in it."""
        if stored[own].dtype == "float8_e4m3fn" and reading.block == MX:
            return self._mx_inputs(module, stored, own), ()
        name = first_stored(stored, INPUT_SCALES[own])
        static: tuple[Spec, ...] = ()
        if name is not None:
            info = stored[name]
            lead = module.shape[:-2]
            shapes = [tuple(lead), (*lead, 1), (*lead, 1, 1)]
            shape = tuple(info.shape) if tuple(info.shape) in shapes else shapes[0]
            static = ((name, info.dtype if info.dtype in FLOATS else FLOATS[0], shape),)
        elif self.quantization_config.activation_scheme == "static" and module.kind != "embedding":
            raise missing(module, INPUT_SCALES[own][0], "activation_scheme is 'static'")
        if module.kind == "embedding":
            return None, static
        # transformers' kernel for one scale per matrix measures every token, whatever activation_scale says; input_scale is the
        # name that other engines' files have, and they use it
        used = name == "input_scale" or reading.block != WHOLE
        if static and used and self.quantization_config.activation_scheme == "static":
            return Inputs("e4m3_static", granularity="tensor", stored=static, stacked=len(module.shape) == 3), ()
        if static:
            self.decide(
                f"{name} is kept but not used: inputs are measured for each token, as transformers does where a weight has one "
                "scale, and where activation_scheme is not 'static'",
                module.name,
            )
        return self._dynamic(reading.block, module.shape[-1]), static

    def _dynamic(self, block: tuple[int, int], columns: int) -> Inputs:
        across = block[1]
        if not across or across >= columns:
            return Inputs("e4m3_token")
        return Inputs("e4m3_group", granularity="group", group_size=across)

    # --- creating ---

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        config = self.quantization_config
        pattern = matching_pattern(module.name, self.modules_to_not_convert)
        if pattern is not None:
            self.skip_reasons.setdefault(module.name, f"{pattern!r} is among the modules not to convert")
        if not self.should_convert(module):
            return None
        if module.kind == "embedding":
            return self._embedding_for(module)
        if module.kind == "conv1d":
            self.skip_reasons[module.name] = "fine-grained FP8 quantizes linear layers and experts, not a Conv1D"
            return None
        if config.activation_scheme == "static":
            raise CalibrationNeeded(
                f"{module.name}: static input scales are measured on data; use activation_scheme='dynamic'"
            )
        own = "" if module.kind == "experts" else "weight"
        powers, columns = config.scale_fmt == "ue8m0", module.shape[-1]
        scale_name = SCALE_NAMES[own][0]
        if config.expert_dtype == "fp4" and (module.kind == "experts" or EXPERT.search(module.name)):
            if columns % MX[1]:
                self.skip_reasons[module.name] = f"FP4 experts have groups of {MX[1]} inputs; {columns} is no multiple"
                return None
            return Fp4ExpertLayout(
                module.shape,
                module.dtype,
                weight_name=own,
                scale_name=scale_name,
                inputs=self._mx_inputs(module, {}, own),
            )
        if self.block == MX and columns % MX[1]:
            self.skip_reasons[module.name] = f"MXFP8 has groups of {MX[1]} inputs; {columns} is no multiple"
            return None
        mx = self.block == MX and powers
        return Fp8Layout(
            module.shape, module.dtype, block=self.block, weight_name=own, scale_name=scale_name,
            scale_dtype="float8_e8m0fnu" if powers else "float32", scale_form="scalar" if self.block == WHOLE else "grid",
            inputs=self._mx_inputs(module, {}, own) if mx else self._dynamic(self.block, columns), powers=powers,
        )  # fmt: skip

    def _embedding_for(self, module: ModuleInfo) -> Layout | None:
        chosen = self.quantization_config.modules_to_convert or []
        if not any(module.name.endswith(name) for name in chosen):
            self.skip_reasons[module.name] = "embeddings are quantized only if modules_to_convert names them"
            return None
        return Fp8Layout(module.shape, module.dtype, block=WHOLE, scale_name="weight_scale", scale_form="flat")
