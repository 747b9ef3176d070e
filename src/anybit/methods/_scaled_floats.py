"""Layouts of small floats with a scale per block, and what FP4 under two levels of scales needs. No method of its own.

Methods differ in names, in the shape a scale is stored in, and in how a scale is found; the first two are fields here, the
last is `scales` of a subclass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import torch
from anybit.algorithms import minifloat
from anybit.errors import CorruptFile, NotRepresentable
from anybit.weight import levels as tables
from anybit.weight.activation import Activation
from anybit.weight.layout import Layout, meta
from anybit.weight.nodes import Codes, Grid, Node, Transpose, Values
from anybit.weight.packing import row_bytes
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

Spec = tuple[str, str, tuple[int, ...]]  # relative name, dtype, shape
NAN_E4M3 = 0x7F


@dataclass(frozen=True)
class Inputs:
    """How a layout's input is quantized. `stored`: static scales, in the rule's order. `limit`: magnitudes are clipped to it.

    `shifted`: of static scales that are made, whether the zero point beside them is anything but 0.
    """

    rule: str
    dtype: str = "e4m3"
    granularity: str = "token"
    group_size: int | None = None
    stored: tuple[Spec, ...] = ()
    stacked: bool = False
    limit: float | None = None
    shifted: bool = False

    def activation(self, tensors: tuple[Tensor, ...]) -> Activation:
        """What a weight carries."""
        return Activation(
            self.rule,
            self.dtype,
            self.granularity,
            self.group_size,
            names=tuple(name for name, _, _ in self.stored),
            tensors=tensors,
            stacked=self.stacked,
            limit=self.limit,
        )

    def measured(self, low: Tensor, high: Tensor) -> Activation:
        """The same, its one static scale from extremes [in] or [experts, in]: the largest magnitude becomes the largest code."""
        (_, dtype, shape), *others = self.stored
        if others or self.rule not in TOPS:
            raise NotRepresentable(
                f"scales of the input rule {self.rule!r} are not measured here; load a calibrated file"
            )
        largest = torch.maximum(-low, high).amax(-1)
        scale = torch.where(largest > 0, largest / TOPS[self.rule], 1.0)
        return self.activation((scale.to(getattr(torch, dtype)).reshape(shape),))


# the number that the largest magnitude of the input stands at, of rules with one static scale: with two levels, the product
TOPS = {"e4m3_static": 448.0, "nvfp4": 6.0 * 448.0, "int8_static": 127.0}


# shape of a stored scale, from (experts or nothing), (down, across) of the grid of blocks
FORMS: dict[str, Any] = {
    "grid": lambda lead, down, across: (*lead, down, across),
    "turned": lambda lead, down, across: (*lead, across, down),
    "flat": lambda lead, down, across: (*lead, down * across),
    "scalar": lambda lead, down, across: lead,
    "tiles": lambda lead, down, across: (*lead, down, 1, across, 1),
}


@dataclass(frozen=True)
class ScaledFloatLayout(Layout):
    """Codes of `levels` and a scale for each `block` (rows, columns) of them; 0 means the whole axis.

    `scale_dtype` of a power of two is uint8 or float8_e8m0fnu. `unused`: tensors that are stored but have no part in the
    arithmetic. `swapped`: stored [in, out], blocks counted there.
    """

    levels: str = "e4m3"
    block: tuple[int, int] = (0, 0)
    weight_name: str = "weight"
    weight_dtype: str = "float8_e4m3fn"
    scale_name: str = "weight_scale"
    scale_dtype: str = "float32"
    scale_form: str = "grid"
    inputs: Inputs | None = None
    unused: tuple[Spec, ...] = ()
    swapped: bool = False

    algorithm: ClassVar[str] = "minifloat"

    # --- shapes ---

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """(rows, columns) as they are stored, experts first."""
        *lead, rows, columns = self.shape
        return (*lead, columns, rows) if self.swapped else self.shape

    @property
    def grid_block(self) -> tuple[int, int]:
        """Rows and columns of a block; an axis without a choice counts as 1, so that cuts fall anywhere."""
        down, across = self.block
        return (down or 1, across or 1)

    @property
    def scale_grid(self) -> tuple[int, int]:
        """Scales along each axis."""
        rows, columns = self.codes_shape[-2:]
        down, across = self.block
        return (-(-rows // down) if down else 1, -(-columns // across) if across else 1)

    def weight_spec(self) -> tuple[int, ...]:
        """Shape of the stored codes."""
        *lead, columns = self.codes_shape
        return (*lead, row_bytes(columns, tables.BITS[self.levels]))

    def scale_spec(self) -> tuple[int, ...]:
        """Shape of the stored scale."""
        shape: tuple[int, ...] = FORMS[self.scale_form](tuple(self.shape[:-2]), *self.scale_grid)
        return shape

    # --- both ways ---

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        codes = self.take(tensors, self.weight_name, self.weight_dtype, self.weight_spec())
        if self.levels == "e4m3":
            require_numbers(self.weight_name, codes)
        scale = self.take(tensors, self.scale_name, self.scale_dtype, self.scale_spec())
        found = [self.take(tensors, *spec) for spec in (self.inputs.stored if self.inputs is not None else ())]
        for (name, *_), tensor in zip(self.inputs.stored if self.inputs is not None else (), found, strict=True):
            require_scale(name, tensor)
        extras = {name: self.take(tensors, name, dtype, shape) for name, dtype, shape in self.unused}
        for name, tensor in extras.items():
            require_scale(name, tensor)
        return self._weight(codes, self.read_scale(scale), tuple(found), extras)

    def read_scale(self, scale: Tensor) -> Node:
        """The stored scale as a node [.., down, across]."""
        require_scale(self.scale_name, scale)
        return self._scale_node(scale)

    def _scale_node(self, scale: Tensor) -> Values:
        if self.scale_form == "turned":
            scale = scale.transpose(-1, -2)
        values = scale.reshape(*self.shape[:-2], *self.scale_grid)
        if self.scale_dtype in ("uint8", "float8_e8m0fnu"):
            return Values(values.view(torch.uint8), levels="e8m0")
        return Values(values)

    def _weight(self, codes: Tensor, scale: Node, inputs: tuple[Tensor, ...], extras: Mapping[str, Tensor]) -> Weight:
        columns = self.codes_shape[-1]
        bits = tables.BITS[self.levels]
        packed = codes.view(torch.uint8).reshape(*self.codes_shape[:-1], row_bytes(columns, bits))
        grid: Node = Grid(Codes(packed, bits, columns), scale, levels=self.levels, block=self.grid_block)
        activation = self.inputs.activation(inputs) if self.inputs is not None else None
        return Weight(Transpose(grid) if self.swapped else grid, self.dtype, activation, extras)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        tree: Any = check_form(weight, self)
        grid = tree.child if self.swapped else tree
        found = {self.weight_name: _as(grid.codes.packed, self.weight_dtype).reshape(self.weight_spec())}
        found.update(self.write_scale(grid.scale))
        if self.inputs is not None and weight.activation is not None:
            found.update(
                {spec[0]: own for spec, own in zip(self.inputs.stored, weight.activation.tensors, strict=True)}
            )
        for name, _, _ in self.unused:
            if name not in weight.extras:
                raise NotRepresentable(f"{type(self).__name__} stores {name!r}, which this weight does not carry")
            found[name] = weight.extras[name]
        return found

    def write_scale(self, scale: Any) -> dict[str, Tensor]:
        """Stored tensors of the node that `read_scale` made."""
        values = _as(scale.tensor, self.scale_dtype)
        if self.scale_form == "turned":
            values = values.transpose(-1, -2).contiguous()
        return {self.scale_name: values.reshape(self.scale_spec())}

    def scheme(self) -> Weight:
        inputs = self.inputs.stored if self.inputs is not None else ()
        return self._weight(
            meta(self.weight_dtype, *self.weight_spec()),
            self.scale_scheme(),
            tuple(meta(dtype, *shape) for _, dtype, shape in inputs),
            {name: meta(dtype, *shape) for name, dtype, shape in self.unused},
        )

    def scale_scheme(self) -> Node:
        """`read_scale` of a scale without numbers."""
        return self._scale_node(meta(self.scale_dtype, *self.scale_spec()))

    # --- creating ---

    def measured_inputs(self, low: Tensor, high: Tensor) -> Activation:
        assert self.inputs is not None
        return self.inputs.measured(low, high)

    def algorithm_options(self) -> dict[str, object]:
        return {"rule": self.scales}

    def scales(self, largest: Tensor) -> minifloat.Scales:
        """The method's rule: largest magnitudes of the blocks -> scales."""
        raise NotRepresentable(f"{type(self).__name__} has no rule to find scales by")


@dataclass(frozen=True)
class NvFp4Layout(ScaledFloatLayout):
    """E2M1 codes, an E4M3 scale for each group of inputs, and a scale of scales for the matrix, a multiplier.

    Stored: weight uint8 [out, in/2], low nibble first; weight_scale float8_e4m3fn [out, in/group]; weight_scale_2 float32 [].
    """

    levels: str = "e2m1"
    block: tuple[int, int] = (1, 16)
    weight_dtype: str = "uint8"
    scale_dtype: str = "float8_e4m3fn"
    common_name: str = "weight_scale_2"
    common_shape: tuple[int, ...] = ()
    joined: tuple[str, ...] = field(default=(), compare=False)  # last names of the layers whose scale of scales is one
    covers: float = field(default=0.0, compare=False)

    @property
    def alongside(self) -> tuple[str, ...]:
        return self.joined

    def covering(self, largest: float) -> Layout:
        return replace(self, covers=largest)

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        common = self.take(tensors, self.common_name, "float32", (*self.shape[:-2], *self.common_shape))
        require_scale(self.common_name, common)
        weight = super().decode(tensors)
        tree: Any = weight.tree
        return replace(weight, tree=replace(tree, scale=self._under(tree.scale, common)))

    def read_scale(self, scale: Tensor) -> Node:
        require_numbers(self.scale_name, scale)
        return self._scale_node(scale)

    def _under(self, scale: Any, common: Tensor) -> Grid:
        codes = Codes(scale.tensor.view(torch.uint8), 8, scale.tensor.shape[-1])
        return Grid(codes, Values(common.reshape(*self.shape[:-2], 1, 1)), levels="e4m3")

    def scale_scheme(self) -> Node:
        return self._under(super().scale_scheme(), meta("float32", *self.shape[:-2], *self.common_shape))

    def write_scale(self, scale: Any) -> dict[str, Tensor]:
        return {
            self.scale_name: _as(scale.codes.packed, self.scale_dtype).reshape(self.scale_spec()),
            self.common_name: scale.scale.tensor.reshape((*self.shape[:-2], *self.common_shape)),
        }

    def scales(self, largest: Tensor) -> minifloat.Scales:
        return nvfp4_scales(largest, largest.amax().clamp(min=self.covers) / (6.0 * 448.0))

    def algorithm_options(self) -> dict[str, object]:
        return {"rule": self.scales, "zeros": "below"}


def nvfp4_scales(largest: Tensor, common: Tensor) -> minifloat.Scales:
    """ModelOpt's rule under a scale of scales: e4m3(max of the block / (6 * common)), 1 for an empty block."""
    if not bool(common > 0):
        common = torch.ones_like(common)
    wanted = (largest / (6.0 * common)).clamp(2.0**-9, 448.0).masked_fill(largest == 0, 1.0)
    return minifloat.Scales(minifloat.nearest(wanted, "e4m3"), common)


# layers over one input that engines multiply as one: one scale of scales for all of them
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def joined_with(name: str) -> tuple[str, ...]:
    """Last names of the layers that engines join with the one of this name, itself among them; none for others."""
    return next((group for group in JOINED if name.rpartition(".")[2] in group), ())


# --- helpers -------------------------------------------------------------------------------------------------------------


def _as(packed: Tensor, dtype: str) -> Tensor:
    """The same bytes under the stored dtype; numbers that have it already stay."""
    target = getattr(torch, dtype)
    return packed if packed.dtype == target else packed.contiguous().view(target)


def require_numbers(name: str, codes: Tensor) -> None:
    """CorruptFile when E4M3 codes hold a NaN."""
    rows = codes.view(torch.uint8).reshape(-1, codes.shape[-1]) if codes.dim() else codes.reshape(1, 1)
    for number, piece in enumerate(rows.split(max(1, (1 << 22) // max(rows.shape[-1], 1)))):
        bad = (piece & NAN_E4M3) == NAN_E4M3
        if bool(bad.any()):
            place = torch.nonzero(bad)[0].tolist()
            raise CorruptFile(
                f"tensor {name!r} holds NaN ({int(bad.sum())} of {piece.numel()} codes of its piece {number}, e.g. at row "
                f"{place[0]}, column {place[1]} of it); a damaged file, get it again"
            )


def require_scale(name: str, scale: Tensor) -> None:
    """CorruptFile when a scale is NaN or infinite; bytes are powers of two, of which 255 is NaN."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        bad = scale.view(torch.uint8) == 255
    else:
        bad = ~torch.isfinite(scale.to(torch.float32))
    if bool(bad.any()):
        place = torch.nonzero(bad.reshape(-1))[0, 0].item()
        raise CorruptFile(
            f"tensor {name!r} holds NaN or infinity ({int(bad.sum())} of {bad.numel()} scales, the first is number {place}); "
            "a damaged file, get it again"
        )


def check_form(weight: Weight, layout: Layout) -> Node:
    """The weight's tree when the layout can store it as it is; NotRepresentable says what differs."""
    scheme = layout.scheme()

    def forms(one: Weight) -> list[tuple[Any, ...]]:
        return [(str(tensor.dtype).removeprefix("torch."), *tensor.shape) for tensor in one.tensors]

    if weight.structure() != scheme.structure() or forms(weight) != forms(scheme):
        raise NotRepresentable(
            f"{type(layout).__name__} stores {_summary(scheme, forms(scheme))}; this weight is "
            f"{_summary(weight, forms(weight))}. Requantize it to that layout"
        )
    return weight.tree


def _summary(weight: Weight, forms: list[tuple[Any, ...]]) -> str:
    tree = weight.tree.child if isinstance(weight.tree, Transpose) else weight.tree
    what = f"{tree.levels} in blocks of {tree.block}" if isinstance(tree, Grid) else type(tree).__name__
    inputs = f", inputs by {weight.activation.rule!r}" if weight.activation is not None else ""
    return f"{tuple(weight.shape)} of {what} for {weight.dtype} ({', '.join(map(str, forms))}{inputs})"
