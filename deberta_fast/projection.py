"""Linear layers of a patched model in inference: oneDNN's product where torch's own choice is far from the fastest.

torch multiplies float32 with MKL, which does not use the whole width of an AMD processor; the oneDNN inside the same
torch does, and is 2.2 times faster from 64 rows on (AMD EPYC of family 26, torch 2.13, one thread and two).
"""

import functools
from pathlib import Path

import torch
from torch import nn

FEWEST_ROWS = 8  # below, oneDNN's way in costs more than its product saves


def project(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``linear(x)``, within rounding: whatever makes it more than a plain float32 product runs as it is."""
    if _by_onednn(linear, x):
        return torch.ops.mkldnn._linear_pointwise(x, linear.weight, linear.bias, "none", [], "")
    return linear(x)


def _by_onednn(linear: nn.Module, x: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
        return False
    if type(linear) is not nn.Linear or "forward" in vars(linear) or nn.modules.module._has_any_global_hook():
        return False
    if linear._forward_hooks or linear._forward_pre_hooks:
        return False
    weight = linear.weight
    return (
        _mkl_is_slow()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and type(x) is torch.Tensor
        and type(weight) is nn.Parameter
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.is_contiguous()
        and x.shape[:-1].numel() >= FEWEST_ROWS
    )


@functools.lru_cache(maxsize=1)
def _mkl_is_slow() -> bool:
    """Whether torch's MKL meets a processor that it holds back on."""
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    available = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return amd and available and hasattr(torch.ops.mkldnn, "_linear_pointwise")
