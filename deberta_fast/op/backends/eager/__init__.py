"""Memory-efficient disentangled attention in pure PyTorch, forward and explicit backward, on any device.

Queries are taken in blocks. For one block the keys fall into three segments: far before, near, far after. Scores are
held in base 2 (C = s log2 e); e = j - p is the distance from a query at position p to a key, and K^e = K^r[sigma(-e)]:

    near   Z = C q . k_j  +  skew(C q . K^e)  +  skew(C k_j . Q^e)^T                                      (6)
    far    Z = C (q + Q^r_r) . k_j  +  C q . K^r_r            sigma = r for the whole segment             (7)
    P = 2^(Z - lse log2 e)     dA = P o (dP - Delta)          Delta = rowsum(P o dP) - dlse               (8)

If lse and O are over more keys than these, Delta = rowsum(O o dO) - dlse instead.

Rows of a block are taken last to first. Then e grows along rows and along keys, and both skews are strided views of
products with consecutive rows of the expanded tables: no gather and no slot look-up. Backward writes dA through the
same views. Nothing of size Lq x Lk or L x R is kept; temporaries are a few blocks of scores, allocated once per call.
float16 and bfloat16 are computed in float32.
"""

import functools
from collections.abc import Iterator

import torch

from ...call import Call
from .chunk import Chunk
from .scratch import Scratch
from .tables import Tables

# docs/measured.md says how these were found.
BLOCK_ROWS = 256, 512  # fewest and most; in between, as many as CHUNK_ELEMENTS_CPU holds of one head
CHUNK_ELEMENTS_CPU = 1 << 19  # scores held at once per thread: its share of the caches
CHUNK_THREADS = 8  # the most threads that CHUNK_ELEMENTS_CPU counts for
CHUNK_ELEMENTS = 1 << 25  # scores held at once on a GPU


def why_not(call: Call) -> list[str]:
    """Returns no reasons: this backend serves every call."""
    return []


def _outside_autocast(function):
    """Disables autocast, which would round what is computed in float32 on purpose."""

    @functools.wraps(function)
    def outside(call: Call, *arguments, **options) -> None:
        with torch.autocast(call.query.device.type, enabled=False):
            function(call, *arguments, **options)

    return outside


@_outside_autocast
def forward(call: Call, output: torch.Tensor, lse: torch.Tensor | None) -> None:
    scratch = Scratch(call.query, call.work_dtype)
    for first_batch, x, rows in _dense_calls(call):
        for tables, batches in _parts(x, scratch):
            for batch in batches:
                chunk = Chunk(x, tables, batch, first_batch, scratch)
                chunk.forward(output[:, :, rows], None if lse is None else lse[:, :, rows])


@_outside_autocast
def backward(
    call: Call,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
    grads: list[torch.Tensor | None],
    partial: bool = False,
) -> None:
    """Fills the gradients; output and lse are over more keys than the call's if ``partial``, in equation 8."""
    grad_tables = [None if x is None else torch.zeros_like(x, dtype=call.work_dtype) for x in grads[3:]]
    scratch = Scratch(call.query, call.work_dtype)
    for first_batch, x, rows in _dense_calls(call):
        inputs = [t[:, :, rows] for t in (lse, grad_output, grad_lse)]
        merged = output[:, :, rows] if partial else None
        for tables, batches in _parts(x, scratch):
            tables.start_gradients(scratch)
            for batch in batches:
                chunk = Chunk(x, tables, batch, first_batch, scratch)
                chunk.backward(merged, *inputs, *(t[:, :, rows] for t in grads[:3]))
            tables.add_gradients(*grad_tables)
    for grad, total in zip(grads[3:], grad_tables, strict=True):
        if grad is not None:
            grad.copy_(total)


def _dense_calls(call: Call) -> Iterator[tuple[int, Call, slice]]:
    """Yields (number of the first batch row, dense call, its rows along the length)."""
    if call.cu_seqlens is None:
        yield 0, call, slice(None)
        return
    start = 0
    for sequence, x in enumerate(call.sequences()):
        stop = start + x.query.shape[2]
        yield sequence, x, slice(start, stop)
        start = stop


def _parts(x: Call, scratch: Scratch) -> Iterator[tuple[Tables, list[slice]]]:
    """Yields the tables of some heads with the batch rows to take at once: a block of their scores fits the budget."""
    batch, heads, query_length, _ = x.query.shape
    if heads == 0:
        return
    key_length = x.key.shape[2]
    share = budget = CHUNK_ELEMENTS
    if x.query.device.type == "cpu":
        # Threads share products of several heads by head, which costs less than to divide each product.
        share, budget = CHUNK_ELEMENTS_CPU, CHUNK_ELEMENTS_CPU * min(torch.get_num_threads(), CHUNK_THREADS)
    fewest, most = BLOCK_ROWS
    block_rows = max(1, min(query_length, most, max(fewest, share // max(1, key_length))))
    count = max(1, budget // max(1, block_rows * key_length))
    head_step = -(-heads // -(-heads // min(heads, count)))  # even shares
    batch_step = max(1, count // heads)
    batches = [slice(b, min(b + batch_step, batch)) for b in range(0, batch, batch_step)]
    for h in range(0, heads, head_step):
        yield Tables(x, slice(h, min(h + head_step, heads)), block_rows, scratch), batches
