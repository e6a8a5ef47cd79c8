"""The error budgets of this package and its problems, for anybody who writes a kernel for disentangled attention.

``assert_backend`` judges an implementation, ``assert_as_precise`` one tensor. The rule allows twice the error of
Hugging Face's eager code in the same dtype, as a maximum and as a mean (``op/precision.py``, equations 1 and 2). ::

    from deberta_fast import testing

    testing.assert_backend(my_backend, dtype=torch.bfloat16, device="cuda")
"""

from collections.abc import Iterable

import torch

from .op.call import Call
from .op.precision import Precision, assert_as_precise, hf_style_attention, precision
from .op.problems import COMMON, Kind, Problem, call_of, problems
from .op.proof import Backend, Judge, Verdict

__all__ = [
    "COMMON",
    "Backend",
    "Call",
    "Kind",
    "Precision",
    "Problem",
    "Verdict",
    "assert_as_precise",
    "assert_backend",
    "call_of",
    "hf_style_attention",
    "precision",
    "problems",
]


def assert_backend(
    backend: Backend,
    *,
    dtype: torch.dtype = torch.float32,
    head_size: int = 64,
    device: torch.device | str = "cpu",
    kinds: Iterable[Kind] = COMMON,
) -> dict[Kind, Verdict]:
    """Requires that a backend solves the problems of every kind of call that it does not refuse.

    Each problem is run twice, forward and backward with all gradients, on unit-variance inputs. The results must keep
    their error budget, be the same bits both times, leave no element unwritten and no input changed. The output of a
    query that sees no key must be zero, and its log-sum-exp -inf.

    Args:
        backend: a module or object with ``why_not``, ``forward`` and ``backward`` (``Backend`` describes them).
        dtype: dtype of the inputs: float32, bfloat16 or float16.
        head_size: D, the size of a head.
        device: where the inputs lie. The exact results are computed on the CPU.
        kinds: kinds of calls: which position terms, masks, packing, dropout.

    Returns:
        A verdict per kind: how many problems were solved, the largest error as a share of its bound and where it arose,
        or the reasons for which the backend refused.

    Raises:
        AssertionError: a problem is not solved, or the backend refuses them all; the message lists what and why.
        ValueError: dtype is another one.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    verdicts = {kind: _judged(backend, kind, dtype, head_size, torch.device(device)) for kind in kinds}
    failures = [f"{kind}: {verdict.failure}" for kind, verdict in verdicts.items() if verdict.failure]
    if not failures and not any(verdict.passed for verdict in verdicts.values()):
        failures = [f"{kind}: refused: {', '.join(verdict.reasons)}" for kind, verdict in verdicts.items()]
        failures = failures or ["no kinds were given"]
    if failures:
        raise AssertionError("\n".join(failures))
    return verdicts


def _judged(backend: Backend, kind: Kind, dtype: torch.dtype, head_size: int, device: torch.device) -> Verdict:
    verdict = Verdict()
    for problem in problems(kind):
        call = call_of(problem, dtype, head_size).to(device)
        reasons = tuple(backend.why_not(call))
        verdict = verdict.and_then(Verdict(reasons=reasons) if reasons else Judge(problem, call)(backend))
        if verdict.failure:
            break
    return verdict
