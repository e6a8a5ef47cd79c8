"""Activation functions by the names that configurations use."""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .ordinary import is_own_code, why_not_ordinary

_BY_NAME = {
    **{name: getattr(F, name) for name in ("gelu", "relu", "relu6", "leaky_relu", "silu", "mish")},
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), functools.partial(F.gelu, approximate="tanh")),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: F.relu(x).square(),
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": lambda x: x,
}


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the function of that name, or raises a ValueError that lists the names."""
    if name not in _BY_NAME:
        raise ValueError(f"activation must be one of {', '.join(_BY_NAME)}, got {name!r}")
    return _BY_NAME[name]


def gelu_of(function: Callable) -> str | None:
    """The ``approximate`` of ``F.gelu``, if a function or a module of transformers computes nothing else; or None."""
    if isinstance(function, nn.Module):
        kind = type(function)
        if kind.__module__ != "transformers.activations" or kind.__name__ not in ("GELUActivation", "GELUTanh"):
            return None
        if why_not_ordinary(function, kind) is not None or not is_own_code(kind.forward, kind):
            return None
        function = function.act
    if isinstance(function, functools.partial) and function.func is F.gelu:
        return function.keywords["approximate"] if [*function.keywords] == ["approximate"] else None
    return "none" if function is F.gelu else None
