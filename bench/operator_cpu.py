"""The attention operator on the CPU against plain attention: ``python -m bench.operator_cpu``.

What the variants are is said in ``variants.operator``; eager takes part up to 2048 tokens.

The inputs are DeBERTa-v3-base's, in the layout in which a layer makes them. Two series of shapes: as many sequences as
make 2048 tokens, and one sequence of each length. Peak memory is that of one sequence. Results go to
bench/results/cpu/, after every row.
"""

import argparse
import functools
from pathlib import Path

import torch

from . import timing
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
NOTES = {
    "operator": f"Milliseconds of the operator alone, medians of interleaved calls; {SHAPE} forward without gradients; "
    "backward alone, of query, key and value, and of both position tables but for sdpa." + LEGEND,
    "operator-memory": f"Peak resident MiB of a call above its inputs, each length in a process of its own; {SHAPE} "
    "Output and gradients count. forward+backward hands over all gradients at once." + LEGEND,
}


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    shapes = dict.fromkeys([(max(1, TOKENS // n), n) for n in options.lengths] + [(1, n) for n in options.lengths])
    jobs = []
    for dtype in options.dtypes:
        for one in PASSES:
            for threads in options.threads:
                for batch, length in shapes:
                    make = functools.partial(time_rows, dtype, one, threads, batch, length, options.seconds)
                    jobs.append(("operator", f"{dtype} {one} {batch}x{length}, {threads} thread(s)", make))
    for dtype in options.dtypes:
        for length in options.memory_lengths:
            make = functools.partial(memory_rows, dtype, options.threads[-1], length)
            jobs.append(("operator-memory", f"{dtype} 1x{length}, memory", make))
    timing.fill(jobs, NOTES, options.out)


def time_rows(dtype: str, one: str, threads: int, batch: int, length: int, seconds: float) -> list[dict]:
    """A row of the pass ``one``, forward or backward."""
    torch.set_num_threads(threads)
    compared = COMPARED if length <= EAGER_LONGEST else COMPARED[:2]
    workload = _workload(dtype, batch, length)
    found = {name: VARIANTS[name].build(workload) for name in compared}
    if one == "forward":
        calls = {name: variant.forward for name, variant in found.items()}
    else:
        calls = {name: functools.partial(backward, variant, variant.forward()) for name, variant in found.items()}
    with torch.set_grad_enabled(one != "forward"):
        taken = timing.medians(calls, seconds)
    row = {
        "dtype": dtype,
        "pass": one,
        "threads": threads,
        "batch": batch,
        "length": length,
        **{f"{name} ms": 1000 * taken[name] if name in taken else None for name in COMPARED},
        "cpu/sdpa": taken["cpu"] / taken["sdpa"],
        "eager/cpu": taken["eager"] / taken["cpu"] if "eager" in taken else None,
    }
    return [row]


def memory_rows(dtype: str, threads: int, length: int) -> list[dict]:
    """A row for each of MEMORY_PASSES."""
    torch.set_num_threads(threads)
    peaks = {variant: timing.peak_memory(measured, dtype, length, variant) for variant in ("sdpa", "cpu")}
    mib = {variant: [peak / timing.MIB for peak in peaks[variant]] for variant in peaks}
    return [
        {
            "dtype": dtype,
            "pass": one,
            "threads": threads,
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

    def calls(length: int) -> list:
        built = VARIANTS[variant].build(_workload(dtype, 1, length))
        return [torch.no_grad()(built.forward), lambda: backward(built, built.forward())]

    for call in calls(8):
        call()
    return calls(length)


def backward(variant: Variant, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key and value, (B, H, L, D), and but for sdpa of both position tables, (H, R, D)."""
    return torch.autograd.grad(output, variant.leaves, variant.gradient, retain_graph=True)


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
