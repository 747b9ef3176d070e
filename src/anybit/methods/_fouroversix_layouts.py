"""Four Over Six: layouts of packed and of master weights, and the arithmetic of inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from anybit._lazy import torch
from anybit.algorithms import four_over_six
from anybit.errors import CorruptFile, InvalidOption, MissingTensor, NotRepresentable, ShapeMismatch
from anybit.methods._activations import finish
from anybit.methods._scaled_floats import check_form, require_numbers, require_scale
from anybit.methods._words import require_finite
from anybit.weight import packing
from anybit.weight.activation import Activation, Product, activation_rule
from anybit.weight.layout import Layout, ModuleInfo, join_name, meta
from anybit.weight.nodes import OPAQUE_DECODERS, Codes, Crop, Divided, Grid, Node, Opaque, Values
from anybit.weight.weight import Weight, row_chunks

if TYPE_CHECKING:
    from torch import Tensor

VALUES, SCALES, AMAX, METADATA = (
    f"quantized_weight_{name}" for name in ("values", "scale_factors", "amax", "metadata")
)
ROWS, BLOCKS = 128, 4  # a tile of the hardware's scales: padding goes up to whole ones
IF4 = "fouroversix_if4"


@dataclass(frozen=True)
class Settings:
    """What one module's configuration says of its weight and its input."""

    dtype: str
    rule: str
    input_dtype: str
    input_rule: str
    scale_2d: bool = False
    master: bool = False

    @property
    def activation(self) -> Activation:
        """Inputs are quantized like weights, all tokens of a call under one scale of scales."""
        return Activation(
            _rule_name("input", self.input_dtype, self.input_rule),
            self.input_dtype,
            granularity="group",
            group_size=four_over_six.GROUP[self.input_dtype],
        )


def settings_of(config: Any, module: str) -> Settings:
    """The settings of a module; an override replaces all of the configuration, with the package's defaults."""
    own = (config.module_config_overrides or {}).get(module)
    found: Mapping[str, Any] = own if own is not None else vars(config)
    dtype, rule = found.get("dtype") or "nvfp4", found.get("scale_rule") or "mse"
    settings = Settings(
        found.get("weight_dtype") or dtype,
        found.get("weight_scale_rule") or rule,
        found.get("activation_dtype") or dtype,
        found.get("activation_scale_rule") or rule,
        bool(found.get("weight_scale_2d")),
        bool(found.get("keep_master_weights")),
    )
    for what, name, by in (
        ("weights", settings.dtype, settings.rule),
        ("inputs", settings.input_dtype, settings.input_rule),
    ):
        known = four_over_six.RULES.get(name)
        if known is None:
            raise InvalidOption(
                f"{module}: {what} in {name!r} have no known storage; known dtypes are {', '.join(four_over_six.RULES)}"
            )
        if by not in known:
            raise InvalidOption(
                f"{module}: {name!r} for {what} goes with scale_rule {', '.join(map(repr, known))}, not with {by!r}"
            )
    return settings


# --- packed ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FourOverSixLayout(Layout):
    """Codes and scales, padded to whole tiles of scales. The rule is part of the format: it sets the scale of the scales.

    `swizzled`: scales lie in the order of Blackwell's tensor cores. `amax_shape`, `amax_dtype`: of mxfp4, where the number is
    a constant, the dtype is that of the weight.
    """

    settings: Settings = Settings("nvfp4", "mse", "nvfp4", "mse")
    swizzled: bool = True
    amax_shape: tuple[int, ...] = (1,)
    amax_dtype: str = "float32"
    metadata_dtype: str = "int64"
    quantizes_inputs: bool = True

    algorithm: ClassVar[str] = "four_over_six"

    @property
    def group(self) -> int:
        return four_over_six.GROUP[self.settings.dtype]

    @property
    def padded(self) -> tuple[int, int]:
        rows, columns = self.shape
        return rows + -rows % ROWS, columns + -columns % (BLOCKS * self.group)

    @property
    def scale_dtype(self) -> str:
        return "float8_e8m0fnu" if self.settings.dtype == "mxfp4" else "float8_e4m3fn"

    # --- both ways ---

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        rows, columns = self.padded
        values = self.take(tensors, VALUES, "uint8", (rows, columns // 2))
        scales = self.take(tensors, SCALES, self.scale_dtype, (rows * columns // self.group,))
        amax = self.take(tensors, AMAX, self.amax_dtype, self.amax_shape)
        metadata = self.take(tensors, METADATA, self.metadata_dtype, (6,))
        (require_scale if self.settings.dtype == "mxfp4" else require_numbers)(SCALES, scales)
        require_scale(AMAX, amax)
        if metadata.tolist() != self._metadata():
            raise CorruptFile(
                f"tensor {METADATA!r} is {metadata.tolist()}, but a weight {self.shape} has {self._metadata()} (its shape, the "
                "padded shape, packed, swizzled); a damaged file, or another model's"
            )
        return self._weight(values, self._matrix(scales.view(torch.uint8)), amax)

    def _metadata(self) -> list[int]:
        return [*self.shape, *self.padded, 1, int(self.swizzled)]

    def _matrix(self, scales: Tensor) -> Tensor:
        """Flat bytes as stored -> [rows, blocks]."""
        rows, blocks = self.padded[0], self.padded[1] // self.group
        if not self.swizzled:
            return scales.view(rows, blocks)
        tiles = scales.view(rows // ROWS, blocks // BLOCKS, 32, 4, BLOCKS)  # row 32 * j + i of a tile lies at [i, j]
        return tiles.permute(0, 3, 2, 1, 4).reshape(rows, blocks)

    def _flat(self, scales: Tensor) -> Tensor:
        """Inverse of `_matrix`, under the stored dtype."""
        if self.swizzled:
            tiles = scales.view(scales.shape[0] // ROWS, 4, 32, scales.shape[1] // BLOCKS, BLOCKS)
            scales = tiles.permute(0, 3, 2, 1, 4)
        return scales.reshape(-1).view(getattr(torch, self.scale_dtype))

    def _weight(self, values: Tensor, scales: Tensor, amax: Tensor) -> Weight:
        rows, columns = self.shape
        activation = self.settings.activation if self.quantizes_inputs else None
        dtype = self.settings.dtype
        if dtype == "if4":
            tree: Node = Opaque(IF4, ("values", "scales", "amax"), (values, scales, amax.reshape(1)), rows, columns)
            return Weight(tree, self.dtype, activation)
        codes = Codes(values, 4, self.padded[1], signed=dtype == "nvint4")
        levels = None if dtype == "nvint4" else "e2m1"
        if dtype == "mxfp4":
            scale: Node = Values(scales, levels="e8m0")
        else:
            above = Divided(Values(amax.reshape(1, 1)), four_over_six.divisor(dtype, self.settings.rule))
            scale = Grid(Codes(scales, 8, scales.shape[1]), above, levels="e4m3")
        tree = Grid(codes, scale, levels=levels, block=(1, self.group))
        if self.padded != (rows, columns):
            tree = Crop(tree, rows, columns)
        return Weight(tree, self.dtype, activation, {AMAX: amax} if dtype == "mxfp4" else {})

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        tree: Any = check_form(weight, self)
        grid: Any = tree.child if isinstance(tree, Crop) else tree
        if isinstance(grid, Opaque):
            values, scales, amax = grid.tensors
        elif isinstance(grid.scale, Values):
            values, scales = grid.codes.packed, grid.scale.tensor
            ones = torch.ones(self.amax_shape, dtype=getattr(torch, self.amax_dtype), device=values.device)
            amax = weight.extras.get(AMAX, ones)
        else:
            values, scales, amax = grid.codes.packed, grid.scale.codes.packed, grid.scale.scale.child.tensor
        metadata = torch.tensor(self._metadata(), dtype=getattr(torch, self.metadata_dtype), device=values.device)
        return {
            VALUES: values,
            SCALES: self._flat(scales),
            AMAX: amax.reshape(self.amax_shape),
            METADATA: metadata,
        }

    def scheme(self) -> Weight:
        rows, columns = self.padded
        return self._weight(
            meta("uint8", rows, columns // 2),
            meta("uint8", rows, columns // self.group),
            meta(self.amax_dtype, *self.amax_shape),
        )

    # --- creating ---

    def algorithm_options(self) -> dict[str, object]:
        settings = self.settings
        return {"format": settings.dtype, "rule": settings.rule, "scale_2d": settings.scale_2d}


def decode_if4(tensors: Mapping[str, Tensor], rows: slice, columns: slice) -> Tensor:
    """A region of an if4 weight: the sign of a scale says what its codes are."""
    size = four_over_six.GROUP["if4"]
    first, last = columns.start // size, -(-columns.stop // size)
    scales = tensors["scales"][rows, first:last]
    codes = packing.unpack(tensors["values"][rows], 4, (last - first) * size, first * size)
    numbers = four_over_six.decode(
        codes.reshape(-1, size), scales.reshape(-1), "if4", "mse", tensors["amax"].to(torch.float32)
    )
    skip = columns.start - first * size
    return numbers.view(scales.shape[0], -1)[:, skip : skip + columns.stop - columns.start]


OPAQUE_DECODERS[IF4] = decode_if4


# --- master weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MasterLayout(Layout):
    """A dense weight that is quantized in every product."""

    settings: Settings = Settings("nvfp4", "mse", "nvfp4", "mse", master=True)
    stored_dtype: str = "bfloat16"

    algorithm: ClassVar[str] = "four_over_six"

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        return self._weight(require_finite("weight", self.take(tensors, "weight", self.stored_dtype, self.shape)))

    def _weight(self, weight: Tensor) -> Weight:
        own = self.settings
        activation = replace(own.activation, rule=_master_name(own))
        return Weight(Values(weight), self.dtype, activation)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        tree: Any = check_form(weight, self)
        return {"weight": tree.tensor}

    def scheme(self) -> Weight:
        return self._weight(meta(self.stored_dtype, *self.shape))


# --- inputs ----------------------------------------------------------------------------------------------------------------


def _rule_name(what: str, dtype: str, rule: str) -> str:
    return f"fouroversix_{what}_{dtype}_{rule}"


def _inputs(x: Tensor, weight: Weight, bias: Tensor | None, product: Product, *, dtype: str, rule: str) -> Tensor:
    """Inputs as their codes stand for them; the product in float32, rounded before the bias is added."""
    return finish(product(four_over_six.rounded(x, dtype, rule)), bias, x.dtype)


def _master(x: Tensor, weight: Weight, bias: Tensor | None, product: Product, *, settings: Settings) -> Tensor:
    """The same, with a weight that is quantized first."""
    layout = FourOverSixLayout(tuple(weight.shape), weight.dtype, settings, quantizes_inputs=False)
    tree: Any = weight.tree
    own = four_over_six.quantize(tree.tensor, layout.scheme(), **layout.algorithm_options())  # type: ignore[arg-type]
    inputs = four_over_six.rounded(x, settings.input_dtype, settings.input_rule)
    rows, columns = weight.shape
    y = torch.empty(x.shape[0], rows, device=x.device)
    for start, stop in row_chunks(rows, columns):
        torch.mm(inputs, own.tree.region(slice(start, stop), slice(0, columns)).T, out=y[:, start:stop])
    return finish(y, bias, x.dtype)


def _master_name(settings: Settings) -> str:
    weight = _rule_name("master", settings.dtype, settings.rule)
    return f"{weight}{'_2d' if settings.scale_2d else ''}_{settings.input_dtype}_{settings.input_rule}"


def _register() -> None:
    """Every combination of dtypes and rules is an arithmetic of its own."""
    pairs = [(dtype, rule) for dtype, rules in four_over_six.RULES.items() for rule in rules]
    for dtype, rule in pairs:
        activation_rule(_rule_name("input", dtype, rule))(partial(_inputs, dtype=dtype, rule=rule))
    for own, inputs, two in itertools.product(pairs, pairs, (False, True)):
        settings = Settings(*own, *inputs, two, True)
        activation_rule(_master_name(settings))(partial(_master, settings=settings))


_register()


# --- which layout ------------------------------------------------------------------------------------------------------------


def layout_of(config: Any, module: ModuleInfo, stored: Mapping[str, Any], peek: Callable[[str], Any]) -> Layout | None:
    """The layout that a module's tensors have."""
    if VALUES not in stored:
        beside = [name for name in (SCALES, AMAX, METADATA) if name in stored]
        if beside:
            raise MissingTensor(f"tensor {join_name(module.name, VALUES)!r} is not stored, but {', '.join(beside)} are")
        info = stored.get("weight")
        settings = _master_settings(config, module)
        if settings is None or info is None or module.kind != "linear":
            return None
        return MasterLayout(module.shape, module.dtype, settings, info.dtype)
    settings = settings_of(config, module.name)
    for name in (SCALES, AMAX, METADATA):
        if name not in stored:
            raise MissingTensor(
                f"tensor {join_name(module.name, name)!r} is not stored; {VALUES} cannot be read without"
            )
    scales, amax, metadata = stored[SCALES], stored[AMAX], stored[METADATA]
    if len(module.shape) != 2:
        raise ShapeMismatch(f"{module.name} is a stack {module.shape}; Four Over Six stores matrices")
    wanted = "float8_e8m0fnu" if settings.dtype == "mxfp4" else "float8_e4m3fn"
    if scales.dtype != wanted:
        raise ShapeMismatch(
            f"tensor {scales.name!r} in {scales.file} is {scales.dtype}; weights in {settings.dtype!r} have {wanted} scales. "
            "Correct dtype or module_config_overrides of the quantization_config"
        )
    if amax.shape not in ((), (1,)) or metadata.dtype not in ("int64", "int32") or tuple(metadata.shape) != (6,):
        raise ShapeMismatch(
            f"tensors {amax.name!r} {amax.shape} and {metadata.name!r} {metadata.dtype} {metadata.shape} must be one number and "
            "six whole numbers"
        )
    packed, swizzled = peek(METADATA).tolist()[4:]
    if packed != 1 or swizzled not in (0, 1):
        raise CorruptFile(
            f"tensor {metadata.name!r} ends in {packed}, {swizzled}; its last two numbers are 1 (codes are packed) and 0 or 1 "
            "(scales are swizzled)"
        )
    return FourOverSixLayout(
        module.shape, module.dtype, settings, bool(swizzled), tuple(amax.shape), amax.dtype, metadata.dtype,
        module.kind == "linear",
    )  # fmt: skip


def _master_settings(config: Any, module: ModuleInfo) -> Settings | None:
    if module.name in (config.modules_to_not_convert or ()):
        return None
    settings = settings_of(config, module.name)
    return settings if settings.master else None


def layout_for(config: Any, module: ModuleInfo) -> Layout:
    """The layout a dense linear layer gets."""
    settings = settings_of(config, module.name)
    if settings.master:
        return MasterLayout(module.shape, module.dtype, settings, module.dtype)
    if module.dtype == "float64":
        raise NotRepresentable(f"{module.name} is float64; cast it to bfloat16 first")
    mx = settings.dtype == "mxfp4"
    return FourOverSixLayout(
        module.shape, module.dtype, settings, settings.dtype in ("nvfp4", "mxfp4"),
        amax_dtype=module.dtype if mx else "float32",
    )  # fmt: skip
