"""Training how a block's weights are rounded against what the dense block gives (AutoRound), and storing the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anybit.engine.block_weights import BlockWeights, stacked, target_of
from anybit.engine.materialize import assembled, oriented, set_tensor
from anybit.engine.plan import Entry, PlannedPart
from anybit.errors import AnybitError, located


def tuned(
    weights: BlockWeights,
    algorithm: Any,
    options: Mapping[str, Any],
    wanted: Mapping[str, Entry],
    reference: Sequence[Tensor],
) -> None:
    """Train the rounding of all weights of the block against its dense outputs, then store it."""
    block = weights.calibrator.blocks[weights.number]
    dtypes = {name: tensor.dtype for name, tensor in _tensors(block)}
    block.float()
    trained: dict[str, list[tuple[PlannedPart, list[Any]]]] = {}
    for key, entry in wanted.items():
        trained[key] = []
        for part, dense in weights.parts(entry):
            assert part.layout is not None
            known = {**part.layout.algorithm_options(), "symmetric": getattr(part.layout, "symmetric", False)}
            known = {name: value for name, value in known.items() if name in ("ranges", "symmetric")}
            target = target_of(part.layout)
            matrices = (
                [(dense, target)] if dense.dim() == 2 else [(own, target.select(n)) for n, own in enumerate(dense)]
            )
            try:
                trained[key].append((part, [algorithm.Rounding(own, scheme, **known) for own, scheme in matrices]))
            except AnybitError as error:
                raise located(error, part.prefix) from error.__cause__
    start = weights.calibrator.names(weights.number) + "."

    def values() -> dict[str, Tensor]:
        return {
            key.removeprefix(start): oriented(
                wanted[key], assembled((part, _joined([own.value() for own in roundings])) for part, roundings in parts)
            )
            for key, parts in trained.items()
        }

    inputs = _rows(weights.calibrator.hidden)
    outputs = _rows(reference)
    sizes = [len(batch) for batch in weights.calibrator.hidden]
    arguments = [(number, row) for number, size in enumerate(sizes) for row in range(size)]

    def loss(rows: Tensor) -> Tensor:
        overrides, total = values(), torch.zeros((), device=weights.calibrator.device)
        chosen: dict[int, list[int]] = {}
        for row in rows.tolist():
            chosen.setdefault(arguments[row][0], []).append(row)
        for number, own in chosen.items():
            places = [arguments[row][1] for row in own]
            args, kwargs = _float(_picked(weights.calibrator.arguments[number], sizes[number], places))
            hidden = torch.stack([inputs[row] for row in own]).float()
            out = torch.func.functional_call(block, overrides, (hidden, *args), kwargs)
            out = out[0] if isinstance(out, tuple) else out
            wanted_out = torch.stack([outputs[row] for row in own]).float()
            total = total + (out - wanted_out).pow(2).sum()
        return total / (len(rows) * outputs[0].numel())

    roundings = [rounding for parts in trained.values() for _, own in parts for rounding in own]
    history = list(algorithm.tune(roundings, loss, len(inputs), **options))
    for key, parts in trained.items():
        finished = []
        for part, own in parts:
            found = [rounding.weight() for rounding in own]
            made = found[0] if len(part.layout.shape) == 2 else stacked(found)  # type: ignore[union-attr]
            finished.append((part, weights.store(wanted[key], part, made)))
        entry = wanted[key]
        set_tensor(weights.ready.model, key, oriented(entry, assembled(finished)), weights.calibrator.device)
        weights.note(
            entry, f"trained for {len(history)} steps: error of the block {history[0]:.3g} -> {min(history):.3g}"
        )
        weights.explain(entry, None, 0, 0)
    for name, tensor in list(_tensors(block)):
        set_tensor(block, name, tensor.detach().to(dtypes[name]), weights.calibrator.device)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _joined(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values)


def _rows(batches: Sequence[Tensor]) -> list[Tensor]:
    return [row for batch in batches for row in batch]


def _picked(value: Any, size: int, rows: list[int]) -> Any:
    """Arguments of a batch, cut down to some of its rows; what all rows share stays."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 1 and value.shape[0] == size > 1 else value
    if isinstance(value, (tuple, list)):
        return type(value)(_picked(item, size, rows) for item in value)
    if isinstance(value, dict):
        return {name: _picked(item, size, rows) for name, item in value.items()}
    return value


def _float(value: Any) -> Any:
    """Floating-point tensors in float32, however deep."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_float(item) for item in value)
    if isinstance(value, dict):
        return {name: _float(item) for name, item in value.items()}
    return value
