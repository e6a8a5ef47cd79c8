"""The two operators torch knows: schemas, fake kernels (shapes without data), the call of the chosen backend, and how
the second is the first one's derivative.

Packed sequences are a dense batch of one with cu_seqlens. A gradient of an absent table is an empty tensor, since a
schema cannot return an optional one. What the tensors mean is written at ``AttentionInputs``.
"""

import torch
from torch.autograd.function import once_differentiable

from . import backends
from .call import AttentionInputs

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? pos_key, Tensor? pos_query, Tensor? mask, Tensor? cu_seqlens, "
    "Tensor? seed, int position_buckets, int max_relative_positions, str far_negative, int first_slot, "
    "SymInt query_offset, SymInt max_seqlen, float scale, float dropout_p, str backend"
)
_library = torch.library.Library("deberta_fast", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(f"attention_forward({_INPUTS}) -> (Tensor, Tensor)", tags=_TAGS)
_library.define(
    "attention_backward(Tensor grad_output, Tensor grad_lse, Tensor output, Tensor lse, "
    f"{_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _forward(*arguments):
    inputs, backend = AttentionInputs(*arguments[:-1]), arguments[-1]
    check_cu_seqlens(inputs)
    with torch.autocast(inputs.query.device.type, enabled=False):
        return backends.BACKENDS[backend].forward(inputs)


def _backward(grad_output, grad_lse, output, lse, *arguments):
    inputs, backend = AttentionInputs(*arguments[:-1]), arguments[-1]
    with torch.autocast(inputs.query.device.type, enabled=False):
        grads = backends.BACKENDS[backend].backward(inputs, output, lse, grad_output, grad_lse)
    return tuple(inputs.query.new_empty(0) if grad is None else grad for grad in grads)


def _fake_forward(*arguments):
    # Asked again: the exporter's second try hides from Python that it is one
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            f"backend {arguments[-1]!r} cannot serve this call: only 'reference' can be exported to ONNX"
        )
    inputs = AttentionInputs(*arguments[:-1])
    return inputs.new_like_heads(inputs.query), inputs.new_lse()


def _fake_backward(grad_output, grad_lse, output, lse, *arguments):
    inputs = AttentionInputs(*arguments[:-1])
    grads = [inputs.new_like_heads(heads) for heads in inputs[:3]]
    tables = [
        inputs.query.new_empty(0 if table is None else table.shape) for table in (inputs.pos_key, inputs.pos_query)
    ]
    return *grads, *tables


def check_cu_seqlens(inputs: AttentionInputs) -> None:
    """The values of cu_seqlens: read here, where data exist also under torch.compile.

    On the host a mistake raises ValueError. On a device nobody waits for them: a mistake trips a device-side assertion.
    """
    if inputs.cu_seqlens is None:
        return
    total, longest = inputs.query.shape[2], inputs.max_seqlen
    ends = inputs.cu_seqlens
    lengths = ends.diff()
    expected = f"cu_seqlens must rise from 0 to {total} in steps of 0 to max_seqlen={longest}"
    right = (ends[0] == 0) & (ends[-1] == total) & ((lengths >= 0) & (lengths <= longest)).all()
    if ends.device.type != "cpu":
        torch._assert_async(right, expected)
    elif not right:
        raise ValueError(f"{expected}, got {ends.tolist()}")


for _name, _kernel, _fake in (
    ("attention_forward", _forward, _fake_forward),
    ("attention_backward", _backward, _fake_backward),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"deberta_fast::{_name}", _fake, lib=_library)


class DisentangledAttention(torch.autograd.Function):
    """attention_forward with attention_backward as its derivative: what functions call, a third of the host time of
    leaving it to the dispatcher."""

    @staticmethod
    def forward(ctx, *arguments):
        if torch.compiler.is_compiling():
            output, lse = torch.ops.deberta_fast.attention_forward(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                output, lse = torch.ops.deberta_fast.attention_forward(*arguments)
        tensors = AttentionInputs._fields.index("position_buckets")
        ctx.save_for_backward(*arguments[:tensors], output, lse)
        ctx.settings = arguments[tensors:]
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_lse):
        *tensors, output, lse = ctx.saved_tensors
        grads = torch.ops.deberta_fast.attention_backward(grad_output, grad_lse, output, lse, *tensors, *ctx.settings)
        grads = [None if given is None else grad for given, grad in zip(tensors, grads, strict=False)]
        return *grads, *(None,) * (len(tensors) - len(grads) + len(ctx.settings))


def _differentiable_forward(*arguments):
    """Of whoever calls the operator itself: a program made by torch.export."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:5]):
        return DisentangledAttention.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.deberta_fast.attention_forward(*arguments)


_library.impl("attention_forward", _differentiable_forward, "Autograd")
