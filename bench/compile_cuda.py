"""Compiles the CUDA kernels without a GPU and collects what ptxas made of each.

Needs nvcc, and cuobjdump from the toolkit or the triton package. Compiled units are cached in build/compile-cuda.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
EMULATOR = REPOSITORY / "tests" / "emulator"
FLAGS = ["-std=c++17", "-O3", "-Xptxas=-v"]  # the flags of setup.py that change the code
PTX = {80: 80, 86: 80, 89: 80, 90: 80, 100: 100, 120: 100}  # the PTX that setup.py makes each binary from
CAPABILITIES = (80, 90, 100)

_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


class Kernel(NamedTuple):
    name: str  # forward_kernel<Bfloat16, 64, false>
    capability: int
    threads: int | None  # per block; None if the host code launches no such kernel
    shared: int | None  # bytes per block, static and dynamic; None if the host code launches no such kernel
    registers: int  # per thread
    spill_stores: int  # bytes per thread
    spill_loads: int
    instructions: int  # in the machine code, without padding
    mma: int  # instructions on tensor cores among them


def find_tool(name: str) -> str | None:
    """Finds a program of the CUDA toolkit where setup.py looks for nvcc."""
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else []
    folders += [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return shutil.which(name, path=os.pathsep.join(folders))


def run(*command: object, stderr: int | None = subprocess.PIPE) -> str:
    """Returns what a command prints.

    Raises:
        RuntimeError: the command fails; the message has its output.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=stderr, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(words)}:\n{done.stdout}{done.stderr or ''}")
    return done.stdout


def nvcc_version() -> str:
    """Returns the version, as 13.0.88.

    Raises:
        FileNotFoundError: nvcc is missing.
    """
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise FileNotFoundError("there is no nvcc (CUDA_HOME, PATH)")
    return re.search(r"V([\d.]+)", run(nvcc, "--version"))[1]


def disassemble(cuobjdump: str, cubin: Path) -> str:
    """Returns the machine code of all functions, and the resources that each uses."""
    return run(cuobjdump, "-sass", "-res-usage", cubin)


def split_functions(text: str) -> dict[str, str]:
    """Returns the machine code of each function by its mangled name."""
    return {code.partition("\n")[0].strip(): code for code in text.split("Function : ")[1:]}


def count_opcodes(text: str) -> dict[str, Counter[str]]:
    """Counts the opcodes of each function, with their modifiers (``LDG.E.U16``) and without padding."""
    counts = {name: Counter(_OPCODE.findall(code)) for name, code in split_functions(text).items()}
    for opcodes in counts.values():
        del opcodes["NOP"]
    return counts


def count_mma(opcodes: Counter[str]) -> int:
    return sum(n for opcode, n in opcodes.items() if opcode.partition(".")[0].endswith("MMA"))  # HMMA, HGMMA, UTCHMMA


def compile_all(capabilities: Iterable[int], threads: int = 2) -> list[Kernel]:
    """Compiles every kernel of csrc/cuda for every capability.

    Raises:
        FileNotFoundError: nvcc or cuobjdump is missing.
    """
    version, cuobjdump, units = nvcc_version(), _find_cuobjdump(), _units()
    with ThreadPoolExecutor(threads) as pool:
        launched = dict(pool.map(find_launches, units))
        jobs = [(version, unit, capability) for capability in capabilities for unit in units]
        compiled = pool.map(lambda job: _compile_unit(*job), jobs)
        return [
            kernel
            for (_, unit, capability), cubin in zip(jobs, compiled)
            for kernel in _read_unit(cuobjdump, cubin, capability, launched[unit])
        ]


def machine_code(capability: int) -> dict[str, str]:
    """Returns the machine code of every kernel of csrc/cuda by its name.

    Raises:
        FileNotFoundError: nvcc or cuobjdump is missing.
    """
    version, cuobjdump, found = nvcc_version(), _find_cuobjdump(), {}
    for unit in _units():
        functions = split_functions(disassemble(cuobjdump, _compile_unit(version, unit, capability)))
        names = run("c++filt", *functions).splitlines()
        found |= {short_name(name): code for name, code in zip(names, functions.values(), strict=True)}
    return found


def _units() -> list[Path]:
    return sorted((REPOSITORY / "csrc/cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)


def _find_cuobjdump() -> str:
    if found := find_tool("cuobjdump"):
        return found
    try:
        from triton import knobs
    except ImportError:
        raise FileNotFoundError("there is no cuobjdump, neither in the CUDA toolkit nor in triton") from None
    return knobs.nvidia.cuobjdump.path


def cache_path(unit: Path, suffix: str, *settings: object) -> Path:
    """Names the cached result of a unit by the contents of everything that it depends on."""
    key = hashlib.sha256(repr(settings).encode())
    for source in (unit, *sorted((REPOSITORY / "csrc").rglob("*.h")), *sorted(EMULATOR.glob("*.h"))):
        key.update(source.read_bytes())
    folder = REPOSITORY / "build/compile-cuda"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{unit.stem}-{key.hexdigest()[:16]}.{suffix}"


def _compile_unit(version: str, unit: Path, capability: int) -> Path:
    """Returns the cubin; its ptxas log lies beside it."""
    target = f"-gencode=arch=compute_{PTX[capability]},code=sm_{capability}"
    cubin = cache_path(unit, "cubin", FLAGS, target, version)
    if not cubin.exists():
        partial = cubin.with_suffix(f".{os.getpid()}")
        log = run(find_tool("nvcc"), *FLAGS, target, "-cubin", "-o", partial, unit, stderr=subprocess.STDOUT)
        cubin.with_suffix(".log").write_text(log)
        partial.replace(cubin)
    return cubin


def _read_unit(cuobjdump: str, cubin: Path, capability: int, launched: dict[str, tuple[int, int]]) -> list[Kernel]:
    log, kernels = cubin.with_suffix(".log").read_text(), []
    functions = count_opcodes(disassemble(cuobjdump, cubin))
    names = map(short_name, run("c++filt", *functions).splitlines())
    for name, (mangled, opcodes) in zip(names, functions.items(), strict=True):
        part = log.partition(f"Compiling entry function '{mangled}'")[2].partition("Compiling entry function")[0]
        # ptxas leaves out what is zero.
        used = Counter({what: int(n) for n, what in re.findall(r"(\d+) (?:bytes )?(registers|smem|spill \w+)", part)})
        threads, dynamic = launched.get(name, (None, None))
        kernels.append(
            Kernel(
                name=name,
                capability=capability,
                threads=threads,
                shared=None if dynamic is None else used["smem"] + dynamic,
                registers=used["registers"],
                spill_stores=used["spill stores"],
                spill_loads=used["spill loads"],
                instructions=opcodes.total(),
                mma=count_mma(opcodes),
            )
        )
    return kernels


def short_name(name: str) -> str:
    """Shortens a demangled name to ``forward_kernel<Bfloat16, 64, false>``."""
    return re.sub(r"deberta_fast::|cuda::|\(anonymous namespace\)::|^void ", "", name).partition("(")[0]


# Replaces the emulator's launch by one that prints what the host code asks for.
_PROBE_EMULATOR = """
#pragma once
#define launch launch_in_emulator
#include "EMULATOR/emulator.h"
#undef launch
#include <cstdio>
namespace deberta_fast {
template <class Arguments>
const char* launch(void (*kernel)(Arguments), int64_t, int64_t, int threads, int shared, void*, const Arguments&) {
  std::printf("%zx %d %d\\n", reinterpret_cast<size_t>(kernel), threads, shared);
  return nullptr;
}
}
"""
# Calls every pass of a unit for all element types, head sizes and flags.
_PROBE = """
#include "UNIT"
using namespace deberta_fast;
template <class Arguments>
void call_pass(const char* (*pass)(const Arguments&, void*)) {
  for (auto element : {Element::bfloat16, Element::float16})
    for (int size : {32, 64, 96, 128})
      for (bool flag : {false, true}) {
        Arguments arguments{};
        auto set = [&](auto& call) { call.element = element, call.size = size, call.dropout = flag; };
        if constexpr (requires { arguments.call; }) set(arguments.call);
        if constexpr (requires { arguments.backward.call; }) set(arguments.backward.call);
        if constexpr (requires { arguments.table; }) set(arguments.table.backward.call);
        pass(arguments, nullptr);
      }
}
int main() { CALLS }
"""


def find_launches(unit: Path) -> tuple[Path, dict[str, tuple[int, int]]]:
    """Asks the host code of a unit for the threads and the dynamic shared memory of each kernel, by its name."""
    passes = re.findall(r"const char\* (\w+)\(const \w+&", (unit.parent / "kernels.h").read_text())
    own = [name for name in passes if re.search(rf"^const char\* {name}\(", unit.read_text(), re.MULTILINE)]
    calls = " ".join(f"call_pass(&cuda::{name});" for name in own)
    compiler = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++20", "-w"]
    cached = cache_path(unit, "json", _PROBE_EMULATOR, _PROBE, calls, compiler)
    if not cached.exists():
        with tempfile.TemporaryDirectory() as folder:
            source, program = Path(folder, "probe.cpp"), Path(folder, "probe")
            Path(folder, "emulator.h").write_text(_PROBE_EMULATOR.replace("EMULATOR", str(EMULATOR)))
            source.write_text(_PROBE.replace("UNIT", str(unit)).replace("CALLS", calls))
            # -no-pie: addresses must be those of the symbol table.
            run(*compiler, "-no-pie", f"-I{folder}", f"-I{unit.parent}", "-o", program, source)
            symbols = dict(line.split(" ", 1) for line in run("nm", "-C", program).splitlines() if "_kernel" in line)
            names = {int(address, 16): short_name(name[2:]) for address, name in symbols.items()}
            launches = [line.split() for line in run(program).splitlines()]
        found = {names[int(address, 16)]: (int(threads), int(shared)) for address, threads, shared in launches}
        partial = cached.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(found))
        partial.replace(cached)
    return unit, {name: tuple(launch) for name, launch in json.loads(cached.read_text()).items()}
