"""quanto. int8 and float8 rows; int4 and int2 groups of a row with a float shift.

Stored: weight._data int8 / float8 [out, in] and weight._scale [out, 1]; or weight._data._data uint8 (first rows in the lowest
bits), weight._scale and weight._shift [groups, 1]; input_scale, output_scale, bias. The folder's config.json says nothing:
quanto_qmap.json names each quantized module with its types.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import LazyModule
from anybit.errors import (
    CalibrationNeeded,
    CheckpointError,
    InvalidOption,
    MissingTensor,
    NotRepresentable,
    ShapeMismatch,
)
from anybit.methods._headers import headers_of
from anybit.quantizers import attachments
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_names, check_objects, listed
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from pathlib import Path

    from anybit.methods import _quanto_layout as layouts
    from anybit.weight.layout import Layout, ModuleInfo
else:  # needed for tensors, not to select the backend
    layouts = LazyModule("anybit.methods._quanto_layout")

QMAP = "quanto_qmap.json"
# names of quanto_qmap.json -> names of QuantoConfig
TYPES = {
    "qint2": "int2", "qint4": "int4", "qint8": "int8", "qfloat8": "float8", "qfloat8_e4m3fn": "float8",
    "qfloat8_e4m3fnuz": "float8", "qfloat8_e5m2": "float8", "none": None,
}  # fmt: skip


@register_quantization_config("quanto")
@dataclass(eq=False, repr=False)
class QuantoConfig(QuantizationConfigMixin):
    """Types of weights and activations. `qmap`, the content of quanto_qmap.json, has the last word for the modules in it.

    `optimizer`: how int4 and int2 groups are fitted, quanto's "max" (the default) or "hqq".
    """

    weights: str = "int8"
    activations: str | None = None
    modules_to_not_convert: list[str] | None = None
    qmap: dict[str, dict[str, str]] | None = None
    optimizer: str | None = None

    method: ClassVar[str] = "quanto"
    side_files: ClassVar[tuple[str, ...]] = (QMAP,)
    optional: ClassVar[tuple[str, ...]] = ("qmap", "optimizer")
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"quanto-{weights}": {"weights": weights} for weights in ("int8", "int4", "int2", "float8")
    }

    def post_init(self) -> None:
        check_choice(self, "weights", ("float8", "int8", "int4", "int2"))
        check_choice(self, "activations", (None, "int8", "float8"))
        check_names(self, "modules_to_not_convert")
        check_objects(self, "qmap")
        check_choice(self, "optimizer", (None, "max", "hqq"))

    @classmethod
    def recognizes(cls, config_dict: Mapping[str, Any]) -> bool:
        return bool(config_dict) and all(_is_entry(value) for value in config_dict.values())

    @classmethod
    def modernize(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        if not cls.recognizes(config_dict):
            return config_dict
        commonest = {
            kind: Counter(TYPES.get(entry[kind], entry[kind]) for entry in config_dict.values()).most_common()
            for kind in ("weights", "activations")
        }
        weights = next((name for name, _ in commonest["weights"] if name is not None), "int8")
        return {"weights": weights, "activations": commonest["activations"][0][0], "qmap": config_dict}

    @classmethod
    def found_in(cls, folder: Path, model_config: Mapping[str, Any]) -> dict[str, Any] | None:
        inside = super().found_in(folder, model_config)
        if inside is not None:
            return inside
        return _shown_by({name: dtype for name, (dtype, _) in headers_of(folder, "._data").items()})

    @classmethod
    def found_among(cls, tensors: Mapping[str, Any]) -> dict[str, Any] | None:
        return _shown_by({name: info.dtype for name, info in tensors.items()})


def _shown_by(dtypes: Mapping[str, str]) -> dict[str, Any] | None:
    """The configuration of a folder without a map, from the names and dtypes of its tensors."""
    kinds = Counter(
        "int4" if name.endswith("._data._data") else "int8" if dtype in ("int8", "I8") else "float8"
        for name, dtype in dtypes.items()
        if name.endswith((".weight._data", ".weight._data._data"))
    )
    return {"quant_method": QuantoConfig.method, "weights": kinds.most_common()[0][0]} if kinds else None


def _is_entry(value: Any) -> bool:
    return (
        isinstance(value, dict) and isinstance(value.get("weights"), str) and isinstance(value.get("activations"), str)
    )


# --- quantizer -----------------------------------------------------------------------------------------------------------

WEIGHTS = {"int2": "qint2", "int4": "qint4", "int8": "qint8", "float8": "qfloat8_e4m3fn"}
BITS = {"qint2": 2, "qint4": 4}
KINDS = {
    "qint8": "int8", "qfloat8": "float8_e4m3fn", "qfloat8_e4m3fn": "float8_e4m3fn", "qfloat8_e4m3fnuz": "float8_e4m3fnuz",
    "qfloat8_e5m2": "float8_e5m2",
}  # fmt: skip


@register_quantizer("quanto")
class QuantoHfQuantizer(HfQuantizer):
    """quanto's layouts. quanto_qmap.json says what each module is; where it is lost, the tensors do."""

    layouts_available = True

    def __init__(self, quantization_config: QuantizationConfigMixin, *, pre_quantized: bool = True, **kwargs: Any):
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)
        if not pre_quantized and self.quantization_config.activations is not None:
            raise CalibrationNeeded(
                f"QuantoConfig: activations is {self.quantization_config.activations!r}, but static scales of inputs and outputs "
                "are measured on data, which quantizing at load does not run. Leave activations out, or load a checkpoint that "
                "was calibrated"
            )

    def attach(self, model: Any, checkpoint: Any, path_of: Callable[[str], str | None]) -> None:
        """Layer norms whose outputs are quantized."""
        for name, entry in (self.quantization_config.qmap or {}).items():
            kind = self._kind(name, entry["activations"])
            if entry["weights"] != "none" or kind is None:
                continue
            path = path_of(name)
            module: Any = None if path is None else model.get_submodule(path)
            if type(module).__name__ != "LayerNorm":
                raise NotRepresentable(
                    f"quanto_qmap.json says that {name} ({type(module).__name__ if module is not None else 'not in the model'}) "
                    "quantizes its output but not its weight, which quanto does with layer norms only"
                )
            for own in layouts.SCALES:
                info = checkpoint.tensors.get(f"{name}.{own}")
                if info is None:
                    raise MissingTensor(
                        f"tensor '{name}.{own}' is not in the checkpoint; quanto_qmap.json says that its outputs are quantized"
                    )
                module.register_buffer(own, layouts.meta(info.dtype))
                self.attached.add(f"{path}.{own}")
            attachments.attach_after(module, layouts.OutputRounding(layouts.LEVELS.get(kind, kind)))

    # --- reading ---

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        if not any(name.startswith("weight._") for name in stored):
            return None
        if module.kind not in ("linear", "router"):
            raise NotRepresentable(
                f"{module.name} is a packed {module.kind}; quanto quantizes linear layers one by one"
            )
        named = next(stored[name].name.removesuffix(f".{name}") for name in stored)
        qmap = self.quantization_config.qmap or {}
        entry = qmap.get(named) or qmap.get(module.name)
        scale = _dtype_of(stored, "weight._scale", "float32")
        own: dict[str, Any] = {
            "scale_dtype": scale, "io_dtype": _dtype_of(stored, "input_scale", scale),
            "activations": self._activations(module, entry, stored, peek),
        }  # fmt: skip
        if "weight._data" in stored:
            kind = stored["weight._data"].dtype
            wanted = KINDS.get(entry["weights"]) if entry is not None else kind
            if wanted != kind or kind not in KINDS.values():
                raise self._contradiction(module, stored["weight._data"], entry)
            return layouts.QuantoBytesLayout(module.shape, scale, kind=kind, **own)
        bits = self._bits(module, entry, stored)
        shift = _dtype_of(stored, "weight._shift", scale, ("uint8", scale))
        return layouts.QuantoBitsLayout(module.shape, scale, bits=bits, shift_dtype=shift, **own)

    def _bits(self, module: ModuleInfo, entry: Mapping[str, str] | None, stored: Mapping[str, Any]) -> int:
        """4 or 2: as the map says, or as the number of packed rows shows."""
        if entry is not None and entry["weights"] in BITS:
            return BITS[entry["weights"]]
        info = stored.get("weight._data._data")
        if info is None:
            raise MissingTensor(f"tensor '{module.name}.weight._data._data' is not in the checkpoint")
        if entry is not None:
            raise self._contradiction(module, info, entry)
        fitting = [
            bits for bits in BITS.values()
            if layouts.QuantoBitsLayout(module.shape, bits=bits).specs()["weight._data._data"][1] == tuple(info.shape)
        ]  # fmt: skip
        if len(fitting) != 1:
            raise ShapeMismatch(
                f"tensor {info.name!r} in {info.file} is {info.dtype} {tuple(info.shape)}, which "
                f"{'2 and 4 bits have both' if fitting else 'neither 2 nor 4 bits have'} for a weight {module.shape}"
                f"{'; add quanto_qmap.json, which tells them apart' if fitting else ''}"
            )
        return fitting[0]

    def _activations(
        self, module: ModuleInfo, entry: Mapping[str, str] | None, stored: Mapping[str, Any], peek: Callable[[str], Any]
    ) -> str | None:
        if entry is not None:
            return self._kind(module.name, entry["activations"])
        kind: str | None = self.quantization_config.activations
        scales = [name for name in layouts.SCALES if name in stored and tuple(stored[name].shape) == ()]
        if all(peek(name).item() == 1 for name in scales):  # never calibrated
            return None
        if kind is None:
            raise CheckpointError(
                f"tensor '{module.name}.{scales[0]}' shows that inputs are quantized, and nothing says to which type; "
                "quanto_qmap.json does. Put it beside the weights"
            )
        return self._kind(module.name, WEIGHTS[kind])

    def _kind(self, module: str, name: str) -> str | None:
        """The dtype of quantized inputs that the map names; None for plain ones."""
        if name == "none":
            return None
        if name not in KINDS:
            raise InvalidOption(
                f"quanto_qmap.json: activations of {module} are {name!r}; they must be none or {listed(KINDS)}"
            )
        return KINDS[name]

    def _contradiction(self, module: ModuleInfo, info: Any, entry: Mapping[str, str] | None) -> ShapeMismatch:
        says = (
            f"quanto_qmap.json says {entry['weights']!r}"
            if entry is not None
            else f"quanto stores {listed(KINDS.values())}"
        )
        return ShapeMismatch(f"tensor {info.name!r} in {info.file} is {info.dtype} {tuple(info.shape)}, but {says}")

    # --- creating ---

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if not self.should_convert(module):
            return None
        if module.kind != "linear":
            self.skip_reasons[module.name] = (
                f"quanto quantizes linear layers, one by one; this is of kind {module.kind!r}"
            )
            return None
        config = self.quantization_config
        dtype = module.dtype if module.dtype in ("float16", "bfloat16") else "float32"
        name = WEIGHTS[config.weights]
        if config.qmap is not None:  # of a checkpoint that is made again
            name = config.qmap.get(module.name, {"weights": "none"})["weights"]
        if name not in (*BITS, *KINDS):
            self.skip_reasons[module.name] = "quanto_qmap.json does not have it quantized"
            return None
        if name in BITS:
            return layouts.QuantoBitsLayout(
                module.shape, dtype, dtype, None, dtype, BITS[name], dtype, config.optimizer or "max"
            )
        return layouts.QuantoBytesLayout(module.shape, dtype, dtype, None, dtype, KINDS[name])

    def made_files(self, layouts: Mapping[str, Layout]) -> Mapping[str, bytes]:
        from anybit.methods._quanto_layout import QuantoLayout

        made = {}
        for module, layout in layouts.items():
            assert isinstance(layout, QuantoLayout)
            made[module] = {"weights": layout.qtype, "activations": "none"}
        return {QMAP: json.dumps(made, indent=4).encode()}


def _dtype_of(
    stored: Mapping[str, Any], name: str, default: str, allowed: tuple[str, ...] = ("float16", "bfloat16", "float32")
) -> str:
    """The stored dtype if it can be; the plan names what is wrong with another."""
    found = getattr(stored.get(name), "dtype", None)
    return found if found in allowed else default
