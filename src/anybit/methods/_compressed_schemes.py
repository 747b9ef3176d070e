"""Which scheme compressed-tensors gives a module, and what a scheme says. Patterns are compiled once per configuration.

A target names a module exactly, or by a regular expression after "re:" that matches from the start of its name, or by the
name of its class or of a base class. Exact names go before expressions, expressions before classes; among equals the target
that sorts first wins. `ignore` uses the same rules and always wins.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anybit.errors import InvalidOption, NotRepresentable
from anybit.quantizers.matching import SafePattern, compiled

# name of the levels: (type, bits), as the configuration has them
LEVELS = {("float", 8): "e4m3", ("float", 6): "e2m3", ("float", 4): "e2m1"}


@dataclass(frozen=True)
class Arguments:
    """Quantization of one tensor. `block`: rows and columns that share a scale, 0 for a whole axis.

    `dynamic`: "no", "yes", or "local" (scales of groups found at run time under a stored scale of scales). `indexed`: columns
    were reordered before they were grouped (actorder "group"), so that weight_g_idx must tell their groups. `widths`: what
    `bits` may be where the configuration has a map of them and the stored codes must tell; `bits` is the widest until then.
    `averaging`: of static scales that are made, the share of a new sample in a moving average of extremes; 0 takes them all.
    """

    bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str = "tensor"
    block: tuple[int, int] = (0, 0)
    dynamic: str = "no"
    scale_dtype: str | None = None
    indexed: bool = False
    widths: tuple[int, ...] = ()
    averaging: float = 0.0

    @classmethod
    def of(cls, given: Mapping[str, Any], making: bool = False) -> Arguments:
        """From the completed dictionary of a configuration; `making`: its observer counts."""
        strategy, size = given["strategy"], given.get("group_size")
        block = {
            "tensor": (0, 0),
            "channel": (1, 0),
            "token": (1, 0),
            "attn_head": (1, 0),
            "group": (1, size),
            "tensor_group": (1, size),
            "block": tuple(given.get("block_structure") or (0, 0)),
        }[strategy]
        dynamic = given["dynamic"]
        scale_dtype, bits = given.get("scale_dtype"), given["num_bits"]
        widths = widths_in(bits)
        return cls(
            max(widths) if widths else bits, given["type"], bool(given["symmetric"]), strategy, block,
            "local" if str(getattr(dynamic, "value", dynamic)).lower() == "local" else "yes" if dynamic else "no",
            str(scale_dtype).removeprefix("torch.") if scale_dtype is not None else None,
            str(given.get("actorder")).lower() in ("group", "dynamic", "true"), widths, observed(given) if making else 0.0,
        )  # fmt: skip

    @property
    def group_size(self) -> int:
        return self.block[1]

    @property
    def levels(self) -> str | None:
        """The table of values; None for integers."""
        return LEVELS.get((self.type, self.bits)) if self.type == "float" else None

    @property
    def powers(self) -> bool:
        """Whether scales are powers of two, chosen as OCP's MX formats do."""
        return self.type == "float" and self.group_size == 32 and self.scale_dtype == "uint8"

    def __str__(self) -> str:
        what = f"{' or '.join(map(str, self.widths or (self.bits,)))}-bit {self.type}"
        return f"{'' if self.symmetric else 'asymmetric '}{what}, strategy {self.strategy}{self._where()}"

    def _where(self) -> str:
        return f" {self.block[0]} x {self.block[1]}" if all(self.block) else ""


def observed(given: Mapping[str, Any]) -> float:
    """The share by which the observer of static scales moves its averages; InvalidOption for one that is not known here."""
    name = given.get("observer")
    if name in (None, "static_minmax", "memoryless_minmax"):
        return 0.0
    if name == "minmax":
        return float((given.get("observer_kwargs") or {}).get("averaging_constant", 0.01))
    raise InvalidOption(
        f"CompressedTensorsConfig: observer is {name!r}; static scales are made by 'static_minmax' (the extremes of all data) "
        "or 'minmax' (moving averages)"
    )


def widths_in(bits: Any) -> tuple[int, ...]:
    """Numbers of bits that a map mentions, at any depth, in order; none for anything that is no map."""
    if not isinstance(bits, Mapping):
        return ()
    found: set[int] = set()
    for value in bits.values():
        found.update([value] if type(value) is int and 1 <= value <= 16 else widths_in(value))
    return tuple(sorted(found))


@dataclass(frozen=True)
class Scheme:
    """One group of a configuration."""

    name: str
    weights: Arguments | None = None
    inputs: Arguments | None = None
    outputs: Arguments | None = None
    format: str | None = None

    @classmethod
    def of(cls, name: str, group: Mapping[str, Any], default_format: str | None = None, making: bool = False) -> Scheme:
        """From a completed group."""

        def part(own: str) -> Arguments | None:
            return None if group.get(own) is None else Arguments.of(group[own], making and own != "weights")

        inputs, outputs = part("input_activations"), part("output_activations")
        return cls(name, part("weights"), inputs, outputs, group.get("format") or default_format)

    @property
    def stored_as(self) -> str:
        """The storage format: the group's own, or what compressed-tensors infers from bits and types."""
        if self.format not in (None, "mixed-precision", "fakequant", "dense"):
            return str(self.format)
        if self.weights is None:
            return "dense"
        kind, bits, group = self.weights.type, self.weights.bits, self.weights.group_size
        if kind == "float" and group == 32 and (bits in (4, 6) or (bits == 8 and self.weights.scale_dtype == "uint8")):
            return f"mxfp{bits}-quantized" if bits == 8 else f"mxfp{bits}-pack-quantized"
        if kind == "float" and bits == 4 and group == 16:
            return "nvfp4-pack-quantized"
        if kind == "int" and self.inputs is not None:
            return "int-quantized"
        if kind == "int" and bits <= 8:
            return "pack-quantized"
        return "float-quantized" if kind == "float" and self.inputs is not None else "naive-quantized"


class Targets:
    """A list of targets, compiled: which of them a module matches first."""

    def __init__(self, targets: Iterable[str]):
        named = sorted(set(targets))
        self._exact = {target for target in named if not target.startswith("re:")}
        self._patterns = [(target, compiled(target[3:])) for target in named if target.startswith("re:")]
        self._any = _together([pattern for _, pattern in self._patterns])
        self.classed = functools.lru_cache(maxsize=1024)(self._class_in)

    def find(self, name: str, classes: tuple[str, ...] = ()) -> str | None:
        """The target that names the module, None if none does. `classes`: the module's class and its bases."""
        return self.named(name) or self.classed(classes)

    def named(self, name: str) -> str | None:
        """The same by the module's name alone."""
        if name in self._exact:
            return name
        if self._patterns and (self._any is None or self._any.match(name) is not None):
            for target, pattern in self._patterns:
                if pattern.starts(name):
                    return target
        return None

    def _class_in(self, classes: tuple[str, ...]) -> str | None:
        return min((one for one in classes if one in self._exact), default=None)


def _together(patterns: Sequence[SafePattern]) -> re.Pattern[str] | None:
    """One expression that matches where any of `patterns` does, as a quick test; None where they cannot be joined."""
    if not patterns or any(pattern._re is None or pattern._re.groups for pattern in patterns):
        return None
    try:
        return re.compile("|".join(f"(?:{pattern.pattern})" for pattern in patterns))
    except re.error:  # flags in the middle
        return None


class Matcher:
    """Schemes by module."""

    def __init__(
        self,
        groups: Mapping[str, Mapping[str, Any]],
        ignore: Iterable[str],
        default_format: str | None = None,
        making: bool = False,
    ):
        self.schemes = {name: Scheme.of(name, group, default_format, making) for name, group in groups.items()}
        self._owner = {target: name for name, group in groups.items() for target in group["targets"]}
        self.targets = sorted(self._owner)
        self._targets = Targets(self._owner)
        self._ignored = Targets(ignore)

    def ignored(self, name: str, classes: tuple[str, ...] = ()) -> str | None:
        """The entry of `ignore` that names the module."""
        return self._ignored.find(name, classes)

    def scheme(self, name: str, classes: tuple[str, ...] = (), other: str | None = None) -> Scheme | None:
        """The scheme whose target names the module, whatever `ignore` says. `other`: another name of it, tried second."""
        target = self._targets.named(name)
        if target is None and other is not None:
            target = self._targets.named(other)
        if target is None:
            target = self._targets.classed(classes)
        return None if target is None else self.schemes[self._owner[target]]


@functools.lru_cache(maxsize=256)
def classes_of(kind: str, class_name: str) -> tuple[str, ...]:
    """Class names by which a target may mean a weight of this kind."""
    return (class_name, {"linear": "Linear", "embedding": "Embedding"}.get(kind, class_name), "Module")


# --- creating ------------------------------------------------------------------------------------------------------------------

# what we write is what this version of compressed-tensors reads: words without gaps
WRITTEN_VERSION = "0.20.0"


def check_made(config: Any, matcher: Matcher) -> None:
    """InvalidOption or NotRepresentable for what is not made from dense weights, with or without calibration data."""
    maps = [name for name, scheme in matcher.schemes.items() if scheme.weights is not None and scheme.weights.widths]
    if maps:
        raise InvalidOption(
            f"CompressedTensorsConfig: config_groups[{maps[0]!r}].weights.num_bits is a map, and which module has which bits is "
            "told by stored codes alone. To quantize, make one group for each number of bits, whose targets name its modules"
        )
    if (config.transform_config or {}).get("config_groups"):
        raise NotRepresentable(
            "CompressedTensorsConfig: transform_config says how a checkpoint was rotated, and is written by what rotates it: "
            "quantize(..., rotate='r1+r2+r4') (--rotate). Leave it out"
        )
    if isinstance(config.kv_cache_scheme, str):
        raise InvalidOption(
            f"CompressedTensorsConfig: kv_cache_scheme is {config.kv_cache_scheme!r}; to quantize it must say its bits and type, "
            "e.g. {'num_bits': 8, 'type': 'float'}"
        )
    if config.sparsity_config and config.sparsity_config.get("format") not in (None, "dense"):
        raise NotRepresentable(
            f"CompressedTensorsConfig: sparsity_config asks for {config.sparsity_config['format']!r}, which compressed-tensors "
            "no longer writes or reads since 0.15; pruned weights are quantized like others. Leave it out"
        )


def calibration_options(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What GPTQ is to do, as llm-compressor's GPTQModifier does for these groups: its damping, and their actorder."""
    orders = {
        ORDERS.get(
            str(getattr(own["weights"].get("actorder"), "value", own["weights"].get("actorder"))).lower(), "natural"
        )
        for own in groups.values()
        if own.get("weights") is not None
    }
    if len(orders) > 1:
        raise InvalidOption(
            "CompressedTensorsConfig: groups differ in weights.actorder, and GPTQ takes one order for a model; set one for all"
        )
    order = orders.pop() if orders else "natural"
    return {"damp": 0.01, "order": "natural" if order == "natural" else "columns", "static_groups": order == "weight"}


ORDERS = {"weight": "weight", "static": "weight", "group": "group", "dynamic": "group", "true": "group"}


def complete(config: Any, matcher: Matcher) -> None:
    """Write into a configuration what a reader of the finished checkpoint needs to know."""
    formats = {name: scheme.stored_as for name, scheme in matcher.schemes.items()}
    for name, found in formats.items():
        config.config_groups[name]["format"] = found
    kinds = set(formats.values()) - {"dense"} or {"dense"}
    config.format = kinds.pop() if len(kinds) == 1 else "mixed-precision"
    config.quantization_status = "compressed"
    config.version = WRITTEN_VERSION
