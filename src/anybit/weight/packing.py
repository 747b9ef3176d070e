"""Bit packing. The canonical form of every code tensor in anybit: one little-endian bit stream per row.

Code j of a row takes stream bits [j*bits, (j+1)*bits); stream bit t is bit t % 8 of byte t // 8. A row starts on a byte.

    bits = 3    byte 0: 2 2 1 1 1 0 0 0      byte 1: 5 4 4 4 3 3 3 2      byte 2: 7 7 7 6 6 6 5 5
                        ^msb      lsb^        (digits name the code that owns the bit)

Words of the formats (int32, int16, uint8) are little-endian on every machine we run on, so a row of words is a row of bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.weight.encoders import encoder

if TYPE_CHECKING:
    from torch import Tensor


def row_bytes(columns: int, bits: int) -> int:
    """Bytes that hold one row of `columns` codes."""
    return (columns * bits + 7) // 8


@encoder("pack")
def pack(codes: Tensor, bits: int) -> Tensor:
    """Unsigned integer codes [..., columns] below 2**bits -> uint8 [..., ceil(columns*bits/8)]. Higher bits are cut off."""
    columns = codes.shape[-1]
    if bits == 8:
        return (codes & 0xFF).to(torch.uint8) if codes.dtype != torch.uint8 else codes.clone()
    if bits == 16:
        return (codes.to(torch.int32) & 0xFFFF).to(torch.uint16).view(torch.uint8)
    if bits in (1, 2, 4):
        per_byte = 8 // bits
        padded = torch.nn.functional.pad(codes.to(torch.uint8) & ((1 << bits) - 1), (0, -columns % per_byte))
        fields = padded.unflatten(-1, (-1, per_byte))
        packed = fields[..., 0].clone()
        for position in range(1, per_byte):
            packed |= fields[..., position] << (bits * position)
        return packed
    # eight codes fill `bits` bytes exactly; an int64 holds them for up to 7 bits, 12 and 9..15 go by pairs of words
    padded = torch.nn.functional.pad(codes.to(torch.int64) & ((1 << bits) - 1), (0, -columns % 8))
    fields = padded.unflatten(-1, (-1, 8))
    stream = torch.zeros(*fields.shape[:-1], bits, dtype=torch.int64, device=codes.device)
    for position in range(8):
        first, shift = divmod(position * bits, 8)
        spread = fields[..., position] << shift
        for byte in range(first, (position * bits + bits + 7) // 8):
            stream[..., byte] |= (spread >> (8 * (byte - first))) & 0xFF
    return stream.to(torch.uint8).flatten(-2)[..., : row_bytes(columns, bits)].contiguous()


@encoder("unpack")
def unpack(packed: Tensor, bits: int, columns: int, start: int = 0) -> Tensor:
    """uint8 [..., bytes] -> the codes start .. start + columns of every row; uint8 up to 8 bits, else int32."""
    if bits == 8:
        return packed[..., start : start + columns]
    if bits == 16:
        words = packed[..., 2 * start : 2 * (start + columns)].to(torch.int32)
        return words[..., 0::2] | (words[..., 1::2] << 8)
    if bits in (1, 2, 4):
        per_byte = 8 // bits
        first = start // per_byte
        window = packed[..., first : -(-(start + columns) // per_byte)]
        fields = torch.empty(*window.shape, per_byte, dtype=torch.uint8, device=packed.device)
        for position in range(per_byte):
            torch.bitwise_right_shift(window, bits * position, out=fields[..., position])
        fields &= (1 << bits) - 1
        skip = start - first * per_byte
        return fields.flatten(-2)[..., skip : skip + columns]
    first = start // 8  # a run of eight codes starts on a byte
    window = packed[..., first * bits : row_bytes(start + columns, bits)]
    window = torch.nn.functional.pad(window, (0, -window.shape[-1] % bits)).to(torch.int32).unflatten(-1, (-1, bits))
    fields = torch.empty(*window.shape[:-1], 8, dtype=torch.int32, device=packed.device)
    for position in range(8):
        byte, shift = divmod(position * bits, 8)
        value = window[..., byte]
        for further in range(1, (shift + bits + 7) // 8):
            value = value | (window[..., byte + further] << (8 * further))
        fields[..., position] = (value >> shift) & ((1 << bits) - 1)
    skip = start - first * 8
    codes = fields.flatten(-2)[..., skip : skip + columns]
    return codes.to(torch.uint8) if bits <= 8 else codes


@encoder("turned")
def turned(words: Tensor) -> Tensor:
    """A contiguous copy of what is stored the other way round: words.T of `words` in rows, say."""
    return words.contiguous()


@encoder("halves_swapped")
def halves_swapped(stored: Tensor) -> Tensor:
    """uint8 of any shape with the high and the low four bits of each byte exchanged."""
    swapped = torch.empty(stored.shape, dtype=torch.uint8, device=stored.device)
    if stored.is_meta:
        return swapped  # each of the operations below would cost a millisecond there
    # a few megabytes at a time
    for part, target in zip(stored.reshape(-1).split(1 << 21), swapped.view(-1).split(1 << 21), strict=True):
        torch.bitwise_left_shift(part, 4, out=target)
        target |= part >> 4
    return swapped


def words_to_rows(words: Tensor) -> Tensor:
    """Integer words [..., n] of any width -> the same bits as bytes, uint8 [..., n * itemsize]."""
    flat = turned(words).reshape(-1)  # flat first: an axis of length 1 may keep any stride, which view refuses
    return flat.view(torch.uint8).view(*words.shape[:-1], words.shape[-1] * words.element_size())


def rows_to_words(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes uint8 [..., b] -> words of `dtype` [..., ceil(b / itemsize)], zero bits appended."""
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % dtype.itemsize)).contiguous()
    return padded.reshape(-1).view(dtype).view(*padded.shape[:-1], padded.shape[-1] // dtype.itemsize)
