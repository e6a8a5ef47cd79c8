"""The way from a call to its backend: direct, or through torch operators in traced programs.

In eager mode the autograd function passes the ``Call`` to the backend without a dispatcher. Where torch has to see an
operator (torch.compile, torch.export, FakeTensor, tensor subclasses, meta tensors), the same backend runs behind the
operators defined here, which have fake kernels. The backends have no second derivatives, torch.func transforms or
forward mode: the reference serves these.

The operators take packed sequences as a dense batch of one with cu_seqlens. They return an empty tensor for an absent
gradient, because a schema cannot return an optional tensor. ``Call`` describes the tensors.
"""

import torch

from . import backends, flops
from .call import TENSORS, Call, check_cu_seqlens_values

_CALL = (
    "Tensor query, Tensor key, Tensor value, Tensor? pos_key, Tensor? pos_query, Tensor? mask, Tensor? cu_seqlens, "
    "Tensor? seed, int position_buckets, int max_relative_positions, str far_negative, int first_slot, "
    "SymInt query_offset, SymInt max_seqlen, float scale, float dropout_p, str backend"
)
_library = torch.library.Library("deberta_fast", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(f"attention_forward({_CALL}) -> (Tensor, Tensor)", tags=_TAGS)
_library.define(
    "attention_backward(Tensor? grad_output, Tensor? grad_lse, Tensor output, Tensor lse, "
    f"{_CALL}, bool[5] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define("checked_cu_seqlens(Tensor cu_seqlens, SymInt total, SymInt max_seqlen) -> Tensor", tags=_TAGS)

_PLAIN = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, type(None)}


def attend(call: Call, backend: str, with_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns output (B, H, Lq, D) and log-sum-exp (B, H, Lq) of a checked call.

    Without with_lse, the log-sum-exp may be None.
    """
    if _is_traced(call[:TENSORS]):
        if not torch.compiler.is_compiling():
            flops.register()
        return torch.ops.deberta_fast.attention_forward(*call, backend)
    if torch.is_grad_enabled() and any([x.requires_grad for x in call[:5] if x is not None]):
        return _Attention.apply(call, backend, False, *call[:5])
    return backends.forward(call, backend, with_lse)


def checked_cu_seqlens(cu_seqlens: torch.Tensor, total: int, max_seqlen: int) -> torch.Tensor:
    """Returns a checked copy of cu_seqlens, int32 (n + 1,). A traced program checks it when it runs.

    It is a copy because backward reads it again, and the caller may have written to it by then.

    Raises:
        ValueError: it does not rise from 0 to total in steps of at most max_seqlen. On a device, a device-side
            assertion fails instead, without synchronising.
    """
    if _is_traced((cu_seqlens,)):
        return torch.ops.deberta_fast.checked_cu_seqlens(cu_seqlens, total, max_seqlen)
    return _checked(cu_seqlens, total, max_seqlen)


def _is_traced(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """Tells whether torch has to see an operator instead of what a backend does with the tensors."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or not _PLAIN.issuperset(map(type, tensors))
        or tensors[0].is_meta
    )


def _is_batched(grad: torch.Tensor | None) -> bool:
    """Tells whether this is a batch of cotangents: is_grads_batched, or jacobian(vectorize=True)."""
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


class _Attention(torch.autograd.Function):
    """``backends.forward`` with ``backends.backward`` as its derivative, in eager mode and behind the operators.

    ``backends.backward`` has no derivative. If one may be needed, the reference is differentiated instead.
    """

    @staticmethod
    def forward(ctx, call, backend, traced, *differentiable):
        if traced:
            with torch._C._AutoDispatchBelowAutograd():
                output, lse = torch.ops.deberta_fast.attention_forward(*call, backend)
        else:
            output, lse = backends.forward(call, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*call[:TENSORS], output, lse)
        ctx.settings, ctx.backend = call[TENSORS:], backend
        return output, lse

    @staticmethod
    def backward(ctx, grad_output, grad_lse):
        *tensors, output, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        if grad_output is None and grad_lse is None:
            return (None,) * (3 + len(wanted))
        call = Call(*tensors, *ctx.settings)
        if torch.is_grad_enabled() or backends.has_tangents((grad_output, grad_lse)):
            grads = _differentiable_gradients(call, grad_output, grad_lse, wanted)
        elif _is_traced(tensors) or _is_batched(grad_output) or _is_batched(grad_lse):
            flops.register()
            grads = torch.ops.deberta_fast.attention_backward(
                grad_output, grad_lse, output, lse, *call, ctx.backend, wanted
            )
        else:
            grads = backends.backward(call, ctx.backend, output, lse, grad_output, grad_lse, wanted)
        return None, None, None, *(grad if want else None for grad, want in zip(grads, wanted, strict=True))


def _differentiable_gradients(
    call: Call, grad_output: torch.Tensor | None, grad_lse: torch.Tensor | None, wanted: tuple[bool, ...]
) -> list[torch.Tensor | None]:
    """Returns the gradients of ``backends.backward`` by autograd through the reference, differentiable to any order."""
    backends.tell("only 'reference' has second derivatives")
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), call.outside_autocast():
        # Views make the derivatives partial, even if one tensor is passed twice or is made from another.
        inputs = [x.view_as(x) if want else x for x, want in zip(call[:5], wanted, strict=True)]
        output, lse = backends.reference.attention(Call(*inputs, *call[5:]))
        if not output.requires_grad:
            raise RuntimeError(
                "torch.func cannot differentiate the backward pass of a call made outside of it; "
                "with backend='reference' it can"
            )
        results, cotangents = [output], [torch.zeros_like(output) if grad_output is None else grad_output]
        if grad_lse is not None and lse.requires_grad:  # not if only value needs a gradient
            results.append(lse)
            cotangents.append(grad_lse)
        asked = [x for x, want in zip(inputs, wanted, strict=True) if want]
        made = iter(torch.autograd.grad(results, asked, cotangents, create_graph=create_graph, materialize_grads=True))
    return [next(made) if want else None for want in wanted]


def _forward(*arguments):
    return backends.forward(Call(*arguments[:-1]), arguments[-1])


def _backward(grad_output, grad_lse, output, lse, *arguments):
    *fields, backend, wanted = arguments
    call = Call(*fields)
    grads = backends.backward(call, backend, output, lse, grad_output, grad_lse, tuple(wanted))
    return tuple(call.query.new_empty(0) if grad is None else grad for grad in grads)


def _checked(cu_seqlens, total, max_seqlen):
    check_cu_seqlens_values(cu_seqlens, total, max_seqlen)
    return cu_seqlens.clone()


def _fake_forward(*arguments):
    # The exporter's second try does not come through ``backends.only_reference``.
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        raise RuntimeError(f"backend {arguments[-1]!r} cannot serve this call: {backends.ONNX}")
    call = Call(*arguments[:-1])
    return call.new_output(), call.new_lse()


def _fake_backward(grad_output, grad_lse, output, lse, *arguments):
    *fields, _, wanted = arguments
    call = Call(*fields)
    return tuple(call.query.new_empty(0) if grad is None else grad for grad in call.new_gradients(tuple(wanted)))


def _differentiable_forward(*arguments):
    """Serves the operator under autograd: in torch.compile, and in programs that torch.export made."""
    flops.register()
    call, tensors = Call(*arguments[:-1]), arguments[:5]
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    # Transforms of a traced program: ``_Attention`` supports neither kind.
    if backends.has_tangents(tensors) or (differentiable and torch._C._are_functorch_transforms_active()):
        backends.tell("only 'reference' has derivatives by forward mode and torch.func")
        with call.outside_autocast():
            return backends.reference.attention(call)
    if differentiable:
        return _Attention.apply(call, arguments[-1], True, *tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.deberta_fast.attention_forward(*arguments)


def _backward_once(*arguments):
    """Serves the operator under autograd, where ``_Attention`` calls it only if no derivative of it is needed."""
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    if (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)) or backends.has_tangents(tensors):
        raise RuntimeError("deberta_fast::attention_backward has no derivative; backend='reference' has all")
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.deberta_fast.attention_backward(*arguments)


for _name, _kernel, _fake in (
    ("attention_forward", _forward, _fake_forward),
    ("attention_backward", _backward, _fake_backward),
    ("checked_cu_seqlens", _checked, lambda cu_seqlens, total, max_seqlen: torch.empty_like(cu_seqlens)),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"deberta_fast::{_name}", _fake, lib=_library)
_library.impl("attention_forward", _differentiable_forward, "Autograd")
_library.impl("attention_backward", _backward_once, "Autograd")
