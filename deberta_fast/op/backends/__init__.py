"""The implementations of disentangled attention: chooses one and calls it.

A backend is a module with three functions. Backends import neither each other nor anything above them.

- ``why_not(call)`` returns reasons not to serve a call.
- ``forward(call, output, lse)`` fills output (B, H, Lq, D) and, unless it is None, the log-sum-exp (B, H, Lq).
- ``backward(call, output, lse, grad_output, grad_lse, grads)`` fills grads, the gradients of query, key, value, pos_key
  and pos_query. Those of the tables may be None. From output and lse over more keys than the call's it computes the
  gradients' share of the call's keys; ``eager`` has to be told so, by ``partial``.

The reference has ``attention`` instead of the last two, which torch's autograd differentiates.
"""

import warnings
from collections.abc import Iterable
from types import ModuleType

import torch
from torch.autograd import forward_ad

from ..call import Call
from . import cpu, cuda, eager, reference, triton

# In order of preference on a CPU; ``selection`` has the order on other devices.
BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "eager": eager, "triton": triton, "cuda": cuda, "reference": reference}

ONNX = "only 'reference' can be exported to ONNX"
_told: set[str] = set()  # reasons for the reference that were warned about


def check_name(backend: str | None) -> None:
    """Checks the name of a backend, or None for a choice per call.

    Raises:
        ValueError: no backend has that name.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")


def why_not(call: Call) -> dict[str, list[str]]:
    """Returns, by backend, the reasons why it cannot serve this call; empty if it can."""
    return {name: reasons_against(name, call) for name in BACKENDS}


def choose(name: str | None, call: Call, order: Iterable[str] = BACKENDS) -> str:
    """Returns the backend to run: the one named, or the first of ``order`` that can serve the call.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend named, or every backend, has reasons not to serve this call; they are listed.
    """
    if name is None:
        for candidate in order:
            if not reasons_against(candidate, call):
                if candidate == "reference" and not torch.compiler.is_compiling():
                    reason = only_reference(call)
                    if reason is not None:
                        tell(reason)
                return candidate
        listed = "; ".join(f"{candidate}: {', '.join(why)}" for candidate, why in why_not(call).items())
        raise RuntimeError(f"no backend can serve this call: {listed}")
    check_name(name)
    reasons = reasons_against(name, call)
    if reasons:
        raise RuntimeError(f"backend {name!r} cannot serve this call: {', '.join(reasons)}")
    return name


def reasons_against(name: str, call: Call) -> list[str]:
    """Returns the reasons why one backend cannot serve this call."""
    reason = None if name == "reference" else only_reference(call)
    return BACKENDS[name].why_not(call) if reason is None else [reason]


def only_reference(call: Call) -> str | None:
    """Returns why only the reference can run in torch's present state, or None.

    torch.func, torch.jit.trace, ONNX export and forward-mode derivatives need code that is made of torch's operators.
    """
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return ONNX
    if torch.compiler.is_compiling():
        return None
    if torch._C._get_tracing_state() is not None:
        return ONNX if torch.onnx.is_in_onnx_export() else "only 'reference' can be traced by torch.jit"
    if torch._C._are_functorch_transforms_active():
        return "only 'reference' can be transformed by torch.func"
    if forward_ad._current_level >= 0 and has_tangents(call[:5]):
        return "only 'reference' has forward-mode derivatives"
    return None


def has_tangents(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Tells whether one of these carries a forward-mode derivative."""
    if forward_ad._current_level < 0:
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def tell(reason: str) -> None:
    """Warns, once per reason and process, that the reference runs although no caller named it."""
    if reason not in _told:
        _told.add(reason)
        text = f"deberta_fast: running the reference, which holds Lq x Lk scores per head in memory: {reason}"
        warnings.warn(text, stacklevel=3)


def forward(call: Call, backend: str, with_lse: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns output (B, H, Lq, D) and log-sum-exp (B, H, Lq) or None, outside autograd."""
    output, lse = call.new_output(), call.new_lse() if with_lse else None
    own = cpu.with_statistics(lse) if backend == "cpu" and lse is not None else lse
    BACKENDS[backend].forward(call, output, own)
    return output, lse


def backward(
    call: Call,
    backend: str,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    wanted: tuple[bool, ...] = (True,) * 5,
    partial: bool = False,
) -> list[torch.Tensor | None]:
    """Returns gradients of query, key, value, pos_key and pos_query, with their shapes and dtypes.

    If the keys of a query are divided into several calls, and output and lse are those over all of them, the gradients
    of the calls add up to those of one call with all keys: P = exp(A - lse), dA = P o (dP - rowsum(O o dO) + dlse).

    Args:
        output, lse: as ``forward`` returned them, or with ``partial`` (B, H, Lq, D) in query's dtype and (B, H, Lq) in
            ``call.work_dtype`` over more keys than the call's.
        grad_output, grad_lse: None counts as zeros.
        wanted: which of the five are needed. A table's gradient is None if it is not; the other three are always
            computed.
        partial: output and lse are over more keys than this call's. The reference cannot serve it.
    """
    grads = call.new_gradients(wanted)
    if grad_output is None:
        grad_output = _zeros_like(output)
    # The CPU's kernels take None. The others get an expanded zero, which takes one element of memory.
    if grad_lse is None and backend != "cpu":
        grad_lse = _zeros_like(lse)
    # The others always take Delta from output and grad_output.
    options = {"partial": True} if partial and backend == "eager" else {}
    BACKENDS[backend].backward(call, output, lse, grad_output, grad_lse, grads, **options)
    return grads


def _zeros_like(x: torch.Tensor) -> torch.Tensor:
    return x.new_zeros(()).expand(x.shape)
