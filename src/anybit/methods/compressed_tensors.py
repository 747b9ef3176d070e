"""compressed-tensors. Groups of modules, each with a scheme for weights, inputs and outputs, and a storage format.

What is stored: see `_compressed_layouts` (codes and scales), `_compressed_sparse` (bitmasks, Marlin 2:4, weights that were not
compressed yet), `_compressed_runtime` (keys, values, outputs) and `_rotations`. Files before 0.7 call their entry
`compression_config`.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anybit.errors import InvalidOption, NotRepresentable, did_you_mean
from anybit.methods._compressed_schemes import (
    Arguments,
    Matcher,
    calibration_options,
    check_made,
    classes_of,
    complete,
    widths_in,
)
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin, difference
from anybit.quantizers.options import check_flags, check_names, check_objects, check_type, listed
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.methods._compressed_evidence import Stored
    from anybit.quantizers.measurement import Measurement
    from anybit.weight import Layout, ModuleInfo

STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
PARTS = ("weights", "input_activations", "output_activations")


def _scheme(weights: Mapping[str, Any] | None, inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"weights": weights, "input_activations": inputs}


def _float(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", **more}


def _mx(bits: int, **more: Any) -> dict[str, Any]:
    return _float(bits, group_size=32, scale_dtype="torch.uint8", **more)


def _nvfp4(**more: Any) -> dict[str, Any]:
    return _float(4, group_size=16, strategy="tensor_group", scale_dtype="torch.float8_e4m3fn", **more)


def _token(bits: int, kind: str = "int") -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": "token", "dynamic": True}


_G128: Mapping[str, Any] = {"group_size": 128}
# a group may be named after one of these, and then lists only its targets
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "UNQUANTIZED": _scheme(None),
    **{f"W{bits}A16": _scheme({"num_bits": bits, **_G128}) for bits in range(2, 9)},
    **{f"W{bits}A8": _scheme({"num_bits": bits, **_G128}, _token(8)) for bits in range(2, 8)},
    **{f"W{bits}A4": _scheme({"num_bits": bits, **_G128}, _token(4)) for bits in range(2, 5)},
    "W4A16_ASYM": _scheme({"num_bits": 4, "symmetric": False, **_G128}),
    **dict.fromkeys(("W8A8", "INT8"), _scheme({"num_bits": 8, "strategy": "channel"}, _token(8))),
    "W4AFP8": _scheme({"num_bits": 4, **_G128}, _token(8, "float")),
    "FP8": _scheme(_float(8), _float(8, observer="static_minmax")),
    "FP8_DYNAMIC": _scheme(_float(8, strategy="channel"), _token(8, "float")),
    "FP8_BLOCK": _scheme(_float(8, strategy="block", block_structure=[128, 128]), _float(8, dynamic=True, **_G128)),
    "NVFP4A16": _scheme(_nvfp4()),
    "NVFP4": _scheme(_nvfp4(), _nvfp4(dynamic="local", observer="static_minmax")),
    **{f"MXFP{bits}A16": _scheme(_mx(bits)) for bits in (4, 6, 8)},
    "MXFP4": _scheme(_mx(4), _mx(4, dynamic=True)),
    "MXFP8": _scheme(_mx(8), _mx(8, dynamic=True)),
    "MXFP6A8": _scheme(_mx(6), _mx(8, dynamic=True)),
    "MXFP4XFP8": _scheme(_mx(4), _float(8, dynamic=True, **_G128)),
}


# presets that are made under names of their own; of the static ones data tell the scales of inputs
NAMED = (
    "W4A16", "W4A16_ASYM", "W8A16", "W8A8", "W4A8", "W4AFP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP4",
    "MXFP8A16", "MXFP8", "MXFP6A16", "FP8", "NVFP4",
)  # fmt: skip


class _KeepsFile(QuantizationConfigMixin):
    """Remembers groups as a file has them, beside the options: completed ones say the same in other words."""

    __slots__ = ("_file",)
    _file: Mapping[str, Any]

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        found = super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        config = found[0] if return_unused_kwargs else found
        config._file = copy.deepcopy(cls.modernize(dict(config_dict)))
        return found


@register_quantization_config("compressed-tensors")
@dataclass(eq=False, repr=False)
class CompressedTensorsConfig(_KeepsFile):
    """`config_groups` are completed with their defaults, so that every scheme names bits, type, strategy and the rest."""

    config_groups: dict[str, Any] | None = None
    format: str = "dense"
    quantization_status: str = "initialized"
    kv_cache_scheme: dict[str, Any] | str | None = None
    global_compression_ratio: float | None = None
    ignore: list[str] | None = None
    quant_method: str = "compressed-tensors"
    run_compressed: bool | None = None  # older name of `not dequantize`
    dequantize: bool = False
    use_optimized_inference: bool = False
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None
    moe_sparsity_config: dict[str, Any] | None = None
    version: str | None = None

    method: ClassVar[str] = "compressed-tensors"
    config_keys: ClassVar[tuple[str, ...]] = ("quantization_config", "compression_config")
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"ct-{preset.lower().replace('_', '-')}": {"config_groups": {preset: ["Linear"]}, "ignore": ["lm_head"]}
        for preset in NAMED
    }
    targets: ClassVar[tuple[str, ...]] = ("transformers", "vllm")
    loading_attributes: ClassVar[tuple[str, ...]] = ("dequantize", "use_optimized_inference")
    optional: ClassVar[tuple[str, ...]] = ("sparsity_config", "transform_config", "version")

    def __post_init__(self) -> None:
        run_compressed = self.__dict__.pop("run_compressed", None)
        self.dequantize = self.dequantize or run_compressed is False
        super().__post_init__()

    def post_init(self) -> None:
        check_objects(self, "config_groups", "sparsity_config", "transform_config", "moe_sparsity_config")
        check_type(self, "kv_cache_scheme", dict, str, None)
        check_type(self, "format", str)
        check_flags(self, "dequantize", "use_optimized_inference")
        check_names(self, "ignore")
        self.config_groups = {name: completed_scheme(name, group) for name, group in (self.config_groups or {}).items()}
        if isinstance(self.kv_cache_scheme, dict):
            self.kv_cache_scheme = completed_arguments("kv_cache_scheme", self.kv_cache_scheme)

    @property
    def is_quantized(self) -> bool:
        """Whether some group has a scheme."""
        return bool(self.config_groups)

    @property
    def is_quantization_compressed(self) -> bool:
        """Whether the stored weights are codes, not floats with scales beside them."""
        return self.is_quantized and self.quantization_status == "compressed"

    @property
    def has_fp8_modules(self) -> bool:
        """Whether some group has 8-bit float weights."""
        weights = (group["weights"] for group in (self.config_groups or {}).values())
        return any(args is not None and (args["type"], args["num_bits"]) == ("float", 8) for args in weights)

    def per_module(self, settings: Mapping[str, QuantizationConfigMixin | None]) -> QuantizationConfigMixin:
        groups = {f"group_{number}": copy.deepcopy(group) for number, group in enumerate(self._groups(self))}
        dense = list(self.ignore or ())
        for module, other in settings.items():
            if other is None:
                dense.append(module)
                continue
            (wanted,) = self._groups(other)
            own = {**copy.deepcopy(wanted), "targets": []}
            name = next((name for name, group in groups.items() if {**group, "targets": []} == own), None)
            if name is None:
                name = f"group_{len(groups)}"
                groups[name] = own
            groups[name]["targets"].append(module)
        return type(self)(config_groups=groups, ignore=dense, kv_cache_scheme=copy.deepcopy(self.kv_cache_scheme))

    @staticmethod
    def _groups(config: Any) -> list[dict[str, Any]]:
        """Groups as data; formats are chosen anew, group by group, when a checkpoint is made."""
        return [{**group, "format": None} for group in (config.config_groups or {}).values()]

    @classmethod
    def recognizes(cls, config_dict: Mapping[str, Any]) -> bool:
        if config_dict.get("quant_method") is not None:
            return config_dict["quant_method"] == "compressed_tensors"
        sparse = config_dict.get("sparsity_config")
        return "quant_algo" not in config_dict and (
            "config_groups" in config_dict or (isinstance(sparse, dict) and "format" in sparse)
        )

    @classmethod
    def modernize(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        inside = config_dict.get("quantization_config")
        if not isinstance(inside, dict):
            return config_dict
        return {**{name: value for name, value in config_dict.items() if name != "quantization_config"}, **inside}

    def own_dict(self) -> dict[str, Any]:
        own = super().own_dict()
        if not (self.config_groups or self.kv_cache_scheme):
            return {name: own[name] for name in ("quant_method", *self.optional) if name in own}
        file = getattr(self, "_file", {})
        written = file.get("config_groups") or {}
        for name, group in (self.config_groups or {}).items():
            if name in written and completed_scheme(name, written[name]) == group:
                own["config_groups"][name] = copy.deepcopy(written[name])
        cache = file.get("kv_cache_scheme")
        if isinstance(cache, dict) and completed_arguments("kv_cache_scheme", cache) == self.kv_cache_scheme:
            own["kv_cache_scheme"] = copy.deepcopy(cache)
        return {name: value for name, value in own.items() if name not in self.loading_attributes}

    def to_diff_dict(self) -> dict[str, Any]:
        return difference(self, CompressedTensorsConfig())


def completed_scheme(name: str, group: Any) -> dict[str, Any]:
    """A group with its preset resolved and every part completed. InvalidOption names what is wrong with it."""
    if isinstance(group, (list, tuple)):
        if name.upper() not in PRESETS:
            raise InvalidOption(
                f"CompressedTensorsConfig: config_groups[{name!r}] only lists targets, so its name must be a preset"
                f"{did_you_mean(name, PRESETS) or '.'} Presets: {', '.join(PRESETS)}"
            )
        group = {"targets": list(group), **PRESETS[name.upper()]}
    if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
        raise InvalidOption(
            f"CompressedTensorsConfig: config_groups[{name!r}] is {group!r}; it must be an object with `targets`"
        )
    parts = {
        part: None if group.get(part) is None else completed_arguments(f"config_groups[{name!r}].{part}", group[part])
        for part in PARTS
    }
    return {"format": None, **group, **parts}


def completed_arguments(where: str, given: Any) -> dict[str, Any]:
    """Bits, type, strategy and so on of one tensor, completed with the defaults.

    The bits of weights may be a map: the stored codes tell which of its numbers is meant. Nothing stored tells those of states.
    """
    stored = where.endswith(".weights")
    if not isinstance(given, dict):
        raise InvalidOption(
            f"CompressedTensorsConfig: {where} is {given!r}; it must be an object such as {{'num_bits': 8}}"
        )
    args = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "group_size": None,
        "strategy": None,
        "dynamic": False,
        **given,
    }
    args["type"] = str(getattr(args["type"], "value", args["type"])).lower()
    size, block = args["group_size"], args.get("block_structure")
    if isinstance(block, str):
        args["block_structure"] = [int(side) if side.isdigit() else 0 for side in block.lower().split("x")]
    if args["strategy"] is None:
        args["strategy"] = "tensor" if size is None else "channel" if size == -1 else "group"
    args["strategy"] = str(getattr(args["strategy"], "value", args["strategy"])).lower()
    block = args.get("block_structure")
    grouped = args["strategy"] in ("group", "tensor_group")
    wrong = {
        "num_bits": (
            (type(args["num_bits"]) is int and 1 <= args["num_bits"] <= 16)
            or (stored and bool(widths_in(args["num_bits"]))),
            f"it must be a whole number from 1 to 16{', or a map that names some' if stored else ''}",
        ),
        "type": (args["type"] in ("int", "float"), "it must be 'int' or 'float'"),
        "strategy": (args["strategy"] in STRATEGIES, f"it must be {listed(STRATEGIES)}"),
        "group_size": (
            type(size) is int and size > 0 if grouped else size in (None, -1),
            f"with strategy {args['strategy']!r} it must be {'a positive whole number' if grouped else 'null or -1'}",
        ),
        "block_structure": (
            (block is None) == (args["strategy"] != "block")
            and (block is None or (len(block) == 2 and all(type(side) is int and side > 0 for side in block))),
            "strategy 'block', and no other, has two positive whole numbers, rows and columns",
        ),
    }
    for name, (fine, cure) in wrong.items():
        if not fine:
            raise InvalidOption(f"CompressedTensorsConfig: {where}.{name} is {args.get(name)!r}; {cure}")
    return args


# --- quantizer -----------------------------------------------------------------------------------------------------------


@register_quantizer("compressed-tensors")
class CompressedTensorsHfQuantizer(HfQuantizer):
    """compressed-tensors' layouts. From a dense checkpoint, codes are rounded to nearest as its presets do without data.

    With data, static scales are measured and integers rounded by GPTQ, as llm-compressor's modifiers do.
    """

    layouts_available = True
    calibrated_algorithm: str | None = "gptq"  # type: ignore[misc]  # of a configuration with integers only

    def __init__(self, quantization_config: QuantizationConfigMixin, *, pre_quantized: bool = True, **kwargs: Any):
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)
        config = self.quantization_config
        self.matcher = Matcher(config.config_groups or {}, config.ignore or (), config.format, making=not pre_quantized)
        if not pre_quantized:
            check_made(config, self.matcher)
            weights = [scheme.weights for scheme in self.matcher.schemes.values() if scheme.weights is not None]
            fits = weights and all(args.type == "int" and args.block[0] == 1 for args in weights)
            self.calibrated_algorithm = "gptq" if fits else None
            calibration_options(config.config_groups or {})

    @functools.cached_property
    def stored(self) -> Stored:
        """What reads stored tensors."""
        from anybit.methods._compressed_evidence import Stored

        return Stored(self.quantization_config, self.matcher, self.decide)

    def attach(self, model: Any, checkpoint: Any, path_of: Callable[[str], str | None]) -> None:
        from anybit.methods._compressed_runtime import Runtime

        config = self.quantization_config
        self.decisions = {}
        making = not self.pre_quantized
        runtime = Runtime(self.matcher, self._cache(checkpoint), config.transform_config, making)
        runtime.attach(model, checkpoint, path_of)
        self.attached, self.folds = runtime.keys, runtime.rotations.folds
        self.rotations = runtime.rotations

    def measurements(self, model: Any) -> Mapping[str, Measurement]:
        from anybit.methods._compressed_measured import measurements

        cache = self.quantization_config.kv_cache_scheme
        if self.pre_quantized:
            return {}
        dtype = str(model.dtype).removeprefix("torch.")
        return measurements(model, self.matcher, None if cache is None else Arguments.of(cache, making=True), dtype)

    def calibration_options(self) -> dict[str, Any]:
        return calibration_options(self.quantization_config.config_groups or {})

    rotations: Any = None

    def _cache(self, checkpoint: Any) -> Arguments | None:
        """How keys and values are quantized. Where the configuration has only a word for it, the stored scales tell."""
        from anybit.methods._cache_scales import cache_algo
        from anybit.methods._compressed_runtime import CACHE_SCALE

        scheme = self.quantization_config.kv_cache_scheme
        if not isinstance(scheme, str):
            return None if scheme is None else Arguments.of(scheme)
        scales = [info for name, info in checkpoint.tensors.items() if CACHE_SCALE.search(name)]
        if cache_algo(None, scheme) != "FP8" or not scales:
            why = "its scales are kept and not used" if scales else "no scale of it is stored, and it is not rounded"
            self.decide(f"keys and values: the configuration's kv_cache_scheme is {scheme!r}; {why}", "the cache")
            return None
        strategy = "attn_head" if any(len(info.shape) == 3 for info in scales) else "tensor"
        return Arguments(bits=8, type="float", strategy=strategy, block=(1, 0) if strategy == "attn_head" else (0, 0))

    def begin(self, model: Any, slots: Sequence[Any]) -> None:
        self.modules_to_not_convert = list(self.quantization_config.ignore or ())
        self.skip_reasons = {}
        if self.pre_quantized:
            return
        for slot in slots:
            entry = self.matcher.ignored(slot.module, classes_of(slot.kind, slot.class_name))
            if entry is not None:
                self.skip_reasons[slot.module] = f"{entry!r} is in the configuration's 'ignore'"
        complete(self.quantization_config, self.matcher)
        for scheme in self.matcher.schemes.values():
            if scheme.weights is not None and scheme.weights.indexed:
                self.decide(
                    "actorder 'group' stores weight_g_idx, and compressed-tensors refuses such files since 0.19; all versions "
                    "read 'weight'",
                    f"config_groups[{scheme.name!r}]",
                )

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        layout = self.stored.layout(module, stored, peek)
        stacked = (
            module.kind == "linear"
            and self.rotations is not None
            and f"{module.name}.weight" not in self.rotations.folds
        )
        if stacked and self.rotations.acts_on(module.name, classes_of(module.kind, module.class_name)):
            raise NotRepresentable(
                f"{module.name}: the configuration rotates its input at run time, but the model's class keeps it in a stack of "
                "experts; rotations of single experts are not supported"
            )
        return layout

    def rotate_inputs(self, modules: Sequence[str], size: int) -> None:
        endings = sorted({re.escape(name.rpartition(".")[2]) for name in modules})
        targets = [f"re:.*\\.{ending}$" for ending in endings]
        uses = [
            {"targets": targets, "location": "input"},
            {"targets": targets, "location": "weight_input", "inverse": True},
        ]
        group = {"type": "hadamard", "head_dim": size, "apply": uses}
        self.quantization_config = copy.deepcopy(self.quantization_config)  # the caller's may be used for another model
        self.quantization_config.transform_config = {"config_groups": {"R4": group}}

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if not self.should_convert(module):
            return None
        layout, reason = self.stored.layout_to_make(module)
        if layout is None:
            self.skip_reasons[module.name] = reason
        return layout
