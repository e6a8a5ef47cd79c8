"""Verifies the compiled PTX of the CUDA kernels without a GPU: ``python -m bench.verify_ptx``, or ``make verify-ptx``.

sentryward proves for a launch that threads meet at barriers and that no two accesses race, in shared and in global
memory. The tests' emulator makes small calls and tells what the kernels are launched with. With --mutants, each barrier
and each wait for copies is left out in turn, which must be found.

sentryward 0.1.1 does not compute addresses through bfi, so shifts replace it first. Limits of shared memory are not
checked, and what branches depend on must be in the arguments: masks, cu_seqlens and the first shares of diagonals are
not. So code for masked tiles is not reached, and near calls of backward_query are "unsupported", a failure.
"""

import argparse
import json
import re
import struct
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from . import compile_cuda, counts, timing

FOLDER = timing.REPOSITORY / "build/verify-ptx"
SIZE, CAPABILITY = 32, 80  # at head size 64 forward takes minutes for a tile, and a larger one has no other barriers
# Queries, keys, offset and heads: two tiles or more for each kernel.
CASES = {
    "near": (64, 128, 0, 1),
    "far left": (64, 128, 1 << 20, 1),
    "far right": (64, 128, -(1 << 20), 1),
}
HEADS = 2  # that are verified together
SITE = re.compile(r"^\s*(bar(?:rier)?(?:\.warp)?\.sync|cp\.async\.wait_\w+)\b[^;]*;", re.MULTILINE)
FAULTS = ("potential_race", "race", "not_wellsynced", "invalid_lifecycle")
_FORMATS = {
    "f32": "<f",
    "s32": "<i",
    "s64": "<q",
    **{f"{x}{8 * n}": f"<{c}" for x in "ub" for n, c in zip((1, 2, 4, 8), "BHIQ")},
}


class Problem(NamedTuple):
    kernel: str
    case: str
    ptx: str
    config: dict


def ptx_of_kernels(emulated: set[str]) -> dict[str, str]:
    """Compiles the kernels and returns the PTX of each as a module of its own."""
    found = {}
    for unit in sorted((timing.REPOSITORY / "csrc/cuda").glob("*.cu")):
        path = compile_cuda.cache_path(unit, "ptx", "verify", CAPABILITY, compile_cuda.nvcc_version())
        if not path.exists():
            flags = [flag for flag in compile_cuda.FLAGS if "ptxas" not in flag]
            compile_cuda.run(compile_cuda.find_tool("nvcc"), *flags, "-ptx", f"-arch=sm_{CAPABILITY}", unit, "-o", path)
        head, *entries = re.split(r"^(?=(?:\.visible )?\.entry )", path.read_text(), flags=re.MULTILINE)
        mangled = [re.search(r"\.entry (\w+)\(", entry)[1] for entry in entries]
        for name, entry in zip(compile_cuda.run("c++filt", *mangled).splitlines(), entries, strict=True):
            if (short := compile_cuda.short_name(name)) in emulated:
                found[short] = head + without_bfi(entry[: entry.rindex("\n}") + 3])
    return found


def without_bfi(entry: str) -> str:
    """Replaces each insertion of a bit field by shifts and masks."""

    def replaced(match: re.Match) -> str:
        to, field, rest, first, count = match.groups()
        bits = ((1 << min(int(count), 32 - int(first))) - 1) << int(first)
        return (
            f"shl.b32 %field0, {field}, {first};\n\tand.b32 %field0, %field0, {bits};\n"
            f"\tand.b32 %field1, {rest}, {~bits & 0xFFFFFFFF};\n\tor.b32 {to}, %field0, %field1;"
        )

    entry = re.sub(r"bfi\.b32\s+(%r\d+), (%r\d+|-?\d+), (%r\d+|-?\d+), (\d+), (\d+);", replaced, entry)
    return re.sub(r"(\.reg \.b32\s+%r<\d+>;)", r"\1\n\t.reg .b32 %field<2>;", entry, count=1)


def fields(ptx: str) -> Iterator[tuple[str, int, str]]:
    """Yields the parameter, offset and type of each field of the arguments that a kernel reads, without overlaps."""
    parameter = re.search(r"\.param [^;\n]*?\.b8 (\w+)\[\d+\]", ptx)[1]
    bases, found = {parameter: 0}, set()
    sums = re.findall(r"(?:mov|add)\.[bsu]64\s+(%rd\d+), (\w+|%rd\d+)(?:, (-?\d+))?;", ptx)
    for _ in range(3):  # a base is computed from another one
        bases |= {to: bases[base] + int(offset or 0) for to, base, offset in sums if base in bases and to not in bases}
    for several, kind, base, offset in re.findall(
        r"ld\.param(?:\.v(\d))?\.(\w+)\s+[^\[]+\[(\w+|%rd\d+)(?:\+(-?\d+))?\]", ptx
    ):
        size = struct.calcsize(_FORMATS[kind])
        found |= {(bases[base] + int(offset or 0) + i * size, kind) for i in range(int(several or 1))}
    end = 0
    for offset, kind in sorted(found, key=lambda field: (field[0], -struct.calcsize(_FORMATS[field[1]]))):
        if offset >= end:
            end = offset + struct.calcsize(_FORMATS[kind])
            yield parameter, offset, kind


def config(ptx: str, launch: counts.Launch) -> dict:
    """Returns a launch as sentryward reads it. What is too large for a stride is a pointer to an object of its own."""
    values, pointers = [], []
    for parameter, offset, kind in fields(ptx):
        [value] = struct.unpack_from(_FORMATS[kind], launch.arguments, offset)
        field = {"parameter": parameter, "offset": offset, "type": kind}
        if kind in ("u64", "b64", "s64") and abs(value) >= 1 << 32:
            known = {"space": "global", "object": f"at{value:x}", "name": f"field{offset}"}
            pointers.append(field | {"type": "pointer"} | known)
        else:
            values.append(field | {"value": value})
    grid = [launch.grid[0], min(launch.grid[1], HEADS), 1]
    shape = {"grid_dim": grid, "block_dim": [launch.threads, 1, 1], "dynamic_shared_bytes": launch.shared}
    return {
        "schema": "spverify.kernel-input/v1", "launch": shape, "arguments": values, "declarations": pointers,
    }  # fmt: skip


def problems(pattern: str) -> list[Problem]:
    """Returns each kernel that shares memory, with each case that launches it."""
    emulator, launches = counts.Emulator(), {}
    for case, (queries, keys, offset, heads) in CASES.items():
        ways = counts.launches_of_call(emulator, queries, keys, offset, size=SIZE, heads=heads)
        for launch in (*ways["forward"], *ways["backward"]):
            if launch.shared and re.search(pattern, launch.kernel):
                launches[launch.kernel, case] = launch
    code = ptx_of_kernels({kernel for kernel, _ in launches})
    return [Problem(*key, code[key[0]], config(code[key[0]], launch)) for key, launch in launches.items()]


def verify(problem: Problem, ptx: str, seconds: float) -> dict:
    import sentryward  # make verify-ptx installs it

    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "kernel.ptx").write_text(ptx)
    (FOLDER / "input.json").write_text(json.dumps(problem.config))
    return sentryward.verify(FOLDER / "kernel.ptx", input=FOLDER / "input.json", timeout_seconds=seconds)


def mutants(ptx: str) -> Iterator[tuple[str, str, str]]:
    """Yields each barrier or wait, PTX without it, and PTX with a race of all threads in its place."""
    memory = re.search(r"^\.extern \.shared [^;]*?(\w+)\[\];", ptx, re.MULTILINE)[1]
    for site in SITE.finditer(ptx):
        before, after = ptx[: site.start(1)], ptx[site.start(1) :]
        race = f"{{ .reg .u32 %raced; mov.u32 %raced, %tid.x; st.shared.u32 [{memory}], %raced; }} "
        yield f"{site[0].strip()} of line {before.count(chr(10)) + 1}", before + "//" + after, before + race + after


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.verify_ptx", description=__doc__.split(":")[0])
    parser.add_argument("--kernels", default="", metavar="PATTERN", help="only these")
    parser.add_argument("--mutants", action="store_true", help="leave out barriers; takes an hour")
    parser.add_argument("--seconds", type=float, default=900.0, help="for one launch at most (900)")
    arguments = parser.parse_args()
    found, good = problems(arguments.kernels), True
    for problem in found:
        start = time.perf_counter()
        result = verify(problem, problem.ptx, arguments.seconds)
        why = [x.get("code") for x in result.get("diagnostics", [])][:1]
        print(problem.kernel, problem.case, result["result"], *why, f"{time.perf_counter() - start:.0f} s", flush=True)
        good &= result["result"] == "race_free"
    if arguments.mutants:
        for kernel in dict.fromkeys(problem.kernel for problem in found):
            own = [problem for problem in found if problem.kernel == kernel]
            fault = lambda ptx, own=own: next(
                (x for x in (verify(problem, ptx, arguments.seconds)["result"] for problem in own) if x in FAULTS), None
            )
            for site, without, raced in mutants(own[0].ptx):
                seen = fault(without) or ("NOT FOUND" if fault(raced) else "not reached")
                print(kernel, "without", site, seen, flush=True)
                good &= seen != "NOT FOUND"
    sys.exit(not good)


if __name__ == "__main__":
    main()
