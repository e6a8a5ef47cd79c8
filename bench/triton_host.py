"""Host time and launches of one call of the Triton backend, without a GPU: ``python -m bench.triton_host``.

Launches do nothing. What remains is the work of the host: the plan, the workspace (on the CPU), and for kernels that
Triton has to look up the time that it takes for that. LEGEND describes the columns.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from unittest import mock

import torch
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import compute_cache_key, create_function_from_signature

from deberta_fast.op.backends import triton as backend
from deberta_fast.op.backends.triton import configuration

from . import timing
from .device import Table
from .variants.operator import Workload, asked

SHAPES = ((1, 2, 8), (1, 12, 128), (128, 12, 128), (32, 12, 512), (8, 12, 2048), (2, 12, 8192))  # batch, heads, length
CALLS = 100
LEGEND = (
    "Microseconds of host time per call, bfloat16, heads of 64, v3's tables, configurations of an H200: medians of "
    f"{CALLS} calls with launches that do nothing. first: the first call of these shapes. launches: kernels per call."
)


class Lookup:
    """Stands in for ``JITFunction.run``: finds a kernel as Triton 3.6 does, and returns one that does nothing."""

    def __init__(self):
        self.launches = 0
        self._binders: dict = {}
        self._keys: dict = {}
        self._backend = make_backend(GPUTarget("cuda", 90, 32))

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: object) -> None:
        self.launches += 1

    def run(self, kernel: JITFunction, *arguments: object, grid: object, warmup: bool, **options: object) -> "Lookup":
        if kernel not in self._binders:
            self._binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, self._backend)
        _, specialization, chosen = self._binders[kernel](*arguments, debug=False, **options)
        compute_cache_key(self._keys, specialization, chosen)
        self.launches += 1
        return self


def main(arguments: list[str] | None = None) -> None:
    options = timing.parser("triton_host", __doc__).parse_args(arguments)
    options = timing.complete(options, dict(out=timing.results_folder()), {})
    torch.set_num_threads(1)
    table = Table("triton-host", options.out, LEGEND)
    for batch, heads, length in SHAPES:
        for row in rows(batch, heads, length):
            table.add(row)


def rows(batch: int, heads: int, length: int) -> list[dict]:
    """Measures forward and backward of one shape. Memory is not touched: the tensors are empty."""
    workload = Workload(length, batch, heads, device="meta")
    empty = lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    made = asked(workload)
    call = made._replace(**{name: empty(x) for name, x in made._asdict().items() if isinstance(x, torch.Tensor)})
    output, lse = call.new_output(), torch.empty(batch, heads, length)
    gradients = [empty(x) for x in call[:5]]
    passes = {
        "forward": lambda: backend.forward(call, output, lse),
        "backward": lambda: backend.backward(call, output, lse, output, lse, gradients),
    }
    found = []
    lookup = Lookup()
    with (
        mock.patch.object(JITFunction, "run", lambda kernel, *given, **named: lookup.run(kernel, *given, **named)),
        mock.patch.object(configuration, "target_of", lambda device, *sizes: configuration.Target(90, *sizes)),
        mock.patch.object(torch.accelerator, "device_index", lambda index: nullcontext()),
        mock.patch.object(torch.Tensor, "new_zeros", torch.Tensor.new_empty),
    ):
        for name, run in passes.items():
            taken = [_microseconds(run) for _ in range(CALLS + 1)]
            shape = {"batch": batch, "heads": heads, "length": length, "pass": name}
            launches = lookup.launches // (CALLS + 1)
            found.append(shape | {"launches": launches, "first us": taken[0], "us": median(taken[1:])})
            lookup.launches = 0
    return found


def _microseconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
