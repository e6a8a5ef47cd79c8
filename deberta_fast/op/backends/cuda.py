"""Fused disentangled attention in CUDA C++ (csrc/cuda), for NVIDIA GPUs from sm_80 on, in half precision.

Position scores never leave the chip: each tile near the diagonal makes its own with tensor cores and skews them in
shared memory (equation 6); far tiles are plain flash attention (equation 7). Gradients are sums in a fixed order.
"""

import bisect
import functools

import torch

from ..call import AttentionInputs
from ..relative_position import slot_table
from .extension import GRADIENTS, NOT_LOADED, SHARED_ARGUMENTS, define, implements

CAPABILITY = (8, 0)
LARGEST_HEAD = 128
SHARED_BYTES = {32: 76032, 64: 96512, 96: 117504, 128: 137984}  # of a block, by the head size rounded up
LARGEST_STRIDE = 1 << 24  # from row to row, in elements
LONGEST = 1 << 28  # positions and distances are 32-bit numbers in the kernels
EMULATED = False  # an emulator runs the kernels on CPU tensors: tests/emulator

_SHARED = (
    f"{SHARED_ARGUMENTS}, int past_row, int future_row, int query_offset, int max_seqlen, float scale, float dropout_p"
)
define(
    f"cuda_forward(Tensor(a!) output, Tensor(b!) lse, {_SHARED}) -> ()",
    f"cuda_backward({GRADIENTS}, {_SHARED}, Tensor? first_of_slot) -> ()",
)
# As a constant: torch.compile traces why_not.
BUILT = NOT_LOADED is None and implements("cuda_forward", "CUDA")


def why_not(inputs: AttentionInputs) -> list[str]:
    """Reasons not to serve these inputs."""
    query, mask, reasons = inputs.query, inputs.mask, []
    if NOT_LOADED is not None and not EMULATED:
        reasons.append(NOT_LOADED)
    elif not EMULATED and not BUILT:
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
        room, needed = gpu.shared_memory_per_block_optin, SHARED_BYTES.get(-(-query.shape[-1] // 32) * 32, 0)
        if needed > room:
            reasons.append(
                f"head size {query.shape[-1]} needs {needed} bytes of shared memory a block, the GPU has {room}"
            )
    elif query.device.type != "cpu" or not EMULATED:
        reasons.append(f"tensors must be on an NVIDIA GPU, got {query.device}")
    return reasons


def forward(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, Lq, D) and log-sum-exp (B, H, Lq)."""
    output, lse = inputs.new_like_heads(inputs.query), inputs.new_lse()
    torch.ops.deberta_fast.cuda_forward(output, lse, *_shared(inputs))
    return output, lse


def backward(
    inputs: AttentionInputs,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of query, key, value, pos_key and pos_query, shaped and typed as these; None for an absent table."""
    grads = [inputs.new_like_heads(x) for x in (inputs.query, inputs.key, inputs.value)]
    grads += [None if x is None else x.new_empty(x.shape) for x in (inputs.pos_key, inputs.pos_query)]
    first_of_slot = _tables_on(*_numbering(inputs))[1] if inputs.has_positions else None
    torch.ops.deberta_fast.cuda_backward(
        *grads, _aligned(output), lse, _aligned(grad_output), grad_lse, *_shared(inputs), first_of_slot
    )
    return tuple(grads)


def _shared(x: AttentionInputs) -> tuple:
    heads = (_aligned(heads) for heads in x[:5])
    ends = None if x.cu_seqlens is None else x.cu_seqlens.contiguous()
    positions = (None, 0, 0, 0, 0, 0)
    if x.has_positions:
        table = x.table
        slots, _ = _tables_on(*_numbering(x))
        far_rows = table.slots[-1] - x.first_slot, table.slots[0] - x.first_slot
        positions = (slots, table.far_past, table.far_future, x.first_slot, *far_rows)
    return *heads, x.mask, ends, x.seed, *positions, x.query_offset, x.max_seqlen, x.scale, x.dropout_p


def _aligned(x: torch.Tensor | None) -> torch.Tensor | None:
    """As the kernels read it, 16 bytes at once: rows begin at multiples of 16 bytes. Mostly they do already."""
    if x is None or x.numel() == 0:
        return x
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    if x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and x.stride(-2) <= LARGEST_STRIDE:
        if all(stride * x.element_size() % 16 == 0 for stride in strides):
            return x
    return x.clone(memory_format=torch.contiguous_format)


def _numbering(x: AttentionInputs) -> tuple:
    return x.position_buckets, x.max_relative_positions, x.far_negative, x.query.device


@functools.lru_cache(maxsize=64)
def _tables_on(
    buckets: int, longest: int, far_negative: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """sigma over the distances [-N, N], and the first distance of each row and of the one past the last: int32, on the
    device, copied there once.
    """
    table = slot_table(buckets, longest, far_negative)
    first = [bisect.bisect_left(table.slots, row) - table.reach for row in range(table.rows + 1)]
    # The ends read one row each, however far: nothing lies before the first row that is read, nor after the last.
    first = [
        -LONGEST * 2 if row <= table.slots[0] else LONGEST * 2 if row > table.slots[-1] else distance
        for row, distance in enumerate(first)
    ]
    with torch.inference_mode(False):
        return tuple(torch.tensor(x, dtype=torch.int32, device=device) for x in (table.slots, first))
