"""Linear layers by oneDNN's product where torch's default is much slower.

torch multiplies float32 with MKL, which does not use the full vector width of AMD processors. The oneDNN inside the
same torch does, in forward and in both products of backward. docs/measured.md has the figures.
"""

import functools
from pathlib import Path

import torch
from torch import nn
from torch.autograd import forward_ad

from .ordinary import why_not_ordinary

FEWEST_ROWS = 8  # below, oneDNN's call overhead exceeds its speed-up
DEEPEST = 1024  # oneDNN accumulates sequentially: deeper products are split, which reduces rounding errors


def project(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``linear(x)`` up to rounding. A module that is not plain runs its own forward."""
    return product(x, linear.weight, linear.bias) if is_plain(linear) else linear(x)


def is_plain(linear: nn.Module) -> bool:
    """Whether a module is only a torch Linear, without adapter, hook, parametrization or sharded weight; False while
    a program is traced."""
    return (
        not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and why_not_ordinary(linear, nn.Linear) is None
        and type(linear.weight) is nn.Parameter
        and type(linear.bias) in (nn.Parameter, type(None))
    )


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b, differentiable; x (..., K), weight (N, K), bias (N,) or None."""
    if not _by_onednn(x, weight, bias):
        return nn.functional.linear(x, weight, bias)
    return _Product.apply(x, weight, bias) if torch.is_grad_enabled() else _onednn(x, weight, bias)


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is not None:
        bias = bias.contiguous()  # oneDNN ignores the stride
    result = None
    for start in range(0, x.shape[-1], DEEPEST):
        part = weight[:, start : start + DEEPEST]
        if not (part.is_contiguous() or part.t().is_contiguous()):
            part = part.contiguous()  # otherwise oneDNN uses its slowest kernel
        last = torch.ops.mkldnn._linear_pointwise(x[..., start : start + DEEPEST], part, bias, "none", [], "")
        result, bias = last if result is None else result.add_(last), None
    return result


class _Product(torch.autograd.Function):
    """y = x W^T + b with dx = dy W, dW = dy^T x, db = sum dy. Backward uses ``product``, so it is differentiable."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            product(gradient, weight.t(), None) if for_x else None,
            product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    # torch handles inputs that it would broadcast or refuse, because oneDNN is called below its checks and autograd.
    return (
        _mkl_is_slow()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and type(x) is torch.Tensor
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[-1:] == weight.shape[1:]
        and 0 not in weight.shape
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and (bias is None or (bias.shape == weight.shape[:1] and bias.device == x.device and bias.dtype == x.dtype))
        and x.shape[:-1].numel() >= FEWEST_ROWS
    )


@functools.lru_cache(maxsize=1)
def _mkl_is_slow() -> bool:
    """Whether the processor is one on which MKL is slow, and torch has oneDNN."""
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    available = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return amd and available and hasattr(torch.ops.mkldnn, "_linear_pointwise")
