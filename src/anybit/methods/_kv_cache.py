"""Rounding keys and values before they enter the cache, and queries before they meet them.

For any attention module of transformers that has a cache: it hands its keys (rotary embedding applied) and values to
`past_key_values.update`; a stand-in for the cache rounds them on the way. Without a cache they are rounded all the same, so
that a prediction does not depend on caching.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from anybit.quantizers.attachments import Attachment

if TYPE_CHECKING:
    from torch import Tensor

# what rounds: (attention module, states [batch, heads, length, head_dim]) -> states
Rounding = Callable[[Any, "Tensor"], "Tensor"]
ARGUMENTS = ("past_key_values", "past_key_value")


def cache_argument(attention: Any) -> tuple[str, int] | None:
    """(name, position) of the argument an attention class takes its cache by; None if it takes none."""
    return _cache_argument(attention)


@functools.lru_cache(maxsize=256)
def _cache_argument(attention: Any) -> tuple[str, int] | None:
    names = list(inspect.signature(attention.forward).parameters)[1:]
    return next(((name, names.index(name)) for name in ARGUMENTS if name in names), None)


def has_cache(module: Any) -> bool:
    """Whether a module is attention over keys and values that may be cached."""
    return "attention" in type(module).__name__.lower() and cache_argument(type(module)) is not None


class RoundedCache(Attachment):
    """Before an attention module: put the stand-in in the place of its cache."""

    def __init__(self, key: Rounding, value: Rounding):
        self.key, self.value = key, value

    def __call__(self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        found = cache_argument(type(module))
        assert found is not None
        name, position = found
        if position < len(arguments):
            own = _StandIn(arguments[position], module, self)
            return (*arguments[:position], own, *arguments[position + 1 :]), keywords
        return arguments, {**keywords, name: _StandIn(keywords.get(name), module, self)}


class _StandIn:
    """What attention sees instead of its cache: the cache, but for `update`."""

    def __init__(self, cache: Any, module: Any, rounded: RoundedCache):
        self._cache, self._module, self._rounded = cache, module, rounded

    def update(self, keys: Tensor, values: Tensor, *arguments: Any, **keywords: Any) -> Any:
        keys = straight(keys, self._rounded.key(self._module, keys))
        values = straight(values, self._rounded.value(self._module, values))
        return (keys, values) if self._cache is None else self._cache.update(keys, values, *arguments, **keywords)

    def get_seq_length(self, *arguments: Any) -> Any:
        return 0 if self._cache is None else self._cache.get_seq_length(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_cache"], name)


# --- queries -------------------------------------------------------------------------------------------------------------------

QUERIES = "anybit_rounded_queries"


class RoundedQueries(Attachment):
    """Around an attention module: round its queries just before they meet the keys.

    Attention asks its configuration for the function that computes it; while the module runs, that is one that rounds first.
    """

    def __init__(self, query: Rounding):
        self.query = query

    def __call__(self, module: Any, arguments: Any, *output: Any) -> None:
        if output:
            module.config = module.config.real if isinstance(module.config, _Config) else module.config
            return
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(QUERIES, _rounded_attention)
        module.config = _Config(module.config, self.query)


def attach_queries(module: Any, query: Rounding) -> None:
    """Round the queries of an attention module; its configuration is itself again afterwards, errors included."""
    hook = RoundedQueries(query)
    module.register_forward_pre_hook(hook)
    module.register_forward_hook(hook, always_call=True)


class _Config:
    """A module's configuration, but for the name of the attention function."""

    def __init__(self, real: Any, query: Rounding):
        self.real, self.query = real, query

    @property
    def _attn_implementation(self) -> str:
        return QUERIES

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)


def _rounded_attention(module: Any, query: Tensor, *arguments: Any, **keywords: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    query = straight(query, module.config.query(module, query))
    module.config = module.config.real
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attention: Any = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
    return attention(module, query, *arguments, **keywords)


def straight(before: Tensor, after: Tensor) -> Tensor:
    """`after`, with the gradient of `before`: rounding is passed straight through in training."""
    return after.detach() + (before - before.detach()) if before.requires_grad else after
