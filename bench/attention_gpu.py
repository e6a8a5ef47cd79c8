"""The attention operator on a GPU against its neighbours: ``python -m bench.attention_gpu``.

``variants.operator`` describes the variants. The batch of every length has the same number of tokens. Results go to
bench/results/<GPU>, after every row. ``--device cpu`` serves to try this out.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator

import torch

from . import device as devices
from . import timing
from .device import Device, Table, summary, summary_of
from .variants import Entry, described
from .variants.operator import VARIANTS, Variant, Workload

FLOPS = {"forward": 4, "backward": 10, "forward+backward": 14}  # of plain attention, divided by length^2 size
PASSES = tuple(FLOPS)
LENGTHS = (512, 2048, 8192, 128, 1024, 4096, 16384, 256)  # most wanted first
SECONDS_A_VARIANT = 0.15
LEGEND = (
    "Medians of interleaved calls, only the kernels: the GPU is kept busy for a millisecond while the host queues a "
    "call, and its second-level cache is overwritten before. x plain: time over that of the fastest plain variant. "
    "TFLOP/s count the products of plain attention over valid tokens (4, 10 and 14 length^2 size), for all variants "
    "alike. difference: of the output from the eager backend's, relative, in norm. Backward is "
    "output.backward(gradient, retain_graph=True) with no .grad to add to."
)
HOST_LEGEND = (
    "Microseconds until a call returns, over many calls in a row that do not synchronise with the GPU. No cache is "
    "overwritten."
)
MEMORY_LEGEND = (
    "MiB: peak that torch allocates in a call above what is in use before it. beyond results: the same without "
    "outputs and gradients, which every call returns."
)


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    run = host if options.host else memory if options.memory else times
    run(options, Device(options.device))


def times(options: argparse.Namespace, device: Device) -> None:
    table = _table(options, LEGEND, summary_of("ms", "x plain"))
    for workload, chosen in _workloads(options):
        exact = {name: workload.difference(name, variant) for name, variant in chosen.items()}
        for passes in options.passes:
            build = {name: functools.partial(variant.call, passes) for name, variant in chosen.items()}
            taken = device.measure(build, SECONDS_A_VARIANT)
            plain = [x.seconds for name, x in taken.items() if name.startswith("plain") and x.seconds]
            for name, outcome in taken.items():
                columns = outcome.columns()
                if seconds := outcome.seconds:
                    columns["TFLOP/s"] = FLOPS[passes] * workload.square_terms() / seconds / 1e12
                    columns["x plain"] = seconds / min(plain) if plain else None
                    columns["calls"] = outcome.runs
                table.add(_row(workload, passes, name) | columns | {"difference": exact[name]})


def memory(options: argparse.Namespace, device: Device) -> None:
    cell = lambda row: timing.cell(row.get("MiB", "failed"))
    table = _table(options, MEMORY_LEGEND, lambda rows: summary(rows, "MiB", cell))
    _add_rows(table, options, functools.partial(peak_row, device))


def host(options: argparse.Namespace, device: Device) -> None:
    def columns(variant: Variant, passes: str) -> dict:
        outcome = device.measure({"": functools.partial(variant.call, passes)}, 0.0)[""]
        if outcome.error:
            return {"error": outcome.error}
        return {"host us": 1e6 * device.host_seconds(variant.call(passes), options.repeats)}

    _add_rows(_table(options, HOST_LEGEND), options, columns)


def _add_rows(table: Table, options: argparse.Namespace, columns: Callable[[Variant, str], dict]) -> None:
    for workload, chosen in _workloads(options):
        for passes, (name, variant) in itertools.product(options.passes, chosen.items()):
            table.add(_row(workload, passes, name) | columns(variant, passes))


def peak_row(device: Device, variant: Variant, passes: str) -> dict:
    """Returns the last columns of a row: MiB, MiB without outputs and gradients, or the error."""
    peak = device.peak(functools.partial(variant.call, passes))
    if isinstance(peak, str):
        return {"MiB": None, "beyond results MiB": None, "error": peak}
    beyond = peak - variant.results(passes)
    return {"MiB": peak / timing.MIB, "beyond results MiB": beyond / timing.MIB, "error": None}


def _row(workload: Workload, passes: str, variant: str) -> dict:
    return {"length": workload.length, "batch": workload.batch, "pass": passes, "variant": variant}


def _workloads(options: argparse.Namespace) -> Iterator[tuple[Workload, dict[str, Variant]]]:
    """Yields the workload of each length with its variants, until options.seconds have passed."""
    start = time.perf_counter()
    for length in timing.in_time(options.seconds, options.lengths, "length {}".format):
        workload = _workload(options, length)
        entries = _entries(options, workload)
        if options.host or time.perf_counter() - start >= options.seconds / 2:
            entries.pop("flex", None)  # torch compiles it for minutes, for every length and pass
        yield workload, {name: entry.build(workload) for name, entry in entries.items()}


def _entries(options: argparse.Namespace, workload: Workload) -> dict[str, Entry]:
    found = {name: entry for name, entry in VARIANTS.items() if name != "sdpa" and entry.suits(workload)}
    chosen = {name: entry for name, entry in found.items() if name.startswith(tuple(options.variants))}
    if not chosen:
        raise SystemExit(f"no variant begins with {' or '.join(options.variants)}: there are {', '.join(found)}")
    return chosen


def _table(options: argparse.Namespace, legend: str, summarise: Callable[[list[dict]], str] = lambda rows: "") -> Table:
    about = described(_entries(options, _workload(options, 16)))
    tokens = "one sequence" if options.host else f"{options.tokens} tokens"
    setting = f"{tokens}, {options.heads} heads of 64, tables of 512 rows, {options.dtype}"
    if options.dropout:
        setting += f", dropout {options.dropout:g}"
    if options.padding:
        setting += f", {options.padding:.0%} of the tokens padding at the right, neighbours unequally"
    return Table(options.name, options.out, f"{setting}. {legend}{about}", summarise)


def _workload(options: argparse.Namespace, length: int) -> Workload:
    batch, dtype = max(1, options.tokens // length), getattr(torch, options.dtype)
    return Workload(length, batch, options.heads, dtype, options.device, options.dropout, options.padding)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = devices.parser("attention_gpu", __doc__)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    kind.add_argument("--host", action="store_true", help="measure the host's time of a call on one sequence")
    parser.add_argument("--passes", choices=PASSES, nargs="+")
    parser.add_argument("--variants", nargs="+", default=[""], metavar="NAME", help="only those whose name begins so")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P")
    parser.add_argument("--padding", type=float, default=0.0, metavar="F", help="share of the tokens that are padding")
    parser.add_argument("--heads", type=int, default=12, metavar="H")
    parser.add_argument("--repeats", type=int, default=100, metavar="N", help="calls in a row, with --host")
    parser.add_argument("--seconds", type=float, default=200.0, help="no length begins later than this")
    parser.add_argument("--name", help="name of the table; by default it says what is measured")
    options = parser.parse_args(arguments)
    if options.lengths is None:
        options.lengths = (128,) if options.host else (512, 2048, 8192, 16384) if options.memory else LENGTHS
    if options.passes is None:
        options.passes = tuple(x for x in PASSES if x != "backward" or not (options.host or options.memory))
    if options.host:
        options.tokens = 1
    what = "host" if options.host else "memory" if options.memory else "attention"
    what += "-dropout" * bool(options.dropout) + "-padding" * bool(options.padding)
    options.name = options.name or what + ("" if options.dtype == "bfloat16" else f"-{options.dtype}")
    return options


if __name__ == "__main__":
    main()
