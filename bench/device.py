"""Times of calls on a GPU, whose variants run in turn and may fail; on a CPU too, to try a benchmark out.

CUDA events around the call time a GPU, after the second-level cache was overwritten. What lies between the events
depends on how far the host is ahead:

    queued       the GPU is kept busy until the whole call is in its queue: the time of the kernels only
    not queued   the GPU is idle: the host's time counts as far as the kernels do not hide it
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from . import timing

BUSY_CYCLES = 2_000_000  # about a millisecond: what the host needs to queue a call
MOST = 50  # calls of a variant


def nothing() -> None:
    pass


class Call(NamedTuple):
    """A timed function, and one that prepares it and is not timed."""

    run: Callable[[], object]
    reset: Callable[[], object] = nothing


class Taken(NamedTuple):
    """The median time of a variant and the number of calls, or the error that it raised."""

    seconds: float | None = None
    runs: int = 0
    error: str | None = None

    def columns(self) -> dict:
        return {"ms": self.seconds and 1000 * self.seconds, "error": self.error}


class Device:
    most = MOST
    busy_cycles = BUSY_CYCLES

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
        """Medians over interleaved rounds.

        Args:
            build: functions that make each variant's call. A variant that raises, here or in a call, is left out from
                then on.
            seconds: for each variant; one that has used them gets no more calls after the ``fewest``.
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
        """Times one call until it returns, over many calls in a row, so that none waits for the GPU to start."""
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
        self.synchronize()  # raises if the device is lost: no later time would be worth anything
        if self.is_gpu:
            torch.cuda.empty_cache()
        return Taken(error=text[:90].replace("|", "/"))


class Table:
    """Rows that are saved and printed as they come."""

    def __init__(self, name: str, folder: Path, notes: str, summarise: Callable[[list[dict]], str] = lambda rows: ""):
        self.name, self.folder, self.notes, self.summarise = name, folder, notes, summarise
        self.rows: list[dict] = []

    def add(self, *rows: dict) -> None:
        self.rows += [{key: value for key, value in row.items() if value is not None} for row in rows]
        timing.save(self.name, self.rows, self.folder, self.notes, self.summarise(self.rows))
        for row in rows:
            print("  ".join(timing.cell(value) for value in row.values()), flush=True)


def by_length(rows: list[dict], cell: Callable[[dict], str]) -> str:
    """Makes a Markdown table of lengths and variants for each pass, from rows of one variant each."""
    parts = []
    for passes in dict.fromkeys(row["pass"] for row in rows):
        chosen = sorted((row for row in rows if row["pass"] == passes), key=lambda row: row["length"])
        parts += [f"## {passes}", timing.pivot(chosen, ("length", "batch"), lambda row: row["variant"], cell)]
    return "\n\n".join(parts)


def times_by_length(ratio: str) -> Callable[[list[dict]], str]:
    """``by_length`` of milliseconds, followed by the column ``ratio`` in brackets."""

    def cell(row: dict) -> str:
        if "ms" not in row:
            return "failed"
        return f"{row['ms']:.3g}" + (f" ({row[ratio]:.2f}x)" if ratio in row else "")

    return lambda rows: by_length(rows, cell)


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks on a GPU have."""
    options = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description.split("\n\n")[0])
    options.add_argument("--lengths", type=int, nargs="+", metavar="L", help="in this order")
    options.add_argument("--tokens", type=int, default=16384, metavar="N", help="of all sequences of a batch")
    options.add_argument("--device", default="cuda")
    options.add_argument("--out", type=Path, default=timing.results_folder(), metavar="DIR", help="folder of results")
    return options
