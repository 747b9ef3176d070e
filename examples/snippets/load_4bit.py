"""NF4 with double quantization and bfloat16 compute: quantize while loading, generate, save, load again."""

import sys
import tempfile

import torch
from transformers import AutoTokenizer

from anybit import AutoModelForCausalLM, BitsAndBytesConfig

path = sys.argv[1] if len(sys.argv) > 1 else "examples/tiny-llama"
config = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
)
model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(path)
inputs = tokenizer("The history of the", return_tensors="pt").to(model.device)
tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(f"{folder}/nf4")
    again = AutoModelForCausalLM.from_pretrained(f"{folder}/nf4")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    print(f"saved and loaded again: {again.get_memory_footprint():,} bytes")
