"""HIGGS. Pairs of inputs from a grid that suits Gaussian numbers, after a Hadamard rotation; stored in FLUTE's order.

Stored, in padded to a multiple of hadamard_size: weight int16 [out*bits/16, in] (the order depends on
tune_metadata[module].template_id), scales [out, in/group_size], tables [2**bits], tables2 [2**bits, 2**bits, 2], bias [out].
W = (tables2[pair of codes] * scale) rotated back by the normalised Sylvester matrix in runs of hadamard_size
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import LazyModule
from anybit.errors import NotRepresentable, ShapeMismatch
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_names, check_objects, check_positive, refuse
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _higgs_layout as layouts
    from anybit.weight.layout import Layout, ModuleInfo
else:  # needed for tensors, not to select the backend
    layouts = LazyModule("anybit.methods._higgs_layout")

HALVES = ("float16", "bfloat16", "float32")
TEMPLATE = {2: 4, 3: 4, 4: 16}  # one of FLUTE's for tiles of 32 outputs


@register_quantization_config("higgs")
@dataclass(eq=False, repr=False)
class HiggsConfig(QuantizationConfigMixin):
    """`p` inputs share a grid point; `tune_metadata` tells, for each module, the order its codes lie in."""

    bits: int = 4
    p: int = 2
    modules_to_not_convert: list[str] | None = None
    hadamard_size: int = 512
    group_size: int = 256
    tune_metadata: dict[str, Any] | None = None

    method: ClassVar[str] = "higgs"
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {f"higgs-{bits}bit": {"bits": bits} for bits in (2, 3, 4)}

    def post_init(self) -> None:
        check_choice(self, "bits", (2, 3, 4))
        check_choice(self, "p", (1, 2))
        check_choice(self, "group_size", (64, 128, 256))
        check_positive(self, "hadamard_size")
        check_names(self, "modules_to_not_convert")
        check_objects(self, "tune_metadata")
        if self.hadamard_size % self.group_size:
            raise refuse(self, "hadamard_size", f"it must be a multiple of group_size, {self.group_size}")
        if self.tune_metadata is None:
            self.tune_metadata = {}


@register_quantizer("higgs")
class HiggsHfQuantizer(HfQuantizer):
    """HIGGS's layout. The template in tune_metadata tells how the codes of a module lie. Made without data, better with."""

    layouts_available = True
    calibrated_algorithm = "ldlq"

    def __init__(self, quantization_config: QuantizationConfigMixin, *, pre_quantized: bool = True, **kwargs: Any):
        # tune_metadata is filled in for one model, and the caller's configuration may be used for another one
        own = quantization_config if pre_quantized else copy.deepcopy(quantization_config)
        super().__init__(own, pre_quantized=pre_quantized, **kwargs)

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        if not {"tables", "tables2"} & set(stored):
            return None
        if module.kind != "linear":
            raise NotRepresentable(f"{module.name} is a packed {module.kind}; HIGGS's layout is one of linear layers")
        config = self.quantization_config
        tuned = self._tuned(module.name)

        def dtype(name: str) -> str:
            found = stored.get(name)
            return found.dtype if found is not None and found.dtype in HALVES else "float16"

        label = meant = dtype("tables2")
        is_doubtful = label == "float16" and "tables2" in stored and "bfloat16" in (dtype("scales"), _dtype_of(tuned))
        if is_doubtful and layouts.are_bfloat16_bits(peek("tables2")):
            meant = "bfloat16"
            self.decide("tables2 is labelled float16 but holds bfloat16 numbers; read as such", module.name)
        layout = layouts.HiggsLayout(
            module.shape,
            module.dtype,
            config.bits,
            config.group_size,
            config.hadamard_size,
            self._tile(module.name, tuned),
            dtype("scales"),
            dtype("tables"),
            meant,
            label,
        )
        if module.shape[0] % layout.together:
            raise ShapeMismatch(
                f"{module.name} has {module.shape[0]} outputs; {config.bits}-bit codes in tiles of {layout.tile} are stored "
                f"{layout.together} outputs together. tune_metadata (template_id) and tensors contradict each other"
            )
        return layout

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if not self.should_convert(module):
            return None
        config, bits = self.quantization_config, self.quantization_config.bits
        dtype = module.dtype if module.dtype in HALVES[:2] else "float16"
        layout = layouts.HiggsLayout(
            module.shape, module.dtype, bits, config.group_size, config.hadamard_size, 32, dtype, dtype, dtype, "float16",
            config.p,
        )  # fmt: skip
        reason = None
        if module.kind != "linear":
            reason = f"HIGGS stores linear layers, this is a {module.kind}"
        elif module.shape[0] % layout.together:
            reason = f"codes of {layout.together} outputs are stored together, it has {module.shape[0]}"
        if reason is not None:
            self.skip_reasons[module.name] = reason
            return None
        if layout.width != module.shape[1]:
            self.decide(
                f"inputs are filled up with zeros to a multiple of hadamard_size, {config.hadamard_size}; transformers cannot "
                "load that, anybit can",
                module.name,
            )
        config.tune_metadata[module.name] = {
            "M": 1, "N": module.shape[0], "K": layout.width, "num_bits": bits, "group_size": config.group_size,
            "num_sms": 108, "dtype": f"torch.{dtype}", "device": "cuda:0", "template_id": TEMPLATE[bits],
        }  # fmt: skip
        return layout

    def _tuned(self, name: str) -> Mapping[str, Any]:
        tuned = self.quantization_config.tune_metadata.get(name)
        if not isinstance(tuned, Mapping) or not isinstance(tuned.get("template_id"), int):
            raise NotRepresentable(
                f"{name} is stored packed, but tune_metadata of config.json has no template_id for it, which alone tells the "
                "order of its codes. Restore tune_metadata from the tool that wrote the checkpoint"
            )
        return tuned

    def _tile(self, name: str, tuned: Mapping[str, Any]) -> int:
        """TileP of FLUTE's template, by the table of flute-kernel 0.4.2."""
        bits, template = self.quantization_config.bits, tuned["template_id"]
        if tuned.get("num_bits", bits) != bits:
            raise ShapeMismatch(
                f"tune_metadata of {name} is for {tuned['num_bits']} bits, the configuration says {bits}; one of them is wrong"
            )
        tile = 64 if template // (16 if bits == 4 else 4) % 3 == 0 else 32
        if template < 0 or (bits == 3 and tile == 64):
            raise NotRepresentable(
                f"{name}: template_id {template} is none whose order of {bits}-bit codes is known (flute-kernel 0.4.2). "
                "Repack the checkpoint with that version"
            )
        return tile


def _dtype_of(tuned: Mapping[str, Any]) -> str:
    return str(tuned.get("dtype")).removeprefix("torch.")
