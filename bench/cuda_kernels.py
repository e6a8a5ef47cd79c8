"""Where the CUDA backend spends its time on a GPU, kernel by kernel: ``python -m bench.cuda_kernels``.

    kernels   each kernel of forward and backward, summed over its launches in a call
    variants  the same at length 512 with padding that a mask hides, with packed sequences, and with dropout
    memory    what forward and backward allocate beyond their results
    workspace backward with other limits of its workspace (``limit_near_bytes`` in csrc/cuda/plan.h)
    ncu       Nsight Compute's counters of forward and of each kernel of backward, as text and CSV
    once      forward and backward within cudaProfilerStart and Stop, unmeasured: for tools that run this program

The last three run only if they are named.

Heads of 64, v3's tables, bfloat16. The profiler gives the times of kernels: medians over calls, the second-level cache
overwritten before each. call: the whole call between two events, including the gaps between kernels; others: kernels
and copies in the call that are not the backend's. Results go to bench/results/<GPU>, after every row.
"""

import argparse
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from deberta_fast import backends
from deberta_fast.op.backends import cuda

from . import device as devices
from . import timing
from .attention_gpu import peak_row
from .compile_cuda import find_tool
from .device import Call, Device, Table
from .variants.operator import VARIANTS, Variant, Workload, asked

LENGTHS = {  # by part
    "kernels": (512, 2048, 8192, 128),
    "variants": (512,),
    "memory": (512, 2048, 8192, 128),
    "workspace": (512, 2048, 8192),
    "ncu": (512, 8192),
    "once": (512,),
}
DEFAULT_PARTS = ("kernels", "variants", "memory")
WORKSPACE_MIB = (0, 24, 32, 40, 160)  # 0 is the default: 32, or more where fewer heads would not fill the GPU
PASSES = ("forward", "backward")
SETTINGS = {"": {}, " padding 0.5": {"padding": 0.5}, " dropout 0.1": {"dropout_p": 0.1}}
REPEATS = 15  # calls under the profiler
SECONDS = 0.1  # of calls between events
COUNTED = "(prepare|forward|backward_key|backward_query|by_row)_kernel"
LAUNCHES = 5  # that ncu counts: prepare and forward, and backward's prepare, backward_key and backward_query
SECTIONS = (  # of ncu, those that show what limits a kernel
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables",
    "SchedulerStats", "WarpStateStats", "LaunchStats", "Occupancy",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    device = Device(options.device)
    timing.provenance()
    for part in options.parts:
        globals()[part](options, device, options.lengths or LENGTHS[part])


def kernels(options: argparse.Namespace, device: Device, lengths: tuple[int, ...]) -> None:
    _by_kernel("kernels", {"": {}}, options, device, lengths)


def variants(options: argparse.Namespace, device: Device, lengths: tuple[int, ...]) -> None:
    _by_kernel("variants", SETTINGS, options, device, lengths)


def _by_kernel(
    part: str, settings: dict, options: argparse.Namespace, device: Device, lengths: tuple[int, ...]
) -> None:
    line = "length" if part == "kernels" else "variant"
    table = _table(part, options, lambda rows: _by_pass(rows, line))
    for length in lengths:
        for label, setting in settings.items():
            for row, variant in _ours(options, length, **setting):
                for columns in _of_call(variant, device):
                    table.add(row | {"variant": row["variant"] + label} | columns)


def memory(options: argparse.Namespace, device: Device, lengths: tuple[int, ...]) -> None:
    table = _table("memory", options)
    for length in lengths:
        for row, variant in _ours(options, length):
            for passes in PASSES:
                table.add(row | {"pass": passes} | peak_row(device, variant, passes))


def workspace(options: argparse.Namespace, device: Device, lengths: tuple[int, ...]) -> None:
    """Measures the limits in turn; each is set before its call, untimed."""
    summarise = lambda rows: timing.pivot(
        rows,
        ("length", "batch", "variant"),
        lambda row: f"{row['MiB']} MiB" if row["MiB"] else "default",
        lambda row: timing.cell(row.get("ms")),
    )
    table = _table("workspace", options, summarise)

    def limited(variant: Variant, mib: int) -> Call:
        call = variant.call("backward")
        return Call(call.run, lambda: (cuda.limit_near_bytes(mib << 20), call.reset()))

    for length in lengths:
        for row, variant in _ours(options, length):
            build = {mib: functools.partial(limited, variant, mib) for mib in WORKSPACE_MIB}
            for mib, taken in device.measure(build, SECONDS).items():
                table.add(row | {"MiB": mib} | taken.columns())
    cuda.limit_near_bytes(WORKSPACE_MIB[0] << 20)


def once(options: argparse.Namespace, device: Device, lengths: tuple[int, ...]) -> None:
    profiler = torch.cuda.profiler if device.is_gpu else None
    for length in lengths:
        for _, variant in _ours(options, length, dropout_p=options.dropout, padding=options.padding):
            calls = [variant.call(passes) for passes in PASSES]
            for call in calls:  # the work of first calls
                call.run(), call.reset()
            device.synchronize()
            if profiler:
                profiler.start()
            for call in calls:
                call.run(), call.reset()
            device.synchronize()
            if profiler:
                profiler.stop()


def ncu(options: argparse.Namespace, device: Device, lengths: tuple[int, ...]) -> None:
    """Writes ncu's pages details (text) and raw (CSV) for each length. Prints one line where ncu is absent.

    Raises:
        SystemExit: ncu counted nothing; a line before says why.
    """
    tool = find_tool("ncu")
    if tool is None:
        print("no counters: there is no ncu (PATH, CUDA_HOME, /usr/local/cuda)")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    counting = [word for section in SECTIONS for word in ("--section", section)]
    counting += "--clock-control none --profile-from-start off --launch-count".split() + [str(LAUNCHES)]
    made = []
    for length in lengths:
        report = timing.REPOSITORY / "build" / "ncu" / f"cuda-L{length}.ncu-rep"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.unlink(missing_ok=True)
        shape = [f"--{name}={getattr(options, name)}" for name in ("tokens", "heads", "device")]
        run = [*_itself(), "once", "--lengths", str(length), *shape]
        output = _output([tool, *counting, "--kernel-name", f"regex:^({COUNTED})$", "-f", "-o", report, *run])
        if not report.exists():
            print(f"no counters at length {length}: {_complaint(output)}")
            continue
        made.append(options.out / f"cuda-ncu-L{length}.csv")
        made[-1].write_text(_output([tool, "--import", report, "--page", "raw", "--csv", "--print-units", "base"]))
        made[-1].with_suffix(".txt").write_text(_output([tool, "--import", report, "--page", "details"]))
    if not made:
        raise SystemExit("ncu gave no counters")
    print(f"counters in {', '.join(map(str, made))}, and as text beside")


def per_kernel(events: list[tuple[str, float]], calls: int) -> dict[str, tuple[float, float]]:
    """Returns each kernel's launches and microseconds per call: the median over the calls.

    Args:
        events: names and microseconds of everything that ran on the GPU in ``calls`` calls, in order.
    """
    times: dict[str, list[float]] = {}
    for name, microseconds in events:
        if kernel := _kernel(name):
            times.setdefault(kernel, []).append(microseconds)
    found = {}
    for kernel, all_of_it in times.items():
        count, rest = divmod(len(all_of_it), calls)
        if rest:
            found[kernel] = len(all_of_it) / calls, sum(all_of_it) / calls
        else:
            found[kernel] = count, median(sum(all_of_it[i : i + count]) for i in range(0, len(all_of_it), count))
    return found


def _of_call(variant: Variant, device: Device) -> Iterator[dict]:
    """Yields a row for each kernel, for what is not the backend's, and for the whole call."""
    for passes in PASSES:
        build: Callable[[], Call] = functools.partial(variant.call, passes)
        whole = device.measure({"call": build}, SECONDS)["call"]
        if whole.error is None and device.is_gpu:
            try:
                yield from ({"pass": passes} | row for row in _profiled(build(), device))
            except Exception as error:  # profiling may not be allowed
                yield {"pass": passes, "kernel": "all", "error": device.failure(error).error}
        yield {"pass": passes, "kernel": "call", "launches": None, "share %": None} | whole.columns()


def _profiled(call: Call, device: Device) -> Iterator[dict]:
    run = functools.partial(device.seconds, call, queued=True)
    _events(device, run, 1)  # the profiler initialises itself
    found = per_kernel(_events(device, run, REPEATS), REPEATS)
    total = sum(microseconds for _, microseconds in found.values())
    for kernel, (launches, microseconds) in sorted(found.items(), key=lambda item: -item[1][1]):
        share = 100 * microseconds / total
        yield {"kernel": kernel, "launches": launches, "share %": share, "ms": microseconds / 1000}
    call.reset()
    others = [microseconds for name, microseconds in _events(device, call.run, 1) if not _kernel(name)]
    error = None if found else "the profiler saw no kernels of the backend"
    yield {"kernel": "others", "launches": len(others), "share %": None, "ms": sum(others) / 1000, "error": error}


def _events(device: Device, run: Callable[[], object], times: int) -> list[tuple[str, float]]:
    """Returns name and microseconds of everything that ran on the GPU, in order."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(times):
            run()
        device.synchronize()
    on_gpu = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    on_gpu.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us()) for event in on_gpu]


def _kernel(name: str) -> str | None:
    """Returns the short name of a kernel of the backend, mangled or not, and None for others."""
    match = re.search(r"deberta_fast.*?([a-z_]+_kernel)", name)
    return match and match[1].strip("_")


def _ours(options: argparse.Namespace, length: int, **setting: float) -> Iterator[tuple[dict, Variant]]:
    """Yields the CUDA backend's variants of a workload, each with the first columns of its row."""
    workload = Workload(length, max(1, options.tokens // length), options.heads, device=options.device, **setting)
    if reasons := backends.BACKENDS["cuda"].why_not(asked(workload)):
        raise SystemExit(f"the CUDA backend cannot serve this call: {', '.join(reasons)}")
    for name, entry in VARIANTS.items():
        if name.startswith("cuda") and entry.suits(workload):
            yield {"length": length, "batch": workload.batch, "variant": name}, entry.build(workload)


def _table(part: str, options: argparse.Namespace, summarise: Callable[[list[dict]], str] = lambda rows: "") -> Table:
    notes = "\n\n".join(__doc__.split("\n\n")[1:])
    return Table(f"cuda-{part}", options.out, f"{options.tokens} tokens, {options.heads} heads.\n\n{notes}", summarise)


def _by_pass(rows: list[dict], line: str) -> str:
    """Makes a table for each pass with the kernels across: milliseconds and shares."""

    def cell(row: dict) -> str:
        if "ms" not in row:
            return "failed"
        return f"{row['ms']:.3g}" + (f" ({row['share %']:.0f} %)" if "share %" in row else "")

    parts = []
    for passes in PASSES:
        chosen = [row for row in rows if row["pass"] == passes]
        parts += [f"## {passes}", timing.pivot(chosen, (line,), lambda row: row["kernel"], cell)] if chosen else []
    return "\n\n".join(parts)


def _itself() -> list[str]:
    """Returns the command that runs this module, in a dry run too."""
    name = "bench.cuda_kernels"
    words = sys.orig_argv[1:]
    return [sys.executable, *(words[: words.index(name) + 1] if name in words else ("-m", name))]


def _output(command: list) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=timing.REPOSITORY)
    return done.stdout


def _complaint(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "==ERROR==" in line or "No kernels" in line]
    return (errors or lines[-1:] or ["ncu prints nothing"])[0].strip()


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = devices.parser("cuda_kernels", __doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(LENGTHS)}; by default the first 3")
    parser.add_argument("--heads", type=int, default=12, metavar="H")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="for once")
    parser.add_argument("--padding", type=float, default=0.0, metavar="F", help="share of the tokens, for once")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(LENGTHS):
        parser.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(LENGTHS)}")
    options.parts = options.parts or DEFAULT_PARTS
    return options


if __name__ == "__main__":
    main()
