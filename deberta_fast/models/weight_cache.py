"""Caches values that depend only on weights, in inference, until the weights change.

torch counts writes into a tensor, but neither writes through ``.data`` nor those of fused optimizers. On a CPU every
lookup therefore compares the weights, bit by bit, with a copy of those that the value was made from, which is cheaper
than the product. On a GPU that comparison would synchronise: there a value is cached only if the user promises that
weights stay constant.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..op.backends.cpu import same_bits
from .padding import is_traced

Value = TypeVar("Value")


class WeightCache:
    """One value made from weights. Copies and pickles of it are empty.

    Attributes:
        constant: the promise that nobody writes weights through ``.data``. Weights are then not compared, and values
            are cached on every device. Writes that torch counts and steps of any optimizer still invalidate the value.
    """

    def __init__(self, constant: bool = False):
        self.constant = constant
        self._cached: tuple | None = None
        if constant:
            _optimizer_steps()

    def _accepts(self, weights: list[torch.Tensor]) -> bool:
        """Whether values of these weights may be cached: never for gradients, in a traced program, where a mode of
        torch may replace operators, or for tensor subclasses."""
        return not (
            torch.is_grad_enabled()
            or is_traced()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._len_torch_function_stack()
        ) and all(
            type(weight) in (torch.Tensor, nn.Parameter)
            and weight.layout == torch.strided
            # torch does not count writes into inference tensors
            and (not (weight.is_inference() or weight.is_meta) if self.constant else weight.is_cpu)
            for weight in weights
        )

    def get(self, weights: list[torch.Tensor | None], make: Callable[[], Value], settings: tuple = ()) -> Value | None:
        """Returns ``make()``, or its cached result for the same weights and settings; None if it must not be cached.

        Args:
            settings: everything besides the weights that the value depends on.
        """
        weights = [weight for weight in weights if weight is not None]
        if not self._accepts(weights):
            self.clear()
            return None
        state, cached = [settings, *_precision(weights[0].device.type)], self._cached
        if self.constant:
            state += [
                _optimizer_steps().total(),
                *((x.data_ptr(), x.dtype, x.shape, x.stride(), x._version) for x in weights),
            ]
        if cached is not None and cached[0] == state and (self.constant or all(map(same_bits, cached[1], weights))):
            return cached[2]
        if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return make()  # its memory belongs to the graph, and must not outlive it
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be cached
            # With the promise, the cache holds the weights themselves, so that no other tensor gets their address.
            # Without it, the copies are made first: a concurrent write makes the next comparison fail.
            compared = weights if self.constant else [weight.detach().clone() for weight in weights]
            value = make()
        self._cached = state, compared, value
        return value

    def clear(self) -> None:
        self._cached = None

    def __deepcopy__(self, memo: dict) -> "WeightCache":
        return WeightCache(self.constant)

    def __reduce__(self):
        return WeightCache, (self.constant,)


def _precision(device: str) -> tuple:
    """The settings that determine in which precision torch multiplies."""
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return autocast, torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@functools.cache
def _optimizer_steps() -> Counter:
    """Counts the steps of all optimizers of the process, because torch does not count writes of fused ones."""
    steps = Counter()
    register_optimizer_step_post_hook(lambda *_: steps.update(all=1))
    return steps
