"""What a loaded model does, layer by layer."""

from __future__ import annotations

from typing import Any

from anybit.engine.plan import Plan
from anybit.errors import ConfigError
from anybit.modules import PackedWeight


def explain(model: Any) -> Plan:
    """The plan a loaded model follows, with the kernels and devices its layers have now."""
    plan: Plan | None = getattr(model, "anybit_plan", None)
    if plan is None:
        raise ConfigError(
            f"this {type(model).__name__} was not loaded by anybit; anybit.load or anybit.AutoModel* makes a plan"
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}
    for entry in plan.entries:
        layer = layers.get(entry.slot.module)
        if layer is not None:
            entry.kernel = layer.kernel.name
            if layer.packed[0].device.type != "meta":
                entry.device = str(layer.packed[0].device)
    return plan
