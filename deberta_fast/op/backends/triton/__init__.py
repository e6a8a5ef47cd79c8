"""Fused disentangled attention in Triton, forward and backward, for GPUs of NVIDIA, AMD (ROCm) and Intel (XPU).

Keys are far-left, near or far-right of a block of queries. Far tiles are plain flash attention (equation 7). Near tiles
read their position scores from bands of dense scores, written beforehand for as many heads as ``plan.limit_band_bytes``
allows (equation 6), and add them by a product with the identity. In backward the gradients of the scores replace the
scores in the same bands. Nothing of size Lq x Lk is kept, no kernel adds atomically, and nothing synchronises with the
device. Plans of calls are kept, so that later calls of the same shapes only launch.
"""

import importlib.metadata

import torch

from ...call import Call
from ..gpu import properties_of


def _installed() -> tuple[int, int] | None:
    try:
        return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return None


OLDEST = (3, 6)
INSTALLED = _installed()
CAPABILITY = (8, 0)  # the oldest NVIDIA GPUs served
LARGEST_HEAD = 256


def why_not(call: Call) -> list[str]:
    """Returns reasons not to serve this call."""
    query, reasons = call.query, []
    if INSTALLED is None or INSTALLED < OLDEST:
        reasons.append(f"Triton >= {OLDEST[0]}.{OLDEST[1]} is not installed")
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"dtype must be float32, bfloat16 or float16, got {query.dtype}")
    if query.shape[-1] % 8 or query.shape[-1] > LARGEST_HEAD:
        reasons.append(f"head size must be a multiple of 8 up to {LARGEST_HEAD}, got {query.shape[-1]}")
    if not call.scale > 0:
        reasons.append(f"scale must be positive, got {call.scale}")
    return reasons + device_reasons(query.device)


def device_reasons(device: torch.device) -> list[str]:
    """Returns reasons not to serve any call on a device."""
    if device.type not in ("cuda", "xpu"):
        return [f"tensors must be on an NVIDIA, AMD or Intel GPU, got {device}"]
    gpu = properties_of(device)
    if gpu is None:
        return [f"torch finds no device {device}"]
    if device.type == "cuda" and torch.version.hip is None and (gpu.major, gpu.minor) < CAPABILITY:
        return [f"compute capability must be at least {CAPABILITY}, got {(gpu.major, gpu.minor)}"]
    return []


def forward(call: Call, output: torch.Tensor, lse: torch.Tensor | None) -> None:
    _run(call, output, call.new_lse() if lse is None else lse)


def backward(
    call: Call,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
    grads: list[torch.Tensor | None],
) -> None:
    if grad_output.stride(-1) != 1 or any(n * grad_output.element_size() % 16 for n in grad_output.stride()[:3]):
        grad_output = grad_output.contiguous()
    _run(call, output, lse, grad_output, grad_lse, *grads)


def _run(call: Call, *results: torch.Tensor | None) -> None:
    """Runs the launches of a plan. A kernel that needs too much shared memory gets smaller tiles from then on.

    Triton says so at its first launch, after others have written results, all of which the smaller plan writes again.
    """
    import triton

    from . import configuration, plan
    from .launch import specialisation

    device = call.query.device
    target = configuration.target_of(device, plan.block_d_of(call), call.query.element_size())
    given = plan.given_tensors(call, *results)
    with torch.accelerator.device_index(device.index):
        while True:
            chosen = configuration.choose(target)
            planned = plan.plan_of(call, given, plan.settings(chosen, _precision(call)))
            tensors = planned.tensors(given)
            special = specialisation(tensors)
            try:
                for launch in planned.launches:
                    launch.run(tensors, special)
                return
            except triton.OutOfResources:
                smaller = chosen.smaller(launch.configured) if launch.configured else None
                if smaller is None:
                    raise
                configuration.set_configuration(target, smaller)


def _precision(call: Call) -> str:
    nvidia = call.query.device.type == "cuda" and torch.version.hip is None
    if nvidia and call.query.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"
