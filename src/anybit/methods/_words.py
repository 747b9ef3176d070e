"""What formats that keep integer codes in 32-bit words share. No method of its own: the name starts with an underscore."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.errors import CorruptFile, NotRepresentable
from anybit.weight import packing
from anybit.weight.nodes import Codes, Grid, Node
from anybit.weight.weight import row_chunks

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weight import Layout, Weight

# widths of the planes a code is cut into, low bits first, where a format does not let codes cross words:
#   5 bits, 32 codes = 5 words:   llll of 0-7 | 8-15 | 16-23 | 24-31 | the high bit of all 32
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def word_count(codes: int, bits: int) -> int:
    """32-bit words that hold so many codes."""
    return -(-codes * bits // 32)


def read_codes(words: Tensor, bits: int, count: int, name: str, planar: bool = False) -> Codes:
    """int32 words [rows, n] -> `count` codes a row. CorruptFile, naming the tensor, when unused bits are not zero."""
    stream = packing.words_to_rows(words)
    if planar and bits in PLANES:
        return packed_codes(stream, bits, count, lambda part: _join_planes(part, bits))
    used = packing.row_bytes(count, bits)
    spare = 8 * used - count * bits
    if bool(stream[:, used:].any()) or (spare and bool((stream[:, used - 1] >> (8 - spare)).any())):
        raise CorruptFile(
            f"tensor {name!r} has bits set behind its last code ({count} codes of {bits} bits in {words.shape[-1]} words a "
            "row); it was written for another shape or width"
        )
    return Codes(stream[:, :used].contiguous(), bits, count)


def write_codes(codes: Codes, planar: bool = False) -> Tensor:
    """Codes -> int32 words [rows, n], unused bits zero."""
    if not planar or codes.bits not in PLANES:
        return packing.rows_to_words(codes.packed, torch.int32)
    stream = torch.empty(codes.shape[0], codes.columns * codes.bits // 8, dtype=torch.uint8, device=codes.packed.device)
    for start, stop in _chunks(codes.packed, codes.columns):
        part = packing.unpack(codes.packed[start:stop], codes.bits, codes.columns)
        stream[start:stop] = _cut_planes(part, codes.bits)
    return packing.rows_to_words(stream, torch.int32)


def packed_codes(
    source: Tensor, bits: int, count: int, codes_of: Callable[[Tensor], Tensor] = lambda part: part
) -> Codes:
    """Rows of `source`, which `codes_of` makes codes of, packed a few rows at a time: a packed code takes 8 bytes on its way."""
    packed = torch.empty(source.shape[0], packing.row_bytes(count, bits), dtype=torch.uint8, device=source.device)
    for start, stop in _chunks(source, count):
        packed[start:stop] = packing.pack(codes_of(source[start:stop]), bits)
    return Codes(packed, bits, count)


def unpacked_codes(codes: Codes) -> Tensor:
    """uint8 [rows, columns], made a few rows at a time."""
    numbers = torch.empty(codes.shape, dtype=torch.uint8, device=codes.packed.device)
    for start, stop in _chunks(codes.packed, codes.columns):
        numbers[start:stop] = packing.unpack(codes.packed[start:stop], codes.bits, codes.columns)
    return numbers


def _chunks(rows: Tensor, columns: int) -> list[tuple[int, int]]:
    """Ranges of rows to treat at a time; all at once where nothing is allocated."""
    return row_chunks(rows.shape[0], columns) if rows.device.type != "meta" else [(0, rows.shape[0])]


def _join_planes(stream: Tensor, bits: int) -> Tensor:
    blocks = stream.unflatten(-1, (-1, 4 * bits))
    codes, offset = None, 0
    for width in PLANES[bits]:
        plane = packing.unpack(blocks[..., 4 * offset : 4 * (offset + width)], width, 32) << offset
        codes = plane if codes is None else codes | plane
        offset += width
    assert codes is not None
    return codes.flatten(-2)


def _cut_planes(codes: Tensor, bits: int) -> Tensor:
    blocks, planes, offset = codes.unflatten(-1, (-1, 32)), [], 0
    for width in PLANES[bits]:
        planes.append(packing.pack(blocks >> offset, width))
        offset += width
    return torch.cat(planes, dim=-1).flatten(-2)


# --- checks --------------------------------------------------------------------------------------------------------------


def require_finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor; CorruptFile when it holds NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        place = torch.nonzero(~torch.isfinite(tensor))[0].tolist()
        raise CorruptFile(
            f"tensor {name!r} holds {tensor[tuple(place)].item()} at {place}; a damaged file, get it again"
        )
    return tensor


def require_zeros(name: str, padding: Tensor) -> None:
    """CorruptFile when the part of a tensor that is padding is not zero."""
    if bool(packing.words_to_rows(padding).any()):
        raise CorruptFile(
            f"tensor {name!r} has padding that is not zero ({padding.numel()} values); it was written for another shape"
        )


def fitted(weight: Weight, layout: Layout) -> Grid:
    """The weight's grid if the layout can store it as it is; NotRepresentable says what does not fit."""
    scheme = layout.scheme()
    ours, wanted = _summary(weight.tree), _summary(scheme.tree)
    same = weight.structure() == scheme.structure() and [(tensor.dtype, tensor.shape) for tensor in weight.tensors] == [
        (tensor.dtype, tensor.shape) for tensor in scheme.tensors
    ]
    if not same:
        raise NotRepresentable(
            f"{type(layout).__name__} stores {wanted} of shape {tuple(layout.shape)} standing for {layout.dtype}; this weight is "
            f"{ours} of shape {tuple(weight.shape)} standing for {weight.dtype}. Requantize it to that layout"
        )
    assert isinstance(weight.tree, Grid)
    return weight.tree


def _summary(node: Node) -> str:
    if not isinstance(node, Grid):
        return f"a {type(node).__name__}"
    groups = "columns grouped by an index (act-order)" if node.group_index is not None else f"blocks of {node.block}"
    parts = [name for name in ("scale", "zero", "offset") if getattr(node, name) is not None]
    described = [
        f"{name} {type(part).__name__} {_kind(part)}" for name in parts if (part := getattr(node, name)) is not None
    ]
    return f"a grid of {_kind(node.codes)} codes in {groups} ({', '.join(described)})"


def _kind(node: Node) -> str:
    if isinstance(node, Codes):
        return f"{'signed' if node.signed else 'unsigned'} {node.bits}-bit"
    tensor = getattr(node, "tensor", None)
    return str(tensor.dtype).removeprefix("torch.") if tensor is not None else ""
