"""What depends on weights alone, kept in inference until they change.

torch counts what it writes into a tensor, but not what is written through ``.data``: adapters are merged and averaged
weights put in place that way. On a CPU every use therefore looks at the weights themselves, by a product with a fixed
random vector, which reads a matrix once where making the value multiplies with it. On a GPU the host would have to wait
for such a look: there a value is kept only for who promises that weights stay.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Value = TypeVar("Value")


class WeightCache:
    """One value made of weights. Copies and pickles of it are empty.

    Attributes:
        constant: the promise that nobody writes weights through ``.data``. They are not looked at then, and values are
            kept on every device.
    """

    def __init__(self, constant: bool = False):
        self.constant = constant
        self._kept: tuple | None = None

    def keeps(self, weights: list[torch.Tensor | None]) -> bool:
        """Whether values of these weights are kept: not where gradients are asked for, in a traced program, or for
        weights that are more than tensors."""
        return not (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch._C._are_functorch_transforms_active()
        ) and all(
            type(weight) in (torch.Tensor, nn.Parameter)
            and not weight.is_inference()  # of which torch counts no writes
            and (weight.device.type == "cpu" or (self.constant and not weight.is_meta))
            for weight in weights
            if weight is not None
        )

    def get(self, weights: list[torch.Tensor | None], make: Callable[[], Value]) -> Value:
        """``make()``, or what it gave when these same weights, which it ``keeps``, were last handed in."""
        weights = [weight for weight in weights if weight is not None]
        state, kept = _state(weights), self._kept
        if kept is not None and kept[0] == state:
            if self.constant or all(map(torch.equal, kept[1], _sketches(weights))):
                return kept[2]
        if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return make()  # into the graph's own memory, which does not outlive it
        with torch.inference_mode(False), torch.no_grad():  # or what is made of the value could not be kept
            value = make()
        # The weights too: as long as they live, no other tensor comes to lie where they do
        self._kept = state, [] if self.constant else _sketches(weights), value, weights
        return value

    def clear(self) -> None:
        self._kept = None

    def __deepcopy__(self, memo: dict) -> "WeightCache":
        return WeightCache(self.constant)

    def __reduce__(self):
        return WeightCache, (self.constant,)


def _state(weights: list[torch.Tensor]) -> list:
    """What tells that a tensor is another one: where it lies, what it is, how often torch has written into it; and the
    dtype of products under autocast."""
    kind = weights[0].device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return [autocast, *((x.data_ptr(), x.dtype, x.shape, x._version) for x in weights)]


def _sketches(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """A number for each row of a matrix, and vectors as they are. A change that no number shows is below rounding.

    Only of parameters: other tensors are values of another cache, which nobody else has.
    """
    return [
        torch.mv(x.detach(), _direction(x.shape[1], x.dtype)) if x.dim() == 2 else x.detach().clone()
        for x in weights
        if type(x) is nn.Parameter
    ]


@functools.lru_cache(maxsize=64)
def _direction(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(dtype)
