"""A packed model back into a checkpoint: the bytes that were loaded, or the ones made while loading."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anybit.containers import Checkpoint, TensorInfo
from anybit.engine.names import WHOLE, ExpertBiases, restored_names
from anybit.engine.write import Arrangement, Job, Spec, side_files, write_checkpoint
from anybit.errors import CheckpointError, InvalidOption, did_you_mean
from anybit.modules import PackedWeight, TiedLinear
from anybit.quantizers.checkpoint_config import KEY, read_json
from anybit.weight.joining import Alternating
from anybit.weight.layout import join_name
from anybit.weight.row_cut import RowCutLayout

if TYPE_CHECKING:
    from anybit.engine.load import Prepared
    from anybit.engine.plan import Plan
    from anybit.weight import Layout

# options of transformers' save_pretrained that need nothing from us
_HARMLESS = ("safe_serialization", "is_main_process", "save_original_format", "token")
_OPTIONS = (
    "max_shard_size",
    "force",
    "push_to_hub",
    "repo_id",
    "commit_message",
    "private",
    "variant",
    "state_dict",
    *_HARMLESS,
)


def bind(model: Any, prepared: Prepared) -> None:
    """Give a loaded model `save_pretrained` and `dequantize` of its own, and remember where it came from."""
    source = prepared.folder / "config.json"
    known = prepared.own_config and source.is_file() and prepared.bundle is None
    model._anybit_source = {
        "folder": str(prepared.folder) if prepared.bundle is None else None,
        "bundled_files": prepared.bundle.files if prepared.bundle is not None else None,
        "config": read_json(source) if known else None,
        "config_bytes": source.read_bytes() if known else None,
        "snapshot": _snapshot(model),
        "arrangement": _arrangement(prepared.checkpoint),
        "as_stored": prepared.quantizer is None or prepared.quantizer.pre_quantized,
    }
    stored_dtype = _stored_dtype(model._anybit_source["config"])
    same_dtype = stored_dtype == str(prepared.plan.dtype).removeprefix("torch.")
    if stored_dtype is not None and not same_dtype:
        model._anybit_source["as_stored"] = False
    # a tensor may be stored in another dtype than config.json says; cast on loading, it goes back into the one it came in
    model._anybit_source["own_dtypes"] = same_dtype and model._anybit_source["as_stored"]
    # partial objects, not bound methods: those would be looked up on the model's class when a copy is unpickled
    model.save_pretrained = functools.partial(_save_pretrained, model)
    model.dequantize = functools.partial(_dequantize, model)
    if prepared.quantizer is not None:
        prepared.quantizer.dequantizer = _dequantize


def _arrangement(checkpoint: Any) -> Arrangement | None:
    """How the tensors lie in their files; None when those are files that are not written again (pickles)."""
    files = {name: Path(info.file).name for name, info in checkpoint.tensors.items()}
    if not all(name.endswith(".safetensors") for name in files.values()):
        return None
    return Arrangement(files, dict(checkpoint.metadata))


def _dequantize(model: Any, dtype: torch.dtype | None = None) -> Any:
    from anybit.engine.dequantize import dequantize_model

    return dequantize_model(model, dtype)


def _save_pretrained(model: Any, save_directory: str | os.PathLike[str], **options: Any) -> None:
    """Write the packed model to a folder: weights, config.json, generation config, tokenizer files it was loaded with.

    `max_shard_size` as in transformers; `force` to replace a model that is already there. Nothing is requantized: what was
    loaded packed comes out byte for byte.
    """
    for name in options:
        if name not in _OPTIONS:
            raise InvalidOption(
                f"save_pretrained has no option {name!r}{did_you_mean(name, _OPTIONS)}. Options: {', '.join(_OPTIONS)}"
            )
    if options.get("state_dict") is not None:
        raise InvalidOption("save_pretrained writes the packed model itself; a state_dict cannot replace it")
    if not options.get("is_main_process", True):
        return
    save(model, save_directory, max_shard_size=options.get("max_shard_size"), force=options.get("force", False))
    if options.get("push_to_hub"):
        from huggingface_hub import HfApi

        api, repo = HfApi(token=options.get("token")), options.get("repo_id") or Path(save_directory).name
        created = api.create_repo(repo, private=options.get("private"), exist_ok=True)
        message = options.get("commit_message") or "Upload model"
        api.upload_folder(repo_id=created.repo_id, folder_path=str(save_directory), commit_message=message)


def save(
    model: Any, target: str | os.PathLike[str], *, max_shard_size: int | str | None = None, force: bool = False
) -> Path:
    """Write a loaded model to the folder `target`; returns it. FileExistsError when a model is there and `force` is not set."""
    source = model._anybit_source
    plan: Plan = model.anybit_plan
    jobs = [*_packed_jobs(model), *_dense_jobs(model, plan)]
    beside = side_files(Path(source["folder"])) if source["folder"] is not None else []
    generation = getattr(model, "generation_config", None)
    extra: dict[str, bytes] = dict(source["bundled_files"]()) if source["bundled_files"] is not None else {}
    if (
        generation is not None
        and model.can_generate()
        and all(file.name != "generation_config.json" for file in beside)
    ):
        extra["generation_config.json"] = generation.to_json_string(use_diff=True).encode()
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.pre_quantized:
        extra.update(quantizer.made_files(_layouts(model)))
    return write_checkpoint(
        target, jobs, _config(model), like=source["arrangement"], metadata=_metadata(model, jobs),
        max_shard_size=max_shard_size, copy_from=beside, extra_files=extra,
        force=force, merge=True,
    )  # fmt: skip


# --- configuration -------------------------------------------------------------------------------------------------------


def _snapshot(model: Any) -> str:
    """The model's configuration as text, quantization aside: to see whether a user changed it."""
    values = {name: value for name, value in model.config.to_dict().items() if name != KEY}
    return json.dumps(values, sort_keys=True, default=str)


def _stored_dtype(config: Mapping[str, Any] | None) -> str | None:
    found = (config or {}).get("dtype") or (config or {}).get("torch_dtype")
    return found if isinstance(found, str) else None


def _config(model: Any) -> bytes | Mapping[str, Any]:
    source = model._anybit_source
    quantizer = getattr(model, "hf_quantizer", None)
    unchanged = source["config"] is not None and source["snapshot"] == _snapshot(model)
    if unchanged and source["as_stored"]:
        content: bytes = source["config_bytes"]
        return content
    config = dict(source["config"]) if unchanged else dict(model.config.to_diff_dict())
    if not unchanged:
        config["architectures"] = [type(model).__name__]
    if unchanged:
        config.pop("torch_dtype", None)
        config["dtype"] = str(model.anybit_plan.dtype).removeprefix("torch.")
    config.pop(KEY, None)
    if quantizer is not None:
        stored = (source["config"] or {}).get(KEY)
        config = {**config, KEY: stored} if stored is not None else quantizer.model_config(config)
    return config


def _metadata(model: Any, jobs: list[Job]) -> dict[str, str] | None:
    """What the headers of new files say; None for a model that is not quantized."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return None
    found: dict[str, str] = quantizer.file_metadata(_layouts(model), [name for job in jobs for name in job.specs])
    return found


def _layouts(model: Any) -> dict[str, Layout]:
    """Of packed weights, by their names in the checkpoint."""
    found: dict[str, Layout] = {}
    for name, module in model.named_modules():
        for part in module.parts if isinstance(module, PackedWeight) else ():
            if isinstance(part.layout, RowCutLayout):
                found[part.layout.unit] = part.layout.whole
            else:
                found[part.prefix or name] = part.layout
    return found


# --- tensors -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _at_hand(module: nn.Module) -> Iterator[None]:
    """The module's tensors in memory, also when accelerate keeps them on disk."""
    if getattr(module, "_hf_hook", None) is None:
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def _packed_jobs(model: nn.Module) -> list[Job]:
    """One job for each packed layer."""
    jobs = []
    cuts: dict[str, list[Any]] = {}  # layers that share a stored unit, by its name
    for name, module in model.named_modules():
        if not isinstance(module, PackedWeight):
            continue
        own_layout = module.parts[0].layout
        if isinstance(own_layout, RowCutLayout):
            cuts.setdefault(own_layout.unit, []).append(module)
            continue
        specs: dict[str, Spec] = {}
        shrinking: set[str] = set()
        for part in module.parts:
            for own, spec in part.layout.specs().items():
                specs[join_name(part.prefix or name, own)] = spec
            shrinking |= {join_name(part.prefix or name, own) for own in part.layout.shrinking()}

        def make(module: PackedWeight = module, name: str = name) -> dict[str, Tensor]:
            with _at_hand(module):
                made: dict[str, Tensor] = {}
                for part, weight in zip(module.parts, module.part_weights(), strict=True):
                    for own, tensor in part.layout.encode(weight).items():
                        made[join_name(part.prefix or name, own)] = tensor.cpu()
                return made

        jobs.append(Job(name, specs, make, frozenset(shrinking)))
    return jobs + [_shared_job(unit, modules) for unit, modules in cuts.items()]


def _shared_job(unit: str, modules: list[Any]) -> Job:
    """The tensors of a unit whose rows belong to several layers."""
    modules = sorted(modules, key=lambda module: module.parts[0].layout.start)
    layouts = [module.parts[0].layout for module in modules]
    specs: dict[str, Spec] = {join_name(unit, own): spec for own, spec in layouts[0].whole.specs().items()}

    def make() -> dict[str, Tensor]:
        weights = []
        for module in modules:
            with _at_hand(module):
                weights.append(module.part_weights()[0].to("cpu"))
        return {join_name(unit, own): tensor for own, tensor in RowCutLayout.join(layouts, weights).items()}

    shrinking = frozenset(join_name(unit, own) for own in layouts[0].whole.shrinking())
    return Job(unit, specs, make, shrinking)


def _dense_jobs(model: nn.Module, plan: Plan) -> list[Job]:
    """One job for each tensor that is not packed, under its checkpoint name."""
    dense = {entry.slot.parameter: entry for entry in plan.entries if entry.action == "dense"}
    jobs, changed_names = [], []
    for module, key, own in _dense_tensors(model):
        if key in plan.tied:
            continue
        tensor = _tensor(module, own)
        entry = dense.get(key)
        if entry is not None and entry.parts[0].conversion is None:
            if entry.parts[0].index == WHOLE:
                part = entry.parts[0]
                jobs.append(_job(model, part.stored[part.dense_name], module, own))
            else:
                jobs += _part_jobs(entry, tensor, module, own)
        elif key in plan.plain and key not in plan.conversions:
            jobs.append(_job(model, plan.plain[key][0], module, own))
        elif isinstance(plan.conversions.get(key), ExpertBiases):
            jobs.append(_bias_job(plan.conversions[key], module, own))  # type: ignore[arg-type]
        else:
            changed_names.append((module, key, own))
    return jobs + _converted_jobs(model, changed_names)


def _dense_tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(owner, key, own name) of every stored tensor that no packed layer keeps for itself."""
    for path, module in model.named_modules():
        if isinstance(module, TiedLinear):
            continue
        kept = set(module._buffers) - module._non_persistent_buffers_set
        for own in [*module._parameters, *sorted(kept)]:
            if _tensor(module, own) is not None and not own.startswith(("_packed_", "_extra_")):
                yield module, f"{path}.{own}" if path else own, own


def _tensor(module: nn.Module, own: str) -> Any:
    return module._parameters[own] if own in module._parameters else module._buffers[own]


def _job(model: Any, info: TensorInfo, module: nn.Module, own: str) -> Job:
    """A tensor under its stored name; in its stored dtype when all that happened to it was a cast on loading."""

    def current() -> Tensor:
        with _at_hand(module):
            found: Tensor = _tensor(module, own).detach().cpu()
            return found

    if model._anybit_source["own_dtypes"] and info.dtype != _spec(_tensor(module, own))[0]:
        stored = _stored(info)
        if stored is not None and torch.equal(stored.to(_tensor(module, own).dtype), current()):
            return Job(info.name, {info.name: (info.dtype, tuple(info.shape))}, lambda: {info.name: stored})
    return Job(info.name, {info.name: _spec(_tensor(module, own))}, lambda: {info.name: current()})


def _stored(info: TensorInfo) -> Tensor | None:
    """A tensor of the checkpoint the model was loaded from, in the file's own memory; None when that is gone."""
    try:
        with Checkpoint.open(info.file, allow_pickle=True) as checkpoint:
            return checkpoint.read(info.name, copy=False) if checkpoint.tensors.get(info.name) == info else None
    except CheckpointError:
        return None


def _part_jobs(entry: Any, tensor: Tensor, module: nn.Module, own: str) -> list[Job]:
    """A dense stack, cut into the parts it was read from."""
    experts = {expert: number for number, expert in enumerate(dict.fromkeys(part.index[0] for part in entry.parts))}
    taken = dict.fromkeys(experts, 0)
    jobs = []
    for part in entry.parts:
        info = part.stored[part.dense_name]
        start, rows = taken[part.index[0]], info.shape[-2]
        taken[part.index[0]] = start + rows

        def make(part: Any = part, name: str = info.name, start: int = start, rows: int = rows) -> dict[str, Tensor]:
            with _at_hand(module):
                whole = _tensor(module, own).detach()
                matrix = whole if part.index[0] is None else whole[experts[part.index[0]]]
                matrix = matrix.mT if entry.slot.transposed else matrix
                turns = isinstance(part.index[1], Alternating)
                own_rows = slice(int(part.index[1]), None, 2) if turns else slice(start, start + rows)
                return {name: matrix[..., own_rows, :].cpu().contiguous()}

        jobs.append(Job(info.name, {info.name: (_spec(tensor)[0], tuple(info.shape))}, make))
    return jobs


def _bias_job(biases: ExpertBiases, module: nn.Module, own: str) -> Job:
    """Biases of all experts, each under its own name again."""

    def make() -> dict[str, Tensor]:
        with _at_hand(module):
            return biases.split(_tensor(module, own).detach().cpu())

    empty = torch.empty_like(_tensor(module, own), device="meta")
    return Job(biases.renamed, {name: _spec(tensor) for name, tensor in biases.split(empty).items()}, make)


def _converted_jobs(model: nn.Module, found: list[tuple[nn.Module, str, str]]) -> list[Job]:
    """Tensors whose checkpoint names transformers has to work out, together: several may have been one."""
    if not found:
        return []
    empty = {key: torch.empty_like(_tensor(module, own), device="meta") for module, key, own in found}
    specs = {name: _spec(tensor) for name, tensor in restored_names(model, empty).items()}

    def make() -> dict[str, Tensor]:
        tensors = {}
        for module, key, own in found:
            with _at_hand(module):
                tensors[key] = _tensor(module, own).detach().cpu().clone()
        return {name: tensor.contiguous() for name, tensor in restored_names(model, tensors).items()}

    return [Job("converted tensors", specs, make)]


def _spec(tensor: Tensor) -> Spec:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
