"""Compiles the kernels, Triton's and CUDA's, for GPUs that need not be there: ``python -m bench.compile_report``.

Prints registers, spills and shared memory of every kernel, and for each of its innermost loops what an iteration is
made of, above all the instructions a score: what can be known of a kernel's speed before it has run. The CUDA kernels
are in compile_cuda.py.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import triton
from triton import JITFunction, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from deberta_fast.op.backends.triton import configuration, plan
from deberta_fast.op.call import Call as AttentionCall

from . import compile_cuda, sass, timing
from .sass import Loop

# Bytes of shared memory that a block may ask for: CUDA C++ Programming Guide, technical specifications per compute
# capability, "maximum amount of shared memory per thread block".
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
CAPABILITIES = (80, 86, 90, 100, 120)
LEGEND = (
    "instr/score: instructions of all threads in an iteration, over the scores of its tile. narrow: global loads of at "
    "most two bytes. async: copies from global to shared memory through no register. from: line of the kernel from "
    "where the loop was reached. spilled: loads and stores of spilled registers in the loop. seconds: near 0 from "
    "Triton's cache."
)
CUDA_LEGEND = (
    "instr/score: executed over scores. executed: instructions of a warp in a common iteration, with the loops in it; "
    "common are no masked keys, both position terms, and neither first nor last tile of a segment; of other branches "
    "the longer one counts. mma to stores, barriers: of those executed. scores: of a lane. instr: in the machine code. "
    "from: line of the kernel from where the loop was reached. spill stores, spill loads: bytes a thread. spilled: "
    "loads and stores of spilled registers in the loop."
)


class Launch(Protocol):
    """A kernel and all that Triton specialises it by."""

    kernel: JITFunction
    arguments: dict[str, object]  # every parameter; tensors may be on the meta device
    warps: int
    stages: int


class Planned(NamedTuple):
    label: str
    launch: Launch
    tile: tuple[int, int]  # rows and columns of scores that one iteration of its loops makes


class Compiled(NamedTuple):
    registers: int  # a thread
    spill_stores: int  # instructions; for AMD, registers
    spill_loads: int
    stack: int  # bytes a thread
    shared: int  # bytes a block
    loops: list[Loop]  # innermost ones, in the order of the machine code
    warps: int
    seconds: float  # near 0 from Triton's cache


def launches(capability: int, only: str = "") -> Iterator[Planned]:
    """The kernels of the report: DeBERTa-v3's head size and tables in bfloat16, then the other head sizes and dtypes.

    Labels read "64 bfloat16 forward"; ``only`` is what they begin with.
    """
    for size, dtype, precision in (
        (64, torch.bfloat16, "ieee"),
        (32, torch.bfloat16, "ieee"),
        (128, torch.bfloat16, "ieee"),
        (256, torch.bfloat16, "ieee"),
        (64, torch.float32, "tf32"),
        (64, torch.float32, "ieee"),
        (128, torch.float32, "tf32"),
        (256, torch.float32, "tf32"),
    ):
        label = f"{size} {str(dtype).removeprefix('torch.')}" + (f" {precision}" if dtype == torch.float32 else "")
        planned = plan_launches(label, capability, size, dtype, precision)
        yield from (p for p in planned if p.label.startswith(only))


def plan_launches(
    label: str,
    capability: int,
    size: int,
    dtype: torch.dtype,
    precision: str = "ieee",
    mask: str | None = None,
    packed: bool = False,
    dropout_p: float = 0.0,
    c2p: bool = True,
    p2c: bool = True,
    length: int = 512,
) -> Iterator[Planned]:
    """The launches of forward and backward of one call: each kernel once, and of small ones no loops."""
    meta = functools.partial(torch.empty, dtype=dtype, device="meta")
    batch, heads = (1, 12) if packed else (32, 12)
    query, key, value = (meta(batch, heads, length, size) for _ in range(3))
    masks = {"keys": (batch, 1, 1, length), "pairs": (batch, 1, length, length)}
    inputs = AttentionCall(
        query, key, value, meta(heads, 512, size) if c2p else None, meta(heads, 512, size) if p2c else None,
        None if mask is None else meta(masks[mask], dtype=torch.bool),
        meta(9, dtype=torch.int32) if packed else None, meta(1, dtype=torch.int64) if dropout_p else None,
        256, 512, "hf", 0, 0, length, (3 * size) ** -0.5, dropout_p,
    )  # fmt: skip
    target = configuration.Target(capability, plan.block_d_of(inputs), dtype.itemsize)
    chosen = configuration.default(target)
    output, lse = inputs.new_output(), inputs.new_lse()
    grads = [None if x is None else torch.empty_like(x) for x in inputs[:5]]
    forward = plan.Plan(inputs, chosen, precision).forward(output, lse)
    backward = plan.Plan(inputs, chosen, precision).backward(output, lse, output, lse, grads)
    seen = set()
    for launch in (*forward, *backward):
        name = launch.kernel.__name__
        if name not in seen:
            seen.add(name)
            sizes = (launch.arguments.get(name, 1) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_E"))
            tile = [*(size for size in sizes if size > 1), 1, 1][:2]
            yield Planned(f"{label} {name}", launch, tile)


def compile_launch(launch: Launch, architecture: int | str) -> Compiled:
    """Compiles as such a GPU would at the launch: a compute capability, or AMD's "gfx942", of which no loops are told.

    Needs no GPU, and no TRITON_INTERPRET.
    """
    if not isinstance(launch.kernel, JITFunction):
        kind = type(launch.kernel).__name__
        raise TypeError(f"expected a triton.JITFunction, got {kind}: unset TRITON_INTERPRET before importing triton")
    amd = isinstance(architecture, str)
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", architecture, 32)
    start = time.perf_counter()
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    kernel = triton.compile(_source(launch, target), target=target, options=options)
    seconds = time.perf_counter() - start
    if amd:
        # Its assembler's notes, at the end. What is not in registers is in the private segment.
        text = kernel.asm["amdgcn"].rpartition(".amdgpu_metadata\n")[2]
        used = {name: int(number) for name, number in re.findall(r"^ *\.(\w+): +(\d+)$", text, re.MULTILINE)}
        spilled, stack, shared = used["vgpr_spill_count"], used["private_segment_fixed_size"], kernel.metadata.shared
        return Compiled(used["vgpr_count"], spilled, spilled, stack, shared, [], launch.warps, seconds)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        text = _run(knobs.nvidia.nvdisasm.path, "-c", "-gp", "-ndf", cubin)  # no dataflow: half the time
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    instructions, labels = sass.parse(text)
    names = [i.name for i in instructions]
    sources = sass.Sources(launch.kernel, launch.arguments.values(), kernel.asm["ptx"])
    bodies = sass.innermost_loops(instructions, labels)
    return Compiled(
        registers=used["REG"],
        spill_stores=names.count("STL"),
        spill_loads=names.count("LDL"),
        stack=used["STACK"],
        shared=kernel.metadata.shared,
        loops=[sass.describe([instructions[i] for i in body], sources) for body in bodies],
        warps=launch.warps,
        seconds=seconds,
    )


def _source(launch: Launch, target: GPUTarget) -> ASTSource:
    kernel, backend = launch.kernel, make_backend(target)
    # Triton's own binder, not a copy of its rules of which integers become constants and what is known to be aligned.
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    values, specialization, unknown = binder(**launch.arguments)
    if unknown:
        raise TypeError(f"{kernel.__name__} has no parameters {sorted(unknown)}")
    kinds = {name: kind for name, (kind, _) in zip(values, specialization)}
    constants = {(i,): values[name] for i, (name, kind) in enumerate(kinds.items()) if kind == "constexpr"}
    attributes = {
        (i,): backend.parse_attr(found) for i, (_, found) in enumerate(specialization) if isinstance(found, str)
    }
    return ASTSource(kernel, kinds, constants, attributes)


def _run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def compile_all(
    build: Callable[[int], Iterable[Planned]], capabilities: Iterable[int], processes: int = 2
) -> dict[tuple[str, int], tuple[Compiled, tuple[int, int]]]:
    """Compiles every launch for every capability, in fresh processes.

    Args:
        build: the launches for a capability. Importable: each process calls it for itself, since kernels cannot be
            pickled. The processes do not inherit TRITON_INTERPRET, so that a caller may be interpreting.

    Returns:
        By label and capability, with the tile that an iteration makes.
    """
    with _without("TRITON_INTERPRET"), ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        planned = {capability: pool.submit(_labels, build, capability) for capability in capabilities}
        jobs = [(label, capability) for capability, labels in planned.items() for label in labels.result()]
        results = [pool.submit(_compile_one, build, *job) for job in jobs]
        return {job: x.result() for job, x in zip(jobs, results)}


@contextmanager
def _without(variable: str) -> Iterator[None]:
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value


def _built(build: Callable[[int], Iterable[Planned]], capability: int) -> dict[str, Planned]:
    return {planned.label: planned for planned in build(capability)}


def _labels(build: Callable[[int], Iterable[Planned]], capability: int) -> list[str]:
    return list(_built(build, capability))


def _compile_one(build: Callable[[int], Iterable[Planned]], label: str, capability: int):
    _, launch, tile = _built(build, capability)[label]
    try:
        return compile_launch(launch, capability), tile
    except Exception as error:
        raise RuntimeError(f"{label}, sm_{capability}: {error}") from error


def rows(label: str, capability: int, compiled: Compiled, tile: tuple[int, int]) -> Iterator[dict]:
    """A row of the table for each loop, or one for a kernel that has none."""
    kernel = {
        "kernel": label,
        "sm": capability,
        "warps": compiled.warps,
        "registers": compiled.registers,
        "spills": compiled.spill_stores + compiled.spill_loads,
        "shared KiB": compiled.shared / 1024,
        "seconds": compiled.seconds,
    }
    if not compiled.loops:
        yield kernel
    for loop in compiled.loops:
        yield kernel | {
            "loop": f"{loop.function}:{loop.line}",
            "from": loop.kernel_line,
            "instr/score": loop.per_score(*tile, compiled.warps),
            "instr": loop.instructions,
            "unrolled": loop.unrolled,
            "mma": loop.mma,
            "loads": loop.global_loads,
            "narrow": loop.narrow_loads,
            "async": loop.async_copies,
            "LDS": loop.shared_loads,
            "STS": loop.shared_stores,
            "stores": loop.global_stores,
            "spilled": loop.spills,
            "barriers": loop.barriers,
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_report", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--archs", type=_capabilities, metavar="80,90", help="compute capabilities (all, and for CUDA 80,90,100)"
    )
    parser.add_argument("--kernels", choices=("triton", "cuda"), help="only these")
    parser.add_argument("--only", default="", metavar="TEXT", help='what kernels begin with: "64 bfloat16", "forward_"')
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write both, with where they come from, to DIR")
    arguments = parser.parse_args()
    timing.provenance()
    tables = []
    if arguments.kernels != "cuda":
        build = functools.partial(launches, only=arguments.only)
        compiled = compile_all(build, arguments.archs or CAPABILITIES)
        table = [row for (label, sm), result in compiled.items() for row in rows(label, sm, *result)]
        tables.append(("compile-report", table, LEGEND))
    if arguments.kernels != "triton":
        try:
            kernels = compile_cuda.compile_all(arguments.archs or compile_cuda.CAPABILITIES)
        except FileNotFoundError as error:
            if arguments.kernels:
                parser.error(str(error))
            print(f"without the CUDA kernels: {error}", file=sys.stderr)
        else:
            table = [row for x in kernels if x.name.startswith(arguments.only) for row in compile_cuda.rows(x)]
            tables.append(("compile-report-cuda", table, CUDA_LEGEND))
    tables = [table for table in tables if table[1]]
    if arguments.out:
        for name, table, legend in tables:
            timing.save(name, table, arguments.out, legend)
    if arguments.json:
        print(json.dumps([row for _, table, _ in tables for row in table], indent=1))
    else:
        print("\n\n".join(f"{timing.markdown(table)}\n\n{legend}" for _, table, legend in tables))


def _capabilities(text: str) -> list[int]:
    capabilities = [int(part) for part in text.split(",")]
    if unknown := set(capabilities) - SHARED_LIMIT.keys():
        raise argparse.ArgumentTypeError(f"expected some of {sorted(SHARED_LIMIT)}, got {sorted(unknown)}")
    return capabilities


if __name__ == "__main__":
    main()
