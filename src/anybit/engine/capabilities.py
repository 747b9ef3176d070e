"""What this installation can do, and what a loaded model does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from anybit.errors import ConfigError
from anybit.quantizers import registry

if TYPE_CHECKING:
    from anybit.engine.plan import Plan


@dataclass(frozen=True)
class MethodInfo:
    """One registered method. `loads`: its tensors are read; `calibration`: it cannot be made from weights alone."""

    name: str
    config: str
    quantizer: str
    loads: bool
    calibration: bool
    trains: bool
    summary: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class KernelInfo:
    """One kernel; `unavailable` says why it does not run on this machine, None if it does."""

    name: str
    description: str
    unavailable: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def methods() -> list[MethodInfo]:
    """Every registered method, by name. Needs no torch."""
    import sys

    found = []
    for name in registry.method_names():
        quantizer = registry.quantizer_class(name)
        config = registry.config_class(name)
        summary = (sys.modules[quantizer.__module__].__doc__ or "").strip().split("\n")[0]
        found.append(
            MethodInfo(
                name, config.__name__ if config else "", quantizer.__name__, quantizer.layouts_available,
                quantizer.requires_calibration, bool(quantizer.layouts_available and quantizer.is_trainable), summary,
            )
        )  # fmt: skip
    return found


def kernels() -> list[KernelInfo]:
    """Every kernel, the preferred ones first."""
    from anybit.kernels import available

    return [KernelInfo(kernel.name, kernel.description, why_not) for kernel, why_not in available()]


def explain(model: Any) -> Plan:
    """The plan a loaded model follows, with the kernels and devices its layers have now."""
    from anybit.modules import PackedWeight

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
