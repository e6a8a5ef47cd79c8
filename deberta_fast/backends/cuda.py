"""Fused disentangled attention in CUDA C++ (csrc/cuda), for NVIDIA GPUs from sm_80 on, in half precision.

Position scores never leave the chip: each tile near the diagonal makes its own with tensor cores and skews them in
shared memory (equation 6); far tiles are plain flash attention (equation 7). Gradients are sums in a fixed order.
"""

import functools

import torch

from ..relative_position import slot_table
from .extension import NOT_LOADED, SHARED_ARGUMENTS, define, implements
from .inputs import AttentionInputs

CAPABILITY = (8, 0)
LARGEST_HEAD = 128
LONGEST = 1 << 28  # positions and distances are 32-bit numbers in the kernels
EMULATED = False  # an emulator runs the kernels on CPU tensors: tests/emulator

_SHARED = (
    f"{SHARED_ARGUMENTS}, int past_row, int future_row, int query_offset, int max_seqlen, float scale, float dropout_p"
)
define(f"cuda_forward(Tensor(a!) output, Tensor(b!) lse, {_SHARED}) -> ()")


def why_not(inputs: AttentionInputs) -> list[str]:
    """Reasons not to serve these inputs."""
    query, mask, reasons = inputs.query, inputs.mask, []
    if NOT_LOADED is not None:
        reasons.append(NOT_LOADED)
    elif not EMULATED and not implements("cuda_forward", "CUDA"):
        reasons.append("the extension deberta_fast._C was built without CUDA kernels (pip install -v says why)")
    if query.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"dtype must be bfloat16 or float16, got {query.dtype}")
    if query.shape[-1] % 8 or query.shape[-1] > LARGEST_HEAD:
        reasons.append(f"head size must be a multiple of 8 up to {LARGEST_HEAD}, got {query.shape[-1]}")
    if mask is not None and (mask.shape[1] != 1 or mask.shape[2] != 1):
        reasons.append(f"a mask must be the same for all heads and queries, (B, 1, 1, Lk), got {tuple(mask.shape)}")
    if not inputs.scale > 0:
        reasons.append(f"scale must be positive, got {inputs.scale}")
    if max(query.shape[2], inputs.key.shape[2], abs(inputs.query_offset)) >= LONGEST:
        reasons.append(f"lengths and query_offset must be below {LONGEST}")
    if query.device.type == "cuda" and torch.version.hip is None:
        gpu = torch.cuda.get_device_properties(query.device)
        if (gpu.major, gpu.minor) < CAPABILITY:
            reasons.append(f"compute capability must be at least {CAPABILITY}, got {(gpu.major, gpu.minor)}")
    elif query.device.type != "cpu" or not EMULATED:
        reasons.append(f"tensors must be on an NVIDIA GPU, got {query.device}")
    return reasons


def forward(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, Lq, D) and log-sum-exp (B, H, Lq)."""
    output, lse = inputs.new_like_heads(inputs.query), inputs.new_lse()
    torch.ops.deberta_fast.cuda_forward(output, lse, *_shared(inputs))
    return output, lse


def _shared(x: AttentionInputs) -> tuple:
    heads = (_aligned(heads) for heads in x[:5])
    ends = None if x.cu_seqlens is None else x.cu_seqlens.contiguous()
    positions = (None, 0, 0, 0, 0, 0)
    if x.has_positions:
        table = x.table
        slots = _slots_on(x.position_buckets, x.max_relative_positions, x.far_negative, x.query.device)
        far_rows = table.slots[-1] - x.first_slot, table.slots[0] - x.first_slot
        positions = (slots, table.far_past, table.far_future, x.first_slot, *far_rows)
    return *heads, x.mask, ends, x.seed, *positions, x.query_offset, x.max_seqlen, x.scale, x.dropout_p


def _aligned(x: torch.Tensor | None) -> torch.Tensor | None:
    """Rows that begin at a multiple of 16 bytes, as the kernels copy 16 bytes at once; mostly they do already."""
    if x is None or x.numel() == 0:
        return x
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    if x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and all(stride * x.element_size() % 16 == 0 for stride in strides):
        return x
    return x.contiguous() if not x.is_contiguous() else x.clone()


@functools.lru_cache(maxsize=64)
def _slots_on(buckets: int, longest: int, far_negative: str, device: torch.device) -> torch.Tensor:
    """sigma over the distances [-N, N], int32 (2N + 1,), on the device: copied there once."""
    with torch.inference_mode(False):
        return torch.tensor(slot_table(buckets, longest, far_negative).slots, dtype=torch.int32, device=device)
