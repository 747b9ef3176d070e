"""What each module costs in each candidate scheme: measured on calibration text, kept in a file.

Three numbers for a module and a scheme, each with only that module's weight quantized by the scheme's own rule:

    weight_error   ||W' - W|| / ||W||
    output_error   ||X W'^T - X W^T|| / ||X W^T||, X what calibration text brings the module (up to 512 positions)
    kl             KL(dense || dense with this module replaced), nats per token: what it does to the model's words

Quantization of inputs that a scheme may bring is no part of them. Stacks of experts have no output error. With an algorithm that
looks at inputs, such as gptq, codes are those that it chooses for what the text brings the module, experts' excepted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anybit import algorithms
from anybit.engine.advice_plans import layout_bytes
from anybit.engine.calibration import calibration_tokens
from anybit.engine.load import Prepared, load, prepare
from anybit.engine.materialize import assembled, dense_part, make_weight
from anybit.engine.plan import Entry, PlannedPart, module_info
from anybit.errors import CalibrationNeeded, ConfigError, InvalidOption, NotRepresentable, near_path
from anybit.quantizers.named import from_scheme
from anybit.weight import Layout, Weight

Progress = Callable[[str, int, int], None]

VERSION = 1
ROWS_AT_ONCE = 4
ROWS = 512  # positions that output errors are measured on
SAMPLES, LENGTH, SEED = 8, 256, 0


@dataclass(frozen=True)
class Cost:
    """One module in one scheme. `bytes`: what is stored of it. `output_error`, `kl`: None where not measured."""

    module: str
    scheme: str
    bytes: int
    weight_error: float
    output_error: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """Costs of every module in every scheme. `names`: weight -> what its method calls its stored units."""

    path: str
    schemes: tuple[str, ...]
    tokens: int
    costs: tuple[Cost, ...]
    names: Mapping[str, tuple[str, ...]]
    weights: Mapping[str, int]
    dense_bytes: Mapping[str, int]
    other_bytes: int
    from_cache: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def sensitivity(
    path: str | os.PathLike[str],
    calibration: Any,
    schemes: Sequence[str],
    *,
    kl: bool = True,
    algorithm: str | None = None,
    samples: int = SAMPLES,
    sequence_length: int = LENGTH,
    seed: int = SEED,
    cache: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Sensitivity:
    """Measure every module of the dense model `path` in each of the named `schemes`.

    `calibration`: as for `quantize`. `kl` False leaves out the costly part: one pass over the text for every module and scheme.
    `algorithm`: one that rounds by what the inputs are (`sees_inputs`), e.g. "gptq"; None: each scheme's own rounding.
    `cache`: a JSON file; what it holds of the same weights, text and schemes is not measured again.
    """
    if not schemes:
        raise InvalidOption("sensitivity needs at least one scheme; `anybit methods` lists them")
    if algorithm is not None and not sees_inputs(algorithm):
        raise InvalidOption(
            f"sensitivity is measured with algorithms that round by their inputs, such as gptq, not {algorithm!r}"
        )
    plans = {name: _planned(path, name) for name in dict.fromkeys(schemes)}
    ready = next(iter(plans.values()))
    tokens = calibration_tokens(calibration, ready.folder, samples=samples, length=sequence_length, seed=seed)
    store = _Store(Path(cache) if cache is not None else None, _fingerprint(ready, tokens, algorithm))
    entries = {name: {entry.slot.parameter: entry for entry in made.plan.entries} for name, made in plans.items()}
    wanted = [
        key for key in entries[next(iter(plans))] if any(own[key].action == "quantize" for own in entries.values())
    ]
    if not wanted:
        raise ConfigError(f"none of {', '.join(plans)} quantizes a weight of {path}")
    measure: _Measure | None = None
    costs: list[Cost] = []
    for number, key in enumerate(wanted):
        for name, own in entries.items():
            entry = own[key]
            if entry.action != "quantize":
                continue
            found = store.get(entry, name)
            if found is None or (kl and found.kl is None):
                measure = measure or _Measure(path, tokens, wanted, torch.device(device), algorithm)
                found = measure.cost(plans[name], entry, name, kl)
                store.put(found)
            costs.append(found)
        if progress is not None:
            progress(key.removesuffix(".weight"), number + 1, len(wanted))
        store.save()
    first = entries[next(iter(plans))]
    for made in plans.values():
        made.checkpoint.release()
    others = {info.name: info.nbytes for infos in ready.plan.plain.values() for info in infos}
    others.update(
        {
            info.name: info.nbytes
            for key, entry in first.items()
            if key not in wanted
            for part in entry.parts
            for info in part.stored.values()
        }
    )
    return Sensitivity(
        str(path), tuple(plans), tokens.numel(), tuple(costs),
        {first[key].slot.module: tuple(_names(first[key], ready)) for key in wanted},
        {first[key].slot.module: first[key].weights for key in wanted},
        {first[key].slot.module: first[key].bytes_stored for key in wanted},
        sum(others.values()), store.hits,
    )  # fmt: skip


def _planned(path: Any, scheme: str) -> Prepared:
    made = prepare(path, from_scheme(scheme))
    if made.quantizer is None or made.quantizer.pre_quantized:
        raise ConfigError(f"{path} is quantized already; sensitivity is measured on the dense model it was made from")
    return made


def _names(entry: Entry, ready: Prepared) -> list[str]:
    return [module_info(entry.slot, part, entry.parts, ready.plan.dtype).name for part in entry.parts]


def sees_inputs(algorithm: str) -> bool:
    """Whether an algorithm rounds one matrix, given its inputs' second moments. InvalidOption for one that is not known."""
    steps = algorithms.steps(algorithm)
    run = None if steps.rounding is None else getattr(algorithms.module(steps.rounding), "quantize", None)
    alone = not steps.foldings and steps.refinement is None
    return alone and run is not None and "hessian" in algorithms.accepted(run, {"hessian": None})


def _fingerprint(ready: Prepared, tokens: Tensor, algorithm: str | None) -> str:
    """Of the weights (names, shapes, sizes, files' sizes and times), the text and the algorithm."""
    digest = hashlib.sha256(f"{VERSION}{algorithm or ''}".encode())
    files: dict[str, None] = {}
    for name, info in sorted(ready.checkpoint.tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape};".encode())
        files[info.file] = None
    for file in files:
        stat = os.stat(file)
        digest.update(f"{stat.st_size} {stat.st_mtime_ns};".encode())
    digest.update(tokens.numpy().tobytes())
    return digest.hexdigest()[:32]


def read_costs(path: str | os.PathLike[str]) -> tuple[Cost, ...]:
    """What a file holds that `sensitivity(cache=...)` wrote. ConfigError for another file."""
    return tuple(_read(Path(path))[1].values())


def _read(path: Path) -> tuple[str, dict[str, Cost]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return data["fingerprint"], {key: Cost(**own) for key, own in data["costs"].items()}
    except OSError as error:
        raise ConfigError(f"the costs {path} cannot be read: {error.strerror}{near_path(path)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no file of sensitivities ({error}); name another, or delete it") from error


class _Store:
    """The file of costs. A file of other weights or another text is begun anew."""

    def __init__(self, path: Path | None, fingerprint: str):
        self.path, self.fingerprint, self.hits = path, fingerprint, 0
        self.costs: dict[str, Cost] = {}
        if path is not None and path.is_file():
            fingerprint, costs = _read(path)
            self.costs = costs if fingerprint == self.fingerprint else {}

    def get(self, entry: Entry, scheme: str) -> Cost | None:
        found = self.costs.get(f"{entry.slot.module} {scheme}")
        self.hits += found is not None
        return found

    def put(self, cost: Cost) -> None:
        self.costs[f"{cost.module} {cost.scheme}"] = cost

    def save(self) -> None:
        if self.path is None:
            return
        data = {"fingerprint": self.fingerprint, "costs": {key: asdict(cost) for key, cost in self.costs.items()}}
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(json.dumps(data, indent=1), encoding="utf-8")
        os.replace(new, self.path)


class _Measure:
    """The dense model, what its modules see of the text, and its words."""

    def __init__(self, path: Any, tokens: Tensor, wanted: Sequence[str], device: torch.device, algorithm: str | None):
        # float32: two evaluations differ by what was replaced, not by rounding, and CPUs are faster at it
        self.model: Any = load(path, device_map=device, dtype=torch.float32)
        self.model.eval()
        self.tokens, self.device, self.algorithm = tokens.to(device), device, algorithm
        self.inputs: dict[str, Tensor] = {}
        self.expected = self._words(self._listening(wanted))

    def _listening(self, wanted: Sequence[str]) -> list[Any]:
        """Hooks that keep some rows of the inputs of each linear layer."""
        handles = []
        rows = ROWS if self.algorithm is None else self.tokens.numel()
        share = max(1, rows // -(-len(self.tokens) // ROWS_AT_ONCE))
        kept: dict[str, list[Tensor]] = {}
        for key in wanted:
            name = key.removesuffix(".weight")
            module = dict(self.model.named_modules()).get(name)
            if module is not None and not isinstance(module, nn.Embedding):
                handles.append(module.register_forward_pre_hook(_keeper(kept.setdefault(name, []), share)))
        self._kept = kept
        return handles

    def _words(self, handles: Sequence[Any] = ()) -> list[Tensor]:
        """Log-probabilities of the text, some rows at a time."""
        try:
            found = [self._logits(rows) for rows in self.tokens.split(ROWS_AT_ONCE)]
        finally:
            for handle in handles:
                handle.remove()
        if handles:
            self.inputs = {name: torch.cat(rows) for name, rows in self._kept.items() if rows}
        return found

    @torch.no_grad()
    def _logits(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=rows, use_cache=False).logits
        return logits.to(torch.float32).log_softmax(-1)

    def cost(self, ready: Prepared, entry: Entry, scheme: str, kl: bool) -> Cost:
        """One module in one scheme; the model is left as it was."""
        stored = sum(layout_bytes(part.layout) for part in entry.parts)
        inputs = self.inputs.get(entry.slot.module)
        try:
            seen = inputs if self.algorithm is not None and len(entry.slot.shape) == 2 else None
            made = quantized_dense(ready, entry, self.device, self.algorithm, seen)
        except (CalibrationNeeded, NotRepresentable) as error:
            raise CalibrationNeeded(f"{scheme}: {error}") from error
        parameter: Any = functools.reduce(getattr, entry.slot.parameter.split("."), self.model)
        parameter = parameter if isinstance(parameter, Tensor) else parameter.weight
        dense = parameter.detach().to(torch.float32)
        logical = dense.transpose(-1, -2) if entry.slot.transposed else dense
        weight_error = float((made - logical).norm() / logical.norm().clamp(min=1e-30))
        output_error = None
        if inputs is not None and logical.dim() == 2:
            wanted = inputs @ logical.T
            output_error = float((inputs @ made.T - wanted).norm() / wanted.norm().clamp(min=1e-30))
        found = Cost(entry.slot.module, scheme, stored, weight_error, output_error)
        if not kl:
            return found
        before = parameter.detach().clone()
        try:
            parameter.data.copy_(made.transpose(-1, -2) if entry.slot.transposed else made)
            total = 0.0
            for rows, expected in zip(self.tokens.split(ROWS_AT_ONCE), self.expected):
                own = self._logits(rows)
                total += float((expected.exp() * (expected - own)).sum(dtype=torch.float64))
        finally:
            parameter.data.copy_(before)
        return replace(found, kl=max(total / self.tokens.numel(), 0.0))


def _keeper(kept: list[Tensor], share: int) -> Callable[[nn.Module, Any], None]:
    """A hook that keeps `share` evenly spaced rows of an input."""

    def keep(module: nn.Module, args: Any) -> None:
        rows = args[0].detach().reshape(-1, args[0].shape[-1])
        kept.append(rows[:: max(1, len(rows) // share)][:share].to(torch.float32))

    return keep


def quantized_dense(
    ready: Prepared,
    entry: Entry,
    device: torch.device | str = "cpu",
    algorithm: str | None = None,
    inputs: Tensor | None = None,
) -> Tensor:
    """float32 [out, in] or [experts, out, in] of a weight after it went through its layouts.

    `inputs` [rows, in]: what `algorithm` rounds by; without them, the layout's own rounding.
    """
    made: list[tuple[PlannedPart, Tensor]] = []
    moments = None if inputs is None else inputs.T @ inputs * (2 / len(inputs))
    for part in entry.parts:
        assert part.layout is not None
        if moments is None:
            weight = make_weight(ready.model, entry, part, ready.checkpoint, device)
        else:
            dense = dense_part(ready.model, entry, part, ready.checkpoint).to(device, torch.float32)
            weight = _rounded(ready, part.layout, dense, str(algorithm), moments)
        stored = part.layout.encode(weight)
        made.append((part, part.layout.decode(stored).to_dense(torch.float32)))
    return assembled(made)


def _rounded(ready: Prepared, layout: Layout, dense: Tensor, algorithm: str, moments: Tensor) -> Weight:
    """One matrix, rounded as `quantize` would with this algorithm; groups keep their stored order."""
    assert ready.quantizer is not None
    run = algorithms.module(algorithm).quantize
    own = ready.quantizer.calibration_options() if ready.quantizer.calibrated_algorithm == algorithm else {}
    options = algorithms.accepted(run, {**layout.algorithm_options(), **own, "hessian": moments})
    if options.get("order") == "columns":
        options["order"] = "groups"
    weight: Weight = run(dense, layout.scheme(), **options)
    return weight
