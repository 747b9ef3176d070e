"""What `recommend` is asked for, and what is known of the hardware: measured where it is here, assumed with a note where not."""

from __future__ import annotations

import functools
import math
import os
import time
from dataclasses import dataclass, field

import torch

from anybit.engine import advice_rules as rules
from anybit.engine import devices
from anybit.engine.memory import RUNTIME_BYTES, available_memory, parse_size
from anybit.engine.outlining import size
from anybit.errors import InvalidOption, did_you_mean

# what stands for a device that torch has no name for
NAMELESS = torch.device("privateuseone")
KNOWN_DEVICES = ("auto", "cpu", "cuda", "mps", "xpu", "xla", "hpu", "mtia")


@dataclass(frozen=True)
class Wishes:
    """`memory`, `bandwidth`: bytes, bytes per second. `here`: whether the device is in this machine. `place`: its name in words.
    `notes`: what was taken for granted.
    """

    memory: int | None
    device: torch.device
    train: bool
    calibration: bool
    batch: int
    context: int
    target: str | None
    bandwidth: float
    here: bool
    path: str
    place: str
    notes: list[str] = field(default_factory=list)

    @property
    def runtime_bytes(self) -> int:
        """What runs beside the model: Python and torch on the CPU, the device's own on another."""
        return RUNTIME_BYTES if self.device.type == "cpu" else rules.DEVICE_RUNTIME_BYTES

    def too_large(self, needed: int) -> str:
        """Why `needed` bytes do not fit, "" if they do."""
        if self.memory is None or needed <= self.memory:
            return ""
        return f"needs {size(needed)}, {size(needed - self.memory)} too much"


def wishes_of(
    path: str | os.PathLike[str],
    memory: str | int | float | None,
    device: str,
    train: bool,
    calibration: bool,
    batch: int,
    context: int | None,
    target: str | None,
) -> Wishes:
    """The wishes, checked; notes begin with what was not asked for."""
    if target is not None and target not in rules.TARGETS:
        raise InvalidOption(
            f"no target {target!r}{did_you_mean(target, rules.TARGETS) or '.'} Targets: {', '.join(rules.TARGETS)}"
        )
    if batch < 1 or (context is not None and context < 1):
        raise InvalidOption(f"batch ({batch}) and context ({context}) must be at least 1")
    usual = rules.DEFAULT_TRAINING_CONTEXT if train else rules.DEFAULT_CONTEXT
    notes = [] if context is not None else [f"context: {usual} positions (--context)"]
    place, name = _place(device, notes)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = place.type == "cpu" or (accelerator is not None and accelerator.type == place.type)
    if memory is not None:
        budget: int | None = parse_size(memory)
    else:
        budget = available_memory(place) if here else None
        notes.append(
            f"memory: the {budget / 1e9:.1f} GB that are free on {name} now (--memory)"
            if budget is not None
            else f"memory: how much {name} has is not known here, so everything fits (--memory)"
        )
    if here:
        speed = measured_bandwidth(str(place))
        notes.append(f"bandwidth of {name}: {speed / 1e9:.0f} GB/s, measured now")
    else:
        speed = rules.ASSUMED_BANDWIDTH.get(place.type, rules.UNKNOWN_BANDWIDTH)
        known = "a mid-range device" if place.type in rules.ASSUMED_BANDWIDTH else "an unknown kind of device"
        notes.append(
            f"{name} is not in this machine: {speed / 1e9:.0f} GB/s assumed, as of {known}; kernels by what they accept"
        )
    return Wishes(
        budget, place, train, calibration, batch, context or usual, target, speed, here, str(path), name, notes
    )


def _place(device: str, notes: list[str]) -> tuple[torch.device, str]:
    """The device and its name; one that torch has no name for is an unknown one, unless it looks like a slip."""
    try:
        found = devices.main_device(device)
    except InvalidOption as error:
        kind = str(device).partition(":")[0]
        near = did_you_mean(kind, KNOWN_DEVICES)
        if near or not kind.isidentifier():
            raise InvalidOption(f"no device {device!r}{near or '.'} Known: {', '.join(KNOWN_DEVICES)}") from error
        notes.append(f"torch has no device {device!r} here: taken for one that no kernel of its own runs on")
        return NAMELESS, str(device)
    return found, str(found)


@functools.lru_cache(maxsize=8)
def measured_bandwidth(device: str) -> float:
    """Bytes per second that a copy of 64 MiB reads and writes: the best of five, about a tenth of a second."""
    place = torch.device(device)
    source = torch.ones(16 << 20, dtype=torch.float32, device=place)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(5):
        begin = time.perf_counter()
        target.copy_(source)
        if place.type != "cpu":
            torch.accelerator.synchronize(place)
        best = min(best, time.perf_counter() - begin)
    return 2 * source.numel() * 4 / best
