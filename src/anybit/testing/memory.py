"""Peak memory of a load, measured in a process of its own, on a checkpoint large enough to tell packed from dense."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from anybit.quantizers.checkpoint_config import KEY
from anybit.testing.goldens import Golden, entry_of, prepared, units
from anybit.testing.random_weights import random_weight
from anybit.weight import Layout
from anybit.weight.layout import join_name

if TYPE_CHECKING:
    from torch import Tensor

# a decoder of 190 million weights: 100 MB in four bits, 760 MB in float32
ENLARGED = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 16,
    "head_dim": 128, "moe_intermediate_size": 1408,
}  # fmt: skip

_CHILD = """
import json, sys
import torch, transformers
from transformers import AutoConfig, LlamaForCausalLM
from anybit._memory import peak_resident_bytes
from anybit.engine.load import load
import anybit.engine.save
before = peak_resident_bytes()
model = load(sys.argv[1])
after = peak_resident_bytes()
plan = model.anybit_plan
largest = max(entry.bytes_stored for entry in plan.entries)
print(json.dumps([after - before, plan.bytes_in_memory, largest, plan.coverage]))
"""


@dataclasses.dataclass(frozen=True)
class Enlarged:
    """A checkpoint on disk and what its weights would take in float32."""

    path: Path
    dense_bytes: int


def peak_of_load(path: Path) -> tuple[int, int, int]:
    """(peak bytes of the load itself, bytes of the packed model, stored bytes of its largest weight), in a new process."""
    done = subprocess.run([sys.executable, "-c", _CHILD, str(path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    peak, packed, largest, coverage = json.loads(done.stdout.splitlines()[-1])
    assert coverage > 0.8, f"only {coverage:.0%} of the weights are packed"
    return peak, packed, largest


def enlarge(layout: Layout, shape: tuple[int, ...], extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Random stored tensors of the layout for a weight of another shape."""
    larger = dataclasses.replace(layout, shape=shape)
    return larger.encode(random_weight(larger.scheme(), extras=extras))


def enlarged_checkpoint(
    golden: Golden, folder: Path, sizes: Mapping[str, int] = ENLARGED, stored_as: Any = enlarge
) -> Enlarged:
    """The golden's model with other sizes and random contents. Every layer is stored as the golden's first is.

    `stored_as(layout, shape, extras)` makes the stored tensors of a weight.
    """
    from anybit.engine import skeleton

    small = prepared(golden)
    config = small.stored_config()
    assert config is not None and small.quantizer is not None
    if small.bundle is not None:  # written as an ordinary checkpoint
        config[KEY] = small.quantizer.quantization_config.to_dict()
    config.update({name: value for name, value in sizes.items() if name in config or name == "head_dim"})
    for name in ("layer_types", "no_rope_layers", "moe_layers"):  # lists with an entry for each layer
        config.pop(name, None)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file in golden.path.glob("*.json"):
        if file.name not in ("config.json", "fixture.json") and not file.name.endswith(".index.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    model = skeleton.build(skeleton.read_config(folder), dtype=small.plan.dtype)
    found = skeleton.slots(model)
    example = {unit.name: unit for unit in units(golden)}
    made: dict[tuple[Layout, tuple[int, ...]], dict[str, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    layouts: dict[str, Layout] = {}
    for key, empty in model.state_dict().items():
        slot = found.get(key)
        entry = entry_of(small, re.sub(r"\.\d+\.", ".0.", slot.module)) if slot is not None else None
        if entry is None or entry.action != "packed" or slot is None:
            tensors[key] = torch.full(tuple(empty.shape), 0.01, dtype=empty.dtype)
            continue
        unit = example[entry.parts[0].prefix]
        if (unit.layout, slot.shape) not in made:
            made[unit.layout, slot.shape] = stored_as(unit.layout, slot.shape, unit.layout.decode(unit.tensors).extras)
        layouts[slot.module] = dataclasses.replace(unit.layout, shape=slot.shape)
        for name, tensor in made[unit.layout, slot.shape].items():
            tensors[join_name(slot.module, name)] = tensor.clone()
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for source in tied:
        tensors.pop(source, None)
    assert small.quantizer is not None
    metadata = small.quantizer.file_metadata(layouts, list(tensors))
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    return Enlarged(folder, sum(4 * math.prod(slot.shape) for slot in found.values()))
