"""Some rows of a stored unit: where a checkpoint keeps one matrix that the model class has as several layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from anybit._lazy import torch
from anybit.errors import MissingTensor, NotRepresentable
from anybit.weight.layout import Layout
from anybit.weight.slicing import slice_rows
from anybit.weight.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RowCutLayout(Layout):
    """Rows from `start` on of the unit called `unit`, stored as `whole`.

    By itself the cut is known by the tensors of its own tree ("cut.0", "cut.1", ...), which is what a state dict holds; the
    checkpoint has the unit's. `read` makes a cut of them, `join` makes them of all cuts.
    """

    whole: Layout = field(kw_only=True)
    unit: str = field(kw_only=True)
    start: int = field(kw_only=True)

    @classmethod
    def of(cls, whole: Layout, unit: str, start: int, stop: int) -> RowCutLayout:
        """NotRepresentable, naming the unit, where a block of the format spans the cut."""
        made = cls((stop - start, *whole.shape[1:]), whole.dtype, whole=whole, unit=unit, start=start)
        try:
            for cut, own in zip(made.scheme().tensors, whole.scheme().tensors, strict=True):
                if sum(a != b for a, b in zip(cut.shape, own.shape, strict=True)) > 1:
                    raise NotRepresentable(f"a tensor {tuple(own.shape)} of it is not made of rows")
        except NotRepresentable as error:
            raise NotRepresentable(f"{unit} belongs to several layers of the model: {error}") from error
        return made

    def read(self, tensors: Mapping[str, Tensor]) -> Weight:
        """The cut, from the unit's stored tensors. The first one keeps what carries no number."""
        found = self.whole.decode(tensors)
        return replace(self._cut(found), extras=found.extras if self.start == 0 else {})

    @staticmethod
    def join(layouts: Sequence[RowCutLayout], weights: Sequence[Weight]) -> dict[str, Tensor]:
        """The unit's stored tensors, from all cuts of it in order."""
        whole = layouts[0].whole
        scheme = whole.scheme()
        pieces = zip(scheme.tensors, *(weight.tensors for weight in weights), strict=True)
        found = Weight.build(scheme.structure(), [_together(layouts[0].unit, *own) for own in pieces])
        return whole.encode(replace(found, extras=weights[0].extras))

    def _cut(self, whole: Weight) -> Weight:
        # the copy lets go of the unit
        return slice_rows(whole, self.start, self.start + self.shape[0]).map(lambda tensor: tensor.clone())

    def scheme(self) -> Weight:
        return self._cut(self.whole.scheme())

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in self.encode(self.scheme()).items()
        }

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        return {f"cut.{number}": tensor for number, tensor in enumerate(weight.tensors)}

    def decode(self, tensors: Mapping[str, Tensor]) -> Weight:
        scheme = self.scheme()
        found = []
        for number, expected in enumerate(scheme.tensors):
            name = f"cut.{number}"
            if name not in tensors:
                raise MissingTensor(f"tensor {name!r} of rows {self.start} and on of {self.unit} is not there")
            dtype = str(expected.dtype).removeprefix("torch.")
            found.append(self.take(tensors, name, dtype, tuple(expected.shape)))
        return Weight.build(scheme.structure(), found)


def _together(unit: str, whole: Tensor, *cuts: Tensor) -> Tensor:
    """One tensor of the unit, whose form `whole` has on the meta device: of all rows, or put together from those of the cuts."""
    if all(cut.shape == whole.shape for cut in cuts):
        if any(not torch.equal(cut, cuts[0]) for cut in cuts[1:]):
            raise NotRepresentable(
                f"layers that are stored as one, {unit}, have different numbers where it has the same for all of its rows"
            )
        return cuts[0]
    axis = next(axis for axis in range(whole.dim()) if cuts[0].shape[axis] != whole.shape[axis])
    return torch.cat(cuts, dim=axis)
