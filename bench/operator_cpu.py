"""The attention operator on the CPU against plain attention: ``python -m bench.operator_cpu``.

``variants.operator`` describes the variants; eager takes part up to 2048 tokens.

The inputs have DeBERTa-v3-base's shapes, in the layout in which a layer makes them. Two series of shapes: as many
sequences as make 2048 tokens, and one sequence of each length. The table of ratios comes first. Peak memory is that of
one sequence. Results go to bench/results/cpu/, after every row.
"""

import argparse
import functools
import itertools
from statistics import median, quantiles

import torch

from . import timing
from .device import Table
from .variants import described
from .variants.operator import VARIANTS, Variant, Workload

HEADS = 12
TOKENS = EAGER_LONGEST = 2048
PASSES = ("forward", "backward")
MEMORY_PASSES = ("forward", "forward+backward")
DTYPES = ("float32", "bfloat16", "float16")
SHAPE = f"{HEADS} heads of 64, position tables of 512 rows, nothing masked or dropped."
COMPARED = ("sdpa", "cpu", "eager")
LEGEND = described(VARIANTS, COMPARED) + " Lower cpu/sdpa and higher eager/cpu are better."
TIME_NOTES = (
    f"Milliseconds of the operator, medians of rounds, in each of which every variant is called once; {SHAPE} forward "
    "without gradients; backward without forward, to query, key and value, and except for sdpa to both position "
    "tables. Ratios are taken within a round, so that a change of the machine's speed affects both sides: cpu/sdpa and "
    f"eager/cpu are medians, from and to the quartiles of cpu/sdpa.{LEGEND}"
)
MEMORY_NOTES = (
    f"Peak resident MiB of a call above its inputs, each length in its own process; {SHAPE} Output and gradients "
    f"count. forward+backward returns all gradients at once.{LEGEND}"
)


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    shapes = dict.fromkeys([(max(1, TOKENS // n), n) for n in options.lengths] + [(1, n) for n in options.lengths])
    table = Table(options.name, options.out, TIME_NOTES, ratios)
    for dtype, one, threads, shape in itertools.product(options.dtypes, PASSES, options.threads, shapes):
        table.add(time_row(dtype, one, threads, *shape, options.seconds))
    table = Table(f"{options.name}-memory", options.out, MEMORY_NOTES)
    for dtype, length in itertools.product(options.dtypes, options.memory_lengths):
        table.add(*memory_rows(dtype, options.threads[-1], length))


def time_row(dtype: str, one: str, threads: int, batch: int, length: int, seconds: float) -> dict:
    """Times the pass ``one``, forward or backward."""
    torch.set_num_threads(threads)
    compared = COMPARED if length <= EAGER_LONGEST else COMPARED[:2]
    workload = _workload(dtype, batch, length)
    found = {name: VARIANTS[name].build(workload) for name in compared}
    calls = {name: variant.forward for name, variant in found.items()}
    if one == "backward":
        calls = {name: functools.partial(backward, found[name], forward()) for name, forward in calls.items()}
    with torch.set_grad_enabled(one != "forward"):
        taken = timing.rounds(calls, seconds)
    row = {"dtype": dtype, "pass": one, "threads": threads, "batch": batch, "length": length}
    row |= {f"{name} ms": 1000 * median(taken[name]) if name in taken else None for name in COMPARED}
    low, middle, high = quantiles(_within_rounds(taken, "cpu", "sdpa"), n=4)
    row |= {"calls": len(taken["cpu"]), "cpu/sdpa": middle, "from": low, "to": high}
    return row | {"eager/cpu": median(_within_rounds(taken, "eager", "cpu")) if "eager" in taken else None}


def _within_rounds(taken: dict[str, list[float]], one: str, other: str) -> list[float]:
    return [a / b for a, b in zip(taken[one], taken[other], strict=True)]


def ratios(rows: list[dict]) -> str:
    """Makes a Markdown table of cpu/sdpa: a line for each dtype, pass and threads, a column for each shape."""
    column = lambda row: f"{row['batch']} x {row['length']}"
    cell = lambda row: f"{row['cpu/sdpa']:.2f} ({row['from']:.2f} to {row['to']:.2f})"
    table = timing.pivot(rows, ("dtype", "pass", "threads"), column, cell)
    return f"## cpu/sdpa (quartiles), batch x length\n\n{table}"


def memory_rows(dtype: str, threads: int, length: int) -> list[dict]:
    """Measures a row for each of MEMORY_PASSES."""
    torch.set_num_threads(threads)
    peaks = {variant: timing.peak_memory(measured, dtype, length, variant) for variant in ("sdpa", "cpu")}
    rows = []
    for i, one in enumerate(MEMORY_PASSES):
        mib = {variant: peaks[variant][i] / timing.MIB for variant in peaks}
        row = {"dtype": dtype, "pass": one, "threads": threads, "batch": 1, "length": length}
        row |= {f"{variant} MiB": mib[variant] for variant in mib}
        row |= {f"{variant} MiB/1000 tokens": 1000 * mib[variant] / length for variant in mib}
        rows.append(row | {"cpu/sdpa": mib["cpu"] / mib["sdpa"]})
    return rows


def measured(dtype: str, length: int, variant: str) -> list:
    """Returns the calls of MEMORY_PASSES for ``timing.peak_memory``, after the same calls over a few tokens."""

    def calls(length: int) -> list:
        built = VARIANTS[variant].build(_workload(dtype, 1, length))
        return [torch.no_grad()(built.forward), lambda: backward(built, built.forward())]

    for call in calls(8):
        call()
    return calls(length)


def backward(variant: Variant, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns the gradients of query, key and value (B, H, L, D), and except for sdpa of both tables (H, R, D)."""
    return torch.autograd.grad(output, variant.leaves, variant.gradient, retain_graph=True)


def _workload(dtype: str, batch: int, length: int) -> Workload:
    return Workload(length, batch, HEADS, getattr(torch, dtype), device="cpu")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = timing.parser("operator_cpu", __doc__)
    parser.add_argument("--lengths", type=timing.positive, nargs="+", metavar="L")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+")
    parser.add_argument("--threads", type=timing.positive, nargs="+", metavar="N", help="memory rows use the last one")
    parser.add_argument(
        "--memory-lengths", type=int, nargs="*", metavar="L", help="lengths of the memory rows; may be empty"
    )
    parser.add_argument("--name", default="operator", help="name of the table of times")
    whole = dict(lengths=[128, 512, 2048, 8192], dtypes=DTYPES[:2], threads=[1, 2], seconds=5.0)
    whole["memory_lengths"] = [2048, 4096, 8192, 16384]
    quick = dict(lengths=[128, 512], dtypes=DTYPES[:1], threads=[1], memory_lengths=[1024])
    return timing.complete(parser.parse_args(arguments), whole, quick)


if __name__ == "__main__":
    main()
