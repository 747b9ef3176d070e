"""Training a block's weights against what the dense block gives, and storing the result: how they are rounded (AutoRound), or
what is continuous in rounded ones (finetune).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anybit.engine.block_weights import BlockWeights, stacked, target_of
from anybit.engine.materialize import assembled, oriented, set_tensor
from anybit.engine.plan import Entry, PlannedPart
from anybit.errors import AnybitError, located
from anybit.weight import Weight


class _Training:
    """A block in float32 whose error, for weights of one's choice, has gradients; as it was before when the context ends."""

    def __init__(self, weights: BlockWeights, reference: Sequence[Tensor]):
        self.weights, calibrator = weights, weights.calibrator
        self.block = calibrator.blocks[weights.number]
        self.start = calibrator.names(weights.number) + "."
        self.inputs, self.outputs = _rows(calibrator.hidden), _rows(reference)
        self.sizes = [len(batch) for batch in calibrator.hidden]
        self.places = [(number, row) for number, size in enumerate(self.sizes) for row in range(size)]

    def __enter__(self) -> _Training:
        self.dtypes = {name: tensor.dtype for name, tensor in _tensors(self.block)}
        self.block.float()
        return self

    def __exit__(self, *_: object) -> None:
        for name, tensor in list(_tensors(self.block)):
            set_tensor(self.block, name, tensor.detach().to(self.dtypes[name]), self.weights.calibrator.device)

    def loss(self, values: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """Mean squared error of these samples' outputs, with `values` by parameter in place of the block's own."""
        calibrator = self.weights.calibrator
        overrides = {key.removeprefix(self.start): value for key, value in values.items()}
        total = torch.zeros((), device=calibrator.device)
        chosen: dict[int, list[int]] = {}
        for row in rows.tolist():
            chosen.setdefault(self.places[row][0], []).append(row)
        for number, own in chosen.items():
            within = [self.places[row][1] for row in own]
            args, kwargs = _float(_picked(calibrator.arguments[number], self.sizes[number], within))
            hidden = torch.stack([self.inputs[row] for row in own]).float()
            out = torch.func.functional_call(self.block, overrides, (hidden, *args), kwargs)
            out = out[0] if isinstance(out, tuple) else out
            wanted = torch.stack([self.outputs[row] for row in own]).float()
            total = total + (out - wanted).pow(2).sum()
        return total / (len(rows) * self.outputs[0].numel())


def tuned(
    weights: BlockWeights,
    algorithm: Any,
    options: Mapping[str, Any],
    wanted: Mapping[str, Entry],
    reference: Sequence[Tensor],
) -> None:
    """Train the rounding of all weights of the block against its dense outputs, then store it."""
    trained: dict[str, list[tuple[PlannedPart, list[Any]]]] = {}
    with _Training(weights, reference) as training:
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

        def loss(rows: Tensor) -> Tensor:
            return training.loss(
                {
                    key: oriented(
                        wanted[key],
                        assembled((part, _joined([own.value() for own in roundings])) for part, roundings in parts),
                    )
                    for key, parts in trained.items()
                },
                rows,
            )

        roundings = [rounding for parts in trained.values() for _, own in parts for rounding in own]
        history = list(algorithm.tune(roundings, loss, len(training.inputs), **options))
        for key, parts in trained.items():
            finished = []
            entry = wanted[key]
            for (part, own), (_, dense) in zip(parts, weights.parts(entry), strict=True):
                finished.append((part, weights.store(entry, part, _finished(weights, entry, part, own, dense))))
            set_tensor(weights.ready.model, key, oriented(entry, assembled(finished)), weights.calibrator.device)
            weights.note(
                entry, f"trained for {len(history)} steps: error of the block {history[0]:.3g} -> {min(history):.3g}"
            )
            weights.explain(entry, None, 0, 0)


def _finished(weights: BlockWeights, entry: Entry, part: PlannedPart, own: list[Any], dense: Tensor) -> Weight:
    """A unit as it was trained; of experts that too few tokens reached, as it is without data."""
    assert part.layout is not None
    can_be_rounded = part.layout.algorithm is not None
    if dense.dim() == 2:
        cold = can_be_rounded and weights.is_cold(entry, part.index[0])
        return weights.nearest(part, dense) if cold else own[0].weight()
    numbers = [number for number in range(len(own)) if can_be_rounded and weights.is_cold(entry, number)]
    nearest = weights.nearest(part, dense) if numbers else None
    made = [
        nearest.select(number) if nearest is not None and number in numbers else rounding.weight()
        for number, rounding in enumerate(own)
    ]
    return stacked(made)


def refined(
    weights: BlockWeights,
    algorithm: Any,
    options: Mapping[str, Any],
    wanted: Mapping[str, Entry],
    rounded: Mapping[str, list[tuple[PlannedPart, Weight]]],
    reference: Sequence[Tensor],
) -> None:
    """Train what is continuous in the block's `rounded` weights (by parameter) against its dense outputs, and store it anew."""
    trained: dict[str, list[tuple[PlannedPart, Any]]] = {}
    for key, units in rounded.items():
        trained[key] = []
        for part, weight in units:
            assert part.layout is not None
            fixed = (
                "grid" in part.layout.algorithm_options()
            )  # the layout gives the table, and finds no other in its files
            try:
                trained[key].append((part, algorithm.Tuned(weight, fixed)))
            except AnybitError as error:
                raise located(error, part.prefix) from error.__cause__
    with _Training(weights, reference) as training:

        def loss(rows: Tensor) -> Tensor:
            return training.loss(
                {
                    key: oriented(wanted[key], assembled((part, own.value()) for part, own in parts))
                    for key, parts in trained.items()
                },
                rows,
            )

        every = [own for parts in trained.values() for _, own in parts]
        before, after = algorithm.refine(every, loss, len(training.inputs), **options)
        for key, parts in trained.items():
            entry = wanted[key]
            finished = [(part, weights.store(entry, part, own.finished())) for part, own in parts]
            set_tensor(weights.ready.model, key, oriented(entry, assembled(finished)), weights.calibrator.device)
            entry.reason = f"{entry.reason}; trained: error of the block {before:.3g} -> {after:.3g}"


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
