"""Text generation that shows its words as they come and measures itself."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import TextStreamer

from anybit.engine.module_errors import input_device


@dataclass(frozen=True)
class Generated:
    """A continuation. `first_seconds`: until its first token, the prompt's forward pass included."""

    text: str
    tokens: int
    prompt_tokens: int
    seconds: float
    first_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first, so that the length of the prompt does not matter; None for a single token."""
        return (self.tokens - 1) / max(self.seconds - self.first_seconds, 1e-9) if self.tokens > 1 else None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


class _Streamer(TextStreamer):
    """Prints as tokens come, if asked, and notes when the first one came."""

    def __init__(self, tokenizer: Any, shown: bool):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.shown, self.calls, self.first = shown, 0, 0.0

    def put(self, value: Any) -> None:
        self.calls += 1  # the first call brings the prompt
        if self.calls == 2:
            self.first = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.shown:
            super().on_finalized_text(text, stream_end)


def continue_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    sampling: dict[str, Any],
    seed: int | None,
    stream: bool,
) -> Generated:
    """Generate after `prompt`; `stream` prints prompt and continuation on stdout as they come."""
    if seed is not None:
        torch.manual_seed(seed)
    encoded = tokenizer(prompt, return_tensors="pt").to(input_device(model))
    encoded.pop("token_type_ids", None)
    streamer = _Streamer(tokenizer, stream)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    begin = time.perf_counter()
    ids = model.generate(**encoded, max_new_tokens=max_new_tokens, streamer=streamer, pad_token_id=padding, **sampling)
    seconds = time.perf_counter() - begin
    prompt_tokens = encoded["input_ids"].shape[1]
    return Generated(
        text=tokenizer.decode(ids[0], skip_special_tokens=True),
        tokens=ids.shape[1] - prompt_tokens,
        prompt_tokens=prompt_tokens,
        seconds=seconds,
        first_seconds=max(streamer.first - begin, 0.0),
    )
