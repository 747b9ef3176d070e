"""Writes ../torchao/tiny-* and vectors.safetensors with torchao of today.

Made on the CPU with: pip install torch==2.13.0 torchao==0.18.0 transformers==5.23.0 accelerate==1.15.0
"""

import json
import shutil
import tempfile
import warnings
from collections import OrderedDict
from pathlib import Path

import torch
import torchao.quantization.quant_api as quant_api
from safetensors.torch import save_file
from tiny import GOLDEN, dense_model, finish
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm
from transformers import AutoModelForCausalLM, TorchAoConfig

warnings.filterwarnings("ignore")
quant_api._check_hardware_support = lambda granularity: None  # FP8 products of whole rows run on the CPU, too
PEER = "torchao 0.18.0 + transformers 5.23.0"
HQQ = IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY


def intx(bits: int, **options: object) -> IntxWeightOnlyConfig:
    return IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), **options)


TINY = {
    "tiny-int8dyn-asym-reduced": (
        torch.float32,
        Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC, reduce_range=True),
    ),
    "tiny-int8dyn-int4": (torch.float32, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4)),
    "tiny-int8dyn-tensor-f16": (torch.float16, Int8DynamicActivationInt8WeightConfig(granularity=PerTensor())),
    "tiny-float8dyn-bf16": (
        torch.bfloat16,
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), activation_value_lb=0.5, activation_value_ub=2.0),
    ),
    "tiny-intx": (
        torch.float32,
        FqnToConfig(
            OrderedDict([
                ("model.embed_tokens", intx(8)),
                ("model.layers.0.self_attn.q_proj", intx(1, granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC)),
                ("model.layers.0.self_attn.k_proj.weight", intx(3, granularity=PerGroup(16), mapping_type=MappingType.ASYMMETRIC)),
                ("model.layers.0.self_attn.v_proj", None),
                ("re:.*\\.(gate|up)_proj", Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2, granularity=PerTensor())),
                ("re:.*\\.down_proj", Int8DynamicActivationIntxWeightConfig(
                    weight_dtype=torch.int5, intx_choose_qparams_algorithm=HQQ)),
                ("_default", intx(2, granularity=PerAxis(0), scale_dtype=torch.float16)),
            ])
        ),
    ),
}  # fmt: skip

VECTORS = {
    "int8": Int8WeightOnlyConfig(),
    "int8-g32": Int8WeightOnlyConfig(granularity=PerGroup(32)),
    "int8-tensor": Int8WeightOnlyConfig(granularity=PerTensor()),
    "int8-dynamic": Int8DynamicActivationInt8WeightConfig(),
    "int8-dynamic-reduced": Int8DynamicActivationInt8WeightConfig(reduce_range=True),
    "float8": Float8WeightOnlyConfig(),
    "float8-tensor": Float8WeightOnlyConfig(granularity=PerTensor()),
    "float8-g32": Float8WeightOnlyConfig(granularity=PerGroup(32)),
    "float8-e5m2": Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
    "float8-dynamic": Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor()),
    "int8-dynamic-int4": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4),
    "int4-hqq": intx(4, granularity=PerGroup(32), intx_choose_qparams_algorithm=HQQ),
    "int5-scale32": intx(5, granularity=PerGroup(32), scale_dtype=torch.float32),
    **{
        f"int{bits}-{kind.name}": intx(bits, granularity=PerGroup(32), mapping_type=kind)
        for bits in range(1, 9)
        for kind in (MappingType.SYMMETRIC, MappingType.ASYMMETRIC, MappingType.SYMMETRIC_NO_CLIPPING_ERR)
        if bits > 1 or kind is not MappingType.SYMMETRIC_NO_CLIPPING_ERR
    },
}


def tiny() -> None:
    for name, (dtype, config) in TINY.items():
        with tempfile.TemporaryDirectory() as dense:
            # with names for all, transformers 5.23 tries to quantize biases, too, and fails
            dense_model(dense, dtype, bias="intx" not in name)
            model = AutoModelForCausalLM.from_pretrained(
                dense, dtype=dtype, device_map="cpu",
                quantization_config=TorchAoConfig(config, include_input_output_embeddings="intx" in name),
            )  # fmt: skip
        save(GOLDEN / name, model, dtype)


def save(folder: Path, model: torch.nn.Module, dtype: torch.dtype) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    finish(
        folder, model, PEER, "tests/golden/torchao_vectors/make.py", dtype, activation_quant=True,
        logits_atol={torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}[dtype], layer_rtol=tolerance,
        dense_rtol=0.0 if dtype == torch.float32 else 2**-8,
    )  # fmt: skip


def static() -> None:
    """Scales of inputs found beforehand, and inputs multiplied first (as SmoothQuant and AWQ do): no JSON can ask for it."""
    with tempfile.TemporaryDirectory() as dense:
        dense_model(dense, torch.float32)
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    kinds = {"q_proj": MappingType.SYMMETRIC, "k_proj": MappingType.ASYMMETRIC, "down_proj": MappingType.SYMMETRIC}
    for name, module in model.named_modules():
        own = name.rpartition(".")[2]
        if own in kinds:
            zero = torch.tensor([[[11]]], dtype=torch.int8) if kinds[own] is MappingType.ASYMMETRIC else None
            config = Int8StaticActivationInt8WeightConfig(
                act_quant_scale=torch.tensor([[[0.03125]]]), act_quant_zero_point=zero, granularity=PerTensor(),
                act_mapping_type=kinds[own],
            )  # fmt: skip
            quantize_(module, config, filter_fn=lambda one, path: True)
        elif own in ("v_proj", "up_proj"):
            quantize_(module, Int8WeightOnlyConfig(), filter_fn=lambda one, path: True)
        if own in ("k_proj", "down_proj", "up_proj"):
            columns = module.weight.shape[1]
            module.weight.act_pre_scale = torch.linspace(0.5, 2.0, columns)
    folder = GOLDEN / "tiny-int8-static"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt", **metadata},
    )
    config = {**model.config.to_diff_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    config["quantization_config"] = {
        "quant_method": "torchao", "modules_to_not_convert": None, "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
        "quant_type": {"default": {"_type": "Int8StaticActivationInt8WeightConfig", "_version": 1, "_data": {}}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    finish(
        folder, model, PEER, "tests/golden/torchao_vectors/make.py", torch.float32, activation_quant=True, logits_atol=1e-3,
        layer_rtol=2e-6, dense_rtol=0.0,
    )  # fmt: skip


def vectors() -> None:
    """One layer each, with what the header says of it and the configuration as the plain data of config.json."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(16, 64, generator=generator) * torch.exp2(torch.rand(16, 1, generator=generator) * 6 - 6)
    dense[1], dense[2] = dense[1].abs(), -dense[2].abs()
    tensors, described = {}, {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        short = str(dtype).removeprefix("torch.")
        tensors[f"{short}.dense"] = dense.to(dtype)
        for name, config in VECTORS.items():
            layer = torch.nn.Linear(64, 16, bias=False, dtype=dtype)
            layer.weight.data = dense.to(dtype).clone()
            quantize_(layer, config)
            parts, metadata = flatten_tensor_state_dict({"a.weight": layer.weight.data})
            for key, tensor in parts.items():
                tensors[f"{short}.{name}.{key.removeprefix('a._weight_')}"] = tensor.contiguous()
            described[f"{short}.{name}"] = metadata["a.weight"]
            described[name] = json.dumps(TorchAoConfig(config).to_dict()["quant_type"])
    save_file(tensors, Path(__file__).parent / "vectors.safetensors", described)


if __name__ == "__main__":
    tiny()
    static()
    vectors()
