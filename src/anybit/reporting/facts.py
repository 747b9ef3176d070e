"""Everything a report shows, measured: sizes, coverage, quality, errors of modules, distributions, generated text."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anybit import __version__
from anybit.engine.evaluate import Evaluation, evaluate, find_tokenizer, read_text
from anybit.engine.load import load
from anybit.engine.load import plan as plan_of
from anybit.engine.module_errors import dense_twin, input_device, module_errors
from anybit.engine.recipe import FILE_NAME, read_recipe
from anybit.engine.sensitivity import Cost, read_costs
from anybit.errors import ConfigError
from anybit.modules import PackedWeight
from anybit.quantizers.auto import AutoQuantizationConfig

Progress = Callable[[str, int, int], None]
BINS = 61
ACTIVATION_TOKENS = 512  # of the text, for the histograms of inputs


@dataclass(frozen=True)
class Candidate:
    """Another model on the size-quality chart."""

    name: str
    bits_per_weight: float
    perplexity: float
    kl: float | None
    bytes_on_disk: int


@dataclass(frozen=True)
class Histogram:
    """Counts in `BINS` equal bins of [-limit, limit]; `second` is what the first became, on the same bins."""

    module: str
    kind: str  # "weights" or "inputs"
    limit: float
    first: list[int]
    second: list[int] = field(default_factory=list)


@dataclass
class Facts:
    """A report's content. Optional parts are empty where nothing was given to measure them with."""

    path: str
    method: str
    config: dict[str, Any]
    plan: dict[str, Any]
    versions: dict[str, str]
    command: str
    reference: str | None = None
    text: str | None = None  # the name of the file that quality was measured on
    dense_bytes: int | None = None
    dense_memory: int | None = None
    evaluation: Evaluation | None = None
    modules: list[dict[str, Any]] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    histograms: list[Histogram] = field(default_factory=list)
    generations: list[dict[str, str]] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    recipe: dict[str, Any] | None = None

    @property
    def bits_per_weight(self) -> float:
        """Of the packed weights, scales and everything else counted; 0 if nothing is packed."""
        packed = [module for module in self.plan["modules"] if module["action"] == "packed"]
        weights = sum(_product(module["shape"]) for module in packed)
        return (
            sum(module["bits_per_weight"] * _product(module["shape"]) for module in packed) / weights
            if weights
            else 0.0
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the histograms."""
        return {
            "path": self.path, "method": self.method, "config": self.config, "command": self.command, "versions": self.versions,
            "bits_per_weight": self.bits_per_weight, "coverage": self.plan["coverage"],
            "bytes_on_disk": self.plan["bytes_on_disk"], "bytes_in_memory": self.plan["bytes_in_memory"],
            "reference": self.reference, "reference_bytes_on_disk": self.dense_bytes,
            "reference_bytes_in_memory": self.dense_memory,
            "evaluation": self.evaluation.to_dict() if self.evaluation else None, "modules": self.modules,
            "candidates": [vars(candidate) for candidate in self.candidates], "generations": self.generations,
            "costs": [vars(cost) for cost in self.costs], "recipe": self.recipe,
        }  # fmt: skip


def gather(
    path: str | os.PathLike[str],
    *,
    command: str,
    reference: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    compare: Sequence[str | os.PathLike[str]] = (),
    prompts: Sequence[str] = (),
    costs: str | os.PathLike[str] | None = None,
    max_tokens: int | None = 4096,
    worst: int = 6,
    device_map: Any = None,
    progress: Progress | None = None,
) -> Facts:
    """Measure the quantized checkpoint `path`.

    `reference`: the dense checkpoint it was made from, for errors, distributions and texts side by side. `text`: a file or a
    string for perplexity and KL. `compare`: further quantized checkpoints, for the chart of size against quality; they need a
    text. `prompts`: what generated texts begin with. `costs`: a file that `sensitivity(cache=...)` wrote, for the curve of what
    each module costs. `worst`: modules whose distributions are shown. A recipe beside the checkpoint is part of the report.
    Raises ConfigError for a checkpoint without packed weights.
    """
    if compare and text is None:
        raise ConfigError("comparing candidates measures them on a text; pass text= (--text)")
    model: Any = load(path, device_map=device_map, progress=progress)
    plan = model.anybit_plan
    if plan.method is None:
        raise ConfigError(f"{path} is not quantized; a report is about a quantized checkpoint")
    stored = getattr(model.config, "quantization_config", None)
    facts = Facts(
        str(path), plan.method, stored if isinstance(stored, dict) else stored.to_dict() if stored is not None else {},
        plan.to_dict(), _versions(), command, costs=[] if costs is None else list(read_costs(costs)), recipe=_recipe(path),
    )  # fmt: skip
    dense: Any = None
    if reference is not None:
        dense = load(reference, device_map=device_map, progress=progress)
        facts.reference = str(reference)
        facts.dense_bytes, facts.dense_memory = dense.anybit_plan.bytes_on_disk, dense.anybit_plan.bytes_in_memory
    if text is not None:
        facts.text = Path(text).name if read_text(text)[0] != text else None
        facts.evaluation = evaluate(
            model, text, reference=dense, max_tokens=max_tokens, per_module=dense is not None, progress=progress
        )
        facts.modules = [module.to_dict() for module in facts.evaluation.modules]
    elif dense is not None:
        with torch.no_grad():
            facts.modules = [module.to_dict() for module in module_errors(model, dense, (), progress)]
    if dense is not None:
        names = [module["module"] for module in ranked(facts.modules)[:worst]]
        facts.histograms = [_weights(name, model.get_submodule(name), dense) for name in names]
        if text is not None:
            facts.histograms += _inputs(dense, names, _tokens(path, reference, text))
    if prompts:
        facts.generations = _generations(model, dense, prompts, find_tokenizer(path, reference))
    if compare:
        facts.candidates = [_candidate(facts.path, model, facts.evaluation)]
        for other in compare:
            loaded: Any = load(other, device_map=device_map, progress=progress)
            found = evaluate(loaded, text, reference=dense, max_tokens=max_tokens, progress=progress)  # type: ignore[arg-type]
            facts.candidates.append(_candidate(str(other), loaded, found))
    return facts


def brief(path: str | os.PathLike[str], *, command: str, reference: str | os.PathLike[str] | None = None) -> Facts:
    """What is known of a quantized checkpoint from its headers alone: enough for a model card."""
    found = plan_of(path)
    stored = AutoQuantizationConfig.find(Path(path))
    return Facts(
        str(path), str(found.method), stored.to_dict() if stored is not None else {}, found.to_dict(), _versions(), command,
        reference=None if reference is None else str(reference),
        dense_bytes=None if reference is None else plan_of(reference).bytes_on_disk, recipe=_recipe(path),
    )  # fmt: skip


def _recipe(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The recipe that lies beside a checkpoint."""
    file = Path(path) / FILE_NAME
    return read_recipe(file).to_dict() if file.is_file() else None


def first_words(text: str | os.PathLike[str], count: int = 12) -> str:
    """What a text begins with, for a prompt."""
    return " ".join(read_text(text)[0].split()[:count])


def ranked(modules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst first: by the error of the output where it was measured, else of the weight."""
    return sorted(modules, key=lambda module: -(module["output_error"] or module["weight_error"]))


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _versions() -> dict[str, str]:
    import transformers

    return {
        "anybit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _candidate(name: str, model: Any, found: Evaluation | None) -> Candidate:
    assert found is not None
    plan = model.anybit_plan
    packed = [entry for entry in plan.entries if entry.action == "packed"]
    weights = sum(entry.weights for entry in packed)
    bits = sum(8 * entry.bytes_stored for entry in packed) / weights if weights else 0.0
    return Candidate(Path(name).name, bits, found.perplexity, found.kl, plan.bytes_on_disk)


# --- distributions ---------------------------------------------------------------------------------------------------------


def _weights(name: str, module: nn.Module, reference: nn.Module) -> Histogram:
    """A module's dense and packed weights (of a stack: its first expert's)."""
    assert isinstance(module, PackedWeight)
    weight, expert = module.quantized_weight, None
    if len(weight.shape) == 3:
        weight, expert = weight.select(0), 0
    wanted = dense_twin(name, module, reference, expert)
    ours = weight.to_dense(torch.float32)
    limit = max(float(wanted.abs().max()), 1e-12)
    return Histogram(name, "weights", limit, _counts(wanted, limit), _counts(ours, limit))


def _counts(numbers: Tensor, limit: float) -> list[int]:
    found = torch.histc(numbers.float().clamp(-limit, limit).cpu(), BINS, -limit, limit)
    return [int(count) for count in found.tolist()]


def _inputs(reference: nn.Module, names: Sequence[str], tokens: Tensor) -> list[Histogram]:
    """What arrives at the reference's modules of these names."""
    found: list[Histogram] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any) -> None:
            x = args[0].detach()
            limit = max(float(x.abs().max()), 1e-12)
            found.append(Histogram(name, "inputs", limit, _counts(x, limit)))

        return look

    linear = [name for name in names if isinstance(_maybe(reference, name), nn.Linear)]
    with (
        _hooks([reference.get_submodule(name).register_forward_pre_hook(watch(name)) for name in linear]),
        torch.no_grad(),
    ):
        reference(input_ids=tokens[None, :ACTIVATION_TOKENS].to(input_device(reference)), use_cache=False)
    return found


def _maybe(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules()).get(name)


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tokens(path: Any, reference: Any, text: Any) -> Tensor:
    from anybit.engine.evaluate import tokenize

    return tokenize(text, find_tokenizer(path, reference), ACTIVATION_TOKENS).ids


# --- text ------------------------------------------------------------------------------------------------------------------


def _generations(model: Any, dense: Any, prompts: Sequence[str], tokenizer: Any) -> list[dict[str, str]]:
    """Greedy continuations of 40 tokens."""

    def continued(own: Any, prompt: str) -> str:
        encoded = tokenizer(prompt, return_tensors="pt").to(input_device(own))
        encoded.pop("token_type_ids", None)
        ids = own.generate(**encoded, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        return str(tokenizer.decode(ids[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))

    return [
        {
            "prompt": prompt,
            "quantized": continued(model, prompt),
            "reference": continued(dense, prompt) if dense is not None else "",
        }
        for prompt in prompts
    ]


def as_json(content: Any) -> str:
    """Readable JSON."""
    return json.dumps(content, indent=2, ensure_ascii=False, default=str)
