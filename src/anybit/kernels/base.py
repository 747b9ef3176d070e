"""What a kernel is: it accepts a weight or says why not, keeps it in a form of its own, and can always give it back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from anybit.weight import Weight


class Kernel(ABC):
    """A way to multiply with weights. Stateless: what it knows of a weight is a `spec` string and a list of tensors.

    The spec is part of compiled graphs, so it must not change once a weight is prepared.
    """

    name: ClassVar[str]
    rank: ClassVar[int] = 0  # among kernels that accept a weight, the highest rank is taken
    description: ClassVar[str] = ""

    def unavailable(self) -> str | None:
        """Why this kernel cannot run on this machine at all (not compiled, no such device), or None."""
        return None

    def concerns(self, device: torch.device) -> bool:
        """Whether a user of `device` wants to know why this kernel was not taken."""
        return True

    @abstractmethod
    def refuses(self, weight: Weight, device: torch.device) -> str | None:
        """Why this weight cannot be run on `device`, or None. `weight` may lie on the meta device."""

    @abstractmethod
    def prepare(self, weight: Weight) -> tuple[str, list[Tensor]]:
        """The kernel's own form of a weight: a spec and tensors on the weight's device."""

    @abstractmethod
    def restore(self, spec: str, tensors: list[Tensor]) -> Weight:
        """Exactly the weight that `prepare` was given, extras aside."""

    @abstractmethod
    def linear(self, x: Tensor, spec: str, tensors: list[Tensor], bias: Tensor | None) -> Tensor:
        """x [tokens, in] -> [tokens, out] in x's dtype, activation quantization and bias included."""

    def bound(self, spec: str, tensors: list[Tensor], bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        """`linear` for inputs [..., in] with all but the input settled; None: nothing is gained by it.

        It holds while the tensors and the bias stay where they are in memory, and keeps none of them alive.
        """
        return None

    def input_gradient(self, gradient: Tensor, spec: str, tensors: list[Tensor]) -> Tensor:
        """gradient [tokens, out] -> gradient @ W [tokens, in] in its dtype: activation quantization is passed straight."""
        from anybit.kernels.reference import gradient_through

        return gradient_through(self.restore(spec, tensors), gradient)

    def take_rows(self, index: Tensor, spec: str, tensors: list[Tensor]) -> Tensor:
        """Rows of the weight, float32 [len(index), in]: an embedding look-up."""
        return self.restore(spec, tensors).tree.take_rows(index)

    def experts(self, x: Tensor, ends: Tensor, spec: str, tensors: list[Tensor]) -> Tensor:
        """Product of a stack. x [rows, in] sorted by expert, expert e owning rows ends[e-1] .. ends[e] -> [rows, out]."""
        from anybit.kernels.reference import each_expert

        return each_expert(self.restore(spec, tensors), x, ends)

    def __deepcopy__(self, memo: dict[int, object]) -> Kernel:
        return self

    def __reduce__(self) -> tuple[object, tuple[str]]:
        from anybit.kernels.registry import get

        return get, (self.name,)
