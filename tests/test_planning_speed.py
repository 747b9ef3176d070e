"""Planning reads headers alone, once: 20,000 quantized modules take seconds of one core, and twice as many twice as long."""

import json
import math
import struct
import time
from pathlib import Path
from typing import Any

import pytest

import anybit

WIDTH, EXPERTS = 64, 104
BYTES = {"I32": 4, "BF16": 2, "I64": 8}
SECONDS = 1.5  # what 20,000 modules may take; 1.2 on a quiet core
SLACK = 3  # of machines that are slow or busy

CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": WIDTH, "intermediate_size": WIDTH,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
    "vocab_size": WIDTH, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
            }
        },
    },
}  # fmt: skip


def tensors_of(layers: int) -> dict[str, tuple[str, list[int]]]:
    """Stored name -> (dtype, shape) of a Mixtral whose linear layers are packed, all but the routers'."""
    found: dict[str, tuple[str, list[int]]] = {
        "model.embed_tokens.weight": ("BF16", [WIDTH, WIDTH]),
        "lm_head.weight": ("BF16", [WIDTH, WIDTH]),
        "model.norm.weight": ("BF16", [WIDTH]),
    }
    for layer in (f"model.layers.{number}" for number in range(layers)):
        found[f"{layer}.input_layernorm.weight"] = found[f"{layer}.post_attention_layernorm.weight"] = "BF16", [WIDTH]
        found[f"{layer}.block_sparse_moe.gate.weight"] = "BF16", [EXPERTS, WIDTH]
        modules = [f"{layer}.self_attn.{own}_proj" for own in "qkvo"]
        for expert in range(EXPERTS):
            modules += [f"{layer}.block_sparse_moe.experts.{expert}.{own}" for own in ("w1", "w2", "w3")]
        for module in modules:
            found[f"{module}.weight_packed"] = "I32", [WIDTH, WIDTH // 8]
            found[f"{module}.weight_scale"] = "BF16", [WIDTH, WIDTH // 32]
            found[f"{module}.weight_shape"] = "I64", [2]
    return found


def generated(folder: Path, layers: int) -> Path:
    """A checkpoint whose header is whole and whose data is a hole in the file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    header, end = {}, 0
    for name, (dtype, shape) in tensors_of(layers).items():
        begin, end = end, end + BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


def seconds(folder: Path) -> float:
    """CPU time of one plan: what else the machine does counts little."""
    begin = time.process_time()
    anybit.plan(folder)
    return time.process_time() - begin


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("generated")
    made = {layers: generated(root / str(layers), layers) for layers in (1, 16, 64)}
    anybit.plan(made[1])  # imports are not planning
    return made


def test_a_generated_checkpoint_plans_packed(folders: dict[int, Path]) -> None:
    plan = anybit.plan(folders[64])
    packed = [part for entry in plan.entries if entry.action == "packed" for part in entry.parts]
    assert len(packed) == 64 * (4 + 3 * EXPERTS) > 20_000
    assert {type(part.layout).__name__ for part in packed} == {"PackedLayout"}
    assert not plan.ignored
    assert not plan.missing
    assert (folders[64] / "model.safetensors").stat().st_blocks * 512 < 64 << 20  # nothing but the header was written


def test_twenty_thousand_modules_plan_in_seconds(folders: dict[int, Path]) -> None:
    assert min(seconds(folders[64]) for _ in range(2)) < SECONDS * SLACK


def test_the_time_of_a_plan_is_linear_in_the_modules(folders: dict[int, Path]) -> None:
    """Four times the modules: four times as long, where comparing each with each would take sixteen times."""
    few, many = (min(seconds(folders[layers]) for _ in range(2)) for layers in (16, 64))
    assert many < 4 * few * 2
