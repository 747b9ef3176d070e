"""The ring of buffers on the way to a device: bytes arrive, the ring stays bounded, no buffer is filled while it is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from anybit.engine import staging
from anybit.engine.staging import Ring


@dataclass
class LateLink:
    """A device whose copies happen only when somebody waits for them, or at the end: what was overwritten meanwhile is lost."""

    buffers: list[torch.Tensor] = field(default_factory=list)
    pending: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    waits: int = 0

    def buffer(self, size: int) -> torch.Tensor:
        self.buffers.append(torch.empty(size, dtype=torch.uint8))
        return self.buffers[-1]

    def start(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        self.pending.append((target, source))
        return self.pending[-1]

    def wait(self, copy: Any) -> None:
        self.waits += 1
        while self.pending:  # in order, up to the copy that is waited for
            target, source = self.pending.pop(0)
            target.copy_(source)
            if target is copy[0]:
                return

    def finish(self) -> None:
        for target, source in self.pending:
            target.copy_(source)
        self.pending.clear()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_bytes_arrive_and_the_ring_is_bounded(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "SMALL", 64)
    link = LateLink()
    ring = Ring(link, torch.device("cpu"), count=3, size=100)
    sent = [torch.randint(0, 100, (7, 5 * number + 13)).to(dtype) for number in range(12)] + [
        torch.zeros(3, dtype=dtype)
    ]
    arrived = [ring.put(tensor) for tensor in sent]
    assert len(link.buffers) == 3
    assert len(link.pending) <= 3
    pieces = sum(-(-tensor.nbytes // 100) for tensor in sent[:-1])
    assert link.waits == pieces - 3  # nobody waits as long as there is a buffer
    link.finish()
    for before, after in zip(sent, arrived, strict=True):
        assert (before.dtype, before.shape) == (after.dtype, after.shape)
        assert torch.equal(before.view(torch.uint8), after.view(torch.uint8))


def test_rows_that_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "SMALL", 1)
    link = LateLink()
    tensor = torch.arange(600.0).view(20, 30).t()
    found = Ring(link, torch.device("cpu"), count=2, size=64).put(tensor)
    link.finish()
    assert torch.equal(found, tensor)
