"""Where weights go: one device, a device map, or offloaded packed to the CPU or to disk through accelerate."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from anybit.errors import InvalidOption

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def main_device(device_map: Any) -> torch.device:
    """The device that computes: what kernels are chosen for before a map is worked out."""
    if device_map is None:
        return torch.device("cpu")
    if isinstance(device_map, (str, int, torch.device)):
        if device_map in AUTOMATIC:
            return (
                torch.accelerator.current_accelerator() or torch.device("cpu")
                if torch.accelerator.is_available()
                else torch.device("cpu")
            )
        return _device(device_map)
    for target in device_map.values():
        if target not in ("cpu", "disk"):
            return _device(target)
    return torch.device("cpu")


def _device(target: Any) -> torch.device:
    if target == "disk":
        return torch.device("cpu")
    if isinstance(target, int):
        return torch.device("cuda", target)
    try:
        return torch.device(target)
    except RuntimeError as error:
        raise InvalidOption(
            f"device_map: {target!r} is no device; use None, {', '.join(map(repr, AUTOMATIC))}, 'cpu', 'cuda:0', 'disk' "
            f"or a dict of module path to one of these"
        ) from error


class Placement:
    """Module path -> device, longest matching path first."""

    def __init__(self, device_map: Mapping[str, Any], whole: torch.device | None):
        self.device_map = dict(device_map)
        self.whole = whole

    def device_of(self, name: str) -> Any:
        """A torch.device, or "disk"."""
        if self.whole is not None:
            return self.whole
        path = name
        while path not in self.device_map:
            if not path:
                raise InvalidOption(f"device_map places no device for {name!r}; add it or a parent of it (or '')")
            path = path.rpartition(".")[0]
        target = self.device_map[path]
        return "disk" if target == "disk" else _device(target)

    @property
    def hooked(self) -> bool:
        """Whether accelerate has to move weights or activations at run time."""
        return self.whole is None and (
            len(set(map(str, self.device_map.values()))) > 1 or "disk" in self.device_map.values()
        )


def place(model: nn.Module, device_map: Any, max_memory: Mapping[Any, Any] | None) -> Placement:
    """The placement a user asked for. Automatic maps count packed bytes, as the layers are already packed on meta."""
    if (
        device_map is None
        or isinstance(device_map, (int, torch.device))
        or (isinstance(device_map, str) and device_map not in AUTOMATIC)
    ):
        if device_map == "disk":
            return Placement({"": "disk"}, None)
        return Placement({}, main_device(device_map))
    if isinstance(device_map, str):
        if device_map != "sequential" and max_memory is None and main_device(device_map).type == "cpu":
            return Placement({}, torch.device("cpu"))
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        no_split = sorted(getattr(model, "_no_split_modules", None) or [])
        if device_map != "sequential":
            max_memory = get_balanced_memory(
                model, max_memory, no_split_module_classes=no_split, low_zero=device_map == "balanced_low_0"
            )
        device_map = infer_auto_device_map(model, max_memory, no_split_module_classes=no_split)
    targets = set(map(str, device_map.values()))
    if len(targets) == 1 and "disk" not in targets:
        return Placement({}, _device(next(iter(device_map.values()))))
    return Placement(device_map, None)


class Offloader:
    """Packed bytes of modules mapped to "disk": one safetensors file each, read back by accelerate's hooks."""

    def __init__(self, placement: Placement, folder: str | None):
        self.placement = placement
        self.index: dict[str, dict[str, str]] = {}
        self._temporary = None
        if folder is None and "disk" in placement.device_map.values():
            self._temporary = tempfile.TemporaryDirectory(prefix="anybit-offload-")
            folder = self._temporary.name
        self.folder = folder

    def move_out(self, model: nn.Module, name: str) -> None:
        """Write the tensors of a module (or the one tensor) called `name` and leave them on the meta device."""
        from safetensors.torch import save_file

        assert self.folder is not None
        os.makedirs(self.folder, exist_ok=True)
        for key, owner, own in list(_tensors_under(model, name)):
            store: dict[str, Any] = owner._parameters if own in owner._parameters else owner._buffers
            tensor = store[own]
            if tensor is None or tensor.device.type == "meta":
                continue
            file = os.path.join(self.folder, f"{key}.safetensors")
            save_file({key: tensor.detach().contiguous()}, file)
            self.index[key] = {
                "safetensors_file": file,
                "weight_name": key,
                "dtype": str(tensor.dtype).removeprefix("torch."),
            }
            gone = tensor.detach().to("meta")
            store[own] = nn.Parameter(gone, requires_grad=False) if own in owner._parameters else gone

    def dispatch(self, model: nn.Module) -> None:
        """Install accelerate's hooks where the map needs them."""
        if not self.placement.hooked:
            return
        from accelerate import dispatch_model

        mapping = {
            name: str(target) if isinstance(target, torch.device) else target
            for name, target in self.placement.device_map.items()
        }
        dispatch_model(
            model, mapping, main_device=str(main_device(mapping)), offload_dir=self.folder, offload_index=self.index or None,
            offload_buffers=False, force_hooks=True, skip_keys=getattr(model, "_skip_keys_device_placement", None),
        )  # fmt: skip
        model.hf_device_map = mapping  # type: ignore[assignment]
        model._anybit_offload = self._temporary  # type: ignore[assignment]  # the folder lives as long as the model


def _tensors_under(model: nn.Module, name: str) -> list[tuple[str, nn.Module, str]]:
    found = []
    try:
        module = model.get_submodule(name)
    except AttributeError:
        path, _, own = name.rpartition(".")
        return [(name, model.get_submodule(path), own)]
    for path, owner in module.named_modules():
        prefix = f"{name}.{path}" if path else name
        for own in [*owner._parameters, *owner._buffers]:
            found.append((f"{prefix}.{own}", owner, own))
    return found
