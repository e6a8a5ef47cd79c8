"""The tools of every benchmark: interleaved times, peak memory, the provenance of figures, and tables of them."""

import argparse
import ctypes
import functools
import importlib.metadata
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
MIB = 1 << 20


def interleaved(variants: dict[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Times the variants in turn (A B A B), so that a drift of the machine affects all alike.

    Returns:
        For each variant the seconds of ``repeats`` calls, without the ``warmup`` first rounds.
    """
    seconds = {name: [] for name in variants}
    for _ in range(warmup + repeats):
        for name, run in variants.items():
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[warmup:] for name, times in seconds.items()}


def medians(variants: dict[str, Callable[[], object]], seconds: float, fewest: int = 5, most: int = 100) -> dict:
    """Returns the median seconds of each variant over as many interleaved rounds as fit into about ``seconds``."""
    round_trip = sum(times[0] for times in interleaved(variants, repeats=1, warmup=1).values())
    repeats = max(fewest, min(most, int(seconds / round_trip)))
    return {name: median(times) for name, times in interleaved(variants, repeats, warmup=0).items()}


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory(build: Callable[..., list[Callable[[], object]]], *arguments, device: str = "cpu") -> list[int]:
    """Measures the peak bytes that calls need above those in use before them, in a fresh process.

    On the CPU this is resident memory. Only Linux can reset its peak; elsewhere the peak of the process's whole life
    takes its place, which hides what a call needs below the peak of ``build``: a lower bound. On a GPU it is what torch
    allocates.

    Args:
        build: an importable function (it is pickled by name), called in the process with ``arguments``. It builds
            everything, runs it once at a tiny size, so that the initialisation of libraries does not count, and returns
            the calls to measure, smallest first.
        device: where they run.

    Returns:
        The bytes of each call.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_peaks, build, arguments, device, torch.get_num_threads()).result()


def _peaks(build: Callable, arguments: tuple, device: str, threads: int) -> list[int]:
    torch.set_num_threads(threads)
    return [peak_of_call(run, device) for run in build(*arguments)]


def peak_of_call(run: Callable[[], object], device: str) -> int:
    """Measures the peak bytes that one call needs. On a CPU, a process that did little before is more accurate."""
    return (_peak_allocated if torch.device(device).type == "cuda" else _peak_resident)(run)


def _peak_allocated(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - start


def _peak_resident(run: Callable[[], object]) -> int:
    _return_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # makes the present size the new peak
        start, lifetime = _status("VmRSS"), None
    except OSError:
        start, lifetime = 0, _lifetime_peak()
    run()
    return _status("VmHWM") - start if lifetime is None else _lifetime_peak() - lifetime


def _return_free_memory() -> None:
    # A call could reuse heap that malloc kept after an earlier call, which would not show.
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # not glibc


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def _lifetime_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


@functools.cache
def provenance() -> dict[str, str | int | None]:
    """Records what is needed to trust and repeat a figure. Call it before the process writes anything."""
    import deberta_fast
    from deberta_fast.selfcheck import processor

    record = {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": _commit(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "os": platform.platform(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_name()
        record["cuda"] = torch.version.cuda
        record |= _gpu_state()
    for package in ("torch", "transformers", "triton"):
        record[package] = version(package)
    return record | {"deberta_fast": deberta_fast.__version__}


def _gpu_state() -> dict[str, str]:
    """Asks nvidia-smi for driver, clock and power limit. Empty if it does not answer."""
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


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Results do not change what is measured.
        changed = git("status", "--porcelain", "--", ".", ":!bench/results")
        return git("rev-parse", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT")  # in a copy of the working tree without .git


def results_folder() -> Path:
    """Returns bench/results/<name of the GPU>, or bench/results/cpu."""
    kind = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    return REPOSITORY / "bench" / "results" / kind


def save(name: str, rows: list[dict], folder: Path, notes: str = "", summary: str = "") -> None:
    """Writes ``rows`` and their provenance to ``folder``: name.md, and name.json, which bench.plots reads.

    Call it after every row, so that a run that is stopped keeps what it measured. Git keeps only name.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {"provenance": provenance(), "notes": notes, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    origin = "\n".join(f"- {key}: {value}" for key, value in provenance().items() if value is not None)
    text = [f"# {name}", notes, summary, markdown(rows), origin]
    (folder / f"{name}.md").write_text("\n\n".join(part for part in text if part) + "\n")


def fill(jobs: list[tuple[str, str, Callable[[], list[dict]]]], notes: dict[str, str], folder: Path) -> None:
    """Fills tables row by row, saves and prints them.

    Args:
        jobs: the name of a table, a description for the progress bar, and a function that makes rows.
        notes: by table.
    """
    from tqdm import tqdm

    provenance()
    tables: dict[str, list[dict]] = {}
    with tqdm(jobs, unit="row") as progress:
        for name, saying, make in progress:
            progress.set_description(saying)
            tables.setdefault(name, []).extend(make())
            save(name, tables[name], folder, notes[name])
    for name, rows in tables.items():
        print(f"\n{name}: {notes[name]}\n\n{markdown(rows)}")
    print(f"\nWritten to {folder}")


def markdown(rows: list[dict]) -> str:
    """Makes a Markdown table whose columns are aligned as plain text too."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [heads, *([cell(row.get(head)) for head in heads] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)


def pivot(rows: list[dict], heads: tuple[str, ...], column: Callable[[dict], str], cell: Callable[[dict], str]) -> str:
    """Makes a Markdown table with one line for all rows that agree in the columns ``heads``, their cells across."""
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


def cpu_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks on the CPU have."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="take a short look; results go to build/bench")
    parser.add_argument("--seconds", type=float, help="aim at this time per row; never fewer than 5 rounds")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None, whole: dict, quick: dict) -> argparse.Namespace:
    """Parses ``arguments``. Options that are not given come from ``quick`` with --quick, otherwise from ``whole``."""
    options = parser.parse_args(arguments)
    quick = {"seconds": 0.5, "out": Path("build/bench")} | quick
    whole = {"out": REPOSITORY / "bench" / "results" / "cpu"} | whole
    for name, value in (quick if options.quick else whole).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options
