"""From memory or a map of a file to an accelerator through a ring of pinned buffers.

A copy from pinned memory runs while the host fills the next buffer from the disk. A buffer is filled again only after its copy
has ended, so the host never holds more than the ring, and waits only when the link is slower than the disk.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from torch import Tensor

BUFFERS = 4
BUFFER_BYTES = 32 << 20
SMALL = 1 << 16  # bytes below which a buffer of its own is not worth the wait


class Link(Protocol):
    """What a ring needs of a device."""

    def buffer(self, size: int) -> Tensor:
        """Pinned bytes."""

    def start(self, target: Tensor, source: Tensor) -> Any:
        """Begin to copy; what `wait` takes."""

    def wait(self, copy: Any) -> None:
        """Until the copy has ended."""


class CudaLink:
    """Copies in the order of the device's current stream, which is also the one that computes."""

    def __init__(self, device: torch.device):
        self.device = device

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def start(self, target: Tensor, source: Tensor) -> Any:
        with torch.cuda.device(self.device):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return event

    def wait(self, copy: Any) -> None:
        copy.synchronize()


class Ring:
    """`put` moves tensors to the device, buffer after buffer."""

    def __init__(self, link: Link, device: torch.device, count: int = BUFFERS, size: int = BUFFER_BYTES):
        self.link, self.device, self.count, self.size = link, device, count, size
        self._buffers: list[Tensor] = []
        self._copies: list[Any] = []
        self._next = 0

    def put(self, tensor: Tensor) -> Tensor:
        """A tensor on the device with the numbers of `tensor`, which may go away once this returns."""
        if tensor.device.type != "cpu" or tensor.nbytes < SMALL:
            return tensor.to(self.device)
        source = tensor.detach().contiguous()
        found = torch.empty(source.shape, dtype=source.dtype, device=self.device)
        # flat first: numbers of any dtype are bytes
        outgoing, incoming = (part.reshape(-1).view(torch.uint8) for part in (source, found))
        for first in range(0, outgoing.numel(), self.size):
            piece = outgoing[first : first + self.size]
            place = self._free()
            buffer = self._buffers[place][: piece.numel()]
            buffer.copy_(piece)
            self._copies[place] = self.link.start(incoming[first : first + self.size], buffer)
        return found

    def _free(self) -> int:
        """The place of a buffer that nothing is copied from any more."""
        if len(self._buffers) < self.count:
            self._buffers.append(self.link.buffer(self.size))
            self._copies.append(None)
            return len(self._buffers) - 1
        place, self._next = self._next, (self._next + 1) % self.count
        if self._copies[place] is not None:
            self.link.wait(self._copies[place])
        return place


@functools.lru_cache(maxsize=8)
def _ring(device: torch.device) -> Ring:
    return Ring(CudaLink(device), device)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor.to(device)`, through a ring where there is one."""
    return _ring(device).put(tensor) if device.type == "cuda" else tensor.to(device)


def release() -> None:
    """Give the buffers back once nothing is loaded any more."""
    _ring.cache_clear()
