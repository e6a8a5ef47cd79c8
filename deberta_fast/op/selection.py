"""Which backend runs a call that names none.

On a CPU it is the first without an objection. On any other device a fused backend has to prove itself, in this process
and on this device, before it is taken: ``proof`` compares it with the reference for the dtype, the head size and the
kind of call at hand. Of several that pass, the fastest is taken; where none does, ``eager`` is, with one warning.

What was decided is kept for the process. Nothing is decided while a CUDA graph is captured. A program that is traced
gets its decision when it is traced: the check runs in a thread of its own, which no mode of the tracer reaches.
"""

import math
import operator
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import torch

from . import backends
from .call import Call
from .problems import Kind, problems

if TYPE_CHECKING:
    from .proof import Verdict

# Those of devices other than a CPU. What comes first is taken, unless another is faster by more than noise: which one
# runs, and how it rounds, should not change from one process to the next.
FUSED = ("cuda", "triton")
CLEARLY_FASTER = 0.9
UNCHECKED = ("eager", "reference")


class Place(NamedTuple):
    """A decision holds for one of these and one kind of call."""

    device: torch.device
    dtype: torch.dtype
    head_size: int

    def __str__(self) -> str:
        return f"{name_of(self.device)} in {str(self.dtype).removeprefix('torch.')}, head size {self.head_size}"


class Decision(NamedTuple):
    """The outcome of a check.

    Attributes:
        order: the fused backends that passed, the fastest first.
        verdicts: on every fused backend.
        milliseconds: of those that were timed, because there were several.
        trouble: why there was no check, where torch itself failed in it.
    """

    order: tuple[str, ...]
    verdicts: dict[str, "Verdict"]
    milliseconds: dict[str, dict[str, float]]
    trouble: str = ""


_decisions: dict[tuple[Place, Kind], Decision] = {}
_orders: dict[tuple, tuple[str, ...]] = {}  # of these decisions, by what is at hand in a call
_failures: dict[Place, dict[str, str]] = {}
_told: set[tuple[Place, str]] = set()  # why no fused backend serves a place: once is enough
_lock = threading.RLock()
_check: bool | str = True


def set_backend_check(check: bool | str) -> None:
    """How ``backend=None`` chooses on devices other than a CPU, from now on and in this process.

    Args:
        check: True, the default: the fastest fused backend that passed the check on the device; what was decided
            before is forgotten, and decided anew. False: no check, and no fused backend. The name of a backend: no
            check, that backend wherever it has no objection. Where there is no such backend, it is ``eager``.

    Raises:
        TypeError, ValueError: neither, or there is no backend of that name.
    """
    global _check
    if not isinstance(check, bool | str):
        raise TypeError(f"check must be True, False or a backend's name, got {check!r}")
    if isinstance(check, str):
        backends.check_name(check)
    with _lock:
        _check = check
        _orders.clear()
        if check is True:
            for kept in (_decisions, _failures, _told):
                kept.clear()


def policy() -> bool | str:
    """The setting that ``set_backend_check`` was given last."""
    return _check


def forget(device: torch.device) -> None:
    """Forgets what was decided for a device."""
    with _lock:
        _orders.clear()
        for key in [key for key in _decisions if key[0].device == device]:
            del _decisions[key]
        for place in [place for place in _failures if place.device == device]:
            del _failures[place]


def choose(name: str | None, call: Call) -> str:
    """The backend to run: the one named, or the best one for the call.

    Raises:
        ValueError: no backend of that name.
        RuntimeError: the backend named has reasons not to serve this call; a CUDA graph is being captured and nothing
            was decided before; or a backend left the device in a state that only a new process ends.
    """
    query = call.query
    if name is not None or not is_checked(query.device) or backends.only_reference(call) is not None:
        return backends.choose(name, call)
    size = operator.index(query.shape[-1])  # a number, also where shapes are symbols
    order = _order(query.device.type, query.device.index, query.dtype, size, *Kind.of(call))
    return backends.choose(None, call, (*order, *UNCHECKED))


def prepare(device: torch.device, dtype: torch.dtype, head_size: int, kind: Kind) -> None:
    """Decides beforehand, for a model that is patched, made or moved.

    Not for float32: its calls may come under autocast, and kernels would be compiled for a dtype that nobody uses. Not
    in a traced program, nor in the capture of a CUDA graph.
    """
    if is_checked(device) and dtype in (torch.bfloat16, torch.float16):
        if not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or _is_captured(device)):
            _order(device.type, device.index, dtype, head_size, *kind)


def is_checked(device: torch.device) -> bool:
    """Whether a fused backend has to prove itself there."""
    return device.type not in ("cpu", "meta")


def _order(*key) -> tuple[str, ...]:
    """The fused backends to take, best first, for (type and index of a device, dtype, head size, fields of a Kind)."""
    known = _orders.get(key)
    return _look_up(*key) if known is None else known


# torch.compiler.assume_constant_result does this too, but takes a second to import Dynamo. The result is a constant of
# a compiled program. Arguments can be constants only.
_order._dynamo_marked_constant = True


def _look_up(device_type: str, index: int | None, dtype: torch.dtype, head_size: int, *fields) -> tuple[str, ...]:
    if _check is not True:
        return (_check,) if _check else ()
    device, kind = torch.device(device_type, index), Kind(*fields)
    place = Place(device, dtype, head_size)
    with _lock:
        if (place, kind) in _decisions:
            order = _orders[(device_type, index, dtype, head_size, *fields)] = _decisions[place, kind].order
            return order
    if torch.onnx.is_in_onnx_export() or not _exists(device) or dtype == torch.float64:
        return ()
    if _is_captured(device):
        raise RuntimeError(
            f"a CUDA graph is being captured before any call like it on {place} ({kind}), and no check can run now: "
            "make one such call before the capture, or name a backend"
        )
    if torch._C._current_graph_task_id() >= 0:
        # The check asks autograd, whose thread for this device is the one that waits here. The forward pass decides.
        return ()
    return decide(place, kind).order


def decide(place: Place, kind: Kind) -> Decision:
    """Returns the decision, after a check if there is none yet. It takes a second, besides what a backend compiles."""
    with _lock:
        if (place, kind) not in _decisions:
            decision = in_a_thread(lambda: _checked(place, kind))
            _decisions[place, kind] = decision
            failed = _failures.setdefault(place, {})
            news = {name: v.failure for name, v in decision.verdicts.items() if v.failure and name not in failed}
            failed |= news
            # One wrong result is enough: calls of another kind do without it too
            _orders.clear()
            for key, earlier in _decisions.items():
                if key[0] == place:
                    _decisions[key] = earlier._replace(order=tuple(n for n in earlier.order if n not in failed))
            _warn(place, kind, decision, news)
        return _decisions[place, kind]


def _checked(place: Place, kind: Kind) -> Decision:
    from . import proof, speed  # most processes check nothing

    device, dtype, head_size = place
    known = _failures.get(place, {})
    try:
        verdicts = proof.prove([name for name in FUSED if name not in known], problems(kind), dtype, head_size, device)
    except proof.DeviceLostError:
        raise
    except Exception as error:  # of torch itself, most likely too little memory: no verdict on a backend
        return Decision((), {}, {}, f"{type(error).__name__}: {error}")
    verdicts |= {name: proof.Verdict(failure=failure) for name, failure in known.items()}
    passed = [name for name in FUSED if verdicts[name].passed]
    if len(passed) < 2:
        return Decision(tuple(passed), verdicts, {})
    try:
        times = speed.of_backends(passed, kind, dtype, head_size, device)
    except Exception:  # too little memory for longer calls: both are right, and either will do
        return Decision(tuple(passed), verdicts, {})
    cost = {name: _mean(times[name]) for name in passed}
    cost[passed[0]] *= CLEARLY_FASTER
    return Decision(tuple(sorted(passed, key=cost.get)), verdicts, times)


def _mean(times: dict[str, float]) -> float:
    """Geometric, so that short calls count as much as long ones."""
    return math.exp(sum(map(math.log, times.values())) / len(times))


def _warn(place: Place, kind: Kind, decision: Decision, failures: dict[str, str]) -> None:
    taken = f"backend=None takes {decision.order[0] if decision.order else 'eager'!r} there"
    report = f"Please report it, with what `python -m deberta_fast check --device {place.device}` prints"
    for name, failure in failures.items():
        warnings.warn(f"deberta_fast: backend {name!r} failed its check on {place}: {failure}; {taken}. {report}")
    if decision.trouble:
        again = "deberta_fast.set_backend_check(True) lets it run again"
        warnings.warn(f"deberta_fast: no check of backends on {place}: {decision.trouble}; {taken}, and {again}")
    if not decision.verdicts or any(verdict.passed or verdict.failure for verdict in decision.verdicts.values()):
        return
    reasons = "; ".join(f"{name}: {', '.join(verdict.reasons)}" for name, verdict in decision.verdicts.items())
    if (place, reasons) not in _told:
        _told.add((place, reasons))
        warnings.warn(f"deberta_fast: no fused backend serves {place} ({kind}): {reasons}; {taken}, which is slower")


def in_a_thread(function: Callable[[], Decision]) -> Decision:
    """Autocast, inference mode, fake tensors, functorch, hooks on saved tensors: all of these are a thread's own."""
    with ThreadPoolExecutor(1, "deberta_fast-check") as pool:
        return pool.submit(function).result()


def _is_captured(device: torch.device) -> bool:
    module = getattr(torch, device.type, None)
    is_capturing = getattr(module, "is_current_stream_capturing", None)
    return is_capturing is not None and is_capturing()


def _exists(device: torch.device) -> bool:
    """Fake tensors may claim to lie on a device that this machine does not have."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type == device.type and (device.index or 0) < torch.accelerator.device_count()


def name_of(device: torch.device) -> str:
    """A device with the name of its product, where torch knows it."""
    module = getattr(torch, device.type, None)
    name = getattr(module, "get_device_name", None)
    return f"{device} ({name(device)})" if name else str(device)
