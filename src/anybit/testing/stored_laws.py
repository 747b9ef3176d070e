"""Laws about stored bytes: 1 to 5, 8 and 10. No kernel and no module takes part."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from anybit.errors import AnybitError, NotRepresentable
from anybit.testing.corruption import MUTATIONS, Corrupted, mutations
from anybit.testing.goldens import Golden, Unit, entry_of, prepared, samples, units
from anybit.testing.random_weights import random_weight
from anybit.weight import nodes
from anybit.weight.slicing import slice_columns, slice_rows
from anybit.weight.weight import Weight, same

if TYPE_CHECKING:
    from torch import Tensor


class StoredLaws:
    """Stored tensors <-> weight."""

    method: ClassVar[str]
    legal_mutations: ClassVar[dict[tuple[str, str], str]] = {}

    def legal(self, weight: Weight, unit: Unit) -> Weight:
        """Hook for formats in which not every combination of numbers can be stored: the nearest weight that can."""
        return weight

    # --- 1 ---

    def test_law_1_encode_gives_back_the_stored_bytes(self, golden: Golden) -> None:
        assert units(golden), f"{golden.name}: nothing in it is quantized"
        for unit in units(golden):
            before = {name: tensor.clone() for name, tensor in unit.tensors.items()}
            encoded = unit.layout.encode(unit.layout.decode(unit.tensors))
            assert_same_tensors(unit.tensors, before, f"{unit}: decode or encode wrote into its input")
            assert_same_tensors(encoded, unit.tensors, str(unit))

    # --- 2 ---

    def test_law_2_decode_gives_back_random_weights(self, golden: Golden) -> None:
        for unit in samples(golden):
            decoded = unit.layout.decode(unit.tensors)
            for seed in range(3):
                weight = self.legal(random_weight(unit.layout.scheme(), seed, decoded.extras), unit)
                again = unit.layout.decode(unit.layout.encode(weight))
                assert same(again, weight), f"{unit}: {difference(again, weight)}"

    # --- 3 ---

    def test_law_3_dense_values_are_the_vendors(self, golden: Golden) -> None:
        ready, rtol = prepared(golden), golden.fixture["dense_rtol"]
        wanted = {
            name.removeprefix("dense."): tensor
            for name, tensor in golden.reference.items()
            if name.startswith("dense.")
        }
        assert wanted, f"{golden.name}: the reference holds no dense weight"
        for module, dense in wanted.items():
            ours = dense_of(golden, module)
            assert ours is not None, (
                f"{module} of the reference is not among the packed weights {[e.slot.module for e in ready.plan.entries]}"
            )
            if ours.dim() == 3:  # a reference may hold only the first experts of a stack
                ours = ours[: dense.shape[0]]
            assert tuple(ours.shape) == tuple(dense.shape), (
                f"{module}: shape {tuple(ours.shape)}, vendor {tuple(dense.shape)}"
            )
            error = (ours.double() - dense.double()).abs().max().item()
            limit = rtol * dense.double().abs().max().item()
            assert error <= limit, f"{module}: differs by {error:.3g}, allowed {limit:.3g}"

    # --- 4 ---

    def test_law_4_the_scheme_has_the_weights_form(self, golden: Golden) -> None:
        for unit in units(golden):
            scheme, weight = unit.layout.scheme(), unit.layout.decode(unit.tensors)
            assert scheme.structure() == weight.structure(), str(unit)
            assert forms(scheme.tensors) == forms(weight.tensors), str(unit)
            assert {tensor.device.type for tensor in scheme.tensors} == {"meta"}, str(unit)
            assert scheme.shape == weight.shape == tuple(unit.layout.shape), str(unit)
            assert scheme.dtype == weight.dtype == unit.layout.dtype, str(unit)
            assert set(scheme.extras) == set(weight.extras), str(unit)
            stored = {
                name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                for name, tensor in unit.tensors.items()
            }
            assert unit.layout.specs() == stored, str(unit)
            rebuilt = Weight.build(weight.structure(), weight.tensors)
            assert same(rebuilt, weight), str(unit)

    # --- 5 ---

    def test_law_5_the_config_survives_json(self, golden: Golden) -> None:
        from anybit.quantizers import AutoQuantizationConfig

        config = AutoQuantizationConfig.from_pretrained(golden.checkpoint)
        assert str(getattr(config.quant_method, "value", config.quant_method)) == self.method
        unknown = {"x_key_of_a_later_version": {"nested": [1, None, "text"]}}
        first = AutoQuantizationConfig.from_dict({**config.to_dict(), **unknown})
        text = json.dumps(first.to_dict())
        second = AutoQuantizationConfig.from_dict(json.loads(text))
        assert type(second) is type(first)
        assert json.dumps(second.to_dict()) == text
        assert second.to_dict()["x_key_of_a_later_version"] == unknown["x_key_of_a_later_version"]
        stored = stored_config(golden)
        for key, value in stored.items():
            assert key in config.to_dict(), f"{key!r} of the checkpoint's configuration was dropped"
            assert config.to_dict()[key] == value, (
                f"{key!r} was {value!r} in the checkpoint, is {config.to_dict()[key]!r}"
            )

    # --- 8 ---

    def test_law_8_slices_have_the_same_numbers(self, golden: Golden) -> None:
        for unit in samples(golden):
            weight = unit.layout.decode(unit.tensors)
            dense = weight.to_dense(torch.float32)
            exact = not any(isinstance(node, nodes.Rotate) for node in walk(weight.tree))
            for axis, cut in ((-2, slice_rows), (-1, slice_columns)):
                for start, stop in ranges(dense.shape[axis]):
                    try:
                        part = cut(weight, start, stop)
                    except NotRepresentable as error:
                        multiple = re.search(r"multiples of (\d+)", str(error))
                        assert multiple or "whole" in str(error) or "dequantize" in str(error), (
                            f"{unit}: no cure in {error}"
                        )
                        if multiple is None or int(multiple[1]) >= dense.shape[axis]:
                            continue
                        start, stop = int(multiple[1]), min(2 * int(multiple[1]), dense.shape[axis])
                        part = cut(weight, start, stop)  # what the message promises
                    wanted = dense.narrow(axis, start, stop - start)
                    ours = part.to_dense(torch.float32)
                    assert ours.shape == wanted.shape, str(unit)
                    close = (
                        torch.equal(ours, wanted)
                        if exact
                        else torch.allclose(ours, wanted, rtol=1e-5, atol=1e-6 * float(dense.abs().max()))
                    )
                    assert close, f"{unit}: {'rows' if axis == -2 else 'columns'} {start}..{stop} changed"
            assert_regions(weight, dense, exact, str(unit))

    # --- 10 ---

    def test_law_10_damage_is_noticed_and_named(self, golden: Golden) -> None:
        unnoticed = []
        for unit in samples(golden):
            for name, mutation in mutations(unit):
                if (name, mutation) in self.legal_mutations:
                    continue
                with Corrupted(golden, unit, name, mutation) as damaged:
                    if damaged is None:
                        continue
                    try:
                        damaged.read()
                        unnoticed.append(f"{unit}: {name!r} {MUTATIONS[mutation]}")
                    except AnybitError as error:
                        if not damaged.named_in(str(error)):
                            unnoticed.append(
                                f"{unit}: {name!r} {MUTATIONS[mutation]}; the error does not name it: {error}"
                            )
        assert not unnoticed, "\n".join(unnoticed)

    def test_law_10_has_no_stale_exceptions(self) -> None:
        for (name, mutation), reason in self.legal_mutations.items():
            assert mutation in MUTATIONS, f"{mutation!r} is no mutation; known: {', '.join(MUTATIONS)}"
            assert len(reason) > 20, f"say why {mutation!r} of {name!r} cannot be noticed"


# --- helpers ---------------------------------------------------------------------------------------------------------------


def forms(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    return [(tensor.dtype, *tensor.shape) for tensor in tensors]


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same_tensors(ours: Any, wanted: Any, what: str) -> None:
    """Same names, dtypes, shapes and bytes."""
    assert set(ours) == set(wanted), f"{what}: tensors {sorted(ours)}, stored are {sorted(wanted)}"
    for name, tensor in wanted.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), (
            f"{what}: {name!r} has another form"
        )
        assert raw(ours[name]) == raw(tensor), f"{what}: bytes of {name!r} differ"


def difference(left: Weight, right: Weight) -> str:
    """Where two weights differ, for a message."""
    if left.structure() != right.structure():
        return f"structures differ\n{left.structure()}\n{right.structure()}"
    for number, (a, b) in enumerate(zip(left.tensors, right.tensors, strict=True)):
        if (a.dtype, a.shape) != (b.dtype, b.shape) or raw(a) != raw(b):
            return (
                f"tensor {number} differs: {a.dtype} {tuple(a.shape)} {a.flatten()[:8].tolist()}, "
                f"wanted {b.dtype} {tuple(b.shape)} {b.flatten()[:8].tolist()}"
            )
    return "equal"


def walk(node: nodes.Node) -> list[nodes.Node]:
    """A node and everything below it."""
    found = [node]
    for value in vars(node).values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, nodes.Node):
                found += walk(part)
    return found


def ranges(size: int) -> list[tuple[int, int]]:
    """Halves, an odd middle piece, and a single element."""
    half = size // 2
    wanted = [(0, half), (half, size), (size // 3, size // 3 * 2 + 1), (1, 2)]
    return [(start, stop) for start, stop in wanted if 0 <= start < stop <= size]


def assert_regions(weight: Weight, dense: Tensor, exact: bool, what: str) -> None:
    """`region` and `take_rows` of odd places agree with the whole."""
    if len(weight.shape) == 3:
        weight, dense = weight.select(weight.shape[0] - 1), dense[-1]
    rows, columns = dense.shape
    tolerance = 0.0 if exact else 1e-6 * float(dense.abs().max())
    for top, bottom in ranges(rows):
        for left, right in ranges(columns):
            part = weight.tree.region(slice(top, bottom), slice(left, right))
            worst = (part - dense[top:bottom, left:right]).abs().max().item()
            assert worst <= tolerance, f"{what}: region {top}..{bottom} x {left}..{right} differs by {worst}"
    index = torch.tensor([rows - 1, 0, rows // 2, rows - 1])
    assert (weight.tree.take_rows(index) - dense[index]).abs().max().item() <= tolerance, f"{what}: take_rows"


def dense_of(golden: Golden, module: str) -> Tensor | None:
    """float32 dense weight of a module the reference names, in the orientation of the model's class."""
    ready = prepared(golden)
    entry = entry_of(ready, module)
    if entry is None:
        return None
    by_name = {unit.name: unit for unit in units(golden)}

    def part(prefix: str) -> Tensor:
        unit = by_name[prefix]
        return unit.layout.decode(unit.tensors).to_dense(torch.float32)

    if module in by_name and len(entry.parts) > 1:
        return part(module)
    if any(one.layout is None for one in entry.parts):
        return ready.checkpoint.read(entry.parts[0].stored[entry.parts[0].dense_name].name).float()
    experts = list(dict.fromkeys(one.index[0] for one in entry.parts))
    rows = [torch.cat([part(one.prefix) for one in entry.parts if one.index[0] == expert], -2) for expert in experts]
    dense = torch.stack(rows) if experts[0] is not None else rows[0]
    return dense.transpose(-1, -2) if entry.slot.transposed else dense


def stored_config(golden: Golden) -> dict[str, Any]:
    """The quantization_config a checkpoint's config.json holds; empty if it lies elsewhere."""
    file = golden.path / "config.json"
    if not file.is_file():
        return {}
    config = json.loads(file.read_text())
    found = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    return dict(found or {})
