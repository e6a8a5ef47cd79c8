"""Measures how long backends take for a short and a long call, forward and backward: interleaved, as medians."""

import statistics
import time
from collections.abc import Callable, Iterable

import torch

from . import backends
from .call import Call
from .problems import Kind, Problem, call_of

SHAPES = {"short": (8, 128), "long": (1, 2048)}  # batch, length
WIDTH = 768  # sum of all head sizes
ROUNDS, ROUND_SECONDS = 5, 4e-3


def timed_call(shape: str, kind: Kind, dtype: torch.dtype, head_size: int, device: torch.device) -> Call:
    """Returns a call as in DeBERTa-v3-base: its table, its width, and no padding."""
    batch, length = SHAPES[shape]
    heads = max(1, WIDTH // head_size)
    lengths, batch = ((length,) * batch, 1) if kind.packed else ((length, length), batch)
    problem = Problem(shape, kind, lengths, batch, heads, buckets=256, longest=512, hidden="nothing")
    return call_of(problem, dtype, head_size).to(device)


def of_backends(
    names: Iterable[str], kind: Kind, dtype: torch.dtype, head_size: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Returns milliseconds by backend, then by shape and pass: "short forward", "short backward", ..."""
    found = {name: {} for name in names}
    for shape in SHAPES:
        call = timed_call(shape, kind, dtype, head_size, device)
        for which, runs in passes(found, call).items():
            for name, time_ in milliseconds(runs, device).items():
                found[name][f"{shape} {which}"] = time_
    return found


def passes(names: Iterable[str], call: Call) -> dict[str, dict[str, Callable[[], object]]]:
    """Returns functions that run forward and backward of a call, by pass and backend."""
    forward, backward = {}, {}
    for name in names:
        output, lse = backends.forward(call, name)
        forward[name] = lambda name=name: backends.forward(call, name)
        backward[name] = lambda name=name, o=output, e=lse: backends.backward(call, name, o, e, o, None)
    return {"forward": forward, "backward": backward}


def milliseconds(runs: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Returns the median of each, measured in turns. Host time counts if the device waits for it."""
    for run in runs.values():
        run()
    repeats = {name: max(1, min(50, int(ROUND_SECONDS / _seconds(run, 1, device)))) for name, run in runs.items()}
    rounds = [{name: _seconds(run, repeats[name], device) for name, run in runs.items()} for _ in range(ROUNDS)]
    return {name: 1e3 * statistics.median(times[name] for times in rounds) for name in runs}


def _seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
