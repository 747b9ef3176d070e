"""LLM.int8 with a threshold for outlier activations and a layer that stays dense."""

import sys

from anybit import AutoModelForCausalLM, BitsAndBytesConfig

path = sys.argv[1] if len(sys.argv) > 1 else "examples/tiny-llama"
config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0, llm_int8_skip_modules=["lm_head"])
model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
print(model.model.layers[0].self_attn.q_proj)
dense = model.model.layers[0].self_attn.q_proj.dequantize()
print(f"dense weight: {tuple(dense.shape)}, {dense.dtype}")
