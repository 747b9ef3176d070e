"""The LoRA adapter that starts from what quantization lost, for a base of any method; how LoftQ's base is made: `lora_start`.

B A is the best product of rank r for W - Q, so that Q + B A is close to W, where a plain adapter starts from Q. It is PEFT's, in
the folder `loftq_init` of the base, as LoftQ's own checkpoints have it:

    PeftModel.from_pretrained(model, "base", subfolder="loftq_init", is_trainable=True)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybit.algorithms._low_rank import factors
from anybit.containers import Checkpoint
from anybit.containers.atomic import atomic_folder
from anybit.containers.writer import SafetensorsWriter
from anybit.engine.adapter import CONFIG, PREFIX, WEIGHTS
from anybit.engine.load import Prepared, Progress, prepare
from anybit.engine.lora_start import RANK, adapts, check_rank
from anybit.engine.materialize import dense_part, make_weight
from anybit.engine.plan import Entry
from anybit.errors import ConfigError

FOLDER = "loftq_init"
UNRELATED = 0.9  # relative error of a weight that is no rounding of the dense one; one bit makes about 0.6
Through = Callable[[Checkpoint, Any], Checkpoint]


@dataclass(frozen=True)
class Share:
    """Of one weight W: the relative error of its base |W - Q| / |W|, and of the base with its adapter."""

    name: str
    base: float
    adapted: float


@dataclass
class Adapter:
    """What was written. `modules`: in the model's order."""

    path: Path
    rank: int
    modules: list[Share] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"path": str(self.path), "rank": self.rank, "modules": [vars(own) for own in self.modules]}


def lora_init(
    base: str | os.PathLike[str],
    dense: str | os.PathLike[str],
    dst: str | os.PathLike[str] | None = None,
    *,
    rank: int = RANK,
    targets: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    force: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    hub_options: Mapping[str, Any] | None = None,
    through: Through | None = None,
) -> Adapter:
    """Write the adapter that makes up best for what the quantized checkpoint `base` lost of the checkpoint `dense`.

    For a base of any method; one weight is in memory at a time. `dst`: a folder (default: `loftq_init` in the base's). `rank`:
    of every adapter. `targets`: endings of the names of layers (default: all quantized linear ones). `through`: how the dense
    checkpoint is seen, e.g. rotated. Raises ConfigError where base and dense weights are not one model, InvalidOption for a
    rank that is too large, FileExistsError without `force`.
    """
    folder = Path(base)
    target = Path(dst) if dst is not None else (folder if folder.is_dir() else folder.parent) / FOLDER
    options: dict[str, Any] = {"allow_pickle": allow_pickle, "hub_options": hub_options}
    made = prepare(base, device_map=device, **options)
    stored = prepare(dense, through=through, **options)
    if made.quantizer is None or stored.quantizer is not None:
        raise ConfigError(f"lora_init compares a quantized base with its dense source; got {base} and {dense}")
    originals = {entry.slot.module: entry for entry in stored.plan.entries}
    chosen = [entry for entry in made.plan.entries if adapts(entry, targets)]
    if not chosen:
        raise ConfigError(f"{base} has no quantized linear layer that is called {', '.join(targets or ['anything'])}")
    report = Adapter(target, rank)
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for entry in chosen:
        check_rank(entry, rank)
        out, columns = entry.slot.shape
        key = f"{PREFIX}{entry.slot.module}"
        specs |= {
            f"{key}.lora_A.weight": ("float32", (rank, columns)),
            f"{key}.lora_B.weight": ("float32", (out, rank)),
        }
    with atomic_folder(target, force=force) as inside:
        with SafetensorsWriter(inside, specs, metadata={"format": "pt"}, files=dict.fromkeys(specs, WEIGHTS)) as writer:
            for number, entry in enumerate(chosen):
                up, down, share = _fitted(made, entry, stored, originals.get(entry.slot.module), rank, device)
                key = f"{PREFIX}{entry.slot.module}"
                writer.write(f"{key}.lora_A.weight", down)
                writer.write(f"{key}.lora_B.weight", up)
                report.modules.append(share)
                made.checkpoint.release()
                stored.checkpoint.release()
                if progress is not None:
                    progress(entry.slot.module, number + 1, len(chosen))
        text = json.dumps(_config(chosen, made.plan.entries, rank, str(folder)), indent=2, sort_keys=True) + "\n"
        (inside / CONFIG).write_text(text, encoding="utf-8")
    return report


def _fitted(
    made: Prepared, entry: Entry, stored: Prepared, original: Entry | None, rank: int, device: torch.device | str
) -> tuple[Tensor, Tensor, Share]:
    name = entry.slot.module
    if original is None or original.slot.shape != entry.slot.shape:
        shape = None if original is None else original.slot.shape
        raise ConfigError(
            f"{name} of the base is {entry.slot.shape}, of {stored.folder} it is {shape or 'missing'}: another model"
        )
    (part,), (source,) = entry.parts, original.parts
    wanted = dense_part(stored.model, original, source, stored.checkpoint).to(device, torch.float32)
    values = make_weight(made.model, entry, part, made.checkpoint, device).to_dense(torch.float32)
    fold = made.quantizer.folds.get(entry.slot.parameter) if made.quantizer is not None else None
    if fold is not None:  # what happens to its input at run time does not happen to the adapter's
        values = fold(values)
    lost = wanted - values
    length = float(wanted.norm())
    error = float(lost.norm()) / max(length, 1e-30)
    if error > UNRELATED:
        raise ConfigError(
            f"{name}: the base differs from {stored.folder} by {error:.2f} of the weight, which is no rounding of it. Scales "
            "folded into norms (awq, smoothquant) and rotations change weights; name the dense weights that the base was made of"
        )
    up, down = factors(lost, rank)
    return up.cpu(), down.cpu(), Share(name, error, float((lost - up @ down).norm()) / max(length, 1e-30))


def _config(chosen: Sequence[Entry], entries: Iterable[Entry], rank: int, base: str) -> dict[str, Any]:
    """PEFT's configuration. Layers are named by the ends of their paths where that says the same."""
    names = {entry.slot.module for entry in chosen}
    endings = {name.rpartition(".")[2] for name in names}
    linear = {entry.slot.module for entry in entries if entry.slot.kind in ("linear", "conv1d")}
    alike = {name for name in linear if name.rpartition(".")[2] in endings} == names
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False,
        "target_modules": sorted(endings if alike else names), "init_lora_weights": True, "modules_to_save": None,
        "fan_in_fan_out": any(entry.slot.kind == "conv1d" for entry in chosen), "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
