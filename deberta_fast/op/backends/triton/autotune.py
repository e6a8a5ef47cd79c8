"""Measures launch configurations on this GPU and saves the best.

``python -m deberta_fast.op.backends.triton.autotune``

Nothing runs it but you. Later processes on the same GPU find its choice in the user's cache directory.
"""

import argparse
from collections.abc import Callable, Iterable

import torch

from ... import backends
from ...call import Call
from . import configuration
from .configuration import Configuration, Tiles

SHAPES = [(r, c) for r in (32, 64, 128) for c in (32, 64, 128)]
CANDIDATES = [Tiles(r, c, warps, stages) for r, c in SHAPES for warps in (4, 8) for stages in (1, 2, 3)]
FORWARD = ("bands", "forward")


def tune(
    head_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    lengths: Iterable[int] = (512, 4096),
    heads: int = 12,
    tokens: int = 16384,
    candidates: Iterable[Tiles] = tuple(CANDIDATES),
    measure: Callable[[Callable[[], object]], float] | None = None,
    make_calls: Callable | None = None,
    device: str | None = None,
) -> Configuration:
    """Tunes one kernel after the other for a head size and dtype, over the lengths together, and saves the result.

    Args:
        measure: milliseconds of a call; None means the median of ``triton.testing.do_bench``.
        make_calls: forward and backward to measure; None means those of dense attention with v3's tables.
        device: None means the machine's accelerator.

    Returns:
        The configuration saved.
    """
    import triton

    device = device or torch.accelerator.current_accelerator(check_available=True).type
    measure = measure or (lambda call: triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median"))
    calls = [
        (make_calls or _calls)(head_size, dtype, length, heads, max(1, tokens // length), device) for length in lengths
    ]
    block_size = max(16, 1 << (head_size - 1).bit_length())
    key, best = configuration.choose(torch.device(device), block_size, dtype.itemsize)

    def total(trial: Configuration, kernel: str) -> float:
        configuration.remember(key, trial)
        try:
            times = [measure(run_forward if kernel in FORWARD else run_backward) for run_forward, run_backward in calls]
        except (RuntimeError, triton.CompilationError, triton.OutOfResources):
            return float("inf")
        # Shrunk, it is another configuration than the one on trial.
        return sum(times) if configuration.choose(torch.device(device), *key[1][1:])[1] == trial else float("inf")

    for kernel in Configuration._fields[1:]:
        times = {best: total(best, kernel)}
        for tiles in candidates:
            trial = best._replace(**{kernel: tiles})
            trial = trial._replace(grain=max(64, *(max(t.rows, t.columns) for t in trial[1:])))
            if trial not in times:
                times[trial] = total(trial, kernel)
        best = min(times, key=times.get)
        print(f"{kernel}: {getattr(best, kernel)}, {times[best]:.3f} ms")
    print(f"saved to {configuration.save(key, best)}")
    return best


def _calls(head_size: int, dtype: torch.dtype, length: int, heads: int, batch: int, device: str):
    """Forward and backward of one call with v3's tables."""
    normal = lambda *shape: torch.randn(shape, dtype=dtype, device=device)
    query, key, value = (normal(batch, heads, length, head_size) for _ in range(3))
    call = Call(
        query, key, value, normal(heads, 512, head_size), normal(heads, 512, head_size), None, None, None,
        256, 512, "hf", 0, 0, length, (3 * head_size) ** -0.5, 0.0,
    )  # fmt: skip
    output, lse = backends.forward(call, "triton")
    forward = lambda: backends.forward(call, "triton")
    return forward, lambda: backends.backward(call, "triton", output, lse, output, None)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deberta_fast.op.backends.triton.autotune", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[512, 4096])
    arguments = parser.parse_args()
    tune(arguments.head_size, getattr(torch, arguments.dtype), arguments.lengths)


if __name__ == "__main__":
    main()
