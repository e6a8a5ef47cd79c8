"""Times of calls on a GPU, the variants in turn, any of which may fail; on a CPU too, to try a benchmark out.

A GPU is timed by events around the call, after the second-level cache was overwritten. What lies between the events
depends on how far the host is ahead:

    queued       the GPU is kept busy until the whole call is in its queue: the time of the kernels alone
    not queued   an idle GPU: the host's time counts as far as the kernels do not hide it
"""

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
    """A timed function, and one that makes ready for it without being timed."""

    run: Callable[[], object]
    reset: Callable[[], object] = nothing


class Taken(NamedTuple):
    """The outcome of a variant: the median and how many calls it is of, or what went wrong."""

    seconds: float | None = None
    runs: int = 0
    error: str | None = None


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
        """The time of one call."""
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
            build: by variant, what makes its call. A variant that raises, here or in a call, is left out from then on.
            seconds: for each variant: who needs longer than this for ``fewest`` calls gets no more of them.
            warmup: calls of each before.
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

    def peaks(self, build: dict[str, Callable[[], Call]]) -> dict[str, int | str]:
        """Bytes that each variant's call needs above what is there before it, or what went wrong; one at a time."""
        found = {}
        for name in build:
            try:
                call = build[name]()
                self.seconds(call, queued=False)
                call.reset()
                found[name] = timing.peak_of_call(call.run, self.name)
            except Exception as error:
                found[name] = self.failure(error).error
            call = None
        return found

    def host_seconds(self, call: Call, repeats: int) -> float:
        """The time of one call until the host may go on; many in a row, so that none waits for the GPU to start."""
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
        """Describes in a line what went wrong, and frees the memory that it held."""
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        self.synchronize()  # raises where the device is lost: no time after that is worth anything
        if self.is_gpu:
            torch.cuda.empty_cache()
        return Taken(error=text[:90].replace("|", "/"))


class Table:
    """Rows that are kept on disk, and shown, as they come."""

    def __init__(self, name: str, folder: Path, notes: str, summarise: Callable[[list[dict]], str] = lambda rows: ""):
        self.name, self.folder, self.notes, self.summarise = name, folder, notes, summarise
        self.rows: list[dict] = []

    def add(self, *rows: dict) -> None:
        self.rows += [{key: value for key, value in row.items() if value is not None} for row in rows]
        timing.save(self.name, self.rows, self.folder, self.notes, self.summarise(self.rows))
        for row in rows:
            print("  ".join(timing.cell(value) for value in row.values()), flush=True)


def by_length(rows: list[dict], cell: Callable[[dict], str]) -> str:
    """For each pass a Markdown table of lengths and variants, out of rows of one variant each."""
    parts = []
    for passes in dict.fromkeys(row["pass"] for row in rows):
        chosen = sorted((row for row in rows if row["pass"] == passes), key=lambda row: row["length"])
        parts += [f"## {passes}", timing.pivot(chosen, ("length", "batch"), lambda row: row["variant"], cell)]
    return "\n\n".join(parts)


def times_by_length(ratio: str) -> Callable[[list[dict]], str]:
    """``by_length`` of milliseconds, each with what its row has under ``ratio``."""

    def cell(row: dict) -> str:
        if "ms" not in row:
            return "failed"
        return f"{row['ms']:.3g}" + (f" ({row[ratio]:.2f}x)" if ratio in row else "")

    return lambda rows: by_length(rows, cell)
