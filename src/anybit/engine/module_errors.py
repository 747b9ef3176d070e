"""Where a packed model differs from its reference, module by module, and which module gives the first NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from anybit.errors import CheckpointError, InvalidOption
from anybit.modules import PackedWeight, QuantExperts, TiedLinear

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ModuleError:
    """One packed weight against the reference's dense one.

    `weight_error`: Frobenius norm of the difference over the norm of the reference; `snr_db` is the same in decibels
    (infinite when equal). `output_error`: relative L2 of the module's output on the reference's own activations; for a
    stack of experts that of the whole experts module. None when the text never reached the module.
    """

    module: str
    shape: tuple[int, ...]
    bits_per_weight: float
    signal: float
    noise: float
    output_error: float | None

    @property
    def weight_error(self) -> float:
        return math.sqrt(self.noise / self.signal) if self.signal > 0 else (math.inf if self.noise > 0 else 0.0)

    @property
    def snr_db(self) -> float:
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf

    def to_dict(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "shape": list(self.shape),
            "bits_per_weight": self.bits_per_weight,
            "weight_error": self.weight_error,
            "snr_db": self.snr_db if math.isfinite(self.snr_db) else None,
            "output_error": self.output_error,
        }


def module_errors(
    model: nn.Module, reference: nn.Module, rows: Iterable[Tensor], progress: Progress | None = None
) -> list[ModuleError]:
    """Errors of every packed module of `model`; `rows`: token ids of the windows that output errors are measured on.

    One dense weight exists at a time, and no activations are kept.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}
    outputs = _output_errors(model, reference, packed, rows)
    found = []
    for number, (name, module) in enumerate(packed.items()):
        signal, noise = _weight_noise(name, module, reference)
        weight = module.quantized_weight
        bits = 8 * weight.bytes_in_memory / max(math.prod(weight.shape), 1)
        found.append(ModuleError(name, tuple(weight.shape), bits, signal, noise, outputs.get(_runs_in(name, module))))
        if progress is not None:
            progress("weights", number + 1, len(packed))
    return found


def _weight_noise(name: str, module: PackedWeight, reference: nn.Module) -> tuple[float, float]:
    """Squared norms of the reference's weight and of the difference."""
    signal = noise = 0.0
    weight = module.quantized_weight
    for expert in range(weight.shape[0]) if len(weight.shape) == 3 else [None]:
        own = (weight if expert is None else weight.select(expert)).to_dense(torch.float32)
        expected = dense_twin(name, module, reference, expert)
        if "meta" in (own.device.type, expected.device.type):
            raise InvalidOption(
                f"{name} is offloaded to disk; errors per module need the weights in memory (device_map)"
            )
        if expected.shape != own.shape:
            raise InvalidOption(
                f"{name} is {tuple(own.shape)} in the model and {tuple(expected.shape)} in the reference. "
                "The reference must be the checkpoint the model was made from"
            )
        expected = expected.to(own.device)
        signal += float(expected.square().sum(dtype=torch.float64))
        noise += float((own - expected).square().sum(dtype=torch.float64))
    return signal, noise


def dense_twin(name: str, module: PackedWeight, reference: nn.Module, expert: int | None = None) -> Tensor:
    """The reference's float32 weight [out, in] of the packed module called `name`; of a stack, that of one expert."""
    return _dense(_twin(reference, name), expert, isinstance(module, QuantExperts) and module.transposed)


def _twin(reference: nn.Module, name: str) -> Any:
    """The reference's module, or parameter, of that name."""
    path, _, own = name.rpartition(".")
    try:
        return getattr(reference.get_submodule(path), own)
    except AttributeError:
        raise InvalidOption(
            f"the reference ({type(reference).__name__}) has no {name!r}. It must be the checkpoint the model was made from"
        ) from None


def _dense(twin: Any, expert: int | None, transposed: bool) -> Tensor:
    """float32 [out, in] of a module or parameter of the reference."""
    twin = twin.owner if isinstance(twin, TiedLinear) else twin
    if isinstance(twin, PackedWeight):
        weight = twin.quantized_weight
        return (weight if expert is None else weight.select(expert)).to_dense(torch.float32)
    tensor = twin if isinstance(twin, Tensor) else twin.weight
    tensor = tensor if expert is None else tensor[expert]
    if transposed or type(twin).__name__ == "Conv1D":
        tensor = tensor.T
    return tensor.detach().to(torch.float32)


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The layer that token ids enter, where the model class names it."""
    get: Any = getattr(model, "get_input_embeddings", None)
    found: nn.Module | None = get() if get is not None else None
    return found


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: the device of the embeddings, or of their offloading hook."""
    embeddings = input_embeddings(model) or model
    device = next((tensor.device for tensor in embeddings.parameters()), torch.device("cpu"))
    if device.type == "meta":
        hook = getattr(embeddings, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or "cpu")
    return device


# --- outputs ------------------------------------------------------------------------------------------------------------


@dataclass
class _Energy:
    signal: float = 0.0
    noise: float = 0.0
    handles: list[Any] = field(default_factory=list)


def _runs_in(name: str, module: nn.Module) -> str:
    """The module whose forward uses the weight: a stack of experts has none of its own."""
    return name.rpartition(".")[0] if isinstance(module, QuantExperts) else name


def _output_errors(
    model: nn.Module, reference: nn.Module, packed: dict[str, PackedWeight], rows: Iterable[Tensor]
) -> dict[str, float]:
    """Relative L2 error of each module's output when it is given what the reference's module was given."""
    energies: dict[str, _Energy] = {}
    handles = []
    for name in dict.fromkeys(_runs_in(name, module) for name, module in packed.items()):
        twin = _twin(reference, name)
        if isinstance(twin, nn.Module):
            energies[name] = _Energy()
            hook = _comparer(model.get_submodule(name), energies[name])
            handles.append(twin.register_forward_hook(hook, with_kwargs=True))
    try:
        device = input_device(reference)
        for row in rows:
            reference(input_ids=row[None].to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: math.sqrt(energy.noise / energy.signal) for name, energy in energies.items() if energy.signal > 0}


def _comparer(module: nn.Module, energy: _Energy) -> Callable[..., None]:
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))

    def compare(twin: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) and device.type != "meta" else value

        if twin is module:  # a model compared with itself: calling it here would call this hook again
            own = output
        else:
            own = module(*map(move, args), **{key: move(value) for key, value in kwargs.items()})
        expected = output.to(own.device, torch.float32)
        energy.signal += float(expected.square().sum(dtype=torch.float64))
        energy.noise += float((own.to(torch.float32) - expected).square().sum(dtype=torch.float64))

    return compare


# --- NaN ------------------------------------------------------------------------------------------------------------------


def explain_nan(model: nn.Module, ids: Tensor, who: str) -> CheckpointError:
    """The error for logits that are not numbers: runs the window again and names the first module that gives NaN or inf."""
    first: dict[str, str] = {}
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not first and not _finite(output):
                first["module"] = name or type(model).__name__
                first["why"] = _cause(name, module, [*args, *kwargs.values()])

        return look

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(watch(name), with_kwargs=True))
    try:
        model(input_ids=ids.to(input_device(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not first:
        return CheckpointError(
            f"{who} gives NaN or infinite logits, and no module by itself does; evaluate in float32 (dtype='float32')"
        )
    return CheckpointError(
        f"{who} gives NaN or infinite logits. The first module to do so is {first['module']!r}: {first['why']}"
    )


def _cause(name: str, module: nn.Module, inputs: list[Any]) -> str:
    tensors = [value for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]
    if any(not _finite(value) for value in tensors):
        owner = name.rpartition(".")[0] or "the model"
        return f"its input is not finite already, from a computation inside {owner}. Evaluate in bfloat16 or float32 (dtype=...)"
    largest = max((float(value.abs().max()) for value in tensors if value.numel()), default=0.0)
    if isinstance(module, PackedWeight):
        tensors = [module.quantized_weight.to_dense(torch.float32)]
    else:
        tensors = [tensor for tensor in module.parameters(recurse=False) if tensor.device.type != "meta"]
    broken = sum(int((~tensor.isfinite()).sum()) for tensor in tensors if tensor.is_floating_point())
    if broken:
        return f"{broken} of its weights are NaN or infinite. The checkpoint is damaged; fetch it again or quantize it again"
    return (
        f"its weights are finite, its largest input is {largest:.4g}, so the result overflows its dtype. "
        "Evaluate in bfloat16 or float32 (dtype=...)"
    )


def _finite(value: Any) -> bool:
    """Whether every floating-point tensor in an output is finite; -inf stands for "excluded" in masks and logits."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or not bool((value.isnan() | value.isposinf()).any())
    if isinstance(value, dict):
        return all(_finite(inside) for inside in value.values())
    if isinstance(value, (tuple, list)):
        return all(_finite(inside) for inside in value)
    return True
