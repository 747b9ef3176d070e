"""What a checkpoint would become in a configuration, from headers: a plan for each, whether its architecture is known or not."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from anybit.containers import Checkpoint
from anybit.engine.load import Prepared, prepare
from anybit.engine.memory import shape_of
from anybit.engine.plan import Entry, Plan, build_plan, module_info
from anybit.errors import NotRepresentable
from anybit.quantizers.auto import AutoHfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin

DENSE = "dense"


class Known:
    """Plans of a dense checkpoint whose model class is known. The model and its names are made once."""

    def __init__(self, ready: Prepared):
        self.ready = ready
        self.shape = shape_of(ready.model.config)
        self.dense = ready.plan

    def plan(self, config: QuantizationConfigMixin, device: torch.device, calibrated: bool = False) -> Plan:
        """What the model becomes. CalibrationNeeded where only data tells what is to be stored, unless `calibrated`."""
        ready = self.ready
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        quantizer.validate_environment(device_map=None, weights_only=True)
        if quantizer.update_dtype(ready.plan.dtype) != ready.plan.dtype:
            return prepare(ready.checkpoint.path, config, calibrated=calibrated).plan
        quantizer.calibrated = calibrated
        quantizer.begin(ready.model, list(ready.names.slots.values()))
        return build_plan(
            ready.checkpoint,
            ready.model,
            ready.names.slots,
            ready.names,
            quantizer,
            ready.plan.dtype,
            device,
            True,
            calibrated,
        )


class Unknown:
    """Plans of a checkpoint without a known model class: each matrix but embeddings and output counts as a linear layer."""

    def __init__(self, path: Any, error: ValueError, notes: list[str], hub_options: Mapping[str, Any] | None):
        from transformers import PretrainedConfig

        from anybit.engine.names import WHOLE
        from anybit.engine.plan import PlannedPart
        from anybit.engine.skeleton import Slot
        from anybit.engine.source import locate, read_quantizer
        from anybit.quantizers.checkpoint_config import model_config_of

        location = locate(path, **(hub_options or {}))
        if read_quantizer(location) is not None:
            raise error
        with Checkpoint.open(location) as checkpoint:
            tensors = dict(checkpoint.tensors)
        floats = {name: info for name, info in tensors.items() if info.dtype in ("float16", "bfloat16", "float32")}
        weights = {
            name: info
            for name, info in floats.items()
            if name.endswith(".weight")
            and len(info.shape) == 2
            and not any(word in name for word in ("embed", "head", "wte", "wpe"))
        }
        if not weights:
            raise error
        self.config = PretrainedConfig.from_dict({**model_config_of(location)})
        self.shape = shape_of(self.config)
        dtype = getattr(torch, next(iter(weights.values())).dtype)
        entries = [
            Entry(
                Slot(name, name.removesuffix(".weight"), "linear", tuple(info.shape), "Linear", False),
                [PlannedPart(name.removesuffix(".weight"), WHOLE, {"weight": info}, None)], DENSE, bytes_memory=info.nbytes,
            )
            for name, info in weights.items()
        ]  # fmt: skip
        plain = {name: [info] for name, info in tensors.items() if name not in weights}
        sizes = {name: infos[0].nbytes for name, infos in plain.items()}
        self.dense = Plan(str(location), None, entries, plain, {}, {}, dtype, plain_bytes=sizes)
        notes.append(
            f"the architecture is unknown here ({str(error).splitlines()[0]}): each of {len(weights)} matrices but embeddings "
            "and output counts as a linear layer"
        )

    def plan(self, config: QuantizationConfigMixin, device: torch.device, calibrated: bool = False) -> Plan:
        """The same; what only data tells is not asked for."""
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        quantizer.validate_environment(device_map=None, weights_only=True)
        model = nn.Module()
        model.config = self.config
        try:
            quantizer.begin(model, [entry.slot for entry in self.dense.entries])
        except AttributeError as error:
            raise NotRepresentable(f"it asks the model's class, which is unknown ({error})") from error
        entries = []
        for entry in self.dense.entries:
            made = replace(entry)
            info = module_info(entry.slot, entry.parts[0], entry.parts, self.dense.dtype)
            layout = quantizer.layout_for(info)
            if layout is not None:
                made.parts, made.action = [replace(entry.parts[0], layout=layout)], "quantize"
                made.bytes_memory, made.kernel = layout_bytes(layout), "unknown"
            entries.append(made)
        return replace(self.dense, method=quantizer.method_name, entries=entries)


def bytes_written(plan: Plan) -> int:
    """Of all tensors in the files that `quantize` makes by this plan."""
    packed = sum(layout_bytes(part.layout) for entry in plan.entries for part in entry.parts if part.layout is not None)
    dense = {
        info.name: info.nbytes
        for entry in plan.entries
        for part in entry.parts
        if part.layout is None
        for info in part.stored.values()
    }
    dense.update({info.name: info.nbytes for infos in plan.plain.values() for info in infos})
    return packed + sum(dense.values())


@functools.lru_cache(maxsize=4096)
def layout_bytes(layout: Any) -> int:
    """Of the stored tensors of a layout."""
    return sum(math.prod(shape) * getattr(torch, dtype).itemsize for dtype, shape in layout.specs().values())
