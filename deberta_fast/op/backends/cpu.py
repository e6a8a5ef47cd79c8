"""Fused disentangled attention in C++ for the CPU, forward and backward (csrc/cpu).

Tiles of scores stay in the caches: c2p and p2c are small products with tables that have one row a distance, added to
the content scores along a shifted row pointer (equation 6); far tiles are plain attention with other queries
(equation 7). Everything is computed in float32. There are kernels for AVX-512, for AVX2 and for any other CPU; torch
decides which ones run (``torch.backends.cpu.get_cpu_capability``, hence ATEN_CPU_CAPABILITY).
"""

import functools

import torch

from ..call import AttentionInputs
from ..relative_position import slot_table
from .extension import GRADIENTS, NOT_LOADED, SHARED_ARGUMENTS, define

CAPABILITIES = {"AVX512": "avx512", "AVX2": "avx2"}  # torch's names and ours; any other is "plain"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_SHARED = f"{SHARED_ARGUMENTS}, int query_offset, float scale, float dropout_p, str capability"
define(
    # What is written to comes first.
    f"cpu_forward(Tensor(a!) output, Tensor(b!) lse, {_SHARED}) -> ()",
    f"cpu_backward({GRADIENTS}, {_SHARED}) -> ()",
)


def why_not(inputs: AttentionInputs) -> list[str]:
    """Reasons not to serve these inputs."""
    reasons = [] if NOT_LOADED is None else [NOT_LOADED]
    if inputs.query.device.type != "cpu":
        reasons.append(f"tensors must be on the CPU, got {inputs.query.device}")
    if inputs.query.dtype not in DTYPES:
        reasons.append(f"dtype must be float32, bfloat16 or float16, got {inputs.query.dtype}")
    return reasons


def forward(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, Lq, D) and log-sum-exp (B, H, Lq)."""
    output, lse = inputs.new_like_heads(inputs.query), inputs.new_lse()
    torch.ops.deberta_fast.cpu_forward(output, lse, *_shared(inputs))
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
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    torch.ops.deberta_fast.cpu_backward(*grads, output, lse, grad_output, grad_lse, *_shared(inputs))
    return tuple(grads)


def _shared(x: AttentionInputs) -> tuple:
    slots, far_past, far_future = None, 0, 0
    if x.has_positions:
        slots, far_past, far_future = _slots(x.position_buckets, x.max_relative_positions, x.far_negative)
    return (
        *(x.query, x.key, x.value, x.pos_key, x.pos_query, x.mask, x.cu_seqlens, x.seed),
        *(slots, far_past, far_future, x.first_slot, x.query_offset, x.scale, x.dropout_p, _capability()),
    )


@functools.lru_cache(maxsize=64)
def _slots(*numbering) -> tuple[torch.Tensor, int, int]:
    """``slot_table`` as the kernels read it: sigma as int32 (2N + 1,), far_past and far_future."""
    table = slot_table(*numbering)
    with torch.inference_mode(False):
        return torch.tensor(table.slots, dtype=torch.int32), table.far_past, table.far_future


def _capability() -> str:
    return CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), "plain")
