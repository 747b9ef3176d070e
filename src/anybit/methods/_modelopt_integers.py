"""ModelOpt's integers: four bits in groups of inputs, eight bits with a scale for each output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import torch
from anybit.methods._scaled_floats import Inputs, check_form, require_scale
from anybit.weight.activation import Activation
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import Codes, Grid, Node, Scaled, Values
from anybit.weight.weight import Weight, row_chunks

if TYPE_CHECKING:
    from torch import Tensor

PRE_SCALE = "pre_quant_scale"
INT8_TOP = 127.0  # the code of the largest magnitude; one more is used below zero


@dataclass(frozen=True)
class Int4AwqLayout(Layout):
    """Four-bit integers and a scale for each group of inputs, packed along the output.

    weight uint8 [out/2, in]: byte [r, i] holds row 2r in its low nibble and row 2r + 1 in its high one, two's complement.
    `second`: W4A8 stores weight_scale_2 and input_scale as well. `prescaled`: pre_quant_scale is part of the weight, where
    the input cannot be scaled by a hook.
    """

    group_size: int = 128
    scale_dtype: str = "float32"
    inputs: Inputs | None = None
    second: bool = False
    prescaled: str | None = None

    algorithm: ClassVar[str] = "rtn"

    def algorithm_options(self) -> dict[str, object]:
        return {"symmetric": True}

    @property
    def scale_spec(self) -> tuple[int, int]:
        return (self.shape[0], -(-self.shape[1] // self.group_size))

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        rows, columns = self.shape
        packed = self.take(tensors, "weight", "uint8", (rows // 2, columns))
        scale = self.take(tensors, "weight_scale", self.scale_dtype, self.scale_spec)
        require_scale("weight_scale", scale)
        stored = [self.take(tensors, *spec) for spec in (self.inputs.stored if self.inputs is not None else ())]
        extras = {"weight_scale_2": self.take(tensors, "weight_scale_2", "float32", ())} if self.second else {}
        pre = self.take(tensors, PRE_SCALE, self.prescaled, (columns,)) if self.prescaled is not None else None
        for name, tensor in (("input_scale", stored), ("weight_scale_2", list(extras.values())), (PRE_SCALE, [pre])):
            for one in tensor:
                if one is not None:
                    require_scale(name, one)
        codes = torch.stack([packed & 15, packed >> 4], dim=1).view(rows, columns)
        return self._weight(Codes.of(codes, 4, signed=True), scale, pre, tuple(stored), extras)

    def _weight(
        self, codes: Codes, scale: Tensor, pre: Tensor | None, inputs: tuple[Tensor, ...], extras: Mapping[str, Tensor]
    ) -> Weight:
        tree: Node = Grid(codes, Values(scale), block=(1, self.group_size))
        if pre is not None:
            tree = Scaled(tree, Values(pre.reshape(1, -1)))
        activation = self.inputs.activation(inputs) if self.inputs is not None else None
        return Weight(tree, self.dtype, activation, extras)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        tree: Any = check_form(weight if weight.extras else replace(weight, extras=self.scheme().extras), self)
        grid = tree.child if self.prescaled is not None else tree
        packed = grid.codes.packed
        if packed.is_meta:
            weights = meta("uint8", self.shape[0] // 2, self.shape[1])
        else:
            unsigned = Codes(packed, 4, self.shape[1]).integers().view(-1, 2, self.shape[1])
            weights = unsigned[:, 0] | (unsigned[:, 1] << 4)
        found = {"weight": weights, "weight_scale": grid.scale.tensor}
        if self.prescaled is not None:
            found[PRE_SCALE] = tree.scale.tensor.reshape(-1)
        if self.inputs is not None and weight.activation is not None:
            found.update(
                {spec[0]: own for spec, own in zip(self.inputs.stored, weight.activation.tensors, strict=True)}
            )
        if self.second:
            kept = weight.extras.get("weight_scale_2")
            found["weight_scale_2"] = self._second(grid) if kept is None else kept
        return found

    @staticmethod
    def _second(grid: Any) -> Tensor:
        """The scale under which an engine makes FP8 of what the codes stand for: the largest of it on 448."""
        device, (rows, columns) = grid.codes.packed.device, grid.shape
        if device.type == "meta":
            return meta("float32")
        largest = torch.zeros((), device=device)
        for start, stop in row_chunks(rows, columns):
            largest = torch.maximum(largest, grid.region(slice(start, stop), slice(0, columns)).abs().amax())
        return torch.where(largest > 0, largest / 448.0, 1.0)

    def measured_inputs(self, low: Tensor, high: Tensor) -> Activation:
        assert self.inputs is not None
        return self.inputs.measured(low, high)

    def scheme(self) -> Weight:
        rows, columns = self.shape
        return self._weight(
            Codes(meta("uint8", rows, (columns + 1) // 2), 4, columns, signed=True),
            meta(self.scale_dtype, *self.scale_spec),
            meta(self.prescaled, columns) if self.prescaled is not None else None,
            tuple(meta(dtype, *shape) for _, dtype, shape in (self.inputs.stored if self.inputs is not None else ())),
            {"weight_scale_2": meta("float32")} if self.second else {},
        )


@dataclass(frozen=True)
class Int8Layout(Layout):
    """Eight-bit integers with a scale for each output, or one for all.

    weight int8 [out, in], weight_scale [out] or []. `inputs`: W8A8 rounds them under a stored scale.
    """

    scale_dtype: str = "float32"
    scale_spec: tuple[int, ...] = ()
    inputs: Inputs | None = None

    algorithm: ClassVar[str] = "rtn"

    def algorithm_options(self) -> dict[str, object]:
        return {"symmetric": True}

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        weight = self.take(tensors, "weight", "int8", self.shape)
        scale = self.take(tensors, "weight_scale", self.scale_dtype, self.scale_spec)
        require_scale("weight_scale", scale)
        stored = [self.take(tensors, *spec) for spec in (self.inputs.stored if self.inputs is not None else ())]
        for tensor in stored:
            require_scale("input_scale", tensor)
        return self._weight(weight, scale, tuple(stored))

    def _weight(self, weight: Tensor, scale: Tensor, inputs: tuple[Tensor, ...]) -> Weight:
        codes = Codes(weight.view(torch.uint8), 8, self.shape[1], signed=True)
        activation = self.inputs.activation(inputs) if self.inputs is not None else None
        return Weight(Grid(codes, Values(scale.reshape(-1, 1))), self.dtype, activation)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        grid: Any = check_form(weight, self)
        found = {
            "weight": grid.codes.packed.view(torch.int8),
            "weight_scale": grid.scale.tensor.reshape(self.scale_spec),
        }
        if weight.activation is not None:
            found.update(zip(weight.activation.names, weight.activation.tensors, strict=True))
        return found

    def measured_inputs(self, low: Tensor, high: Tensor) -> Activation:
        assert self.inputs is not None
        return self.inputs.measured(low, high)

    def scheme(self) -> Weight:
        return self._weight(
            meta("int8", *self.shape),
            meta(self.scale_dtype, *self.scale_spec),
            tuple(meta(dtype, *shape) for _, dtype, shape in (self.inputs.stored if self.inputs is not None else ())),
        )
