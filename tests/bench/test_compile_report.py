"""The compile report tells what is in a kernel: on kernels of which that is known."""

import functools
import inspect
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from bench import compile_cuda, sass  # noqa: E402
from bench.compile_report import SHARED_LIMIT, Planned, _source, compile_all, rows  # noqa: E402

CAPABILITIES = (80, 90, 100)
TILE = (128, 64)


@triton.jit
def tile(tensor, row, column, stride):
    return tl.load(tensor + row[:, None] * stride + column[None, :])


@triton.jit
def attend(scores, value, top, total, out):
    new = tl.maximum(top, tl.max(scores, 1))
    fade = tl.exp2(top - new)
    weights = tl.exp2(scores - new[:, None])
    out = tl.dot(weights.to(value.dtype), value, out * fade[:, None])
    return new, total * fade + tl.sum(weights, 1), out


@triton.jit
def plain(q, keys, values, m, d, first, last, stride, top, total, out, N: tl.constexpr):
    for start in range(first, last, N):
        n = start + tl.arange(0, N)
        scores = tl.dot(q, tile(keys, n, d, stride).T)
        top, total, out = attend(scores, tile(values, n, d, stride), top, total, out)
    return top, total, out


@triton.jit
def gathering(q, keys, values, bias, slots, m, d, first, last, stride, top, total, out, N: tl.constexpr):
    for start in range(first, last, N):
        n = start + tl.arange(0, N)
        slot = tl.load(slots + m[:, None] - n[None, :])
        scores = tl.dot(q, tile(keys, n, d, stride).T) + tl.load(bias + m[:, None] * 512 + slot)
        top, total, out = attend(scores, tile(values, n, d, stride), top, total, out)
    return top, total, out


@triton.jit(do_not_specialize=["length"])
def forward(
    queries,
    keys,
    values,
    bias,
    slots,
    output,
    middle,
    length,
    stride,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    m = tl.program_id(0) * M + tl.arange(0, M)
    d = tl.arange(0, D)
    q = tile(queries, m, d, stride)
    top, total, out = tl.full([M], -1e30, tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, D], tl.float32)
    top, total, out = plain(q, keys, values, m, d, 0, middle, stride, top, total, out, N)
    if bias is not None:
        top, total, out = gathering(q, keys, values, bias, slots, m, d, middle, length, stride, top, total, out, N)
    tl.store(output + m[:, None] * stride + d[None, :], (out / total[:, None]).to(tl.bfloat16))


@triton.jit
def backward(
    queries, keys, values, douts, lses, dkeys, dvalues, length, heads, stride, M: tl.constexpr, D: tl.constexpr
):
    """Its scores' gradient lacks what is subtracted: the report sees the same loop."""
    n = tl.program_id(0) * M + tl.arange(0, M)
    d = tl.arange(0, D)
    for head in range(heads):
        k = tile(keys + head * D, n, d, stride)
        v = tile(values + head * D, n, d, stride)
        dk, dv = tl.zeros([M, D], tl.float32), tl.zeros([M, D], tl.float32)
        for start in range(0, length, M):
            m = start + tl.arange(0, M)
            q = tile(queries + head * D, m, d, stride)
            do = tile(douts + head * D, m, d, stride)
            p = tl.exp2(tl.dot(k, q.T) - tl.load(lses + m)[None, :])
            dv = tl.dot(p.to(do.dtype), do, dv)
            dk = tl.dot((p * tl.dot(v, do.T)).to(q.dtype), q, dk)
        tl.store(dkeys + head * D + n[:, None] * stride + d[None, :], dk.to(tl.bfloat16))
        tl.store(dvalues + head * D + n[:, None] * stride + d[None, :], dv.to(tl.bfloat16))


@triton.jit
def total(values, output, length, N: tl.constexpr):
    x = tl.arange(0, N)
    partial = tl.zeros([N], tl.float32)
    for start in range(0, length, N):
        partial += tl.exp2(tl.load(values + start + x).to(tl.float32))
    tl.store(output + x, partial.to(tl.bfloat16))


def tensors(*names, dtype=torch.bfloat16):
    return {name: torch.empty(1, dtype=dtype, device="meta") for name in names}


def launch(kernel, warps=4, stages=2, **arguments):
    return SimpleNamespace(kernel=kernel, arguments=arguments, warps=warps, stages=stages)


def attention(M, N, D, gathers, warps):
    bias = tensors("bias") | tensors("slots", dtype=torch.int32) if gathers else dict(bias=None, slots=None)
    given = tensors("queries", "keys", "values", "output") | bias
    return launch(forward, warps, **given, middle=256, length=512, stride=D, M=M, N=N, D=D)


def planned(capability):
    yield Planned("gathers", attention(*TILE, 64, True, 8), TILE)
    yield Planned("plain", attention(*TILE, 64, False, 4), TILE)
    yield Planned("spills", attention(64, 64, 64, False, 1), (64, 64))
    given = tensors("queries", "keys", "values", "douts", "dkeys", "dvalues") | tensors("lses", dtype=torch.float32)
    yield Planned("backward", launch(backward, **given, length=512, heads=12, stride=768, M=64, D=64), (64, 64))
    yield Planned("unrolled", launch(total, **tensors("values", "output"), length=4096, N=256), (1, 256))


@pytest.fixture(scope="module")
def compiled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # must not reach the compiler
        return {job: result for job, (result, _) in compile_all(planned, CAPABILITIES).items()}


def line_of(function, text):
    """Number of the first line of ``function`` in this file that contains ``text``."""
    lines, start = inspect.getsourcelines(function.fn)
    return start + next(i for i, line in enumerate(lines) if text in line)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_loops_belong_to_their_functions(compiled, capability):
    loops = compiled["gathers", capability].loops
    expected = [(f.__name__, line_of(f, "for start"), line_of(forward, f.__name__ + "(")) for f in (plain, gathering)]
    assert [(x.function, x.line, x.kernel_line) for x in loops] == expected
    assert [x.unrolled for x in loops] == [1, 1]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_contents_of_loops(compiled, capability):
    whole = compiled["gathers", capability]
    fast, slow = whole.loops
    assert fast.mma > 0 and slow.mma == fast.mma
    assert fast.async_copies > 0  # of the keys and values
    assert fast.narrow_loads == 0 and fast.global_loads == 0
    scores = TILE[0] * TILE[1] // (32 * whole.warps)
    assert slow.narrow_loads == scores  # a thread's, each gathered alone
    assert slow.per_score(*TILE, whole.warps) > 5 + fast.per_score(*TILE, whole.warps)
    assert 8 < fast.per_score(*TILE, whole.warps) < 25
    assert whole.shared < SHARED_LIMIT[capability]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_loop_of_the_kernel_itself(compiled, capability):
    """Around it is the loop over heads, which is left out."""
    [loop] = compiled["backward", capability].loops
    line = line_of(backward, "for start")
    assert (loop.function, loop.line, loop.kernel_line) == ("backward", line, line)
    assert loop.mma > 0 and loop.async_copies > 0 and loop.global_stores == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_registers_and_spills(compiled, capability):
    fits, spills = compiled["plain", capability], compiled["spills", capability]
    assert 64 < fits.registers <= 255
    assert fits.spill_stores == fits.spill_loads == fits.stack == fits.loops[0].spills == 0
    assert min(spills.spill_stores, spills.spill_loads, spills.stack, spills.loops[0].spills) > 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_unrolled_loop(compiled, capability):
    [loop] = compiled["unrolled", capability].loops
    assert loop.unrolled > 1
    assert loop.per_score(1, 256, warps=4) == loop.instructions * 4 * 32 / (256 * loop.unrolled)


def test_table(compiled):
    table = [row for (label, sm), x in compiled.items() for row in rows(label, sm, x, TILE)]
    assert len(table) == sum(len(x.loops) for x in compiled.values())
    assert {(row["kernel"], row["sm"]) for row in table} == set(compiled)


@pytest.mark.skipif(not isinstance(forward, triton.JITFunction), reason="TRITON_INTERPRET is set")
def test_specialization():
    """As at a launch: 1 and None become constants, multiples of 16 are known as such, unless not to be specialised."""
    given = attention(*TILE, 64, False, 4)
    given.arguments |= dict(middle=1, length=512, stride=7)
    source = _source(given, triton.backends.compiler.GPUTarget("cuda", 90, 32))
    names = list(given.kernel.arg_names)
    assert source.signature["queries"] == "*bf16" and source.signature["length"] == source.signature["stride"] == "i32"
    constants = {names[i]: value for (i,), value in source.constants.items()}
    assert constants == dict(bias=None, slots=None, middle=1, M=TILE[0], N=TILE[1], D=64)
    aligned = {names[i] for (i,), found in source.attrs.items() if ["tt.divisibility", 16] in found}
    assert aligned == {"queries", "keys", "values", "output"}


def test_code_out_of_line():
    """What a loop jumps to and comes back from is part of it; waiting is not a loop; a call may leave one."""
    code = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR16], R4 ;
        /*0020*/              @!P1 BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/               @P2 BRA `(.L_x_3) ;
.L_x_4:
        /*0040*/                   LDG.E.U16.CONSTANT R1, desc[UR4][R2.64] ;
        /*0050*/               @P0 CALL.REL.NOINC `(.L_x_6) ;
        /*0058*/                   BRA `(.L_x_0) ;
.L_x_6:
        /*0060*/                   BRA.U UP0, `(.L_x_6) ;
        /*0068*/                   EXIT ;
.L_x_2:
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR16], R4 ;
        /*0080*/              @!P1 BRA `(.L_x_2) ;
        /*0090*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*00a0*/                   STS.128 [R3], R4 ;
        /*00b0*/                   BRA `(.L_x_4) ;
.L_x_5:
        /*00c0*/                   BRA `(.L_x_5);
"""
    instructions, labels = sass.parse(code)
    assert len(instructions) == 15
    body, one = sass.innermost_loops(instructions, labels)
    expected = ["SYNCS", "BRA", "BRA", "LDG", "CALL", "BRA", "BRA", "STS", "BRA"]
    assert [instructions[i].name for i in body] == expected
    assert [instructions[i].opcode for i in one] == ["BRA.U"]


CUDA_SOURCE = """
DEVICE void hide(float (&scores)[4]) {
  scores[0] = 0;
}
DEVICE void band(int turn) {
  for (int item = turn; item < blocks; item += 4) {
    write(item);
  }
  UNROLL
  for (int i = 0; i < 4; ++i) other(i);
}
KERNEL(128, 1) some_kernel(const Call call) {
  while (tile < end) {
    band(tile);
    if (seen != all) hide(scores);
    multiply();
    if (call.visible != nullptr) {
      look();
    }
    copy();
  }
}
"""
CUDA_CODE = """
.text.kernel:
	//## File "some/folder/some.cu", line 12
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
	//## File "some/folder/some.cu", line 7 inlined at "some/folder/some.cu", line 14
	//## File "some/folder/some.cu", line 14
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
	//## File "some/folder/some.cu", line 12
        /*0030*/                   EXIT ;
"""


def test_lines_of_cuda():
    """Through inlined functions, the innermost one first; they stay until others are named."""
    instructions, _ = sass.parse(CUDA_CODE)
    inlined = (("some.cu", 7), ("some.cu", 14))
    assert [i.frames for i in instructions] == [(("some.cu", 12),), inlined, inlined, (("some.cu", 12),)]
    assert [i.ptx_line for i in instructions] == [None] * 4


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "some.cu"
    path.write_text(CUDA_SOURCE)
    return compile_cuda.Source([path])


def made_at(*lines):
    """An instruction that comes from these lines."""
    return sass.Instruction("FADD", None, True, tuple(("some.cu", line) for line in lines))


def test_statements_of_cuda(source):
    assert [(str(s), len(s.lines)) for s in source.loops] == [("some.cu:6", 3), ("some.cu:13", 9)]
    assert str(source.loop([made_at(7, 14), made_at(6, 14), made_at(14)])) == "some.cu:6"
    assert str(source.loop([made_at(7, 14), made_at(16), made_at(14)])) == "some.cu:13"
    assert source.loop([made_at(12)]) is None
    rare = [made_at(3, 15), made_at(18)]
    common = [made_at(15), made_at(17), made_at(20), made_at(10, 14)]
    assert all(map(source.is_rare, rare)) and not any(map(source.is_rare, common))


def test_common_iteration():
    """Rare code is passed by, unless there is no other way; of other branches the longer one is taken."""
    code = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_head:
        /*0010*/                   FADD R0, R0, R1 ;
.L_inner:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0030*/               @P0 BRA `(.L_inner) ;
        /*0040*/               @P1 BRA `(.L_long) ;
        /*0050*/                   BRA `(.L_join) ;
.L_long:
        /*0060*/                   FMUL R0, R0, R1 ;
        /*0070*/                   FMUL R0, R0, R1 ;
.L_join:
        /*0080*/               @P2 BRA `(.L_rare) ;
.L_after:
        /*0090*/                   MUFU.EX2 R0, R0 ;
        /*00a0*/                   MUFU.RCP R0, R0 ;
        /*00b0*/                   NOP ;
        /*00c0*/               @P3 BRA `(.L_head) ;
        /*00d0*/                   EXIT ;
.L_rare:
        /*00e0*/                   FSEL R0, R0, R1, P2 ;
        /*00f0*/                   BRA `(.L_after) ;
"""
    flow = sass.Flow.of(*sass.parse(code))
    head, inner = sorted(flow.loops)
    assert flow.inside(head) == [inner] and flow.inside(inner) == []
    iteration = functools.partial(flow.iteration, head, trips=lambda loop: 2.5 if loop == inner else 1)
    executed = {}
    is_out_of_line = lambda x: x.name == "FSEL" or x.target == ".L_after"
    for i, times in iteration(is_out_of_line).items():
        executed[flow.instructions[i].name] = executed.get(flow.instructions[i].name, 0) + times
    # The branches: two of the inner loop and a half, and three.
    assert executed == {"FADD": 1, "HMMA": 2.5, "BRA": 5.5, "FMUL": 2, "MUFU": 2}
    assert sum(iteration(lambda x: False).values()) == 13 + 2
    # What every iteration has to pass counts, rare or not.
    assert sum(iteration(lambda x: is_out_of_line(x) or x.name == "MUFU").values()) == 13
