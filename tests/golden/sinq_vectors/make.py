"""What sinq's own quantizer makes of small weights, and what it reads from them. Writes vectors.safetensors beside this file.

pip install torch==2.13.0 transformers==5.23.0 sinq==0.2.0 termcolor
SINQ_AUTO_PATCH=0 python make.py
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from sinq.quantizer import Quantizer

# name -> (weight, bits, group, tiling, sinq's name of the method)
CASES = {
    **{f"{bits}bit": ("normal", bits, 64, "1D", "sinq_quantAux") for bits in (8, 6, 5, 4, 3, 2)},
    "2d": ("normal", 4, 32, "2D", "sinq_quantAux"),
    "2d-3bit": ("normal", 3, 32, "2D", "sinq_quantAux"),
    "plain": ("normal", 4, 32, "1D", "sinq"),
    "plain-2d": ("normal", 4, 32, "2D", "sinq"),
    "nf4": ("normal", 4, 32, "1D", "sinq_nf4_quantAux"),
    "nf4-2d": ("normal", 4, 32, "2D", "sinq_nf4_quantAux"),
    "nf3": ("normal", 3, 32, "1D", "sinq_nf3_quantAux"),
    "one-zero": ("normal", 4, 32, "1D", "sinq_noz"),
    "tails": ("tails", 4, 32, "1D", "sinq_quantAux"),
    "halved": ("narrow", 4, 64, "1D", "sinq_quantAux"),
}


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(64, 128, generator=generator) * 0.05
    normal *= torch.rand(128, generator=generator) + 1  # columns of unequal spread, yet no heavy tails
    normal *= torch.rand(64, 1, generator=generator) + 1
    tails = normal.clone()
    tails[3, 5], tails[40, 100] = 2.0, -2.0
    return {name: tensor.half() for name, tensor in (("normal", normal), ("tails", tails), ("narrow", normal[:, :96]))}


def flattened(meta: dict) -> dict[str, torch.Tensor]:
    found = {"meta.scale2": meta["scale2"]}
    for name in ("scale", "zero"):
        value = meta[name]
        if isinstance(value, tuple):
            found |= {f"meta.{name}.{own}": tensor for own, tensor in zip("xsm", value)}
        else:
            found[f"meta.{name}"] = value
    return found


def main() -> None:
    torch.set_num_threads(1)
    sources = weights()
    tensors = {f"dense.{name}": tensor.contiguous() for name, tensor in sources.items()}
    settings = {}
    for case, (source, bits, group, tiling, method) in CASES.items():
        for compute in (torch.bfloat16, torch.float16) if case in ("4bit", "2d", "nf4") else (torch.bfloat16,):
            words, meta = Quantizer.quantize(
                sources[source],
                None,
                nbits=bits,
                group_size=group,
                axis=1,
                compute_dtype=compute,
                device=torch.device("cpu"),
                tiling_mode=tiling,
                method=method,
            )
            name = case if compute is torch.bfloat16 else f"{case}-f16"
            stored = {"W_q": words, **flattened(meta)}
            tensors |= {f"{name}.{own}": tensor.clone().contiguous() for own, tensor in stored.items()}
            tensors[f"{name}.dense"] = Quantizer.dequantize(words, meta)
            shapes = {f"{own}.shape": list(meta[own][3]) for own in ("scale", "zero") if isinstance(meta[own], tuple)}
            kept = ("nbits", "group_size", "axis", "packing", "method", "view_as_float")
            settings[name] = {
                **{key: meta[key] for key in kept},
                **shapes,
                "shape": list(meta["shape"]),
                "compute_dtype": str(compute),
                "source": source,
                "tiling_mode": tiling,
            }
    save_file(tensors, Path(__file__).parent / "vectors.safetensors", {"settings": json.dumps(settings)})


main()
