"""The C++ backend beyond the named cases: instruction sets, threads, hidden keys, memory, refusals."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import BY_NAME, DROPOUT_SEED, TENSORS, Case, as_dtype, forward_and_gradients, make_inputs
from comparison import compare, public
from test_schema import BACKWARD, CHECKS, FORWARD

from deberta_fast import backends, disentangled_attention, disentangled_attention_varlen, release_memory
from deberta_fast.op import relative_position
from deberta_fast.op.backends import cpu, extension
from deberta_fast.op.call import Call

pytestmark = pytest.mark.skipif(cpu.NOT_LOADED is not None, reason=str(cpu.NOT_LOADED))

ROOT = Path(__file__).resolve().parents[2]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {"fp32": torch.float32} | HALF
RUNNABLE = cpu.instruction_sets()
PRODUCTS = ["amx", "avx512_bf16"]  # instruction sets with products of bfloat16

each_set = pytest.mark.parametrize("capability", RUNNABLE)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
each_half = pytest.mark.parametrize("dtype", HALF.values(), ids=list(HALF))


PACKED_OPTIONS = """cu_seqlens max_seqlen position_buckets max_relative_positions far_negative scale dropout_p
    query_offset first_slot""".split()


def attention(inputs: Call):
    """Calls the public function for dense or packed inputs."""
    if inputs.cu_seqlens is None:
        return public("cpu")(inputs)
    torch.manual_seed(DROPOUT_SEED)
    heads = [x.squeeze(0).transpose(0, 1) for x in inputs[:3]]
    options = {name: getattr(inputs, name) for name in PACKED_OPTIONS} | dict(return_lse=True, backend="cpu")
    mask = None if inputs.mask is None else inputs.mask[0, 0, 0]
    output, lse = disentangled_attention_varlen(*heads, *inputs[3:5], attention_mask=mask, **options)
    return output.transpose(0, 1)[None], lse[None]


def run(inputs: Call) -> dict[str, torch.Tensor]:
    return forward_and_gradients(attention, as_dtype(inputs, inputs.query.dtype))


def assert_equal(got, expected):
    """Asserts that results are equal bit for bit, except that 0 equals -0."""
    wrong = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert got.keys() == expected.keys() and not wrong, f"{', '.join(wrong)} differ"


# Instruction sets

EACH_PATH = """one-token L7-D8 ragged-L129-D64 ragged-L129-D64-c2p-only ragged-L129-D64-p2c-only ragged-L129-D64-neither
    far-L700 ms-rule-L300 v1-no-buckets-L200 left-padding-L200 holes-L200 whole-row-padded-L140 pairwise-mask-L150
    mask-per-head-L70 long-query-Lq300-Lk70 negative-offset-all-far table-window-L20 fused-qkv-views-L129-D24 D80-L65
    dropout-L140 no-keys""".split()
OTHER_SETS = [
    (name, dtype, capability)
    for capability in RUNNABLE[1:]  # the first is the one in use
    for dtype in DTYPES
    for name in (EACH_PATH if dtype == "fp32" else ["ragged-L129-D64", "holes-L200", "D80-L65"])
]


@pytest.mark.parametrize("name, dtype, capability", OTHER_SETS)
def test_other_instruction_sets(name, dtype, capability):
    with cpu.using(capability):
        compare(public("cpu"), BY_NAME[name], DTYPES[dtype], draws=3)


SHARED_ROWS = [
    Case("v3-table", 520, 520, batch=1, heads=1, size=24, buckets=256, longest=512),
    Case("v3-table-c2p", 150, 430, batch=1, heads=2, size=16, buckets=256, longest=512, offset=250, p2c=False),
    Case("v3-table-p2c", 430, 150, batch=1, heads=2, size=16, buckets=256, longest=512, mask="holes", c2p=False),
    Case("far-rows-alone", 70, 210, heads=1, size=16, buckets=256, longest=512, offset=-300, window=True),
    Case("three-rows", 193, 193, heads=1, size=16, buckets=2, longest=8, dropout_p=0.2),
    Case("rows-without-distances", 150, 150, heads=2, size=16, buckets=16, longest=10, mask="pairwise"),
]


@each_set
@pytest.mark.parametrize("case", SHARED_ROWS, ids=lambda case: case.name)
def test_distances_that_share_rows(case, capability):
    with cpu.using(capability):
        compare(public("cpu"), case, torch.float32, draws=2)


def in_a_process(code: str, **environment: str) -> str:
    command, environment = [sys.executable, "-W", "ignore", "-c", code], os.environ | environment
    return subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=-1, text=True, timeout=120).stdout


@pytest.mark.parametrize("asked, expected", [("avx2", "avx2"), ("default", "plain")])
def test_torch_chooses_the_instruction_set(asked, expected):
    if expected not in RUNNABLE:
        pytest.skip(f"this CPU has no {expected}")
    code = "from deberta_fast.op.backends import cpu; print(cpu.instruction_set())"
    assert in_a_process(code, ATEN_CPU_CAPABILITY=asked).strip() == expected


def test_unknown_instruction_set():
    with pytest.raises(RuntimeError, match="built without kernels for abacus"), cpu.using("abacus"):
        public("cpu")(make_inputs(BY_NAME["L7-D8"], torch.float32))


@each_set
@each_half
def test_half_precision_is_read_and_rounded_as_torch_does(dtype, capability):
    """A query that sees one key returns its value, and that value's gradient is the sum of the cotangents.

    Processors with products of bfloat16 take numbers below the smallest normal one for zero.
    """
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(64, 64, 1, 16)
    value = every.clone().requires_grad_()
    other = every.flatten()[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))].view_as(every)
    with cpu.using(capability):
        query = torch.zeros(64, 64, 2, 16, dtype=dtype)
        output = disentangled_attention(query, torch.zeros_like(every), value, backend="cpu")
        (grad,) = torch.autograd.grad(output, value, torch.cat([every, other], 2))
    flushes = dtype == torch.bfloat16 and capability in PRODUCTS
    normal = lambda x: x.masked_fill(x.abs() < torch.finfo(dtype).tiny, 0) if flushes else x
    both = normal(normal(every.float()) + normal(other.float())).to(dtype)
    for got, expected in ((output, normal(every).expand_as(output)), (grad, both)):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


# Threads. Backward is cut into two or three parts where heads are few and there are at least 384 queries and keys.


def packed(lengths, **options) -> Call:
    inputs = make_inputs(Case("", sum(lengths), sum(lengths), batch=1, **options), torch.float32)
    return inputs._replace(cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(), max_seqlen=max(lengths))


PACKED_IN_PARTS = [1, 460, 0, 30, 200, 2]
SHARED_OUT = {
    "one-head": lambda p: make_inputs(Case("", 400, 400, batch=1, heads=1, size=16, dropout_p=p), torch.float32),
    "three-parts": lambda p: make_inputs(Case("", 610, 590, batch=1, heads=2, size=8, dropout_p=p), torch.float32),
    "large-batch": lambda p: make_inputs(Case("", 130, 130, batch=9, size=8, dropout_p=p), torch.float32),
    "packed": lambda p: packed(PACKED_IN_PARTS, heads=2, size=16, dropout_p=p),
    "packed-short": lambda p: packed([7 * n % 40 for n in range(40)], size=8, dropout_p=p),
}


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("name", SHARED_OUT)
def test_threads_do_not_change_a_bit(name, dropout_p):
    inputs, results = SHARED_OUT[name](dropout_p), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(run(inputs))
    finally:
        torch.set_num_threads(1)
    for result in results[1:]:
        assert_equal(result, results[0])


PARTS = [
    Case("plain", 400, 400, batch=1, heads=2),
    Case("three", 600, 600, batch=1, heads=1, size=24),
    Case("right", 420, 420, heads=1, size=16, mask="right"),
    Case("left", 420, 420, heads=1, size=16, mask="left"),
    Case("a-part-hidden", 400, 400, batch=1, heads=2, size=16, mask="late"),
    Case("empty", 400, 400, heads=1, size=16, mask="empty"),
    Case("pairwise", 400, 390, batch=1, heads=2, size=16, mask="pairwise"),
    Case("blocks", 400, 400, batch=1, heads=2, size=16, mask="blocks"),
    Case("more-queries", 600, 390, heads=1, size=16, offset=-150),
    Case("more-keys", 390, 600, heads=1, size=16, offset=210),
    Case("v1-c2p", 400, 400, batch=1, heads=1, size=16, buckets=-1, longest=100, p2c=False),
    Case("p2c-dropout", 400, 400, batch=1, heads=2, size=16, c2p=False, dropout_p=0.2),
]
HALF_PARTS = ("three", "left", "a-part-hidden", "more-keys")


@pytest.mark.parametrize(
    "case, dtype",
    [(c, "fp32") for c in PARTS] + [(c, "bf16") for c in PARTS if c.name in HALF_PARTS],
    ids=lambda x: getattr(x, "name", x),
)
def test_parts(case, dtype):
    compare(public("cpu"), case, DTYPES[dtype])


# Hidden keys and NaN


@each_dtype
@pytest.mark.parametrize("mask", ["left", "holes", "empty", "pairwise", "late"])
@pytest.mark.parametrize("length", [200, 400])
def test_hidden_keys_do_not_matter(length, mask, dtype):
    inputs = make_inputs(Case("", length, length, heads=1, size=16, mask=mask), dtype)
    inputs.mask[..., 70:90] = False
    hidden = ~inputs.mask.any(2).expand(2, 1, length)
    huge, clean = 6e4 if dtype == torch.float16 else 1e30, run(inputs)
    inputs.key[hidden], inputs.value[hidden] = huge, -huge
    result = run(inputs)
    assert_equal(result, clean)
    assert (result["grad_key"][hidden] == 0).all() and (result["grad_value"][hidden] == 0).all()
    # The reference does not hide NaN either: grad_query and grad_pos_query contain dA_ij k_j.
    inputs.key[hidden] = torch.nan
    result = run(inputs)
    assert all(torch.equal(result[name], clean[name]) for name in clean if name not in ("grad_query", "grad_pos_query"))


@pytest.mark.parametrize("key", [0, 15, 16, 191, 192, 383, 384, 409])
def test_one_visible_key_is_found(key):
    """Each query returns the value of the only visible key, wherever the key lies in a tile."""
    inputs = make_inputs(Case("", 20, 410, heads=2, size=16), torch.float32)
    mask = (torch.arange(410) == key).expand(1, 1, 20, -1).contiguous()
    result = run(inputs._replace(mask=mask))
    expected = inputs.value[:, :, key : key + 1].expand_as(inputs.query)
    torch.testing.assert_close(result["output"], expected)
    assert result["grad_value"][:, :, key].any()


@each_set
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_not_a_number_spoils_what_it_meets_alone(backend, capability):
    inputs = make_inputs(Case("", 200, 200, size=16, mask="pairwise"), torch.float32)
    with cpu.using(capability):
        clean = public(backend)(inputs)
        inputs.query[0, 1, 17], inputs.query[1, 0, 100, 3], inputs.query[1, 2, 199] = torch.nan, torch.inf, -torch.inf
        inputs.key[0, 2, 190] = torch.nan
        spoiled = public(backend)(inputs)
    met = torch.zeros(2, 3, 200, dtype=torch.bool)
    met[0, 1, 17] = met[1, 0, 100] = met[1, 2, 199] = True
    met[0, 2] = inputs.mask[0, 0, :, 190]
    for x, expected in zip(spoiled, clean):
        assert x[met].isnan().all() and torch.equal(x[~met], expected[~met])


# Memory


def alone(function, *arguments):
    """Calls a function in a new thread, hence with scratch memory that no call has used."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *arguments).result()


@each_set
def test_scratch_memory_carries_nothing_over(capability):
    shapes = [(200, 200), (33, 400), (390, 410), (5, 7)]
    calls = [make_inputs(Case("", *lengths, size=17, mask="holes", dropout_p=0.1), torch.float32) for lengths in shapes]
    spoiled = make_inputs(Case("", 420, 420, size=40), torch.float32)
    spoiled = spoiled._replace(**{name: torch.full_like(getattr(spoiled, name), torch.nan) for name in TENSORS})
    with cpu.using(capability):
        after_others = alone(lambda: [(run(spoiled), run(inputs))[1] for inputs in calls])
        for inputs, result in zip(calls, after_others):
            assert_equal(result, alone(run, inputs))


def test_calls_from_several_threads():
    calls = [make_inputs(Case("", length, length, size=24), torch.float32) for length in (50, 130, 300, 410)] * 3
    with ThreadPoolExecutor(3) as pool:
        for inputs, result in zip(calls, pool.map(run, calls)):
            assert_equal(result, run(inputs))


@each_set
@each_dtype
@pytest.mark.parametrize("length, size", [(37, 1), (50, 19), (400, 7)])
def test_nothing_is_written_elsewhere(length, size, dtype, capability):
    inputs = make_inputs(Case("", length, length, heads=2, size=size), dtype)
    with cpu.using(capability):
        output, lse = backends.forward(inputs, "cpu")
        expected = [output, lse, *backends.backward(inputs, "cpu", output, lse, output, lse)]
        # The results' memory, and 24 elements on either side of each row, hold 7 before the call. The log-sum-exp and
        # the tables' gradients have to be contiguous, so each of them is one row.
        rows = [x if x.dim() == 4 else x.flatten() for x in expected]
        memory = [torch.full((*x.shape[:-1], 24 + x.shape[-1] + 24), 7, dtype=x.dtype) for x in rows]
        got = [x[..., 24:-24] if y.dim() == 4 else x[24:-24].view(y.shape) for x, y in zip(memory, expected)]
        cpu.forward(inputs, *got[:2])
        cpu.backward(inputs, output, lse, output, lse, got[2:])
    assert all(torch.equal(x, y) for x, y in zip(got, expected))
    assert all((x[..., :24] == 7).all() and (x[..., -24:] == 7).all() for x in memory)


def calls_of_two_lengths(backward: bool):
    def call(length):
        inputs = make_inputs(Case("", length, length, batch=1, heads=1, size=16), torch.float32)
        forward = lambda: public("cpu")(as_dtype(inputs, torch.float32))[0].sum()
        return (lambda: forward().backward()) if backward else forward

    call(300)()
    return [call(4096), call(8192)]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_grows_with_the_length_not_its_square(backward, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench.timing import peak_memory

    short, long = peak_memory(calls_of_two_lengths, backward)
    tensor = 4096 * 16 * 4
    assert short < 40 * tensor and long < 80 * tensor and long < 2.5 * short + tensor


LITTLE_MEMORY = """
import resource, torch
from pathlib import Path
from deberta_fast import disentangled_attention
torch.set_num_threads(2)
x = torch.randn(1, 4, 8, 64, requires_grad=True)
call = lambda keys: disentangled_attention(x, *[x[:, :, :1].expand(-1, -1, keys, -1)] * 2, backend="cpu")
small, = torch.autograd.grad(call(100).sum(), x)
output = call({keys}) if {backward} else None
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (in_use + {room}, before[1]))
try:
    output.sum().backward() if {backward} else call({keys})
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, before)
assert torch.equal(torch.autograd.grad(call(100).sum(), x)[0], small)
"""


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_that_is_not_there(backward):
    """The error states the missing bytes, and later calls are right."""
    keys, room = (2**16, 200 << 20) if backward else (2**20, 100 << 20)
    said = in_a_process(LITTLE_MEMORY.format(backward=backward, keys=keys, room=room))
    assert re.fullmatch(
        r"deberta_fast: out of memory: the CPU kernels need \d{8,} bytes more for one thread\n", said
    ), said


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
def test_strides_past_32_bits(dim):
    """This takes little memory where the system does not commit pages that are never accessed."""
    inputs = make_inputs(Case("", 17, 17, size=16, mask="heads"), torch.bfloat16)
    inputs = inputs._replace(mask=inputs.mask.expand(2, -1, -1, -1).contiguous())
    try:
        numbers, flags = (torch.empty(2**31 + 2**24, dtype=dtype) for dtype in (torch.bfloat16, torch.bool))
    except RuntimeError:
        pytest.skip("the system does not promise so much memory")

    def spread(x, memory, offset):
        strides = [2**31 // (x.shape[d] - 1) + 8 if d == dim else stride for d, stride in enumerate(x.stride())]
        return memory.as_strided(x.shape, strides, offset).copy_(x)

    heads = {name: spread(getattr(inputs, name), numbers, 4096 * n) for n, name in enumerate(TENSORS[:3])}
    assert_equal(run(inputs._replace(**heads, mask=spread(inputs.mask, flags, 0))), run(inputs))


# Refusals

ABSENT = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "deberta_fast._C":
            raise {error}
sys.meta_path.insert(0, Finder())
import torch, deberta_fast
q = torch.randn(1, 2, 5, 16)
default, eager = (deberta_fast.disentangled_attention(q, q, q, backend=name) for name in (None, "eager"))
assert torch.equal(default, eager)
try:
    deberta_fast.disentangled_attention(q, q, q, backend="cpu")
except RuntimeError as error:
    print(error)
"""
NOT_BUILT = ("ModuleNotFoundError('no', name=name)", "was not built (pip install -v says why)")
BROKEN = ("ImportError('undefined symbol: x', name=name, path='_C.so')", "does not load: undefined symbol: x")


@pytest.mark.parametrize("error, reason", [NOT_BUILT, BROKEN], ids=["not-built", "broken"])
def test_without_the_extension(error, reason):
    said = in_a_process(ABSENT.format(error=error)).strip()
    assert said == f"backend 'cpu' cannot serve this call: the extension deberta_fast._C {reason}"


def test_refusals():
    inputs = make_inputs(BY_NAME["L7-D8"], torch.float64)
    with pytest.raises(RuntimeError, match="'cpu' cannot serve this call: dtype must be float32, .* got torch.float64"):
        public("cpu")(inputs)
    elsewhere = inputs._replace(query=inputs.query.float().to("meta"))
    assert backends.why_not(elsewhere)["cpu"] == ["tensors must be on the CPU, got meta"]


# Use by torch


@pytest.mark.parametrize("name", ["ragged-L129-D64-c2p-only", "fused-qkv-views-L129-D24", "mask-per-head-L70"])
def test_opcheck(name):
    inputs = make_inputs(BY_NAME[name], torch.float32)
    torch.library.opcheck(FORWARD, (*inputs, "cpu"), test_utils=CHECKS)
    output, lse = backends.forward(inputs, "cpu")
    torch.library.opcheck(BACKWARD, (output, lse, output, lse, *inputs, "cpu", [True] * 5), test_utils=CHECKS)
    own = extension.fused_forward, (output, lse, *extension.arguments(inputs))
    torch.library.opcheck(*own, test_utils="test_schema")


OPTIONS = dict(position_buckets=16, max_relative_positions=32, backend="cpu")


def test_compiled():
    torch._dynamo.reset()
    function = lambda *tensors, mask: disentangled_attention(*tensors, **OPTIONS, attention_mask=mask, return_lse=True)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for length in (40, 150):
        inputs = as_dtype(make_inputs(Case("", length, length, size=16, mask="holes"), torch.float32), torch.float32)
        got, expected = (f(*inputs[:5], mask=inputs.mask) for f in (compiled, function))
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        grads = [torch.autograd.grad(output.square().sum() + lse.sum(), inputs[:5]) for output, lse in (got, expected)]
        torch.testing.assert_close(*grads)


def test_inference_mode_first():
    relative_position._on_devices.clear()
    inputs = make_inputs(BY_NAME["L7-D8"], torch.float32)
    with torch.inference_mode():
        output, lse = public("cpu")(inputs)
    result = run(inputs)
    assert torch.equal(output, result["output"]) and torch.equal(lse, result["lse"])


@pytest.mark.parametrize("name", TENSORS)
def test_gradient_of_one_tensor_alone(name):
    inputs = make_inputs(BY_NAME["holes-L200"], torch.float32)
    one = inputs._replace(**{name: getattr(inputs, name).clone().requires_grad_()})
    grads = [
        torch.autograd.grad(public("cpu")(x)[0].sum(), getattr(x, name))[0]
        for x in (one, as_dtype(inputs, torch.float32))
    ]
    assert torch.equal(*grads)


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 3, 0, 8)], ids=["batch", "heads", "length"])
def test_nothing_to_attend(shape):
    query, tables = torch.randn(shape, requires_grad=True), torch.randn(2, shape[1], 32, 8, requires_grad=True)
    output = disentangled_attention(query, query, query, *tables, **OPTIONS)
    output.sum().backward()
    assert output.shape == query.grad.shape == shape and (tables.grad == 0).all()


def test_kept_memory_is_released():
    """A thread keeps scratch memory for its next calls, at most 64 MiB, until it is asked to free it."""
    for length, heads in ((129, 2), (3000, 8)):
        query, key, value, gradient = torch.randn(4, 1, heads, length, 64).unbind(0)
        tables = torch.randn(2, heads, 512, 64).unbind(0)
        leaves = [x.requires_grad_() for x in (query, key, value, *tables)]
        expected = None
        for _ in range(3):  # on fresh memory, on kept memory, and on fresh memory again
            output = disentangled_attention(*leaves, backend="cpu")
            found = [output, *torch.autograd.grad(output, leaves, gradient)]
            assert expected is None or all(map(torch.equal, found, expected))
            if expected is not None:
                assert 0 <= release_memory() <= 64 << 20 and release_memory() == 0
            expected = found
    disentangled_attention(*leaves, backend="cpu")
    assert release_memory() > 0
