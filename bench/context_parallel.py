"""Attention over sequences that processes share, beside one process with whole sequences, by length:

    torchrun --nproc-per-node 2 -m bench.context_parallel

On GPUs, NCCL connects one process a GPU; elsewhere gloo. Results go to bench/results/cpu/ or the GPU's folder, after
every length.
"""

import functools
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

import deberta_fast
from deberta_fast.distributed import disentangled_attention_context_parallel
from deberta_fast.op.context_parallel import ring
from deberta_fast.op.context_parallel.stretches import Stretches, even_stretches

from . import timing

HEADS, SIZE, ROWS = 4, 64, 512
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
METHODS = ("gather", "ring", "heads")
ALLOWED = 1e-4  # relative difference from one process in float32
LEGEND = (
    f"Milliseconds of forward and backward of one sequence, {HEADS} heads of {SIZE}, tables of {ROWS} rows with all "
    "gradients; medians of interleaved rounds, of which the slowest process counts, one thread a process. alone: one "
    "process computes the whole; all do so at once. gather: a ring whose keys arrive in one step; ring; heads. "
    "difference: the largest of output and query's gradient from alone, relative to the largest element. The share of "
    "alone's time is predicted as 1 / processes, where transfers hide. Lower is better."
)


def main(arguments: list[str] | None = None) -> None:
    parser = timing.parser("context-parallel", __doc__)
    parser.add_argument("--lengths", type=timing.positive, nargs="+", metavar="L")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="float32; bfloat16 on a GPU")
    gpu = torch.cuda.is_available()
    whole = dict(seconds=5.0, out=timing.results_folder(), lengths=LENGTHS, dtype="bfloat16" if gpu else "float32")
    options = timing.complete(parser.parse_args(arguments), whole, dict(lengths=LENGTHS[:2], seconds=0.5))
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if gpu else "gloo")
    if gpu:
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    rows = []
    for length in options.lengths:
        rows.append(row(length, getattr(torch, options.dtype), "cuda" if gpu else "cpu", options.seconds))
        if dist.get_rank() == 0:
            timing.save("context-parallel", rows, options.out, LEGEND)
            print("  ".join(timing.cell(value) for value in rows[-1].values()), flush=True)
    dist.destroy_process_group()


def row(length: int, dtype: torch.dtype, device: str, seconds: float) -> dict:
    calls = variants(length, dtype, device)
    results = {name: call() for name, call in calls.items()}
    worst = max(difference(results["alone"], results[name], length) for name in METHODS)
    if dtype == torch.float32 and not worst < ALLOWED:
        raise RuntimeError(f"{length} tokens: results differ by {worst:.1e} from one process's")
    times = medians(calls, seconds, device)
    ranks = dist.get_world_size()
    found = {"tokens": length, "processes": ranks, "dtype": str(dtype).removeprefix("torch."), "difference": worst}
    found |= {f"{name} ms": 1e3 * times[name] for name in calls}
    return found | {f"{name}/alone": times[name] / times["alone"] for name in METHODS}


def variants(length: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], tuple]]:
    """Calls that return output and query's gradient, of the whole sequence or of this process's stretch."""
    torch.manual_seed(0)
    normal = functools.partial(torch.randn, device=device, dtype=dtype)
    inputs = [*normal(3, 1, HEADS, length, SIZE), *normal(2, HEADS, ROWS, SIZE)]
    cotangent, mine = normal(1, HEADS, length, SIZE), stretch(length)

    def run(function: Callable, rows: slice, gather_bytes: int | None = None) -> tuple:
        if gather_bytes is not None:
            ring.GATHER_BYTES = gather_bytes
        leaves = [x[:, :, rows].contiguous().requires_grad_() for x in inputs[:3]]
        leaves += [x.clone().requires_grad_() for x in inputs[3:]]
        output = function(*leaves)
        gradients = torch.autograd.grad(output, leaves, cotangent[:, :, rows])
        return output.detach(), gradients[0]

    stretches = Stretches(even_stretches(length, dist.get_world_size()), dist.get_rank())
    shared = functools.partial(disentangled_attention_context_parallel, stretches=stretches, sum_table_gradients=False)
    return {
        "alone": lambda: run(deberta_fast.disentangled_attention, slice(None)),
        "gather": lambda: run(shared, mine, 1 << 60),
        "ring": lambda: run(shared, mine, -1),
        "heads": lambda: run(functools.partial(shared, method="heads"), mine),
    }


def stretch(length: int) -> slice:
    stretches = Stretches(even_stretches(length, dist.get_world_size()), dist.get_rank())
    return slice(stretches.start, stretches.stop)


def difference(alone: tuple, shared: tuple, length: int) -> float:
    """The largest difference of this process's rows, relative; of all processes the largest."""
    rows = stretch(length)
    worst = max(float((x[:, :, rows] - y).abs().max() / x.abs().max()) for x, y in zip(alone, shared))
    found = torch.tensor(worst, device=alone[0].device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def medians(calls: dict[str, Callable], seconds: float, device: str) -> dict[str, float]:
    """Median seconds over interleaved rounds; all processes make as many, as they wait for each other."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    spent = torch.zeros((), device=device)
    while len(taken["alone"]) < 3 or float(spent) < seconds:
        for name, call in calls.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            timing.synchronize()
            slowest = torch.tensor(time.perf_counter() - start, device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            taken[name].append(float(slowest))
            spent += slowest
    return {name: statistics.median(times) for name, times in taken.items()}


if __name__ == "__main__":
    main()
