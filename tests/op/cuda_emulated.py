"""The CUDA backend's kernels on an emulator (tests/emulator), on CPU tensors.

``test_cuda.py`` compiles them and runs this file in processes of its own: there the operators of the GPU are the CPU's.
The emulator reports races and accesses out of bounds in shared memory, and lanes that do not meet, as errors.
"""

import ctypes
import os
import re
from dataclasses import replace
from pathlib import Path

import comparison
import emulated
import pytest
import torch
from cases import BY_NAME, CASES, DROPOUT_SEED, TENSORS, Case, as_dtype, forward_and_gradients, make_inputs, seed_after
from comparison import compare, mistake_far_distances, public, reversed_distance, shifted_slot, swapped_tables
from spoiled import HEAD, LONG, PLACES, assert_no_nan_is_lost, assert_same_nans, where_nan

import deberta_fast
from deberta_fast import disentangled_attention
from deberta_fast.op import backends
from deberta_fast.op.backends import cuda, reference
from deberta_fast.op.dropout import keep_mask
from deberta_fast.op.relative_position import slot_table

SOURCES = Path(__file__).parents[2] / "csrc/cuda"
LIBRARY = os.environ["EMULATED_LIBRARY"]
library = emulated.load(LIBRARY)
# Limits backward to one head at a time if the environment says so.
NEAR_BYTES = int(os.environ.get("NEAR_BYTES", 160 << 20))
torch.ops.deberta_fast_emulated.limit_near_bytes(NEAR_BYTES)
emulator = ctypes.CDLL(LIBRARY)
emulator.emulator_conflicts.restype = emulator.emulator_barrier_site.restype = ctypes.c_char_p

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
TABLE = dict(position_buckets=16, max_relative_positions=32)
each_half = pytest.mark.parametrize("dtype", HALF.values(), ids=list(HALF))


def emulate(seed=1, check_races=True, count_conflicts=False, skip_barrier=-1):
    """`seed`: of the order in which blocks, warps and lanes go on."""
    emulator.emulator_options(ctypes.c_uint64(seed), check_races, count_conflicts, skip_barrier)


@pytest.fixture(autouse=True)
def usual_emulator():
    emulate()
    yield
    emulate()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What nobody has written is NaN, the workspace among it: a kernel that reads it shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def quick(name_or_case) -> Case:
    """With no more heads than a case needs."""
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


# Right: against the reference

REFUSED = {"pairwise-mask-L150", "block-diagonal-mask-L150", "mask-per-head-L70", "D256-L65"}
SERVED = [case for case in CASES if case.name not in REFUSED]
MORE = [
    Case("L63-D32", 63, 63, size=32),
    Case("L64-D96", 64, 64, size=96),
    Case("L65-D104", 65, 65, size=104),
    Case("L127-D128", 127, 127, size=128),
    Case("L191-D40", 191, 191, size=40),
    Case("L193-D64", 193, 193),
    Case("L260-D96-holes", 260, 260, batch=1, size=96, mask="holes"),
    Case("L260-D128-c2p-only", 260, 260, batch=1, size=128, p2c=False),
    Case("L200-D128-p2c-only-dropout", 200, 200, batch=1, size=128, c2p=False, dropout_p=0.2),
    Case("one-query-of-193-keys", 1, 193, offset=192),
    Case("one-key", 193, 1, offset=-100),
    Case("odd-offset", 150, 193, offset=37),
    Case("odd-negative-offset", 193, 130, offset=-53),
    Case("two-distances", 193, 193, buckets=-1, longest=1),
    Case("few-distances", 193, 193, buckets=2, longest=8),
    Case("rows-without-distances", 130, 130, buckets=16, longest=10),
    Case("wide-table-window", 150, 150, buckets=64, longest=256, window=True),
    Case("all-near-L330", 330, 330, batch=1, buckets=-1, longest=400),
    Case("all-far-left", 70, 130, offset=500),
    Case("next-to-far", 64, 64, offset=96),
    Case("one-near-corner", 64, 64, offset=-94),
    Case("many-heads", 70, 70, batch=1, heads=86, size=16),  # a block of the pass over distances meets several squares
    Case("far-dropout-L270", 270, 270, batch=1, heads=1, mask="holes", dropout_p=0.3),
    Case("two-far-blocks-first", 390, 60, batch=1, heads=2, offset=-320),
    *(Case(f"late-L{n}", 3, n, batch=1, heads=1, size=16, mask="late") for n in (2200, 4000)),  # 32 hidden tiles
]


def test_serves_what_it_says():
    one_token = make_inputs(BY_NAME["one-token"], torch.float32)
    assert [reason.split(",")[0] for reason in cuda.why_not(one_token)] == ["dtype must be bfloat16 or float16"]
    for dtype in HALF.values():
        assert {case.name for case in CASES if cuda.why_not(make_inputs(case, dtype))} == REFUSED


@each_half
@pytest.mark.parametrize("case", SERVED + MORE, ids=lambda case: case.name)
def test_as_precise_as_eager(case, dtype):
    compare(public("cuda"), quick(case), dtype, draws(case))


HIDDEN = {  # of 330 keys
    "first-tile": [(0, 64)],
    "last-tile": [(256, 330)],
    "tiles-in-the-middle": [(64, 128), (192, 256)],
    "two-tiles-and-a-bit": [(60, 195)],
    "all-but-one": [(0, 200), (201, 330)],
}


@each_half
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_tiles(name, dtype, monkeypatch):
    """Tiles that nobody sees are left out, so that others do not follow their left neighbour."""
    mask = torch.ones(2, 1, 1, 330, dtype=torch.bool)
    for first, stop in HIDDEN[name]:
        mask[0, ..., first:stop] = False
    monkeypatch.setattr(comparison, "make_inputs", lambda *wanted: make_inputs(*wanted)._replace(mask=mask))
    compare(public("cuda"), Case(name, 330, 330, heads=1, buckets=-1, longest=100), dtype, 1)


CORNERS = [(0, 31), (0, 63), (32, 63), (32, 127), (64, 63), (64, 127)]


@pytest.mark.parametrize("i, j", CORNERS + [(j, i) for i, j in CORNERS])
def test_a_tile_with_one_near_pair_is_near(i, j):
    """Query i and key j are in a corner of tiles of 32 or 64, whatever the side whose rows are met by columns."""
    table = slot_table(16, 32, "hf")
    for delta in (table.far_past - 1, table.far_future + 1):
        inputs = make_inputs(Case("", i + 2, j + 2, batch=1, heads=2, offset=delta - i + j), torch.float16)
        inputs = inputs._replace(pos_key=3 * inputs.pos_key, pos_query=3 * inputs.pos_query)
        exact = forward_and_gradients(reference.attention, as_dtype(inputs, torch.float64))
        got = forward_and_gradients(public("cuda"), as_dtype(inputs, torch.float16))
        for name, x in got.items():
            assert (x - exact[name]).abs().max() <= 4e-3 * exact[name].abs().max(), name


@pytest.mark.parametrize("mutate", [shifted_slot, swapped_tables, reversed_distance])
def test_a_wrong_table_is_caught(mutate):
    with pytest.raises(AssertionError, match="error"):
        compare(lambda inputs: public("cuda")(mutate(inputs)), quick("ragged-L129-D64"), torch.bfloat16, 1)


@pytest.mark.parametrize("mistake", [{"far_past": -16}, {"far_future": 16}], ids=["past", "future"])
def test_a_far_segment_too_long_is_caught(mistake, monkeypatch):
    mistake_far_distances(monkeypatch, **{name: 4 * step for name, step in mistake.items()})
    with pytest.raises(AssertionError, match="error"):
        compare(public("cuda"), Case("far", 330, 330, batch=1, heads=1), torch.bfloat16, 1)


# Packed sequences

LENGTHS = [65, 0, 200, 1, 64, 130, 0]
PACKED = {"plain": {}, "masked": dict(mask=True), "dropout": dict(p=0.3), "D128": dict(size=128, mask=True, p=0.3)}


def results(leaves, attention, cotangents):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    output, lse = attention(*leaves)
    loss = (output.float() * cotangents[0]).sum() + (lse.nan_to_num(neginf=0) * cotangents[1]).sum()
    return [output, lse, *torch.autograd.grad(loss, leaves)]


@each_half
@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_are_a_padded_batch(name, dtype):
    """Bit for bit, but for the gradients of the tables: those are sums in another order. No sequence is the longest."""
    options = dict(mask=False, p=0.0, size=64) | PACKED[name]
    random = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=random).to(dtype)
    total, size, heads = sum(LENGTHS), options["size"], 2
    packed = [normal(total, heads, size) for _ in range(3)]
    tables = [normal(heads, 32, size) for _ in range(2)]
    cotangents = normal(total, heads, size).float(), normal(heads, total).float()
    mask = (torch.arange(total) // 3 % 5 != 2) if options["mask"] else None
    ends = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    there = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]  # (sequence, place)

    def padded(x, absent):
        """(T, ...) to (sequences, longest, ...)."""
        y = x.new_full((*there.shape, *x.shape[1:]), absent)
        y[there] = x
        return y

    def packed_attention(*leaves):
        torch.manual_seed(DROPOUT_SEED)
        return deberta_fast.disentangled_attention_varlen(
            *leaves, **TABLE, cu_seqlens=ends, max_seqlen=300, attention_mask=mask, dropout_p=options["p"],
            return_lse=True, backend="cuda",
        )  # fmt: skip

    def dense_attention(query, key, value, *tables):
        torch.manual_seed(DROPOUT_SEED)
        heads = (padded(x, absent).transpose(1, 2) for x, absent in ((query, 0), (key, 3e4), (value, torch.nan)))
        output, lse = disentangled_attention(
            *heads, *tables, **TABLE, attention_mask=there if mask is None else padded(mask, False),
            dropout_p=options["p"], return_lse=True, backend="cuda",
        )  # fmt: skip
        return output.transpose(1, 2)[there], lse.transpose(1, 2)[there].T

    got = results([*packed, *tables], packed_attention, cotangents)
    expected = results([*packed, *tables], dense_attention, cotangents)
    for x, y in zip(got[:5], expected):
        assert torch.equal(x, y)
    for x, y in zip(got[5:], expected[5:]):
        torch.testing.assert_close(x, y, rtol=0, atol=0.02 * y.abs().max().item())


@each_half
def test_packed_sequences_do_not_meet(dtype):
    """One of them full of what is not a number."""
    inputs = make_inputs(Case("", 330, 330, batch=1, heads=2), dtype)
    inputs = inputs._replace(cu_seqlens=torch.tensor([0, 70, 70, 200, 330], dtype=torch.int32), max_seqlen=130)
    output, lse = backends.forward(inputs, "cuda")
    for x in inputs[:3]:
        x[:, :, 70:200] = torch.nan
    spoiled, spoiled_lse = backends.forward(inputs, "cuda")
    others = torch.tensor([*range(70), *range(200, 330)])
    assert torch.equal(spoiled[:, :, others], output[:, :, others]) and spoiled[:, :, 70:200].isnan().all()
    assert torch.equal(spoiled_lse[:, :, others], lse[:, :, others])
    for start, stop in [(0, 70), (200, 330)]:
        one = inputs._replace(**{n: getattr(inputs, n)[:, :, start:stop] for n in TENSORS[:3]}, cu_seqlens=None)
        one_output, one_lse = backends.forward(one, "cuda")
        assert torch.equal(one_output, output[:, :, start:stop]) and torch.equal(one_lse, lse[:, :, start:stop])


# Dropout


@each_half
def test_dropout_is_the_mask_of_keep_mask(dtype):
    """Values that are rows of an identity matrix show every probability."""
    length, p = 128, 0.4
    query, key = torch.randn(2, 2, 3, length, 128, generator=torch.Generator().manual_seed(0)).to(dtype).unbind(0)
    value = torch.eye(length, dtype=dtype).expand_as(key)
    torch.manual_seed(DROPOUT_SEED)
    output = disentangled_attention(query, key, value, dropout_p=p, scale=0.01, backend="cuda")
    heads = torch.arange(6).view(2, 3, 1, 1)
    keep = keep_mask(seed_after(DROPOUT_SEED), heads, torch.arange(length)[:, None], (0, length), p)
    assert torch.equal(output != 0, keep)


# The same again

REPEATED = ["holes-L200", "dropout-L140", Case("L260-D96", 260, 260, batch=1, size=96)]


@pytest.mark.parametrize("case", REPEATED, ids=lambda case: getattr(case, "name", case))
def test_runs_are_bit_equal(case):
    """In whatever order threads go on, whatever lay in memory before."""
    usual = run(case)
    for seed in (2, 3, 4, 5):
        emulate(seed)
        torch.use_deterministic_algorithms(seed % 2 == 0)
        assert_equal(run(case), usual)


def test_scratch_is_poisoned():
    """Or the tests here would see less."""
    memory = torch.empty(0, dtype=torch.bfloat16).new_empty(1000, dtype=torch.uint8)
    assert (memory == 255).all() and torch.empty(5, dtype=torch.bfloat16).isnan().all()


# What nobody may see, and what is not a number


@each_half
@pytest.mark.parametrize("mask", ["left", "holes", "empty", "late"])
def test_hidden_keys_do_not_matter(mask, dtype):
    case = Case("", 200, 200, heads=2, mask=mask)
    hidden = ~make_inputs(case, dtype).mask.any(2).expand(2, 2, 200)

    def spoiled(inputs, number):
        inputs.key[hidden], inputs.value[hidden] = number, -number
        return inputs

    clean = run(case, dtype)
    assert (clean["grad_key"][hidden] == 0).all() and (clean["grad_value"][hidden] == 0).all()
    for number in (6e4, torch.inf, torch.nan):
        got = run(case, dtype, lambda inputs, number=number: spoiled(inputs, number))
        assert all(torch.equal(got[name], x) for name, x in clean.items())


@each_half
@pytest.mark.parametrize("size, window", [(64, False), (64, True), (88, False)])
def test_nothing_beyond_the_ends_is_read_or_written(size, window, dtype):
    """Tensors that are parts of others full of NaN, results between numbers that stay."""
    table = dict(buckets=64, longest=256) if window else {}
    inputs = as_dtype(make_inputs(Case("", 70, 90, heads=2, size=size, window=window, **table), dtype), dtype)
    clean = forward_and_gradients(public("cuda"), inputs)

    def within(x):
        memory = x.new_full([n + 2 for n in x.shape[:-1]] + [x.shape[-1] + 16], torch.nan)
        part = memory[tuple(slice(1, -1) for _ in x.shape[:-1]) + (slice(8, -8),)]
        return part.copy_(x)

    with torch.no_grad():
        inner = inputs._replace(**{name: within(getattr(inputs, name)) for name in TENSORS})
        assert all(cuda._aligned(x) is x for x in inner[:5])
        results = backends.forward(inner, "cuda")
        output, lse = (torch.full((*x.shape[:-1], x.shape[-1] + 16), 7, dtype=x.dtype) for x in results)
        cuda.forward(inner, output[..., 8:-8], lse[..., 8:-8])
    for got, expected in ((output, clean["output"]), (lse, clean["lse"])):
        assert torch.equal(got[..., 8:-8], expected)
        assert (got[..., :8] == 7).all() and (got[..., -8:] == 7).all()
    leaves = inner._replace(**{name: getattr(inner, name).requires_grad_() for name in TENSORS})
    assert_equal(forward_and_gradients(public("cuda"), leaves), clean)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("size", [64, 128])
def test_what_is_not_finite_stays_in_its_row(size, number):
    """Of queries, whose neighbours in a band are other rows; a key spoils all rows that see it."""
    inputs = make_inputs(Case("", 200, 200, heads=2, size=size), torch.bfloat16)
    clean, clean_lse = backends.forward(inputs, "cuda")
    rows = torch.zeros(2, 2, 200, dtype=torch.bool)
    for row in (0, 17, 31, 32, 127, 199):
        rows[0, row % 2, row] = True
    inputs.query[rows] = number
    output, lse = backends.forward(inputs, "cuda")
    assert torch.equal(output[~rows], clean[~rows]) and torch.equal(lse[~rows], clean_lse[~rows])
    assert output[rows].isnan().all()


@each_half
@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("name", PLACES)
def test_nans_are_where_the_reference_has_them(name, size, dtype):
    assert_same_nans(public("cuda"), replace(LONG, size=size), dtype, name)


@pytest.mark.parametrize("name", PLACES)
def test_no_nan_is_lost_under_a_mask(name):
    assert_no_nan_is_lost(public("cuda"), replace(LONG, mask="holes"), torch.bfloat16, name)


@each_half
def test_a_pair_that_dropout_drops_keeps_its_nan(dtype):
    """From dV alone, in which it has no share."""
    case, (query, _) = replace(LONG, dropout_p=0.4), PLACES["query"]
    found = where_nan(public("cuda"), case, dtype, "query")
    keep = keep_mask(make_inputs(case, dtype).seed, torch.tensor(HEAD), torch.tensor(query), (0, 330), 0.4)
    assert found["grad_value"].equal(keep.view(-1, 1).expand(-1, 64)) and found["grad_key"].all()
    assert found["lse"].nonzero().tolist() == [[query]] and found["grad_query"].any(1).equal(found["lse"])


# Large numbers


def large(c2p, p2c):
    """Products of these leave float16's range."""
    inputs = make_inputs(Case("large", 150, 150, batch=1, heads=1, c2p=c2p, p2c=p2c), torch.float16)
    inputs = inputs._replace(query=inputs.query * 200, key=inputs.key * 200)
    assert (inputs.query.float() @ inputs.key.float().mT).abs().max() > 1e5
    return as_dtype(inputs, torch.float16)


@pytest.mark.parametrize("c2p, p2c", [(True, True), (False, False), (True, False), (False, True)])
def test_half_precision_survives_large_weights(c2p, p2c):
    inputs = large(c2p, p2c)
    expected, expected_lse = reference.attention(as_dtype(inputs, torch.float64))
    output, lse = public("cuda")(inputs)
    torch.testing.assert_close(output.double(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("c2p, p2c", [(False, False), (True, False), (True, True), (False, True)])
def test_gradients_of_large_weights_are_finite(c2p, p2c):
    assert all(torch.isfinite(x).all() for x in forward_and_gradients(public("cuda"), large(c2p, p2c)).values())


def test_half_precision_survives_large_tables():
    inputs = make_inputs(Case("large", 70, 70, batch=1, heads=1), torch.float16)
    inputs = inputs._replace(query=inputs.query * 300, pos_key=inputs.pos_key * 60)
    exact = forward_and_gradients(reference.attention, as_dtype(inputs, torch.float64))
    got = forward_and_gradients(public("cuda"), as_dtype(inputs, torch.float16))
    torch.testing.assert_close(got["output"].double(), exact["output"], rtol=1e-3, atol=1e-3)


# Where tensors lie


def test_one_head_at_a_time():
    """Where dA of more is too much. Sums of the tables' gradients are cut by the number of heads."""
    memory = lambda: emulator.emulator_workspace_bytes(32, 12, 512, 64, None, 506, -512, 512, True)
    usual, bytes_usually = run("holes-L200"), memory()
    torch.ops.deberta_fast_emulated.limit_near_bytes(1)
    try:
        limited = run("holes-L200")
        assert memory() < bytes_usually // 2
    finally:
        torch.ops.deberta_fast_emulated.limit_near_bytes(NEAR_BYTES)
    of_tables = [name for name in usual if "pos" in name]
    assert len(of_tables) == 2
    assert all(torch.equal(limited[name], x) for name, x in usual.items() if name not in of_tables)
    for name in of_tables:
        torch.testing.assert_close(limited[name], usual[name], rtol=2e-2, atol=1e-2)


def test_views_of_a_projection_are_not_copied():
    inputs = make_inputs(quick("fused-qkv-views-L129-D24"), torch.bfloat16)
    assert not inputs.query.is_contiguous()
    assert all(cuda._aligned(x) is x for x in inputs[:5])


@each_half
def test_rows_that_are_not_aligned(dtype):
    """Copied, so that kernels can move 16 bytes at once."""

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
    """One number for all, as a sum has it; transposed; for output or log-sum-exp alone."""
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
    """Costs nothing where memory that nobody touches does not."""
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

EVERYWHERE = [  # what passes every barrier
    Case("", 270, 270, batch=1, heads=1, mask="holes", dropout_p=0.1),
    Case("", 270, 270, batch=1, heads=1, size=96),
    Case("", 140, 140, batch=1, heads=1, size=128, mask="right"),
    Case("", 140, 140, batch=1, heads=1, c2p=False),
    Case("", 140, 140, batch=1, heads=1, p2c=False),
    Case("", 5, 5, batch=2, heads=86, size=16),
]


def hide_a_tile(inputs):
    """Within what is near, if there is a mask at all."""
    if inputs.mask is not None:
        inputs.mask[..., 96:160] = False
    return inputs


def barrier(site: int) -> str:
    """The file, the function, and which of its barriers."""
    file, line = emulator.emulator_barrier_site(site).decode().split(" at ")[1].split(":")
    before = (SOURCES / file).read_text().splitlines()[: int(line)]
    starts = [re.match(r" *(?:DEVICE|KERNEL\(.*?\)) .*?(\w+)\(", text) for text in before]
    first = max(i for i, start in enumerate(starts) if start)
    return f"{file} {starts[first][1]} {sum('sync_' in text and '()' in text for text in before[first:])}"


def test_every_barrier_is_needed():
    """One left out after the other: a race, or another result."""
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
    """None in forward where 16 bytes go at once, two wavefronts for one in backward; three elsewhere, unless rare."""
    inputs = as_dtype(make_inputs(Case("", 330, 330, batch=1, heads=1, size=size), torch.bfloat16), torch.bfloat16)
    emulator.emulator_clear_conflicts()
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


# What it takes


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [16, 128, 512, 1000, 2048, 4096, 8192, 16384])
def test_device_memory_is_bounded(length, packed):
    """At 16384 tokens, 12 heads of 64 and v3's tables."""
    table, batches = slot_table(256, 512), 16384 // length
    ends = (ctypes.c_int32 * (batches + 1))(*range(0, length * batches + 1, length)) if packed else None
    shape = batches, 12, length, 64, ends, table.far_past, table.far_future, table.rows
    assert emulator.emulator_workspace_bytes(*shape, False) <= 16 << 20
    assert 3 << 20 < emulator.emulator_workspace_bytes(*shape, True) <= 256 << 20


def test_shared_memory_is_what_refusals_say():
    for size, expected in cuda.SHARED_BYTES.items():
        assert max(emulator.emulator_shared_bytes(size, backward) for backward in (False, True)) == expected
