"""Temporaries that are allocated once per call: to touch fresh memory costs more than most of the operations on it."""

import math

import torch


class Scratch:
    """Named buffers of one device and dtype. Asking for a name again overwrites what it held."""

    def __init__(self, like: torch.Tensor, dtype: torch.dtype):
        self.empty = torch.empty(0, dtype=dtype, device=like.device)
        self.buffers: dict[str, torch.Tensor] = {}
        self.zeroed: dict[str, tuple[int, ...]] = {}

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        """Returns a contiguous buffer with any content."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.empty.new_empty(size)
        return self.buffers[name][:size].view(shape)

    def zeros(self, name: str, *shape: int) -> torch.Tensor:
        """Returns zeros, except in the cells that the caller overwrites each time it asks for this shape."""
        buffer = self(name, *shape)
        if self.zeroed.get(name) != shape:
            buffer.zero_()
            self.zeroed[name] = shape
        return buffer

    def matmul(self, name: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Returns a (n, r, d) times b (n, d, c)."""
        return torch.bmm(a, b, out=self(name, a.shape[0], a.shape[1], b.shape[2]))
