"""Fused disentangled attention in CUDA C++ (csrc/cuda), for NVIDIA GPUs from sm_80 on, in half precision.

Position scores never leave the chip: each tile near the diagonal computes them with tensor cores and skews them in
shared memory (equation 6). Far tiles are plain flash attention (equation 7). Gradients are sums in a fixed order.
"""

import torch

from ..call import Call
from . import extension
from .extension import NOT_LOADED, implements
from .gpu import properties_of

CAPABILITY = (8, 0)
LARGEST_HEAD = 128
SHARED_BYTES = {32: 78848, 64: 101376, 96: 130560, 128: 155136}  # per block, by the head size rounded up
LARGEST_STRIDE = 1 << 24  # from row to row, in elements
LONGEST = 1 << 28  # positions and distances are 32-bit numbers in the kernels

limit_near_bytes = torch.ops.deberta_fast.limit_near_bytes.default  # csrc/cuda/plan.h; 0 is the default; for benchmarks


def _missing() -> str | None:
    if NOT_LOADED is not None:
        return NOT_LOADED
    if not implements("fused_forward", "CUDA"):
        return "the extension deberta_fast._C was built without CUDA kernels (pip install -v says why)"
    if torch.version.cuda is not None and not torch.ops.deberta_fast.finds_torch_stream():
        return "this torch has no libtorch_cuda.so that tells its current stream"
    return None


def architectures() -> list[str]:
    """Returns the targets of the CUDA kernels, such as ["sm_80", "sm_90", "compute_80"]; [] without kernels."""
    built = NOT_LOADED is None and implements("cuda_architectures", "CompositeExplicitAutograd")
    return torch.ops.deberta_fast.cuda_architectures().split() if built else []


def _capabilities(architecture: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the first and the last compute capability that a target runs on."""
    kind, _, number = architecture.partition("_")
    digits = number.rstrip("af")
    first = int(digits[:-1]), int(digits[-1])
    if number.endswith("a"):
        return first, first
    return first, (99, 9) if kind == "compute" and digits == number else (first[0], 9)


# Constants, because torch.compile traces why_not.
MISSING = _missing()
ARCHITECTURES = architectures()
RUN_ON = [_capabilities(name) for name in ARCHITECTURES]


def why_not(call: Call) -> list[str]:
    """Returns the reasons not to serve this call."""
    query, mask, reasons = call.query, call.mask, []
    if MISSING is not None:
        reasons.append(MISSING)
    if query.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"dtype must be bfloat16 or float16, got {query.dtype}")
    if query.shape[-1] % 8 or query.shape[-1] > LARGEST_HEAD:
        reasons.append(f"head size must be a multiple of 8 up to {LARGEST_HEAD}, got {query.shape[-1]}")
    if mask is not None and (mask.shape[1] != 1 or mask.shape[2] != 1):
        reasons.append(f"a mask must be the same for all heads and queries, (B, 1, 1, Lk), got {tuple(mask.shape)}")
    if not call.scale > 0:
        reasons.append(f"scale must be positive, got {call.scale}")
    if max(query.shape[2], call.key.shape[2], abs(call.query_offset)) >= LONGEST:
        reasons.append(f"lengths and query_offset must be below {LONGEST}")
    return reasons + device_reasons(query.device, query.shape[-1])


def device_reasons(device: torch.device, head_size: int) -> list[str]:
    """Returns the reasons not to serve any call of this head size on a device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return [f"tensors must be on an NVIDIA GPU, got {device}"]
    gpu, reasons = properties_of(device), []
    if gpu is None:
        return [f"torch finds no device {device}"]
    capability = gpu.major, gpu.minor
    if capability < CAPABILITY:
        reasons.append(f"compute capability must be at least {CAPABILITY}, got {capability}")
    elif RUN_ON and not any(first <= capability <= last for first, last in RUN_ON):
        built = ", ".join(ARCHITECTURES)
        reasons.append(f"the kernels were built for {built}, none of which runs on a GPU of capability {capability}")
    available, needed = gpu.shared_memory_per_block_optin, SHARED_BYTES.get(-(-head_size // 32) * 32, 0)
    if needed > available:
        reasons.append(f"head size {head_size} needs {needed} bytes of shared memory a block, the GPU has {available}")
    return reasons


def forward(call: Call, output: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Fills output (B, H, Lq, D) and, unless it is None, log-sum-exp (B, H, Lq)."""
    extension.fused_forward(output, call.new_lse() if lse is None else lse, *arguments(call))


def backward(
    call: Call,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
    grads: list[torch.Tensor | None],
) -> None:
    """Fills the gradients of query, key, value, pos_key and pos_query; None if a table's is not wanted."""
    extension.fused_backward(*grads, _aligned(output), lse, _aligned(grad_output), grad_lse, *arguments(call))


def arguments(call: Call) -> tuple:
    """Returns a call as the operators take it, with tensors as the kernels read them."""
    heads = (_aligned(heads) for heads in call[:5])
    ends = None if call.cu_seqlens is None else call.cu_seqlens.contiguous()
    return extension.arguments(Call(*heads, call.mask, ends, *call[7:]))


def _aligned(x: torch.Tensor | None) -> torch.Tensor | None:
    """Returns ``x``, or a copy if its rows do not begin at multiples of 16 bytes, which the kernels read at once."""
    if x is None or x.numel() == 0:
        return x
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    if x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and x.stride(-2) <= LARGEST_STRIDE:
        if all(stride * x.element_size() % 16 == 0 for stride in strides):
            return x
    return x.clone(memory_format=torch.contiguous_format)
