"""Host time of one small call, where overhead dominates: ``python -m bench.host``.

LEGEND describes the variants and the call. Results go to bench/results/cpu/ or the GPU's folder, after every row.
"""

import functools
import itertools
from collections.abc import Callable

import torch

import deberta_fast

from . import timing
from .device import Call, Device, Table

BATCH, HEADS, LENGTH, SIZE = 1, 2, 8, 64
ROWS = 512  # rows of DeBERTa-v3's position tables
PASSES = ("forward", "forward+backward")
CALLS = 200  # calls of a variant in a row, before the next variant's turn
CALLS_ON_GPU = 10  # so few that the queue of launches does not fill up, which would block the host
MOST_ROUNDS = 1000
LEGEND = (
    f"Microseconds of host time per call, {BATCH} sequence of {LENGTH} tokens, {HEADS} heads of {SIZE}, float32, one "
    f"thread: medians over rounds of {CALLS} calls of each variant in turn; on a GPU until the call returns, rounds of "
    f"{CALLS_ON_GPU}. sdpa: scaled_dot_product_attention without position terms; dense: disentangled_attention; "
    "varlen: disentangled_attention_varlen on the same tokens; both with the backend that they choose. Position tables "
    f"of {ROWS} rows, or none: plain attention through the same functions. forward: torch.inference_mode. "
    "forward+backward: torch.autograd.grad of the output to query, key and value, and except for sdpa to both tables. "
    "Lower ratios are better."
)


def main(arguments: list[str] | None = None) -> None:
    options = timing.parser("host", __doc__).parse_args(arguments)
    options = timing.complete(options, dict(seconds=10.0, out=timing.results_folder()), {})
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    # In the GPU's folder, attention_gpu has a table named "host".
    table = Table("host-call" if gpu else "host", options.out, LEGEND)
    devices = ("cpu", "cuda") if gpu else ("cpu",)
    for device, tables, passes in itertools.product(devices, (True, False), PASSES):
        table.add(row(device, passes, tables, options.seconds))


def row(device: str, passes: str, tables: bool, seconds: float) -> dict:
    """Measures the microseconds of each variant, and the ratios to sdpa."""
    calls = variants(device, passes, tables)
    if device == "cpu":
        rounds = {name: functools.partial(_repeat, call) for name, call in calls.items()}
        taken = timing.medians(rounds, seconds, most=MOST_ROUNDS)
        us = {name: 1e6 * taken[name] / CALLS for name in calls}
    else:
        us = {}
        for name, call in calls.items():
            call()  # compiles
            us[name] = 1e6 * Device(device).host_seconds(Call(call), CALLS_ON_GPU)
    return {
        "device": device,
        "pass": passes,
        "position tables": "both" if tables else "none",
        **{f"{name} us": value for name, value in us.items()},
        "dense/sdpa": us["dense"] / us["sdpa"],
        "varlen/sdpa": us["varlen"] / us["sdpa"],
    }


def variants(device: str, passes: str, tables: bool) -> dict[str, Callable[[], object]]:
    """Returns calls without arguments by name; they return the output, or the gradients."""
    torch.manual_seed(0)
    normal = functools.partial(torch.randn, device=device)
    heads = [normal(BATCH, HEADS, LENGTH, SIZE).requires_grad_() for _ in range(3)]
    packed = [x.detach()[0].transpose(0, 1).contiguous().requires_grad_() for x in heads]
    positions = [normal(HEADS, ROWS, SIZE).requires_grad_() for _ in range(2)] if tables else []
    gradient = normal(BATCH, HEADS, LENGTH, SIZE)
    ends = torch.tensor([0, LENGTH], dtype=torch.int32, device=device)
    sdpa, dense = torch.nn.functional.scaled_dot_product_attention, deberta_fast.disentangled_attention
    varlen = functools.partial(deberta_fast.disentangled_attention_varlen, cu_seqlens=ends, max_seqlen=LENGTH)
    packed_gradient = gradient[0].transpose(0, 1).contiguous()
    return {
        "sdpa": _call(sdpa, heads, gradient, passes),
        "dense": _call(dense, [*heads, *positions], gradient, passes),
        "varlen": _call(varlen, [*packed, *positions], packed_gradient, passes),
    }


def _call(function: Callable, inputs: list[torch.Tensor], gradient: torch.Tensor, passes: str) -> Callable[[], object]:
    def forward():
        with torch.inference_mode():
            return function(*inputs)

    return forward if passes == "forward" else lambda: torch.autograd.grad(function(*inputs), inputs, gradient)


def _repeat(call: Callable[[], object]) -> None:
    for _ in range(CALLS):
        call()


if __name__ == "__main__":
    main()
