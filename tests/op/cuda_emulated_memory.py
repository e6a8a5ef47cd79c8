"""Memory of the CUDA kernels on the emulator: layouts, barriers, bank conflicts, sizes. test_cuda.py runs this file."""

import ctypes
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import TENSORS, Case, as_dtype, forward_and_gradients, make_inputs
from comparison import public
from emulated_backend import (  # noqa: F401
    NEAR_BYTES,
    TABLE,
    assert_equal,
    each_half,
    emulate,
    emulator,
    poisoned_memory,
    quick,
    run,
    usual_emulator,
)

import deberta_fast
from deberta_fast import disentangled_attention
from deberta_fast.op import backends
from deberta_fast.op.backends import cuda
from deberta_fast.op.relative_position import slot_table

SOURCES = Path(__file__).parents[2] / "csrc/cuda"


# Memory layouts


@contextmanager
def near_bytes(limit):
    torch.ops.deberta_fast_emulated.limit_near_bytes(limit)
    try:
        yield
    finally:
        torch.ops.deberta_fast_emulated.limit_near_bytes(NEAR_BYTES)


def test_one_head_at_a_time():
    """Backward takes one head at a time where dA of more heads would exceed the limit. Results are the same."""
    usual = run("holes-L200")
    with near_bytes(1):
        assert_equal(run("holes-L200"), usual)


def test_sums_of_some_heads():
    """The gradients by distance of so many heads exceed their limit. Those of each launch are added to rows at once."""
    case = Case("", 5, 5, batch=1, heads=340, size=16)
    with near_bytes(0):
        usual = run(case)
    with near_bytes(100 * 128 * 128 * 2):
        emulator.emulator_clear_counts()
        assert_equal(run(case), usual)
    assert emulator.emulator_launches() == 2 + 1 + 4 * 3


def launches(case, limit=0):
    emulator.emulator_clear_counts()
    with near_bytes(limit):
        run(case)
    return emulator.emulator_launches()


def test_number_of_launches():
    """Forward prepares and attends. Backward prepares, has two launches for each part of the heads, and adds rows."""
    case = Case("", 150, 150, batch=1, heads=2, mask="right")
    assert launches(case) == 2 + 4
    assert launches(case, 1) == 2 + 6
    assert launches(replace(case, c2p=False, p2c=False, mask=None)) == 1 + 3


def test_backward_waits_late_for_copies():
    """While a copy is under way, a warp multiplies; it waits at once only where a segment begins.

    A block waits for its first tile, and backward_query once more for each other segment.
    """
    for size in (64, 128):
        inputs = make_inputs(Case("", 700, 700, batch=1, heads=1, size=size), torch.bfloat16)  # 22 tiles
        inputs = as_dtype(inputs, torch.bfloat16)
        output, _ = public("cuda")(inputs)
        emulator.emulator_clear_counts()
        torch.autograd.grad(output.sum(), [getattr(inputs, name) for name in TENSORS])
        assert emulator.emulator_exposed_waits() <= 3


def test_views_of_a_projection_are_not_copied():
    inputs = make_inputs(quick("fused-qkv-views-L129-D24"), torch.bfloat16)
    assert not inputs.query.is_contiguous()
    assert all(cuda._aligned(x) is x for x in inputs[:5])


@each_half
def test_rows_that_are_not_aligned(dtype):
    """They are copied, so that kernels can move 16 bytes at once."""

    def shifted(x):
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)

    def spread(x):
        return torch.nn.functional.pad(x, (0, 1))[..., :-1]

    def transposed(x):
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)

    usual = run("ragged-L129-D64", dtype)
    for change in (shifted, spread, transposed):
        changed = make_inputs(quick("ragged-L129-D64"), dtype)
        changed = changed._replace(**{name: change(getattr(changed, name)) for name in TENSORS})
        leaves = changed._replace(**{name: getattr(changed, name).requires_grad_() for name in TENSORS})
        assert_equal(forward_and_gradients(public("cuda"), leaves), usual)


@each_half
def test_cotangents_of_any_layout(dtype):
    """Cotangents may be one expanded number, as from a sum, or transposed, or given for only one of the two results."""
    inputs = as_dtype(make_inputs(quick("ragged-L129-D64"), dtype), dtype)
    leaves = [getattr(inputs, name) for name in TENSORS]
    output, lse = public("cuda")(inputs)

    def assert_same_gradients(outputs, one, other):
        for x, y in zip(
            *(torch.autograd.grad(outputs, leaves, cotangent, retain_graph=True) for cotangent in (one, other))
        ):
            assert x.isfinite().all() and torch.equal(x, y)

    ones, random = torch.ones_like(output), torch.randn_like(output)
    assert_same_gradients(output, torch.ones((), dtype=dtype).expand_as(output), ones.contiguous())
    assert_same_gradients(output, random.mT.contiguous().mT, random.contiguous())
    assert_same_gradients(lse, torch.ones(()).expand_as(lse), torch.ones_like(lse))
    assert_same_gradients(
        [output, lse], [random, torch.zeros_like(lse)], [random.contiguous(), torch.zeros(()).expand_as(lse)]
    )


@pytest.mark.parametrize("name", TENSORS)
def test_gradient_of_one_tensor_alone(name):
    inputs = make_inputs(quick("holes-L200"), torch.bfloat16)
    one = inputs._replace(**{name: getattr(inputs, name).clone().requires_grad_()})
    grads = [
        torch.autograd.grad(public("cuda")(x)[0].sum(), getattr(x, name))[0]
        for x in (one, as_dtype(inputs, torch.bfloat16))
    ]
    assert torch.equal(*grads)


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 3, 0, 8)], ids=["batch", "heads", "length"])
def test_nothing_to_attend(shape):
    query, tables = (torch.randn(n, dtype=torch.bfloat16, requires_grad=True) for n in (shape, (2, shape[1], 32, 8)))
    output = disentangled_attention(query, query, query, *tables, **TABLE, backend="cuda")
    output.sum().backward()
    assert output.shape == query.grad.shape == shape and (tables.grad == 0).all()


def test_nothing_packed():
    query, tables = (torch.randn(n, dtype=torch.bfloat16, requires_grad=True) for n in ((0, 2, 8), (2, 2, 32, 8)))
    ends = torch.zeros(4, dtype=torch.int32)
    output = deberta_fast.disentangled_attention_varlen(
        query, query, query, *tables, **TABLE, cu_seqlens=ends, max_seqlen=0, backend="cuda"
    )
    output.sum().backward()
    assert output.shape == query.grad.shape == (0, 2, 8) and (tables.grad == 0).all()


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
def test_strides_past_32_bits(dim):
    """This takes little memory where the system does not commit pages that are never accessed."""
    torch.use_deterministic_algorithms(False)
    case = Case("", 17, 17, heads=2, size=16)
    try:
        numbers = torch.empty(2**31 + 2**24, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("the system does not promise so much memory")

    def spread(x, offset):
        strides = [2**31 // (x.shape[d] - 1) + 8 if d == dim else stride for d, stride in enumerate(x.stride())]
        return numbers.as_strided(x.shape, strides, offset).copy_(x)

    def changed(inputs):
        return inputs._replace(**{name: spread(getattr(inputs, name), 4096 * n) for n, name in enumerate(TENSORS[:3])})

    assert_equal(run(case, change=changed), run(case))


# The emulator's findings

EVERYWHERE = [  # these calls together pass every barrier
    Case("", 270, 270, batch=1, heads=1, mask="holes", dropout_p=0.1),
    Case("", 270, 270, batch=1, heads=1, size=96),
    Case("", 140, 140, batch=1, heads=1, size=128, mask="right"),
    Case("", 270, 270, batch=1, heads=1, c2p=False),
    Case("", 140, 140, batch=1, heads=1, p2c=False),
    Case("", 5, 5, batch=2, heads=86, size=16),
]


def hide_a_tile(inputs):
    """Hides keys 96 to 159, which are near, if the call has a mask."""
    if inputs.mask is not None:
        inputs.mask[..., 96:160] = False
    return inputs


def barrier(site: int) -> str:
    """Names a barrier by its file, its function and its number in that function."""
    file, line = emulator.emulator_barrier_site(site).decode().split(" at ")[1].split(":")
    before = (SOURCES / file).read_text().splitlines()[: int(line)]
    starts = [re.match(r" *(?:DEVICE|KERNEL\(.*?\)) .*?(\w+)\(", text) for text in before]
    first = max(i for i, start in enumerate(starts) if start)
    return f"{file} {starts[first][1]} {sum('sync_' in text and '()' in text for text in before[first:])}"


def test_every_barrier_is_needed():
    """Leaving out any one barrier causes a race or another result."""
    usual = [run(case, change=hide_a_tile) for case in EVERYWHERE]
    sites, unnoticed = emulator.emulator_barrier_sites(), set()

    def noticed(case, expected, site):
        emulate(skip_barrier=site)
        try:
            got = run(case, change=hide_a_tile)
        except RuntimeError:
            return True
        return not all(torch.equal(x, expected[name]) for name, x in got.items())

    for site in range(sites):
        if not any(noticed(*pair, site) for pair in zip(EVERYWHERE, usual)):
            unnoticed.add(barrier(site))
    assert sites > 5 and unnoticed == set()


NARROW = ("store_shared_word", "store_shared_half", "load_shared_word")


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_bank_conflicts(backward, size):
    """Accesses of 16 bytes have no conflicts in forward, and at most two wavefronts per ideal one in backward.

    Narrower accesses have at most three. Rare accesses are exempt.
    """
    inputs = as_dtype(make_inputs(Case("", 330, 330, batch=1, heads=1, size=size), torch.bfloat16), torch.bfloat16)
    emulator.emulator_clear_counts()
    emulate(count_conflicts=True)
    if backward:
        forward_and_gradients(public("cuda"), inputs)
    else:
        backends.forward(inputs, "cuda")
    table = emulator.emulator_conflicts().decode()
    print(table)
    rows = [(row[1], int(row[3]), int(row[4])) for row in map(str.split, table.splitlines()[1:])]
    total = sum(wavefronts for _, wavefronts, _ in rows)
    assert len(rows) > 10 and total <= 1.3 * sum(ideal for *_, ideal in rows)
    for kind, wavefronts, ideal in rows:
        most = 3 if kind in NARROW else 2 if backward else 1
        assert wavefronts <= most * ideal or wavefronts <= total / 100, table


# Memory use


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [16, 128, 512, 1000, 2048, 4096, 8192, 16384])
def test_device_memory_is_bounded(length, packed):
    """The limits hold for 16384 tokens, 12 heads of size 64 and v3's tables."""
    table, batches = slot_table(256, 512), 16384 // length
    ends = (ctypes.c_int32 * (batches + 1))(*range(0, length * batches + 1, length)) if packed else None
    shape = batches, 12, length, 64, ends, table.far_past, table.far_future, table.rows
    assert emulator.emulator_workspace_bytes(*shape, False) <= 16 << 20
    assert 3 << 20 < emulator.emulator_workspace_bytes(*shape, True) <= 128 << 20


def test_shared_memory_is_what_refusals_say():
    for size, expected in cuda.SHARED_BYTES.items():
        assert max(emulator.emulator_shared_bytes(size, backward) for backward in (False, True)) == expected
