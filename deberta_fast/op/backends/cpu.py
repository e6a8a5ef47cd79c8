"""Fused disentangled attention in C++ for the CPU, forward and backward (csrc/cpu).

Tiles of scores stay in the caches: c2p and p2c are small products with the rows of the tables that these distances
read, spread to the distances and added to the content scores (equation 6). Far tiles are plain attention with other
queries (equation 7). The extension has kernels for AVX-512, for AVX2 and for any other CPU, which compute in float32;
torch decides which ones run (``torch.backends.cpu.get_cpu_capability``, hence ATEN_CPU_CAPABILITY). With AVX-512,
bfloat16 is multiplied by AMX or AVX512_BF16 where the processor has them and the operating system permits it. Sums are
in float32 there too, and numbers below the smallest normal one, 2^-126, count as zero.
"""

import contextlib

import torch

from ..call import STATISTICS, Call
from . import extension
from .extension import NOT_LOADED, arguments

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VECTORS = {"AVX512": "avx512", "AVX2": "avx2"}  # by torch's name for them
SETS = ("amx", "avx512_bf16", "avx512", "avx2", "plain")


def instruction_set(dtype: torch.dtype = torch.bfloat16) -> str:
    """Returns the name of the kernels that this process uses for a dtype."""
    return (instruction_sets(dtype) or ["plain"])[0]


def instruction_sets(dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Returns the instruction sets that run on this processor and differ in a dtype, the one in use first.

    There are most in bfloat16, and none without the extension.
    """
    if NOT_LOADED is not None:
        return []
    vectors = VECTORS.get(torch.backends.cpu.get_cpu_capability(), "plain")
    products = ""
    if dtype == torch.bfloat16 and vectors == "avx512":
        products = torch.ops.deberta_fast.bfloat16_instruction_sets()
    return [*products.split(), *SETS[SETS.index(vectors) :]]


def built_sets() -> list[str]:
    """Returns the instruction sets that the extension was built with, for this processor or not."""
    return torch.ops.deberta_fast.built_instruction_sets().split() if NOT_LOADED is None else []


@contextlib.contextmanager
def using(name: str):
    """Makes all threads of the process use the kernels of another instruction set within the context."""
    torch.ops.deberta_fast.use_instruction_set(name)
    try:
        yield
    finally:
        torch.ops.deberta_fast.use_instruction_set(instruction_set())


if NOT_LOADED is None and extension.implements("fused_forward", "CPU"):
    torch.ops.deberta_fast.use_instruction_set(instruction_set())


def release_memory() -> int:
    """Frees the scratch memory that the CPU kernels keep for the next calls of this thread; returns its bytes.

    A thread that calls the kernels keeps at most 64 MiB, because fresh memory costs more to touch than a short sequence
    to attend. Threads of torch's pool keep a few hundred kilobytes each, which stay.
    """
    return torch.ops.deberta_fast.release_memory() if NOT_LOADED is None else 0


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Returns whether two CPU tensors hold the same bits, so that -0 differs from 0 and a NaN equals itself."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    if NOT_LOADED is None and x.is_contiguous() and y.is_contiguous():
        return torch.ops.deberta_fast.same_bits.default(x.detach(), y.detach())
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.equal(x.detach().view(bits), y.detach().view(bits))


def why_not(call: Call) -> list[str]:
    """Returns the reasons not to serve this call."""
    reasons = [] if NOT_LOADED is None else [NOT_LOADED]
    query = call.query
    if not query.is_cpu:
        reasons.append(f"tensors must be on the CPU, got {query.device}")
    if query.dtype not in DTYPES:
        reasons.append(f"dtype must be float32, bfloat16 or float16, got {query.dtype}")
    return reasons


def forward(call: Call, output: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Fills output (B, H, Lq, D) and, unless it is None, log-sum-exp (B, H, Lq), or all ``with_statistics``."""
    extension.fused_forward(output, lse, *arguments(call))


def backward(
    call: Call,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    grads: list[torch.Tensor | None],
) -> None:
    """Fills the gradients of query, key, value, pos_key and pos_query; None if a table's is not wanted.

    Probabilities add up to 1 for any scores if ``lse`` is the tensor that ``backends.forward`` returned. For a copy of
    it, or a log-sum-exp over more keys than these, they are exp(A - lse) with the rounding of lse.
    """
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    extension.fused_backward(*grads, output, with_statistics(lse), grad_output, grad_lse, *arguments(call))


def with_statistics(lse: torch.Tensor) -> torch.Tensor:
    """Returns the STATISTICS, (3, B, H, Lq), if ``lse`` (B, H, Lq) is the first in a storage of them, else ``lse``.

    The row maximum and the row sum are those of the terms that backward computes again; a float32 log-sum-exp of large
    scores is less precise. The kernels check that the two make up the log-sum-exp.
    """
    each, shape = lse.numel(), (STATISTICS, *lse.shape)
    bytes_of_all = shape[0] * each * lse.element_size()
    if lse.storage_offset() or not lse.is_contiguous() or lse.untyped_storage().nbytes() != bytes_of_all:
        return lse
    return lse.as_strided(shape, (each, *lse.stride()))
