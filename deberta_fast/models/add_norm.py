"""LayerNorm of a sum in one pass over memory, forward and backward, on a CPU (csrc/cpu/norm.cpp)."""

import functools

import torch
from torch import nn

from ..op.backends import extension
from .ordinary import why_not_ordinary
from .padding import is_traced

_DTYPES = (torch.float32, torch.bfloat16)  # to convert float16 takes longer than one pass saves


def add_and_norm(norm: nn.Module, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """``norm(x + residual)`` up to rounding, differentiable; (..., hidden_size).

    A module that is more than a LayerNorm with weight and bias runs its own forward.
    """
    if not _is_fused(norm, x, residual):
        return norm(x + residual)
    if torch.is_grad_enabled() and any(y.requires_grad for y in (x, residual, norm.weight, norm.bias)):
        return _AddNorm.apply(x, residual, norm.weight, norm.bias, norm.eps)[0]
    output = torch.empty_like(x)
    torch.ops.deberta_fast.add_norm.default(output, None, None, x, residual, norm.weight, norm.bias, norm.eps)
    return output


class _AddNorm(torch.autograd.Function):
    """y and s of csrc/cpu/norm.cpp. As s is an output, second derivatives reach x and the residual through it."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps):
        output, total = torch.empty_like(x), torch.empty_like(x)
        statistics = x.new_empty(2, *x.shape[:-1], 1, dtype=torch.float32)
        torch.ops.deberta_fast.add_norm.default(output, total, statistics, x, residual, weight, bias, eps)
        ctx.save_for_backward(total, weight, bias, statistics)
        ctx.set_materialize_grads(False)
        return output, total

    @staticmethod
    def backward(ctx, grad_output, grad_total):
        if grad_output is None:
            return grad_total, grad_total, None, None, None
        total, weight, bias, statistics = ctx.saved_tensors
        for_weight, for_bias = ctx.needs_input_grad[2:4]
        if _is_plain(grad_output) and not torch.is_grad_enabled():
            grads = torch.empty_like(total), *(torch.empty_like(weight) if x else None for x in (for_weight, for_bias))
            torch.ops.deberta_fast.add_norm_backward.default(
                *grads, grad_output.contiguous(), total, statistics, weight
            )
        else:
            mean, inverse_root = statistics.to(total.dtype)
            grads = torch.ops.aten.native_layer_norm_backward(
                grad_output, total, weight.shape, mean, inverse_root, weight, bias, [True, for_weight, for_bias]
            )
        grad_sum = grads[0] if grad_total is None else grads[0] + grad_total
        return grad_sum, grad_sum, grads[1] if for_weight else None, grads[2] if for_bias else None, None


def _is_fused(norm: nn.Module, x: torch.Tensor, residual: torch.Tensor) -> bool:
    return (
        _is_plain(x)
        and _is_plain(residual)
        and x.is_contiguous()
        and residual.is_contiguous()
        and x.shape == residual.shape
        and x.dtype == residual.dtype
        and x.dtype in _DTYPES
        and why_not_ordinary(norm, nn.LayerNorm) is None
        and norm.normalized_shape == x.shape[-1:]
        and all(type(y) is nn.Parameter and y.dtype == x.dtype and y.is_contiguous() for y in (norm.weight, norm.bias))
        and not torch.is_autocast_enabled("cpu")
        and _is_built()
    )


@functools.cache
def _is_built() -> bool:
    return extension.implements("add_norm", "CPU")


def _is_plain(x: torch.Tensor) -> bool:
    """Whether torch needs to see nothing but the numbers of a tensor: no tracing, transform, mode or subclass."""
    return (
        type(x) is torch.Tensor
        and x.is_cpu
        and not is_traced()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._functorch.is_legacy_batchedtensor(x)
    )
