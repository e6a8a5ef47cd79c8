"""Caches values that depend only on weights, in inference, until the weights change.

torch counts writes into a tensor, but not writes through ``.data`` or those of fused optimizers. On a CPU, every lookup
therefore compares the weights bit by bit with a copy of the weights that the value was made from. This takes less time
than making the value again. On a GPU the comparison would synchronise, so a value is cached there only if the user
promises that weights stay constant.
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
        constant: the user's promise that weights are not written through ``.data``. Weights are then not compared, and
            values are cached on every device. Writes that torch counts, and steps of any optimizer, still invalidate
            the value.
    """

    def __init__(self, constant: bool = False):
        self.constant = constant
        self._cached: tuple | None = None  # the state of weights and settings, the weights or copies, the value
        if constant:
            _optimizer_steps()

    def _accepts(self, weights: list[torch.Tensor]) -> bool:
        """Whether values made from these weights may be cached. They may not if gradients are enabled, a program is
        traced, a mode of torch may replace operators, or a weight is of a tensor subclass."""
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
            return make()  # The graph owns the value's memory, so the value must not outlive it.
        with torch.inference_mode(False), torch.no_grad():  # values made from an inference tensor are not cached
            # If ``constant``, the cache keeps the weights themselves alive, so that no other tensor gets their address.
            # Otherwise it copies them before the value is made: after a write in between, the next comparison fails.
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
    """Counts the steps of all optimizers of the process, because torch does not count the writes of fused ones."""
    steps = Counter()
    register_optimizer_step_post_hook(lambda *_: steps.update(all=1))
    return steps
