"""File to file: quantize, look, measure, dequantize. One weight in memory at a time."""

import sys
import tempfile
from pathlib import Path

import anybit
from anybit import GPTQConfig

path = sys.argv[1] if len(sys.argv) > 1 else "examples/tiny-llama"
text = Path("examples/data/evaluation.txt").read_text(encoding="utf-8")
with tempfile.TemporaryDirectory() as folder:
    anybit.quantize(path, f"{folder}/gptq", GPTQConfig(bits=4, group_size=64))
    found = anybit.inspect(f"{folder}/gptq")
    print(f"{found.method}, {found.bits_per_weight:.2f} bits per weight, {found.bytes_on_disk:,} bytes")
    result = anybit.evaluate(f"{folder}/gptq", text, reference=path, max_tokens=512)
    print(f"perplexity {result.perplexity:.2f}, KL divergence {result.kl:.4f} nats per token")
    anybit.dequantize(f"{folder}/gptq", f"{folder}/dense", dtype="bfloat16")
    print(sorted(file.name for file in Path(f"{folder}/dense").iterdir()))
