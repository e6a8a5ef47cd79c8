"""Compiles the CUDA kernels for GPUs that need not be there, and tells what ptxas made of them.

Needs nvcc, and ``nvdisasm`` of the toolkit or of the triton package. Shared memory and shapes are what the host code
says, compiled for the emulator of the tests. Results are kept in build/, by the contents of all that they depend on.
"""

import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from . import sass

REPOSITORY = Path(__file__).resolve().parent.parent
EMULATOR = REPOSITORY / "tests" / "emulator"
CUDA_FALLBACK = "/usr/local/cuda/bin"
# setup.py's, and line numbers, which leave the code as it is.
FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xptxas=-v"]
PTX = {80: 80, 86: 80, 89: 80, 90: 80, 100: 100, 120: 100}  # by capability, what setup.py makes the binary from
CAPABILITIES = (80, 90, 100)

# Code that a common iteration does without: from a line that contains one of these on, up to the end of the block that
# it opens, but for the condition of an ``if``, or else of the block that it is in. Common are a call without a mask and
# with both position terms, head sizes that need no padding, and a tile that is neither the first nor the last of its
# segment.
RARE = (
    "for (; tile < end; tile += 32) {",  # looks for a tile that is not masked as a whole
    "if (call.visible != nullptr) {",  # reads the mask
    "const uint64_t wanted = ",  # copies rows that may not be there
    "void hide(",  # keys that are masked or do not exist
    "write(-kDistances);",  # begins the band by rows
    "if (c2p && tile != expected) {",  # begins the band of gradients
    "if (ballot(rises) != 0) {",  # moves row_max, which later scores seldom pass by 2^8
)


class Shape(NamedTuple):
    rows: int  # of a tile of scores
    columns: int
    warps: int


# How often a warp passes a loop inside another one, on average, by what its statement matches. Loops without products
# on tensor cores are passed once.
TRIPS: dict[str, Callable[[Shape], float]] = {
    # Of the band by columns: blocks of 32 columns by 32 distances, shared among the warps.
    r"for \(int item = .*blocks; item \+= ": lambda s: s.columns / 32 * (s.rows / 32 + 1) / s.warps,
    r"for \(int step = 0; step < 4; ": lambda s: 4,
}


class Loop(NamedTuple):
    """A loop that makes products on tensor cores, itself or in a loop of TRIPS; or an innermost one, without such."""

    place: str  # file and line of the statement
    origin: str  # of the line of the kernel from where it was reached: tells copies of a loop apart
    instructions: int  # in the machine code
    executed: (
        float | None
    )  # by a warp in a common iteration, as sass.Flow.iteration says; None where TRIPS lacks a loop
    scores: int  # of a lane in an iteration, 0 where none are met
    spills: int  # loads and stores of spilled registers in the machine code
    opcodes: dict[str, float]  # executed, by their names without modifiers

    @property
    def per_score(self) -> float | None:
        """Executed instructions of all threads for each score."""
        return self.executed / self.scores if self.executed and self.scores else None

    @property
    def mma(self) -> float:
        return sum(n for name, n in self.opcodes.items() if name.endswith("MMA"))


class Kernel(NamedTuple):
    name: str  # forward_kernel<Bfloat16, 64, false>
    capability: int
    threads: int | None  # of a block, as launched; None where the host code launches no such kernel
    shared: int | None  # bytes a block
    registers: int  # a thread
    spill_stores: int  # bytes a thread
    spill_loads: int
    code: int  # bytes
    loops: list[Loop]  # in the order of the machine code


def find_nvcc() -> str | None:
    """As setup.py looks for it."""
    places = [os.environ.get("PATH", os.defpath), CUDA_FALLBACK]
    if os.environ.get("CUDA_HOME"):
        places.insert(0, f"{os.environ['CUDA_HOME']}/bin")
    return shutil.which("nvcc", path=os.pathsep.join(places))


def compile_all(capabilities: Iterable[int], processes: int = 2) -> list[Kernel]:
    """Compiles every kernel of csrc/cuda for every capability.

    Raises:
        FileNotFoundError: there is no nvcc, or nothing to disassemble with.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("there is no nvcc (CUDA_HOME, PATH)")
    version = _run(nvcc, "--version")
    texts = {str(path.relative_to(REPOSITORY)): path.read_text() for path in _sources()}
    _check_patterns("\n".join(texts.values()))
    analysis = [Path(__file__).read_text(), Path(sass.__file__).read_text()]
    jobs = []
    for capability in capabilities:
        for unit in sorted(name for name in texts if name.endswith(".cu")):
            needed = {name: text for name, text in texts.items() if name == unit or name.endswith(".h")}
            key = hashlib.sha256(repr([capability, unit, sorted(needed.items()), FLAGS, version, analysis]).encode())
            jobs.append((nvcc, capability, unit, needed, f"build/compile-cuda/{key.hexdigest()[:16]}.json"))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        longest_first = sorted(jobs, key=lambda job: -len(texts[job[2]]))
        results = {job[-1]: pool.submit(_compile_unit, *job) for job in longest_first}
        return [kernel for job in jobs for kernel in results[job[-1]].result()]


def _sources() -> list[Path]:
    patterns = ("csrc/*.h", "csrc/cuda/*.h", "csrc/cuda/*.cu")
    return sorted(path for pattern in patterns for path in REPOSITORY.glob(pattern))


def _check_patterns(text: str) -> None:
    """Sources change; an analysis that silently misses what it looks for would be wrong."""
    patterns = [*map(re.escape, RARE), *TRIPS]
    if missing := [pattern for pattern in patterns if not re.search(pattern, text)]:
        raise RuntimeError(f"nothing in csrc/cuda matches {missing}: adapt RARE and TRIPS of bench/compile_cuda.py")


def _compile_unit(nvcc: str, capability: int, unit: str, texts: dict[str, str], cached: str) -> list[Kernel]:
    target = REPOSITORY / cached
    if not target.exists():
        # A copy: lines must be those that were compiled, even if somebody edits the sources meanwhile.
        with tempfile.TemporaryDirectory() as folder:
            for name, text in texts.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            kernels = _analyse_unit(nvcc, capability, Path(folder), unit)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(folder, "result.json")
            partial.write_text(json.dumps([kernel._asdict() | {"loops": _rows(kernel.loops)} for kernel in kernels]))
            shutil.copy(partial, f"{target}.{os.getpid()}")
            os.replace(f"{target}.{os.getpid()}", target)
    return [
        Kernel(**row | {"loops": [Loop(**loop) for loop in row["loops"]]}) for row in json.loads(target.read_text())
    ]


def _rows(loops: Iterable[Loop]) -> list[dict]:
    return [loop._asdict() for loop in loops]


def _analyse_unit(nvcc: str, capability: int, folder: Path, unit: str) -> list[Kernel]:
    cubin = folder / "unit.cubin"
    launched, shapes = _probe(folder, unit)
    target = f"-gencode=arch=compute_{PTX[capability]},code=sm_{capability}"
    log = _run(nvcc, *FLAGS, target, "-cubin", "-o", cubin, folder / unit, errors=True)
    source = Source(path for path in (folder / "csrc/cuda").iterdir() if path.suffix in (".h", ".cu"))
    kernels = []
    for mangled, text in _functions(_run(_find_nvdisasm(nvcc), "-c", "-gi", cubin)):
        name = _short(_run("c++filt", mangled).strip())
        used = _resources(log, mangled)
        threads, dynamic = launched.get(name, (None, None))
        shape = shapes.get(tuple(re.findall(r"^\w+|\b\d+\b", name)[:2]))
        flow = sass.Flow.of(*sass.parse(text))
        kernels.append(
            Kernel(
                name=name,
                capability=capability,
                threads=threads,
                shared=None if dynamic is None else used["smem"] + dynamic,
                registers=used["registers"],
                spill_stores=used["spill stores"],
                spill_loads=used["spill loads"],
                code=16 * len(flow.instructions),
                loops=[_describe(flow, head, source, shape) for head in _interesting(flow, source)],
            )
        )
    return kernels


def _run(*command: object, errors: bool = False) -> str:
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{shlex.join(map(str, command))}:\n{run.stdout}{run.stderr}")
    return run.stderr if errors else run.stdout


def _find_nvdisasm(nvcc: str) -> str:
    beside = shutil.which("nvdisasm", path=f"{Path(nvcc).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}")
    if beside:
        return beside
    try:
        from triton import knobs
    except ImportError:
        raise FileNotFoundError("there is no nvdisasm, neither of the CUDA toolkit nor of triton") from None
    return knobs.nvidia.nvdisasm.path


def _functions(text: str) -> Iterator[tuple[str, str]]:
    _, *parts = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)
    yield from zip(parts[::2], parts[1::2])


def _resources(log: str, function: str) -> dict[str, int]:
    """Of ptxas -v; what it does not mention is zero."""
    part = log.partition(f"Compiling entry function '{function}'")[2].partition("Compiling entry function")[0]
    found = re.findall(r"(\d+) (?:bytes )?(registers|smem|spill stores|spill loads)", part)
    return dict.fromkeys(("smem", "spill stores", "spill loads"), 0) | {what: int(number) for number, what in found}


def _short(name: str) -> str:
    """forward_kernel<Bfloat16, 64, false>"""
    name = re.sub(r"deberta_fast::|cuda::|\(anonymous namespace\)::|^void ", "", name)
    return name.partition("(")[0]


# ---- What the host code says.

# Stands in for the emulator's launch: says what would be launched.
_PROBE_EMULATOR = """
#pragma once
#define launch launch_in_emulator
#include "EMULATOR/emulator.h"
#undef launch
#include <cstdio>
namespace deberta_fast {
template <class Arguments>
const char* launch(void (*kernel)(Arguments), int64_t, int64_t, int threads, int shared_bytes, void*,
                   const Arguments&) {
  std::printf("launch %zx %d %d\\n", reinterpret_cast<size_t>(kernel), threads, shared_bytes);
  return nullptr;
}
}
"""
_PROBE = """
#include "UNIT"
using namespace deberta_fast;
using namespace deberta_fast::cuda;
#define SET_IF_THERE(name, member, value)                                                           \\
  template <class A>                                                                               \\
  auto name(A& arguments, const Call& call, int) -> decltype(arguments.member = value, void()) {   \\
    arguments.member = value;                                                                      \\
  }                                                                                                \\
  template <class A>                                                                               \\
  void name(A&, const Call&, long) {}
SET_IF_THERE(set_call, call, call)
SET_IF_THERE(set_backward, backward.call, call)
SET_IF_THERE(set_element, element, call.element)
SET_IF_THERE(set_keys, keys, call.dropout)
template <class A>
void each_call(const char* (*pass)(const A&, void*)) {
  Call call;
  for (auto element : {Element::bfloat16, Element::float16})
    for (int size : {32, 64, 96, 128})
      for (bool flag : {false, true}) {
        A arguments{};
        call.element = element, call.size = size, call.dropout = flag;
        set_call(arguments, call, 0), set_backward(arguments, call, 0);
        set_element(arguments, call, 0), set_keys(arguments, call, 0);
        pass(arguments, nullptr);
      }
}
template <class S>
void shape(const char* kernel, int size) {
  std::printf("shape %s %d %d %d %d\\n", kernel, size, S::kBlockM, S::kBlockN, S::kWarps);
}
int main() {
  BODY
}
"""


def _probe(folder: Path, unit: str) -> tuple[dict[str, tuple[int, int]], dict[tuple[str, str], Shape]]:
    """Threads and dynamic shared memory of the kernels by name, shapes by a kernel's name and head size.

    Calls every pass of kernels.h that this file defines, for all sizes, element types and flags.
    """
    text = (folder / unit).read_text()
    passes = re.findall(r"const char\* (\w+)\(const \w+&", (folder / "csrc/cuda/kernels.h").read_text())
    body = [f"each_call(&{name});" for name in passes if re.search(rf"^const char\* {name}\(", text, re.MULTILINE)]
    for kernel, alias in re.findall(r"\b(\w+_kernel)\([^)]*\) \{\s+using S = (\w+)<size>;", text):
        body += [f'shape<{alias}<{size}>>("{kernel}", {size});' for size in (32, 64, 96, 128)]
    if "kSquare" in text:
        body += [
            f'std::printf("shape {kernel} {size} %d %d %d\\n", kSquare, kSquare, kThreads / 32);'
            for kernel in re.findall(r"\b(\w+_kernel)\(", text)
            for size in (32, 64, 96, 128)
        ]
    include = folder / "probe"
    include.mkdir()
    (include / "emulator.h").write_text(_PROBE_EMULATOR.replace("EMULATOR", str(EMULATOR)))
    main = folder / "probe.cpp"
    main.write_text(_PROBE.replace("UNIT", str(folder / unit)).replace("BODY", "\n  ".join(body)))
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    # Not -pie: addresses have to be those of the symbol table.
    _run(*compiler, "-std=c++17", "-w", "-no-pie", f"-I{include}", f"-I{folder}/csrc/cuda", "-o", folder / "run", main)
    symbols = {}
    for line in _run("nm", "-C", folder / "run").splitlines():
        address, _, name = line.partition(" ")
        if "_kernel" in name:
            symbols[int(address, 16)] = _short(name[2:])
    launched, shapes = {}, {}
    for line in _run(folder / "run").splitlines():
        kind, *values = line.split()
        if kind == "launch":
            launched[symbols[int(values[0], 16)]] = int(values[1]), int(values[2])
        else:
            shapes[values[0], values[1]] = Shape(*map(int, values[2:]))
    return launched, shapes


# ---- What the machine code says.


class Statement(NamedTuple):
    """A statement of a source, or a line of one."""

    file: str
    lines: range
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.lines.start}"

    def call(self, instruction: sass.Instruction) -> int | None:
        """The number of calls from it to the instruction, None where it did not make it."""
        frames = enumerate(instruction.frames)
        return next((calls for calls, (file, line) in frames if file == self.file and line in self.lines), None)


def _statement(file: str, lines: list[str], start: int) -> Statement:
    """The line, with the block that it opens or what is indented below it."""
    end = start + 1
    while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > _indent(lines[start])):
        end += 1
    if lines[start].endswith("{"):
        end += 1
    return Statement(file, range(start + 1, end + 1), lines[start].strip())


def _rare_statement(file: str, lines: list[str], start: int) -> Statement:
    statement = _statement(file, lines, start)
    if statement.text.startswith("if"):
        return statement._replace(lines=statement.lines[1:])
    if statement.text.endswith("{"):
        return statement
    end = start + 1
    while end < len(lines) and lines[end].strip() and _indent(lines[end]) >= _indent(lines[start]):
        end += 1
    return statement._replace(lines=range(start + 1, end + 1))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


class Source:
    """What the analysis has to know of the sources' text."""

    def __init__(self, files: Iterable[Path]):
        self.rare: list[Statement] = []
        self.loops: list[Statement] = []
        for path in files:
            lines = path.read_text().splitlines()
            for i, line in enumerate(lines):
                if any(text in line for text in RARE):
                    self.rare.append(_rare_statement(path.name, lines, i))
                if re.match(r"\s*(for|while) \(", line) and lines[i - 1].strip() != "UNROLL":
                    self.loops.append(_statement(path.name, lines, i))

    def is_rare(self, instruction: sass.Instruction) -> bool:
        return any(statement.call(instruction) is not None for statement in self.rare)

    def loop(self, body: list[sass.Instruction]) -> Statement | None:
        """The innermost loop that most of these instructions come from.

        Loops around it made more of them, or the same through more calls, or are longer.
        """
        found = []
        for statement in self.loops:
            calls = [n for n in map(statement.call, body) if n is not None]
            if 2 * len(calls) > len(body):
                found.append((len(calls), sum(calls), len(statement.lines), statement))
        return min(found, key=lambda x: x[:3])[-1] if found else None


def _interesting(flow: sass.Flow, source: Source) -> list[int]:
    """Heads of the loops to tell of."""
    body = lambda indices: [flow.instructions[i] for i in indices]
    own = {head: flow.loops[head].difference(*(flow.loops[h] for h in flow.inside(head))) for head in flow.loops}
    making = {head for head in own if any(i.is_mma for i in body(own[head]))}
    for head in own:
        making |= {head for h in flow.inside(head) if h in making and _passes(source.loop(body(flow.loops[h])))}
    return sorted(making or (head for head in own if not flow.inside(head)))


def _passes(statement: Statement | None) -> Callable[[Shape], float] | None:
    found = [passes for pattern, passes in TRIPS.items() if statement and re.match(pattern, statement.text)]
    return found[0] if found else None


def _describe(flow: sass.Flow, head: int, source: Source, shape: Shape | None) -> Loop:
    known = True

    def trips(inner: int) -> float:
        nonlocal known
        body = [flow.instructions[i] for i in flow.loops[inner]]
        if not any(i.is_mma for i in body):
            return 1
        passes = _passes(source.loop(body))
        known = known and passes is not None and shape is not None
        return passes(shape) if passes and shape else 1

    body = [flow.instructions[i] for i in flow.loops[head]]
    times = flow.iteration(head, functools.cache(source.is_rare), trips)
    opcodes: Counter = Counter()
    for i, n in times.items():
        opcodes[flow.instructions[i].name] += int(n) if n == int(n) else n
    exponentials = sum(n for i, n in times.items() if flow.instructions[i].opcode.startswith("MUFU.EX2"))
    # Softmax has a few of them besides, one or two a row.
    scores = int(exponentials) // 16 * 16
    statement = source.loop(body)
    if not scores and shape and any(i.is_mma for i in body) and not _passes(statement):
        scores = shape.rows * shape.columns // (32 * shape.warps)  # gradients that are read
    callers = Counter(i.frames[-1] for i in body if i.frames)
    (file, line), _ = callers.most_common(1)[0] if callers else (("", 0), 0)
    inside = statement and file == statement.file and line in statement.lines
    return Loop(
        place=str(statement or ""),
        origin=str(statement) if inside else f"{file}:{line}",
        instructions=sum(i.name != "NOP" for i in body),
        executed=sum(times.values()) if known else None,
        scores=scores,
        spills=sum(i.name in ("LDL", "STL") for i in body),
        opcodes=dict(opcodes),
    )


def rows(kernel: Kernel) -> Iterator[dict]:
    """A row of the table for each loop, or one for a kernel that has none."""
    row = {
        "kernel": kernel.name,
        "sm": kernel.capability,
        "threads": kernel.threads,
        "registers": kernel.registers,
        "spill stores": kernel.spill_stores,
        "spill loads": kernel.spill_loads,
        "shared KiB": None if kernel.shared is None else kernel.shared / 1024,
        "code KiB": kernel.code / 1024,
    }
    if not kernel.loops:
        yield row
    for loop in kernel.loops:
        names = Counter(loop.opcodes)
        yield row | {
            "loop": loop.place,
            "from": loop.origin,
            "instr/score": loop.per_score,
            "scores": loop.scores or None,
            "executed": loop.executed,
            "instr": loop.instructions,
            "mma": loop.mma,
            "LDSM": names["LDSM"],
            "LDS": names["LDS"],
            "STS": names["STS"] + names["STSM"],
            "LDG": names["LDG"],
            "async": names["LDGSTS"],
            "stores": names["STG"] + names["RED"] + names["ATOMG"],
            "spilled": loop.spills,
            "barriers": names["BAR"],
        }
