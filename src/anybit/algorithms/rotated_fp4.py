"""FP4 after a rotation: runs of inputs are multiplied by an orthogonal matrix, then rounded to E2M1 (FP-Quant, Quartet).

    nvfp4 abs_max    16 numbers under s = e4m3(G * max / 6):  q = E2M1(y * G / s), which stands for q * s / G
    mxfp4 abs_max    32 numbers under e = floor(log2(max)):  q = E2M1(3 * y / 2**e), which stands for q * 2**e / 3
    mxfp4 quest      32 numbers under e = floor(log2(std * 0.487)):  q = E2M1(y / 2**e), clipped

G is stored with the weight. `emulated`: as the peer's Triton kernels, which leave dense bfloat16 numbers and break ties towards
zero; otherwise as its kernels for FP4 hardware, which break ties to even and never see an empty block.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.algorithms import minifloat
from anybit.errors import NotRepresentable
from anybit.weight import nodes, packing
from anybit.weight.weight import Weight, row_chunks

if TYPE_CHECKING:
    from torch import Tensor

GROUP = {"nvfp4": 16, "mxfp4": 32}
WIDTH_OF_QUEST = 2.92247856 / 6.0  # the largest code, in standard deviations, where a normal distribution loses least
SMALLEST = 1e-8


def global_scale(method: str) -> float:
    """G of every layer that the peer makes."""
    return 1.0 if method == "quest" else 3.0


def matrix(kind: str, size: int) -> Tensor:
    """bfloat16 [size, size] of a transform: "hadamard" (Sylvester), "gsr" (its columns by their sign changes), "identity"."""
    if kind == "identity":
        return torch.eye(size, dtype=torch.bfloat16)
    found = nodes.hadamard(size).to(torch.bfloat16)
    if kind == "gsr":
        changes = (found[1:].sign() != found[:-1].sign()).sum(0)
        found = found[:, torch.argsort(changes)].contiguous()
    return found


def turned(x: Tensor, by: Tensor) -> Tensor:
    """x [rows, in] as float32, each run of inputs times the matrix."""
    size = by.shape[0]
    return (x.to(torch.float32).reshape(-1, size) @ by.to(torch.float32)).view(x.shape)


def encode(y: Tensor, dtype: str, method: str, common: Tensor, emulated: bool) -> tuple[Tensor, Tensor]:
    """float32 [rows, in] -> codes uint8 [rows, in] and bytes of scales [rows, groups]."""
    blocks = y.unflatten(1, (-1, GROUP[dtype]))
    highest = blocks.abs().amax(-1)
    if dtype == "nvfp4":
        stored = minifloat.e4m3(common * highest / 6.0)
        scale = stored.to(torch.float32)[..., None]
        numbers = torch.where(scale != 0, blocks * common / scale, 0.0)
        scales = stored.view(torch.uint8)
    else:
        if method == "quest":
            spread = ((blocks**2).mean(-1) - blocks.mean(-1) ** 2).clamp(min=0).sqrt()
            highest = spread * WIDTH_OF_QUEST + SMALLEST
        elif not emulated:
            highest = highest + SMALLEST
        scales = minifloat.e8m0(highest, "floor")
        numbers = blocks * common / minifloat.e8m0_numbers(scales)[..., None]
    return minifloat.codes(numbers, "e2m1", "zero" if emulated else "even").flatten(1), scales


def decode(codes: Tensor, scales: Tensor, dtype: str, common: Tensor, emulated: bool) -> Tensor:
    """float32 [rows, in] that codes stand for."""
    if dtype == "nvfp4":
        factors = scales.view(torch.float8_e4m3fn).to(torch.float32)
    else:
        factors = minifloat.e8m0_numbers(scales)
    numbers = minifloat.numbers_of(codes, "e2m1").unflatten(1, (-1, GROUP[dtype])) * factors[..., None] / common
    found = numbers.flatten(1)
    return found.to(torch.bfloat16).to(torch.float32) if emulated else found


def rounded(y: Tensor, dtype: str, method: str, common: Tensor, emulated: bool) -> Tensor:
    """float32 [rows, in], already rotated, as its codes stand for it."""
    common = common.to(torch.float32).reshape(())
    return decode(*encode(y, dtype, method, common, emulated), dtype, common, emulated)


def quantize(
    dense: Tensor,
    target: Weight,
    *,
    format: str = "nvfp4",
    method: str = "abs_max",
    transform: str = "hadamard",
    size: int = 16,
    emulated: bool = False,
) -> Weight:
    """A weight [out, in] rotated and rounded, in the target's form. `size`: of the rotation."""
    if tuple(dense.shape) != tuple(target.shape) or dense.dim() != 2 or dense.shape[1] % size:
        raise NotRepresentable(
            f"a weight {tuple(dense.shape)} has no runs of {size} inputs for a target {tuple(target.shape)}; choose another "
            "hadamard_group_size, or leave the module out"
        )
    by, common = matrix(transform, size).to(dense.device), torch.tensor([global_scale(method)], device=dense.device)
    activation = target.activation
    if activation is not None:
        activation = replace(activation, tensors=tuple(common.to(like.dtype) for like in activation.tensors))
    tree = target.tree
    if isinstance(tree, nodes.Opaque):  # a master weight, which is quantized whenever it is used
        found = {"weight": dense, "matrix": by, "common": common}
        stored = tuple(found[name].to(like.dtype) for name, like in zip(tree.names, tree.tensors, strict=True))
        return Weight(replace(tree, tensors=stored), target.dtype, activation)
    assert isinstance(tree, nodes.Rotate)
    rows, columns = dense.shape
    minifloat.largest(dense, (rows, columns))  # refuses NaN and infinity
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=dense.device)
    scales = torch.empty(rows, columns // GROUP[format], dtype=torch.uint8, device=dense.device)
    for start, stop in row_chunks(rows, columns, minifloat.CHUNK):
        y = turned(dense[start:stop], by)
        codes, scales[start:stop] = encode(y, format, method, common[0], emulated)
        packed[start:stop] = packing.pack(codes, 4)
    child: nodes.Node
    if isinstance(tree.child, nodes.Values):
        numbers = torch.empty(rows, columns, dtype=tree.child.tensor.dtype, device=dense.device)
        for start, stop in row_chunks(rows, columns, minifloat.CHUNK):
            codes = packing.unpack(packed[start:stop], 4, columns)
            numbers[start:stop] = decode(codes, scales[start:stop], format, common[0], emulated).to(numbers.dtype)
        child = nodes.Values(numbers)
    else:
        child = _filled(tree.child, packed, scales, common)
    return Weight(replace(tree, child=child, matrix=by.T.contiguous()), target.dtype, activation)


def _filled(node: nodes.Node, packed: Tensor, scales: Tensor, common: Tensor) -> nodes.Node:
    match node:
        case nodes.Grid(codes=nodes.Codes() as codes, scale=nodes.Grid() | nodes.Crop() as above):
            return replace(node, codes=replace(codes, packed=packed), scale=_scales(above, scales, common))
    raise NotRepresentable(f"rotated FP4 fills a grid, not a {type(node).__name__}; choose another algorithm")


def _scales(node: nodes.Node, scales: Tensor, common: Tensor) -> nodes.Node:
    if isinstance(node, nodes.Crop):
        high, wide = node.child.shape
        padded = torch.nn.functional.pad(scales, (0, wide - scales.shape[1], 0, high - scales.shape[0]))
        return replace(node, child=_scales(node.child, padded, common))
    assert isinstance(node, nodes.Grid)
    assert isinstance(node.codes, nodes.Codes)
    assert isinstance(node.scale, nodes.Values)
    above = replace(node.scale, tensor=common.to(node.scale.tensor.dtype).reshape(1, 1))
    return replace(node, codes=replace(node.codes, packed=scales), scale=above)
