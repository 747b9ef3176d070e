"""HQQ. Groups of a flattened weight, along rows or columns, with a float zero point.

Stored beside each W_q (uint8, int32 for 3 bits, or the compute dtype): scale, zero, and every setting of the layer as a tensor:
nbits, group_size, axis, shape, packing (text as bytes), ... , bias. hqq's own folders keep the same in qmodel.pt.
M = (code - zero) * scale with one group in each row (axis 1) or column (axis 0) of M; W is M reshaped to [out, in].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import LazyModule
from anybit.errors import CorruptFile, InvalidOption, MissingTensor, NotRepresentable, ShapeMismatch
from anybit.methods._headers import headers_of
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin, difference
from anybit.quantizers.options import check_names, check_objects, listed
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods import _hqq_files as files
    from anybit.methods import _hqq_layout as layouts
    from anybit.weight.layout import Layout, ModuleInfo
else:  # needed for tensors, not to select the backend
    files, layouts = LazyModule("anybit.methods._hqq_files"), LazyModule("anybit.methods._hqq_layout")

OWN_FILE = "qmodel.pt"  # of hqq's own folders
BITS = (8, 6, 5, 4, 3, 2, 1.58, 1)


@register_quantization_config("hqq")
class HqqConfig(QuantizationConfigMixin):
    """`quant_config` is one layer setting for all linears, or one for each tag: a module name without "model", "layers", numbers.

    A file holds `quant_config`; the arguments before it are another way to write it. They only say how to quantize (an empty one:
    with the defaults): a stored layer carries its own settings.
    """

    method: ClassVar[str] = "hqq"
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"hqq-{nbits}bit-g64": {"nbits": nbits, "group_size": 64} for nbits in (8, 4, 3, 2)
    }

    def __init__(
        self,
        nbits: float = 4,
        group_size: int | None = 64,
        view_as_float: bool = False,
        axis: int | None = None,
        dynamic_config: Mapping[str, Mapping[str, Any]] | None = None,
        skip_modules: list[str] | None = None,
        quant_config: dict[str, Any] | None = None,
    ):
        if quant_config is not None:
            self.quant_config = quant_config
        elif dynamic_config is not None:
            self.quant_config = {tag: _tagged(tag, settings) for tag, settings in dynamic_config.items()}
        else:
            self.quant_config = layer_settings(
                nbits, group_size, view_as_float=view_as_float, axis=1 if axis is None else axis
            )
        self.skip_modules = ["lm_head"] if skip_modules is None else skip_modules
        self.__post_init__()

    def post_init(self) -> None:
        check_objects(self, "quant_config")
        check_names(self, "skip_modules")

    @classmethod
    def found_in(cls, folder: Path, model_config: Mapping[str, Any]) -> dict[str, Any] | None:
        if (folder / OWN_FILE).is_file():
            return {"quant_method": cls.method, "quant_config": {}}  # each layer has its own settings
        inside = super().found_in(folder, model_config)
        return cls.found_among(headers_of(folder, ".packing")) if inside is None else inside

    @classmethod
    def found_among(cls, tensors: Mapping[str, Any]) -> dict[str, Any] | None:
        packed = any(name.endswith(".W_q") and f"{name.removesuffix('W_q')}packing" in tensors for name in tensors)
        return {"quant_method": cls.method, "quant_config": {}} if packed else None

    def to_diff_dict(self) -> dict[str, Any]:
        return difference(self, HqqConfig())


def _tagged(tag: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return layer_settings(**settings)
    except TypeError as error:
        raise InvalidOption(f"HqqConfig: dynamic_config[{tag!r}] is {settings!r}: {error}") from error


def layer_settings(
    nbits: float = 4,
    group_size: int | None = 64,
    quant_zero: bool = False,
    quant_scale: bool = False,
    offload_meta: bool = False,
    view_as_float: bool = False,
    axis: int = 1,
) -> dict[str, Any]:
    """What hqq's BaseQuantizeConfig makes of its arguments. InvalidOption names the one that is wrong."""
    if nbits not in BITS:
        raise InvalidOption(f"HqqConfig: nbits is {nbits!r}; it must be {listed(BITS)}")
    if axis not in (0, 1):
        raise InvalidOption(f"HqqConfig: axis is {axis!r}; it must be 0 or 1")
    if group_size is not None and (not isinstance(group_size, int) or group_size <= 0 or group_size % 8):
        raise InvalidOption(
            f"HqqConfig: group_size is {group_size!r}; it must be a positive multiple of 8, or null for whole rows"
        )
    meta = {"nbits": 8, "channel_wise": True, "group_size": 128, "optimize": False}
    whole = meta if offload_meta else {**meta, "channel_wise": False, "group_size": None}
    quant_scale = quant_zero if offload_meta else quant_scale
    return {
        "weight_quant_params": {
            "nbits": nbits, "channel_wise": True, "group_size": group_size, "optimize": True, "round_zero": nbits == 4,
            "axis": axis, "view_as_float": view_as_float,
        },
        "scale_quant_params": dict(meta) if quant_scale else None,
        "zero_quant_params": dict(whole) if quant_zero else None,
        "offload_meta": offload_meta,
    }  # fmt: skip


# --- quantizer -----------------------------------------------------------------------------------------------------------

# of a layer, and of its quantized scales and zero points
NEEDED = ("nbits", "axis", "packing", "compute_dtype", "shape")
OWN_NEEDED = ("group_size", "quant_scale", "quant_zero", "encoded_state_dict")
# written together, by hqq 0.2 and by most of 0.1
TOGETHER = (
    ("stores_quant_config", "channel_wise", "optimize", "round_zero", "view_as_float"),
    ("view_as_float", "unpack_view_dtype"), ("meta_scale.view_as_float", "meta_scale.unpack_view_dtype"),
    ("meta_zero.view_as_float", "meta_zero.unpack_view_dtype"),
)  # fmt: skip
METAS = ("meta_scale.", "meta_zero.")


@register_quantizer("hqq")
class HqqHfQuantizer(HfQuantizer):
    """HQQ's layouts. Stored layers are read by their own settings; new ones get those of the configuration."""

    layouts_available = True

    def skipped_modules(self) -> Sequence[str]:
        skipped: Sequence[str] = self.quantization_config.skip_modules
        return skipped

    def begin(self, model: Any, slots: Sequence[Any]) -> None:
        super().begin(model, slots)
        if not self.pre_quantized and not self.quantization_config.quant_config:
            self.quantization_config.quant_config = layer_settings()
        for slot in slots:  # transformers 4 looked for the entry anywhere in the name
            found = [name for name in self.skipped_modules() if name and name in slot.module]
            if found:
                self.skip_reasons.setdefault(slot.module, f"{found[0]!r} is among the modules to skip")

    def weights_in(self, location: Path) -> Path:
        own = location / OWN_FILE
        return own if self.pre_quantized and not self.quantization_config.quant_config and own.is_file() else location

    def spelled_out(self, checkpoint: Any) -> Any:
        """hqq's own qmodel.pt keeps settings as plain values; as tensors they are hqq's safetensors flavour."""
        layers = {name.removesuffix(".W_q") for name in checkpoint.tensors if name.endswith(".W_q")}
        return files.SpelledOut(checkpoint, layers) if checkpoint.values and layers else checkpoint

    # --- reading ---

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        if not {"W_q", "packing", "zero_scale"} & set(stored):
            return None
        if module.kind not in ("linear", "router"):
            raise NotRepresentable(f"{module.name} is a packed {module.kind}; hqq stores linear layers one by one")
        settings = {name: value for name in stored if (value := files.setting(name, stored[name], peek)) is not None}
        _check_complete(module, stored, settings)
        for start in ("", *(start for start in METAS if any(name.startswith(start) for name in stored))):
            _check_values(module, stored, settings, start)
        shape = tuple(peek("shape").tolist())
        if shape != module.shape:
            raise ShapeMismatch(
                f"tensor {stored['shape'].name!r} in {stored['shape'].file} says {shape}, but {module.name} is {module.shape}"
            )
        kinds = []
        for name in ("scale", "zero"):
            own = (
                f"meta_{name}.scale" if settings[f"quant_{name}"] else "zero_scale" if "zero_scale" in stored else name
            )
            kinds.append(_dtype_of(module, stored, own, layouts.FLOATS))
        compute = str(settings["compute_dtype"]).removeprefix("torch.")
        layout = layouts.HqqLayout(
            module.shape, compute,
            settings=tuple((name, value) for name, value in settings.items() if name in stored),
            words=_dtype_of(module, stored, "W_q", ("uint8", "int32", *layouts.FLOATS)),
            parameter_dtypes=(kinds[0], kinds[1]),
            together="zero_scale" in stored,
        )  # fmt: skip
        _check_groups(module, layout, stored)
        return layout

    # --- creating ---

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if not self.should_convert(module):
            return None
        chosen = self._chosen(module)
        reason = None
        if module.kind != "linear":
            reason = f"hqq stores linear layers, one by one; this is of kind {module.kind!r}"
        elif chosen is None:
            reason = f"the configuration has no settings for {tag_of(module.name)!r}"
        else:
            reason = self._obstacle(module, chosen)
        if chosen is None or reason is not None:
            self.skip_reasons[module.name] = str(reason)
            return None
        return self._new_layout(module, chosen)

    def _chosen(self, module: ModuleInfo) -> Mapping[str, Any] | None:
        """The settings of a module: the only ones, or those of its tag."""
        config: Mapping[str, Any] = self.quantization_config.quant_config
        if "weight_quant_params" in config:
            return config
        found: Mapping[str, Any] | None = config.get(tag_of(module.name))
        return found

    def _obstacle(self, module: ModuleInfo, chosen: Mapping[str, Any]) -> str | None:
        rows, columns = module.shape
        own = _checked(chosen)
        group = own["group_size"] or (columns if own["axis"] == 1 else rows)
        if rows * columns % group:
            return f"its {rows} x {columns} weights are no whole number of groups of {group}"
        form = layouts.PACKINGS[layouts.PACKING_OF[own["nbits"]]]
        lines = rows * columns // group if own["axis"] == 1 else group
        if form.word == "uint8" and lines % form.blocks:
            return f"{own['nbits']} bits are packed {form.blocks} groups together, it has {lines}"
        wide = rows * columns // lines * (4 if form.word == "int32" else 1)
        if own["view_as_float"] and wide % (4 if _compute_dtype(module) == "float32" else 2):
            return f"its packed rows of {wide} bytes cannot be viewed as {_compute_dtype(module)}"
        return None

    def _new_layout(self, module: ModuleInfo, chosen: Mapping[str, Any]) -> Layout:
        own, compute = _checked(chosen), _compute_dtype(module)
        if chosen.get("scale_quant_params") or chosen.get("zero_quant_params"):
            self.decide("scales and zero points stay plain, as hqq 0.2 leaves them", module.name)
        packing = layouts.PACKING_OF[own["nbits"]]
        word = layouts.PACKINGS[packing].word
        together = bool(chosen.get("offload_meta"))
        settings: dict[str, Any] = {
            **own, "group_size": own["group_size"] or module.shape[own["axis"]], "packing": packing,
            "unpack_view_dtype": f"torch.{word}", "compute_dtype": f"torch.{compute}", "quant_scale": False,
            "quant_zero": False, "offload_meta": together, "stores_quant_config": True, "encoded_state_dict": True,
        }  # fmt: skip
        return layouts.HqqLayout(
            module.shape, compute, settings=tuple(settings.items()), words=compute if own["view_as_float"] else word,
            parameter_dtypes=(compute, compute), together=together,
        )  # fmt: skip


def tag_of(name: str) -> str:
    """hqq's name for all linears of one kind: without "model", "layers" and numbers."""
    return ".".join(part for part in name.split(".") if part not in ("model", "layers") and not part.isnumeric())


def _compute_dtype(module: ModuleInfo) -> str:
    return module.dtype if module.dtype in ("float16", "bfloat16") else "float32"


def _checked(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The weight's settings, complete. InvalidOption for one that is wrong."""
    own = chosen.get("weight_quant_params")
    if not isinstance(own, Mapping):
        raise InvalidOption(f"HqqConfig: {dict(chosen)!r} has no weight_quant_params")
    known = ("nbits", "group_size", "axis", "view_as_float")
    full = layer_settings(**{name: own[name] for name in known if name in own})["weight_quant_params"]
    for name in ("channel_wise", "optimize", "round_zero", "view_as_float"):
        full[name] = own.get(name, full[name])
        if not isinstance(full[name], bool):
            raise InvalidOption(f"HqqConfig: {name} is {full[name]!r}; it must be True or False")
    if not full["channel_wise"]:
        raise InvalidOption("HqqConfig: channel_wise is False, which hqq allows for scales and zero points only")
    return {name: full[name] for name in (*known, "channel_wise", "optimize", "round_zero")}


# --- checks of stored layers -----------------------------------------------------------------------------------------------


def _check_complete(module: ModuleInfo, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Everything that the layer's own settings call for is there."""
    needed = ["W_q", *NEEDED, *OWN_NEEDED]
    for index, group in enumerate(TOGETHER):
        if any(name in stored for name in (group[:-1] if index == 0 else group)):
            needed += group
    for name in ("scale", "zero"):
        if settings.get(f"quant_{name}"):
            needed += [f"meta_{name}.{own}" for own in ("scale", "zero", *NEEDED)]
        numbers = stored.get(f"meta_{name}.scale")
        if numbers is not None and len(numbers.shape) > 0:  # without groups there is one scale for all
            needed.append(f"meta_{name}.group_size")
    for name in needed:
        if name not in stored:
            raise MissingTensor(
                f"tensor '{module.name}.{name}' is not in the checkpoint; of {module.name} there are {', '.join(sorted(stored))}"
            )


def _check_values(module: ModuleInfo, stored: Mapping[str, Any], settings: Mapping[str, Any], start: str) -> None:
    """Settings are values that hqq knows, and agree with each other."""

    def wrong(name: str, wanted: str) -> CorruptFile:
        info = stored[start + name]
        return CorruptFile(f"tensor {info.name!r} in {info.file} holds {settings[start + name]!r}; it must be {wanted}")

    packing, nbits = settings[f"{start}packing"], settings[f"{start}nbits"]
    if packing not in layouts.PACKINGS:
        raise wrong("packing", listed(layouts.PACKINGS))
    allowed = [bits for bits, form in layouts.PACKING_OF.items() if form == packing]
    if not any(abs(nbits - bits) < 1e-6 for bits in allowed):
        raise wrong("nbits", f"{listed(allowed)} with packing {packing!r}")
    if settings[f"{start}axis"] not in (0, 1):
        raise wrong("axis", "0 or 1")
    if settings.get(f"{start}group_size", 1) <= 0:
        raise wrong("group_size", "a positive number")
    if settings[f"{start}compute_dtype"] not in [f"torch.{name}" for name in layouts.FLOATS]:
        raise wrong("compute_dtype", listed(f"torch.{name}" for name in layouts.FLOATS))
    word = layouts.PACKINGS[packing].word
    if settings.get(f"{start}unpack_view_dtype", f"torch.{word}") != f"torch.{word}":
        raise wrong("unpack_view_dtype", f"'torch.{word}' with packing {packing!r}")
    codes = "W_q" if not start else f"{start.removeprefix('meta_').removesuffix('.')}_q"
    as_float = bool(settings.get(f"{start}view_as_float", False))
    if codes in stored and as_float != (stored[codes].dtype in layouts.FLOATS):
        raise ShapeMismatch(
            f"tensor {stored[codes].name!r} in {stored[codes].file} is {stored[codes].dtype}, but view_as_float of {module.name} "
            f"is {as_float}"
        )


def _check_groups(module: ModuleInfo, layout: layouts.HqqLayout, stored: Mapping[str, Any]) -> None:
    """Groups divide what they group, so that shapes can be worked out."""
    parts = [("group_size", layout.grouped)]
    if layout.grouped.group is not None and module.shape[0] * module.shape[1] % layout.grouped.group == 0:
        parts += [
            (f"meta_{name}.group_size", part)
            for name in ("scale", "zero")
            if (part := layout.parameter(name)) is not None
        ]
    for name, part in parts:
        if part.group is not None and part.shape[0] * part.shape[1] % part.group:
            raise ShapeMismatch(
                f"tensor '{module.name}.{name}' says groups of {part.group}, which do not divide {part.shape[0]} x "
                f"{part.shape[1]}"
            )


def _dtype_of(module: ModuleInfo, stored: Mapping[str, Any], name: str, allowed: Sequence[str]) -> str:
    if name not in stored:
        raise MissingTensor(f"tensor '{module.name}.{name}' is not in the checkpoint")
    info = stored[name]
    if info.dtype not in allowed:
        raise ShapeMismatch(f"tensor {info.name!r} in {info.file} is {info.dtype}; it must be {listed(allowed)}")
    return str(info.dtype)
