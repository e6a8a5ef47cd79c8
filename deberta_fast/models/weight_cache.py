"""What depends on weights alone, kept in inference until they change.

torch counts what it writes into a tensor, but neither what is written through ``.data`` nor what a fused optimizer
writes. On a CPU every use therefore compares the weights, bit by bit, with a copy of those that the value was made of.
That reads a matrix twice, where making the value multiplies with it. On a GPU the host would have to wait for such a
comparison: there a value is kept only for who promises that weights stay.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..op.backends.cpu import same_bits

Value = TypeVar("Value")


class WeightCache:
    """One value made of weights. Copies and pickles of it are empty.

    Attributes:
        constant: the promise that nobody writes weights through ``.data``. They are not compared then, and values are
            kept on every device. What torch counts still counts, and so do the steps of all optimizers.
    """

    def __init__(self, constant: bool = False):
        self.constant = constant
        self._kept: tuple | None = None
        if constant:
            _steps()

    def keeps(self, weights: list[torch.Tensor | None]) -> bool:
        """Whether values of these weights are kept: not where gradients are asked for, in a traced program, where a
        mode of torch may replace operators, or for weights that are more than tensors."""
        return not (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch._C._are_functorch_transforms_active()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._len_torch_function_stack()
            or forward_ad._current_level >= 0
        ) and all(
            type(weight) in (torch.Tensor, nn.Parameter)
            and weight.layout == torch.strided
            # torch counts no writes into tensors of inference mode
            and (not (weight.is_inference() or weight.is_meta) if self.constant else weight.is_cpu)
            for weight in weights
            if weight is not None
        )

    def get(self, weights: list[torch.Tensor | None], make: Callable[[], Value], settings: tuple = ()) -> Value:
        """``make()``, or what it gave for the same weights, which it ``keeps``, and the same settings.

        Args:
            settings: whatever else the value depends on.
        """
        weights = [weight for weight in weights if weight is not None]
        state, kept = [settings, *_precision(weights[0].device.type)], self._kept
        if self.constant:
            state += [_steps().count, *((x.data_ptr(), x.dtype, x.shape, x.stride(), x._version) for x in weights)]
        if kept is not None and kept[0] == state:
            if self.constant or all(map(same_bits, kept[1], weights)):
                return kept[2]
        if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return make()  # into the graph's own memory, which does not outlive it
        with torch.inference_mode(False), torch.no_grad():  # or what is made of the value could not be kept
            # With a promise the weights themselves: as long as they live, no other tensor comes to lie where they do.
            # Without, the copies come first: a write in between makes the next comparison fail.
            compared = weights if self.constant else [weight.detach().clone() for weight in weights]
            value = make()
        self._kept = state, compared, value
        return value

    def clear(self) -> None:
        self._kept = None

    def __deepcopy__(self, memo: dict) -> "WeightCache":
        return WeightCache(self.constant)

    def __reduce__(self):
        return WeightCache, (self.constant,)


def _precision(device: str) -> tuple:
    """In which precision torch multiplies at the moment."""
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return autocast, torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision


class _Steps:
    """Counts the steps of all optimizers of the process: torch does not count what fused ones write."""

    def __init__(self):
        self.count = 0
        register_optimizer_step_post_hook(self._step)

    def _step(self, *_) -> None:
        self.count += 1


@functools.lru_cache(maxsize=1)
def _steps() -> _Steps:
    return _Steps()
