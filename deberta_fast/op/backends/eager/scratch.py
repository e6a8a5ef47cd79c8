"""Temporaries that are allocated once a call: fresh memory costs more to touch than most of the operations on it."""

import contextlib
import math
import threading
from collections.abc import Iterator

import torch

KEPT_BYTES = 1 << 26  # of temporaries, at most, that a thread keeps from one backward pass to the next


class Scratch:
    """Named buffers of one device and dtype. What a name held before is overwritten when it is asked for again."""

    def __init__(self, like: torch.Tensor, dtype: torch.dtype):
        self.empty = torch.empty(0, dtype=dtype, device=like.device)
        self.kept: dict[str, torch.Tensor] = {}
        self.zeroed: dict[str, tuple[int, ...]] = {}

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        """Contiguous, with any content."""
        size = math.prod(shape)
        if name not in self.kept or self.kept[name].numel() < size:
            with torch.inference_mode(False):  # it may outlive the mode it is first needed in
                self.kept[name] = self.empty.new_empty(size)
        return self.kept[name][:size].view(shape)

    def zeros(self, name: str, *shape: int) -> torch.Tensor:
        """Zeros, save in the cells that the caller overwrites each time it asks for this shape."""
        buffer = self(name, *shape)
        if self.zeroed.get(name) != shape:
            buffer.zero_()
            self.zeroed[name] = shape
        return buffer

    def matmul(self, name: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a (n, r, d) times b (n, d, c)."""
        return torch.bmm(a, b, out=self(name, a.shape[0], a.shape[1], b.shape[2]))


class _PerThread(threading.local):
    scratch: Scratch | None = None


_per_thread = _PerThread()


@contextlib.contextmanager
def kept_scratch(like: torch.Tensor, dtype: torch.dtype) -> Iterator[Scratch]:
    """Scratch memory that stays with the thread on a CPU, where malloc returns it to the system at each call's end."""
    if like.device.type != "cpu":
        yield Scratch(like, dtype)
        return
    scratch, _per_thread.scratch = _per_thread.scratch, None  # taken out: lost, not shared, if this fails or nests
    if scratch is None or scratch.empty.dtype != dtype:
        scratch = Scratch(like, dtype)
    yield scratch
    if sum(buffer.nbytes for buffer in scratch.kept.values()) <= KEPT_BYTES:
        _per_thread.scratch = scratch
