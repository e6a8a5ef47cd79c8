"""The attention operator on the CPU against plain attention: ``python -m bench.operator_cpu``.

    sdpa     torch's scaled_dot_product_attention on the same query, key and value: no position terms
    cpu      disentangled_attention, the backend of that name
    eager    disentangled_attention, the backend that needs no compiler; up to 2048 tokens

The inputs are DeBERTa-v3-base's, in the layout in which a layer makes them. Two series of shapes: as many sequences as
make 2048 tokens, and one sequence of each length. Peak memory is that of one sequence. Results go to
bench/results/cpu/, after every row.
"""

import argparse
import functools
from pathlib import Path

import torch
from tqdm import tqdm

from . import timing
from .attention_variants import Workload, ours

HEADS = 12
TOKENS = EAGER_LONGEST = 2048
PASSES = ("forward", "backward")
MEMORY_PASSES = ("forward", "forward+backward")
DTYPES = ("float32", "bfloat16", "float16")
SHAPE = f"{HEADS} heads of 64, position tables of 512 rows, nothing masked or dropped."
UNITS = {
    "operator": f"Milliseconds of the operator alone, medians of interleaved calls; {SHAPE} forward without gradients; "
    "backward alone, of query, key and value, and of both position tables but for sdpa.",
    "operator-memory": f"Peak resident MiB of a call above its inputs, each length in a process of its own; {SHAPE} "
    "Output and gradients count. forward+backward hands over all gradients at once.",
}
LEGEND = (
    "sdpa: scaled_dot_product_attention without position terms; cpu, eager: disentangled_attention by that backend. "
    "Lower cpu/sdpa and higher eager/cpu are better."
)


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    shapes = dict.fromkeys([(max(1, TOKENS // n), n) for n in options.lengths] + [(1, n) for n in options.lengths])
    times = [
        (dtype, one, threads, batch, length)
        for dtype in options.dtypes
        for one in PASSES
        for threads in options.threads
        for batch, length in shapes
    ]
    peaks = [(dtype, length) for dtype in options.dtypes for length in options.memory_lengths]
    timing.provenance()
    tables: dict[str, list[dict]] = {}
    with tqdm(total=len(times) + len(peaks), unit="row") as progress:

        def keep(name: str, rows: list[dict]) -> None:
            tables.setdefault(name, []).extend(rows)
            timing.save(name, tables[name], options.out, f"{UNITS[name]} {LEGEND}")
            progress.update()

        for dtype, one, threads, batch, length in times:
            progress.set_description(f"{dtype} {one} {batch}x{length}, {threads} thread(s)")
            keep("operator", [time_row(dtype, one, threads, batch, length, options.seconds)])
        torch.set_num_threads(options.threads[-1])
        for dtype, length in peaks:
            progress.set_description(f"{dtype} 1x{length}, memory")
            keep("operator-memory", memory_rows(dtype, length))
    for name, rows in tables.items():
        print(f"\n{name}: {UNITS[name]}\n\n{timing.markdown(rows)}")
    print(f"\n{LEGEND}\nWritten to {options.out}")


def time_row(dtype: str, one: str, threads: int, batch: int, length: int, seconds: float) -> dict:
    """A row of the pass ``one``, forward or backward."""
    torch.set_num_threads(threads)
    workload = _workload(dtype, batch, length)
    variants = ("sdpa", "cpu", "eager") if length <= EAGER_LONGEST else ("sdpa", "cpu")
    if one == "forward":
        calls = {variant: functools.partial(forward, workload, variant) for variant in variants}
    else:
        outputs = {variant: forward(workload, variant) for variant in variants}
        calls = {variant: functools.partial(backward, workload, variant, outputs[variant]) for variant in variants}
    with torch.set_grad_enabled(one != "forward"):
        taken = timing.medians(calls, seconds)
    return {
        "dtype": dtype,
        "pass": one,
        "threads": threads,
        "batch": batch,
        "length": length,
        **{
            f"{variant} ms": 1000 * taken[variant] if variant in taken else None for variant in ("sdpa", "cpu", "eager")
        },
        "cpu/sdpa": taken["cpu"] / taken["sdpa"],
        "eager/cpu": taken["eager"] / taken["cpu"] if "eager" in taken else None,
    }


def memory_rows(dtype: str, length: int) -> list[dict]:
    """A row for each of MEMORY_PASSES."""
    peaks = {variant: timing.peak_memory(measured, dtype, length, variant) for variant in ("sdpa", "cpu")}
    mib = {variant: [peak / timing.MIB for peak in peaks[variant]] for variant in peaks}
    return [
        {
            "dtype": dtype,
            "pass": one,
            "threads": torch.get_num_threads(),
            "batch": 1,
            "length": length,
            **{f"{variant} MiB": mib[variant][i] for variant in mib},
            **{f"{variant} MiB/1000 tokens": 1000 * mib[variant][i] / length for variant in mib},
            "cpu/sdpa": mib["cpu"][i] / mib["sdpa"][i],
        }
        for i, one in enumerate(MEMORY_PASSES)
    ]


def measured(dtype: str, length: int, variant: str) -> list:
    """For ``timing.peak_memory``: the calls of MEMORY_PASSES, after the same over a few tokens."""

    def calls(workload: Workload) -> list:
        return [
            torch.no_grad()(functools.partial(forward, workload, variant)),
            lambda: backward(workload, variant, forward(workload, variant)),
        ]

    for call in calls(_workload(dtype, 1, 8)):
        call()
    return calls(_workload(dtype, 1, length))


def forward(workload: Workload, variant: str) -> torch.Tensor:
    """O (B, H, L, D)."""
    if variant == "sdpa":
        return torch.nn.functional.scaled_dot_product_attention(*workload.qkv)
    return ours(workload, variant, dropout_p=0.0)


def backward(workload: Workload, variant: str, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key and value, (B, H, L, D), and but for sdpa of both position tables, (H, R, D)."""
    leaves = workload.qkv if variant == "sdpa" else [*workload.qkv, *workload.tables]
    return torch.autograd.grad(output, leaves, workload.gradient, retain_graph=True)


def _workload(dtype: str, batch: int, length: int) -> Workload:
    return Workload(length, batch, HEADS, getattr(torch, dtype), device="cpu", dropout_p=0.0, padding=0.0)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.operator_cpu", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a look in half a minute: short, one thread, float32, kept in build/"
    )
    parser.add_argument("--lengths", type=int, nargs="+", metavar="L")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+")
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="the last is that of the memory rows")
    parser.add_argument("--memory-lengths", type=int, nargs="*", metavar="L", help="of the memory rows; or none")
    parser.add_argument("--seconds", type=float, help="time a row aims at; never fewer than 5 rounds")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    options = parser.parse_args(arguments)
    results = timing.REPOSITORY / "bench" / "results" / "cpu"
    defaults = {
        "lengths": [128, 512] if options.quick else [128, 512, 2048, 8192],
        "dtypes": DTYPES[:1] if options.quick else DTYPES[:2],
        "threads": [1] if options.quick else [1, 2],
        "memory_lengths": [1024] if options.quick else [2048, 4096, 8192, 16384],
        "seconds": 0.5 if options.quick else 5.0,
        "out": Path("build/bench") if options.quick else results,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    main()
