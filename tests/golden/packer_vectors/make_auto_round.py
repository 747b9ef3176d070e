"""What auto-round makes of a small weight: its data-free quantization functions, and its packers.

    python3 -m venv venv && venv/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    venv/bin/pip download --no-deps auto-round==0.16.1 && venv/bin/python -m zipfile -e auto_round-*.whl autoround
    venv/bin/python make_auto_round.py autoround

Only the files with quantization functions and packers are loaded, the rest of the package is replaced by empty modules. Writes
auto_round.safetensors: weight float32, and <packing>-<bits>-<group size>-<sym or asym>.<tensor>.
"""

import ast
import importlib.util
import logging
import math
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(sys.argv[1]).resolve()


def stand_in(name, **contents):
    module = types.ModuleType(name)
    module.__path__ = []
    vars(module).update(contents)
    sys.modules[name] = module


def load(name, file):
    spec = importlib.util.spec_from_file_location(name, ROOT / file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def functions(file, *names):
    """Functions of a file that imports too much, on their own."""
    found = {"torch": torch, "ceil": math.ceil}
    for item in ast.parse((ROOT / file).read_text()).body:
        if isinstance(item, ast.FunctionDef) and item.name in names:
            item.decorator_list = []
            exec(compile(ast.Module([item], []), file, "exec"), found)
    return {name: found[name] for name in names}


stand_in("auto_round", envs=types.SimpleNamespace(AR_SEARCH_SCALE_RATIO=None))
sys.modules["auto_round.envs"] = sys.modules["auto_round"].envs
stand_in("auto_round.logger", logger=logging.getLogger())
stand_in("auto_round.data_type")
stand_in("auto_round.data_type.register", register_dtype=lambda name: lambda function: function)
stand_in("auto_round.data_type.gguf", _imatrix_handle_zero=lambda imatrix, *_: imatrix)
stand_in(
    "auto_round.data_type.utils",
    **functions(
        "auto_round/data_type/utils.py", "reshape_pad_tensor_by_group_size", "revert_tensor_by_pad", "round_ste"
    ),
)
stand_in(
    "auto_round.utils",
    get_packing_device=lambda device=None: "cpu",
    **functions("auto_round/utils/common.py", "get_reciprocal"),
)
load("auto_round.utils.bit_packing", "auto_round/utils/bit_packing.py")
rules = load("auto_round.data_type.int", "auto_round/data_type/int.py")
plain = load("qlinear_torch", "auto_round_extension/torch/qlinear_torch.py")
stand_in("auto_round_extension.torch")
sys.modules["auto_round_extension.torch.qlinear_torch"] = plain
minus_one = load("qlinear_torch_zp", "auto_round_extension/torch/qlinear_torch_zp.py")
awq = load("awq_utils", "auto_round/export/export_to_awq/utils.py")

generator = torch.Generator().manual_seed(0)
weight = torch.randn(32, 96, generator=generator) * 0.05
weight[3] = 0
weight[5] *= 1e-5
weight[7] = weight[7].abs()
weight[9, :64] = -weight[9, :64].abs()
tensors = {"weight": weight.contiguous()}
for bits in range(2, 9):
    for size, symmetric in ((32, True), (32, False), (96, False), (64, True)):
        rule = rules.quant_tensor_opt_rtn_sym if symmetric else rules.quant_tensor_asym
        rounded, scale, zero = rule(weight.clone(), bits=bits, group_size=size)
        linear = torch.nn.Linear(96, 32, bias=False)
        linear.weight.data = rounded
        scale = scale.reshape(32, -1)
        zero = zero.reshape(32, -1) if isinstance(zero, torch.Tensor) else zero
        packers = {"auto_round": plain.QuantLinear, "auto_round:auto_gptq": minus_one.QuantLinear}
        if size == 32:
            packers["auto_round:gptqmodel"] = lambda *sizes: plain.QuantLinear(*sizes, g_idx=True)
        for name, packer in packers.items():
            layer = packer(bits, size, 96, 32, False)
            layer.device = "cpu"
            layer.pack(linear, scale, zero, None)
            for own, tensor in layer.state_dict().items():
                tensors[f"{name}-{bits}-{size}-{'sym' if symmetric else 'asym'}.{own}"] = tensor.contiguous()
        if bits in awq.SUPPORTED_AWQ_BITS and 96 % size == 0:
            turned = zero.t().contiguous() if isinstance(zero, torch.Tensor) else zero
            layer = awq.WQLinear_GEMM.from_linear(
                linear, bits, size, scales=scale.t().contiguous().half(), zeros=turned, device="cpu"
            )
            for own, tensor in layer.state_dict().items():
                tensors[f"auto_round:auto_awq-{bits}-{size}-{'sym' if symmetric else 'asym'}.{own}"] = (
                    tensor.contiguous()
                )
save_file(
    tensors,
    Path(__file__).with_name("auto_round.safetensors"),
    {"made_by": f"auto-round 0.16.1, torch {torch.__version__}"},
)
