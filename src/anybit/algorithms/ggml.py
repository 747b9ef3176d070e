"""llama.cpp's rounding to its block types: its reference codes and scales, or its searches (`ggml_search.py`).

    largest   scale = (value of largest magnitude, with its sign) / -2**(bits - 1), so that this value is exact
    amax      scale = largest magnitude / 127, ties away from zero; ternary: largest magnitude
    range     scale = (max - min) / (2**bits - 1), minimum = min
    power     scale = 2**(floor(log2(largest magnitude)) - 2), nearest E2M1 number, ties towards zero

Codes of these are found with the reciprocal of the float32 scale; float16 is what is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anybit.algorithms._ggml_points import POINTS
from anybit.algorithms.ggml_search import KINDS as SEARCHED
from anybit.algorithms.ggml_search import WEIGHTED, Fields
from anybit.errors import InvalidOption, NotRepresentable, did_you_mean
from anybit.weight import nodes
from anybit.weight.encoders import encoder
from anybit.weight.points import digit_places
from anybit.weight.weight import Weight, row_chunks

CHUNK = 1 << 18  # weights worked on at once: enough for torch to divide among its threads, and little memory


def quantize(
    dense: Tensor, target: Weight, *, kind: str, importance: Tensor | None = None, hessian: Tensor | None = None
) -> Weight:
    """Fill the tree of the block type `kind`.

    `importance`: mean square of every input, [in] or [experts, in], for the types whose scales are searched; `hessian`: a
    matrix [in, in] whose diagonal it is. Raises NotRepresentable for a weight that is not finite, or too large for float16
    scales, and for trees of another form; InvalidOption for an importance that does not fit.
    """
    if kind not in MADE:
        raise InvalidOption(f"no rule makes {kind!r}{did_you_mean(kind, MADE)}; one of {', '.join(MADE)}")
    if hessian is not None and importance is None:
        importance = hessian.diagonal()
    columns = dense.shape[-1]
    stacked = dense.reshape(-1, dense.shape[-2], columns)
    weights = _importance(importance, stacked)
    slots = _slots(target)
    parts = []
    for number, matrix in enumerate(stacked):
        own = None if weights is None else weights[number]
        make: Any = WEIGHTED[kind] if own is not None and kind in WEIGHTED else MADE[kind]

        def slowly(rows: Tensor, make: Any = make, own: Tensor | None = own) -> dict[str, Tensor]:
            found = [
                _stored(kind, make(rows[start:stop].to(torch.float32), own), slots)
                for start, stop in row_chunks(rows.shape[0], columns, CHUNK)
            ]
            return {name: torch.cat([part[name] for part in found]) for name in slots}

        parts.append(block_fields(matrix, kind, own, slowly))
    made = parts[0] if dense.dim() == 2 else {name: torch.stack([part[name] for part in parts]) for name in slots}
    return Weight(_filled(target.tree, slots, made, columns), target.dtype, target.activation)


@encoder("block_fields")
def block_fields(
    matrix: Tensor, kind: str, importance: Tensor | None, slowly: Callable[[Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The leaves of a matrix by name, as a weight keeps them; `slowly` makes them of any rows."""
    return slowly(matrix)


def _stored(kind: str, fields: Fields, slots: dict[str, Any]) -> dict[str, Tensor]:
    """Fields as a weight keeps them: codes packed, scales checked."""
    if set(fields) != set(slots):
        raise NotRepresentable(
            f"{kind} has the parts {', '.join(sorted(fields))}, this tree has {', '.join(sorted(slots))}"
        )
    found = {}
    for name, values in fields.items():
        node = slots[name]
        if isinstance(node, nodes.Codes):
            found[name] = nodes.Codes.of(values, node.bits, node.signed).packed
            continue
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise NotRepresentable(
                "the weight holds NaN, infinity, or numbers too large for float16 scales. Mend it, or leave the module out"
            )
        found[name] = values
    return found


def _importance(importance: Tensor | None, stacked: Tensor) -> Tensor | None:
    """float32 [experts, in] above zero; a channel that no input reached still counts a little."""
    if importance is None:
        return None
    experts, _, columns = stacked.shape
    if importance.shape not in {(columns,), (experts, columns)}:
        raise InvalidOption(
            f"the importance has the shape {tuple(importance.shape)}, the weight {tuple(stacked.shape)}: one number for each "
            f"of {columns} inputs is needed"
        )
    found = importance.to(stacked.device, torch.float32).expand(experts, columns)
    if not bool(torch.isfinite(found).all()) or bool((found < 0).any()):
        raise InvalidOption("the importance holds numbers that are no mean squares: negative, NaN or infinite ones")
    mean = found.mean(-1, keepdim=True)
    return torch.where(mean > 0, found.clamp(min=1e-30).maximum(mean * 1e-7), 1.0)


# --- trees ------------------------------------------------------------------------------------------------------------------


def _slots(target: Weight) -> dict[str, Any]:
    """The parts of a block type's tree by name."""
    tree: Any = target.tree
    if isinstance(tree, nodes.Grid) and isinstance(tree.codes, nodes.Permute):
        match tree.codes.child:
            case nodes.Columns(
                parts=(nodes.Codebook(codes=nodes.Codes() as fives), nodes.Codebook(codes=nodes.Codes() as fours))
            ):
                return {"fives": fives, "fours": fours, "d": tree.scale}
    match tree:
        case nodes.Grid(codes=nodes.Codes(), block=(1, int()), zero=None):
            found = {"q": tree.codes, **_scale(tree.scale, "d", "sc"), **_scale(tree.offset, "dmin", "mn")}
            if isinstance(tree.offset, nodes.Values):
                found["m"] = found.pop("dmin")
            return found
        case nodes.Grid(
            codes=nodes.Codebook(codes=nodes.Codes() as points), zero=nodes.Grid(codes=nodes.Codes() as shift)
        ):
            return {"q": points, "shift": shift, **_scale(tree.scale, "d", "sc")}
        case nodes.Codebook(codes=nodes.Codes(), signs=signs):
            found = {"q": tree.codes, **_scale(tree.scale, "d", "sc")}
            signs = signs.codes if isinstance(signs, nodes.Codebook) else signs
            return found if signs is None else {**found, "signs": signs}
    raise NotRepresentable(f"this {type(tree).__name__} is no tree of a block type that can be made")


def _scale(node: Any, number: str, codes: str) -> dict[str, Any]:
    match node:
        case None:
            return {}
        case nodes.Values():
            return {number: node}
        case nodes.Grid(codes=nodes.Codes(), scale=nodes.Values()):
            return {codes: node.codes, number: node.scale}
    raise NotRepresentable(f"scales that are a {type(node).__name__} cannot be made")


def _filled(tree: Any, slots: dict[str, Any], made: dict[str, Tensor], columns: int) -> Any:
    """The tree with its empty parts replaced."""
    places = {id(node): name for name, node in slots.items()}

    def fill(node: Any) -> Any:
        name = places.get(id(node))
        if name is not None:
            return replace(node, **{"packed" if isinstance(node, nodes.Codes) else "tensor": made[name]})
        match node:
            case nodes.Grid():
                parts = {name: fill(getattr(node, name)) for name in ("codes", "scale", "zero", "offset")}
                return replace(node, **parts)
            case nodes.Permute():
                return replace(node, child=fill(node.child), index=digit_places(columns).to(made["d"].device))
            case nodes.Columns():
                return replace(node, parts=tuple(fill(part) for part in node.parts))
            case nodes.Codebook():
                parts = {name: fill(getattr(node, name)) for name in ("codes", "scale", "signs")}
                return replace(node, **parts)
        return node

    return fill(tree)


# --- rules ------------------------------------------------------------------------------------------------------------------


def _blocks(rows: Tensor, width: int) -> Tensor:
    return rows.unflatten(-1, (-1, width))


def _reciprocal(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0, 1 / scale)[..., None]


def _integers(codes: Tensor) -> Tensor:
    return codes.to(torch.int16).flatten(-2)


def _half_up(numbers: Tensor) -> Tensor:
    """C's roundf: half away from zero."""
    sizes = numbers.abs()
    whole = sizes.floor()
    rounded = whole + (sizes - whole >= 0.5)
    return torch.where(numbers < 0, -rounded, rounded)


def _largest(bits: int) -> Callable[..., Fields]:
    half = 1 << (bits - 1)

    def fields(rows: Tensor, importance: Tensor | None) -> Fields:
        """Codes minus half; of equal magnitudes the first one counts."""
        blocks = _blocks(rows, 32)
        scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))[..., 0] / -half
        codes = (blocks * _reciprocal(scale) + (half + 0.5)).trunc().clamp(max=2 * half - 1) - half
        return {"q": _integers(codes), "d": scale.to(torch.float16)}

    return fields


def _range(bits: int) -> Callable[..., Fields]:
    highest = (1 << bits) - 1

    def fields(rows: Tensor, importance: Tensor | None) -> Fields:
        blocks = _blocks(rows, 32)
        lowest = blocks.amin(-1) + 0.0  # never -0.0
        scale = (blocks.amax(-1) - lowest) / highest + 0.0
        codes = ((blocks - lowest[..., None]) * _reciprocal(scale) + 0.5).trunc().clamp(max=highest)
        return {"q": _integers(codes), "d": scale.to(torch.float16), "m": lowest.to(torch.float16)}

    return fields


def _q8_0(rows: Tensor, importance: Tensor | None) -> Fields:
    blocks = _blocks(rows, 32)
    scale = blocks.abs().amax(-1) / 127
    return {"q": _integers(_half_up(blocks * _reciprocal(scale))), "d": scale.to(torch.float16)}


def _digits(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Ternary digits 0, 1, 2 [rows, blocks, 256] and scales."""
    blocks = _blocks(rows, 256)
    scale = blocks.abs().amax(-1)
    return _half_up(blocks * _reciprocal(scale)).to(torch.int16) + 1, scale.to(torch.float16)


def _tq2_0(rows: Tensor, importance: Tensor | None) -> Fields:
    digits, scale = _digits(rows)
    return {"q": digits.flatten(-2), "d": scale}


def _tq1_0(rows: Tensor, importance: Tensor | None) -> Fields:
    digits, scale = _digits(rows)

    def packed(start: int, apart: int, count: int) -> Tensor:
        """Digits `apart` elements apart, the first one the highest; the byte is the number over 243, rounded up."""
        number = torch.zeros_like(digits[..., :apart])
        for place in range(count):
            number += digits[..., start + place * apart : start + (place + 1) * apart] * 3 ** (4 - place)
        return (number.to(torch.int32) * 256 + 242) // 243

    fives = torch.cat([packed(0, 32, 5), packed(160, 16, 5)], -1)
    return {"fives": _integers(fives), "fours": _integers(packed(240, 4, 4)), "d": scale}


def _mxfp4(rows: Tensor, importance: Tensor | None) -> Fields:
    blocks = _blocks(rows, 32)
    largest = _largest_finite(blocks)
    exponent = torch.where(largest > 0, largest.log2().floor() + 125, 0.0).clamp(0, 254).to(torch.int32)
    return {"q": _e2m1(blocks, torch.ldexp(blocks.abs(), (127 - exponent)[..., None])), "d": exponent.to(torch.uint8)}


def _largest_finite(blocks: Tensor) -> Tensor:
    largest = blocks.abs().amax(-1)
    if not bool(torch.isfinite(largest).all()):
        raise NotRepresentable("the weight holds NaN or infinity. Mend it, or leave the module out")
    return largest


def _e2m1(blocks: Tensor, sizes: Tensor) -> Tensor:
    """Nearest codes of magnitudes, ties towards zero; never minus zero."""
    borders = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=blocks.device)
    codes = torch.bucketize(sizes, borders, out_int32=True)
    return _integers(codes + 8 * ((blocks < 0) & (codes > 0)))


def _nvfp4(rows: Tensor, importance: Tensor | None) -> Fields:
    """Scales are largest magnitude / 6 in unsigned E4M3, ties away from zero; above 240 they are 448."""
    blocks = _blocks(rows, 16)
    wanted = _largest_finite(blocks) / 6
    if bool((wanted > 448).any()):
        raise NotRepresentable(
            "the weight holds numbers too large for NVFP4's scales: infinity for them is 2688. Choose another type"
        )
    exponent = (wanted.view(torch.int32) >> 23) - 127
    small = (wanted * 512 + 0.5).floor().clamp(max=7).to(torch.int32)
    mantissa = (((wanted.view(torch.int32) >> 19) & 15) + 1) >> 1
    code = torch.where(exponent <= -7, small, (exponent + 7) * 8 + mantissa)
    code = torch.where(code >= 15 * 8, 0x7E, code)
    scale = torch.where(code < 8, code / 512, torch.ldexp(1 + (code % 8) / 8, code // 8 - 7))
    sizes = torch.where((scale > 0)[..., None], blocks.abs() / scale[..., None], 0.0)
    return {"q": _e2m1(blocks, sizes), "d": code.to(torch.uint8)}


def _q1_0(rows: Tensor, importance: Tensor | None) -> Fields:
    """The mean magnitude, and signs."""
    blocks = _blocks(rows, 128)
    return {"q": _integers((blocks >= 0).to(torch.uint8)), "d": blocks.abs().mean(-1).to(torch.float16)}


def _q2_0(rows: Tensor, importance: Tensor | None) -> Fields:
    """The largest magnitude, and -1, 0, 1: the code for 2 is never needed."""
    blocks = _blocks(rows, 64)
    scale = blocks.abs().amax(-1)
    return {"q": _integers(_half_up(blocks * _reciprocal(scale)) + 1), "d": scale.to(torch.float16)}


MADE: dict[str, Callable[..., Fields]] = {
    "Q4_0": _largest(4),
    "Q4_1": _range(4),
    "Q5_0": _largest(5),
    "Q5_1": _range(5),
    "Q8_0": _q8_0,
    **SEARCHED,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
    **POINTS,
}
