"""Proves that a backend computes the right thing on a device.

It solves ``problems``, forward and all gradients. The rule of ``precision`` judges its results against the reference in
float64 on the CPU, and a second run must give the same bits.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch

from . import backends
from .call import TENSORS, Call
from .precision import hf_style_attention, precision
from .problems import Problem, call_of

NAMES = ("output", "lse", "grad_query", "grad_key", "grad_value", "grad_pos_key", "grad_pos_query")
INPUTS = (*Call._fields[:TENSORS], "grad_output", "grad_lse")
LONGEST_MESSAGE = 400


class Backend(Protocol):
    """An implementation of disentangled attention; every module of ``backends`` except the reference is one.

    ``forward`` fills output (B, H, Lq, D), in the dtype of query, and log-sum-exp (B, H, Lq), ``call.new_lse().dtype``.
    ``backward`` fills the gradients of query, key, value, pos_key and pos_query, shaped and typed as these; an absent
    table's is None. Neither writes to its inputs, and both write every element: memory comes with any content.
    """

    def why_not(self, call: Call) -> list[str]:
        """Reasons not to serve a call; empty where the backend can serve it."""

    def forward(self, call: Call, output: torch.Tensor, lse: torch.Tensor) -> None: ...

    def backward(
        self,
        call: Call,
        output: torch.Tensor,
        lse: torch.Tensor,
        grad_output: torch.Tensor,
        grad_lse: torch.Tensor,
        grads: list[torch.Tensor | None],
    ) -> None: ...


class DeviceLostError(RuntimeError):
    """A backend made the device unusable in this process, for example by an illegal memory access."""


class Verdict(NamedTuple):
    """How a backend did on some problems.

    Attributes:
        solved: number of problems that it solved.
        share: its largest error, as a share of what is allowed; ``where`` names the tensor and the problem.
        failure: the problem that it did not solve, and why; None if it solved all.
        reasons: why it refused every problem; empty if it took one.
    """

    solved: int = 0
    share: float = 0.0
    where: str = ""
    failure: str | None = None
    reasons: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.solved > 0 and self.failure is None

    def and_then(self, later: "Verdict") -> "Verdict":
        """Joins the verdicts on these problems and on later ones."""
        worse = max(self, later, key=lambda verdict: verdict.share)
        solved, failure = self.solved + later.solved, self.failure or later.failure
        reasons = () if solved or failure else tuple(dict.fromkeys(self.reasons + later.reasons))
        return Verdict(solved, worse.share, worse.where, failure, reasons)


def prove(
    names: Iterable[str], problems: Iterable[Problem], dtype: torch.dtype, head_size: int, device: torch.device
) -> dict[str, Verdict]:
    """Judges each of the backends named. A backend that failed gets no further problem.

    Calls torch's own operators on the device too. Their errors are raised, and so is torch.OutOfMemoryError.

    Raises:
        DeviceLostError: a backend left the device unusable.
    """
    verdicts = {name: Verdict() for name in names}
    for problem in problems:
        call, judge = call_of(problem, dtype, head_size).to(device), None
        for name, verdict in verdicts.items():
            if verdict.failure is not None:
                continue
            if reasons := backends.reasons_against(name, call):
                verdicts[name] = verdict.and_then(Verdict(reasons=tuple(reasons)))
                continue
            judge = judge or Judge(problem, call)
            verdicts[name] = verdict.and_then(judge(backends.BACKENDS[name]))
            if failure := verdicts[name].failure:
                _require_usable(device, name, failure)
    return verdicts


def _require_usable(device: torch.device, name: str, failure: str) -> None:
    try:
        usable = torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        usable = False
    if not usable:
        raise DeviceLostError(
            f"backend {name!r} left {device} unusable, which only a new process ends: {failure}. There, say "
            f"deberta_fast.set_backend_check with False or another backend's name before anything else, and please "
            f"report this"
        )


class Judge:
    """A problem on a device, with the exact and the eager results that a backend's are compared with."""

    def __init__(self, problem: Problem, call: Call):
        self.problem, self.call = problem, call
        random = torch.Generator().manual_seed(2)
        output, lse = call.new_output(), call.new_lse()
        # The output of a query that sees no key is zero here. Hugging Face's code returns a mean of value.
        self.seen = _sees_something(call).cpu()
        grad_output, grad_lse = (torch.randn(x.shape, generator=random, dtype=torch.float32) for x in (output, lse))
        grad_output = grad_output.masked_fill(~self.seen[..., None], 0.0).to(output.dtype)
        grad_lse = grad_lse.masked_fill(~self.seen, 0.0).to(lse.dtype)
        self.cotangents = grad_output.to(call.query.device), grad_lse.to(call.query.device)
        exact = call.to("cpu")
        doubles: dict[str, Any] = {name: x.double() for name, x in _floating(exact).items()}
        exact = exact._replace(**doubles)
        self.exact = self._differentiated(backends.reference.attention, exact, grad_output, grad_lse)
        self.eager = self._differentiated(_hf_style, call, *self.cotangents)
        self.eager["lse"] = self.eager["lse"].to(lse.dtype)  # half precision there, and float32 in the backends

    def _differentiated(
        self,
        attention: Callable[[Call], tuple[torch.Tensor, torch.Tensor]],
        call: Call,
        grad_output: torch.Tensor,
        grad_lse: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        leaves: dict[str, Any] = {name: x.requires_grad_() for name, x in _floating(call).items()}
        output, lse = attention(call._replace(**leaves))
        grads = torch.autograd.grad(
            (output, lse), list(leaves.values()), (grad_output.to(output.dtype), grad_lse.to(lse.dtype))
        )
        return self._comparable({"output": output, "lse": lse} | {f"grad_{n}": g for n, g in zip(leaves, grads)})

    def __call__(self, backend: Backend) -> Verdict:
        """Judges one backend. An exception that it raises is a verdict, except torch.OutOfMemoryError."""
        try:
            worst, where = 0.0, ""
            first, second = self._results(backend), self._results(backend)
            got, again = self._comparable(first), self._comparable(second)
            for tensor, x in got.items():
                measured = precision(tensor, x, self.eager[tensor], self.exact[tensor])
                if measured.share > 1:
                    raise AssertionError(f"{tensor}: {measured}")
                if not torch.equal(x, again[tensor]):
                    raise AssertionError(f"{tensor} differs from run to run")
                if measured.share > worst:
                    worst, where = measured.share, f"{tensor}, {self.problem}"
            if not self._zero_where_nothing_is_seen(first):
                raise AssertionError("a query that sees no key has an output that is not zero")
            return Verdict(1, worst, where)
        except torch.OutOfMemoryError:
            raise  # the memory may be held by the caller's own tensors
        except Exception as error:
            # A missing compiler, too little shared memory and a wrong result all rule this backend out.
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            return Verdict(failure=f"problem '{self.problem}': {kind}{error}"[:LONGEST_MESSAGE])

    def _results(self, backend: Backend) -> dict[str, torch.Tensor]:
        """Runs a backend.

        Its outputs begin as NaN, so that an element which it does not write is found. Its inputs are copies, so that a
        backend which writes to one is found and spoils it for no other.
        """
        given: list[Any] = [*self.call[:TENSORS], *self.cotangents]
        copies: list[Any] = [None if x is None else x.clone() for x in given]
        call, (grad_output, grad_lse) = Call(*copies[:TENSORS], *self.call[TENSORS:]), copies[TENSORS:]
        output, lse = (x.fill_(torch.nan) for x in (call.new_output(), call.new_lse()))
        grads = [None if x is None else x.fill_(torch.nan) for x in call.new_gradients((True,) * 5)]
        backend.forward(call, output, lse)
        backend.backward(call, output, lse, grad_output, grad_lse, grads)
        for tensor, x, copy in zip(INPUTS, given, copies, strict=True):
            if x is not None and not torch.equal(x, copy):
                raise AssertionError(f"{tensor}, an input, was written to")
        return {name: x for name, x in zip(NAMES, (output, lse, *grads), strict=True) if x is not None}

    def _zero_where_nothing_is_seen(self, results: dict[str, torch.Tensor]) -> bool:
        output, lse = results["output"].cpu(), results["lse"].cpu()
        return bool((output[~self.seen] == 0).all() and (lse[~self.seen] == -torch.inf).all())

    def _comparable(self, results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Moves results to the CPU, zeroes the rows that see no key, and makes each head of a batch row one draw."""
        results = {name: x.detach().cpu() for name, x in results.items()}
        results["output"] = results["output"].masked_fill(~self.seen[..., None], 0.0)
        results["lse"] = results["lse"].masked_fill(~self.seen, 0.0)
        return {name: x if name.startswith("grad_pos") else x.flatten(0, 1) for name, x in results.items()}


def _hf_style(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """``hf_style_attention``, packed sequences one after the other."""
    if call.cu_seqlens is None:
        return hf_style_attention(call)
    parts = [hf_style_attention(x, batch) for batch, x in enumerate(call.sequences()) if x.query.shape[2]]
    output, lse = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return output, lse


def _sees_something(call: Call) -> torch.Tensor:
    """Which queries see a key, (B, H, Lq)."""
    shape = call.query.shape[:3]
    if call.cu_seqlens is None:
        return (torch.ones(1, 1, 1, dtype=torch.bool) if call.mask is None else call.mask.any(-1)).expand(shape)
    parts = [_sees_something(x) for x in call._replace(cu_seqlens=call.cu_seqlens.cpu()).sequences()]
    return torch.cat([x.to("cpu") for x in parts], 2)


def _floating(call: Call) -> dict[str, torch.Tensor]:
    return {name: x.detach() for name, x in zip(Call._fields[:5], call[:5], strict=True) if x is not None}
