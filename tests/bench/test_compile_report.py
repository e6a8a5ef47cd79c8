"""The compile report counts what is in a kernel: checked on kernels of which that is known."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from bench import compile_cuda  # noqa: E402
from bench.compile_report import SHARED_LIMIT, Planned, _source, compile_all, row  # noqa: E402

CAPABILITIES = (80, 90, 100)
M, N, D = 128, 64, 64


@triton.jit
def tile(tensor, row, column, stride):
    return tl.load(tensor + row[:, None] * stride + column[None, :])


@triton.jit(do_not_specialize=["length"])
def attend(
    queries, keys, values, bias, slots, output, first, length, stride, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr
):
    """Attention of one block of queries; with ``bias``, every score gets an element that it gathers."""
    m = tl.program_id(0) * M + tl.arange(0, M)
    d = tl.arange(0, D)
    q = tile(queries, m, d, stride)
    row_max, row_sum, out = tl.full([M], -1e30, tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, D], tl.float32)
    for start in range(first, length, N):
        n = start + tl.arange(0, N)
        scores = tl.dot(q, tile(keys, n, d, stride).T)
        if bias is not None:
            slot = tl.load(slots + m[:, None] - n[None, :])
            scores += tl.load(bias + m[:, None] * 512 + slot)
        new = tl.maximum(row_max, tl.max(scores, 1))
        alpha = tl.exp2(row_max - new)
        weights = tl.exp2(scores - new[:, None])
        v = tile(values, n, d, stride)
        out = tl.dot(weights.to(v.dtype), v, out * alpha[:, None])
        row_max, row_sum = new, row_sum * alpha + tl.sum(weights, 1)
    tl.store(output + m[:, None] * stride + d[None, :], (out / row_sum[:, None]).to(tl.bfloat16))


def tensors(*names, dtype=torch.bfloat16):
    return {name: torch.empty(1, dtype=dtype, device="meta") for name in names}


def launch(warps, rows=M, gathers=False):
    bias = tensors("bias") | tensors("slots", dtype=torch.int32) if gathers else dict(bias=None, slots=None)
    given = tensors("queries", "keys", "values", "output") | bias | dict(first=256, length=512, stride=D)
    return SimpleNamespace(kernel=attend, arguments=given | dict(M=rows, N=N, D=D), warps=warps, stages=2)


def planned(capability):
    yield Planned("gathers", launch(warps=8, gathers=True))
    yield Planned("plain", launch(warps=8))
    yield Planned("spills", launch(warps=1, rows=64))


@pytest.fixture(scope="module")
def compiled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # must not reach the compiler
        return compile_all(planned, CAPABILITIES)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_counts(compiled, capability):
    plain, gathers = compiled["plain", capability], compiled["gathers", capability]
    assert gathers.mma == plain.mma > 0
    assert plain.narrow_loads == 0
    scores = M * N // (32 * gathers.warps)
    # A thread gathers each score on its own, in every copy that the compiler makes of the loop.
    assert gathers.narrow_loads >= scores and gathers.narrow_loads % scores == 0
    assert gathers.instructions > plain.instructions + 5 * scores
    assert plain.instructions > 8 * scores
    assert plain.shared < SHARED_LIMIT[capability]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_registers_and_spills(compiled, capability):
    fits, spills = compiled["plain", capability], compiled["spills", capability]
    assert 64 < fits.registers <= 255
    assert fits.spill_stores == fits.spill_loads == fits.stack == 0
    assert min(spills.spill_stores, spills.spill_loads, spills.stack) > 0


def test_table(compiled):
    table = [row(label, sm, 32 * x.warps, x) for (label, sm), x in compiled.items()]
    assert {(line["kernel"], line["sm"]) for line in table} == set(compiled)
    assert all(line["instructions"] > line["mma"] > 0 and line["shared KiB"] > 1 for line in table)


@pytest.mark.skipif(not isinstance(attend, triton.JITFunction), reason="TRITON_INTERPRET is set")
def test_specialization():
    """Arguments specialise a kernel as at a launch: 1 and None become constants, and multiples of 16 are marked."""
    given = launch(warps=4)
    given.arguments |= dict(first=1, length=512, stride=7)
    source = _source(given, triton.backends.compiler.GPUTarget("cuda", 90, 32))
    names = list(given.kernel.arg_names)
    assert source.signature["queries"] == "*bf16" and source.signature["length"] == source.signature["stride"] == "i32"
    constants = {names[i]: value for (i,), value in source.constants.items()}
    assert constants == dict(bias=None, slots=None, first=1, M=M, N=N, D=D)
    aligned = {names[i] for (i,), found in source.attrs.items() if ["tt.divisibility", 16] in found}
    assert aligned == {"queries", "keys", "values", "output"}


CODE = """
\t\tFunction : first
        /*0000*/                   S2R R0, SR_TID.X ;                 /* 0x0000000000007919 */
                                                                      /* 0x000e220000002100 */
        /*0010*/              @!P1 LDG.E.U16.CONSTANT R1, desc[UR4][R2.64] ;
        /*0020*/              @UP0 UMOV UR4, UR5 ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/                   NOP;
\t\tFunction : second
        /*0000*/                   EXIT ;
"""


def test_opcodes():
    """They are counted with their modifiers, whatever predicate stands before; padding is not."""
    first, second = compile_cuda.count_opcodes(CODE).values()
    expected = {"S2R": 1, "LDG.E.U16.CONSTANT": 1, "UMOV": 1, "HMMA.16816.F32.BF16": 2}
    assert first == Counter(expected) and second == Counter(EXIT=1)
    assert compile_cuda.count_mma(first) == 2 and compile_cuda.count_mma(second) == 0
