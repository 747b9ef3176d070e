"""Stored tensors <-> weight, for one module of one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from anybit._lazy import torch
from anybit.errors import MissingTensor, ShapeMismatch

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weight.activation import Activation
    from anybit.weight.weight import Weight


@dataclass(frozen=True)
class ModuleInfo:
    """What a method may know of a module before any weight is read.

    kind: "linear", "conv1d" (GPT-2's [in, out] storage), "embedding", "experts" or "router" (a small layer of a class of its
    own, which is asked about only where a file has it packed). `shape` is always logical: (out, in), (vocabulary, width) or
    (experts, out, in). `dtype`: of the dense weight, e.g. "bfloat16". `class_name`: of the module.
    `transposed`: the model class holds, and a dense checkpoint stores, the last two axes the other way round.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    has_bias: bool = False
    class_name: str = "Linear"
    transposed: bool = False


@dataclass(frozen=True)
class Layout:
    """One module's stored tensors and how they make a weight. Pure: allocates on the input's device, never writes into it.

    Names are relative to the module and joined with a dot, except "", the module's own name, and those that start with

        "_"    appended            gate_up_proj and _blocks                  gate_up_proj_blocks
        "."    appended too        o_proj and ._weight_scale                 o_proj._weight_scale
        "/"    beside the module   experts.down_proj and /_down_proj_scale   experts._down_proj_scale

    A bias is not a layout's business.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"

    # the algorithm (and its options) that this format's own packer uses when it has no calibration data
    algorithm: ClassVar[str | None] = None

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        """Stored tensors (relative names) -> weight. Raises MissingTensor, ShapeMismatch, CorruptFile."""
        raise NotImplementedError

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        """Weight -> stored tensors, byte for byte what `decode` was given. Raises NotRepresentable."""
        raise NotImplementedError

    def scheme(self) -> Weight:
        """The weight on the meta device: the target of an algorithm and the pattern a kernel matches."""
        raise NotImplementedError

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored tensors by relative name: (dtype, shape), from `scheme` alone."""
        return {
            name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in self.encode(self.scheme()).items()
        }

    def shrinking(self) -> frozenset[str]:
        """Stored tensors whose length depends on the numbers (text, say); `specs` then tells the longest they can be."""
        return frozenset()

    def ordered(self) -> Layout | None:
        """The layout in which an algorithm may choose the order of columns; None if the format has none."""
        return None

    def algorithm_options(self) -> dict[str, object]:
        """Options for `algorithm`, e.g. the vendor's rule for ranges."""
        return {}

    # --- layers that engines join ---

    @property
    def alongside(self) -> tuple[str, ...]:
        """Last names of the layers, this one among them, that share the largest scale when they are made."""
        return ()

    def covering(self, largest: float) -> Layout:
        """The layout for making a weight whose largest scale is as if it held a number of this magnitude."""
        return self

    def target(self) -> Weight:
        """`scheme`, with the numbers that belong to the format and are not stored: what other formats' codes are moved to."""
        return self.scheme()

    # --- static scales of inputs: what calibration data must tell ---

    # share of a new batch in a moving average of its extremes, as some observers take it; 0: the extremes of all data
    averaging: ClassVar[float] = 0.0

    def static_inputs(self) -> bool:
        """Whether scales of the layer's input are stored, which no weight tells."""
        activation = self.scheme().activation
        return activation is not None and bool(activation.tensors)

    def measured_inputs(self, low: Tensor, high: Tensor) -> Activation:
        """The activation of `scheme` with its tensors. `low`, `high`: the smallest and the largest number that each input was
        in calibration data, float32 [in] or [experts, in]. Of layouts with `static_inputs`."""
        raise NotImplementedError(f"{type(self).__name__} has no rule for static scales of its input")

    # --- helpers for decode ---

    @staticmethod
    def take(tensors: Mapping[str, Tensor], name: str, dtype: str | tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
        """`tensors[name]`, checked. Names the tensor, what was expected and what is there."""
        if name not in tensors:
            raise MissingTensor(f"tensor {name!r} is not stored; this layout needs it ({dtype}, shape {shape})")
        tensor = tensors[name]
        found = str(tensor.dtype).removeprefix("torch.")
        allowed = (dtype,) if isinstance(dtype, str) else dtype
        if found not in allowed or tuple(tensor.shape) != tuple(shape):
            raise ShapeMismatch(
                f"tensor {name!r} is {found} {tuple(tensor.shape)}, expected {' or '.join(allowed)} {tuple(shape)}"
            )
        return tensor


def meta(dtype: str, *shape: int) -> Tensor:
    """An unallocated tensor, for schemes."""
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def join_name(module: str, name: str) -> str:
    """Full tensor name of a layout's relative one."""
    if not name or name.startswith(("_", ".")):
        return module + name
    if name.startswith("/"):
        return f"{module.rpartition('.')[0]}.{name[1:]}" if "." in module else module + name
    return f"{module}.{name}" if module else name
