"""The variants that benchmarks compare: their names, descriptions and builders. The scripts choose among them.

operator   the attention operator, from query, key, value and position tables
layer      one DeBERTa-v3-base attention module, or whole encoder layers, from hidden states
model      whole models, from token ids
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend

from ..device import Call

# torch's scaled_dot_product_attention, by kernel
PLAIN = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

Forward = Callable[[], torch.Tensor]


class Entry(NamedTuple):
    """A variant: its description, what builds it from a workload, and whether it suits the workload."""

    about: str
    build: Callable
    suits: Callable[..., bool] = lambda *_: True


def described(entries: dict[str, Entry], names: Iterable[str] | None = None) -> str:
    """Describes variants for the notes of a table."""
    groups: dict[str, list[str]] = {}
    for name in names or entries:
        groups.setdefault(entries[name].about, []).append(name)
    return "".join(f" {', '.join(group)}: {about}." for about, group in groups.items())


def call_of(forward: Forward, passes: str, gradient: torch.Tensor, leaves: Iterable[torch.Tensor] = ()) -> Call:
    """Makes the call of a pass; before it the gradients of ``leaves`` are dropped, untimed.

    Args:
        passes: "forward", without gradients; "forward+backward"; or "backward", after an untimed forward pass.
        gradient: of the output.
    """

    def reset():
        for leaf in leaves:
            leaf.grad = None

    def without_gradients():
        with torch.no_grad():
            return forward()

    if passes == "forward":
        return Call(without_gradients)
    if passes == "forward+backward":
        return Call(lambda: forward().backward(gradient), reset)
    output = forward()
    return Call(lambda: output.backward(gradient, retain_graph=True), reset)
