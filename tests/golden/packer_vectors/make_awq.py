"""What AutoAWQ and gptqmodel make of a small weight: AutoAWQ's quantizer, and each one's own packers.

    python3 -m venv venv && venv/bin/pip install torch==2.13.0
    echo torch==2.13.0 > constraints.txt && venv/bin/pip install -c constraints.txt gptqmodel==7.6.0
    venv/bin/pip install --no-deps --target autoawq autoawq==0.2.9
    venv/bin/pip download --no-deps auto-round==0.16.1 && venv/bin/python -m zipfile -e auto_round-*.whl autoround
    GPTQMODEL_CPU_WORKERS=2 TORCH_COMPILE_DISABLE=1 venv/bin/python make_awq.py autoawq autoround

AutoAWQ does not import beside transformers 5, so that only the files with quantizer and packers are loaded, the rest of the
package replaced by empty modules. Writes awq.safetensors: weight, and <case>.<tensor>; the cases are in its metadata.
auto-round's packer for 5 to 7 bits gets codes [in, out]: auto_round-<bits>.codes, .qweight.
"""

import importlib
import importlib.util
import json
import sys
import types
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(sys.argv[1]).resolve()
sys.path.insert(0, str(ROOT))


def stand_in(name, **contents):
    module = types.ModuleType(name)
    module.__path__ = [str(ROOT / name.replace(".", "/"))]
    module.__dict__.update(contents)
    sys.modules[name] = module
    return module


for package in ("awq", "awq.modules", "awq.quantize", "awq.modules.triton"):
    stand_in(package)
linears = stand_in("awq.modules.linear", WQLinear_Marlin=None)
stand_in("awq.modules.triton.gemm", awq_gemm_triton=None, awq_dequantize_triton=None)
stand_in("awq.quantize.scale", apply_scale=None, apply_clip=None)
stand_in("awq.utils.calib_data", get_calib_dataset=None)
PACKERS = {}
for file, name in (("gemm", "WQLinear_GEMM"), ("gemv", "WQLinear_GEMV"), ("gemv_fast", "WQLinear_GEMVFast")):
    PACKERS[file] = getattr(importlib.import_module(f"awq.modules.linear.{file}"), name)
    setattr(linears, name, PACKERS[file])
AwqQuantizer = importlib.import_module("awq.quantize.quantizer").AwqQuantizer

from gptqmodel.nn_modules.qlinear.gemv_awq import AwqGEMVLinear  # noqa: E402
from gptqmodel.nn_modules.qlinear.gemv_fast_awq import AwqGEMVFastLinear, LLMAwqLinear  # noqa: E402
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear  # noqa: E402

OTHER_PACKERS = {
    "gemm": AwqTorchLinear, "gemv": AwqGEMVLinear, "gemv_fast": AwqGEMVFastLinear, "llm-awq": LLMAwqLinear
}  # fmt: skip


def awkward(rows, columns):
    """Normal numbers, with blocks that are empty, of one sign, constant, tiny or full of ties."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[0] = 0
    weight[1] = weight[1].abs() + 0.01
    weight[2] = -weight[2].abs() - 0.01
    weight[3], weight[4] = 0.25, -0.25
    weight[5, :8] = 1e-6 * torch.arange(8)
    weight[6] = torch.arange(columns) % 16 - 7.5
    weight[7, ::7] *= 40
    return weight.to(torch.bfloat16)


WEIGHT = awkward(64, 128)
CASES = [("autoawq", form, 4, group_size, True) for form in PACKERS for group_size in (32, 64, 128)]
CASES += [("gptqmodel", "gemm", bits, 32, zero_point) for bits in range(2, 9) for zero_point in (True, False)]
CASES += [("gptqmodel", form, 4, 64, zero_point) for form in ("gemv", "gemv_fast", "llm-awq") for zero_point in (True, False)]

tensors, cases = {"weight": WEIGHT}, {}
for packer, form, bits, group_size, zero_point in CASES:
    rows, columns = WEIGHT.shape
    linear = torch.nn.Linear(columns, rows, bias=False).half()
    quantizer = types.SimpleNamespace(w_bit=bits, group_size=group_size, zero_point=zero_point)
    linear.weight.data, scales, zeros = AwqQuantizer.pseudo_quantize_tensor(quantizer, WEIGHT.half())
    zeros = torch.full_like(scales, 1 << (bits - 1)) if zeros is None else zeros  # as gptqmodel does with sym
    if packer == "autoawq":
        arguments = (scales.t().contiguous(), zeros.t().contiguous()) if form == "gemm" else (scales, zeros)
        packed = PACKERS[form].from_linear(linear, bits, group_size, False, *arguments)
    else:
        packed = OTHER_PACKERS[form](
            bits=bits, group_size=group_size, sym=not zero_point, desc_act=False, in_features=columns, out_features=rows,
            **({"pack_dtype": torch.int16} if form in ("gemv_fast", "llm-awq") else {"pack_dtype": torch.int32}),
        )  # fmt: skip
        packed.pack(linear, scales, zeros)
    name = f"{packer}-{form}-{bits}bit-g{group_size}-{'zp' if zero_point else 'sym'}"
    cases[name] = {"format": form, "bits": bits, "group_size": group_size, "zero_point": zero_point}
    for part in ("qweight", "qzeros", "scaled_zeros", "scales"):
        if getattr(packed, part, None) is not None:
            tensors[f"{name}.{part}"] = getattr(packed, part).contiguous()

spec = importlib.util.spec_from_file_location("bit_packing", Path(sys.argv[2]) / "auto_round/utils/bit_packing.py")
bit_packing = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bit_packing)
for bits in (5, 6, 7):
    codes = torch.randint(0, 1 << bits, (64, 32), generator=torch.Generator().manual_seed(bits), dtype=torch.int32)
    tensors[f"auto_round-{bits}.codes"] = codes.to(torch.uint8)
    tensors[f"auto_round-{bits}.qweight"] = bit_packing.pack_awq_bitstream(codes, bits, dim=1).contiguous()

made_by = f"AutoAWQ 0.2.9, auto-round 0.16.1, gptqmodel {version('gptqmodel')}, torch {torch.__version__}"
save_file(tensors, Path(__file__).with_name("awq.safetensors"), {"cases": json.dumps(cases), "made_by": made_by})
print(len(cases), "cases")
