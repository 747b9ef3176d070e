"""How well a model predicts a text, and how far it is from a reference: perplexity, KL, top-1 agreement, errors per module.

The text becomes tokens once, whole. They are cut into windows of `context` positions: one lead-in position, which is BOS where
the tokenizer uses it and the token before the window where it does not, and `context - 1` tokens behind it:

    position     0      1   2   3  ...  context-1
    window 0   [lead]   t0  t1  t2 ...                 all tokens scored
    window 1   [lead]   begins `stride` tokens later   only tokens that no earlier window scored

Every token is scored exactly once, from the position before it. Logits of one batch of windows exist at a time.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anybit.engine.module_errors import ModuleError, explain_nan, input_device, input_embeddings, module_errors
from anybit.errors import ConfigError, InvalidOption, near_path
from anybit.weight.weight import row_chunks

Progress = Callable[[str, int, int], None]  # (what, windows done, windows in all)

# a default for models that take very long inputs; published perplexities use it too
LONGEST_DEFAULT_CONTEXT = 2048
# log-probabilities are float32 copies of this many logits at a time (16 MB)
LOGITS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. `loss`: nats per token; `kl`: KL(reference || model), nats per token, mean and worst token.

    `top1`: share of tokens where model and reference find the same one most likely. `tokens_per_second`: positions that went
    through the model per second of its own forward passes; the first, a warm-up, does not count where there are several.
    `bits_per_byte` compares across tokenizers, perplexity does not.
    """

    perplexity: float
    loss: float
    tokens: int
    windows: int
    tokens_per_second: float
    seconds: float
    protocol: str
    bits_per_byte: float | None = None
    reference_perplexity: float | None = None
    kl: float | None = None
    kl_max: float | None = None
    top1: float | None = None
    modules: tuple[ModuleError, ...] = ()

    @property
    def weight_error(self) -> float | None:
        """Relative Frobenius error of all packed weights together."""
        if not self.modules:
            return None
        signal = math.fsum(module.signal for module in self.modules)
        noise = math.fsum(module.noise for module in self.modules)
        return math.sqrt(noise / signal) if signal > 0 else None

    def to_dict(self) -> dict[str, Any]:
        own = {name: value for name, value in self.__dict__.items() if name != "modules"}
        return {**own, "weight_error": self.weight_error, "modules": [module.to_dict() for module in self.modules]}


def evaluate(
    model_or_path: nn.Module | str | os.PathLike[str],
    text: str | os.PathLike[str] | Tensor | Sequence[int],
    *,
    reference: nn.Module | str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    context: int | None = None,
    stride: int | None = None,
    bos: bool | None = None,
    batch_size: int = 1,
    max_tokens: int | None = None,
    per_module: bool = False,
    device_map: Any = None,
    dtype: torch.dtype | str = "auto",
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of a causal language model on a text, and its distance from a reference model.

    `text`: a string, a text file, or token ids. `context`: positions per window (default: what the model takes, at most
    2048); `stride`: new tokens per window (default context - 1: no overlap); `bos`: whether each window begins with BOS
    (default: whether the tokenizer does so itself). `max_tokens`: only the text's first tokens. `per_module` adds weight and
    output errors of every packed module and needs a reference. `device_map` and `dtype` are for models given as paths.
    """
    if per_module and reference is None:
        raise InvalidOption(
            "per_module compares with a reference's weights and outputs; pass reference=, e.g. the dense checkpoint"
        )
    if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
        raise InvalidOption(f"batch_size ({batch_size}) and max_tokens ({max_tokens}) must be at least 1")
    tokenizer = tokenizer if tokenizer is not None or _are_ids(text) else find_tokenizer(model_or_path, reference)
    tokens = tokenize(text, tokenizer, max_tokens, bos)
    model = _loaded(model_or_path, device_map, dtype, "model", progress)
    other = _loaded(reference, device_map, dtype, "reference", progress) if reference is not None else None
    plan = _plan_windows(tokens, model, other, context, stride)

    was_training = [(one, one.training) for one in (model, other) if one is not None]
    for one, _ in was_training:
        one.eval()
    try:
        with torch.no_grad():
            sums = _run(model, other, tokens, plan, batch_size, progress)
            errors = (
                module_errors(model, other, plan.rows(tokens), progress) if per_module and other is not None else ()
            )
    finally:
        for one, training in was_training:
            one.train(training)
    loss = sums.loss / sums.tokens
    protocol = plan.describe(tokens) + f"; logits {sums.logits_dtype} on {sums.device}, log-probabilities float32"
    if errors:
        protocol += f"; output errors on the reference's activations in the first {min(plan.count, plan.module_windows)} windows"
    return Evaluation(
        perplexity=_exp(loss),
        loss=loss,
        tokens=sums.tokens,
        windows=plan.count,
        tokens_per_second=sums.speed,
        seconds=sums.seconds,
        protocol=protocol,
        bits_per_byte=sums.loss / math.log(2) / tokens.scored_bytes if tokens.scored_bytes else None,
        reference_perplexity=_exp(sums.reference_loss / sums.tokens) if other is not None else None,
        kl=sums.kl / sums.tokens if other is not None else None,
        kl_max=sums.kl_max if other is not None else None,
        top1=sums.agreed / sums.tokens if other is not None else None,
        modules=tuple(errors),
    )


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


# --- text to tokens -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """A text as ids [n]. With `bos`, every window begins with that id; without, the first token is never scored."""

    ids: Tensor
    bos: int | None
    bos_text: str = ""
    scored_bytes: int | None = None

    @property
    def targets(self) -> Tensor:
        return self.ids if self.bos is not None else self.ids[1:]

    def row(self, start: int, stop: int) -> Tensor:
        """Input ids of the window over targets [start, stop): the lead-in position and the targets."""
        if self.bos is None:
            return self.ids[start : stop + 1]
        return torch.cat([torch.tensor([self.bos]), self.ids[start:stop]])


def _are_ids(text: Any) -> bool:
    return isinstance(text, Tensor) or (isinstance(text, Sequence) and not isinstance(text, str))


def tokenize(text: Any, tokenizer: Any, max_tokens: int | None = None, bos: bool | None = None) -> Tokens:
    """Token ids of a string, a file or ids; InvalidOption when there is nothing to score."""
    begin = _bos_of(tokenizer, bos)
    bos_text = str(tokenizer.convert_ids_to_tokens(begin)) if begin is not None else ""
    if _are_ids(text):
        ids = torch.as_tensor(text)
        if ids.dim() == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise InvalidOption(
                f"token ids are {ids.dtype} {tuple(ids.shape)}; evaluate takes integers [tokens] or [1, tokens]"
            )
        return _enough(Tokens(ids.to("cpu", torch.int64)[:max_tokens], begin, bos_text), f"{ids.numel()} token ids")
    words, source = read_text(text)
    # tokens are rarely longer than 16 characters on average, so a long text need not be tokenized for its first few tokens
    head = words if max_tokens is None else words[: 64 * max_tokens + 1024]
    encoded = tokenizer(head, add_special_tokens=False, return_offsets_mapping=bool(tokenizer.is_fast), verbose=False)
    if max_tokens is not None and len(encoded["input_ids"]) < max_tokens and len(head) < len(words):
        head = words
        encoded = tokenizer(
            head, add_special_tokens=False, return_offsets_mapping=bool(tokenizer.is_fast), verbose=False
        )
    ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)[:max_tokens]
    offsets, scored_bytes = encoded.get("offset_mapping"), None
    if offsets and ids.numel():
        first = 0 if begin is not None or ids.numel() < 2 else offsets[1][0]
        scored_bytes = len(head[first : offsets[ids.numel() - 1][1]].encode())
    return _enough(Tokens(ids, begin, bos_text, scored_bytes), source)


def read_text(text: str | os.PathLike[str]) -> tuple[str, str]:
    """The text itself and how to name it in a message. A one-line string that names a file is that file."""
    if isinstance(text, str) and ("\n" in text or len(text) > 1024 or not os.path.isfile(text)):
        shown = text if len(text) <= 40 else text[:37] + "..."
        return text, f"the text {shown!r} ({len(text)} characters, and no file of that name)"
    path = Path(text)
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read(), f"{path} ({path.stat().st_size} bytes)"
    except UnicodeDecodeError as error:
        raise InvalidOption(
            f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8"
        ) from error
    except OSError as error:
        raise InvalidOption(f"{path} cannot be read as a text file: {error.strerror}{near_path(path)}") from error


def _bos_of(tokenizer: Any, wanted: bool | None) -> int | None:
    """The id each window begins with: what the tokenizer puts first by itself, or its BOS when asked for."""
    if tokenizer is None:
        own = None
    else:
        plain, special = (list(tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (False, True))
        # not only `bos_token_id`: some tokenizers put a token first without naming it
        own = special[0] if special[:1] != plain[:1] else getattr(tokenizer, "bos_token_id", None) if wanted else None
    if wanted is None:
        return own
    if wanted and own is None:
        raise InvalidOption(
            "bos=True, but there is no tokenizer or it has no BOS token; pass a tokenizer that has one, or bos=False"
        )
    return own if wanted else None


def _enough(tokens: Tokens, source: str) -> Tokens:
    if tokens.targets.numel() < 1 or tokens.ids.numel() < 2:
        raise InvalidOption(
            f"{source} has {tokens.ids.numel()} tokens: too short to evaluate on. Give at least two, better some thousands"
        )
    return tokens


def find_tokenizer(*sources: Any) -> Any:
    """The tokenizer beside the first of these models or paths that has one; InvalidOption when none has."""
    from anybit.engine.source import locate, read_tokenizer

    tried = []
    for source in sources:
        if isinstance(source, nn.Module):
            plan = getattr(source, "anybit_plan", None)
            source = plan.path if plan is not None else getattr(getattr(source, "config", None), "_name_or_path", None)
        if not source:
            continue
        location = locate(source)
        try:
            return read_tokenizer(location)
        except (OSError, ValueError, KeyError, TypeError) as error:
            tried.append(f"{location}: {str(error).splitlines()[0]}")
    raise InvalidOption(
        "no tokenizer was found"
        + "".join(f"; {line}" for line in tried)
        + ". Pass tokenizer=, or token ids instead of a text"
    )


# --- windows --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """Windows over `targets` target tokens; see the picture at the top."""

    targets: int
    context: int
    stride: int

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """(start, stop, first): targets [start, stop) lie in the window, [first, stop) are scored there."""
        start = scored = 0
        while scored < self.targets:
            stop = min(start + self.context - 1, self.targets)
            yield start, stop, scored
            scored, start = stop, start + self.stride

    @property
    def count(self) -> int:
        return 1 + max(0, math.ceil((self.targets - (self.context - 1)) / self.stride))

    @property
    def module_windows(self) -> int:
        """Output errors converge fast; about 4096 positions are enough."""
        return max(1, 4096 // self.context)

    def rows(self, tokens: Tokens) -> Iterator[Tensor]:
        """Input ids of the windows that output errors are measured on."""
        for number, (start, stop, _) in enumerate(self):
            if number == self.module_windows:
                return
            yield tokens.row(start, stop)

    def describe(self, tokens: Tokens) -> str:
        lead = (
            f"{tokens.bos_text or tokens.bos} first" if tokens.bos is not None else "no BOS, the token before it first"
        )
        every = "every token" if tokens.bos is not None else "every token but the first"
        return (
            f"{self.targets} tokens scored, {self.count} windows of {self.context} positions, stride {self.stride}; "
            f"each window by itself with {lead}; {every} scored once"
        )


def _plan_windows(
    tokens: Tokens, model: nn.Module, other: nn.Module | None, context: int | None, stride: int | None
) -> Windows:
    models = [one for one in (model, other) if one is not None]
    for one in models:
        can: Any = getattr(one, "can_generate", None)
        if (can is not None and not can()) or getattr(getattr(one, "config", None), "is_encoder_decoder", False):
            raise InvalidOption(f"{type(one).__name__} predicts no next token; evaluate takes causal language models")
        embeddings = input_embeddings(one)
        rows = getattr(embeddings, "num_embeddings", None)
        largest = int(tokens.ids.max())
        if (rows is not None and largest >= rows) or int(tokens.ids.min()) < 0:
            raise InvalidOption(
                f"token ids run from {int(tokens.ids.min())} to {largest}, but {type(one).__name__} has a vocabulary of {rows}; "
                "use the tokenizer that belongs to the model"
            )
    limits = [limit for limit in map(_longest_input, models) if limit is not None]
    if context is None:
        context = min([*limits, LONGEST_DEFAULT_CONTEXT])
    if context < 2 or (limits and context > min(limits)):
        raise InvalidOption(
            f"context is {context}; it must lie between 2 and what the model takes ({min(limits, default='any')})"
        )
    if stride is None:
        stride = context - 1
    if not 1 <= stride < context:
        raise InvalidOption(f"stride is {stride}; it must lie between 1 and context - 1 ({context - 1})")
    return Windows(tokens.targets.numel(), context, stride)


def _longest_input(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if found else None


# --- the measurement --------------------------------------------------------------------------------------------------------


@dataclass
class _Sums:
    tokens: int = 0
    passes: list[tuple[int, float]] = field(default_factory=list)  # positions, seconds
    loss: float = 0.0
    reference_loss: float = 0.0
    kl: float = 0.0
    kl_max: float = 0.0
    agreed: int = 0
    logits_dtype: str = ""
    device: str = ""

    @property
    def seconds(self) -> float:
        return math.fsum(seconds for _, seconds in self.passes)

    @property
    def speed(self) -> float:
        counted = self.passes[1:] or self.passes
        return sum(positions for positions, _ in counted) / max(math.fsum(seconds for _, seconds in counted), 1e-9)


def _run(
    model: nn.Module, other: nn.Module | None, tokens: Tokens, plan: Windows, batch_size: int, progress: Progress | None
) -> _Sums:
    sums, done = _Sums(), 0
    targets = tokens.targets
    for batch in _batches(plan, batch_size):
        ids = torch.stack([tokens.row(start, stop) for start, stop, _ in batch])
        logits, seconds = _logits(model, ids, "the model")
        sums.passes.append((ids.numel(), seconds))
        sums.logits_dtype, sums.device = str(logits.dtype).removeprefix("torch."), str(logits.device)
        expected = _logits(other, ids, "the reference model")[0] if other is not None else None
        if expected is not None and expected.shape != logits.shape:
            raise InvalidOption(
                f"the model has a vocabulary of {logits.shape[-1]}, the reference one of {expected.shape[-1]}: "
                "they cannot be compared. The reference must be the checkpoint the model was made from"
            )
        for number, (start, stop, first) in enumerate(batch):
            # position p predicts target start + p
            scored = slice(first - start, stop - start)
            own = expected[number, scored] if expected is not None else None
            clean = _score(logits[number, scored], targets[first:stop], own, sums)
            if clean != "":
                raise explain_nan(model if clean == "the model" else other, ids[number : number + 1], clean)  # type: ignore[arg-type]
        done += len(batch)
        if progress is not None:
            progress("evaluate", done, plan.count)
    return sums


def _batches(plan: Windows, size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Windows of equal length together, so that nothing has to be padded."""
    batch: list[tuple[int, int, int]] = []
    for window in plan:
        if batch and (len(batch) == size or window[1] - window[0] != batch[0][1] - batch[0][0]):
            yield batch
            batch = []
        batch.append(window)
    yield batch


def _logits(model: nn.Module, ids: Tensor, who: str) -> tuple[Tensor, float]:
    """Logits [windows, positions, vocabulary] and the seconds of the forward pass."""
    ids = ids.to(input_device(model))
    _wait()
    begin = time.perf_counter()
    output = model(input_ids=ids, use_cache=False)
    _wait()
    seconds = time.perf_counter() - begin
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise InvalidOption(
            f"{who} ({type(model).__name__}) returns no next-token logits; evaluate takes causal language models"
        )
    return logits, seconds


def _score(logits: Tensor, targets: Tensor, expected: Tensor | None, sums: _Sums) -> str:
    """Add what [positions, vocabulary] logits say about their targets. Returns whose logits are not numbers, or ""."""
    for start, stop in row_chunks(logits.shape[0], logits.shape[1], LOGITS_AT_ONCE):
        probable = logits[start:stop].to(torch.float32).log_softmax(-1)
        if bool(probable.isnan().any()):
            return "the model"
        place = targets[start:stop].to(logits.device)[:, None]
        sums.loss -= float(probable.gather(1, place).sum(dtype=torch.float64))
        sums.tokens += stop - start
        if expected is None:
            continue
        wanted = expected[start:stop].to(logits.device, torch.float32).log_softmax(-1)
        if bool(wanted.isnan().any()):
            return "the reference model"
        sums.reference_loss -= float(wanted.gather(1, place).sum(dtype=torch.float64))
        sums.agreed += int((wanted.argmax(-1) == probable.argmax(-1)).sum())
        # a token that the reference excludes (logit -inf) contributes nothing
        terms = (wanted.exp() * (wanted - probable)).masked_fill(wanted.isneginf(), 0.0)
        each = terms.sum(-1, dtype=torch.float64)
        sums.kl += float(each.sum())
        sums.kl_max = max(sums.kl_max, float(each.max()))
    return ""


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _loaded(source: Any, device_map: Any, dtype: torch.dtype | str, what: str, progress: Progress | None) -> nn.Module:
    if isinstance(source, nn.Module):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(f"the {what} is a {type(source).__name__}; pass a loaded model, a folder or a hub id")
    from anybit.engine.load import load

    def report(name: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"load {what}", done, total)

    options: Mapping[str, Any] = {"device_map": device_map, "dtype": dtype}
    return load(source, progress=report, **options)
