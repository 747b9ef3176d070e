"""SINQ. Groups with a scale per row and a second scale per column, found by Sinkhorn normalisation.

Stored: W_q (packed as HQQ does), meta.scale and meta.zero [rows, 1] or each as 8-bit codes x with s and m, meta.scale2 [1, in] or
one for each tile, bias; model.safetensors.index.json.meta.json holds bits, group, shape and packing of each layer.
W = ((code - zero) * scale) * scale2
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from anybit.errors import CalibrationNeeded, CorruptFile, MissingTensor, ShapeMismatch
from anybit.methods import _sinq_layout as layouts
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import InvalidOption, check_choice, check_names, check_positive, listed
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.weight import Layout, ModuleInfo

SIDECAR = "model.safetensors.index.json.meta.json"  # the settings of each layer
FLAGS = ("sinq", "is_sinq", "sinq_quantized")


@register_quantization_config("sinq")
@dataclass(eq=False, repr=False)
class SinqConfig(QuantizationConfigMixin):
    """`method` "asinq" also weighs by activations. A stored layer carries its own settings."""

    nbits: int = 4
    group_size: int = 64
    tiling_mode: str = "1D"
    method: str = "sinq"  # type: ignore[misc]  # an option; read from the class it is the quant_method, the same word
    modules_to_not_convert: list[str] | None = None
    _extra_kwargs: dict[str, Any] = field(default_factory=dict)

    claims: ClassVar[tuple[str, ...]] = FLAGS
    side_files: ClassVar[tuple[str, ...]] = (SIDECAR, "model.safetensors.meta.json")
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **{f"sinq-{bits}bit": {"nbits": bits} for bits in (8, 6, 5, 4, 3, 2)},
        "sinq-4bit-2d": {"tiling_mode": "2D"},
    }

    def post_init(self) -> None:
        for name in ("nbits", "group_size"):
            try:
                setattr(self, name, int(getattr(self, name)))
            except (TypeError, ValueError) as error:
                raise InvalidOption(
                    f"SinqConfig: {name} is {getattr(self, name)!r}; it must be a whole number"
                ) from error
        check_positive(self, "nbits", "group_size")
        self.tiling_mode, self.method = str(self.tiling_mode), str(self.method).lower()
        check_choice(self, "method", ("sinq", "asinq"))
        check_names(self, "modules_to_not_convert")

    @classmethod
    def recognizes(cls, config_dict: Mapping[str, Any]) -> bool:
        named = (config_dict.get(key) for key in ("quantization_method", "backend", "approach"))
        return config_dict.get("quant_method") is None and ("sinq_version" in config_dict or "sinq" in named)

    @classmethod
    def found_in(cls, folder: Path, model_config: Mapping[str, Any]) -> dict[str, Any] | None:
        inside = super().found_in(folder, model_config)
        return {} if inside is None and any(model_config.get(flag) is True for flag in FLAGS) else inside


@register_quantizer("sinq")
class SinqHfQuantizer(HfQuantizer):
    """SINQ's layouts. `settings`: what the sidecar says of each layer."""

    layouts_available = True

    def __init__(self, quantization_config: QuantizationConfigMixin, *, pre_quantized: bool = True, **kwargs: Any):
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)
        self.settings: dict[str, dict[str, Any]] = {}
        if pre_quantized:
            return
        config = self.quantization_config
        if config.method == "asinq":
            raise CalibrationNeeded(
                "method 'asinq' weighs columns by the inputs that a layer sees, which quantizing at load does not run; method "
                "'sinq' needs none. Checkpoints that sinq itself made with 'asinq' load"
            )
        check_choice(config, "nbits", sorted(layouts.PACKING_OF))
        check_choice(config, "tiling_mode", ("1D", "2D"))

    # --- reading ---

    def spelled_out(self, checkpoint: Any) -> Any:
        if self.pre_quantized:
            path = Path(checkpoint.path)
            folder = path if path.is_dir() else path.parent
            for file in sorted(folder.glob("*.safetensors*.meta.json")):
                self._read_sidecar(file)
        return checkpoint

    def _read_sidecar(self, file: Path) -> None:
        from anybit.quantizers.checkpoint_config import read_json

        for module, entry in read_json(file).items():
            if isinstance(entry, dict) and isinstance(entry.get("meta"), dict):
                self.settings[module] = entry["meta"]

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        of_sinq = [name for name in stored if name == "W_q" or name.startswith("meta.")]
        if not of_sinq:
            return None
        coded = "meta.scale" not in stored
        needed = ("W_q", "meta.scale2", *(("meta.scale.x", "meta.scale.s", "meta.zero.x") if coded else ("meta.zero",)))
        for name in needed:
            if name not in stored:
                raise MissingTensor(
                    f"tensor {module.name + '.' + name!r} is not in the checkpoint; of it there are {', '.join(sorted(stored))}"
                )
        codes, scales = stored["W_q"], stored["meta.scale.x" if coded else "meta.scale"]
        settings = self.settings.get(codes.name.removesuffix(".W_q"), {})
        self._check_settings(module, settings)
        packing, bits = self._packing(module, codes, _count(scales), settings)
        group = _group(module, codes, scales, packing)
        zero = stored["meta.zero.x" if coded else "meta.zero"]
        parameters = stored["meta.scale.s" if coded else "meta.scale"].dtype
        parameters = parameters if parameters in layouts.FLOATS else "float16"
        second = stored["meta.scale2"]
        square = len(second.shape) == 3
        if square and (module.shape[0] % group or module.shape[1] % group):
            raise ShapeMismatch(
                f"tensor {second.name!r} has scales of square tiles of {group}, which a weight {module.shape} is not made of"
            )
        if coded and module.shape[0] * module.shape[1] // group % layouts.HIGH:
            raise ShapeMismatch(
                f"tensor {scales.name!r} holds scales as codes, {layouts.HIGH} in a column, and a weight {module.shape} in "
                f"groups of {group} does not fill its columns"
            )
        levels = _levels(module, settings, bits)
        computed = str(settings.get("compute_dtype") or module.dtype).removeprefix("torch.")
        return layouts.SinqLayout(
            module.shape,
            module.dtype,
            bits,
            group,
            packing,
            codes.dtype,
            square,
            coded,
            one_zero=_count(zero) == 1 and _count(scales) > 1,
            levels=levels,
            parameters=parameters,
            second=second.dtype if second.dtype in layouts.FLOATS else "float16",
            compute=parameters if levels is not None else _promoted(computed, parameters),
        )

    def _check_settings(self, module: ModuleInfo, settings: Mapping[str, Any]) -> None:
        if list(settings.get("shape", module.shape)) != list(
            module.shape
        ):  # the tensors have to fit the model in any case
            self.decide(
                f"the sidecar tells of a weight {settings['shape']}, tensors and model of {module.shape}", module.name
            )
        if settings.get("axis", 1) != 1:
            raise CorruptFile(
                f"the sidecar says that {module.name} has groups along axis {settings['axis']!r}; SINQ writes axis 1 only"
            )

    def _packing(self, module: ModuleInfo, codes: Any, count: int, settings: Mapping[str, Any]) -> tuple[str, int]:
        """How codes lie in words, and their bits: by the sidecar, or by how many rows of words there are."""
        bits = settings.get("nbits", self.quantization_config.nbits)
        if "packing" in settings:
            name = settings["packing"] or "8bit_u8"
            if name not in layouts.PACKINGS:
                raise CorruptFile(
                    f"the sidecar says that {module.name} is packed as {name!r}; known are {listed(sorted(layouts.PACKINGS))}"
                )
            own = layouts.PACKINGS[name].bits
            if name == "8bit_u8" and bits in layouts.PACKING_OF:
                return name, int(bits)
            if bits != own and not (bits == 1.58 and own == 2):
                raise CorruptFile(f"the sidecar says that {module.name} has {bits!r} bits and is packed as {name!r}")
            return name, own
        fits = [
            name
            for name, form in layouts.PACKINGS.items()
            if form.word == codes.dtype and len(codes.shape) == 2 and -(-count // form.blocks) == codes.shape[0]
        ]
        usual = layouts.PACKING_OF.get(bits)
        if usual in fits or len(fits) == 1:
            name = usual if usual in fits else fits[0]
            assert name is not None
            return name, layouts.PACKINGS[name].bits
        raise ShapeMismatch(
            f"tensor {codes.name!r} is {codes.dtype} {tuple(codes.shape)}; {count} groups of a weight {module.shape} take "
            f"{'that many words in several ways' if fits else 'another number of words in every way'} SINQ packs them, and no "
            f"{SIDECAR} tells. Get that file, too"
        )

    def claims(self, tensor_name: str) -> str | None:
        if tensor_name.endswith("rotary_emb.original_inv_freq"):
            return "recomputed from the configuration"
        return None

    # --- creating ---

    def model_config(self, config: dict[str, Any]) -> dict[str, Any]:
        made = super().model_config(config)
        # what sinq's own reader looks for
        known = {"sinq": True, "backend": "sinq", "quantization_method": "sinq", "sinq_version": "auto"}
        return {**made, "quantization_config": {**known, **made["quantization_config"]}, "sinq": True}

    def made_files(self, layouts: Mapping[str, Layout]) -> Mapping[str, bytes]:
        return {
            SIDECAR: json.dumps({name: {"meta": _settings_of(layout)} for name, layout in layouts.items()}).encode()
        }

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if not self.should_convert(module):
            return None
        config = self.quantization_config
        square, group = config.tiling_mode == "2D", config.group_size
        while not square and group >= 16 and module.shape[-1] % group:
            group //= 2
        reason = _stays_dense(module, config.group_size, group, square)
        if reason is not None:
            self.skip_reasons[module.name] = reason
            return None
        packing = layouts.PACKING_OF[config.nbits]
        words = layouts.PACKINGS[packing].word
        return layouts.SinqLayout(
            module.shape,
            module.dtype,
            config.nbits,
            group,
            packing,
            words,
            square,
            compute=_promoted(module.dtype, "float16"),
        )


def _stays_dense(module: ModuleInfo, wanted: int, group: int, square: bool) -> str | None:
    if module.kind != "linear":
        return f"SINQ stores linear layers, one by one; this is a {module.class_name} ({module.kind})"
    rows, columns = module.shape
    if rows < 2 or columns < 2:
        return "its columns have no spread to balance"
    if square and (rows % group or columns % group):
        return f"a weight {module.shape} is not made of square tiles of {group}"
    if columns % group or (not square and group < 16):
        return f"its {columns} columns are no whole groups of {wanted}, nor of a half or a quarter of that, down to 16"
    if rows * columns // group % layouts.HIGH:
        return f"its {rows * columns // group} groups are no multiple of the {layouts.HIGH} whose scales are stored together"
    return None


def _count(info: Any) -> int:
    count = 1
    for size in info.shape:
        count *= size
    return count


def _group(module: ModuleInfo, codes: Any, scales: Any, packing: str) -> int:
    """Columns of a group, as wide as the rows of codes. Scales have to agree, and are as many as groups."""
    form = layouts.PACKINGS[packing]
    items = layouts.ITEMSIZE.get(codes.dtype, 0) if codes.dtype in (form.word, *layouts.FLOATS) else 0
    width = codes.shape[-1] * items // layouts.ITEMSIZE[form.word] if codes.shape else 0
    count, weights = _count(scales), module.shape[0] * module.shape[1]
    if len(codes.shape) != 2 or width == 0 or weights != count * width or module.shape[1] % width:
        raise ShapeMismatch(
            f"tensor {codes.name!r} is {codes.dtype} {tuple(codes.shape)}, packed as {packing}: groups of {width}; tensor "
            f"{scales.name!r} {tuple(scales.shape)} has scales for {count}. A weight {module.shape} needs one for each"
        )
    return width


def _levels(module: ModuleInfo, settings: Mapping[str, Any], bits: int) -> str | None:
    method = str(settings.get("method", "")).lower()
    for name, own in (("nf4", 4), ("nf3", 3)):
        if name in method:
            if bits != own:
                raise CorruptFile(
                    f"the sidecar says that {module.name} has {bits} bits and the method {method!r}, whose table has {own}"
                )
            return name
    return None


def _promoted(left: str, right: str) -> str:
    """The dtype of a product of the two."""
    return left if left == right else "float32"


def _settings_of(layout: Layout) -> dict[str, Any]:
    assert isinstance(layout, layouts.SinqLayout)
    shape = [layout.tiled[0] * layout.tiled[1], layout.group, 1] if layout.square else [layout.count, 1]
    return {
        "nbits": layout.bits,
        "group_size": layout.group,
        "shape": list(layout.shape),
        "scale.shape": shape,
        "awq_scale": None,
        "zero.shape": shape,
        "axis": 1,
        "packing": layout.packing,
        "method": "sinq_quantAux",
        "compute_dtype": f"torch.{layout.dtype}",
        "unpack_view_dtype": f"torch.{layouts.PACKINGS[layout.packing].word}",
        "view_as_float": False,
    }
