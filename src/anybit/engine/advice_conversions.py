"""What a quantized checkpoint can become without choosing codes anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from anybit.engine.convert import EXACT, RESCALED, kept
from anybit.engine.load import Prepared
from anybit.engine.materialize import make_weight
from anybit.engine.plan import Entry, module_info
from anybit.errors import AnybitError
from anybit.quantizers.auto import AutoHfQuantizer
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.named import schemes


def conversions(ready: Prepared, target: str | None = None) -> tuple[tuple[str, str], ...]:
    """(scheme, "exact" or "rescaled") for every named scheme that can hold the codes of this checkpoint, and that
    the program `target` reads.

    Tried on the smallest weight of each kind of layout; `convert` looks at all of them.
    """
    samples: dict[Any, tuple[Entry, Any]] = {}
    for entry in ready.plan.entries:
        if entry.action != "packed":
            continue
        part = entry.parts[0]
        kind = replace(part.layout, shape=()) if part.layout is not None else None
        if kind not in samples or entry.weights < samples[kind][0].weights:
            samples[kind] = (entry, part)
    weights = [
        (entry, part, make_weight(ready.model, entry, part, ready.checkpoint)) for entry, part in samples.values()
    ]
    found = []
    for name, (cls, options) in schemes().items():
        if not weights or cls.method == ready.quantizer.quantization_config.method:  # type: ignore[union-attr]
            continue
        config = cls(**options)
        if target is None or target in config.served_by():
            kinds = {_conversion(ready, config, *sample) for sample in weights}
            if None not in kinds:
                found.append((name, RESCALED if RESCALED in kinds else EXACT))
    return tuple(sorted(found, key=lambda item: (item[1], item[0])))


def _conversion(ready: Prepared, config: QuantizationConfigMixin, entry: Entry, part: Any, weight: Any) -> str | None:
    try:
        target = AutoHfQuantizer.from_config(config, pre_quantized=False)
        target.begin(ready.model, list(ready.names.slots.values()))
        layout = target.layout_for(module_info(entry.slot, part, entry.parts, ready.plan.dtype))
        if layout is None:
            return None
        return kept(weight, weight.to_dense(torch.float32), part.prefix, layout)[1].kind
    except AnybitError:
        return None
