"""Times variants on a GPU. They run in turn, and one that fails is left out. A CPU serves to try a benchmark out.

On a GPU the second-level cache is overwritten, then CUDA events around the call take its time. There are two ways:

    queued       a first kernel keeps the GPU busy until the host has queued the whole call. The time is that of the
                 kernels only.
    not queued   the GPU is idle when the call starts. The time includes the host's, where the GPU waits for it.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from . import timing


class Call(NamedTuple):
    """A timed function, and a function that runs before it, untimed."""

    run: Callable[[], object]
    reset: Callable[[], object] = lambda: None


class Taken(NamedTuple):
    """The median time of a variant and the number of calls, or the error that it raised."""

    seconds: float | None = None
    runs: int = 0
    error: str | None = None

    def columns(self) -> dict:
        return {"ms": self.seconds and 1000 * self.seconds, "error": self.error}


class Device:
    most = 50  # calls of a variant
    busy_cycles = 2_000_000  # about a millisecond, in which the host queues a call

    def __init__(self, name: str):
        self.name = name
        self.is_gpu = torch.device(name).type == "cuda"
        if self.is_gpu:
            cache = torch.cuda.get_device_properties(name).L2_cache_size
            self._flush = torch.empty(2 * cache, dtype=torch.int8, device=name)

    def seconds(self, call: Call, queued: bool) -> float:
        """Times one call."""
        call.reset()
        if not self.is_gpu:
            start = time.perf_counter()
            call.run()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        if queued:
            torch.cuda._sleep(self.busy_cycles)
        start.record()
        call.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def measure(
        self,
        build: dict[str, Callable[[], Call]],
        seconds: float,
        queued: bool = True,
        fewest: int = 3,
        warmup: int = 2,
    ) -> dict[str, Taken]:
        """Takes medians over interleaved rounds.

        Args:
            build: for each variant, a function that makes its call. A variant whose function or call raises is left
                out from then on.
            seconds: for each variant. After them, and at least ``fewest`` calls, it is not called again.
            warmup: untimed calls of each variant before the rounds.
        """
        taken, ready, times = {}, {}, {}
        for name in build:
            try:
                ready[name] = build[name]()
                for _ in range(min(warmup, self.most - 1)):
                    self.seconds(ready[name], queued)
            except Exception as error:
                taken[name] = self.failure(error)
                ready.pop(name, None)
        for _ in range(self.most):
            for name, call in list(ready.items()):
                mine = times.setdefault(name, [])
                if len(mine) >= fewest and sum(mine) > seconds:
                    continue
                try:
                    mine.append(self.seconds(call, queued))
                except Exception as error:
                    taken[name] = self.failure(error)
                    del ready[name]
        taken |= {name: Taken(median(times[name]), len(times[name])) for name in ready}
        return {name: taken[name] for name in build}

    def peak(self, build: Callable[[], Call]) -> int | str:
        """Returns the bytes that a variant's call needs above those in use before it, or the error."""
        try:
            call = build()
            self.seconds(call, queued=False)
            call.reset()
            return timing.peak_of_call(call.run, self.name)
        except Exception as error:
            return self.failure(error).error

    def host_seconds(self, call: Call, repeats: int) -> float:
        """Returns the time after which a call returns, the median over rounds of ``repeats`` calls.

        The host does not synchronise with the GPU within a round.
        """
        rounds = []
        for _ in range(5):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                call.run()
            rounds.append((time.perf_counter() - start) / repeats)
        self.synchronize()
        return median(rounds)

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def failure(self, error: Exception) -> Taken:
        """Describes an error in one line and frees the memory that the call held."""
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        self.synchronize()  # raises if the device is lost, which ends the benchmark
        if self.is_gpu:
            torch.cuda.empty_cache()
        return Taken(error=text[:90].replace("|", "/"))


class Table:
    """Rows that are saved and printed as they are added."""

    def __init__(self, name: str, folder: Path, notes: str, summarise: Callable[[list[dict]], str] = lambda rows: ""):
        self.name, self.folder, self.notes, self.summarise = name, folder, notes, summarise
        self.rows: list[dict] = []
        timing.provenance()

    def add(self, *rows: dict) -> None:
        self.rows += [{key: value for key, value in row.items() if value is not None} for row in rows]
        timing.save(self.name, self.rows, self.folder, self.notes, self.summarise(self.rows))
        for row in rows:
            print("  ".join(timing.cell(value) for value in row.values()), flush=True)


def summary(
    rows: list[dict],
    title: str,
    cell: Callable[[dict], str],
    group: tuple[str, ...] = ("pass",),
    line: tuple[str, ...] = ("length", "batch"),
) -> str:
    """Makes a Markdown table for each pass, with a line for each length and a column for each variant.

    Args:
        rows: each of one variant.
        title: says what a cell holds.
    """
    tables: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["length"]):
        tables.setdefault(", ".join(row[head] for head in group), []).append(row)
    parts = [
        (f"## {name}: {title}", timing.pivot(mine, line, lambda row: row["variant"], cell))
        for name, mine in tables.items()
    ]
    return "\n\n".join(itertools.chain(*parts))


def summary_of(value: str, ratio: str, **shape: tuple[str, ...]) -> Callable[[list[dict]], str]:
    """Makes a function that makes the ``summary`` of a column, each cell with the column ``ratio`` in brackets."""

    def cell(row: dict) -> str:
        if value not in row:
            return "failed"
        return timing.cell(row[value]) + (f" ({row[ratio]:.2f}x)" if ratio in row else "")

    return lambda rows: summary(rows, f"{value} ({ratio})", cell, **shape)


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Makes a parser of the options that all benchmarks on a GPU have."""
    options = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description.split("\n\n")[0])
    options.add_argument("--lengths", type=int, nargs="+", metavar="L", help="in this order")
    options.add_argument("--tokens", type=int, default=16384, metavar="N", help="tokens of a batch")
    options.add_argument("--device", default="cuda")
    options.add_argument("--out", type=Path, default=timing.results_folder(), metavar="DIR", help="folder of results")
    return options
