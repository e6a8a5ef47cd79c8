"""Attention whose keys are divided into several calls, merged by their log-sum-exps: forward and backward."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch

from deberta_fast.op import backends
from deberta_fast.op.call import Call
from deberta_fast.op.dropout import seed_at


class Part(NamedTuple):
    """A call with some rows of the whole call's query and some of its keys."""

    rows: slice
    keys: slice
    call: Call


def cut_at(*cuts: int) -> Callable[[Call], list[Part]]:
    """Divides the keys of a dense call at these indices, which are multiples of 8 if there is dropout."""

    def divide(whole: Call) -> list[Part]:
        heads, keys = whole.query.shape[1], whole.key.shape[2]
        parts = []
        for start, stop in pairwise((0, *cuts, keys)):
            mine = slice(start, stop)
            call = whole._replace(
                key=whole.key[:, :, mine],
                value=whole.value[:, :, mine],
                mask=None if whole.mask is None else whole.mask[..., mine],
                seed=None if whole.seed is None else seed_at(whole.seed, first_key=start, heads=heads),
                query_offset=whole.query_offset - start,
            )
            parts.append(Part(slice(None), mine, call))
        return parts

    return divide


def attention_in_parts(backend: str, divide: Callable[[Call], list[Part]]) -> Callable:
    """Returns a function of a whole call that returns its output (B, H, Lq, D) and log-sum-exp (B, H, Lq)."""
    return lambda whole: _InParts.apply(whole, backend, divide, *whole[:5])


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole, backend, divide, *tensors):
        parts = divide(whole._replace(**{name: x for name, x in zip(Call._fields, tensors)}))
        # In float64, because backward multiplies the rounding of a log-sum-exp into all probabilities of its row.
        output = torch.zeros_like(whole.query, dtype=torch.float64)
        lse = output.new_full(output.shape[:-1], -torch.inf)
        for rows, _, call in parts:
            one, one_lse = backends.forward(call, backend)
            before, after = lse[:, :, rows], torch.logaddexp(lse[:, :, rows], one_lse.double())
            weights = [(x - after).exp().nan_to_num(0.0)[..., None] for x in (before, one_lse)]  # -inf - -inf is NaN
            output[:, :, rows] = weights[0] * output[:, :, rows] + weights[1] * one
            lse[:, :, rows] = after
        ctx.whole, ctx.parts, ctx.backend = whole, parts, backend
        ctx.results = output.to(whole.query.dtype), lse.to(whole.work_dtype)
        return ctx.results

    @staticmethod
    def backward(ctx, grad_output, grad_lse):
        (output, lse), sums = ctx.results, [None if x is None else torch.zeros_like(x) for x in ctx.whole[:5]]
        for rows, keys, call in ctx.parts:
            given = [x[:, :, rows] for x in (output, lse, grad_output, grad_lse)]
            grads = backends.backward(call, ctx.backend, *given, partial=True)
            for total, grad, where in zip(sums, grads, (rows, keys, keys, None, None)):
                if grad is not None:
                    (total if where is None else total[:, :, where]).add_(grad)
        return None, None, None, *sums
