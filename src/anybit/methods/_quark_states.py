"""What Quark does to inputs and outputs of layers, and to keys and values, which are outputs before their rotation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from anybit._lazy import torch
from anybit.algorithms import minifloat
from anybit.errors import CalibrationNeeded, InvalidOption, MissingTensor, ShapeMismatch
from anybit.methods._activations import TOP, finish, groups
from anybit.methods._cache_scales import unchanged
from anybit.methods._kv_cache import RoundedCache, has_cache, straight
from anybit.methods._scaled_floats import Inputs, Spec, require_scale
from anybit.quantizers.attachments import Attachment, attach_after, attach_before
from anybit.quantizers.measurement import Measurement
from anybit.weight.activation import Activation, Product, activation_rule
from anybit.weight.layout import ModuleInfo, join_name
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("float32", "bfloat16", "float16")
# dtype: (levels, exponent of the largest number, rounding of the mode "even")
MX = {"fp4": ("e2m1", 2, "even_1"), "fp6_e2m3": ("e2m3", 2, "even_3"), "fp6_e3m2": ("e3m2", 4, "even_2")}
MODES = ("even", "floor", "ceil")
PROJECTIONS = ("k_proj", "v_proj")


def rounded_mx(x: Tensor, dtype: str, mode: str, size: int = 32) -> Tensor:
    """The input as small floats under a power of two for each `size` inputs; `mode`: how its exponent is rounded."""
    levels, largest, even = MX[dtype]
    blocks = groups(x, size)
    found = minifloat.e8m0(blocks.abs().amax(-1, keepdim=True), even if mode == "even" else mode)
    scales = minifloat.e8m0_numbers((found.to(torch.int32) - largest).clamp_(0, 254).to(torch.uint8))
    return (minifloat.nearest(blocks / scales, levels) * scales).flatten(1)[:, : x.shape[1]]


def _mx(x: Tensor, weight: Weight, bias: Tensor | None, product: Product, *, dtype: str, mode: str) -> Tensor:
    assert weight.activation is not None
    return finish(product(rounded_mx(x, dtype, mode, weight.activation.group_size or 32)), bias, x.dtype)


for _dtype in MX:
    for _mode in MODES:
        activation_rule(f"quark_{_dtype}_{_mode}")(partial(_mx, dtype=_dtype, mode=_mode))


@activation_rule("quark_fp8_tensor")
def fp8_tensor(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """One scale for all tokens of a call."""
    return finish(product(rounded_fp8(x.to(torch.float32), None)), bias, x.dtype)


@activation_rule("quark_int8_static")
def int8_static(x: Tensor, weight: Weight, bias: Tensor | None, product: Product) -> Tensor:
    """One stored scale, and a zero point if there is one."""
    given: Any = weight.activation
    named = dict(zip(given.names, given.tensors, strict=True))
    y = product(rounded_int8(x.to(torch.float32), named["input_scale"], named.get("input_zero_point"), given.symmetric))
    return finish(y, bias, x.dtype)


def rounded_fp8(x: Tensor, scale: Tensor | None) -> Tensor:
    """float32 numbers as E4M3 under a stored scale, or under one for all of them."""
    if scale is None:
        scale = (x.abs().amax() if x.numel() else x.new_zeros(())) / TOP
        scale = torch.where(scale > 0, scale, 1.0)
    scale = scale.to(torch.float32).reshape(())
    return minifloat.nearest(x / scale, "e4m3") * scale


def rounded_int8(x: Tensor, scale: Tensor, zero: Tensor | None, signed: bool = True) -> Tensor:
    """float32 numbers as 8-bit integers under a stored scale."""
    scale = scale.to(torch.float32).reshape(())
    shift = zero.to(torch.float32).reshape(()) if zero is not None else 0.0
    low, high = (-128, 127) if signed else (0, 255)
    return ((x / scale + shift).round().clamp(low, high) - shift) * scale


@dataclass
class RoundedOutput(Attachment):
    """The output of a layer as its codes stand for it; keys and values before their rotary embedding."""

    dtype: str

    def __call__(self, module: Any, arguments: Any, output: Tensor) -> Tensor:
        scale, zero = (module._buffers.get(name) for name in ("output_scale", "output_zero_point"))
        numbers = output.to(torch.float32)
        found = rounded_fp8(numbers, scale) if self.dtype == "fp8_e4m3" else rounded_int8(numbers, scale, zero)
        return straight(output, found.to(output.dtype))


@dataclass
class RoundedState:
    """Keys with their rotation, or values, by the scale that is stored for the output of their projection."""

    projection: str
    dtype: str

    def __call__(self, attention: Any, states: Tensor) -> Tensor:
        found: Tensor = RoundedOutput(self.dtype)(attention._modules[self.projection], None, states)
        return found


def attach_outputs(
    model: Any, checkpoint: Any, path_of: Callable[[str], str | None], spec_of: Any, post_rope: bool = False
) -> set[str]:
    """Buffers for stored output scales, and hooks that use them: their state dict keys.

    `post_rope`: outputs of k_proj and v_proj are rounded where they enter the cache, keys with their rotation.
    """
    keys: set[str] = set()
    cached: dict[str, dict[str, str]] = {}
    for key, info in checkpoint.tensors.items():
        name, _, own = key.rpartition(".")
        path = path_of(name) if own in ("output_scale", "output_zero_point") else None
        if path is None:
            continue
        if tuple(info.shape) not in ((), (1,)) or (own == "output_scale" and info.dtype not in FLOATS):
            raise ShapeMismatch(
                f"tensor {key!r} in {info.file} is {info.dtype} {tuple(info.shape)}; an output has one scale"
            )
        module = model.get_submodule(path)
        if own == "output_scale":
            require_scale(key, checkpoint.read(key))
            dtype = (spec_of(name) or {}).get("dtype", "fp8_e4m3")
            if dtype not in ("fp8_e4m3", "int8"):
                raise InvalidOption(f"{name}: outputs are quantized to {dtype!r}; known are 'fp8_e4m3' and 'int8'")
            attention, _, projection = path.rpartition(".")
            if post_rope and projection in PROJECTIONS and has_cache(model.get_submodule(attention)):
                cached.setdefault(attention, {})[projection] = dtype
            else:
                attach_after(module, RoundedOutput(dtype))
        module.register_buffer(own, torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta"))
        keys.add(f"{path}.{own}")
    for attention, dtypes in cached.items():
        rounds = [RoundedState(name, dtypes[name]) if name in dtypes else unchanged for name in PROJECTIONS]
        attach_before(model.get_submodule(attention), RoundedCache(*rounds), with_kwargs=True)
    return keys


SMALLEST = 2.0**-23  # of a scale


def static_specs(spec: Mapping[str, Any], dtype: str, prefix: str = "input") -> tuple[Spec, ...]:
    """What is stored of a state with one scale that is to be measured; `dtype`: the model's."""
    named = spec.get("scale_type") or "float"
    if spec.get("dtype") not in ("fp8_e4m3", "int8") or spec.get("qscheme") != "per_tensor":
        raise InvalidOption(
            f"static scales of {prefix}s are made for fp8_e4m3 and int8, per_tensor; not for {spec.get('dtype')!r}, "
            f"{spec.get('qscheme')!r}"
        )
    if spec.get("dtype") == "int8":
        return (f"{prefix}_scale", "float32", ()), (f"{prefix}_zero_point", "int8", ())
    return ((f"{prefix}_scale", dtype if named == "float" else str(named), ()),)


def scale_and_zero(low: Tensor, high: Tensor, dtype: str, shifted: bool) -> tuple[Tensor, Tensor]:
    """Quark's minimum and maximum observers, for one number each: float32 scale, and zero point of int8."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if dtype == "e4m3":
        return (torch.maximum(-low, high) / TOP).clamp(min=SMALLEST), torch.zeros_like(low)
    if not shifted:
        return (torch.maximum(-low, high) / 127.5).clamp(min=SMALLEST), torch.zeros_like(low)
    scale = ((high - low) / 255.0).clamp(min=SMALLEST)
    return scale, (-128 - (low / scale).round()).clamp(-128, 127)


def measured(inputs: Inputs, low: Tensor, high: Tensor) -> Activation:
    """What a weight carries of an input whose extremes were measured, float32 [in]."""
    found = scale_and_zero(low.amin(), high.amax(), inputs.dtype, inputs.shifted)
    pairs = zip(found, inputs.stored)
    return inputs.activation(
        tuple(number.to(getattr(torch, dtype)).reshape(shape) for number, (_, dtype, shape) in pairs)
    )


class OutputMeasured(Measurement):
    """The scale of a layer's output, keys and values before their rotation among them."""

    def __init__(self, spec: Mapping[str, Any], dtype: str):
        stored = static_specs(spec, dtype, "output")
        self.specs = {name: (kind, shape) for name, kind, shape in stored}
        self.kind = "e4m3" if spec.get("dtype") == "fp8_e4m3" else "int8"
        self.shifted = spec.get("symmetric") is False
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def listen(self, module: Any) -> Any:
        def take(module: Any, arguments: Any, output: Tensor) -> None:
            low, high = (number.detach().float() for number in torch.aminmax(output))
            self.low = low if self.low is None else torch.minimum(self.low, low)
            self.high = high if self.high is None else torch.maximum(self.high, high)

        return module.register_forward_hook(take)

    def tensors(self) -> dict[str, Tensor]:
        if self.low is None or self.high is None:
            raise CalibrationNeeded("output_scale: no output came by, so its scale is unknown")
        found = scale_and_zero(self.low, self.high, self.kind, self.shifted)
        return {name: number.to(getattr(torch, dtype)) for number, (name, (dtype, _)) in zip(found, self.specs.items())}


def inputs_of(
    module: ModuleInfo, spec: Mapping[str, Any] | None, stored: Mapping[str, Any], making: bool = False
) -> Inputs | None:
    """How a module's input is rounded; a stored scale is used whatever the configuration says. `making`: it is to be measured."""
    static: tuple[Spec, ...] = ()
    if making and spec is not None and not spec.get("is_dynamic"):
        static = static_specs(spec, module.dtype)
    if "input_scale" in stored or "input_zero_point" in stored:
        names = ("input_scale", *(("input_zero_point",) if (spec or {}).get("dtype") == "int8" else ()))
        static = tuple(_one_number(module, name, stored) for name in names)
    if module.kind == "embedding" or (spec is None and not static):
        return None
    spec = spec or {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}
    dtype, dynamic, scheme = spec.get("dtype"), bool(spec.get("is_dynamic")), spec.get("qscheme")
    if static and dtype == "fp8_e4m3":
        return Inputs("e4m3_static", granularity="tensor", stored=static)
    if static and dtype == "int8":
        shifted = making and spec.get("symmetric") is False
        return Inputs("quark_int8_static", "int8", "tensor", stored=static, shifted=shifted)
    if dynamic and dtype == "fp8_e4m3" and scheme == "per_tensor":
        return Inputs("quark_fp8_tensor", granularity="tensor")
    if dynamic and dtype == "fp8_e4m3" and scheme == "per_channel":
        return Inputs("e4m3_token")
    if dynamic and dtype in MX and spec.get("scale_format") == "e8m0":
        mode = spec.get("scale_calculation_mode") or "even"
        if mode in MODES:
            levels = MX[str(dtype)][0]
            return Inputs(f"quark_{dtype}_{mode}", levels, "group", int(spec.get("group_size") or 32))
    if not dynamic and not static:
        raise MissingTensor(
            f"tensor {join_name(module.name, 'input_scale')!r} is not stored; the configuration quantizes inputs with it"
        )
    raise InvalidOption(
        f"{module.name}: inputs are quantized to {dtype!r}, {scheme!r}, {'dynamic' if dynamic else 'static'}, which is not known"
    )


def _one_number(module: ModuleInfo, name: str, stored: Mapping[str, Any]) -> Spec:
    if name not in stored:
        raise MissingTensor(
            f"tensor {join_name(module.name, name)!r} is not stored; inputs of {module.name} are quantized with it"
        )
    info = stored[name]
    if tuple(info.shape) not in ((), (1,)):
        raise ShapeMismatch(f"tensor {info.name!r} has shape {tuple(info.shape)}; inputs have one scale")
    return name, info.dtype, tuple(info.shape)
