"""Times torch's products and plain attention on this CPU: ``python -m bench.machine``.

A flag of the processor does not say that a library uses it. So each call is timed, and oneDNN, asked by ONEDNN_VERBOSE,
names the kernels that it takes ("amx" in a name: tiles). Results go to bench/results/cpu/, after every row.
"""

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Callable

import torch

from . import timing
from .device import Table

DTYPES = ("float32", "bfloat16")
PASSES = ("forward", "backward")
WIDTH, HEADS, SIZE = 768, 12, 64
NOTES = (
    "ms: medians of interleaved calls; GFLOP/s: the operations of their products over this time. linear: "
    f"torch.nn.functional.linear of (rows, {WIDTH}) by ({WIDTH}, {WIDTH}); sdpa: scaled_dot_product_attention of one "
    f"sequence of that many rows, {HEADS} heads of {SIZE}. backward without forward. oneDNN's kernels: those that it "
    "reports for one call; none where torch calls MKL or kernels of its own."
)


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    table = Table("machine", options.out, NOTES)
    reported = kernels(options.rows)
    for threads, dtype, one in itertools.product(options.threads, DTYPES, PASSES):
        torch.set_num_threads(threads)
        taken = timing.medians({what: call(what, dtype, one, options.rows) for what in WORK}, options.seconds)
        for what, seconds in taken.items():
            row = {"what": what, "dtype": dtype, "pass": one, "threads": threads, "rows": options.rows}
            row |= {"ms": 1000 * seconds, "GFLOP/s": _operations(what, one, options.rows) / seconds / 1e9}
            table.add(row | {"oneDNN's kernels": reported[what, dtype, one]})


def call(what: str, dtype: str, one: str, rows: int) -> Callable[[], object]:
    """Returns a call of a pass, forward or backward, without arguments."""
    torch.manual_seed(0)
    function, *shapes = WORK[what]
    inputs = [torch.randn(shape(rows), dtype=getattr(torch, dtype)).requires_grad_() for shape in shapes]
    if one == "forward":
        return torch.no_grad()(lambda: function(*inputs))
    output = function(*inputs)
    gradient = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True)


WORK = {
    "linear": (torch.nn.functional.linear, lambda rows: (rows, WIDTH), lambda rows: (WIDTH, WIDTH)),
    "sdpa": (torch.nn.functional.scaled_dot_product_attention, *[lambda rows: (1, HEADS, rows, SIZE)] * 3),
}


def _operations(what: str, one: str, rows: int) -> int:
    """Counts the operations of the products. Backward of attention makes the scores again: five products for two."""
    if what == "linear":
        return 2 * rows * WIDTH * WIDTH * (1 if one == "forward" else 2)
    return 2 * rows * rows * SIZE * HEADS * (2 if one == "forward" else 5)


def kernels(rows: int) -> dict[tuple[str, ...], str]:
    """Names the kernels that oneDNN reports for each work, dtype and pass, in a process of its own."""
    command = [sys.executable, "-c", f"from bench import machine; machine.run_each({rows})"]
    verbose = os.environ | {"ONEDNN_VERBOSE": "1"}
    done = subprocess.run(command, cwd=timing.REPOSITORY, env=verbose, capture_output=True, text=True, check=True)
    parts = [part.partition("\nend")[0].partition("\n") for part in done.stdout.split("begin ")[1:]]
    return {tuple(case.split()): named(report) for case, _, report in parts}


def run_each(rows: int) -> None:
    """Runs every call once, between lines "begin <work> <dtype> <pass>" and "end"."""
    for case in itertools.product(WORK, DTYPES, PASSES):
        run = call(*case, rows)
        print("begin", *case, flush=True)
        run()
        print("end", flush=True)


def named(report: str) -> str:
    """Reads the kernels out of oneDNN's lines ``onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx2,...``."""
    lines = [line.split(",") for line in report.splitlines() if line.startswith("onednn_verbose,v1,primitive,exec,cpu")]
    return " ".join(dict.fromkeys(line[6] for line in lines if line[5] != "reorder")) or "none"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = timing.parser("machine", __doc__)
    parser.add_argument("--threads", type=timing.positive, nargs="+", metavar="N")
    parser.add_argument("--rows", type=timing.positive, metavar="N")
    whole = dict(threads=[torch.get_num_threads()], rows=2048, seconds=1.0)
    return timing.complete(parser.parse_args(arguments), whole, dict(rows=128))


if __name__ == "__main__":
    main()
