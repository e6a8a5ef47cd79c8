"""How long calls take: a short and a long one, forward and with backward, interleaved, as medians."""

import statistics
import time
from collections.abc import Callable, Iterable

import torch

from . import backends
from .call import Call
from .problems import Kind
from .relative_position import slot_table

SHAPES = {"short": (8, 128), "long": (1, 2048)}  # batch, length
WIDTH = 768  # of all heads together
ROUNDS, ROUND_SECONDS = 5, 4e-3


def timed_call(shape: str, kind: Kind, dtype: torch.dtype, head_size: int, device: torch.device) -> Call:
    """v3's table, as many heads as in its base model, every text as long as the batch allows."""
    batch, length = SHAPES[shape]
    heads = max(1, WIDTH // head_size)
    tokens = (1, heads, batch * length) if kind.packed else (batch, heads, length)
    random = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float32).to(device, dtype)

    table = slot_table(256, 512, "hf")
    mask = ends = None
    if kind.mask != "none":
        shape = (tokens[0], 1, tokens[2] if kind.mask == "pairs" else 1, tokens[2])
        mask = torch.ones(shape, dtype=torch.bool, device=device)
    if kind.packed:
        ends = torch.arange(0, batch * length + 1, length, dtype=torch.int32).to(device)
    return Call(
        *(normal(*tokens, head_size) for _ in range(3)),
        normal(heads, table.rows, head_size) if kind.c2p else None,
        normal(heads, table.rows, head_size) if kind.p2c else None,
        mask,
        ends,
        seed=torch.tensor([1], device=device) if kind.dropout else None,
        position_buckets=256,
        max_relative_positions=512,
        far_negative="hf",
        first_slot=0,
        query_offset=0,
        max_seqlen=length,
        scale=(head_size * (1 + kind.c2p + kind.p2c)) ** -0.5,
        dropout_p=0.1 if kind.dropout else 0.0,
    )


def of_backends(
    names: Iterable[str], kind: Kind, dtype: torch.dtype, head_size: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Milliseconds by backend, and by shape and pass: "short forward", "short backward", ..."""
    found = {name: {} for name in names}
    for shape in SHAPES:
        call = timed_call(shape, kind, dtype, head_size, device)
        for which, runs in passes(found, call).items():
            for name, time_ in milliseconds(runs, device).items():
                found[name][f"{shape} {which}"] = time_
    return found


def passes(names: Iterable[str], call: Call) -> dict[str, dict[str, Callable[[], object]]]:
    """Forward and backward of a call, by each backend."""
    forward, backward = {}, {}
    for name in names:
        output, lse = backends.forward(call, name)
        forward[name] = lambda name=name: backends.forward(call, name)
        backward[name] = lambda name=name, o=output, e=lse: backends.backward(call, name, o, e, o, None)
    return {"forward": forward, "backward": backward}


def milliseconds(runs: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """The median of each, in turns. What a call costs the host counts where the device waits for it."""
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
