"""Train a LoRA adapter on a model that stays packed."""

import sys

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

from anybit import AutoModelForCausalLM, BitsAndBytesConfig

path = sys.argv[1] if len(sys.argv) > 1 else "examples/tiny-llama"
model = AutoModelForCausalLM.from_pretrained(
    path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), dtype=torch.float32
)
model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "gate_proj"], task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW([tensor for tensor in model.parameters() if tensor.requires_grad], lr=5e-3)
tokens = torch.arange(2 * 32).view(2, 32) % 97
losses = []
for _ in range(8):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0]
