"""What `recommend` predicts against what the system counts, for three families: gated, mixture of experts, tied and windowed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3MoeConfig

import anybit
from anybit.containers import Checkpoint
from anybit.engine.recommend import recommend
from anybit.quantizers.named import from_scheme

BATCH, CONTEXT = 8, 512
PEAK_SCHEME = "gptq-4bit-g64"
COMMON = {
    "hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "vocab_size": 16384, "max_position_embeddings": 1024,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(intermediate_size=1536, **COMMON),
    "moe": Qwen3MoeConfig(
        moe_intermediate_size=256, intermediate_size=1024, num_experts=16, num_experts_per_tok=4, **COMMON
    ),
    "gemma": Gemma3TextConfig(intermediate_size=1536, sliding_window=256, tie_word_embeddings=True, **COMMON),
}
CHILD = """
import sys, torch, anybit
from anybit._memory import peak_resident_bytes
from anybit.quantizers.named import from_scheme
model = anybit.load(sys.argv[1], from_scheme(sys.argv[2]))
batch, context = map(int, sys.argv[3:])
with torch.no_grad():
    model.generate(torch.ones(batch, context - 2, dtype=torch.int64), max_new_tokens=2, pad_token_id=0)
print(peak_resident_bytes())
"""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A folder with a model of random weights, and what is predicted of it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(FAMILIES[request.param], dtype=torch.bfloat16).save_pretrained(folder)
    found = recommend(folder, device="cpu", batch=BATCH, context=CONTEXT, memory="20GB")
    return folder, {one.scheme: one for one in found.candidates}


@pytest.mark.parametrize("scheme", [PEAK_SCHEME, "ct-fp8-dynamic", "mlx-4bit-g64"])
def test_bytes_of_files_are_exact(family, scheme, tmp_path):
    folder, predicted = family
    anybit.quantize(folder, tmp_path / "out", from_scheme(scheme))
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        written = sum(info.nbytes for info in checkpoint.tensors.values())
    assert predicted[scheme].bytes_written == written < predicted["dense"].bytes_written


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_peak_is_predicted_to_ten_percent(family):
    """In a process of its own that packs the model while it loads, and generates."""
    folder, predicted = family
    command = [sys.executable, "-c", CHILD, str(folder), PEAK_SCHEME, str(BATCH), str(CONTEXT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = int(done.stdout.splitlines()[-1])
    one = predicted[PEAK_SCHEME]
    assert one.bytes_needed == pytest.approx(measured, rel=0.1)
    beside = one.cache_bytes + one.activation_bytes
    assert beside > 0.2 * measured, "the part that is predicted by forms must weigh something"
