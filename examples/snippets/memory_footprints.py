"""The same model in several forms, and what each weighs in memory."""

import sys

import torch

from anybit import AutoModelForCausalLM, AwqConfig, BitsAndBytesConfig, GPTQConfig

path = sys.argv[1] if len(sys.argv) > 1 else "examples/tiny-llama"
configs = {
    "bfloat16": None,
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4, nested scales": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "gptq 4 bit": GPTQConfig(bits=4, group_size=64),
    "awq 4 bit": AwqConfig(bits=4, group_size=64),
}
sizes = {}
for name, config in configs.items():
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16)
    sizes[name] = model.get_memory_footprint()
    print(f"{name:<20} {sizes[name]:>12,} bytes")
assert sizes["nf4, nested scales"] < sizes["nf4"] < sizes["int8"] < sizes["bfloat16"]
