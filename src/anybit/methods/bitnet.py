"""BitNet. Weights -1, 0, 1 with one scale per matrix; inputs are int8 per token.

Stored: weight uint8 [out/4, in] (four ternary codes in a byte, the first quarter of the rows in the lowest bits), or unpacked
values, or master weights (online); weight_scale [1], which "bitlinear" divides by and "autobitlinear" multiplies with (its bias
too); bias [out]; rms_norm.weight [in].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import torch
from anybit.errors import CalibrationNeeded, CorruptFile, MissingTensor, NotRepresentable, ShapeMismatch
from anybit.methods import _bitnet_layouts as layouts
from anybit.quantizers.attachments import Attachment, attach_before
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_flags, check_names, check_type
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weight import Layout, ModuleInfo


@register_quantization_config("bitnet")
@dataclass(eq=False, repr=False)
class BitNetQuantConfig(QuantizationConfigMixin):
    """`linear_class` decides what weight_scale means, `quantization_mode` whether packed or master weights are stored."""

    modules_to_not_convert: list[str] | None = None
    linear_class: str = "bitlinear"
    quantization_mode: str = "offline"
    use_rms_norm: bool = False
    rms_norm_eps: float | None = 1e-6

    method: ClassVar[str] = "bitnet"
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "bitnet": {"linear_class": "autobitlinear"},
        "bitnet-bitlinear": {"linear_class": "bitlinear"},
        "bitnet-online": {"linear_class": "autobitlinear", "quantization_mode": "online"},
    }

    @property
    def online(self) -> bool:
        """Whether master weights are stored; bitlinear has no such mode, whatever the option says."""
        return self.linear_class == "autobitlinear" and self.quantization_mode == "online"

    def post_init(self) -> None:
        check_choice(self, "linear_class", ("bitlinear", "autobitlinear"))
        check_choice(self, "quantization_mode", ("online", "offline"))
        check_flags(self, "use_rms_norm")
        check_type(self, "rms_norm_eps", float, int, None)
        check_names(self, "modules_to_not_convert")


NORM = ".rms_norm.weight"


@dataclass
class InputNorm(Attachment):
    """Before a linear: its own RMSNorm, in float32, as Llama's."""

    epsilon: float

    def __call__(self, module: Any, arguments: tuple[Any, ...]) -> Any:
        x = arguments[0]
        numbers = x.to(torch.float32)
        numbers = numbers * torch.rsqrt(numbers.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return (module.rms_norm.weight * numbers.to(x.dtype), *arguments[1:])


@register_quantizer("bitnet")
class BitNetHfQuantizer(HfQuantizer):
    """BitNet's layouts."""

    layouts_available = True

    def __init__(self, quantization_config: QuantizationConfigMixin, *, pre_quantized: bool = True, **kwargs: Any):
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)
        self.linears: set[str] = set()
        if not pre_quantized and self.quantization_config.use_rms_norm:
            raise CalibrationNeeded(
                "use_rms_norm gives every linear a norm of its own, and a dense checkpoint has no weights for them: they are "
                "trained together with the model. Leave use_rms_norm out"
            )

    def begin(self, model: Any, slots: Sequence[Any]) -> None:
        super().begin(model, slots)
        self.linears = {slot.module for slot in slots if slot.kind == "linear"}

    # --- reading ---

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        weight, scale, config = stored.get("weight"), stored.get("weight_scale"), self.quantization_config
        floats = weight is not None and weight.dtype in layouts.FLOATS
        if weight is None or (floats and scale is None):
            if weight is None or not config.online or not self._is_converted(module):
                return None
            self._check_norm(module)
            return layouts.OnlineLayout(module.shape, module.dtype, weight.dtype)
        self._check_norm(module)
        if config.online:
            raise ShapeMismatch(
                f"{module.name}: quantization_mode is 'online', which has master weights and no 'weight_scale', but "
                f"{', '.join(sorted(stored))} are stored ('weight' {weight.dtype} {tuple(weight.shape)}). Set quantization_mode "
                "to 'offline' in config.json"
            )
        if scale is None:
            raise MissingTensor(
                f"tensor {module.name + '.weight_scale'!r} is not stored, but 'weight' is {weight.dtype}"
            )
        if scale.dtype not in layouts.FLOATS or tuple(scale.shape) not in ((1,), ()):
            raise ShapeMismatch(
                f"tensor {scale.name!r} is {scale.dtype} {tuple(scale.shape)}; BitNet has one float for each matrix"
            )
        shape = tuple(scale.shape)
        if floats:
            if config.linear_class == "bitlinear":
                raise ShapeMismatch(
                    f"tensor {weight.name!r} is {weight.dtype}; linear_class 'bitlinear' stores packed uint8. If the values "
                    "are -1, 0 and 1, set linear_class to 'autobitlinear' in config.json"
                )
            return layouts.UnpackedLayout(module.shape, module.dtype, weight.dtype, scale.dtype, shape)
        divides = config.linear_class == "bitlinear"
        stored_as = weight.dtype if weight.dtype in ("uint8", "int8") else "uint8"
        return layouts.BitNetLayout(module.shape, module.dtype, scale.dtype, divides, stored_as, shape)

    def _is_converted(self, module: ModuleInfo) -> bool:
        return module.name in self.linears and self.should_convert(module)

    def _check_norm(self, module: ModuleInfo) -> None:
        if self.quantization_config.use_rms_norm and module.name + NORM not in self.attached:
            raise MissingTensor(
                f"tensor {module.name + NORM!r} is not stored, and use_rms_norm gives every quantized linear one"
            )

    def attach(self, model: Any, checkpoint: Any, path_of: Callable[[str], str | None]) -> None:
        if not self.pre_quantized:
            return
        config = self.quantization_config
        for name in checkpoint.tensors:
            if config.use_rms_norm and name.endswith(NORM):
                self._attach_norm(model, checkpoint, name, path_of(name.removesuffix(NORM)))
            elif name.endswith(".weight_scale") and config.linear_class == "autobitlinear":
                self._fold_bias(checkpoint, name, path_of(name.removesuffix(".weight_scale")))

    def _attach_norm(self, model: Any, checkpoint: Any, name: str, path: str | None) -> None:
        module = model.get_submodule(path) if path is not None else None
        if not isinstance(module, torch.nn.Linear):
            return  # the model's own, or nobody's, which the plan will say
        info = checkpoint.tensors[name]
        if info.dtype not in layouts.FLOATS or tuple(info.shape) != (module.in_features,):
            raise ShapeMismatch(
                f"tensor {name!r} is {info.dtype} {tuple(info.shape)}; the norm of {module.in_features} inputs has as many floats"
            )
        if not bool(torch.isfinite(checkpoint.read(name)).all()):
            raise CorruptFile(f"tensor {name!r} in {info.file} holds NaN or infinity; a damaged file, get it again")
        holder = torch.nn.Module()
        holder.register_buffer("weight", torch.empty(info.shape, dtype=module.weight.dtype, device="meta"))
        holder._is_hf_initialized = True  # type: ignore[assignment]
        module.add_module("rms_norm", holder)
        epsilon = self.quantization_config.rms_norm_eps
        attach_before(module, InputNorm(1e-6 if epsilon is None else float(epsilon)))
        self.attached.add(f"{path}{NORM}")

        def refuse_dense(dense: Tensor) -> Tensor:
            raise NotRepresentable(
                f"{path} normalises its input with weights of its own (use_rms_norm), and no dense {type(model).__name__} has "
                "a place for them; keep the checkpoint quantized"
            )

        self.folds[f"{path}.weight"] = refuse_dense

    def _fold_bias(self, checkpoint: Any, name: str, path: str | None) -> None:
        """autobitlinear's weight_scale multiplies the bias, too; that of a dense layer has to be multiplied already."""
        if path is None or name.removesuffix("weight_scale") + "bias" not in checkpoint.tensors:
            return

        def scaled(bias: Tensor) -> Tensor:
            return bias * checkpoint.read(name).to(bias.device, torch.float32)

        self.folds[f"{path}.bias"] = scaled

    # --- creating ---

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if not self.should_convert(module):
            return None
        if module.kind != "linear":
            self.skip_reasons[module.name] = (
                f"BitNet stores linear layers; this is a {module.class_name} ({module.kind})"
            )
            return None
        dtype = module.dtype if module.dtype in layouts.FLOATS else "float32"
        if self.quantization_config.online and module.name not in self.linears:
            return (
                None  # a part of a stack of experts: nothing would tell that it is to be rounded when it is multiplied
            )
        if self.quantization_config.online:
            return layouts.OnlineLayout(module.shape, dtype, dtype)
        if module.shape[0] % 4:
            self.skip_reasons[module.name] = f"its {module.shape[0]} outputs are no multiple of the 4 that share a byte"
            return None
        return layouts.BitNetLayout(module.shape, dtype, dtype, self.quantization_config.linear_class == "bitlinear")
