"""What compressed-tensors 0.10.2 makes of small weights in the formats that later versions dropped or changed.

    python3 -m venv venv && venv/bin/pip install torch==2.13.0
    echo torch==2.13.0 > constraints.txt && venv/bin/pip install -c constraints.txt transformers safetensors loguru tqdm
    venv/bin/pip install --no-deps --target legacy compressed-tensors==0.10.2
    PYTHONPATH=legacy venv/bin/python make_legacy.py

legacy.safetensors: marlin-<bits>-<strategy>|weight_packed, meta, scale_packed and |codes, |scale, what they stand for; bitmask-<dtype>|...
and |dense; words-<bits>|weight_packed, weight_zero_point (packed along the outputs) and |codes, |zeros.
"""

from pathlib import Path

import torch
from compressed_tensors.compressors.quantized_compressors.pack_quantized import pack_to_int32
from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskTensor
from compressed_tensors.compressors.sparse_quantized_compressors.marlin_24 import (
    compress_weight_24,
    pack_scales_24,
    pack_weight_24,
)
from compressed_tensors.quantization import QuantizationArgs
from safetensors.torch import save_file


def pruned(rows, columns):
    """2:4 by magnitude; a few quads hold fewer than two numbers."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    quads = weight.view(rows, -1, 4)
    order = quads.abs().argsort(-1)
    quads.scatter_(2, order[..., :2], 0)
    quads[3, 5] = 0
    quads[4, 6:9, :2] = 0
    return weight


def marlin(bits, group_size):
    rows, columns = 64, 256
    args = QuantizationArgs(num_bits=bits, group_size=group_size or -1, strategy="group" if group_size else "channel")
    weight = pruned(rows, columns)
    blocks = weight.view(rows, -1, group_size or columns)
    scale = (blocks.abs().amax(-1) / (2 ** (bits - 1) - 1)).half()
    codes = (
        torch.round(blocks / scale[..., None].float())
        .clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        .view(rows, columns)
    )
    values, places = compress_weight_24(codes.half())
    values = values.t().contiguous() + (1 << bits) // 2
    return {
        "weight_packed": pack_weight_24(values, args),
        "scale_packed": pack_scales_24(scale.t().contiguous(), args, values.shape),
        "meta": places.resize_(places.shape[1] // 2, places.shape[0] * 2),
        "codes": codes.to(torch.int8),
        "scale": scale,
    }


def bitmask(dtype):
    weight = torch.randn(10, 21, generator=torch.Generator().manual_seed(1))
    weight[weight.abs() < 0.7] = 0
    weight[4] = 0
    weight = weight.to(dtype)
    return {**BitmaskTensor.from_dense(weight).dict("x"), "x.dense": weight.float()}


def words(bits):
    generator = torch.Generator().manual_seed(bits)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (240, 20), generator=generator, dtype=torch.int8)
    zeros = torch.randint(low, high, (240, 2), generator=generator, dtype=torch.int8)
    return {
        "weight_packed": pack_to_int32(codes, bits),
        "weight_zero_point": pack_to_int32(zeros, bits, packed_dim=0).contiguous(),
        "codes": codes,
        "zeros": zeros,
    }


found = {}
for bits in (4, 8):
    for group_size in (128, None):
        own = marlin(bits, group_size)
        found.update(
            {f"marlin-{bits}-{'group' if group_size else 'channel'}|{name}": tensor for name, tensor in own.items()}
        )
for dtype in (torch.bfloat16, torch.float8_e4m3fn):
    own = bitmask(dtype)
    name = str(dtype).removeprefix("torch.")
    found.update({f"bitmask-{name}|{key.removeprefix('x.')}": tensor for key, tensor in own.items()})
for bits in range(2, 9):
    found.update({f"words-{bits}|{name}": tensor for name, tensor in words(bits).items()})
save_file({name: tensor.contiguous() for name, tensor in found.items()}, Path(__file__).parent / "legacy.safetensors")
