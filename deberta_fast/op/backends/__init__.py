"""The implementations of disentangled attention: the choice among them, and the call of the chosen one.

A backend is a module that names its reasons not to serve a call (``why_not``) and computes it: ``forward`` and
``backward`` fill the tensors that are allocated here, the reference's ``attention`` is differentiated by torch's
autograd. Backends know neither each other nor anything above them.
"""

from collections.abc import Iterable
from types import ModuleType

import torch

from ..call import Call
from . import cpu, cuda, eager, reference, triton

# In order of preference on a CPU; ``selection`` has that of other devices.
BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "eager": eager, "triton": triton, "cuda": cuda, "reference": reference}


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
    # An ONNX graph knows torch's operators, and none of ours
    if name != "reference" and torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return ["only 'reference' can be exported to ONNX"]
    return BACKENDS[name].why_not(call)


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
