"""The attention operator on a GPU against its neighbours: ``python -m bench.attention_gpu``.

What the variants are is said in ``variants.operator``. Every length has as many sequences as make the same number of
tokens. Results go to bench/results/ and the GPU's name, after every row. ``--device cpu`` is there to try this out.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import timing
from .device import Device, Table, by_length, times_by_length
from .variants import Entry, described
from .variants.operator import VARIANTS, Variant, Workload

PASSES = ("forward", "backward", "forward+backward")
FLOPS = {"forward": 4, "backward": 10, "forward+backward": 14}  # for each head's length^2 * size, plain attention's
LENGTHS = (512, 2048, 8192, 128, 1024, 4096, 16384, 256)  # most wanted first
SECONDS_A_VARIANT = 0.15
LEGEND = (
    "Medians of interleaved calls, kernels alone: the GPU is kept busy for a millisecond while the host queues a call, "
    "and its second-level cache is overwritten before. x plain: times as long as the fastest plain one. TFLOP/s count "
    "the products of plain attention over valid tokens (4, 10 and 14 length^2 size), for all variants alike. "
    "difference: of the output from the eager backend's, relative, in norm. Backward is output.backward(gradient, "
    "retain_graph=True) with no .grad to add to."
)
HOST_LEGEND = "Microseconds until the host may go on, of many calls in a row without waiting for the GPU. No flush."
MEMORY_LEGEND = (
    "Peak MiB that torch allocates in a call above what is there before it; and how much of it is left when outputs "
    "and gradients, which the call has to leave behind, are taken off."
)


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    device = Device(options.device)
    run = host if options.host else memory if options.memory else times
    timing.provenance()
    run(options, device)


def times(options: argparse.Namespace, device: Device) -> None:
    table = _table(options, LEGEND, times_by_length("x plain"))
    for workload, chosen in _workloads(options):
        exact = {name: workload.difference(name, variant) for name, variant in chosen.items()}
        for passes in options.passes:
            taken = device.measure(_calls(chosen, passes), SECONDS_A_VARIANT)
            plain = min(
                (t.seconds for name, t in taken.items() if name.startswith("plain") and t.seconds), default=None
            )
            for name, outcome in taken.items():
                seconds = outcome.seconds
                table.add(
                    {
                        "length": workload.length,
                        "batch": workload.batch,
                        "pass": passes,
                        "variant": name,
                        "ms": seconds and 1000 * seconds,
                        "TFLOP/s": seconds and FLOPS[passes] * workload.square_terms() / seconds / 1e12,
                        "x plain": seconds and plain and seconds / plain,
                        "calls": outcome.runs or None,
                        "difference": exact.get(name),
                        "error": outcome.error,
                    }
                )


def memory(options: argparse.Namespace, device: Device) -> None:
    summarise = lambda rows: by_length(rows, lambda row: timing.cell(row["MiB"]) if "MiB" in row else "failed")
    table = _table(options, MEMORY_LEGEND, summarise)
    for workload, chosen in _workloads(options):
        for passes in options.passes:
            for name, variant in chosen.items():
                row = {"length": workload.length, "batch": workload.batch, "pass": passes, "variant": name}
                table.add(row | peak_row(device, variant, passes))


def peak_row(device: Device, variant: Variant, passes: str) -> dict:
    """The last columns of a row: MiB, without what the call has to leave behind, or what went wrong."""
    peak = device.peaks({"": functools.partial(variant.call, passes)})[""]
    if isinstance(peak, str):
        return {"MiB": None, "beyond results MiB": None, "error": peak}
    beyond = peak - variant.results(passes)
    return {"MiB": peak / timing.MIB, "beyond results MiB": beyond / timing.MIB, "error": None}


def host(options: argparse.Namespace, device: Device) -> None:
    table = _table(options, HOST_LEGEND)
    for workload, chosen in _workloads(options):
        for passes in options.passes:
            for name, variant in chosen.items():
                row = {"length": workload.length, "batch": 1, "pass": passes, "variant": name}
                outcome = device.measure(_calls({name: variant}, passes), 0.0)[name]
                if outcome.error is None:
                    row["host us"] = 1e6 * device.host_seconds(variant.call(passes), repeats=options.repeats)
                table.add(row | {"error": outcome.error})


def _calls(chosen: dict[str, Variant], passes: str) -> dict:
    return {name: functools.partial(variant.call, passes) for name, variant in chosen.items()}


def _workloads(options: argparse.Namespace) -> Iterator[tuple[Workload, dict[str, Variant]]]:
    """A workload for each length and its variants, as long as there is time."""
    start = time.perf_counter()
    for length in options.lengths:
        spent = time.perf_counter() - start
        if spent > options.seconds:
            print(f"out of time before length {length}", flush=True)
            return
        workload = _workload(options, length)
        entries = _entries(options, workload)
        if options.host or spent >= options.seconds / 2:
            entries.pop("flex", None)  # which torch compiles for every length and pass
        yield workload, {name: entry.build(workload) for name, entry in entries.items()}


def _entries(options: argparse.Namespace, workload: Workload) -> dict[str, Entry]:
    found = {name: entry for name, entry in VARIANTS.items() if name != "sdpa" and entry.suits(workload)}
    chosen = {name: entry for name, entry in found.items() if name.startswith(tuple(options.variants))}
    if not chosen:
        raise SystemExit(f"no variant begins with {' or '.join(options.variants)}: there are {', '.join(found)}")
    return chosen


def _table(options: argparse.Namespace, legend: str, summarise: Callable[[list[dict]], str] = lambda rows: "") -> Table:
    about = described(_entries(options, _workload(options, 16)))
    return Table(options.name, options.out, f"{_setting(options)} {legend}{about}", summarise)


def _workload(options: argparse.Namespace, length: int) -> Workload:
    return Workload(
        length=length,
        batch=max(1, options.tokens // length),
        heads=options.heads,
        dtype=getattr(torch, options.dtype),
        device=options.device,
        dropout_p=options.dropout,
        padding=options.padding,
    )


def _setting(options: argparse.Namespace) -> str:
    tokens = "one sequence" if options.host else f"{options.tokens} tokens"
    parts = [f"{tokens}, {options.heads} heads of 64, tables of 512 rows, {options.dtype}"]
    if options.dropout:
        parts.append(f"dropout {options.dropout:g}")
    if options.padding:
        parts.append(f"{options.padding:.0%} of the tokens padding at the right, neighbours unequally")
    return ", ".join(parts) + "."


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.attention_gpu", description=__doc__.split("\n\n")[0])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--memory", action="store_true", help="peak memory in place of time")
    kind.add_argument("--host", action="store_true", help="the host's time for a call on one sequence")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="L", help="in this order")
    parser.add_argument("--passes", choices=PASSES, nargs="+")
    parser.add_argument("--variants", nargs="+", default=[""], metavar="NAME", help="only those whose name begins so")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P")
    parser.add_argument("--padding", type=float, default=0.0, metavar="F", help="share of the tokens that are padding")
    parser.add_argument("--tokens", type=int, default=16384, metavar="N")
    parser.add_argument("--heads", type=int, default=12, metavar="H")
    parser.add_argument("--repeats", type=int, default=100, metavar="N", help="calls in a row, with --host")
    parser.add_argument("--seconds", type=float, default=200.0, help="no length is begun later than this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--name", help="of the table; by default what is measured")
    parser.add_argument("--out", type=Path, default=timing.results_folder(), metavar="DIR", help="folder of results")
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
