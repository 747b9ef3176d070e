"""HIGGS (arXiv 2411.17525): rotated weights are nearly Gaussian, and pairs take the nearest point of a grid made for that.

    per row and Hadamard block:  s = |w|,  z = w H sqrt(size) / s,  code = nearest grid point of z,  scale = s / sqrt(size)

No data is needed. One pass, as in transformers' `quantize_with_higgs`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from anybit.algorithms import _vectors
from anybit.errors import NotRepresentable
from anybit.weight import Codebook, Codes, Crop, Rotate, Values, Weight, packing
from anybit.weight.weight import row_chunks


def quantize(dense: Tensor, target: Weight, *, grid: Tensor, extras: Mapping[str, Tensor]) -> Weight:
    """Codes of one matrix. `grid` float32 [entries, 1 or 2]: one number or a pair; `extras`: what the layout stores besides."""
    crop = target.tree
    rotate = crop.child if isinstance(crop, Crop) else None
    book = rotate.child if isinstance(rotate, Rotate) else None
    if dense.dim() != 2 or not isinstance(book, Codebook) or not isinstance(book.codes, Codes) or book.vector != (1, 2):
        raise NotRepresentable(
            "HIGGS fills pairs from one table behind a rotation, for one matrix; choose another method"
        )
    assert isinstance(crop, Crop)
    assert isinstance(rotate, Rotate)
    assert isinstance(book.scale, Values)
    rows, width = book.shape
    size, grid = rotate.size, grid.to(dense.device)
    repeat = size // book.block[1]
    matrix = rotate.factor(dense.device)
    packed = torch.empty(rows, packing.row_bytes(width // 2, book.codes.bits), dtype=torch.uint8, device=dense.device)
    scales = torch.empty(rows, width // book.block[1], dtype=book.scale.tensor.dtype, device=dense.device)
    for start, stop in row_chunks(rows, width, 1 << 19):
        padded = torch.nn.functional.pad(dense[start:stop].to(torch.float32), (0, width - dense.shape[1]))
        blocks = padded.view(stop - start, -1, size)
        norm = torch.linalg.vector_norm(blocks, dim=-1)
        unit = blocks @ matrix * (math.sqrt(size) / norm.clamp(min=1e-30))[..., None]
        codes = _vectors.nearest(unit.reshape(-1, grid.shape[1]), grid).view(stop - start, -1)
        if grid.shape[1] == 1:
            codes = codes[:, 0::2] * len(grid) + codes[:, 1::2]
        packed[start:stop] = packing.pack(codes.to(torch.int32), book.codes.bits)
        scales[start:stop] = (norm / math.sqrt(size)).to(scales.dtype).repeat_interleave(repeat, 1)
    pairs = grid if grid.shape[1] == 2 else torch.cartesian_prod(grid[:, 0], grid[:, 0])
    tables = pairs.view(1, -1, 1, 2).to(book.tables.dtype)
    made = replace(book, codes=replace(book.codes, packed=packed), tables=tables, scale=Values(scales))
    own = {name: tensor.to(dense.device) for name, tensor in extras.items()}
    return Weight(replace(crop, child=replace(rotate, child=made)), target.dtype, extras=own)
