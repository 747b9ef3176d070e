"""Gemma's own checkpoints. 2-, 4- or 8-bit rows and, where calibrated, static 8-bit ranges of inputs and outputs.

Stored: weight int8 [out, in] or uint8 [out, ceil(in*bits/8)] (lowest bits first, code minus 2^(bits-1)), weight_scale float32
[out, 1], input_activation_scale and output_activation_scale (0 means none), bias; for embeddings embedding_quantized and
embedding_scale [vocabulary, blocks].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from anybit.errors import InvalidOption, MissingTensor, ShapeMismatch
from anybit.methods import _gemma_layouts as layouts
from anybit.quantizers.base import HfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.options import check_choice, check_flags, check_names, check_objects, listed
from anybit.quantizers.registry import register_quantization_config, register_quantizer

if TYPE_CHECKING:
    from anybit.weight import Layout, ModuleInfo

BITS = (2, 4, 8)
FLOATS = ("float32", "bfloat16", "float16")


@register_quantization_config("gemma")
@dataclass(eq=False, repr=False)
class GemmaQuantizationConfig(QuantizationConfigMixin):
    """`module_quant_configs`: pattern -> {"num_bits": n} for modules that are not of `num_bits`.

    The pattern that matches nearest to the start of a module's name counts; of several there, the first.
    """

    num_bits: int = 4
    quantize_embeddings: bool = False
    module_quant_configs: dict[str, dict[str, Any]] | None = None
    modules_to_not_convert: list[str] | None = None

    method: ClassVar[str] = "gemma"
    schemes: ClassVar[Mapping[str, Mapping[str, Any]]] = {f"gemma-{bits}bit": {"num_bits": bits} for bits in BITS}

    def post_init(self) -> None:
        check_choice(self, "num_bits", BITS)
        check_flags(self, "quantize_embeddings")
        check_objects(self, "module_quant_configs")
        check_names(self, "modules_to_not_convert")
        for pattern in self.module_quant_configs or {}:
            self._bits_under(pattern)

    def bits_of(self, module: str) -> int:
        """The bits of a module, by its own pattern or for all."""
        from anybit.quantizers.matching import compiled

        places = [(compiled(pattern).first(module), pattern) for pattern in self.module_quant_configs or {}]
        found = [(place, pattern) for place, pattern in places if place is not None]
        return self._bits_under(min(found, key=lambda item: item[0])[1]) if found else self.num_bits

    def _bits_under(self, pattern: str) -> int:
        own = (self.module_quant_configs or {})[pattern]
        bits = own.get("num_bits", self.num_bits)
        if set(own) - {"num_bits"} or bits not in BITS:
            raise InvalidOption(
                f"GemmaQuantizationConfig: module_quant_configs[{pattern!r}] is {own!r}; it may hold num_bits, which is "
                f"{listed(BITS)}"
            )
        return int(bits)


@register_quantizer("gemma")
class GemmaQuantizer(HfQuantizer):
    """Gemma's layouts."""

    layouts_available = True

    # --- reading ---

    def layout_of(self, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
        if module.kind == "embedding":
            names = ("embedding_quantized", "embedding_scale")
            if not set(names) & set(stored):
                return None
        else:
            names = ("weight", "weight_scale")
            if names[1] not in stored and getattr(stored.get("weight"), "dtype", None) in FLOATS:
                return None
        for name in names:
            if name not in stored:
                raise MissingTensor(
                    f"tensor {module.name + '.' + name!r} is not in the checkpoint; of it there are {', '.join(sorted(stored))}"
                )
        codes, scale = (stored[name] for name in names)
        bits = self.quantization_config.bits_of(module.name)
        self._check_width(module, codes, bits)
        blocks = self._blocks(module, scale)
        ranges = tuple(
            name for name in (layouts.INPUT, layouts.OUTPUT) if name in stored and module.kind != "embedding"
        )
        rounds = any(stored[name].shape == () and bool(peek(name) != 0) for name in ranges)
        stored_as = "uint8" if bits < 8 and codes.dtype == "uint8" else "int8"
        dtypes = tuple(stored[name].dtype if stored[name].dtype in FLOATS else "float32" for name in ranges)
        return layouts.GemmaLayout(
            module.shape, module.dtype, bits, *names, stored_as, scale.dtype, dtypes, blocks, ranges, rounds
        )

    @staticmethod
    def _check_width(module: ModuleInfo, codes: Any, bits: int) -> None:
        rows, columns = module.shape[-2:]
        wanted = (rows, layouts.bytes_in_row(columns, bits))
        dtypes = ("int8",) if bits == 8 else ("uint8", "int8")
        if tuple(codes.shape) == wanted and codes.dtype in dtypes:
            return
        fits = [other for other in BITS if tuple(codes.shape) == (rows, layouts.bytes_in_row(columns, other))]
        hint = f"; as many bytes as {listed(fits)} bits take" if fits and bits not in fits else ""
        raise ShapeMismatch(
            f"tensor {codes.name!r} is {codes.dtype} {tuple(codes.shape)}{hint}. A weight {(rows, columns)} of {bits} bits, as "
            f"the configuration has it, needs {' or '.join(dtypes)} {wanted}"
        )

    @staticmethod
    def _blocks(module: ModuleInfo, scale: Any) -> int:
        """Scales of a row: one, or for embeddings one for each of several blocks of equal width."""
        rows, columns = module.shape[-2:]
        fits = len(scale.shape) == 2 and scale.shape[0] == rows and scale.shape[1] > 0 and columns % scale.shape[1] == 0
        if not fits or scale.dtype not in FLOATS or (module.kind != "embedding" and scale.shape[1] != 1):
            blocks = "1 or a divisor of its width" if module.kind == "embedding" else "1"
            raise ShapeMismatch(
                f"tensor {scale.name!r} is {scale.dtype} {tuple(scale.shape)}; a weight {(rows, columns)} has float32 "
                f"({rows}, {blocks})"
            )
        return int(scale.shape[1])

    def claims(self, tensor_name: str) -> str | None:
        if re.search(r"\.[kv]_cache_scale$", tensor_name):
            return "scales for a quantized cache, which Gemma's own loader leaves to other programs, too"
        return None

    # --- creating ---

    def layout_for(self, module: ModuleInfo) -> Layout | None:
        if not self.should_convert(module):
            return None
        config = self.quantization_config
        if module.kind == "embedding" and not config.quantize_embeddings:
            self.skip_reasons[module.name] = "quantize_embeddings is not set"
            return None
        if module.kind not in ("linear", "embedding"):
            self.skip_reasons[module.name] = f"Gemma has no form for a {module.class_name} ({module.kind})"
            return None
        bits = config.bits_of(module.name)
        stored_as = "int8" if bits == 8 else "uint8"
        if module.kind == "embedding":
            names = ("embedding_quantized", "embedding_scale")
            return layouts.GemmaLayout(module.shape, module.dtype, bits, *names, stored_as)
        ranges = (layouts.INPUT, layouts.OUTPUT)
        return layouts.GemmaLayout(
            module.shape, module.dtype, bits, stored_as=stored_as, range_dtypes=("float32",) * 2, ranges=ranges
        )
