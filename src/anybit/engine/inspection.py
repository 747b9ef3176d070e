"""What a checkpoint is, from its headers: no weight is read, and no torch is needed for the first look."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anybit.containers import Checkpoint
from anybit.engine.outlining import aligned, alike, size
from anybit.engine.source import locate, unbundled
from anybit.errors import AnybitError
from anybit.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from anybit.quantizers.checkpoint_config import model_config_of


@dataclass(frozen=True)
class ModuleTensors:
    """The stored tensors of one module: name -> "dtype [shape]"; layout and bits as the plan finds them ("" without one)."""

    name: str
    tensors: Mapping[str, str]
    bytes: int
    layout: str = ""
    bits_per_weight: float | None = None


@dataclass(frozen=True, repr=False)
class Inspection:
    """A checkpoint at a glance. `problems`: why it would not load, in the words of the error that `load` would raise."""

    path: str
    architecture: str
    method: str | None
    config: Mapping[str, Any] | None
    files: Mapping[str, int]
    modules: tuple[ModuleTensors, ...]
    bytes_on_disk: int
    weights: int | None = None
    bits_per_weight: float | None = None
    coverage: float | None = None
    ignored: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return (
            f"<Inspection of {self.path}: {self.architecture}, {self.method or 'dense'}, {size(self.bytes_on_disk)}, "
            f"{len(self.problems) or 'no'} problem{'' if len(self.problems) == 1 else 's'}; print it for every module>"
        )

    def __str__(self) -> str:
        rows = [("module", "layout", "bits", "bytes")]
        for name, members in alike(self.modules, name=lambda one: one.name, same=lambda one: (one.layout, one.bytes)):
            bits = members[0].bits_per_weight
            rows.append(
                (
                    name,
                    members[0].layout.removesuffix("Layout"),
                    f"{bits:.2f}" if bits is not None else "",
                    size(sum(one.bytes for one in members)),
                )
            )
        return "\n".join([repr(self), *aligned(rows), *(f"problem: {problem}" for problem in self.problems)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def inspect(
    path: str | os.PathLike[str],
    *,
    layouts: bool = True,
    allow_pickle: bool = False,
    hub_options: Mapping[str, Any] | None = None,
) -> Inspection:
    """Look at a folder, a file or a hub id without reading weights. `layouts` False skips the model class, and torch.

    A broken checkpoint is described as far as it goes; only a path that leads nowhere raises.
    """
    location = locate(path, allow_pickle=allow_pickle, **(hub_options or {}))
    problems: list[str] = []
    config = architecture = checkpoint = found = None
    try:
        found = AutoQuantizationConfig.find(location)
        config = found.to_dict() if found is not None else None
        names = model_config_of(location).get("architectures")
        architecture = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    except AnybitError as error:
        problems.append(str(error))
    try:
        quantizer = AutoHfQuantizer.from_config(found) if found is not None else None
        packages = quantizer.pickled_packages if quantizer is not None else ()
        opened = Checkpoint.open(location, allow_pickle=allow_pickle, packages=packages)
        checkpoint, bundle = unbundled(opened, quantizer)
        if bundle is not None:
            architecture = bundle.config["architectures"][0]
    except AnybitError as error:
        problems.append(str(error))
    tensors = checkpoint.tensors if checkpoint is not None else {}
    details: dict[str, Any] = {}
    by_module: dict[str, tuple[str, float]] = {}
    if layouts and not problems:
        details, by_module, problem = _details(location, allow_pickle)
        problems += problem
    grouped: dict[str, dict[str, Any]] = {}
    for name, info in tensors.items():
        module, _, own = name.rpartition(".")
        grouped.setdefault(module, {})[own] = info
    modules = tuple(
        ModuleTensors(
            module,
            {own: f"{info.dtype} {list(info.shape)}" for own, info in infos.items()},
            sum(info.nbytes for info in infos.values()),
            *by_module.get(module, ("", None)),
        )
        for module, infos in grouped.items()
    )
    files: dict[str, int] = {}
    for info in tensors.values():
        if info.file not in files:
            files[info.file] = Path(info.file).stat().st_size
    return Inspection(
        str(location), architecture or "unknown", _name_of(config), config, files, modules,
        sum(info.nbytes for info in tensors.values()), **details, problems=tuple(problems),
    )  # fmt: skip


def _name_of(config: Mapping[str, Any] | None) -> str | None:
    method = config.get("quant_method") if config is not None else None
    return str(getattr(method, "value", method)) if method is not None else None


def _details(location: Path, allow_pickle: bool) -> tuple[dict[str, Any], dict[str, tuple[str, float]], list[str]]:
    """What only the model class can tell: number of weights, layouts, coverage."""
    from anybit.engine.load import plan

    try:
        made = plan(location, allow_pickle=allow_pickle)
    except AnybitError as error:
        return {}, {}, [str(error)]
    weights = sum(entry.weights for entry in made.entries)
    stored = sum(entry.bytes_stored for entry in made.entries)
    by_module = {
        part.prefix: (
            type(part.layout).__name__ if part.layout else "dense",
            8 * part.bytes_stored * len(entry.parts) / entry.weights,
        )
        for entry in made.entries
        for part in entry.parts
    }
    details = {
        "weights": weights, "bits_per_weight": 8 * stored / max(weights, 1), "coverage": made.coverage, "ignored": made.ignored,
    }  # fmt: skip
    return details, by_module, []
