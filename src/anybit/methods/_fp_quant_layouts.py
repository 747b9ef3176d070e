"""FP-Quant: layouts of packed, of dense rotated and of master weights, and the arithmetic of inputs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import torch
from anybit.algorithms import rotated_fp4
from anybit.errors import CorruptFile, MissingTensor
from anybit.methods._activations import finish
from anybit.methods._scaled_floats import check_form, require_numbers, require_scale
from anybit.methods._words import require_finite
from anybit.weight.activation import Activation, Product, activation_rule
from anybit.weight.layout import Layout, ModuleInfo, join_name, meta
from anybit.weight.nodes import OPAQUE_DECODERS, Codes, Crop, Grid, Node, Opaque, Rotate, Rows, Values
from anybit.weight.weight import Weight, row_chunks

if TYPE_CHECKING:
    from torch import Tensor

FORWARD, BACKWARD = "forward_hadamard_matrix", "backward_hadamard_matrix"
WEIGHT_SCALE, INPUT_SCALE = "weight_global_scale", "act_global_scale"
ROWS, BLOCKS = 128, 4  # stored scales fill whole tiles of the hardware's


@dataclass(frozen=True)
class Arithmetic:
    """How numbers are rounded."""

    dtype: str = "nvfp4"
    method: str = "abs_max"
    emulated: bool = False

    @property
    def name(self) -> str:
        return f"fp_quant_{self.dtype}_{self.method}{'_emulated' if self.emulated else ''}"


@dataclass(frozen=True)
class RotatedLayout(Layout):
    """What all forms share: two equal matrices, a scale of scales for the weight and one for the input."""

    arithmetic: Arithmetic = Arithmetic()
    size: int = 16
    transform: str = "hadamard"
    float_dtype: str = "bfloat16"
    quantizes_inputs: bool = True

    algorithm: ClassVar[str] = "rotated_fp4"

    @property
    def group(self) -> int:
        return rotated_fp4.GROUP[self.arithmetic.dtype]

    # --- both ways: the weight is each subclass' own ---

    def read(self, tensors: Mapping[str, Tensor], forward: Tensor, common: Tensor) -> Node:
        """Checked tensors -> tree."""
        raise NotImplementedError

    def write(self, tree: Any) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """Tree -> (the weight's own tensors, forward matrix, scale of scales if the tree has it)."""
        raise NotImplementedError

    def own_specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of the weight's own tensors."""
        raise NotImplementedError

    def static_inputs(self) -> bool:
        return False  # fp_quant stores the weight's scale of scales for the inputs as well, and measures nothing

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        square = (self.size, self.size)
        found = {name: self.take(tensors, name, *spec) for name, spec in self.own_specs().items()}
        matrices = [
            require_finite(name, self.take(tensors, name, self.float_dtype, square)) for name in (FORWARD, BACKWARD)
        ]
        scales = [self.take(tensors, name, self.float_dtype, (1,)) for name in (WEIGHT_SCALE, INPUT_SCALE)]
        for name, scale in zip((WEIGHT_SCALE, INPUT_SCALE), scales, strict=True):
            require_scale(name, scale)
            if not bool(scale > 0):
                raise CorruptFile(
                    f"tensor {name!r} is {scale.item()}; a scale of scales is positive. Get the file again"
                )
        return self._weight(found, matrices[0], matrices[1], scales[0], scales[1])

    def _weight(
        self, found: Mapping[str, Tensor], forward: Tensor, backward: Tensor, common: Tensor, input_scale: Tensor
    ) -> Weight:
        extras = {BACKWARD: backward}
        if not self.keeps_common:
            extras[WEIGHT_SCALE] = common
        activation = None
        if self.quantizes_inputs:
            activation = Activation(
                self.arithmetic.name, "e2m1", "group", self.group, names=(INPUT_SCALE,), tensors=(input_scale,)
            )
        else:
            extras[INPUT_SCALE] = input_scale
        return Weight(self.read(found, forward, common), self.dtype, activation, extras)

    keeps_common: ClassVar[bool] = True

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        own, forward, common = self.write(check_form(weight, self))
        if common is None:
            common = torch.full((1,), rotated_fp4.global_scale(self.arithmetic.method), device=forward.device)
            common = weight.extras.get(WEIGHT_SCALE, common.to(getattr(torch, self.float_dtype)))
        given = (
            weight.activation.tensors[0] if weight.activation is not None else weight.extras.get(INPUT_SCALE, common)
        )
        return {
            **own,
            FORWARD: forward,
            BACKWARD: weight.extras.get(BACKWARD, forward),
            WEIGHT_SCALE: common.reshape(1),
            INPUT_SCALE: given,
        }

    def scheme(self) -> Weight:
        square = (self.size, self.size)
        own = {name: meta(dtype, *shape) for name, (dtype, shape) in self.own_specs().items()}
        parts = [meta(self.float_dtype, *shape) for shape in (square, square, (1,), (1,))]
        return self._weight(own, *parts)

    def algorithm_options(self) -> dict[str, object]:
        own = self.arithmetic
        return {
            "format": own.dtype, "method": own.method, "transform": self.transform, "size": self.size, "emulated": own.emulated,
        }  # fmt: skip


@dataclass(frozen=True)
class PackedRotatedLayout(RotatedLayout):
    """E2M1 codes of the rotated weight. `padded`: scales fill whole tiles, what is beyond the weight is left as it was."""

    padded: bool = True

    @property
    def scale_grid(self) -> tuple[int, int]:
        return self.shape[0], self.shape[1] // self.group

    def own_specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        rows, groups = self.scale_grid
        stored = (rows + -rows % ROWS, groups + -groups % BLOCKS) if self.padded else (rows, groups)
        return {"qweight": ("uint8", (rows, self.shape[1] // 2)), "scales": ("uint8", stored)}

    def read(self, tensors: Mapping[str, Tensor], forward: Tensor, common: Tensor) -> Node:
        scales, mx = tensors["scales"], self.arithmetic.dtype == "mxfp4"
        if scales.device.type != "meta":
            used = scales[: self.scale_grid[0], : self.scale_grid[1]]
            (require_scale if mx else require_numbers)("scales", used)
        codes = Codes(scales, 8, scales.shape[1])
        scale: Node = Grid(codes, Values(common.reshape(1, 1), inverted=True), levels="e8m0" if mx else "e4m3")
        if tuple(scales.shape) != self.scale_grid:
            scale = Crop(scale, *self.scale_grid)
        grid = Grid(Codes(tensors["qweight"], 4, self.shape[1]), scale, levels="e2m1", block=(1, self.group))
        return Rotate(grid, self.size, matrix=forward.T.contiguous())

    def write(self, tree: Any) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        grid: Any = tree.child
        scale: Any = grid.scale.child if isinstance(grid.scale, Crop) else grid.scale
        own = {"qweight": grid.codes.packed, "scales": scale.codes.packed}
        return own, tree.matrix.T.contiguous(), scale.scale.tensor


@dataclass(frozen=True)
class PseudoRotatedLayout(RotatedLayout):
    """The rotated weight after rounding, kept dense."""

    keeps_common: ClassVar[bool] = False

    def own_specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"dqweight": (self.float_dtype, self.shape)}

    def read(self, tensors: Mapping[str, Tensor], forward: Tensor, common: Tensor) -> Node:
        if forward.device.type != "meta":
            require_finite("dqweight", tensors["dqweight"])
        return Rotate(Values(tensors["dqweight"]), self.size, matrix=forward.T.contiguous())

    def write(self, tree: Any) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        return {"dqweight": tree.child.tensor}, tree.matrix.T.contiguous(), None


@dataclass(frozen=True)
class MasterRotatedLayout(RotatedLayout):
    """The weight before rotation and rounding; both happen in every product, and are what the dense weight stands for."""

    def own_specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"weight": (self.float_dtype, self.shape)}

    def read(self, tensors: Mapping[str, Tensor], forward: Tensor, common: Tensor) -> Node:
        if forward.device.type != "meta":
            require_finite("weight", tensors["weight"])
        own = (tensors["weight"], forward, common)
        return Opaque(self.arithmetic.name, ("weight", "matrix", "common"), own, self.shape[0], self.shape[1])

    def write(self, tree: Any) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        weight, forward, common = tree.tensors
        return {"weight": weight}, forward, common


# --- arithmetic ------------------------------------------------------------------------------------------------------------


def _rotated_master(tensors: Mapping[str, Tensor], rows: slice, own: Arithmetic) -> Tensor:
    """Rows of a master weight, rotated and rounded."""
    y = rotated_fp4.turned(tensors["weight"][rows], tensors["matrix"])
    return rotated_fp4.rounded(y, own.dtype, own.method, tensors["common"], own.emulated)


def _master(tensors: Mapping[str, Tensor], rows: slice, columns: slice, *, own: Arithmetic) -> Tensor:
    return rotated_fp4.turned(_rotated_master(tensors, rows, own), tensors["matrix"].T)[:, columns]


def _inputs(x: Tensor, weight: Weight, bias: Tensor | None, product: Product, *, own: Arithmetic) -> Tensor:
    """Inputs are rotated and rounded as the weight was, and meet it where it is: rotated."""
    assert weight.activation is not None
    y = _products(x, weight.tree, weight.activation.tensors[0], own)
    return finish(y, bias, x.dtype)  # once: the peer's emulation adds it twice


def _products(x: Tensor, tree: Node, common: Tensor, own: Arithmetic) -> Tensor:
    if isinstance(tree, Rows):
        return torch.cat([_products(x, part, common, own) for part in tree.parts], dim=1)
    rows, columns = tree.shape
    if isinstance(tree, Opaque):
        named = dict(zip(tree.names, tree.tensors, strict=True))
        forward = named["matrix"]
    else:
        assert isinstance(tree, Rotate)
        assert tree.matrix is not None
        forward = tree.matrix.T
    inputs = rotated_fp4.rounded(rotated_fp4.turned(x, forward), own.dtype, own.method, common, own.emulated)
    y = torch.empty(x.shape[0], rows, device=x.device)
    for start, stop in row_chunks(rows, columns):
        if isinstance(tree, Opaque):
            part = _rotated_master(named, slice(start, stop), own)
        else:
            part = tree.child.region(slice(start, stop), slice(0, columns))
        torch.mm(inputs, part.T, out=y[:, start:stop])
    return y


for _dtype, _method, _emulated in itertools.product(("nvfp4", "mxfp4"), ("abs_max", "quest"), (False, True)):
    _own = Arithmetic(_dtype, _method, _emulated)
    activation_rule(_own.name)(partial(_inputs, own=_own))
    OPAQUE_DECODERS[_own.name] = partial(_master, own=_own)


# --- which layout ------------------------------------------------------------------------------------------------------------

FORMS: dict[str, type[RotatedLayout]] = {
    "qweight": PackedRotatedLayout,
    "dqweight": PseudoRotatedLayout,
    "weight": MasterRotatedLayout,
}


def layout_of(quantizer: Any, module: ModuleInfo, stored: Mapping[str, Any]) -> Layout | None:
    """The layout that a module's tensors have; the tensors tell which of the three forms it is."""
    config = quantizer.quantization_config
    own = next((name for name in FORMS if name in stored), None)
    if FORWARD not in stored:
        if own in ("qweight", "dqweight"):
            raise MissingTensor(f"tensor {join_name(module.name, FORWARD)!r} is not stored; {own} is rotated by it")
        return None
    if own is None:
        raise MissingTensor(
            f"tensor {join_name(module.name, 'qweight')!r} is not stored, nor dqweight or weight; {FORWARD} belongs to one"
        )
    layout = _layout(config, module, own, config.pseudoquantization)
    named = _named_form(config)
    if own != named:
        quantizer.decide(f"stored as {own}, told from tensors; the configuration means {named}", module.name)
        emulated = own == "dqweight" or (own == "weight" and config.pseudoquantization)
        layout = replace(layout, arithmetic=replace(layout.arithmetic, emulated=emulated))
    square, dtype = stored[FORWARD].shape, stored[FORWARD].dtype
    if len(square) == 2 and square[0] == square[1] and square[0] != layout.size and module.shape[1] % square[0] == 0:
        quantizer.decide(
            f"rotated in runs of {square[0]}, told from {FORWARD}; hadamard_group_size is {layout.size}", module.name
        )
        layout = replace(layout, size=square[0])
    layout = replace(layout, float_dtype=dtype, quantizes_inputs=module.kind == "linear")
    if isinstance(layout, PackedRotatedLayout) and "scales" in stored:
        layout = replace(layout, padded=tuple(stored["scales"].shape) != layout.scale_grid)
    return layout


def _named_form(config: Any) -> str:
    if config.store_master_weights:
        return "weight"
    return "dqweight" if config.pseudoquantization else "qweight"


def _layout(config: Any, module: ModuleInfo, form: str, emulated: bool) -> RotatedLayout:
    arithmetic = Arithmetic(config.forward_dtype, config.forward_method, emulated)
    return FORMS[form](module.shape, module.dtype, arithmetic, config.hadamard_group_size, config.transform_init)


def layout_for(config: Any, module: ModuleInfo) -> Layout:
    """The layout a dense linear layer gets."""
    return _layout(config, module, _named_form(config), config.pseudoquantization)
