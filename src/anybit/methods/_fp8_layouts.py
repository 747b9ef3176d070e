"""Fine-grained FP8: its layouts, the rules their scales are found by, and which layout a module has or gets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.algorithms import minifloat
from anybit.errors import NotRepresentable
from anybit.methods._activations import TOP
from anybit.methods._float_evidence import (
    FLOATS,
    MX,
    POWERS,
    WHOLE,
    Block,
    Reading,
    contradiction,
    first_stored,
    missing,
    nvfp4_layout,
    read_scale,
)
from anybit.methods._scaled_floats import Inputs, ScaledFloatLayout, Spec
from anybit.weight.layout import Layout, ModuleInfo

if TYPE_CHECKING:
    from torch import Tensor

# a linear's scale, and that of a stack of experts that is a parameter of its own
SCALE_NAMES = {"weight": ("weight_scale_inv", "scale", "qscale_weight", "weight_scale"), "": ("_scale_inv", "_scale")}
INPUT_SCALES = {"weight": ("activation_scale", "input_scale"), "": ("_activation_scale",)}
EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Fp8Layout(ScaledFloatLayout):
    """E4M3 codes and a multiplier for each block. `powers`: multipliers are powers of two when they are made."""

    scale_name: str = "weight_scale_inv"
    powers: bool = False

    def scales(self, largest: Tensor) -> minifloat.Scales:
        """f = 448 / max, multiplied by; 1 / f is stored. Powers of two are rounded up."""
        factor = TOP / torch.where(largest > 0, largest, TOP)
        if self.powers:
            exponents = torch.ceil(
                torch.log2(1.0 / factor)
            )  # as transformers: of the rounded logarithm, not of the bits
            inverse = minifloat.e8m0_numbers((exponents + 127).clamp(1, 254).to(torch.uint8))
            return minifloat.Scales(inverse, factor=1.0 / inverse)
        return minifloat.Scales(1.0 / factor, factor=factor)


@dataclass(frozen=True)
class Fp4ExpertLayout(ScaledFloatLayout):
    """DeepSeek-V4's experts: E2M1 codes and a power of two for each 32 inputs."""

    levels: str = "e2m1"
    block: Block = MX
    weight_dtype: str = "int8"
    scale_name: str = "weight_scale_inv"
    scale_dtype: str = "float8_e8m0fnu"

    def scales(self, largest: Tensor) -> minifloat.Scales:
        """The smallest power of two under which nothing is clipped; 1 for an empty block."""
        exponents = minifloat.e8m0(largest / 6.0, "ceil").masked_fill(largest == 0, 127)
        return minifloat.Scales(minifloat.e8m0_numbers(exponents))


def block_of(config: Any) -> Block:
    """Rows and columns that share a scale; (0, 0) for all of a matrix."""
    block = config.weight_block_size
    return (block[0], block[1]) if block is not None else WHOLE


# --- reading ---------------------------------------------------------------------------------------------------------------


def layout_of(quantizer: Any, module: ModuleInfo, stored: Mapping[str, Any]) -> Layout | None:
    """The layout that a module's tensors have; what the configuration does not say becomes a decision of the quantizer."""
    config = quantizer.quantization_config
    own = "" if module.kind == "experts" else "weight"
    info = stored.get(own)
    if info is None or info.dtype not in ("float8_e4m3fn", "int8", "uint8"):
        return None
    name = first_stored(stored, SCALE_NAMES[own])
    if name is None:
        raise missing(module, SCALE_NAMES[own][0], f"{info.name!r} is {info.dtype} and has no meaning without it")
    foreign = nvfp4_layout(module, stored)
    if foreign is not None:
        quantizer.decide(
            f"stored as {type(foreign).__name__} although quant_method is {quantizer.method_name!r}", module.name
        )
        return foreign
    if info.dtype != "float8_e4m3fn":
        return _fp4_of(quantizer, module, stored, own, name)
    reading = read_scale(module, stored[name], block_of(config))
    if reading is None or stored[name].dtype not in (*POWERS, *FLOATS):
        raise contradiction(module, stored, (own, name), f"E4M3 with blocks of {config.weight_block_size}")
    if not reading.as_expected:
        quantizer.decide(
            f"{reading}, told from its shape; weight_block_size is {config.weight_block_size}", module.name
        )
    inputs, unused = _inputs_of(quantizer, module, stored, own, reading)
    return Fp8Layout(
        module.shape, module.dtype, block=reading.block, weight_name=own, scale_name=name,
        scale_dtype=stored[name].dtype, scale_form=reading.form, inputs=inputs, unused=unused,
        powers=stored[name].dtype in POWERS,
    )  # fmt: skip


def _fp4_of(quantizer: Any, module: ModuleInfo, stored: Mapping[str, Any], own: str, name: str) -> Layout:
    scale = stored[name]
    reading = read_scale(module, scale, MX) if scale.dtype in POWERS else None
    if reading is None or reading.block != MX:
        raise contradiction(module, stored, (own, name), "FP4 experts (int8 [out, in/2], E8M0 [out, in/32])")
    if quantizer.quantization_config.expert_dtype != "fp4":
        quantizer.decide("FP4 in groups of 32, told from dtype and shape; expert_dtype is not 'fp4'", module.name)
    return Fp4ExpertLayout(
        module.shape, module.dtype, weight_name=own, weight_dtype=stored[own].dtype, scale_name=name,
        scale_dtype=scale.dtype, inputs=_mx_inputs(module, stored, own),
    )  # fmt: skip


def _mx_inputs(module: ModuleInfo, stored: Mapping[str, Any], own: str) -> Inputs | None:
    static = first_stored(stored, INPUT_SCALES[own])
    if static is not None:
        raise contradiction(module, stored, (own, static), "weights in groups of 32, whose inputs have no stored scale")
    return None if module.kind == "embedding" else Inputs("mx_e4m3", granularity="group", group_size=MX[1])


def _inputs_of(
    quantizer: Any, module: ModuleInfo, stored: Mapping[str, Any], own: str, reading: Reading
) -> tuple[Inputs | None, tuple[Spec, ...]]:
    """What happens to the input, and stored scales that have no part in it."""
    config = quantizer.quantization_config
    scheme, named = config.activation_scheme, "activation_scheme" in config._given
    if reading.block == MX and stored[own].dtype == "float8_e4m3fn":
        return _mx_inputs(module, stored, own), ()
    name = first_stored(stored, INPUT_SCALES[own])
    static: tuple[Spec, ...] = ()
    if name is not None:
        lead, info = module.shape[:-2], stored[name]
        shapes = [tuple(lead), (*lead, 1), (*lead, 1, 1)]
        shape = tuple(info.shape) if tuple(info.shape) in shapes else shapes[0]
        static = ((name, info.dtype if info.dtype in FLOATS else FLOATS[0], shape),)
    elif scheme == "static" and module.kind != "embedding":
        raise missing(module, INPUT_SCALES[own][0], "activation_scheme is 'static'")
    if module.kind == "embedding":
        return None, static
    # transformers' kernel for one scale per matrix measures every token, whatever activation_scheme says; input_scale is the
    # name in other engines' files, and they use it
    foreign = name == "input_scale"
    if static and (reading.block != WHOLE or foreign) and (scheme == "static" or (foreign and not named)):
        return Inputs("e4m3_static", granularity="tensor", stored=static, stacked=len(module.shape) == 3), ()
    if static:
        quantizer.decide(
            f"{name} is kept but not used: inputs are measured for each token, as transformers does where a weight has one "
            "scale, and where activation_scheme is not 'static'",
            module.name,
        )
    return _dynamic(reading.block, module.shape[-1]), static


def _dynamic(block: Block, columns: int) -> Inputs:
    across = block[1]
    if not across or across >= columns:
        return Inputs("e4m3_token")
    return Inputs("e4m3_group", granularity="group", group_size=across)


# --- creating --------------------------------------------------------------------------------------------------------------


def layout_for(quantizer: Any, module: ModuleInfo) -> Layout | None:
    """The layout a dense module gets; None, with the reason among the quantizer's, when it stays dense."""
    config = quantizer.quantization_config
    own = "" if module.kind == "experts" else "weight"
    block, powers, columns = block_of(config), config.scale_fmt == "ue8m0", module.shape[-1]
    fp4 = config.expert_dtype == "fp4" and (module.kind == "experts" or EXPERT.search(module.name))
    reason = _stays_dense(config, module, MX if fp4 else block)
    if reason is not None:
        quantizer.skip_reasons[module.name] = reason
        return None
    if module.kind == "embedding":
        return Fp8Layout(module.shape, module.dtype, block=WHOLE, scale_name="weight_scale", scale_form="flat")
    static = _static(module, block, own) if config.activation_scheme == "static" and not fp4 else None
    scale_name = SCALE_NAMES[own][0]
    if fp4:
        return Fp4ExpertLayout(
            module.shape, module.dtype, weight_name=own, scale_name=scale_name, inputs=_mx_inputs(module, {}, own)
        )
    return Fp8Layout(
        module.shape, module.dtype, block=block, weight_name=own, scale_name=scale_name,
        scale_dtype="float8_e8m0fnu" if powers else "float32", scale_form="scalar" if block == WHOLE else "grid",
        inputs=static or (_mx_inputs(module, {}, own) if block == MX and powers else _dynamic(block, columns)), powers=powers,
    )  # fmt: skip


def _static(module: ModuleInfo, block: Block, own: str) -> Inputs:
    """Inputs under a scale that is measured; NotRepresentable where transformers would not use it."""
    if block in (WHOLE, MX):
        raise NotRepresentable(
            f"{module.name}: activation_scheme is 'static', which transformers' kernels ignore where a weight has one scale, and "
            "refuse for groups of 32. Use blocks such as [128, 128], or ModelOptConfig(quant_algo='FP8'), which stores one scale "
            "of the weight and one of its input"
        )
    lead = tuple(module.shape[:-2])
    stored: tuple[Spec, ...] = ((INPUT_SCALES[own][0], "float32", lead),)
    return Inputs("e4m3_static", granularity="tensor", stored=stored, stacked=bool(lead))


def _stays_dense(config: Any, module: ModuleInfo, block: Block) -> str | None:
    if module.kind == "conv1d":
        return "fine-grained FP8 quantizes linear layers and experts, not a Conv1D"
    if module.kind == "embedding" and not any(module.name.endswith(name) for name in config.modules_to_convert or ()):
        return "embeddings are quantized only if modules_to_convert names them"
    if module.kind != "embedding" and block == MX and module.shape[-1] % MX[1]:
        return f"weights are in groups of {MX[1]} inputs, and {module.shape[-1]} is no multiple"
    return None
