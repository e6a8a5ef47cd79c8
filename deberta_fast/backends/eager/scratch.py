"""Temporaries that are allocated once a call: fresh memory costs more to touch than most of the operations on it."""

import math

import torch


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
