"""Fused disentangled attention in Triton, forward and backward, for GPUs of NVIDIA, AMD (ROCm) and Intel (XPU).

Keys are far-left, near or far-right of a block of queries. Far tiles are plain flash attention (equation 7). Near tiles
take their position scores from bands of dense scores, written beforehand for as many heads as ``plan.BAND_BYTES`` holds
(equation 6), and add them with products by the identity. In backward the gradients of the scores replace them in the
same bands. Nothing of size Lq x Lk is kept, nothing is added atomically, and nothing waits for the device.
"""

import contextlib
import importlib.metadata
import os

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
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs its kernels on the CPU
CAPABILITY = (8, 0)  # of NVIDIA's
LARGEST_HEAD = 256


def why_not(inputs: Call) -> list[str]:
    """Reasons not to serve these inputs."""
    query, reasons = inputs.query, []
    if INSTALLED is None or INSTALLED < OLDEST:
        reasons.append(f"Triton >= {OLDEST[0]}.{OLDEST[1]} is not installed")
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"dtype must be float32, bfloat16 or float16, got {query.dtype}")
    if query.shape[-1] % 8 or query.shape[-1] > LARGEST_HEAD:
        reasons.append(f"head size must be a multiple of 8 up to {LARGEST_HEAD}, got {query.shape[-1]}")
    if not inputs.scale > 0:
        reasons.append(f"scale must be positive, got {inputs.scale}")
    return reasons + device_reasons(query.device)


def device_reasons(device: torch.device) -> list[str]:
    """Reasons not to serve any call on a device."""
    if device.type == "cpu" and INTERPRETED:
        return []
    if device.type not in ("cuda", "xpu"):
        return [f"tensors must be on an NVIDIA, AMD or Intel GPU, got {device}"]
    gpu = properties_of(device)
    if gpu is None:
        return [f"torch finds no device {device}"]
    if device.type == "cuda" and torch.version.hip is None and (gpu.major, gpu.minor) < CAPABILITY:
        return [f"compute capability must be at least {CAPABILITY}, got {(gpu.major, gpu.minor)}"]
    return []


def forward(inputs: Call, output: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Fills output (B, H, Lq, D) and, unless it is None, log-sum-exp (B, H, Lq)."""
    lse = inputs.new_lse() if lse is None else lse
    _run(inputs, lambda plan: plan.forward(output, lse))


def backward(
    inputs: Call,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
    grads: list[torch.Tensor | None],
) -> None:
    """Fills the gradients of query, key, value, pos_key and pos_query; None where a table's is not wanted."""
    if grad_output.stride(-1) != 1 or any(n * grad_output.element_size() % 16 for n in grad_output.stride()[:3]):
        grad_output = grad_output.contiguous()
    _run(inputs, lambda plan: plan.backward(output, lse, grad_output, grad_lse, grads))


def _run(inputs: Call, launches) -> None:
    """Runs the launches of a plan; what does not fit into the GPU's shared memory shrinks, and is remembered so."""
    import triton

    from . import configuration
    from .plan import Plan, block_size_of

    device = inputs.query.device
    with contextlib.nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index):
        while True:
            key, chosen = configuration.choose(device, block_size_of(inputs), inputs.query.element_size())
            try:
                for launch in launches(Plan(inputs, chosen, _precision(inputs))):
                    launch.run()
                return
            except triton.OutOfResources:
                smaller = chosen.smaller(launch.configured) if launch.configured else None
                if smaller is None:
                    raise
                configuration.remember(key, smaller)


def _precision(inputs: Call) -> str:
    if INTERPRETED:
        return "upcast"
    nvidia = inputs.query.device.type == "cuda" and torch.version.hip is None
    if nvidia and inputs.query.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"
