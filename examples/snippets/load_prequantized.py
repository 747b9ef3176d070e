"""A checkpoint that is already quantized brings its configuration along; nothing has to be passed."""

import sys

import torch

from anybit import AutoModelForCausalLM
from anybit.quantizers import AutoQuantizationConfig

for path in sys.argv[1:] or ["tests/golden/gptq/w4_g128_sym", "tests/golden/awq/w4_g128_zp_gemm"]:
    print(AutoQuantizationConfig.from_pretrained(path).quant_method.value)
    model = AutoModelForCausalLM.from_pretrained(path, device_map="cpu")
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits
    print(f"  {model.anybit_plan.coverage:.0%} of the weights packed, logits {tuple(logits.shape)}")
