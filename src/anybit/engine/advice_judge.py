"""How a candidate is judged: memory, quality, speed, training, who reads it; by the rules in `advice_rules`."""

from __future__ import annotations

import functools
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from anybit.engine import advice_rules as rules
from anybit.engine.advice_plans import DENSE, Known, Unknown, bytes_written, layout_bytes
from anybit.engine.advice_wishes import Wishes
from anybit.engine.memory import Shape, activation_bytes, cache_bytes, training_bytes
from anybit.engine.outlining import size
from anybit.engine.plan import Entry, Plan, refuse_uncalibrated
from anybit.errors import CalibrationNeeded, NoKernel, NotRepresentable
from anybit.kernels import get
from anybit.quantizers import registry
from anybit.quantizers.config import QuantizationConfigMixin
from anybit.quantizers.named import schemes
from anybit.quantizers.summary import MethodInfo
from anybit.quantizers.summary import methods as method_infos

MEASURED = Path(__file__).with_name("_scheme_quality.json")


@dataclass(frozen=True)
class Candidate:
    """One scheme for one model. `obstacle`: why it is no choice here ("" if it is one); `why`: what put it into its place;
    `wished`: whether nothing but memory can be against it.

    `bytes_written`: of all tensors in its files, exact. `bytes_needed`: largest memory in use, run time included.
    `tokens_per_second`: upper bound for one sequence, from memory bandwidth.
    """

    scheme: str
    method: str
    bytes_written: int
    bits_per_weight: float
    coverage: float
    weights_bytes: int
    cache_bytes: int
    activation_bytes: int
    bytes_needed: int
    quality: str
    quality_basis: str
    speed: str
    tokens_per_second: float
    kernels: Mapping[str, int]
    trainable: bool
    calibration: str
    targets: tuple[str, ...]
    command: str
    obstacle: str = ""
    wished: bool = True
    fits: bool = True
    why: str = ""

    @property
    def order(self) -> tuple[Any, ...]:
        """What ranks: quality class, speed class, memory in steps, programs that read it, memory."""
        step = int(math.log(max(self.bytes_needed, 1)) / math.log(rules.MEMORY_STEP))
        return (
            rules.QUALITY_RANK[self.quality], rules.SPEED_RANK[self.speed], step, -len(self.targets), self.bytes_needed,
            self.scheme,
        )  # fmt: skip


class Judge:
    """Candidates of one model under one set of wishes."""

    def __init__(self, wishes: Wishes, source: Known | Unknown):
        self.wishes, self.source = wishes, source
        self.quality: dict[str, dict[str, float]] = json.loads(MEASURED.read_text())
        self.left_out: dict[str, list[str]] = {}  # why -> schemes that cannot be planned
        self.infos = {info.name: info for info in method_infos()}
        wishes.notes.extend(source.shape.notes)
        self.dense_seconds, self.dense_bytes = self.seconds(source.dense), bytes_written(source.dense)

    def candidates(self) -> Iterator[Candidate]:
        """The dense model and every named scheme that can be planned; the others are in `left_out`."""
        yield self.candidate(DENSE, None, self.source.dense)
        device = self.wishes.device if self.wishes.here else torch.device("cpu")
        for name, (cls, options) in schemes().items():
            config = cls(**options)
            try:
                plan, needs_data = self.source.plan(config, device), False
                refuse_uncalibrated(plan)
            except (CalibrationNeeded, NotRepresentable, NoKernel) as error:
                try:
                    plan, needs_data = self.source.plan(config, device, calibrated=True), True
                except (CalibrationNeeded, NotRepresentable, NoKernel):
                    self.left_out.setdefault(_reason(error), []).append(name)
                    continue
            yield self.candidate(name, config, plan, needs_data)

    def candidate(
        self, name: str, config: QuantizationConfigMixin | None, plan: Plan, needs_data: bool = False
    ) -> Candidate:
        wishes, shape = self.wishes, self.source.shape
        cache, activations = beside_weights(shape, plan, wishes)
        needed = wishes.runtime_bytes + max(plan.peak_bytes, plan.bytes_in_memory + cache + activations)
        written = bytes_written(plan)
        packed = [entry for entry in plan.entries if entry.action != DENSE]
        count = max(sum(entry.weights for entry in packed), 1)
        bits = 8 * sum(layout_bytes(part.layout) for entry in packed for part in entry.parts) / count if packed else 0.0
        quality, basis = self.quality_of(name, bits)
        kernels: dict[str, int] = {}
        for entry in packed:
            kernels[entry.kernel] = kernels.get(entry.kernel, 0) + 1
        seconds = self.seconds(plan)
        info = self.info_of(config)
        quantizer = registry.quantizer_class(config.dispatch_key()) if config is not None else None
        calibrated = quantizer is not None and quantizer.calibrated_algorithm is not None
        targets = config.served_by() if config is not None else ("transformers", "vllm")
        made = Candidate(
            name, config.dispatch_key() if config is not None else DENSE, written, bits if packed else 8.0 * plan.dtype.itemsize,
            plan.coverage, plan.bytes_in_memory, cache, activations, needed, quality, basis,
            rules.speed_class(self.dense_seconds / seconds), 1 / seconds, kernels, info is None or info.trains,
            "needed" if needs_data else "helps" if calibrated else "not needed", targets,
            _command(wishes, name, needs_data or (calibrated and wishes.calibration)),
            fits=wishes.memory is None or needed <= wishes.memory,
        )  # fmt: skip
        against = self.against(made, plan, config is None)
        return replace(made, wished=not against, obstacle=against or wishes.too_large(needed))

    def quality_of(self, name: str, bits: float) -> tuple[str, str]:
        if name in self.quality:
            kl, how = self.quality[name]["kl"], "with" if "calibrated" in self.quality[name] else "without"
            return rules.quality_by_kl(kl), f"KL {kl:.2g}, measured on the bundled model {how} calibration"
        return rules.quality_by_bits(bits), f"from {bits:.2f} bits per weight; not measured"

    def info_of(self, config: QuantizationConfigMixin | None) -> MethodInfo | None:
        return self.infos.get(config.dispatch_key()) if config is not None else None

    def seconds(self, plan: Plan) -> float:
        """Of one token of one sequence, bound by memory."""
        read = 0.0
        for entry in plan.entries:
            if entry.slot.kind == "embedding":
                continue
            read += entry.bytes_memory
            if entry.action != DENSE and entry.kernel not in ("", "unknown") and not self.native(entry):
                read += rules.REFERENCE_BYTES_PER_WEIGHT * entry.weights
        return max(read, 1.0) / self.wishes.bandwidth

    def native(self, entry: Entry) -> bool:
        """Whether a kernel of its own runs the weight on the wished device, be it here or not."""
        if self.wishes.here:
            return get(entry.kernel).rank > 0
        layout = entry.parts[0].layout
        return layout is not None and _accepted(layout, self.wishes.device.type)

    def against(self, made: Candidate, plan: Plan, dense: bool) -> str:
        """Why a wish excludes it, whatever memory there is."""
        wishes = self.wishes
        if not dense and plan.coverage == 0:
            return "it quantizes nothing of this model"
        if not dense and made.bytes_written >= self.dense_bytes:
            return "its files are no smaller than the dense ones"
        if made.calibration == "needed" and not wishes.calibration:
            return "it needs calibration data"
        if wishes.target is not None and wishes.target not in made.targets:
            return f"{wishes.target} does not read it"
        if wishes.train and not made.trainable:
            return "gradients do not pass it"
        if wishes.train and dense:
            return "a dense model is not trained on packed weights"
        return ""


def _reason(error: Exception) -> str:
    """Short, and the same for all schemes that are left out for one reason."""
    if isinstance(error, CalibrationNeeded):
        return "it needs calibration data"
    return str(error).splitlines()[0].partition(". ")[0]


@functools.lru_cache(maxsize=1024)
def _accepted(layout: Any, device: str) -> bool:
    from anybit.kernels import available

    scheme = layout.scheme()
    return any(kernel.rank > 0 and kernel.refuses(scheme, torch.device(device)) is None for kernel, _ in available())


def _command(wishes: Wishes, name: str, calibrated: bool) -> str:
    if name == DENSE:
        return f"anybit run {shlex.quote(wishes.path)} -p TEXT"
    output = f"{Path(wishes.path.rstrip('/')).name}-{name}"
    calib = " --calib TEXT_FILE" if calibrated else ""
    return f"anybit quantize {shlex.quote(wishes.path)} -o {shlex.quote(output)} --scheme {name}{calib}"


def beside_weights(shape: Shape, plan: Plan, wishes: Wishes) -> tuple[int, int]:
    """Bytes of the key/value cache and of activations; in training, of adapters, optimizer and graph instead."""
    if wishes.train:
        return 0, training_bytes(shape, plan, wishes.batch, wishes.context)
    cache = cache_bytes(shape, wishes.batch, wishes.context, plan.dtype.itemsize)
    return cache, activation_bytes(shape, plan, wishes.batch, wishes.context)


def placed(ordered: Sequence[Candidate]) -> list[Candidate]:
    """The candidates, each with what decided against the one above it."""
    found: list[Candidate] = []
    for one in ordered:
        above = found[-1] if found and not found[-1].obstacle else None
        found.append(replace(one, why=one.obstacle or _why(one, above)))
    return found


def _why(one: Candidate, above: Candidate | None) -> str:
    if above is None:
        return "best quality, speed, size"
    if one.quality != above.quality:
        return "less quality"
    if one.speed != above.speed:
        return "less speed"
    if one.order[2] == above.order[2] and len(one.targets) < len(above.targets):
        return "fewer programs read it"
    if one.bytes_needed > above.bytes_needed:
        return f"{size(one.bytes_needed - above.bytes_needed)} more"
    return "as good as the one above"
