"""What a method does at run time beside its weights: rotated inputs, a quantized cache. As hooks of the model's own modules.

Hooks and the buffers they read are given to the model before its tensors' names are taken, so that engines load, place and
save the buffers like any other; `detach` takes all of it away again when a model becomes dense.
"""

from __future__ import annotations

from typing import Any


class Attachment:
    """Base of such hooks. Copied and pickled with the model, so it keeps what it knows in plain attributes."""

    def __call__(self, module: Any, *arguments: Any) -> Any:
        """torch's protocol of hooks: (module, inputs) before, (module, inputs, output) after; with keywords if asked for."""
        raise NotImplementedError(type(self).__name__)


def attach_before(module: Any, hook: Attachment, *, with_kwargs: bool = False, first: bool = False) -> None:
    """Run `hook` before the module; `first`: before the hooks that are already there."""
    module.register_forward_pre_hook(hook, with_kwargs=with_kwargs, prepend=first)


def attach_after(module: Any, hook: Attachment) -> None:
    """Run `hook` after the module, after the hooks that are already there."""
    module.register_forward_hook(hook)


def carry_over(source: Any, target: Any) -> None:
    """Let a layer that takes the place of another keep its children, buffers and hooks."""
    for name, child in source._modules.items():
        target._modules.setdefault(name, child)
    for name, buffer in source._buffers.items():
        target._buffers.setdefault(name, buffer)
    target._non_persistent_buffers_set |= source._non_persistent_buffers_set
    for name in _HOOKS:
        getattr(target, name).update(getattr(source, name))


def detach(model: Any, keys: Any) -> None:
    """Remove every attached hook of a model, and the buffers called `keys` with the plain modules that held nothing else."""
    for module in model.modules():
        for name in _HOOKS[:2]:
            hooks = getattr(module, name)
            for number in [number for number, hook in hooks.items() if isinstance(hook, Attachment)]:
                for table in _HOOKS:
                    getattr(module, table).pop(number, None)
    for key in keys:
        path, _, own = key.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:  # it hung on a layer that is gone
            continue
        module._buffers.pop(own, None)
        holds_nothing = not module._buffers and not module._parameters and not module._modules
        if (
            holds_nothing and path and type(module).__name__ == "Module"
        ):  # the model's own, an activation function, stays
            parent, _, name = path.rpartition(".")
            model.get_submodule(parent)._modules.pop(name, None)


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
