"""Linear layers by oneDNN's product where it is faster than torch's default.

The oneDNN inside torch adds the bias and applies GELU while a part of the result is in registers. In half precision
torch's default calls oneDNN too, but copies the bias into the output first. In float32 it calls MKL, which does not use
the full vector width of some processors. Which product is faster depends on the processor, the dtype and the sizes, so
the first product of a kind is measured. docs/measured.md has the figures.
"""

import functools
import math
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from .activation import gelu_of
from .ordinary import why_not_ordinary

# oneDNN accumulates sequentially: deeper float32 products are split, which reduces rounding errors. Without AVX-512
# these are larger (docs/measured.md).
DEEPEST = 1024 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 512
SMALLEST = 1 << 22  # multiplications; in smaller products, the overhead of calls exceeds the difference
MEASURED_ROWS = 128  # more rows take as long per row
# The share of torch's time that oneDNN may take in half precision with gradients. Otherwise it is 1. In half precision,
# forward alone can be faster, and backward takes longer because it runs in Python.
WORTH = 0.95
HALF = (torch.bfloat16, torch.float16)

_shares: dict[tuple, float] = {}  # measured shares of torch's time, by kind of product


def project(linear: nn.Module, x: torch.Tensor, activation: Callable | None = None) -> torch.Tensor:
    """``activation(linear(x))`` up to rounding. A module that is not plain runs its own forward."""
    if not is_plain(linear):
        return linear(x) if activation is None else activation(linear(x))
    gelu = None if activation is None else gelu_of(activation)
    y = product(x, linear.weight, linear.bias, gelu)
    return y if activation is None or gelu is not None else activation(y)


def is_plain(linear: nn.Module) -> bool:
    """Whether a module is only a torch Linear, without adapter, hook, parametrization or sharded weight; False while
    a program is traced."""
    return (
        not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and why_not_ordinary(linear, nn.Linear) is None
        and type(linear.weight) is nn.Parameter
        and type(linear.bias) in (nn.Parameter, type(None))
    )


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str | None = None) -> torch.Tensor:
    """x W^T + b, differentiable; x (..., K), weight (N, K), bias (N,) or None.

    ``gelu`` names the ``approximate`` of a GELU that is applied to the result.
    """
    if gelu is not None and (_needs_gradient(x, weight, bias) or not _by_onednn(x, weight, bias, gelu)):
        return F.gelu(product(x, weight, bias), approximate=gelu)  # backward needs the GELU's input
    if gelu is None and not _by_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    return _Product.apply(x, weight, bias) if _needs_gradient(x, weight, bias) else _onednn(x, weight, bias, gelu)


def _needs_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str | None = None) -> torch.Tensor:
    if bias is not None:
        bias = bias.contiguous()  # oneDNN ignores the stride
    if x.dtype != torch.float32 or x.shape[-1] <= DEEPEST:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none" if gelu is None else "gelu", [], gelu)
    result = None
    for start in range(0, x.shape[-1], DEEPEST):
        part = weight[:, start : start + DEEPEST]
        if not part.t().is_contiguous():
            part = part.contiguous()  # otherwise oneDNN uses its slowest kernel
        last = torch.ops.mkldnn._linear_pointwise(x[..., start : start + DEEPEST], part, bias, "none", [], "")
        result, bias = last if result is None else result.add_(last), None
    return result if gelu is None else F.gelu(result, approximate=gelu)


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


def _by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str | None = None) -> bool:
    # torch handles inputs that it would broadcast or refuse, because oneDNN is called below its checks and autograd.
    return (
        type(x) is torch.Tensor
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and _supports(x.dtype)
        and (bias is not None or x.dtype not in HALF)  # without a bias, torch's default is the same in half precision
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and x.shape[-1:] == weight.shape[1:]
        and 0 not in x.shape
        and 0 not in weight.shape
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and (bias is None or (bias.shape == weight.shape[:1] and bias.device == x.device and bias.dtype == x.dtype))
        and _is_faster(x, weight, bias, gelu)
    )


@functools.cache
def _supports(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN, and oneDNN has products in this dtype on this processor."""
    available = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not (available and dtype in (torch.float32, *HALF) and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    if dtype == torch.float32:
        return True
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    return getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()


def _is_faster(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str | None) -> bool:
    """Whether oneDNN is faster for products of this kind: sizes within a factor of two, and everything else the same.

    The first product of a kind is measured, which takes as long as eight products of at most 128 rows. A process keeps
    its choice. Another one may choose otherwise if both take about the same time, so deterministic algorithms are
    torch's.
    """
    sizes = x.shape[:-1].numel(), *weight.shape
    if math.prod(sizes) < SMALLEST or torch.are_deterministic_algorithms_enabled():
        return False
    rows, outputs, inputs = (size.bit_length() for size in (min(sizes[0], MEASURED_ROWS), *sizes[1:]))
    layouts = x.stride(-1) == 1, weight.is_contiguous(), bias is not None, gelu
    settings = torch.get_num_threads(), torch.backends.mkldnn.matmul.fp32_precision
    kind = x.dtype, rows, outputs, inputs, *layouts, *settings
    if kind not in _shares:
        with torch.no_grad():
            default, onednn = _seconds(x.reshape(-1, x.shape[-1])[:MEASURED_ROWS], weight, bias, gelu)
        _shares.setdefault(kind, onednn / default)
    return _shares[kind] < (WORTH if x.dtype in HALF and _needs_gradient(x, weight, bias) else 1)


def _seconds(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str | None) -> tuple[float, float]:
    """The least time of torch's default and of oneDNN, in four rounds of both; x (rows, K)."""
    plain = lambda: F.linear(x, weight, bias)
    calls = (
        plain if gelu is None else (lambda: F.gelu(plain(), approximate=gelu)),
        lambda: _onednn(x, weight, bias, gelu),
    )
    least = [math.inf, math.inf]
    for _ in range(4):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            least[index] = min(least[index], time.perf_counter() - start)
    return least[0], least[1]
