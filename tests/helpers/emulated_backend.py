"""The CUDA backend on the emulator, for the tests that test_cuda.py runs in processes of its own.

There the operators of the GPU run on CPU tensors. The emulator reports races and accesses out of bounds in shared
memory, and lanes that do not meet, as errors.
"""

import ctypes
import os
from dataclasses import replace

import emulated
import pytest
import torch
from cases import BY_NAME, Case, as_dtype, forward_and_gradients, make_inputs
from comparison import public

LIBRARY = os.environ["EMULATED_LIBRARY"]
library = emulated.load(LIBRARY)
# The environment may limit backward to one head at a time. 0 is the default.
NEAR_BYTES = int(os.environ.get("NEAR_BYTES", 0))
torch.ops.deberta_fast_emulated.limit_near_bytes(NEAR_BYTES)
emulator = ctypes.CDLL(LIBRARY)
emulator.emulator_conflicts.restype = emulator.emulator_barrier_site.restype = ctypes.c_char_p

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
TABLE = dict(position_buckets=16, max_relative_positions=32)
each_half = pytest.mark.parametrize("dtype", HALF.values(), ids=list(HALF))


def one_half(argument: str, values, both=()):
    """Parametrizes a test with values, or their names, and a dtype each; those named in ``both`` get both.

    The kernels of both dtypes are one template and differ in conversions and the products' instruction only.
    """
    parameters = []
    for number, value in enumerate(values):
        name = getattr(value, "name", value)
        for short in HALF if name in both else [list(HALF)[number % 2]]:
            parameters.append(pytest.param(value, HALF[short], id=f"{name}-{short}"))
    return pytest.mark.parametrize(f"{argument}, dtype", parameters)


def emulate(seed=1, check_races=True, count_conflicts=False, skip_barrier=-1):
    """Sets the emulator's options; ``seed`` determines the order in which blocks, warps and lanes run."""
    emulator.emulator_options(ctypes.c_uint64(seed), check_races, count_conflicts, skip_barrier)


@pytest.fixture(autouse=True)
def usual_emulator():
    emulate()
    yield
    emulate()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that was never written, also the workspace, reads as NaN, so that tests notice a kernel that reads it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def quick(name_or_case) -> Case:
    """The case with two heads if it has three."""
    case = BY_NAME[name_or_case] if isinstance(name_or_case, str) else name_or_case
    return replace(case, heads=2 if case.heads == 3 else case.heads)


def draws(case) -> int:
    if case.query_length * case.key_length < 100**2 and case.heads <= 3:
        return 4
    return 2 if case.key_length < 250 else 1


def run(name_or_case, dtype=torch.bfloat16, change=lambda inputs: inputs):
    inputs = change(make_inputs(quick(name_or_case), dtype))
    return forward_and_gradients(public("cuda"), as_dtype(inputs, dtype))


def assert_equal(got, expected, rows=...):
    assert got.keys() == expected.keys()
    assert all(torch.equal(x[rows], expected[name][rows]) for name, x in got.items())
