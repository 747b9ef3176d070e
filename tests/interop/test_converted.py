"""Converted checkpoints in the hands of the packages they were converted for, on the CPU: accepted, and the same numbers.

Run it in an environment with this package and any of gptqmodel, compressed-tensors, bitsandbytes, torchao, hqq, optimum-quanto,
mlx-lm, llama-cpp-python or auto-round: python -m pytest -m interop tests/interop/test_converted.py
A package that is not there skips its rows; docs/interop.md has an install line for each.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import anybit
from anybit.cli.schemes import from_scheme

pytestmark = pytest.mark.interop
MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"
IDS = torch.arange(5, 69)[None]


@dataclass(frozen=True)
class Row:
    """`peer`: the package, as imported. `source` and `target`: schemes, or configurations (name, arguments)."""

    peer: str
    source: str
    target: object
    kind: str = "exact"


ASYMMETRIC = {"bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2"}
ROWS = [
    Row("gptqmodel", "awq-4bit-g32", ("GPTQConfig", ASYMMETRIC)),
    Row("gptqmodel", "gguf-q4_0", "gptq-4bit-g32"),
    Row("gptqmodel", "auto-round-3bit-g64", "gptq-3bit-g64"),
    Row("gptqmodel", "gptq-4bit-g64", "awq-4bit-g64"),
    Row("gptqmodel", "quark-uint4-g32", "awq-4bit-g32"),
    Row("compressed_tensors", "gptq-4bit-g128", "ct-w4a16", "rescaled"),
    Row("compressed_tensors", "quark-uint4-g128", "ct-w4a16-asym"),
    Row("compressed_tensors", "quark-mxfp4", "ct-mxfp4"),
    Row("compressed_tensors", "nvfp4", "ct-nvfp4a16", "rescaled"),
    Row("compressed_tensors", "fbgemm-fp8", "ct-fp8-dynamic", "rescaled"),
    Row("bitsandbytes", "nf4-dq", "nf4"),
    Row("torchao", "quark-uint4-g32", "torchao-intx4-g32"),
    Row("torchao", "eetq", "torchao-int8"),
    Row("torchao", "fbgemm-fp8", "torchao-float8-dynamic"),
    Row("hqq", "awq-4bit-g64", "hqq-4bit-g64", "rescaled"),
    Row("hqq", "mlx-3bit-g64", "hqq-3bit-g64", "rescaled"),
    Row("optimum.quanto", "gemma-8bit", "quanto-int8", "rescaled"),
    Row("optimum.quanto", "mlx-4bit-g128", "quanto-int4", "rescaled"),
    Row("mlx_lm", "quark-uint4-g32", "mlx-4bit-g32", "rescaled"),
    Row("mlx_lm", "ct-mxfp4a16", "mlx-mxfp4"),
    Row("llama_cpp", "gptq-4bit-g32", "gguf-q4_0"),
    Row("llama_cpp", "awq-4bit-g32", "gguf-q4_1", "rescaled"),
    Row("llama_cpp", "eetq", "gguf-q8_0"),
    Row("auto_round", "awq-4bit-g32", "auto-round-4bit-g32"),
    Row("auto_round", "gguf-q4_0", "auto-round-4bit-g32"),
]


def config_of(target):
    return from_scheme(target) if isinstance(target, str) else getattr(anybit, target[0])(**target[1])


def weights_of(model):
    return {
        name: module.dequantize(torch.float32)
        for name, module in model.named_modules()
        if hasattr(module, "quantized_weight") and "layers" in name
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.peer}-{row.source}-{row.target}")
def test_the_package_reads_the_same_numbers(row, tmp_path):
    package = row.peer.partition(".")[0] if row.peer != "optimum.quanto" else row.peer
    pytest.importorskip(package)
    anybit.quantize(MODEL, tmp_path / "source", from_scheme(row.source))
    source = next((tmp_path / "source").glob("*.gguf"), tmp_path / "source")
    # embeddings, dense in one method and packed in another, are rounded: that is allowed, and looked at below
    report = anybit.convert(source, tmp_path / "out", config_of(row.target), allow_requantize=True)
    linear = [module for module in report.modules if "layers" in module.name]
    assert row.kind in report.counts
    assert {module.kind for module in linear} <= {"exact", row.kind}, report.counts
    assert len(linear) == 42
    before, after = (anybit.load(path, dtype="float32") for path in (source, made(tmp_path)))
    wanted, read = weights_of(before), weights_of(after)
    for name, weight in wanted.items():  # what the report says is what our own reader sees
        error = float((read[name] - weight).norm() / weight.norm())
        assert error == 0 if row.kind == "exact" else error < 2**-7, name
    READERS[row.peer](row, made(tmp_path), after, read)


def made(folder):
    return next((folder / "out").glob("*.gguf"), folder / "out")


def same_logits(theirs, ours, limit=2e-2):
    """Products in 16 bits, where theirs are; the order of additions elsewhere."""
    with torch.no_grad():
        wanted = ours(IDS).logits[0].float()
    theirs = theirs.detach().float().reshape(wanted.shape)
    assert (theirs - wanted).norm() < limit * wanted.norm()
    assert (theirs.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.9


def same_weights(theirs, read, limit):
    """`theirs`: name -> dense weight. Relative to the largest."""
    assert set(theirs) == set(read)
    for name, weight in read.items():
        assert (theirs[name].float() - weight).abs().max() <= limit * weight.abs().max(), name


def by_gptqmodel(row, folder, ours, read):
    from gptqmodel import BACKEND, GPTQModel

    backend = BACKEND.AWQ_TORCH if ours.hf_quantizer.method_name == "awq" else BACKEND.GPTQ_TORCH
    model = GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=torch.float16)
    with torch.no_grad():
        same_logits(model.model(IDS).logits, ours)


def by_transformers(row, folder, ours, read):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    with torch.no_grad():
        same_logits(model(IDS).logits, ours, 3e-2)


def by_compressed_tensors(row, folder, ours, read):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    settings = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=settings)
    same_weights({name: model.get_submodule(name).weight for name in read}, read, 2**-8)  # theirs are bfloat16


def by_hqq(row, folder, ours, read):
    from hqq.core.quantize import HQQLinear

    stored = load_file(folder / "model.safetensors")
    found = {}
    for name in read:
        layer = HQQLinear(None, None, compute_dtype=torch.bfloat16, device="cpu")
        layer.load_state_dict(
            {key[len(name) + 1 :]: tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
        )
        found[name] = layer.dequantize()
    same_weights(found, read, 0)


def by_quanto(row, folder, ours, read):
    from optimum.quanto import QuantizedModelForCausalLM

    model = QuantizedModelForCausalLM.from_pretrained(str(folder))
    model = getattr(model, "_wrapped", model)
    # theirs are rounded to bfloat16 twice, behind the product and behind the sum
    same_weights({name: model.get_submodule(name).weight.dequantize() for name in read}, read, 2**-7)


def by_mlx(row, folder, ours, read):
    import mlx.core as mx
    import numpy as np
    from mlx_lm import load

    model, _ = load(str(folder))
    same_logits(torch.tensor(np.array(model(mx.array(IDS.numpy())).astype(mx.float32))), ours, 3e-2)  # in bfloat16


# in a process of its own, as every program has it: two libraries with threads of their own do not share one well
LLAMA = """
import sys
import numpy as np
from llama_cpp import Llama
file, target = sys.argv[1:3]
ids = [int(one) for one in sys.argv[3:]]
model = Llama(file, n_ctx=256, logits_all=True, verbose=False, n_threads=1)
model.eval(ids)
np.save(target, np.array(model.scores[: len(ids)]))
"""


def by_llama_cpp(row, folder, ours, read):
    import numpy as np

    target = folder.parent / "logits.npy"
    subprocess.run([sys.executable, "-c", LLAMA, str(folder), str(target), *map(str, IDS[0].tolist())], check=True)
    same_logits(torch.from_numpy(np.load(target)), ours, 3e-2)  # its inputs are rounded to 8 bits


READERS = {
    "gptqmodel": by_gptqmodel,
    "compressed_tensors": by_compressed_tensors,
    "bitsandbytes": by_transformers,
    "torchao": by_transformers,
    "hqq": by_hqq,
    "optimum.quanto": by_quanto,
    "mlx_lm": by_mlx,
    "llama_cpp": by_llama_cpp,
    "auto_round": by_transformers,
}


def test_some_package_is_here():
    """A run that skips everything proves nothing."""
    found = []
    for name in READERS:
        try:
            found.append(importlib.import_module(name))
        except ImportError:
            continue
    if not found:
        pytest.skip("none of the packages is installed; see docs/interop.md")
