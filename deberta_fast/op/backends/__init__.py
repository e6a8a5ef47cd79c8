"""The implementations of disentangled attention: the choice among them, and the call of the chosen one.

A backend is a module that names its reasons not to serve a call (``why_not``) and computes it: ``forward`` and
``backward`` fill the tensors that are allocated here, the reference's ``attention`` is differentiated by torch's
autograd. Backends know neither each other nor anything above them.
"""

import warnings
from collections.abc import Iterable
from types import ModuleType

import torch
from torch.autograd import forward_ad

from ..call import Call
from . import cpu, cuda, eager, reference, triton

# In order of preference on a CPU; ``selection`` has that of other devices.
BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "eager": eager, "triton": triton, "cuda": cuda, "reference": reference}

ONNX = "only 'reference' can be exported to ONNX"
_told: set[str] = set()  # why the reference ran: once is enough


def check_name(backend: str | None) -> None:
    """
    Raises:
        ValueError: there is no backend of that name; None is the choice call by call.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")


def why_not(call: Call) -> dict[str, list[str]]:
    """For every backend, the reasons for which it cannot serve this call; an empty list where it can."""
    return {name: reasons_against(name, call) for name in BACKENDS}


def choose(name: str | None, call: Call, order: Iterable[str] = BACKENDS) -> str:
    """The backend to run: the one named, or the first of ``order`` without objection.

    Raises:
        ValueError: no backend of that name.
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
        reasons = "; ".join(f"{candidate}: {', '.join(why)}" for candidate, why in why_not(call).items())
        raise RuntimeError(f"no backend can serve this call: {reasons}")
    check_name(name)
    reasons = reasons_against(name, call)
    if reasons:
        raise RuntimeError(f"backend {name!r} cannot serve this call: {', '.join(reasons)}")
    return name


def reasons_against(name: str, call: Call) -> list[str]:
    """The reasons for which one backend cannot serve this call."""
    reason = None if name == "reference" else only_reference(call)
    return BACKENDS[name].why_not(call) if reason is None else [reason]


def only_reference(call: Call) -> str | None:
    """Why torch, in its present state, can do with no other backend than the reference; None where it can.

    What is transformed, traced or differentiated forward has to be made of torch's own operators.
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
    """Whether one of these carries a forward-mode derivative."""
    if forward_ad._current_level < 0:
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def tell(reason: str) -> None:
    """Warns, once in a process, that the reference runs where nobody named it."""
    if reason not in _told:
        _told.add(reason)
        text = f"deberta_fast: running the reference, which holds Lq x Lk scores a head in memory: {reason}"
        warnings.warn(text, stacklevel=3)


def forward(call: Call, backend: str, with_lse: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output (B, H, Lq, D) and log-sum-exp (B, H, Lq), outside autograd; None where nobody wants the second."""
    output, lse = call.new_output(), call.new_lse() if with_lse else None
    BACKENDS[backend].forward(call, output, cpu.with_statistics(lse) if backend == "cpu" and with_lse else lse)
    return output, lse


def backward(
    call: Call,
    backend: str,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    wanted: tuple[bool, ...] = (True,) * 5,
) -> list[torch.Tensor | None]:
    """Gradients of query, key, value, pos_key and pos_query, shaped and typed as these.

    Args:
        grad_output, grad_lse: None counts as zeros.
        wanted: of the five, those that somebody asks for. A table's is None where nobody does; those of query, key and
            value are made together.
    """
    grads = call.new_gradients(wanted)
    if grad_output is None:
        grad_output = _zeros_like(output)
    # The CPU's kernels take None; what the others are handed takes one element.
    if grad_lse is None and backend != "cpu":
        grad_lse = _zeros_like(lse)
    BACKENDS[backend].backward(call, output, lse, grad_output, grad_lse, grads)
    return grads


def _zeros_like(x: torch.Tensor) -> torch.Tensor:
    return x.new_zeros(()).expand(x.shape)
