"""From what the header of a file says of a parameter to its layout. Unknown classes and fields are refused, never guessed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from anybit.errors import CorruptFile, MissingTensor, NotRepresentable, ShapeMismatch
from anybit.methods import _torchao_data as data
from anybit.methods._torchao_inputs import PRE_SCALE, STATIC_SCALE, STORED, Inputs
from anybit.methods._torchao_layouts import (
    FLOAT8,
    Float8Layout,
    Int4Layout,
    Int4TileLayout,
    Int8Layout,
    IntxLayout,
    OldIntxLayout,
    TorchaoLayout,
    sides_of,
)

if TYPE_CHECKING:
    from anybit.weight.layout import ModuleInfo

SCALES = ("float16", "bfloat16", "float32")
# fields of each class; more of them may change what the numbers mean
FIELDS: Mapping[str, frozenset[str]] = {
    "Int8Tensor": frozenset(("act_quant_kwargs", "reduce_range", "block_size", "dtype")),
    "IntxUnpackedToInt8Tensor": frozenset(("target_dtype", "block_size", "dtype", "activation_quantization")),
    "Float8Tensor": frozenset(("block_size", "mm_config", "act_quant_kwargs", "kernel_preference", "dtype")),
    "Int4Tensor": frozenset(("block_size", "shape", "activation_dtype")),
    "Int4TilePackedTo4dTensor": frozenset(("block_size", "shape")),
    OldIntxLayout.tensor_class: frozenset(("target_dtype", "block_size", "dtype", "input_quant_func")),
}


class Record:
    """One parameter: `text` of the header, its `stored` tensors (TensorInfo) by part, and where it belongs."""

    def __init__(self, module: ModuleInfo, parameter: str, full_name: str, text: str, stored: Mapping[str, Any]):
        self.module, self.full_name, self.stored = module, full_name, stored
        self.owner = full_name.rpartition(".")[0]
        try:
            found = json.loads(text)
            self.tensor_class, self.own = found["_type"], found["_data"]
            self.parts = tuple(found["_tensor_data_names"])
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFile(
                f"the header's entry {full_name!r} is no description of a tensor of torchao's ({error!r}): {text[:200]!r}"
            ) from error
        *lead, rows, columns = module.shape
        self.turned = module.transposed
        self.shape = (*lead, columns, rows) if self.turned else module.shape
        self.common: dict[str, Any] = {
            "shape": module.shape, "dtype": module.dtype, "parameter": parameter, "attributes": json.dumps(self.own),
            "parts": self.parts, "turned": self.turned,
        }  # fmt: skip

    def layout(self) -> TorchaoLayout:
        """Raises NotRepresentable, CorruptFile or ShapeMismatch, naming the parameter."""
        reader = READERS.get(self.tensor_class)
        if reader is None:
            raise NotRepresentable(
                f"{self.full_name} is a {self.tensor_class}, which anybit does not read (it reads {', '.join(READERS)}); save "
                "the model with another configuration of torchao's, or dequantized"
            )
        if not isinstance(self.own, Mapping) or set(self.own) - FIELDS[self.tensor_class]:
            extra = sorted(set(self.own) - FIELDS[self.tensor_class]) if isinstance(self.own, Mapping) else self.own
            raise NotRepresentable(
                f"{self.full_name}: the header gives its {self.tensor_class} {extra!r}, which torchao 0.18 does not have; what "
                "they change is not known"
            )
        layout = reader(self)
        known = {**layout.part_specs(), **(layout.inputs.specs() if layout.inputs else {})}
        for part in layout.part_specs():
            if part not in self.parts:
                raise MissingTensor(
                    f"tensor '{self.owner}.{layout.name(part)[1:]}' is not stored: the header gives {self.full_name} the parts "
                    f"{', '.join(self.parts)}, and a {self.tensor_class} has {', '.join(known)}. Get the file again"
                )
        for part in self.parts:
            if part not in known:
                raise self.refuse(f"the header gives it a part {part!r}, which torchao 0.18 does not have")
        return layout

    # --- pieces ---

    def floating(self, part: str, default: str) -> str:
        """The dtype of a part that holds numbers, as stored."""
        found = getattr(self.stored.get(part), "dtype", default)
        return found if found in SCALES else default

    def block(self) -> tuple[int, ...]:
        """`block_size`, checked against the shape; without one (old Float8Tensor) from the number of scales."""
        found, scale = self.own.get("block_size"), self.stored.get("scale")
        if not found and scale is not None and len(scale.shape) == len(self.shape) and all(scale.shape):
            found = [size // count for size, count in zip(self.shape, scale.shape, strict=True)]
        found = found or list(self.shape)
        fits = len(found) == len(self.shape) and all(type(side) is int and side > 0 for side in found)
        if not fits or any(size % side for size, side in zip(self.shape, found, strict=True)):
            raise ShapeMismatch(f"{self.full_name}: blocks of {found} do not divide a weight of shape {self.shape}")
        return sides_of(found, self.shape)

    def group_size(self) -> int:
        """For formats in which only columns are grouped, and whose shape is written down."""
        shape = self.own.get("shape")
        if list(shape or ()) != list(self.shape):
            raise ShapeMismatch(f"{self.full_name} is of shape {shape} by the header, the model wants {self.shape}")
        block: Any = self.own.get("block_size") or []
        if len(block) != len(self.shape) or set(block[:-1]) != {1} or type(block[-1]) is not int or block[-1] <= 0:
            raise ShapeMismatch(
                f"{self.full_name}: blocks of {block}, but {self.tensor_class} has groups of columns only"
            )
        return int(block[-1])

    def tensors(self) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """Stored tensors that belong to the input."""
        found = []
        for part in STORED:
            if part not in self.parts:
                continue
            info = self.stored.get(part)
            count, wanted = (0, self.shape[-1]) if part == PRE_SCALE else (0, 1)
            if info is not None:
                count = 1
                for side in info.shape:
                    count *= side
                if count not in (1, wanted):
                    raise NotRepresentable(
                        f"tensor {info.name!r} has {count} values; only {'one, or one for each input,' if wanted > 1 else 'one'} "
                        "is understood"
                    )
            dtype = info.dtype if info is not None else "float32"
            found.append((part, dtype, tuple(info.shape) if info is not None else ()))
        return tuple(found)

    def refuse(self, what: str) -> NotRepresentable:
        return NotRepresentable(f"{self.full_name} ({self.tensor_class}): {what}")


# --- one reader for each class ---------------------------------------------------------------------------------------------


def _int8(record: Record) -> TorchaoLayout:
    kwargs, stored = record.own.get("act_quant_kwargs"), record.tensors()
    names = [name for name, _, _ in stored]
    if kwargs is None and STATIC_SCALE in names:
        raise record.refuse("a scale of inputs is stored, but act_quant_kwargs does not say that they are quantized")
    inputs = Inputs("torchao_scaled", stored=stored) if stored else None
    if kwargs is not None:
        own = data.fields(kwargs)
        mapping = data.name(own.get("mapping_type"), "SYMMETRIC")
        if mapping not in ("SYMMETRIC", "ASYMMETRIC"):
            raise record.refuse(f"the mapping of inputs is {mapping!r}")
        inputs = Inputs(
            "torchao_int8",
            granularity=_granularity(record, own.get("granularity")),
            symmetric=mapping == "SYMMETRIC",
            reduced=bool(own.get("reduce_range")),
            stored=stored,
        )
    return Int8Layout(
        **record.common,
        inputs=inputs,
        block=record.block(),
        scale_dtype=record.floating("scale", "float32"),
        zero_dtype=_zero_dtype(record),
        reduced=bool(record.own.get("reduce_range")),
    )


def _granularity(record: Record, granularity: Any) -> str:
    if data.kind(granularity) in ("PerRow", "PerToken") and data.fields(granularity).get("dim", -1) == -1:
        return "token"
    if data.kind(granularity) == "PerTensor":
        return "tensor"
    if data.kind(granularity) in ("PerBlock", "PerGroup"):
        return "group"
    raise record.refuse(f"inputs have the granularity {granularity!r}")


def _zero_dtype(record: Record) -> str | None:
    if "zero_point" not in record.parts:
        return None
    found = getattr(record.stored.get("zero_point"), "dtype", "int8")
    return found if found in ("int8", *SCALES) else "int8"


def _intx(record: Record) -> TorchaoLayout:
    target, quantized = data.name(record.own.get("target_dtype")), record.own.get("activation_quantization")
    bits = target.removeprefix("int")
    if not bits.isdigit() or not 1 <= int(bits) <= 8:
        raise record.refuse(f"target_dtype is {target!r}; int1 to int8 are known")
    if quantized is not None and data.name(quantized).lower() != "int8_asym_per_token":
        raise record.refuse(f"activation_quantization is {quantized!r}; 'int8_asym_per_token' is known")
    return IntxLayout(
        **record.common,
        inputs=Inputs("torchao_int8_qdq", symmetric=False) if quantized is not None else None,
        block=record.block(),
        scale_dtype=record.floating("scale", record.module.dtype if record.module.dtype in SCALES else "float32"),
        zero_dtype=_zero_dtype(record),
        bits=int(bits),
    )


def _float8(record: Record) -> TorchaoLayout:
    kwargs = record.own.get("act_quant_kwargs")
    inputs = None
    if kwargs is not None:
        own = data.fields(kwargs)
        dtype = data.name(own.get("float8_dtype"), "float8_e4m3fn")
        if dtype not in FLOAT8:
            raise record.refuse(f"inputs become {dtype!r}; known are {', '.join(FLOAT8)}")
        granularity = _granularity(record, own.get("granularity", {"_type": "PerRow", "_data": {}}))
        size = None
        if granularity == "group":
            size = data.block_of(own["granularity"], record.shape[-2:], f"{record.full_name}, inputs,")[-1]
        bounds = [own.get(name) for name in ("hp_value_lb", "hp_value_ub")]
        inputs = Inputs("torchao_float8", dtype, granularity, size, lower=bounds[0], upper=bounds[1])
    found = getattr(record.stored.get("qdata"), "dtype", "float8_e4m3fn")
    return Float8Layout(
        **record.common,
        inputs=inputs,
        block=record.block(),
        scale_dtype=record.floating("scale", "float32"),
        qdata_dtype=found if found in FLOAT8 else "float8_e4m3fn",
    )


def _int4(record: Record) -> TorchaoLayout:
    inputs_dtype, stored = data.name(record.own.get("activation_dtype"), "bfloat16"), record.tensors()
    if inputs_dtype not in ("bfloat16", "float8_e4m3fn"):
        raise record.refuse(f"activation_dtype is {inputs_dtype!r}; bfloat16 and float8_e4m3fn are known")
    float8 = inputs_dtype == "float8_e4m3fn"
    inputs = Inputs("torchao_float8", inputs_dtype, stored=stored) if float8 else None
    if stored and not float8:
        inputs = Inputs("torchao_scaled", stored=stored)
    size = record.group_size()
    if record.shape[-1] % size or record.shape[-1] % 2:
        raise ShapeMismatch(f"{record.full_name}: groups of {size} do not divide {record.shape[-1]} columns")
    dtype = record.floating("scale", "bfloat16")
    return Int4Layout(**record.common, inputs=inputs, group_size=size, scale_dtype=dtype, symmetric=float8)


def _int4_tile(record: Record) -> TorchaoLayout:
    stored, size = record.tensors(), record.group_size()
    if 1024 % size:
        raise ShapeMismatch(f"{record.full_name}: groups of {size} do not divide the 1024 columns of a tile")
    return Int4TileLayout(
        **record.common, inputs=Inputs("torchao_scaled", stored=stored) if stored else None, group_size=size
    )


# functions that old models name for their inputs -> the rule, and whether it is symmetric
OLD_INPUTS = {
    "_int8_symm_per_token_reduced_range_quant": Inputs("torchao_int8_old"),
    "_int8_asymm_per_token_quant": Inputs("torchao_int8_qdq_old", symmetric=False),
}


def _old(record: Record) -> TorchaoLayout:
    inputs = OLD_INPUTS.get(str(record.own.get("input_quant_func")))
    if inputs is None:
        raise record.refuse(
            f"inputs are quantized by {record.own.get('input_quant_func')!r}; known are {', '.join(OLD_INPUTS)}"
        )
    bits = data.name(record.own.get("target_dtype"), "int8").removeprefix("int")
    if not bits.isdigit() or not 1 <= int(bits) <= 8:
        raise record.refuse(f"target_dtype is {record.own.get('target_dtype')!r}; int1 to int8 are known")
    return OldIntxLayout(
        **record.common,
        inputs=inputs,
        block=record.block(),
        scale_dtype=record.floating("scale", "float32"),
        zero_dtype=_zero_dtype(record),
        bits=int(bits),
    )


READERS: dict[str, Callable[[Record], TorchaoLayout]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Float8Tensor": _float8,
    "Int4Tensor": _int4,
    "Int4TilePackedTo4dTensor": _int4_tile,
    OldIntxLayout.tensor_class: _old,
}
