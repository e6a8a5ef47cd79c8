"""Where the CUDA backend spends its time on a GPU, kernel by kernel: ``python -m bench.cuda_kernels``.

    kernels   each kernel of forward and backward, all its launches of a call together
    variants  the same at length 512 with padding that a mask hides, with packed sequences, and with dropout
    memory    what forward and backward allocate beyond their results
    workspace backward with other limits of what it holds at once (``limit_near_bytes`` in csrc/cuda/plan.h)
    ncu       what limits forward and each kernel of backward, as Nsight Compute counts it
    once      forward and backward within cudaProfilerStart and Stop, nothing measured: for tools from outside

The last three only where they are named.

Heads of 64, v3's tables, bfloat16. Times of kernels are the profiler's: medians over calls, the second-level cache
overwritten before each. call: the whole call between two events, what lies between kernels included; others: kernels
and copies in it that are not the backend's. Results go to bench/results/ and the GPU's name, after every row.
"""

import argparse
import csv
import functools
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from deberta_fast import backends
from deberta_fast.op.backends import cuda

from . import timing
from .attention_gpu import peak_row
from .device import Call, Device, Table
from .variants.operator import VARIANTS, Variant, Workload, asked

PARTS = {"kernels": (512, 2048, 8192, 128), "variants": (512,), "memory": (512, 2048, 8192, 128)}
NAMED = {"workspace": (512, 2048, 8192), "ncu": (512, 8192), "once": (512,)}  # only where asked for
WORKSPACE_MIB = (160, 24, 32, 40)  # the first is the default
PASSES = ("forward", "backward")
SETTINGS = {"": {}, " padding 0.5": {"padding": 0.5}, " dropout 0.1": {"dropout_p": 0.1}}
REPEATS = 15
SECONDS = 0.1  # for the events
COUNTED = "(forward|delta|backward_key|backward_query|by_distance|by_row)_kernel"
LAUNCHES = 8  # that ncu looks at: forward, and backward's for the first heads, by_distance and by_row twice
SECTIONS = (  # of ncu, those that say what limits
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables",
    "SchedulerStats", "WarpStateStats", "LaunchStats", "Occupancy",
)  # fmt: skip
# Metrics of these, in the order of the report. Names differ between GPUs: who has none of a line has no row.
METRICS = (
    r"gpu__time_duration\.sum",
    r"sm__throughput\.avg\.pct_of_peak_sustained_elapsed",
    r"sm__(inst_executed_)?pipe_tensor\w*\.avg\.pct_of_peak_sustained_active",
    r"sm__inst_executed_pipe_(alu|fma\w*|fp16|xu|lsu|uniform)\.avg\.pct_of_peak_sustained_active",
    r"smsp?__(inst_issued|inst_executed|issue_active)\.avg\.(pct_of_peak_sustained_active|per_cycle_active)",
    r"smsp?__inst_executed\.sum",
    r"smsp__average_warps?_(latency_)?issue_stalled_\w+(?<!not_issued)_per_(issue_active|warp_active)\.\w+",
    r"l1tex__data_bank_conflicts_pipe_lsu_mem_shared\w*\.sum",
    r"l1tex__data_pipe_lsu_wavefronts(_mem_shared\w*)?\.(sum|avg\.pct_of_peak_sustained_elapsed)",
    r"(derived__)?(memory_l1_wavefronts_shared|smsp__sass_l1tex_data_pipe_lsu_wavefronts_mem_shared)\w*(\.sum)?",
    r"(l1tex__t|lts__t)_sector_hit_rate\.pct",
    r"lts__throughput\.avg\.pct_of_peak_sustained_elapsed",
    r"dram__(bytes_read|bytes_write)\.sum",
    r"(gpu__dram|dram__)_?throughput\.avg\.pct_of_peak_sustained_elapsed",
    r"(smsp__|sass__)\w*(local|spill)\w*(\.sum)?",
    r"sm__warps_active\.avg\.pct_of_peak_sustained_active",
    r"sm__maximum_warps_per_active_cycle_pct",
    r"launch__(grid_size|block_size|registers_per_thread|shared_mem_per_block_dynamic|waves_per_multiprocessor)",
    r"launch__occupancy_limit_(blocks|registers|shared_mem|warps)",
)


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    device = Device(options.device)
    timing.provenance()
    for part in options.parts:
        globals()[part](options, device, options.lengths or (PARTS | NAMED)[part])


def kernels(options: argparse.Namespace, device: Device, lengths: tuple[int, ...]) -> None:
    table = _table("kernels", options, lambda rows: _by_pass(rows, "length"))
    for length in lengths:
        workload, found = _ours(options, length)
        for name, variant in found.items():
            for row in _of_call(variant, device, options.repeats):
                table.add({"length": length, "batch": workload.batch, "variant": name} | row)


def variants(options: argparse.Namespace, device: Device, lengths: tuple[int, ...]) -> None:
    table = _table("variants", options, lambda rows: _by_pass(rows, "variant"))
    for length in lengths:
        for label, setting in SETTINGS.items():
            workload, found = _ours(options, length, **setting)
            for name, variant in found.items():
                for row in _of_call(variant, device, options.repeats):
                    table.add({"length": length, "batch": workload.batch, "variant": name + label} | row)


def memory(options: argparse.Namespace, device: Device, lengths: tuple[int, ...]) -> None:
    table = _table("memory", options)
    for length in lengths:
        workload, found = _ours(options, length)
        for name, variant in found.items():
            for passes in PASSES:
                row = {"length": length, "batch": workload.batch, "variant": name, "pass": passes}
                table.add(row | peak_row(device, variant, passes))


def workspace(options: argparse.Namespace, device: Device, lengths: tuple[int, ...]) -> None:
    """In turn: the limit is set before each call, untimed."""
    summarise = lambda rows: timing.pivot(
        rows, ("length", "batch", "variant"), lambda row: f"{row['MiB']} MiB", lambda row: timing.cell(row.get("ms"))
    )
    table = _table("workspace", options, summarise)

    def limited(variant: Variant, mib: int) -> Call:
        call = variant.call("backward")
        return Call(call.run, lambda: (cuda.limit_near_bytes(mib << 20), call.reset()))

    for length in lengths:
        workload, found = _ours(options, length)
        for name, variant in found.items():
            build = {mib: functools.partial(limited, variant, mib) for mib in WORKSPACE_MIB}
            for mib, taken in device.measure(build, SECONDS).items():
                row = {"length": length, "batch": workload.batch, "variant": name, "MiB": mib}
                table.add(row | {"ms": taken.seconds and 1000 * taken.seconds, "error": taken.error})
    cuda.limit_near_bytes(WORKSPACE_MIB[0] << 20)


def once(options: argparse.Namespace, device: Device, lengths: tuple[int, ...]) -> None:
    profiler = torch.cuda.profiler if device.is_gpu else None
    for length in lengths:
        for variant in _ours(options, length, dropout_p=options.dropout, padding=options.padding)[1].values():
            calls = [variant.call(passes) for passes in PASSES]
            for call in calls:  # what the first call does once
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
    """Where it is absent, one line says so.

    Raises:
        SystemExit: it counts nothing; the line says why.
    """
    tool = find_tool("ncu")
    if tool is None:
        print("no counters: there is no ncu (PATH, CUDA_HOME, /usr/local/cuda)")
        return
    table, made = _table("ncu", options, _by_metric), 0
    options.out.mkdir(parents=True, exist_ok=True)
    for length in lengths:
        report = timing.REPOSITORY / "build" / "ncu" / f"cuda-L{length}.ncu-rep"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.unlink(missing_ok=True)
        counting = [word for section in SECTIONS for word in ("--section", section)]
        counting += "--clock-control none --profile-from-start off --launch-count".split() + [str(LAUNCHES)]
        shape = [f"--{name}={getattr(options, name)}" for name in ("tokens", "heads", "device")]
        run = [*_itself(), "once", "--lengths", str(length), *shape]
        command = [tool, *counting, "--kernel-name", f"regex:^({COUNTED})$", "-f", "-o", report, *run]
        output = _output(command)
        if not report.exists():
            print(f"no counters at length {length}: {_complaint(output)}")
            continue
        (options.out / f"cuda-ncu-L{length}.txt").write_text(_output([tool, "--import", report, "--page", "details"]))
        rows = read_metrics(_output([tool, "--import", report, "--page", "raw", "--csv", "--print-units", "base"]))
        if rows:
            table.add(*({"length": length} | row for row in rows))
        made += len(rows)
    if not made:
        raise SystemExit("ncu gave no counters")
    print(f"{made} figures of ncu in {options.out}/cuda-ncu.md, all of it in cuda-ncu-L*.txt")


def per_kernel(events: list[tuple[str, float]], calls: int) -> dict[str, tuple[float, float]]:
    """Launches of a call and its microseconds, by kernel of the backend: the median of the calls' sums.

    Args:
        events: names and microseconds of all that ran on the GPU in so many calls, in order.
    """
    times: dict[str, list[float]] = {}
    for name, microseconds in events:
        if kernel := _kernel(name):
            times.setdefault(kernel, []).append(microseconds)
    found = {}
    for kernel, all_of_it in times.items():
        count, rest = divmod(len(all_of_it), calls)
        sums = [sum(all_of_it[i : i + count]) for i in range(0, len(all_of_it), count)] if not rest else []
        found[kernel] = len(all_of_it) / calls, median(sums) if sums else sum(all_of_it) / calls
    return found


def read_metrics(text: str) -> list[dict]:
    """Rows of the wanted metrics, out of ncu's raw page as CSV."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return []
    heads, units, *launches = csv.reader(io.StringIO("\n".join(lines)))
    rows, seen = [], {}
    for values in launches:
        cells = dict(zip(heads, values))
        kernel = _kernel(f"deberta_fast {cells.get('Kernel Name', '')}") or "unknown"
        seen[kernel] = seen.get(kernel, 0) + 1
        for pattern in METRICS:
            for head, unit in zip(heads, units):
                if re.fullmatch(pattern, head) and (value := _number(cells[head])) is not None:
                    if value or "stalled" not in head:
                        rows.append(
                            {"kernel": kernel, "launch": seen[kernel], "metric": head, "value": value, "unit": unit}
                        )
    return rows


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(places))


def _of_call(variant: Variant, device: Device, repeats: int) -> Iterator[dict]:
    """Rows of each kernel, of what is not the backend's, and of the whole call."""
    for passes in PASSES:
        build: Callable[[], Call] = functools.partial(variant.call, passes)
        whole = device.measure({"call": build}, SECONDS)["call"]
        if whole.error is None and device.is_gpu:
            try:
                yield from ({"pass": passes} | row for row in _profiled(build(), device, repeats))
            except Exception as error:  # a profiler that may not, or cannot
                yield {
                    "pass": passes,
                    "kernel": "all",
                    "error": f"{type(error).__name__}: {error}".splitlines()[0][:90],
                }
        ms = whole.seconds and 1000 * whole.seconds
        yield {"pass": passes, "kernel": "call", "launches": None, "ms": ms, "share %": None, "error": whole.error}


def _profiled(call: Call, device: Device, repeats: int) -> Iterator[dict]:
    run = functools.partial(device.seconds, call, queued=True)
    _events(device, run, 1)  # the profiler's own first steps
    found = per_kernel(_events(device, run, repeats), repeats)
    total = sum(microseconds for _, microseconds in found.values())
    for kernel, (launches, microseconds) in sorted(found.items(), key=lambda item: -item[1][1]):
        launches = launches if launches % 1 else int(launches)
        yield {
            "kernel": kernel, "launches": launches, "ms": microseconds / 1000, "share %": 100 * microseconds / total
        }  # fmt: skip
    call.reset()
    others = [microseconds for name, microseconds in _events(device, call.run, 1) if not _kernel(name)]
    error = None if found else "the profiler saw no kernels of the backend"
    yield {"kernel": "others", "launches": len(others), "ms": sum(others) / 1000, "share %": None, "error": error}


def _events(device: Device, run: Callable[[], object], times: int) -> list[tuple[str, float]]:
    """Name and microseconds of everything that ran on the GPU, in order."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(times):
            run()
        device.synchronize()
    on_gpu = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    on_gpu.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us()) for event in on_gpu]


def _kernel(name: str) -> str | None:
    """A kernel's own name, if it is the backend's; mangled ones too."""
    match = re.search(r"deberta_fast.*?([a-z_]+_kernel)", name)
    return match and match[1].strip("_")


def _ours(options: argparse.Namespace, length: int, **setting: float) -> tuple[Workload, dict[str, Variant]]:
    """The CUDA backend's variants of a workload."""
    shape = {"length": length, "batch": max(1, options.tokens // length), "heads": options.heads}
    setting = {"dropout_p": 0.0, "padding": 0.0} | setting
    workload = Workload(**shape, dtype=torch.bfloat16, device=options.device, **setting)
    if reasons := backends.BACKENDS["cuda"].why_not(asked(workload)):
        raise SystemExit(f"the CUDA backend cannot serve this call: {', '.join(reasons)}")
    found = {name: entry for name, entry in VARIANTS.items() if name.startswith("cuda") and entry.suits(workload)}
    return workload, {name: entry.build(workload) for name, entry in found.items()}


def _table(part: str, options: argparse.Namespace, summarise: Callable[[list[dict]], str] = lambda rows: "") -> Table:
    notes = "\n\n".join(__doc__.split("\n\n")[1:])
    return Table(f"cuda-{part}", options.out, f"{options.tokens} tokens, {options.heads} heads.\n\n{notes}", summarise)


def _by_pass(rows: list[dict], line: str) -> str:
    """For each pass, kernels across: milliseconds and shares."""

    def cell(row: dict) -> str:
        if "ms" not in row:
            return "failed"
        return f"{row['ms']:.3g}" + (f" ({row['share %']:.0f} %)" if "share %" in row else "")

    parts = []
    for passes in PASSES:
        chosen = [row for row in rows if row["pass"] == passes]
        parts += [f"## {passes}", timing.pivot(chosen, (line,), lambda row: row["kernel"], cell)] if chosen else []
    return "\n\n".join(parts)


def _by_metric(rows: list[dict]) -> str:
    column = lambda row: f"{row['kernel']} {row['launch']}, L={row['length']}"
    return timing.pivot(rows, ("metric",), column, lambda row: f"{row['value']:.6g} {row['unit']}")


def _itself() -> list[str]:
    """The command that runs this module, in a dry run too."""
    name = "bench.cuda_kernels"
    words = sys.orig_argv[1:]
    return [sys.executable, *(words[: words.index(name) + 1] if name in words else ("-m", name))]


def _output(command: list) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=timing.REPOSITORY)
    return done.stdout


def _complaint(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "==ERROR==" in line or "No kernels" in line]
    return (errors or lines[-1:] or ["ncu says nothing"])[0].strip()


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_kernels", description=__doc__.split("\n\n")[0])
    every = [*PARTS, *NAMED]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(every)}; by default the first 3")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="L", help="in this order")
    parser.add_argument("--tokens", type=int, default=16384, metavar="N")
    parser.add_argument("--heads", type=int, default=12, metavar="H")
    parser.add_argument("--repeats", type=int, default=REPEATS, metavar="N", help="calls under the profiler")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="of once")
    parser.add_argument("--padding", type=float, default=0.0, metavar="F", help="of once: share of the tokens")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=timing.results_folder(), metavar="DIR", help="folder of results")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(every):
        parser.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(every)}")
    options.parts = options.parts or list(PARTS)
    return options


if __name__ == "__main__":
    main()
