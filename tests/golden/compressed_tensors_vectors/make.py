"""What compressed-tensors 0.20.0 makes of small weights, inputs and rotations.

    python3 -m venv venv && venv/bin/pip install torch==2.13.0
    echo torch==2.13.0 > constraints.txt
    venv/bin/pip install -c constraints.txt compressed-tensors==0.20.0 transformers==5.23.0 accelerate
    venv/bin/python make.py

weights.safetensors: weight.<dtype>, and <dtype>|<case>|<tensor> of each compressed module; metadata["cases"]: its arguments.
inputs.safetensors: x.<dtype>, <dtype>|<case> the input as it is quantized, <case>|<tensor> what is stored of a static scheme.
attention.safetensors: <name> of a small Llama, ids, <case>|logits, <case>|<scale>; metadata["cases"]: kv_cache_scheme, config_groups and
transform_config of each case, and metadata["config"]: of the model.
rotations.safetensors: a module of four linears: <name>.weight, .bias, stored matrices, x.<name>, y.<name>; metadata: its transform_config.
"""

import json
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam, maybe_pad_tensor_for_block_quant
from compressed_tensors.transform import TransformConfig, apply_transform_config
from safetensors.torch import save_file

HERE = Path(__file__).parent
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def awkward(rows, columns):
    """Normal numbers, with blocks that are empty, of one sign, constant, tiny or full of ties."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[0] = 0
    weight[1] = weight[1].abs()
    weight[2] = -weight[2].abs()
    weight[3, :32] = 0.25
    weight[4] = torch.arange(columns) % 16 - 7.5
    weight[5] *= 1e-4
    weight[6, ::7] = -0.0
    weight[7, 100] = 30.0
    return weight


def extremes(weight, args):
    """Smallest and largest number of each block, in the shape of the scale."""
    if args.strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if args.strategy == "block":
        down, across = args.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, args.block_structure)
        blocks = padded.unflatten(0, (-1, down)).unflatten(2, (-1, across)).transpose(1, 2)
        return blocks.amin((2, 3)), blocks.amax((2, 3))
    groups = weight.unflatten(1, (-1, args.group_size))
    return groups.amin(-1), groups.amax(-1)


def compressed(weight, args, inputs=None):
    """The tensors a module of this weight is stored as, and the format's name."""
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    common = generate_gparam(weight.amin(), weight.amax()) if args.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(*extremes(weight, args), args, global_scale=common)
    state = {"weight": weight, "weight_scale": scale.to(weight.dtype), "weight_zero_point": zero}
    if common is not None:
        state["weight_global_scale"] = common
    format = infer_module_format(torch.nn.Linear, scheme)
    return BaseCompressor.get_value_from_registry(format.value).compress(state, scheme), format.value


def integers(bits, **more):
    return {"num_bits": bits, "type": "int", **more}


def floats(bits, **more):
    return {"num_bits": bits, "type": "float", **more}


WEIGHTS = {
    **{f"w{bits}-g32": integers(bits, group_size=32) for bits in range(2, 9)},
    **{f"w{bits}-g64-asym": integers(bits, group_size=64, symmetric=False) for bits in (2, 3, 4, 5, 8)},
    "w4-channel": integers(4, strategy="channel"),
    "w4-channel-asym": integers(4, strategy="channel", symmetric=False),
    "w8-tensor": integers(8),
    "w8-tensor-asym": integers(8, symmetric=False),
    "w8-block": integers(8, strategy="block", block_structure=[16, 48]),
    "fp8-tensor": floats(8),
    "fp8-channel": floats(8, strategy="channel"),
    "fp8-block": floats(8, strategy="block", block_structure=[16, 48]),
    "fp8-group": floats(8, group_size=64),
    "nvfp4": floats(4, strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"),
    **{f"mxfp{bits}": floats(bits, group_size=32, scale_dtype="torch.uint8") for bits in (4, 6, 8)},
}
WITH_INPUTS = {
    "w8-channel-a8": (integers(8, strategy="channel"), integers(8, strategy="token", dynamic=True)),
    "w4-g64-asym-a8": (integers(4, group_size=64, symmetric=False), integers(8, strategy="token", dynamic=True)),
}
INPUTS = {
    "int8-token": integers(8, strategy="token", dynamic=True),
    "int4-token": integers(4, strategy="token", dynamic=True),
    "int8-token-asym": integers(8, strategy="token", dynamic=True, symmetric=False),
    "int8-tensor": integers(8, strategy="tensor", dynamic=True),
    "int8-group": integers(8, group_size=32, dynamic=True),
    "fp8-token": floats(8, strategy="token", dynamic=True),
    "fp8-tensor": floats(8, strategy="tensor", dynamic=True),
    "fp8-group": floats(8, group_size=64, dynamic=True),
    **{f"mxfp{bits}": floats(bits, group_size=32, dynamic=True, scale_dtype="torch.uint8") for bits in (4, 6, 8)},
    "nvfp4": floats(4, strategy="tensor_group", group_size=16, dynamic="local", scale_dtype="torch.float8_e4m3fn"),
    "fp8-static": floats(8),
    "int8-static-asym": integers(8, symmetric=False),
}
STATIC = {
    "nvfp4": {"input_global_scale": torch.tensor([680.0])},
    "fp8-static": {"input_scale": torch.tensor([0.0078125])},
    "int8-static-asym": {
        "input_scale": torch.tensor([0.03125]),
        "input_zero_point": torch.tensor([-13], dtype=torch.int8),
    },
}


def weights():
    found, cases = {}, {}
    for name, dtype in DTYPES.items():
        weight = awkward(24, 128).to(dtype)
        found[f"weight.{name}"] = weight
        for case, own in {**{case: (own, None) for case, own in WEIGHTS.items()}, **WITH_INPUTS}.items():
            args, inputs = QuantizationArgs(**own[0]), QuantizationArgs(**own[1]) if own[1] else None
            tensors, format = compressed(weight, args, inputs)
            found.update({f"{name}|{case}|{key}": tensor.contiguous() for key, tensor in tensors.items()})
            cases[case] = {"weights": own[0], "input_activations": own[1], "format": format}
    save_file(found, HERE / "weights.safetensors", metadata={"cases": json.dumps(cases)})


def inputs():
    found = {}
    for name, dtype in DTYPES.items():
        x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1))
        x[0, 0] = 0
        x[0, 1] = x[0, 1].abs() + 1
        x[1, 2, :32] = 1e-3
        x = x.to(dtype)
        found[f"x.{name}"] = x
        for case, own in INPUTS.items():
            module = torch.nn.Module()
            module.quantization_status = QuantizationStatus.FROZEN
            for key, tensor in STATIC.get(case, {}).items():
                found[f"{case}|{key}"] = tensor
                floating = tensor.is_floating_point() and "global" not in key
                setattr(module, key, tensor.to(dtype) if floating else tensor)
            found[f"{name}|{case}"] = forward_quantize(module, x.clone(), "input", QuantizationArgs(**own))
    save_file(found, HERE / "inputs.safetensors", metadata={"cases": json.dumps(INPUTS)})


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(32, 32)
        self.second = torch.nn.Linear(32, 16)
        self.third = torch.nn.Linear(32, 32, bias=False)
        self.fourth = torch.nn.Linear(24, 32)


TRANSFORMS = {
    "plain": ("hadamard", None, False, [("input", ["re:first|third"], False), ("output", ["second"], True)]),
    "heads": ("random-hadamard", 8, False, [("output", ["first", "third"], False), ("input", ["fourth"], True)]),
    "mixed": ("random-hadamard", None, True, [("input", ["second"], True), ("input", ["third"], False)]),
    "any": (
        "random-matrix",
        None,
        False,
        [("input", ["fourth"], False), ("output", ["third"], False), ("input", ["first"], True)],
    ),
}


def rotations():
    torch.manual_seed(3)
    model = Model()
    config = {
        "config_groups": {
            group: {
                "type": kind, "head_dim": head_dim, "randomize": randomize,
                "apply": [{"location": place, "targets": targets, "inverse": inverse, "ignore": []} for place, targets, inverse in uses],
            }
            for group, (kind, head_dim, randomize, uses) in TRANSFORMS.items()
        }
    }  # fmt: skip
    apply_transform_config(model, TransformConfig(**config))
    found, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.data_ptr() not in seen:  # shared matrices are stored once
            found[name] = tensor.detach().clone()
        seen.add(tensor.data_ptr())
    for name, module in model.named_children():
        x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(5))
        found[f"x.{name}"], found[f"y.{name}"] = x, module(x).detach()
    save_file(found, HERE / "rotations.safetensors", metadata={"transform_config": json.dumps(config)})


R3 = {
    "type": "hadamard", "head_dim": 16,
    "apply": [{"location": place, "targets": ["re:.*self_attn$"], "inverse": False, "ignore": []} for place in ("q_attn", "k_cache")],
}  # fmt: skip
ATTENTION = {
    "plain": {},
    "queries-fp8": {"config_groups": {"attention": floats(8)}},
    "queries-int8-heads": {"config_groups": {"attention": integers(8, strategy="attn_head")}},
    "cache-fp8": {"kv_cache_scheme": floats(8)},
    "cache-int8-heads": {"kv_cache_scheme": integers(8, strategy="attn_head")},
    "cache-int8-dynamic-token": {"kv_cache_scheme": integers(8, strategy="token", dynamic=True)},
    "cache-int8-dynamic-tensor": {"kv_cache_scheme": integers(8, strategy="tensor", dynamic=True)},
    "cache-fp8-group": {"kv_cache_scheme": floats(8, group_size=8, dynamic=True)},
    "queries-int4-turned": {
        "config_groups": {"attention": integers(4)}, "transform_config": {"config_groups": {"R3": R3}}
    },
}  # fmt: skip


def attention():
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "vocab_size": 16, "attn_implementation": "sdpa",
    }  # fmt: skip
    torch.manual_seed(7)
    state = {name: 3 * tensor for name, tensor in LlamaForCausalLM(LlamaConfig(**sizes)).state_dict().items()}
    ids = torch.tensor([[1, 5, 9, 3, 15, 2]])
    found, cases = {**state, "ids": ids}, {}
    for case, own in ATTENTION.items():
        groups = {
            name: {"targets": ["re:.*self_attn$"], "weights": None, "input_activations": args}
            for name, args in own.get("config_groups", {}).items()
        }
        cases[case] = {**own, "config_groups": groups}
        model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
        model.load_state_dict(state)
        config = {
            "config_groups": groups,
            "kv_cache_scheme": own.get("kv_cache_scheme"),
            "quantization_status": "frozen",
        }
        apply_quantization_config(model, QuantizationConfig(**config))
        if "transform_config" in own:
            apply_transform_config(model, TransformConfig(**own["transform_config"]))
        for name, parameter in model.named_parameters():
            if name.endswith(("q_scale", "k_scale", "v_scale")):
                size = 2.0 if "int4" in case else 0.05 if "int8" in case else 0.01
                parameter.data = size * (
                    1 + torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                )
                found[f"{case}|{name}"] = parameter.data.clone()
        with torch.no_grad():
            found[f"{case}|logits"] = model(ids).logits
    metadata = {"cases": json.dumps(cases), "config": json.dumps(sizes)}
    save_file(found, HERE / "attention.safetensors", metadata=metadata)


if __name__ == "__main__":
    attention()
    weights()
    inputs()
    rotations()
