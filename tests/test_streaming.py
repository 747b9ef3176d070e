"""Quantizing file to file takes the memory of one weight: 8 GB of weights under an address space of 2 GB."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from anybit.containers.writer import SafetensorsWriter
from anybit.engine import skeleton

LIMIT_BYTES = 2 << 30

CHILD = """
import resource, sys, torch
from anybit._memory import peak_resident_bytes
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[3]), int(sys.argv[3])))
import anybit
anybit.{verb}(sys.argv[1], sys.argv[2], {arguments})
print(peak_resident_bytes())
"""


def large_checkpoint(folder: Path, layers: int, hidden: int = 4096) -> int:
    """A Llama of three matrices of 24576 x `hidden` per layer, on disk as holes: headers and sizes are real, every number is zero."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=24576, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    state = skeleton.build(config, LlamaForCausalLM, dtype=None).state_dict()
    writer = SafetensorsWriter(folder, {name: ("bfloat16", tuple(tensor.shape)) for name, tensor in state.items()})
    total = 0
    for shard in writer._shards.values():
        shard._reserve = lambda descriptor, size: None  # type: ignore[method-assign]  # do not fill the disk
        shard.create()
        with open(shard.path, "r+b") as file:
            file.truncate(shard.start + shard.size)
        total += shard.size
    index = {"metadata": {"total_size": total}, "weight_map": writer.file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def run(verb: str, arguments: str, src: Path, dst: Path) -> int:
    """Peak resident bytes of the child."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(verb=verb, arguments=arguments), str(src), str(dst), str(LIMIT_BYTES)],
        capture_output=True, text=True, timeout=1200,
        # what is freed goes back to the system: glibc may otherwise keep a weight or two, by how its heap happens to lie
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_quantize_and_dequantize_in_the_memory_of_one_weight(tmp_path: Path) -> None:
    total = large_checkpoint(tmp_path / "dense", layers=13)
    assert total > 8 << 30
    config = "anybit.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')"
    peak = run("quantize", config, tmp_path / "dense", tmp_path / "nf4")
    assert peak < LIMIT_BYTES
    files = sorted((tmp_path / "nf4").glob("*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    assert total * 0.27 < sum(sizes) < total * 0.30
    with safe_open(files[0], "pt") as opened:
        assert any(name.endswith("weight.absmax") for name in opened.keys())  # noqa: SIM118


def test_the_peak_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = []
    for layers in (1, 3):
        large_checkpoint(tmp_path / f"dense{layers}", layers, hidden=1024)
        config = "anybit.BitsAndBytesConfig(load_in_8bit=True)"
        peaks.append(run("quantize", config, tmp_path / f"dense{layers}", tmp_path / f"int8{layers}"))
    assert peaks[1] < peaks[0] + (16 << 20), peaks
    run("dequantize", "dtype='bfloat16'", tmp_path / "int83", tmp_path / "again")
