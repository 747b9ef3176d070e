"""Running a model over calibration text block by block, so that algorithms see the inputs of the layers they quantize.

One decoder block's dense weights are in memory at a time, read from the checkpoint; the hidden states of all samples lie in
files, one batch in memory. Layers that share an input are quantized together, in the order in which they run, and later ones
see the outputs of the quantized earlier ones.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anybit import algorithms
from anybit._memory import give_back_free_memory
from anybit.engine.hidden_states import HiddenStates, Work
from anybit.engine.load import Prepared, use_packed_experts
from anybit.engine.materialize import load_plain, read_dense, set_tensor
from anybit.engine.plan import Entry
from anybit.errors import CheckpointError, ConfigError, InvalidOption, near_path

SAMPLES, LENGTH, SEED = 128, 512, 0


# --- text -> tokens ---------------------------------------------------------------------------------------------------------


def calibration_tokens(
    calibration: Any,
    tokenizer_folder: Path,
    *,
    samples: int = SAMPLES,
    length: int = LENGTH,
    seed: int = SEED,
    tokenizer: Any = None,
) -> Tensor:
    """int64 [samples, length] from text, a list of texts, a file or token ids.

    A .txt file is one text. A .jsonl file has objects with a "text", or with "messages" that the tokenizer's chat template turns
    into one; a .parquet file has a column "text".

    Texts are joined and cut into rows; `samples` of them are drawn, the same ones for the same `seed`. Fewer rows than asked
    for are taken as they are; less than one row is an error. `tokenizer`: another than the folder's, or a path to one.
    """
    if isinstance(calibration, Tensor):
        tokens = calibration.to(torch.int64)
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise InvalidOption(f"calibration token ids have the shape {tuple(tokens.shape)}; pass [samples, length]")
        return tokens
    texts = _texts(calibration)
    from transformers import AutoTokenizer

    if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
        folder = tokenizer_folder if tokenizer is None else tokenizer
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder} has no tokenizer that transformers can read ({str(error).splitlines()[0]}); pass token ids"
            ) from error
        tokenizer.model_max_length = 1 << 62  # whole texts are cut into rows below
    flat = torch.tensor(
        [token for text in texts for token in tokenizer(_said(text, tokenizer), add_special_tokens=False)["input_ids"]],
        dtype=torch.int64,
    )
    rows = len(flat) // length
    if rows == 0:
        raise InvalidOption(
            f"the calibration text has {len(flat)} tokens, less than one row of {length}. Give more text, or a smaller length"
        )
    matrix = flat[: rows * length].view(rows, length)
    chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    return matrix[chosen]


def _said(text: Any, tokenizer: Any) -> str:
    """A text as it is; the messages of a conversation as the model sees them."""
    if isinstance(text, str):
        return text
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidOption(
            "the calibration data are conversations, and the tokenizer has no chat template; give texts instead"
        )
    return str(tokenizer.apply_chat_template(text, tokenize=False))


def _texts(calibration: Any) -> list[Any]:
    """Texts, or conversations: lists of messages."""
    if isinstance(calibration, (str, os.PathLike)):
        if isinstance(calibration, os.PathLike) or os.path.isfile(calibration):  # a text is no name, however long
            return _file(Path(calibration))
        return [str(calibration)]
    if isinstance(calibration, Sequence) and calibration and all(isinstance(item, str) for item in calibration):
        return list(calibration)
    raise InvalidOption(
        f"calibration is {type(calibration).__name__}; pass text, a list of texts, a .txt, .jsonl or .parquet file, or token ids"
    )


def _file(path: Path) -> list[Any]:
    if not path.is_file():
        raise InvalidOption(f"the calibration file {path} does not exist{near_path(path)}")
    if path.suffix == ".jsonl":
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except ValueError as error:
            raise InvalidOption(f'{path} is not one JSON object with a "text" on each line: {error}') from error
        texts = [_of_row(row) for row in rows]
        if not texts or None in texts:
            raise InvalidOption(f'{path}: every line must be an object with a "text" or with "messages"')
        return texts
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet  # type: ignore[import-not-found]
        except ImportError as error:
            from anybit.errors import MissingDependency

            raise MissingDependency("reading .parquet calibration text", package="pyarrow", extra="datasets") from error
        return [str(text) for text in parquet.read_table(path, columns=["text"])["text"].to_pylist()]
    return [path.read_text(encoding="utf-8")]


def _of_row(row: Any) -> Any:
    """The text or the conversation of a line, None if it is neither."""
    text, messages = (row.get("text"), row.get("messages")) if isinstance(row, dict) else (None, None)
    if isinstance(text, str):
        return text
    if (
        isinstance(messages, list)
        and messages
        and all(isinstance(one, dict) and {"role", "content"} <= set(one) for one in messages)
    ):
        return messages
    return None


def rounding_options(quantizer: Any, name: str | None, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of the algorithm that rounds: the configuration's where it is the method's own, then those given."""
    own = name is not None and algorithms.steps(name).rounding == quantizer.calibrated_algorithm
    return {**(quantizer.calibration_options() if own else {}), **(given or {})}


# --- blocks -------------------------------------------------------------------------------------------------------------------


@dataclass
class Observed:
    """What calibration saw of one unit: second moment of its inputs float32 [in, in] (times 2 / tokens), and how many."""

    hessian: Tensor
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).to(torch.float32)
        total = self.tokens + x.shape[0]
        if x.shape[0]:
            self.hessian *= self.tokens / total
            self.hessian.addmm_(x.T, x, alpha=2 / total)
        self.tokens = total


# quantize(entry, what each expert or, under None, the layer saw) -> the dense weight that takes its place, as the model holds it
Quantize = Callable[[Entry, "Mapping[int | None, Observed] | None"], Tensor]
# fold(weights by parameter): rescales them, and what makes their inputs, in the loaded block
Fold = Callable[[Mapping[str, Entry]], None]
# train(weights by parameter, the dense block's outputs): quantizes them all, or refines them, and sets them in the loaded block
Train = Callable[[Mapping[str, Entry], Sequence[Tensor]], None]


class _Stop(Exception):
    pass


@dataclass
class Calibrator:
    """Drives a prepared model over tokens. `entries` of a block are handed to `quantize` in the order in which they run.

    `work`: where hidden states lie; those that an earlier run left there are gone on with.
    """

    ready: Prepared
    tokens: Tensor
    device: torch.device
    batch: int = 4
    work: Work = field(default_factory=Work)
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    reference: HiddenStates | None = None

    def __post_init__(self) -> None:
        self.model = self.ready.model
        self.prefix, self.blocks = find_blocks(self.model)
        self.entry_of = {entry.slot.parameter: entry for entry in self.ready.plan.entries}
        self._begun = False
        if any(entry.slot.kind == "experts" for entry in self.ready.plan.entries):
            use_packed_experts(self.model)  # its forward can be listened to

    def names(self, number: int) -> str:
        """Path of a block."""
        return f"{self.prefix}.{number}"

    def entries(self, number: int) -> list[Entry]:
        """Weights of one block."""
        start = self.names(number) + "."
        return [entry for entry in self.ready.plan.entries if entry.slot.parameter.startswith(start)]

    def begin(self, first: int = 0) -> None:
        """Everything before the blocks: what each is called with, for every batch, and the inputs of the first.

        `first`: the block to begin with, whose inputs are there already unless it is 0.
        """
        self._begun = True
        outside = [key for key in self.ready.names.state if not key.startswith(f"{self.prefix}.")]
        output = self.model.get_output_embeddings()
        heads = {f"{name}.weight" for name, module in self.model.named_modules() if module is output}
        for key in outside:
            if key not in heads and key not in self.ready.plan.tied:
                self._load(key)
        self._compute_buffers()

        caught: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
            caught.append(hidden)
            self.arguments.append((tuple(rest), kwargs))
            raise _Stop

        def inputs() -> Iterator[Tensor]:
            for start in range(0, len(self.tokens), self.batch):
                try:
                    with torch.no_grad():
                        self.model(input_ids=self.tokens[start : start + self.batch].to(self.device), use_cache=False)
                except _Stop:
                    yield caught.pop()
                    continue
                raise ConfigError(
                    f"{type(self.model).__name__} does not run its blocks {self.prefix}; it cannot be calibrated"
                )

        handle = self.blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            self.hidden = self.work.states(first, self.device)
            if first == 0:
                self.hidden.fill(inputs())
            else:
                reference = self.work.states(first, self.device, "reference")
                self.reference = reference if reference.there else None
                for _ in inputs():
                    pass
        finally:
            handle.remove()
        for key in outside:
            self._drop(key)

    def run(
        self,
        number: int,
        quantize: Quantize,
        *,
        fold: Fold | None = None,
        train: Train | None = None,
        refine: Train | None = None,
        observe: bool = True,
    ) -> float:
        """Calibrate and quantize one block, then move the samples on through its quantized form.

        `fold` comes first. With `train`, it does what else `quantize` is called for weight by weight; `refine` comes after all
        weights are quantized. `observe`: whether `quantize` is told what the weight's inputs were. Gives |y' - y| / |y - x| of
        the first batch: of the block's output before and after, and its input.
        """
        if not self._begun:
            self.begin(number)
        start = self.names(number) + "."
        for key in self.ready.names.state:
            if key.startswith(start):
                self._load(key)
        self._compute_buffers()
        wanted = {entry.slot.parameter: entry for entry in self.entries(number) if entry.action == "quantize"}
        before = next(self.forward(number)).float()
        if train is not None or refine is not None:
            outputs = self.work.states(number + 1, self.device, "reference")
            reference = outputs.fill(self.forward(number, self.reference))
        if fold is not None:
            fold(wanted)
        if train is not None:
            train(wanted, reference)
        else:
            for group in self._groups(number, wanted) if observe else [[entry] for entry in wanted.values()]:
                seen = self._observed(group) if observe else None
                if seen is not None:
                    self._observe(number, group[0], seen)  # one input, so one of the layers tells it for all
                for entry in group:
                    dense = quantize(entry, seen)
                    set_tensor(self.model, entry.slot.parameter, dense.to(self.ready.plan.dtype), self.device)
        if refine is not None:
            refine(wanted, reference)
        if train is not None or refine is not None:
            self.reference = reference
        lost = (next(self.forward(number)).float() - before).norm()
        error = float(lost / (before - self.hidden[0].float()).norm().clamp(min=1e-30))
        if number + 1 < len(self.blocks):
            self.hidden = self.work.states(number + 1, self.device).fill(self.forward(number))
        for key in self.ready.names.state:
            if key.startswith(start):
                self._drop(key)
        give_back_free_memory()
        return error

    def _observe(self, number: int, entry: Entry, seen: Mapping[int | None, Observed]) -> None:
        def add(entry: Entry, x: Tensor, expert: int | None) -> None:
            seen[expert].add(x)

        with listening(self.model, [entry], add):
            for _ in self.forward(number):
                pass

    def forward(self, number: int, inputs: Sequence[Tensor] | None = None) -> Iterator[Tensor]:
        """The block's outputs, batch by batch; of the samples as they are, or of these hidden states."""
        block = self.blocks[number]
        for hidden, (args, kwargs) in zip(self.hidden if inputs is None else inputs, self.arguments, strict=True):
            with torch.no_grad():
                out = block(hidden, *args, **kwargs)
            out = out[0] if isinstance(out, tuple) else out
            if not bool(torch.isfinite(out).all()):
                raise InvalidOption(
                    f"{self.names(number)} gives numbers that are not finite on the calibration text; use a wider dtype, "
                    "e.g. dtype='float32'"
                )
            yield out

    def _observed(self, group: list[Entry]) -> dict[int | None, Observed]:
        """A collector for each expert, or the one there is; layers of a group share them."""
        width = group[0].slot.shape[-1]
        stack = group[0].slot.kind == "experts"
        experts: Iterable[int | None] = range(group[0].slot.shape[0]) if stack else (None,)
        return {expert: Observed(torch.zeros(width, width, device=self.device)) for expert in experts}

    def _groups(self, number: int, wanted: dict[str, Entry]) -> list[list[Entry]]:
        """Layers with the same input, in the order in which they run; one that does not run comes last, by itself."""
        order: list[tuple[int, Entry]] = []
        alive: list[Tensor] = []  # so that no input's address is used again

        def note(entry: Entry, x: Tensor, expert: int | None) -> None:
            alive.append(x)
            order.append((x.data_ptr(), entry))

        with listening(self.model, wanted.values(), note):
            next(self.forward(number))
        groups: list[list[Entry]] = []
        done: set[str] = set()
        last = None
        for place, entry in order:
            if entry.slot.parameter in done:
                continue
            done.add(entry.slot.parameter)
            if place == last and entry.slot.kind != "experts":
                groups[-1].append(entry)
            else:
                groups.append([entry])
            last = place
        return groups + [[entry] for key, entry in wanted.items() if key not in done]

    def _load(self, key: str) -> None:
        plan, checkpoint = self.ready.plan, self.ready.checkpoint
        entry = self.entry_of.get(key)
        if entry is not None:
            set_tensor(self.model, key, read_dense(self.model, entry, plan, checkpoint), self.device)
        elif key in plan.plain:
            load_plain(self.model, key, plan, checkpoint, self.device)

    def _drop(self, key: str) -> None:
        tensor = self.model.get_parameter_or_buffer(key)
        set_tensor(self.model, key, torch.empty(tensor.shape, dtype=tensor.dtype), "meta")

    def _compute_buffers(self) -> None:
        """Buffers that no checkpoint stores, such as rotary frequencies, computed by the model class."""
        missing = False
        for name, module in self.model.named_modules():
            for own in module._non_persistent_buffers_set:
                buffer = module._buffers.get(own)
                if buffer is not None and buffer.device.type == "meta":
                    key = f"{name}.{own}" if name else own
                    set_tensor(self.model, key, torch.empty(buffer.shape, dtype=buffer.dtype), self.device)
                    missing = True
        if missing:
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                tensor._is_hf_initialized = True
            for _, module in self.model.named_modules():
                fresh = [
                    module._buffers[own]
                    for own in module._non_persistent_buffers_set
                    if module._buffers.get(own) is not None
                ]
                for buffer in fresh:
                    buffer._is_hf_initialized = False
            self.model.initialize_weights()


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The repeated blocks of a model: the list of modules with the most weights."""
    found: list[tuple[int, str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1:
            found.append((sum(parameter.numel() for parameter in module.parameters()), name, module))
    if not found:
        raise ConfigError(f"{type(model).__name__} has no repeated blocks to calibrate one after the other")
    _, name, blocks = max(found, key=lambda item: item[0])
    return name, blocks


# --- listening ----------------------------------------------------------------------------------------------------------------

# tell(entry, x [tokens, in], expert): the input of one product; `expert` is None outside of stacks
Tell = Callable[[Entry, Tensor, "int | None"], None]


@contextlib.contextmanager
def listening(model: nn.Module, entries: Iterable[Entry], tell: Tell) -> Iterator[None]:
    """Calls `tell` with the input of every product with one of the entries' weights."""
    handles: list[Any] = []
    observed: dict[str, Any] = {}
    for entry in entries:
        owner, _, own = entry.slot.module.rpartition(".")
        if entry.slot.kind == "experts":
            module: Any = model.get_submodule(owner)
            if owner not in observed:
                observed[owner] = module._anybit_observers = {}
            module._anybit_observers[own] = functools.partial(_each_expert, tell, entry)
        else:
            handles.append(
                model.get_submodule(entry.slot.module).register_forward_pre_hook(
                    lambda module, args, entry=entry: tell(entry, args[0].detach(), None)
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for owner in observed:
            del model.get_submodule(owner)._anybit_observers


def _each_expert(tell: Tell, entry: Entry, x: Tensor, ends: Tensor) -> None:
    """x is sorted by expert, expert e owning rows ends[e-1] .. ends[e]."""
    start = 0
    for expert, stop in enumerate(ends.tolist()):
        if stop > start:
            tell(entry, x[start:stop].detach(), expert)
        start = stop
