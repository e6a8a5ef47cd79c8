"""Compiles the kernels, Triton's and CUDA's, for GPUs that are not there: ``python -m bench.compile_report``.

Prints registers, spills, shared memory and instruction counts of every kernel: what is known of its speed before it
runs. compile_cuda.py compiles the CUDA kernels.
"""

import argparse
import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton import JITFunction, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from deberta_fast.op.backends.triton import configuration, plan
from deberta_fast.op.call import Call as AttentionCall

from . import compile_cuda, timing

# Bytes of shared memory that a block may use: CUDA C++ Programming Guide, technical specifications per compute
# capability, "maximum amount of shared memory per thread block".
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
CAPABILITIES = (80, 86, 90, 100, 120)
LEGEND = (
    "registers: per thread. spill stores, spill loads: bytes per thread, for Triton's kernels instructions. shared "
    "KiB: per block, static and dynamic. instructions: of the machine code, 16 bytes each, counted once in a loop or "
    "not. mma: instructions on tensor cores among them."
)


class Launch(NamedTuple):
    """A kernel and everything that Triton specialises it by."""

    kernel: JITFunction
    arguments: dict[str, object]  # every parameter; tensors may be on the meta device
    warps: int
    stages: int


class Planned(NamedTuple):
    label: str
    launch: Launch


class Compiled(NamedTuple):
    registers: int  # per thread
    spill_stores: int  # instructions; registers on AMD
    spill_loads: int
    stack: int  # bytes per thread
    shared: int  # bytes per block
    warps: int
    instructions: int = 0  # in the machine code, without padding; 0 on AMD, as are the next two
    mma: int = 0  # instructions on tensor cores among them
    narrow_loads: int = 0  # global loads of one or two bytes: a gather of single elements becomes these


def launches(capability: int) -> Iterator[Planned]:
    """The kernels of the report: DeBERTa-v3's head size and tables in bfloat16, then other head sizes and dtypes.

    Labels read "64 bfloat16 forward".
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
        yield from plan_launches(label, capability, size, dtype, precision)


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
    """Plans forward and backward of one call: each kernel once, and with backward's constants if they are others."""
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
    settings = plan.settings(chosen, precision)
    planned: dict[str, Launch] = {}
    for results in ((output, lse), (output, lse, output, lse, *grads)):
        given = plan.given_tensors(inputs, *results)
        made = plan.plan_of(inputs, given, settings)
        tensors = made.tensors(given)
        for x in made.launches:
            launch = Launch(x.kernel, x.arguments(tensors), x.warps, x.stages)
            first = planned.setdefault(x.kernel.__name__, launch)
            if any(first.arguments[p.name] != launch.arguments[p.name] for p in x.kernel.params if p.is_constexpr):
                planned[f"backward_{x.kernel.__name__}"] = launch
    for name, launch in planned.items():
        yield Planned(f"{label} {name}", launch)


def compile_launch(launch: Launch, architecture: int | str) -> Compiled:
    """Compiles as a GPU would at the launch: one of a compute capability, or AMD's "gfx942".

    Needs no GPU, and no TRITON_INTERPRET.
    """
    if not isinstance(launch.kernel, JITFunction):
        kind = type(launch.kernel).__name__
        raise TypeError(f"expected a triton.JITFunction, got {kind}: unset TRITON_INTERPRET before importing triton")
    amd = isinstance(architecture, str)
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", architecture, 32)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    kernel = triton.compile(_source(launch, target), target=target, options=options)
    shared = kernel.metadata.shared
    if amd:
        # The assembler's notes at the end. What is not in registers is in the private segment.
        text = kernel.asm["amdgcn"].rpartition(".amdgpu_metadata\n")[2]
        used = {name: int(number) for name, number in re.findall(r"^ *\.(\w+): +(\d+)$", text, re.MULTILINE)}
        spilled, stack = used["vgpr_spill_count"], used["private_segment_fixed_size"]
        return Compiled(used["vgpr_count"], spilled, spilled, stack, shared, launch.warps)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        text = compile_cuda.disassemble(knobs.nvidia.cuobjdump.path, cubin)
    [opcodes] = compile_cuda.count_opcodes(text).values()
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", text)}
    count = lambda pattern: sum(n for opcode, n in opcodes.items() if re.match(pattern, opcode))
    return Compiled(
        registers=used["REG"],
        spill_stores=count(r"STL\b"),
        spill_loads=count(r"LDL\b"),
        stack=used["STACK"],
        shared=shared,
        warps=launch.warps,
        instructions=opcodes.total(),
        mma=compile_cuda.count_mma(opcodes),
        narrow_loads=count(r"LDG\b.*\.[US](8|16)\b"),
    )


def _source(launch: Launch, target: GPUTarget) -> ASTSource:
    kernel, backend = launch.kernel, make_backend(target)
    # Triton's own binder decides which integers become constants and what is known to be aligned.
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


def compile_all(
    build: Callable[[int], Iterable[Planned]], capabilities: Iterable[int], processes: int = 2
) -> dict[tuple[str, int], Compiled]:
    """Compiles every launch for every capability, in fresh processes.

    Args:
        build: returns the launches for a capability. It must be importable: each process calls it, because kernels
            cannot be pickled. The processes do not inherit TRITON_INTERPRET, so the caller may interpret.

    Returns:
        The results by label and capability.
    """
    with _without("TRITON_INTERPRET"), ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        planned = {capability: pool.submit(_labels, build, capability) for capability in capabilities}
        jobs = [(label, capability) for capability, labels in planned.items() for label in labels.result()]
        results = [pool.submit(_compile_one, build, *job) for job in jobs]
        return {job: result.result() for job, result in zip(jobs, results)}


@contextmanager
def _without(variable: str) -> Iterator[None]:
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value


@functools.cache
def _planned(build: Callable[[int], Iterable[Planned]], capability: int) -> dict[str, Launch]:
    return dict(build(capability))


def _labels(build: Callable[[int], Iterable[Planned]], capability: int) -> list[str]:
    return list(_planned(build, capability))


def _compile_one(build: Callable[[int], Iterable[Planned]], label: str, capability: int) -> Compiled:
    try:
        return compile_launch(_planned(build, capability)[label], capability)
    except Exception as error:
        raise RuntimeError(f"{label}, sm_{capability}: {error}") from error


def row(label: str, capability: int, threads: int, kernel: Compiled | compile_cuda.Kernel) -> dict:
    return {
        "kernel": label,
        "sm": capability,
        "threads": threads,
        "registers": kernel.registers,
        "spill stores": kernel.spill_stores,
        "spill loads": kernel.spill_loads,
        "shared KiB": None if kernel.shared is None else kernel.shared / 1024,
        "instructions": kernel.instructions,
        "mma": kernel.mma,
    }


def _selected(pattern: str, capability: int) -> list[Planned]:
    return [planned for planned in launches(capability) if re.match(pattern, planned.label)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_report", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--archs", type=_capabilities, metavar="80,90", help="compute capabilities (all, and for CUDA 80,90,100)"
    )
    parser.add_argument("--kernels", choices=("triton", "cuda"), help="only these")
    parser.add_argument("--only", default="", metavar="PATTERN", help="how kernels begin: '64 bfloat16|forward_'")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write the table and its provenance to DIR")
    arguments = parser.parse_args()
    timing.provenance()
    table, notes = [], LEGEND
    if arguments.kernels != "cuda":
        compiled = compile_all(functools.partial(_selected, arguments.only), arguments.archs or CAPABILITIES)
        table += [row(label, sm, 32 * kernel.warps, kernel) for (label, sm), kernel in compiled.items()]
    if arguments.kernels != "triton":
        try:
            kernels = compile_cuda.compile_all(arguments.archs or compile_cuda.CAPABILITIES)
            table += [row(x.name, x.capability, x.threads, x) for x in kernels if re.match(arguments.only, x.name)]
            notes += f" nvcc: {compile_cuda.nvcc_version()}."
        except FileNotFoundError as error:
            if arguments.kernels:
                parser.error(str(error))
            print(f"without the CUDA kernels: {error}", file=sys.stderr)
    if arguments.out:
        timing.save("compile-report", table, arguments.out, notes)
    print(f"{timing.markdown(table)}\n\n{notes}")


def _capabilities(text: str) -> list[int]:
    capabilities = [int(part) for part in text.split(",")]
    if unknown := set(capabilities) - SHARED_LIMIT.keys():
        raise argparse.ArgumentTypeError(f"expected some of {sorted(SHARED_LIMIT)}, got {sorted(unknown)}")
    return capabilities


if __name__ == "__main__":
    main()
