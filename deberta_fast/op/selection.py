"""Chooses the backend of a call that names none.

On a CPU the first backend that can serve the call runs. On any other device a fused backend first has to pass a check,
in this process and on this device: ``proof`` compares it with the reference for the call's dtype, head size and kind.
The fastest backend that passes is chosen. If none passes, ``eager`` runs, with one warning.

Decisions hold for the process. No decision is made while a CUDA graph is captured. A traced program gets its decision
when it is traced: the check runs in its own thread, out of reach of the tracer's modes.
"""

import operator
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from . import backends
from .call import Call
from .problems import Kind, problems

if TYPE_CHECKING:
    from .proof import Verdict

FUSED = ("cuda", "triton")  # on devices other than a CPU; the first wins unless the second is clearly faster
CLEARLY_FASTER = 0.9  # share of the time; noise must not change the choice, and the rounding, between processes
UNCHECKED = ("eager", "reference")


class Place(NamedTuple):
    """Device, dtype and head size. A decision holds for one place and one kind of call."""

    device: torch.device
    dtype: torch.dtype
    head_size: int

    def __str__(self) -> str:
        return f"{name_of(self.device)} in {str(self.dtype).removeprefix('torch.')}, head size {self.head_size}"


_Result = TypeVar("_Result")


class Decision(NamedTuple):
    """The outcome of a check.

    Attributes:
        order: the fused backends that passed, the fastest first.
        verdicts: one per fused backend.
        trouble: the error of torch itself that prevented the check.
    """

    order: tuple[str, ...]
    verdicts: dict[str, "Verdict"]
    trouble: str = ""


_decisions: dict[tuple[Place, Kind], Decision] = {}
_orders: dict[tuple, tuple[str, ...]] = {}  # the orders of these decisions, by the arguments of ``_order``
_failures: dict[Place, dict[str, str]] = {}
_told: set[tuple[Place, str]] = set()  # places without a fused backend, and the reasons, that were warned about
_lock = threading.RLock()
_check: bool | str = True


def set_backend_check(check: bool | str) -> None:
    """Sets how ``backend=None`` chooses on devices other than a CPU, for the rest of the process.

    Args:
        check: True, the default, chooses the fastest fused backend that passes the check on the device, and forgets
            earlier decisions. False chooses no fused backend and checks none. A backend's name chooses that backend,
            without a check, for every call that it can serve. ``eager`` runs if no such backend exists.

    Raises:
        TypeError, ValueError: check is neither, or no backend has that name.
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
            for known in (_decisions, _failures, _told):
                known.clear()


def policy() -> bool | str:
    """Returns the last argument of ``set_backend_check``."""
    return _check


def forget(device: torch.device) -> None:
    """Forgets the decisions for a device."""
    with _lock:
        _orders.clear()
        for key in [key for key in _decisions if key[0].device == device]:
            del _decisions[key]
        for place in [place for place in _failures if place.device == device]:
            del _failures[place]


def choose(name: str | None, call: Call) -> str:
    """Returns the backend to run: the one named, or the best one for the call.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the named backend cannot serve this call; a CUDA graph is being captured before any decision; or a
            backend left the device unusable for this process.
    """
    query = call.query
    if name is not None or not is_checked(query.device) or backends.only_reference(call) is not None:
        return backends.choose(name, call)
    size = operator.index(query.shape[-1])  # a number even if shapes are symbolic
    order = _order(query.device.type, query.device.index, query.dtype, size, *Kind.of(call))
    return backends.choose(None, call, (*order, *UNCHECKED))


def prepare(device: torch.device, dtype: torch.dtype, head_size: int, kind: Kind) -> None:
    """Decides in advance, for a model that is patched, made or moved.

    Skips float32, because its calls may run under autocast, and the check would compile kernels for an unused dtype.
    Skips traced programs and the capture of CUDA graphs.
    """
    if is_checked(device) and dtype in (torch.bfloat16, torch.float16):
        if not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or _is_captured(device)):
            _order(device.type, device.index, dtype, head_size, *kind)


def is_checked(device: torch.device) -> bool:
    """Tells whether fused backends have to pass the check on this device."""
    return device.type not in ("cpu", "meta")


def _order(*key) -> tuple[str, ...]:
    """Returns the fused backends to take, best first. key: device type and index, dtype, head size, Kind fields."""
    known = _orders.get(key)
    return _look_up(*key) if known is None else known


# The result is a constant of a compiled program, and the arguments have to be constants.
# torch.compiler.assume_constant_result does the same, but imports Dynamo, which takes a second.
_order._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _look_up(device_type: str, index: int | None, dtype: torch.dtype, head_size: int, *fields) -> tuple[str, ...]:
    if _check is not True:
        return (_check,) if _check else ()
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    place, kind = Place(device, dtype, head_size), Kind(*fields)
    key = (device_type, index, dtype, head_size, *fields)
    with _lock:
        if (place, kind) in _decisions:
            order = _orders[key] = _decisions[place, kind].order
            return order
    if torch.onnx.is_in_onnx_export() or not _exists(device) or dtype == torch.float64:
        return ()
    if _is_captured(device):
        raise RuntimeError(
            f"a CUDA graph is being captured before any call like it on {place} ({kind}), and no check can run now: "
            "make one such call before the capture, or name a backend"
        )
    if torch._C._current_graph_task_id() >= 0:
        # The check needs autograd, whose thread for this device would wait here. The forward pass decides instead.
        return ()
    return decide(place, kind).order


def decide(place: Place, kind: Kind) -> Decision:
    """Returns the decision. The first call runs the check: about a second, and the time to compile kernels."""
    with _lock:
        if (place, kind) not in _decisions:
            decision = in_a_thread(lambda: _checked(place, kind))
            _decisions[place, kind] = decision
            failed = _failures.setdefault(place, {})
            news = {name: v.failure for name, v in decision.verdicts.items() if v.failure and name not in failed}
            failed |= news
            # After one wrong result, a backend serves no other kind of call either.
            _orders.clear()
            for key, earlier in _decisions.items():
                if key[0] == place:
                    _decisions[key] = earlier._replace(order=tuple(n for n in earlier.order if n not in failed))
            _warn(place, kind, decision, news)
        return _decisions[place, kind]


def _checked(place: Place, kind: Kind) -> Decision:
    # Most processes check nothing.
    import statistics

    from . import proof, speed

    device, dtype, head_size = place
    known = _failures.get(place, {})
    try:
        verdicts = proof.prove([name for name in FUSED if name not in known], problems(kind), dtype, head_size, device)
    except proof.DeviceLostError:
        raise
    except Exception as error:  # torch itself failed, probably for lack of memory: no verdict on a backend
        return Decision((), {}, f"{type(error).__name__}: {error}")
    verdicts |= {name: proof.Verdict(failure=failure) for name, failure in known.items()}
    passed = [name for name in FUSED if verdicts[name].passed]
    if len(passed) > 1:
        try:
            times = speed.of_backends(passed, kind, dtype, head_size, device)
        except Exception:  # too little memory to time longer calls: both backends are correct, and either will do
            return Decision(tuple(passed), verdicts)
        # By the geometric mean, short calls count as much as long ones.
        cost = {name: statistics.geometric_mean(times[name].values()) for name in passed}
        cost[passed[0]] *= CLEARLY_FASTER
        passed.sort(key=cost.__getitem__)
    return Decision(tuple(passed), verdicts)


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


def in_a_thread(function: Callable[[], _Result]) -> _Result:
    """Runs a function outside the caller's autocast, inference mode, fake tensors, functorch and saved-tensor hooks.

    All of these are thread-local.
    """
    with ThreadPoolExecutor(1, "deberta_fast-check") as pool:
        return pool.submit(function).result()


def _is_captured(device: torch.device) -> bool:
    module = getattr(torch, device.type, None)
    is_capturing = getattr(module, "is_current_stream_capturing", None)
    return is_capturing is not None and is_capturing()


def _exists(device: torch.device) -> bool:
    """Tells whether this machine has the device; the device of a fake tensor need not exist."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type == device.type and (device.index or 0) < torch.accelerator.device_count()


def name_of(device: torch.device) -> str:
    """Returns a device and, if torch knows it, its product name."""
    module = getattr(torch, device.type, None)
    name = getattr(module, "get_device_name", None)
    return f"{device} ({name(device)})" if name else str(device)
