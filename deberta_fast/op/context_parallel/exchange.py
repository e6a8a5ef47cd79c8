"""Communication between the ranks of a process group, over torch.distributed.

Every function here is collective: all ranks of the group must call it, and in the same order. The gradient of what a
rank received goes back to the rank that sent it.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


@contextlib.contextmanager
def communicating(group: dist.ProcessGroup, what: str, device: torch.device):
    """Says in the error of a failed transfer which rank missed what, and for how long it waited.

    Raises:
        RuntimeError: the transfer failed, most often because another rank did.
    """
    start = time.perf_counter()
    try:
        yield
    except RuntimeError as error:
        waited, limit = time.perf_counter() - start, timeout_of(group, device)
        raise RuntimeError(
            f"rank {group.rank()} of {group.size()} got no {what} within {waited:.1f} s (timeout of the process group: "
            f"{limit}): another rank failed, ended or is late; its own error says why. {error}"
        ) from error


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> Any:
    """The timeout of a group's operations on a device, or "unknown"."""
    try:
        return group._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):  # a backend without this option, or none for the device
        return "unknown"


def agree(group: dist.ProcessGroup, check: Callable[[], Any]) -> list[Any]:
    """Returns what ``check`` returned on each rank, or raises on all ranks if it raised on one.

    No rank starts a transfer that another one, whose arguments are wrong, would not take part in. Synchronises.

    Raises:
        TypeError, ValueError, RuntimeError: what this rank's ``check`` raised.
        RuntimeError: that of another rank raised; the message names the rank and its error.
    """
    failure: Exception | None = None
    found = None
    try:
        found = check()
    except (TypeError, ValueError, RuntimeError) as error:
        failure = error
    mine = found, None if failure is None else f"{type(failure).__name__}: {failure}"
    everyones: list[Any] = [None] * group.size()
    with communicating(group, "description of the inputs", torch.device("cpu")):
        dist.all_gather_object(everyones, mine, group=group)
    if failure is not None:
        raise failure
    for rank, (_, message) in enumerate(everyones):
        if message is not None:
            raise RuntimeError(f"rank {rank} of {group.size()} failed: {message}")
    return [value for value, _ in everyones]


def require_equal(values: Sequence[Any], what: str) -> None:
    """Raises ValueError, on all ranks alike, unless all ranks have the same value."""
    if any(value != values[0] for value in values):
        listed = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
        raise ValueError(f"{what} must be the same on all ranks, got {listed}")


def exchange(rows: torch.Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup, what: str):
    """Sends each rank its share of ``rows`` and returns what all ranks sent to this one, in the order of ranks.

    Args:
        rows: (sum of sent, ...).
        sent, received: the number of rows to and from each rank.
        what: what the rows are, for the error of a failed transfer.

    Returns:
        (sum of received, ...), differentiable to any order.
    """
    return _Exchange.apply(rows, tuple(sent), tuple(received), group, what)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, sent, received, group, what):
        ctx.arguments = received, sent, group, f"gradient of {what}"
        rows, output = rows.contiguous(), rows.new_empty((sum(received), *rows.shape[1:]))
        with communicating(group, what, rows.device):
            dist.all_to_all_single(output, rows, list(received), list(sent), group=group)
        return output

    @staticmethod
    def backward(ctx, gradient):
        return _Exchange.apply(gradient, *ctx.arguments), None, None, None, None


def summed(x: torch.Tensor, group: dist.ProcessGroup, what: str) -> torch.Tensor:
    """Returns the sum of x over the ranks. Its gradient is the sum of the ranks' gradients."""
    return _Sum.apply(x, group, what)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, what):
        ctx.arguments = group, f"gradient of {what}"
        return all_reduced(x.clone(), group, what)

    @staticmethod
    def backward(ctx, gradient):
        return _Sum.apply(gradient, *ctx.arguments), None, None


def replicated(x: torch.Tensor, group: dist.ProcessGroup, what: str) -> torch.Tensor:
    """Returns x, which all ranks have. Its gradient is the sum of the ranks' gradients."""
    return _Replicated.apply(x, group, what)


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, what):
        ctx.group, ctx.what = group, what
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        exact = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        return all_reduced(exact.contiguous(), ctx.group, f"gradient of {ctx.what}").to(gradient.dtype), None, None


def all_reduced(x: torch.Tensor, group: dist.ProcessGroup, what: str) -> torch.Tensor:
    """Sums x over the ranks in place and returns it."""
    with communicating(group, what, x.device):
        dist.all_reduce(x, group=group)
    return x


class Transfers:
    """Point-to-point transfers under way: what this rank sends and receives in one step."""

    def __init__(self, group: dist.ProcessGroup, what: str):
        self.group, self.what = group, what
        self.received: dict[int, torch.Tensor] = {}
        self._operations: list[dist.P2POp] = []
        self._works: list[Any] = []

    def send(self, rank: int, rows: torch.Tensor) -> None:
        self._add(dist.isend, rows.contiguous(), rank)

    def receive(self, rank: int, like: torch.Tensor, shape: Sequence[int]) -> None:
        self.received[rank] = like.new_empty(shape)
        self._add(dist.irecv, self.received[rank], rank)

    def _add(self, operation: Callable, tensor: torch.Tensor, rank: int) -> None:
        if tensor.numel() > 0:
            self._operations.append(dist.P2POp(operation, tensor, group=self.group, group_peer=rank))

    def start(self) -> "Transfers":
        if self._operations:
            with communicating(self.group, self.what, self._operations[0].tensor.device):
                self._works = dist.batch_isend_irecv(self._operations)
        return self

    def wait(self) -> dict[int, torch.Tensor]:
        """Waits for all transfers and returns the received tensors by rank. On a GPU, only the stream waits."""
        for operation, work in zip(self._operations, self._works, strict=False):
            with communicating(self.group, f"{self.what} (rank {operation.group_peer})", operation.tensor.device):
                work.wait()
        self._operations, self._works = [], []
        received, self.received = self.received, {}
        return received

    def abandon(self) -> None:
        """Waits, after an error elsewhere, for what is still under way: a transfer that nobody waits for would disturb
        the group's next ones. Its own failure says less than that error and is not raised."""
        with contextlib.suppress(RuntimeError):
            self.wait()
