"""Memory-efficient disentangled attention in pure PyTorch, forward and written-out backward, on any device.

Queries are taken in blocks. For one block the keys fall into three segments: far before, near, far after. Scores are
held in base 2 (C = s log2 e); e = j - p is the distance from a query at position p to a key, and K^e = K^r[sigma(-e)]:

    near   Z = C q . k_j  +  skew(C q . K^e)  +  skew(C k_j . Q^e)^T                                      (6)
    far    Z = C (q + Q^r_r) . k_j  +  C q . K^r_r            sigma = r all over the segment              (7)
    P = 2^(Z - lse log2 e)     dA = P o (dP - Delta)          Delta = rowsum(P o dP) - dlse               (8)

Rows of a block are taken last to first: then e grows along rows and along keys, and both skews are plain views of
products with consecutive rows of the expanded tables: nothing is gathered, no slot is looked up. Backward writes dA
through the same views. Nothing of size Lq x Lk or L x R is kept; temporaries are a few blocks of scores, allocated once
a call or, for backward on a CPU, once a thread. float16 and bfloat16 are computed in float32.
"""

import functools
from collections.abc import Iterator

import torch

from ...call import Call
from .chunk import Chunk
from .scratch import Scratch, kept_scratch
from .tables import Tables

# docs/measured.md says how these were found.
BLOCK_ROWS = 256, 512  # fewest and most; in between, as many as CHUNK_ELEMENTS_CPU holds of one head
CHUNK_ELEMENTS_CPU = 1 << 19  # scores held at once: a thread's share of the caches,
CHUNK_THREADS = 8  # for as many threads at most,
CHUNK_ELEMENTS = 1 << 25  # or what fills a GPU


def why_not(call: Call) -> list[str]:
    """Reasons not to serve these call: none."""
    return []


def _outside_autocast(function):
    """Autocast would round what is computed in float32 on purpose."""

    @functools.wraps(function)
    def outside(call: Call, *arguments) -> None:
        with torch.autocast(call.query.device.type, enabled=False):
            function(call, *arguments)

    return outside


@_outside_autocast
def forward(call: Call, output: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Fills output (B, H, Lq, D) and, unless it is None, log-sum-exp (B, H, Lq)."""
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
) -> None:
    """Fills the gradients of query, key, value, pos_key and pos_query; None where a table's is not wanted."""
    grad_heads = grads[:3]
    grad_tables = [None if x is None else torch.zeros_like(x, dtype=call.work_dtype) for x in grads[3:]]
    with kept_scratch(call.query, call.work_dtype) as scratch:
        for first_batch, x, rows in _dense_calls(call):
            given = [t[:, :, rows] for t in (lse, grad_output, grad_lse)]
            for tables, batches in _parts(x, scratch):
                tables.start_gradients(scratch)
                for batch in batches:
                    chunk = Chunk(x, tables, batch, first_batch, scratch)
                    chunk.backward(*given, *(t[:, :, rows] for t in grad_heads))
                tables.add_gradients(*grad_tables)
    for grad, total in zip(grads[3:], grad_tables, strict=True):
        if grad is not None:
            grad.copy_(total)


def _dense_calls(call: Call) -> Iterator[tuple[int, Call, slice]]:
    """(number of the first batch row, dense call, its place along the length)."""
    if call.cu_seqlens is None:
        yield 0, call, slice(None)
        return
    start = 0
    for sequence, x in enumerate(call.sequences()):
        stop = start + x.query.shape[2]
        yield sequence, x, slice(start, stop)
        start = stop


def _parts(x: Call, scratch: Scratch) -> Iterator[tuple[Tables, list[slice]]]:
    """The tables of some heads, and the batch rows to take at once, so that a block of scores fits the budget."""
    batch, heads, query_length, _ = x.query.shape
    if heads == 0:
        return
    key_length = x.key.shape[2]
    share = budget = CHUNK_ELEMENTS
    if x.query.device.type == "cpu":
        # Products of several heads are shared out by head, which costs less than to divide each of them.
        share, budget = CHUNK_ELEMENTS_CPU, CHUNK_ELEMENTS_CPU * min(torch.get_num_threads(), CHUNK_THREADS)
    fewest, most = BLOCK_ROWS
    block_rows = max(1, min(query_length, most, max(fewest, share // max(1, key_length))))
    count = max(1, budget // max(1, block_rows * key_length))
    head_step = -(-heads // -(-heads // min(heads, count)))  # even shares
    batch_step = max(1, count // heads)
    batches = [slice(b, min(b + batch_step, batch)) for b in range(0, batch, batch_step)]
    for h in range(0, heads, head_step):
        yield Tables(x, slice(h, min(h + head_step, heads)), block_rows, scratch), batches
