"""The implementations of disentangled attention, and the choice among them.

A backend is a module that names its reasons not to serve a call (``why_not``) and computes it (``forward`` and
``backward``, or ``attention`` where torch's autograd differentiates it). Backends know neither each other nor anything
above them.
"""

from types import ModuleType

import torch

from ..call import AttentionInputs
from . import cpu, cuda, eager, reference, triton

# In order of preference. What no GPU has run yet stands behind eager, which serves everything: it has to be named.
BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "eager": eager, "triton": triton, "cuda": cuda, "reference": reference}


def why_not(inputs: AttentionInputs) -> dict[str, list[str]]:
    """For every backend, the reasons for which it cannot serve this call; an empty list where it can."""
    return {name: _reasons_against(name, inputs) for name in BACKENDS}


def choose(name: str | None, inputs: AttentionInputs) -> str:
    """The backend to run: the one named, or the first without objection.

    Raises:
        ValueError: no backend of that name.
        RuntimeError: the backend named, or every backend, has reasons not to serve this call; they are listed.
    """
    if name is None:
        for candidate in BACKENDS:
            if not _reasons_against(candidate, inputs):
                return candidate
        reasons = "; ".join(f"{candidate}: {', '.join(why)}" for candidate, why in why_not(inputs).items())
        raise RuntimeError(f"no backend can serve this call: {reasons}")
    check_name(name)
    reasons = _reasons_against(name, inputs)
    if reasons:
        raise RuntimeError(f"backend {name!r} cannot serve this call: {', '.join(reasons)}")
    return name


def check_name(name: str | None) -> None:
    """Whether ``name`` is a backend's, or None for the best one.

    Raises:
        ValueError: no backend of that name.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")


def _reasons_against(name: str, inputs: AttentionInputs) -> list[str]:
    # An ONNX graph knows torch's operators, and none of ours
    if name != "reference" and torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return ["only 'reference' can be exported to ONNX"]
    return BACKENDS[name].why_not(inputs)
