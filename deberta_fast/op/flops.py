"""Floating-point operations per call, for torch.utils.flop_counter: two for each term of a matrix product.

    forward    2 D H (2 pairs + n near)                Q K^T and P V; n is the number of position terms
    backward   2 D H (5 pairs + (2 n + t) near)        scores again, dP, dV, dQ, dK; t tables need a gradient

``pairs`` counts pairs of a query and a key, masked ones included, as for torch's own attention. ``near`` counts pairs
whose distance has a table row of its own (equations 6 and 9 of csrc/README.md): each takes D multiplications per term.
Far tiles are plain attention with other queries (7). The count omits what grows only with the length (a query times a
far row), softmax, and what a backend computes needlessly in incomplete tiles.
"""

import sys
from collections.abc import Iterator

import torch

from .call import Call


def forward_flops(*arguments, out_val=None) -> int:
    """Counts ``deberta_fast::attention_forward`` with these arguments."""
    call = Call(*arguments[: len(Call._fields)])
    pairs, near = _pairs(call)
    return 2 * call.query.shape[1] * call.query.shape[3] * (2 * pairs + _terms(call) * near)


def backward_flops(grad_output, grad_lse, output, lse, *arguments, out_val=None) -> int:
    """Counts ``deberta_fast::attention_backward`` with these arguments."""
    call, wanted = Call(*arguments[: len(Call._fields)]), arguments[-1]
    pairs, near = _pairs(call)
    tables = sum(x is not None and want for x, want in zip(call[3:5], wanted[3:], strict=True))
    return 2 * call.query.shape[1] * call.query.shape[3] * (5 * pairs + (2 * _terms(call) + tables) * near)


def _terms(call: Call) -> int:
    return (call.pos_key is not None) + (call.pos_query is not None)


def _pairs(call: Call) -> tuple[int, int]:
    """Returns the pairs of queries and keys of one head, and the near ones among them."""
    pairs = near = 0
    for count, queries, keys in _lengths(call):
        pairs += count * queries * keys
        if call.has_positions:
            # Distances run up to offset + i, and sigma is constant from far_past on and up to far_future.
            start = call.query_offset - call.table.far_past + 1, call.query_offset - call.table.far_future
            near += count * (_steps(start[1], queries, keys) - _steps(start[0], queries, keys))
    return pairs, near


def _lengths(call: Call) -> Iterator[tuple[int, int, int]]:
    """Yields (count, queries, keys) of the dense calls that make up this one."""
    ends, total = call.cu_seqlens, call.query.shape[2]
    if ends is None:
        yield call.query.shape[0], total, call.key.shape[2]
    elif type(ends) is torch.Tensor and not ends.is_meta:
        for length in ends.diff().tolist():
            yield 1, length, length
    elif call.max_seqlen:  # without values, sequences count as max_seqlen long
        yield total // call.max_seqlen, call.max_seqlen, call.max_seqlen
        yield 1, total % call.max_seqlen, total % call.max_seqlen


def _steps(start: int, queries: int, keys: int) -> int:
    """Returns the sum of clamp(start + i, 0, keys) over i < queries: the pairs with j < start + i."""

    def triangle(n):
        return max(n, 0) * (max(n, 0) + 1) // 2

    stop = start + queries - 1
    return triangle(stop) - triangle(start - 1) - triangle(stop - keys) + triangle(start - 1 - keys)


def register() -> None:
    """Registers the formulas with torch's counter, if the program has imported it.

    It is not imported here because it imports Triton. An active counter has copied the registry; its copy is extended.
    """
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    formulas = {
        torch.ops.deberta_fast.attention_forward: forward_flops,
        torch.ops.deberta_fast.attention_backward: backward_flops,
    }
    for operator, formula in formulas.items():
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator, get_raw=True)(formula)
    for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        known = getattr(getattr(mode, "counter", mode), "flop_registry", None)
        if known is not None:
            for operator, formula in formulas.items():
                known.setdefault(operator, formula)
