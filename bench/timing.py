"""Tools that all benchmarks share: interleaved times, peak memory, provenance, tables and options."""

import argparse
import ctypes
import functools
import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
MIB = 1 << 20
CPUINFO = Path("/proc/cpuinfo")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")  # what decides the speed of products
# Variables that make libraries use fewer instructions or threads than the processor has.
LIMITS = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
)


def interleaved(variants: dict[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Times the variants in turn (A B A B), so that a change of the machine's speed affects all of them.

    Returns:
        For each variant the seconds of ``repeats`` calls, without the ``warmup`` first rounds.
    """
    seconds = {name: [] for name in variants}
    for _ in range(warmup + repeats):
        for name, run in variants.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[warmup:] for name, times in seconds.items()}


def rounds(variants: dict[str, Callable[[], object]], seconds: float, fewest: int = 5, most: int = 100) -> dict:
    """Returns the seconds of each variant in as many interleaved rounds as fit into about ``seconds``."""
    round_trip = sum(times[0] for times in interleaved(variants, repeats=1, warmup=1).values())
    return interleaved(variants, max(fewest, min(most, int(seconds / round_trip))), warmup=0)


def medians(variants: dict[str, Callable[[], object]], seconds: float, fewest: int = 5, most: int = 100) -> dict:
    """Returns the median of the ``rounds`` of each variant."""
    return {name: median(times) for name, times in rounds(variants, seconds, fewest, most).items()}


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory(build: Callable[..., list[Callable[[], object]]], *arguments, device: str = "cpu") -> list[int]:
    """Measures the peak bytes that calls need above those in use before them, in a fresh process.

    On a GPU this is the memory that torch allocates. On a CPU it is resident memory. Only Linux can reset the peak of
    resident memory; elsewhere the result is the growth of the process's lifetime peak, a lower bound.

    Args:
        build: an importable function, because it is pickled by name. The new process calls it with ``arguments``. It
            builds everything and runs it once at a tiny size, so that the initialisation of libraries does not count.
            It returns the calls to measure, smallest first.
        device: where the calls run.

    Returns:
        The bytes of each call.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        process.submit(torch.set_num_threads, torch.get_num_threads())
        return process.submit(_peaks, build, arguments, device).result()


def _peaks(build: Callable, arguments: tuple, device: str) -> list[int]:
    return [peak_of_call(run, device) for run in build(*arguments)]


def peak_of_call(run: Callable[[], object], device: str) -> int:
    """Measures the peak bytes that one call needs above those in use. On a CPU a fresh process is best."""
    memory = Memory(device)
    run()
    return memory.peak()


class Memory:
    """Counts bytes above those in use when it is made: torch's on a GPU, resident ones on a CPU (see peak_memory)."""

    def __init__(self, device: str):
        self._is_gpu = torch.device(device).type == "cuda"
        _return_free_memory()
        self._has_own_peak = self._is_gpu or _resets_peak()
        if self._is_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._start = self._in_use() if self._has_own_peak else _lifetime_peak()

    def now(self) -> int | None:
        """Returns None where the system does not tell."""
        _return_free_memory()
        return self._in_use() - self._start if self._has_own_peak else None

    def peak(self) -> int:
        if self._is_gpu:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self._start
        peak = bytes_in("/proc/self/status", "VmHWM") if self._has_own_peak else _lifetime_peak()
        return peak - self._start

    def _in_use(self) -> int:
        return torch.cuda.memory_allocated() if self._is_gpu else bytes_in("/proc/self/status", "VmRSS")


def _resets_peak() -> bool:
    """Makes the present resident size the new peak, and tells whether the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _return_free_memory() -> None:
    # malloc keeps freed memory. A call that reuses it would not raise the resident size.
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # not glibc


def free_memory() -> int:
    """Returns the bytes of main memory that are free."""
    if Path("/proc/meminfo").exists():
        return bytes_in("/proc/meminfo", "MemAvailable")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def bytes_in(path: str, field: str) -> int:
    """Reads a line "field: N kB" of a file in /proc."""
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def _lifetime_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


@functools.cache
def arithmetic() -> dict[str, str]:
    """Says what computes on the CPU: processor, instructions, libraries in torch, this package's kernels, limits set.

    Only Linux lists instructions. bench/cpu.sh asks oneDNN which kernels it takes.
    """
    from deberta_fast.selfcheck import processor

    listed = re.search(r"^flags\s*:(.*)$", CPUINFO.read_text() if CPUINFO.exists() else "", re.MULTILINE)
    flags = listed[1].split() if listed else []
    has = [f"{name} {'yes' if name in flags else 'no'}" for name in INSTRUCTIONS]
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    return {
        "cpu": processor(),
        "instructions": ", ".join(has) if flags else "not known",
        "torch computes with": ", ".join([torch.backends.cpu.get_cpu_capability(), _mkl(), _onednn()]),
        "deberta_fast computes with": _own(),
        **({"limits": ", ".join(limits)} if limits else {}),
    }


def _own() -> str:
    from deberta_fast.op.backends import cpu

    names = [cpu.instruction_set(dtype) for dtype in (torch.float32, torch.bfloat16)]
    return "no compiled kernels" if cpu.NOT_LOADED else f"{names[0]}, bfloat16 with {names[1]}"


def _mkl() -> str:
    return f"MKL {_built_with('Math Kernel Library Version')}" if torch.backends.mkl.is_available() else "no MKL"


def _onednn() -> str:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "no oneDNN"
    products = "bfloat16 too" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "not for bfloat16"
    return f"oneDNN {_built_with('MKL-DNN')} ({products})"


def _built_with(library: str) -> str:
    found = re.search(rf"{library} v?([\d.]+)", torch.__config__.show())
    return found[1] if found else "of a version not known"


@functools.cache
def provenance() -> dict[str, str | int | None]:
    """Records command, commit, machine and versions. Call it before the process writes files."""
    import deberta_fast

    gpu = torch.cuda.is_available()
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": _commit(),
        **arithmetic(),
        "cores": os.cpu_count(),
        "load at the start": f"{os.getloadavg()[0]:.1f}",
        "torch threads": torch.get_num_threads(),
        "os": platform.platform(),
        "python": platform.python_version(),
        **({"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} | _gpu_state() if gpu else {}),
        **{package: version(package) for package in ("torch", "transformers", "triton")},
        "deberta_fast": deberta_fast.__version__,
    }


def _gpu_state() -> dict[str, str]:
    """Returns driver, clock and power limit from nvidia-smi, or nothing if it fails."""
    asked = {"driver": "driver_version", "gpu clock": "clocks.max.sm", "power limit": "power.limit"}
    command = ["nvidia-smi", f"--query-gpu={','.join(asked.values())}", "--format=csv,noheader"]
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    command += [] if uuid is None else [f"--id=GPU-{uuid}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        return dict(zip(asked, answer.strip().split(", "), strict=True))
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed(*packages: str) -> str:
    """Names the versions of packages for the notes of a table."""
    return "".join(f" {name}: {version(name) or 'not installed'}." for name in packages)


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!bench/results")  # earlier results do not count
        return git("rev-parse", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT")  # in a copy of the working tree without .git


def results_folder() -> Path:
    """Returns bench/results/<name of the GPU>, or bench/results/cpu."""
    name = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    return REPOSITORY / "bench" / "results" / name


def machine() -> str:
    """Names in one line what the figures are from: the GPU, or what computes on the CPU and how busy it was before."""
    known = provenance()
    if "gpu" in known:
        return f"On {known['gpu']}."
    words = [f"On {known['cpu']}, {known['cores']} cores, load {known['load at the start']} at the start"]
    words += [f"{key}: {known[key]}" for key in arithmetic() if key != "cpu"]
    return "; ".join(words) + "."


def folder_of_processor() -> Path:
    """Returns bench/results/cpu-<name, family and model of the processor>."""
    name = re.sub(r"\W+", "-", str(arithmetic()["cpu"]).replace("(R)", "").lower()).strip("-")
    return REPOSITORY / "bench" / "results" / f"cpu-{name}"


def save(name: str, rows: list[dict], folder: Path, notes: str = "", summary: str = "") -> None:
    """Writes ``rows`` and their provenance to ``folder``: name.md, and name.json, which bench.plots reads.

    Call it after every row, so that a run that is stopped keeps what it measured. Git keeps only name.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {"provenance": provenance(), "notes": notes, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    origin = "\n".join(f"- {key}: {value}" for key, value in provenance().items() if value is not None)
    text = [f"# {name}", machine(), notes, summary, markdown(rows), origin]
    (folder / f"{name}.md").write_text("\n\n".join(part for part in text if part) + "\n")


def markdown(rows: list[dict]) -> str:
    """Makes a Markdown table whose columns are also aligned as plain text."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [heads, *([cell(row.get(head)) for head in heads] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)


def pivot(rows: list[dict], heads: tuple[str, ...], column: Callable[[dict], str], cell: Callable[[dict], str]) -> str:
    """Makes a Markdown table with a line for each combination of values in the columns ``heads``.

    Args:
        column, cell: for a row, the head of the column that it fills in this line, and the text there.
    """
    lines: dict[tuple, dict] = {}
    for row in rows:
        line = {head: row[head] for head in heads if head in row}
        lines.setdefault(tuple(line.values()), line)[column(row)] = cell(row)
    return markdown(list(lines.values()))


def cell(value: object) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    if abs(value) < 0.1:
        return f"{value:.3f}"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Makes a parser of the options that all benchmarks on the CPU have; ``complete`` adds their defaults."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="take a short look; results go to build/bench")
    parser.add_argument("--seconds", type=float, help="aim at this time per row, or per variant and row")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    return parser


def positive(text: str) -> int:
    """Converts the value of an option, which must be an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return int(text)


def complete(options: argparse.Namespace, whole: dict, quick: dict) -> argparse.Namespace:
    """Sets the options that are None: with --quick to those in ``quick``, otherwise to those in ``whole``."""
    usual = {"out": REPOSITORY / "bench" / "results" / "cpu"}
    short = {"seconds": 0.5, "out": Path("build/bench")} | quick
    for name, value in (whole | short if options.quick else usual | whole).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


Case = TypeVar("Case")


def in_time(seconds: float, cases: Iterable[Case], describe: Callable[[Case], str]) -> Iterator[Case]:
    """Yields cases until ``seconds`` have passed, then prints the first case that is left out."""
    start = time.perf_counter()
    for case in cases:
        if time.perf_counter() - start > seconds:
            print(f"out of time before {describe(case)}", flush=True)
            return
        yield case
