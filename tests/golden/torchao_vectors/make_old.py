"""Writes ../torchao/tiny-old-*: models that transformers 4 pickled.

Made on the CPU with: pip install torch==2.13.0 torchao==0.14.1 transformers==4.57.6 accelerate==1.10.0
"""

import shutil
import tempfile
import warnings

import torch
from tiny import GOLDEN, dense_model, finish
from torchao.quantization import Float8WeightOnlyConfig, Int8DynamicActivationInt4WeightConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

warnings.filterwarnings("ignore")
PEER = "torchao 0.14.1 + transformers 4.57.6"
OLD = {
    "tiny-old-int8dyn-bf16": (torch.bfloat16, "int8_dynamic_activation_int8_weight"),
    "tiny-old-int8dyn-int4": (torch.float32, Int8DynamicActivationInt4WeightConfig(group_size=32)),
    "tiny-old-float8": (torch.float32, Float8WeightOnlyConfig(version=1)),
}


def main() -> None:
    for name, (dtype, config) in OLD.items():
        folder = GOLDEN / name
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory() as dense:
            dense_model(dense, dtype)
            model = AutoModelForCausalLM.from_pretrained(
                dense, dtype=dtype, device_map="cpu", quantization_config=TorchAoConfig(config)
            )
        model.save_pretrained(folder, safe_serialization=False)
        for layer in model.modules():  # the older classes have no `dequantize` for weights whose inputs are quantized
            weight = getattr(layer, "weight", None)
            if hasattr(weight, "original_weight_tensor"):
                weight.dequantize = weight.original_weight_tensor.dequantize
        finish(
            folder, model, PEER, "tests/golden/torchao_vectors/make_old.py", dtype, activation_quant=True,
            logits_atol=1e-3 if dtype == torch.float32 else 0.5, layer_rtol=2e-6 if dtype == torch.float32 else 1e-2,
            dense_rtol=0.0 if dtype == torch.float32 else 2**-8,
        )  # fmt: skip


if __name__ == "__main__":
    main()
