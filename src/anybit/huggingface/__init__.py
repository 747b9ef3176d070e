"""transformers' auto classes, loading packed: `AutoModel*.from_pretrained` with the arguments users know.

Models, tokenizers and generation are transformers'; which tensors are read, and in what form they stay, is ours.
"""

from __future__ import annotations

from typing import Any

from anybit._names import lazy


def auto_class(name: str) -> type | None:
    """The twin of transformers' auto class of that name, e.g. "AutoModelForCausalLM"; None if transformers has none."""
    from anybit.huggingface.auto import twin

    return twin(name)


def _miss(name: str) -> Any:
    return auto_class(name) if name.startswith("AutoModel") else None


__getattr__, __dir__ = lazy(__name__, {}, _miss)
