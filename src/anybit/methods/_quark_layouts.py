"""Quark: its layouts, how inputs and outputs are rounded, and which layout a module has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import torch
from anybit.algorithms import minifloat
from anybit.errors import CorruptFile, InvalidOption, MissingTensor, ShapeMismatch
from anybit.methods._activations import TOP, finish, groups
from anybit.methods._awq_layout import AwqGemmLayout
from anybit.methods._kv_cache import straight
from anybit.methods._scaled_floats import Inputs, ScaledFloatLayout, Spec, check_form, require_scale
from anybit.methods._words import packed_codes, read_codes, require_finite, unpacked_codes, write_codes
from anybit.quantizers.attachments import Attachment, attach_after
from anybit.quantizers.bundle import Derived
from anybit.weight import packing
from anybit.weight.activation import Product, activation_rule
from anybit.weight.layout import Layout, ModuleInfo, join_name, meta
from anybit.weight.nodes import Codes, Grid, Node, Values
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("float32", "bfloat16", "float16")
# nibble n of a word holds output ORDER[n] of its eight; the output j is in nibble NIBBLE_OF[j]
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PARAMETERS = ("weight_zero_point", "input_scale", "input_zero_point")
NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)
MX = {"fp4": ("e2m1", 2, "even_1"), "fp6_e2m3": ("e2m3", 2, "even_3"), "fp6_e3m2": ("e3m2", 4, "even_2")}
MX_OF = {own[0]: own for own in MX.values()}
MODES = ("even", "floor", "ceil")
FP8 = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
SMALLEST = 2.0**-23  # of a scale


# --- layouts of its own: small floats are those of other methods ----------------------------------------------------


@dataclass(frozen=True)
class QuarkLayout(Layout):
    """Static input scales beside a weight. `inputs`: how its input is rounded."""

    scale: Spec = ("weight_scale", "float32", ())
    zero: Spec | None = None
    inputs: Inputs | None = None
    symmetric: bool = True

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        own = {"weight": self.weight_spec()}
        parts = [self.scale, *([self.zero] if self.zero else []), *(self.inputs.stored if self.inputs else ())]
        return {**own, **{name: (dtype, shape) for name, dtype, shape in parts}}

    def weight_spec(self) -> tuple[str, tuple[int, ...]]:
        """dtype and shape of the stored weight."""
        raise NotImplementedError

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        found = {name: self.take(tensors, name, *spec) for name, spec in self.specs().items()}
        require_scale(self.scale[0], found[self.scale[0]])
        for name, _, _ in self.inputs.stored if self.inputs else ():
            require_scale(name, found[name])
        return self._weight(found)

    def _weight(self, found: Mapping[str, Tensor]) -> Weight:
        zero = found[self.zero[0]] if self.zero else None
        activation = None
        if self.inputs is not None:
            activation = self.inputs.activation(tuple(found[name] for name, _, _ in self.inputs.stored))
        tree, extras = self.read(found["weight"], found[self.scale[0]], zero)
        return Weight(tree, self.dtype, activation, extras)

    def read(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Node, dict[str, Tensor]]:
        """Stored tensors -> (tree, extras)."""
        raise NotImplementedError

    def write(self, weight: Weight) -> dict[str, Tensor]:
        """Inverse of `read`."""
        raise NotImplementedError

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        check_form(weight, self)
        found = self.write(weight)
        if weight.activation is not None:
            found.update(zip(weight.activation.names, weight.activation.tensors, strict=True))
        return found

    def scheme(self) -> Weight:
        return self._weight({name: meta(dtype, *shape) for name, (dtype, shape) in self.specs().items()})


@dataclass(frozen=True)
class IntegerLayout(QuarkLayout):
    """Integers by Quark's minimum and maximum observers."""

    algorithm: ClassVar[str | None] = "rtn"

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        raise NotImplementedError

    def algorithm_options(self) -> dict[str, object]:
        return {"ranges": self.ranges, "as_stored": True, "zero_first": True, "reciprocal": True}

    def ranges(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Scale and zero point of blocks, every operation rounded to the weight's dtype, as the peer does it.

        One scale for a matrix is the exception: a comparison with the smallest one makes it float32.
        """
        dtype = getattr(torch, self.dtype)
        low, high = low.clamp(max=0).to(dtype), high.clamp(min=0).to(dtype)
        first, last = self.code_range
        if self.symmetric:
            scale = torch.maximum(-low, high) / ((last - first) / 2)
        else:
            scale = (high - low) / float(last - first)
        if self.scale[2] in ((), (1,)):
            scale = scale.to(torch.float32)
        scale = scale.clamp(min=SMALLEST)
        zero = torch.zeros_like(scale)
        if not self.symmetric:
            zero = (first - (low.to(scale.dtype) / scale).round().to(torch.float32)).clamp(first, last)
        return {"scale": scale.to(torch.float32), "zero": zero.to(torch.float32)}


@dataclass(frozen=True)
class BytesLayout(IntegerLayout):
    """8-bit integers, one scale and zero point for a matrix or for each output."""

    element: str = "int8"

    @property
    def code_range(self) -> tuple[int, int]:
        return (-128, 127) if self.element == "int8" else (0, 255)

    def weight_spec(self) -> tuple[str, tuple[int, ...]]:
        return self.element, self.shape

    def _column(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, 1)

    def read(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Node, dict[str, Tensor]]:
        codes = Codes(weight.view(torch.uint8), 8, self.shape[1], signed=self.element == "int8")
        zeros = Values(self._column(zero)) if zero is not None else None
        return Grid(codes, Values(self._column(scale)), zeros), {}

    def write(self, weight: Weight) -> dict[str, Tensor]:
        grid: Any = weight.tree
        found = {
            "weight": grid.codes.packed.view(getattr(torch, self.element)),
            self.scale[0]: grid.scale.tensor.reshape(self.scale[2]),
        }
        if self.zero is not None:
            found[self.zero[0]] = grid.zero.tensor.reshape(self.zero[2])
        return found


@dataclass(frozen=True)
class NibblesLayout(IntegerLayout):
    """4-bit integers, eight to a word."""

    signed: bool = False
    reordered: bool = True

    @property
    def code_range(self) -> tuple[int, int]:
        return (-8, 7) if self.signed else (0, 15)

    def _unpacked(self, words: Tensor, name: str, count: int) -> Tensor:
        """uint8 codes [rows, count] of int32 words [rows, count / 8]."""
        codes = unpacked_codes(read_codes(words, 4, count, name))
        return codes.unflatten(-1, (-1, 8))[..., NIBBLE_OF].flatten(-2) if self.reordered else codes

    def _packed(self, codes: Tensor) -> Tensor:
        """Inverse of `_unpacked`."""
        codes = codes.unflatten(-1, (-1, 8))[..., ORDER].flatten(-2) if self.reordered else codes
        return write_codes(packed_codes(codes, 4, codes.shape[1]))


@dataclass(frozen=True)
class WordsLayout(NibblesLayout):
    """4-bit integers in groups of inputs, eight outputs to a word. `turned`: scales lie [groups, out]."""

    group_size: int = 128
    turned: bool = True

    @property
    def groups(self) -> int:
        return -(-self.shape[1] // self.group_size)

    def weight_spec(self) -> tuple[str, tuple[int, ...]]:
        return "int32", (self.shape[1], self.shape[0] // 8)

    def read(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Node, dict[str, Tensor]]:
        codes = self._codes(weight, "weight", self.shape[1])
        zeros = self._codes(zero, "weight_zero_point", self.groups) if zero is not None else None
        scales = Values(scale.T.contiguous() if self.turned else scale)
        return Grid(codes, scales, zeros, block=(1, self.group_size)), {}

    def _codes(self, words: Tensor, name: str, count: int) -> Codes:
        rows = self.shape[0]
        if words.device.type == "meta":
            return Codes(meta("uint8", rows, packing.row_bytes(count, 4)), 4, count, self.signed)
        found = packed_codes(self._unpacked(words, name, rows).T, 4, count)
        return Codes(found.packed, 4, count, self.signed)

    def write(self, weight: Weight) -> dict[str, Tensor]:
        grid: Any = weight.tree
        scales = grid.scale.tensor
        found = {"weight": self._words(grid.codes), self.scale[0]: scales.T.contiguous() if self.turned else scales}
        if self.zero is not None:
            found[self.zero[0]] = self._words(grid.zero)
        return found

    def _words(self, codes: Codes) -> Tensor:
        return self._packed(unpacked_codes(codes).T)


@dataclass(frozen=True)
class RowWordsLayout(NibblesLayout):
    """4-bit integers with one scale for each output or for the matrix: eight inputs to a word, nothing turned.

    Zero points: int32 [out / 8], packed likewise; one for the matrix is a number of its own.
    """

    def weight_spec(self) -> tuple[str, tuple[int, ...]]:
        return "int32", (self.shape[0], self.shape[1] // 8)

    def read(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Node, dict[str, Tensor]]:
        assert zero is not None
        rows, columns = self.shape
        if weight.device.type == "meta":
            codes = meta("uint8", rows, packing.row_bytes(columns, 4))
            zeros: Node = Codes(meta("uint8", rows, 1), 4, 1, self.signed) if zero.shape else Values(zero.reshape(1, 1))
        else:
            codes = packed_codes(self._unpacked(weight, "weight", columns), 4, columns).packed
            if zero.shape:
                found = self._unpacked(zero.reshape(1, -1), "weight_zero_point", rows)
                zeros = Codes(packed_codes(found.T, 4, 1).packed, 4, 1, self.signed)
            else:
                low, high = self.code_range
                if not low <= int(zero) <= high:
                    raise CorruptFile(
                        f"tensor 'weight_zero_point' is {int(zero)}, beyond {low} to {high}; get it again"
                    )
                zeros = Values(zero.reshape(1, 1))
        return Grid(Codes(codes, 4, columns, self.signed), Values(scale.reshape(-1, 1)), zeros), {}

    def write(self, weight: Weight) -> dict[str, Tensor]:
        grid: Any = weight.tree
        assert self.zero is not None
        if self.zero[2]:
            zero = self._packed(unpacked_codes(grid.zero).T)
        else:
            zero = grid.zero.tensor
        return {
            "weight": self._packed(unpacked_codes(grid.codes)),
            self.scale[0]: grid.scale.tensor.reshape(self.scale[2]),
            self.zero[0]: zero.reshape(self.zero[2]),
        }


@dataclass(frozen=True)
class TurnedBytesLayout(IntegerLayout):
    """Integers in groups of inputs, stored [in, out] in bytes: one of 8 bits, or four of 2 bits, the first one highest.

    Zero points lie [groups, out] and are packed likewise. `turned`: scales lie [groups, out].
    """

    element: str = "int8"
    bits: int = 8
    group_size: int = 128
    turned: bool = True

    @property
    def code_range(self) -> tuple[int, int]:
        return (-128, 127) if self.element == "int8" else (0, (1 << self.bits) - 1)

    def weight_spec(self) -> tuple[str, tuple[int, ...]]:
        return self.element, (self.shape[1], self.shape[0] * self.bits // 8)

    def read(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Node, dict[str, Tensor]]:
        assert zero is not None
        scales = Values(scale.T.contiguous() if self.turned else scale)
        return Grid(self._codes(weight), scales, self._codes(zero), block=(1, self.group_size)), {}

    def _codes(self, stored: Tensor) -> Codes:
        """Bytes [n, out * bits / 8] as codes [out, n]."""
        count = stored.shape[0]
        if stored.device.type == "meta":
            packed = meta("uint8", self.shape[0], packing.row_bytes(count, self.bits))
        elif self.bits == 8:
            packed = stored.view(torch.uint8).T.contiguous()
        else:
            places = [(stored >> shift) & 3 for shift in (6, 4, 2, 0)]
            packed = packed_codes(torch.stack(places, -1).flatten(-2).T, self.bits, count).packed
        return Codes(packed, self.bits, count, signed=self.element == "int8")

    def write(self, weight: Weight) -> dict[str, Tensor]:
        grid: Any = weight.tree
        assert self.zero is not None
        scales = grid.scale.tensor
        return {
            "weight": self._bytes(grid.codes),
            self.scale[0]: scales.T.contiguous() if self.turned else scales,
            self.zero[0]: self._bytes(grid.zero),
        }

    def _bytes(self, codes: Codes) -> Tensor:
        if self.bits == 8:
            return codes.packed.T.contiguous().view(getattr(torch, self.element))
        first, second, third, fourth = unpacked_codes(codes).T.unflatten(-1, (-1, 4)).unbind(-1)
        return (first << 6) | (second << 4) | (third << 2) | fourth


@dataclass(frozen=True)
class FloatLayout(ScaledFloatLayout):
    """Small floats by Quark's rules. `mode`: how the exponent of a block's power of two is rounded."""

    mode: str = "even"

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        weight = super().decode(tensors)
        if self.levels == "e5m2":  # the only one here, beside E4M3, that has infinity and NaN
            bad = (tensors["weight"].view(torch.uint8) & 0x7C) == 0x7C
            if bool(bad.any()):
                raise CorruptFile(f"tensor 'weight' holds infinity or NaN ({int(bad.sum())} codes); get the file again")
        return weight

    def algorithm_options(self) -> dict[str, object]:
        return {"rule": self.scales, "through": (self.dtype,), "quotient": "float32" if self._powers else self.dtype}

    @property
    def _powers(self) -> bool:
        return self.scale_dtype == "uint8"

    def scales(self, largest: Tensor) -> minifloat.Scales:
        if not self._powers:
            return self._plain_scales(largest)
        _, exponent, even = MX_OF[self.levels]
        found = minifloat.e8m0(largest, even if self.mode == "even" else self.mode).to(torch.int32) - exponent
        if self.mode != "even":
            found = found.masked_fill(largest == 0, 127 - 23)  # an empty block has the smallest scale
        return minifloat.Scales(minifloat.e8m0_numbers(found.clamp_(0, 254).to(torch.uint8)))

    def _plain_scales(self, largest: Tensor) -> minifloat.Scales:
        """The largest magnitude on the largest number. Quark divides in the weight's dtype, as the scale is in it."""
        dtype = getattr(torch, self.dtype)
        stored = getattr(torch, self.scale_dtype)
        scale = (largest / minifloat.FORMATS[self.levels][2]).to(stored)
        scale = scale.masked_fill(scale == 0, SMALLEST)
        return minifloat.Scales(scale.to(torch.float32), divisor=scale.to(dtype).to(torch.float32))


@dataclass(frozen=True)
class FakeLayout(QuarkLayout):
    """A weight that was rounded and kept dense; its scale says only how."""

    element: str = "bfloat16"

    def weight_spec(self) -> tuple[str, tuple[int, ...]]:
        return self.element, self.shape

    def read(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Node, dict[str, Tensor]]:
        if weight.device.type != "meta":
            require_finite("weight", weight)
        extras = {self.scale[0]: scale}
        if self.zero is not None and zero is not None:
            extras[self.zero[0]] = zero
        return Values(weight), extras

    def write(self, weight: Weight) -> dict[str, Tensor]:
        tree: Any = weight.tree
        return {"weight": tree.tensor, **weight.extras}


# --- inputs and outputs ---------------------------------------------------------------------------------------------


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


def attach_outputs(model: Any, checkpoint: Any, path_of: Callable[[str], str | None], spec_of: Any) -> set[str]:
    """Buffers for stored output scales, and hooks that use them: their state dict keys."""
    keys: set[str] = set()
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
            attach_after(module, RoundedOutput(dtype))
        module.register_buffer(own, torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta"))
        keys.add(f"{path}.{own}")
    return keys


def inputs_of(module: ModuleInfo, spec: Mapping[str, Any] | None, stored: Mapping[str, Any]) -> Inputs | None:
    """How a module's input is rounded; a stored scale is used whatever the configuration says."""
    static: tuple[Spec, ...] = ()
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
        return Inputs("quark_int8_static", "int8", "tensor", stored=static)
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


def awq_layout_of(quantizer: Any, module: ModuleInfo, stored: Mapping[str, Any]) -> Layout | None:
    """The layout of a file that calls itself "awq": AutoAWQ's tensors, with scales in the model's dtype."""
    if not {"qweight", "qzeros", "scales"} & set(stored) or module.kind != "linear":
        return None
    config = quantizer.quantization_config
    rows, columns = module.shape
    size = columns if config.group_size in (None, -1) else config.group_size
    if config.bits not in (None, 4):
        raise InvalidOption(f"QuarkConfig: bits is {config.bits!r}; Quark's AWQ files have 4")
    if size < 1:
        raise InvalidOption(f"QuarkConfig: group_size is {size}; it must be -1 or at least 1")
    if rows % 8 or columns % size:
        raise ShapeMismatch(
            f"{module.name} is stored packed, but its shape {module.shape} is no whole number of words of 8 outputs and groups "
            f"of {size} inputs; config.json and tensors contradict each other"
        )
    scales = stored.get("scales")
    layout = AwqGemmLayout(
        module.shape, module.dtype, 4, size, scale_dtype=scales.dtype if scales is not None else module.dtype,
        symmetric=config.zero_point is False, interleaved=quantizer.pack_method == "reorder",
    )  # fmt: skip
    for name, (dtype, shape) in layout.specs().items():
        if name not in stored:
            raise MissingTensor(f"tensor {join_name(module.name, name)!r} is not stored; {module.name} needs it")
        if (stored[name].dtype, tuple(stored[name].shape)) != (dtype, shape):
            raise ShapeMismatch(
                f"tensor {stored[name].name!r} is {stored[name].dtype} {tuple(stored[name].shape)}; AWQ's form of a weight "
                f"{module.shape} in groups of {size} has {dtype} {shape}"
            )
    if layout.scale_dtype not in FLOATS:
        raise ShapeMismatch(f"tensor {join_name(module.name, 'scales')!r} is {layout.scale_dtype}; scales are floats")
    return layout


def mended_names(checkpoint: Any) -> Any:
    """The checkpoint without a mistake of Quark 0.13 under transformers 5.6 and later.

    Its AWQ files have `qscales` and `qqzeros`, and every other `weight` is called `qweight` too.
    """
    packed = {name.removesuffix("qscales") for name in checkpoint.tensors if name.endswith(".qscales")}
    if not packed:
        return checkpoint
    derived = {}
    for name, info in checkpoint.tensors.items():
        owner, dot, own = name.rpartition(".")
        meant = {"qscales": "scales", "qqzeros": "qzeros"}.get(own, own)
        if own == "qweight" and f"{owner}{dot}" not in packed:
            meant = "weight"
        derived[f"{owner}{dot}{meant}"] = Derived((name,), info.dtype, tuple(info.shape))
    return checkpoint.renamed(derived)


def is_symmetric(spec: Mapping[str, Any]) -> bool:
    """Whether zero is the middle code; integers with a sign are so unless the configuration says otherwise."""
    named = spec.get("symmetric")
    return str(spec.get("dtype")).startswith("int") if named is None else bool(named)


# --- which layout ---------------------------------------------------------------------------------------------------


def layout_of(quantizer: Any, module: ModuleInfo, stored: Mapping[str, Any]) -> Layout | None:
    """The layout that a module's tensors have; dtypes and shapes tell, and the configuration what they cannot."""
    weight, scale = stored.get("weight"), stored.get("weight_scale")
    if weight is None or module.kind not in ("linear", "embedding"):
        return None
    if scale is None and weight.dtype in (*FLOATS, "float64"):
        beside = [name for name in PARAMETERS if name in stored]
        expected = (
            quantizer.weight_format == "fake_quantized"
            and quantizer.spec_of(module.name, "weight", module.kind) is not None
        )
        if beside or expected:
            raise MissingTensor(
                f"tensor {join_name(module.name, 'weight_scale')!r} is not stored; {weight.name!r} is quantized by the "
                f"configuration{' and has ' + ', '.join(beside) if beside else ''}"
            )
        return None
    if scale is None:
        raise MissingTensor(
            f"tensor {join_name(module.name, 'weight_scale')!r} is not stored; {weight.name!r} is {weight.dtype}"
        )
    spec = quantizer.spec_of(module.name, "weight", module.kind) or {}
    inputs = inputs_of(module, quantizer.spec_of(module.name, "input_tensors"), stored)
    shape = tuple(scale.shape)
    own: Spec = ("weight_scale", scale.dtype, shape)
    symmetric = is_symmetric(spec)
    common: dict[str, Any] = {"scale": own, "inputs": inputs}
    rows, columns = module.shape
    per_tensor, per_row = shape in ((), (1,)), shape == (rows,)
    if weight.dtype in FP8 and (per_tensor or per_row) and scale.dtype in FLOATS:
        return FloatLayout(
            module.shape, module.dtype, block=(1, 0) if per_row and rows > 1 else (0, 0), scale_dtype=scale.dtype,
            scale_form="scalar" if shape == () else "flat", inputs=inputs, levels=FP8[weight.dtype],
            weight_dtype=weight.dtype,
        )  # fmt: skip
    if weight.dtype in ("int8", "uint8") and (per_tensor or per_row) and scale.dtype in FLOATS:
        return BytesLayout(
            module.shape, module.dtype, element=weight.dtype,
            zero=("weight_zero_point", weight.dtype, shape), symmetric=symmetric, **common,
        )  # fmt: skip
    bits = {"int8": 8, "uint8": 8, "uint2": 2}.get(str(spec.get("dtype")))
    if (
        weight.dtype in ("int8", "uint8")
        and len(shape) == 2
        and scale.dtype in FLOATS
        and bits
        and rows * bits % 8 == 0
    ):
        size = int(spec.get("group_size") or -1)
        size = columns if size == -1 else size
        wanted, turned = (-(-columns // size), rows), not quantizer.quantization_config.legacy
        common["scale"] = ("weight_scale", scale.dtype, wanted if turned else wanted[::-1])
        return TurnedBytesLayout(
            module.shape, module.dtype, element=weight.dtype, bits=bits, group_size=size, turned=turned,
            zero=("weight_zero_point", weight.dtype, (wanted[0], rows * bits // 8)), symmetric=symmetric, **common,
        )  # fmt: skip
    nibbles = weight.dtype == "int32" and spec.get("dtype") in ("int4", "uint4")
    common_nibbles = {
        "signed": spec.get("dtype") == "int4", "reordered": quantizer.pack_method == "reorder", "symmetric": symmetric,
    }  # fmt: skip
    if nibbles and (per_tensor or per_row) and columns % 8 == 0 and spec.get("qscheme") != "per_group":
        return RowWordsLayout(
            module.shape, module.dtype,
            zero=("weight_zero_point", "int32", (rows // 8,) if per_row else shape), **common_nibbles, **common,
        )  # fmt: skip
    if nibbles and rows % 8 == 0:
        size = int(spec.get("group_size") or -1)
        size = columns if size == -1 else size
        wanted = (-(-columns // size), rows)
        turned = not quantizer.quantization_config.legacy
        common["scale"] = ("weight_scale", scale.dtype, wanted if turned else wanted[::-1])
        return WordsLayout(
            module.shape, module.dtype, group_size=size, turned=turned,
            zero=("weight_zero_point", "int32", (wanted[0], rows // 8)), **common_nibbles, **common,
        )  # fmt: skip
    if weight.dtype == "uint8" and scale.dtype == "uint8" and len(shape) == 2 and shape[0] == rows and shape[1]:
        dtype = str(spec.get("dtype"))
        if dtype in MX:
            return FloatLayout(
                module.shape, module.dtype, levels=MX[dtype][0], block=(1, int(spec.get("group_size") or 32)),
                weight_dtype="uint8", scale_dtype="uint8", inputs=inputs,
                mode=str(spec.get("scale_calculation_mode") or "even"),
            )  # fmt: skip
    if weight.dtype in FLOATS and quantizer.weight_format == "fake_quantized":
        zero = stored.get("weight_zero_point")
        if zero is not None:
            common["zero"] = ("weight_zero_point", zero.dtype, tuple(zero.shape))
        return FakeLayout(module.shape, module.dtype, element=weight.dtype, **common)
    raise ShapeMismatch(
        f"tensors {weight.name!r} {weight.dtype} {weight.shape} and {scale.name!r} {scale.dtype} {shape} of a weight "
        f"{module.shape} fit no known form of Quark's {spec.get('dtype')!r}, {spec.get('qscheme')!r}"
    )
