"""Small weights as bitsandbytes quantizes, dequantizes and multiplies them on the CPU.

    pip install torch==2.13.0 bitsandbytes==0.50.2 safetensors; python make.py

Writes four_bits.safetensors and eight_bits.safetensors beside itself. Tensors of case `c` are named `c/source`,
`c/stored/weight`, `c/dense`, ...; the metadata's "cases" is JSON: case -> its options.

Weights with nested scales have few significant bits, so that the mean of their scales is exact and does not depend on the
order in which a machine adds.
"""

import itertools
import json
from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from safetensors.torch import save_file

F = bnb.functional
HERE = Path(__file__).parent
torch.set_num_threads(1)


def numbers(shape, seed, spread=0.02):
    """Normal, with some zeros, a block of zeros, and values of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=generator) * spread
    dense[torch.rand(shape, generator=generator) < 0.02] = 0
    flat = dense.view(-1)
    flat[-3:] = torch.tensor([spread * 9, -spread / 500, 0.0])[-min(3, flat.numel()) :]
    if flat.numel() > 400:
        flat[128:256] = 0
        flat[256:320] = torch.arange(-32, 32) / 32  # some lie half way between two levels
    return dense


def coarse(dense):
    return (dense * 4096).round() / 4096


def dequantized(packed, state):
    """float32; as one long row, because the vector code mistakes the scales of rows that are no whole number of blocks."""
    shape, state.shape, state.dtype = state.shape, torch.Size((1, state.shape.numel())), torch.float32
    return F.dequantize_4bit(packed, state).view(shape)


def four_bits():
    tensors, cases = {}, {}
    plan = [
        (shape, dtype, kind, size, nested, torch.uint8)
        for (shape, size), dtype, kind, nested in itertools.product(
            (((7, 13), 64), ((5, 96), 64), ((5, 128), 64), ((5, 128), 32), ((1, 1), 64)),
            (torch.float16, torch.bfloat16, torch.float32), ("nf4", "fp4"), (False, True),
        )
    ]
    plan += [((8, 96), torch.bfloat16, "nf4", 128, nested, storage) for nested, storage in itertools.product(
        (False, True), (torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64))]
    plan += [((130, 64), torch.bfloat16, kind, 32, True, torch.uint8) for kind in ("nf4", "fp4")]  # two groups of scales
    for number, (shape, dtype, kind, size, nested, storage) in enumerate(plan):
        source = numbers(shape, number)
        source = (coarse(source) if nested else source).to(dtype)
        packed, state = F.quantize_4bit(
            source, blocksize=size, quant_type=kind, compress_statistics=nested, quant_storage=storage
        )
        stored = {"weight": packed, **{f"weight.{key}": value.clone() for key, value in state.as_dict(packed=True).items()}}
        name = f"{number:03}"
        tensors |= {f"{name}/source": source, f"{name}/dense": dequantized(packed, state)}
        tensors |= {f"{name}/stored/{key}": value for key, value in stored.items()}
        cases[name] = {"kind": kind, "size": size, "nested": nested, "storage": str(storage)[6:], "own": "weight"}
    for number, (shape, size, nested) in enumerate((((3, 8, 64), 64, True), ((3, 6, 96), 64, True), ((2, 5, 64), 32, False))):
        module = torch.nn.Module()
        source = coarse(numbers(shape, number)).to(torch.bfloat16)
        module.experts = torch.nn.Parameter(source.clone(), requires_grad=False)
        replace_parameter_4bit(module, "experts", compress_statistics=nested, quant_type="nf4", blocksize=size)
        name = f"experts{number}"
        state = module.parametrizations.experts[0].quant_state
        for key, value in module.state_dict().items():
            tensors[f"{name}/stored/{key.removeprefix('experts').removeprefix('.')}"] = value.clone()
        tensors |= {f"{name}/source": source, f"{name}/dense": dequantized(module.state_dict()["experts"], state)}
        cases[name] = {"kind": "nf4", "size": size, "nested": nested, "storage": "uint8", "own": ""}
    return tensors, cases


def eight_bits():
    tensors, cases = {}, {}
    shapes = ((7, 13), (6, 100), (3, 1100))
    for number, (shape, dtype) in enumerate(itertools.product(shapes, (torch.float16, torch.bfloat16, torch.float32))):
        source = numbers(shape, number, spread=0.5).to(dtype)
        source[2] = 0
        codes, scales, _ = F.int8_vectorwise_quant(source.to(torch.float16))
        name = f"{number:03}"
        tensors |= {f"{name}/source": source, f"{name}/dense": F.int8_vectorwise_dequant(codes, scales)}
        tensors |= {f"{name}/stored/weight": codes, f"{name}/stored/SCB": scales}
        tensors[f"{name}/stored/weight_format"] = torch.tensor(0, dtype=torch.uint8)
        tensors[f"{name}/bias"] = bias = numbers((shape[0],), number).to(dtype)
        products = []
        for tokens in (1, 3):
            x = numbers((tokens, shape[1]), number + tokens, spread=1.0)
            x[tokens // 2, 3] = 17.0
            x[1:2, 5] = -2.5
            x[2:] = 0
            x = tensors[f"{name}/x{tokens}"] = x.to(dtype)
            for threshold in (0.0, 2.0, 6.0):
                state = bnb.MatmulLtState()
                state.CB, state.SCB, state.has_fp16_weights, state.is_training = codes, scales, False, False
                y = bnb.matmul(x.clone(), codes, state=state, threshold=threshold, bias=bias)
                tensors[f"{name}/y{tokens}_{threshold}"] = y
                products.append([tokens, threshold])
        cases[name] = {"products": products}
    return tensors, cases


for file, make in (("four_bits", four_bits), ("eight_bits", eight_bits)):
    tensors, cases = make()
    about = {"cases": json.dumps(cases), "made_by": f"bitsandbytes {bnb.__version__}, torch {torch.__version__}, CPU"}
    save_file({key: value.contiguous() for key, value in tensors.items()}, HERE / f"{file}.safetensors", about)
    print(file, len(cases), "cases", sum(value.numel() * value.element_size() for value in tensors.values()), "bytes")
