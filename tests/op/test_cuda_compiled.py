"""Checks nvcc's output for the CUDA kernels, without a GPU: registers, spills, shared memory and instructions."""

import re
import subprocess

import pytest

from bench import compile_cuda

if compile_cuda.find_tool("nvcc") is None:
    pytest.skip("there is no nvcc", allow_module_level=True)

# Compilation for each takes a minute and a half on one processor, once per state of the sources.
CAPABILITIES = (90,)
# Bytes per block on sm_86, sm_89 and sm_120, and on sm_80. sm_90 and sm_100 have more.
SMALLEST_SHARED, A100_SHARED = 99 << 10, 163 << 10


@pytest.fixture(scope="module")
def kernels():
    try:
        return compile_cuda.compile_all(CAPABILITIES)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def passes(kernels):
    """The kernels that compute scores, by name, capability and head size."""
    found = {(x.name, x.capability): x for x in kernels}
    sizes = {key: re.search(r"\b(32|64|96|128)\b", key[0]) for key in found}
    return {(*key, int(size[0])): found[key] for key, size in sizes.items() if size}


def test_all_kernels_are_there(kernels, passes):
    """They are compiled here and launched by the host code."""
    names = {name for name, _, _ in passes}
    variants = {
        f"<{t}, {size}, {dropout}>"
        for t in ("Bfloat16", "Float16")
        for size in (32, 64, 96, 128)
        for dropout in ("false", "true")
    }
    assert {f"forward_kernel{variant}" for variant in variants} <= names
    assert [x.name for x in kernels if x.threads is None or x.shared is None] == []


def test_no_spills(kernels):
    """Without dropout only backward_key at head size 128 and forward in float16 spill a few registers."""
    spilled = {(x.name, x.capability): max(x.spill_stores, x.spill_loads) for x in kernels}
    few = ("backward_key_kernel<Bfloat16, 128", "backward_key_kernel<Float16, 128", "forward_kernel<Float16, 64")
    most = lambda name: 256 if ", true" in name else 32 if name.startswith(few) else 0
    assert {key: n for key, n in spilled.items() if n > most(key[0])} == {}


def test_shared_memory(passes):
    """Head sizes up to 64 fit every GPU from sm_80 on, and all head sizes fit the GPUs of data centres."""
    limits = {key: SMALLEST_SHARED if key[-1] <= 64 else A100_SHARED for key in passes}
    assert {key: x.shared for key, x in passes.items() if x.shared > limits[key]} == {}


# Measured on sm_90 with nvcc 13.0. Instructions are those of Bfloat16 and Float16, each without and with dropout;
# products on tensor cores are the same for all four.
INSTRUCTIONS = {
    "forward_kernel": {
        32: (5126, 6520, 5286, 6732),
        64: (6470, 7935, 6672, 8135),
        96: (5847, 6529, 5981, 6707),
        128: (6272, 6950, 6407, 7132),
    },
    "backward_key_kernel": {
        32: (5422, 6735, 5650, 6927),
        64: (6913, 8428, 7170, 8594),
        96: (5764, 6581, 5918, 6731),
        128: (6402, 7279, 6575, 7428),
    },
    "backward_query_kernel": {
        32: (6811, 7243, 6811, 7243),
        64: (8595, 9010, 8595, 9010),
        96: (7115, 7371, 7115, 7371),
        128: (7650, 7899, 7650, 7899),
    },
}
MMA = {
    "forward_kernel": {32: 212, 64: 424, 96: 408, 128: 544},
    "backward_key_kernel": {32: 272, 64: 544, 96: 432, 128: 576},
    "backward_query_kernel": {32: 224, 64: 448, 96: 264, 128: 352},
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions(passes, name):
    """Bounds the machine code of each kernel to 3 % above the measured counts.

    Counts are of whole kernels, each instruction once, in a loop or not. Far tiles compute only the two products of
    plain attention, so a position term that reaches their loops raises the number of products.
    """
    for size, counts in INSTRUCTIONS[name].items():
        flags = [(dtype, flag) for dtype in ("Bfloat16", "Float16") for flag in ("false", "true")]
        for (dtype, flag), expected in zip(flags, counts, strict=True):
            kernel = passes[f"{name}<{dtype}, {size}, {flag}>", 90, size]
            assert kernel.instructions <= 1.03 * expected, kernel
            assert kernel.mma == MMA[name][size], kernel


def test_nothing_spills_by_default(passes):
    assert not any(x.spill_stores for (name, *_), x in passes.items() if name.endswith("<Bfloat16, 64, false>"))


@pytest.mark.parametrize("oldest, others", [(80, [86, 89, 90]), (100, [120])])
def test_ptx_is_the_same_for_a_generation(oldest, others, tmp_path):
    """The PTX differs only in the line that names its target, so setup.py generates it once."""

    def ptx(capability):
        target, source = tmp_path / f"{capability}.ptx", compile_cuda.REPOSITORY / "csrc/cuda/backward_by_row.cu"
        command = [compile_cuda.find_tool("nvcc"), "-std=c++17", "-O3", "-ptx", f"-arch=compute_{capability}"]
        subprocess.run([*command, source, "-o", target], check=True)
        return target.read_text().replace(f".target sm_{capability}", ".target", 1)

    expected = ptx(oldest)
    assert len(expected) > 10000 and [capability for capability in others if ptx(capability) != expected] == []


def test_launches(tmp_path):
    """A launch asks for shared memory once per kernel and device, and reports its own errors."""
    replaced = ("GetDevice", "FuncSetAttribute", "LaunchKernelExC", "GetLastError", "PeekAtLastError")
    flags = ["-std=c++17", "-arch=sm_80", *(f"-Xlinker=--wrap=cuda{name}" for name in replaced)]
    source, folder = compile_cuda.EMULATOR / "launch_test.cu", compile_cuda.REPOSITORY / "csrc/cuda"
    program = tmp_path / "launch_test"
    subprocess.run([compile_cuda.find_tool("nvcc"), *flags, f"-I{folder}", source, "-o", program], check=True)
    assert subprocess.run([program], capture_output=True, text=True).stdout == "ok\n"
