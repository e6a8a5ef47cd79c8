"""The CUDA kernels on the emulator against the reference; test_cuda.py runs this file."""

from dataclasses import replace

import comparison
import pytest
import torch
from cases import BY_NAME, CASES, DROPOUT_SEED, TENSORS, Case, as_dtype, forward_and_gradients, make_inputs, seed_after
from comparison import compare, mistake_far_distances, public, reversed_distance, shifted_slot, swapped_tables
from emulated_backend import (  # noqa: F401
    HALF,
    TABLE,
    assert_equal,
    draws,
    each_half,
    emulate,
    one_half,
    poisoned_memory,
    quick,
    run,
    usual_emulator,
)
from masks import assert_exact_divisor, assert_packed_parts_of_one_mask, assert_parts_of_one_mask
from parts import attention_in_parts, cut_at
from spoiled import HEAD, LONG, PLACES, assert_no_nan_is_lost, assert_same_nans, where_nan

import deberta_fast
from deberta_fast import disentangled_attention, testing
from deberta_fast.op import backends
from deberta_fast.op.backends import cuda, reference
from deberta_fast.op.dropout import keep_mask
from deberta_fast.op.relative_position import slot_table

# Correctness against the reference

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
    Case("many-heads", 70, 70, batch=1, heads=86, size=16),  # a block of the pass over distances takes several squares
    Case("far-dropout-L270", 270, 270, batch=1, heads=1, mask="holes", dropout_p=0.3),
    Case("two-far-blocks-first", 390, 60, batch=1, heads=2, offset=-320),
    *(Case(f"late-L{n}", 3, n, batch=1, heads=1, size=16, mask="late") for n in (2200, 4000)),  # 32 hidden tiles
]


def test_serves_what_it_says():
    one_token = make_inputs(BY_NAME["one-token"], torch.float32)
    assert [reason.split(",")[0] for reason in cuda.why_not(one_token)] == ["dtype must be bfloat16 or float16"]
    for dtype in HALF.values():
        assert {case.name for case in CASES if cuda.why_not(make_inputs(case, dtype))} == REFUSED


# Both dtypes run at every compiled head size, and where the dtype matters most: in large sums, and dropout's scale.
BOTH = ("L63-D32", "ragged-L129-D64", "L64-D96", "L127-D128", "holes-L200", "far-L700", "dropout-L140")


@one_half("case", SERVED + MORE, BOTH)
def test_as_precise_as_eager(case, dtype):
    compare(public("cuda"), quick(case), dtype, draws(case))


HIDDEN = {  # hidden ranges of 330 keys
    "first-tile": [(0, 64)],
    "last-tile": [(256, 330)],
    "tiles-in-the-middle": [(64, 128), (192, 256)],
    "two-tiles-and-a-bit": [(60, 195)],
    "all-but-one": [(0, 200), (201, 330)],
}


@one_half("name", HIDDEN)
def test_hidden_tiles(name, dtype, monkeypatch):
    """Kernels skip tiles that no query sees, so the next tile does not follow its left neighbour."""
    mask = torch.ones(2, 1, 1, 330, dtype=torch.bool)
    for first, stop in HIDDEN[name]:
        mask[0, ..., first:stop] = False
    monkeypatch.setattr(comparison, "make_inputs", lambda *wanted: make_inputs(*wanted)._replace(mask=mask))
    compare(public("cuda"), Case(name, 330, 330, heads=1, buckets=-1, longest=100), dtype, 1)


CORNERS = [(0, 31), (0, 63), (32, 63), (32, 127), (64, 63), (64, 127)]


@pytest.mark.parametrize("i, j", CORNERS + [(j, i) for i, j in CORNERS])
def test_a_tile_with_one_near_pair_is_near(i, j):
    """Query i and key j lie in a corner of a tile of 32 or 64, whether its rows are queries or keys."""
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


@one_half("name", PACKED, ["plain"])
def test_packed_sequences_are_a_padded_batch(name, dtype):
    """All results except the tables' gradients, which are sums in another order, are equal bit for bit.

    max_seqlen is larger than every length.
    """
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
        """Pads a tensor (T, ...) to (sequences, longest, ...)."""
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
    """NaN in one sequence leaves the others unchanged, and each of these equals a call on it by itself."""
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
    """The values are the rows of an identity matrix, so the output shows every probability."""
    length, p = 128, 0.4
    query, key = torch.randn(2, 2, 3, length, 128, generator=torch.Generator().manual_seed(0)).to(dtype).unbind(0)
    value = torch.eye(length, dtype=dtype).expand_as(key)
    torch.manual_seed(DROPOUT_SEED)
    output = disentangled_attention(query, key, value, dropout_p=p, scale=0.01, backend="cuda")
    heads = torch.arange(6).view(2, 3, 1, 1)
    keep = keep_mask(seed_after(DROPOUT_SEED), heads, torch.arange(length)[:, None], (0, length), p)
    assert torch.equal(output != 0, keep)


@each_half
def test_kept_probabilities_are_divided_by_what_is_kept(dtype):
    assert_exact_divisor("cuda", dtype)


def test_dropout_of_parts():
    """Calls with parts of the rows, keys, heads and sequences make the mask of one call, backward as forward."""
    dtype = torch.bfloat16
    assert_parts_of_one_mask("cuda", dtype)
    assert_packed_parts_of_one_mask("cuda", dtype)
    kinds = [testing.Kind(mask="keys", dropout=True, origin=True), testing.Kind(packed=True, dropout=True, origin=True)]
    testing.assert_backend(cuda, dtype=dtype, head_size=32, kinds=kinds)


# Parts of the keys

PARTS = {
    "uneven": (Case("", 90, 93, size=16), (30, 31)),
    "c2p-only": (Case("", 90, 90, size=16, p2c=False), (64,)),
    "p2c-only": (Case("", 90, 90, size=16, c2p=False), (64,)),
    "far": (Case("", 60, 190, batch=1, size=16, offset=70), (30, 170)),
    "first-part-hidden": (Case("", 90, 90, size=16, mask="late"), (50,)),
    "batch-row-without-keys": (Case("", 90, 90, size=16, mask="empty"), (61,)),
    "dropout": (Case("", 90, 93, size=16, mask="right", dropout_p=0.3), (40, 80)),
}


@one_half("name", PARTS, ["uneven"])
def test_parts_of_the_keys_add_up(name, dtype):
    case, cuts = PARTS[name]
    compare(attention_in_parts("cuda", cut_at(*cuts)), quick(case), dtype)


# Repeatability

REPEATED = ["holes-L200", "dropout-L140", Case("L260-D96", 260, 260, batch=1, size=96)]


@pytest.mark.parametrize("case", REPEATED, ids=lambda case: getattr(case, "name", case))
def test_runs_are_bit_equal(case):
    """Results depend neither on the order in which threads run nor on earlier contents of memory."""
    usual = run(case)
    for seed in (2, 3, 4, 5):
        emulate(seed)
        torch.use_deterministic_algorithms(seed % 2 == 0)
        assert_equal(run(case), usual)


def test_scratch_is_poisoned():
    """Otherwise the tests here would miss reads of unwritten memory."""
    memory = torch.empty(0, dtype=torch.bfloat16).new_empty(1000, dtype=torch.uint8)
    assert (memory == 255).all() and torch.empty(5, dtype=torch.bfloat16).isnan().all()


# Hidden keys and NaN


@one_half("mask", ["left", "holes", "empty", "late"])
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
    """The inputs are parts of tensors full of NaN, and the numbers around the results do not change."""
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
    """A query spoils only its own row, although other rows are its neighbours in a band.

    A key would spoil all rows that see it.
    """
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
    """The NaN is missing only from dV, to which a dropped pair adds nothing."""
    case, (query, _) = replace(LONG, dropout_p=0.4), PLACES["query"]
    found = where_nan(public("cuda"), case, dtype, "query")
    keep = keep_mask(make_inputs(case, dtype).seed, torch.tensor(HEAD), torch.tensor(query), (0, 330), 0.4)
    assert found["grad_value"].equal(keep.view(-1, 1).expand(-1, 64)) and found["grad_key"].all()
    assert found["lse"].nonzero().tolist() == [[query]] and found["grad_query"].any(1).equal(found["lse"])


# Large numbers


def large(c2p, p2c):
    """Returns inputs whose products exceed float16's range."""
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
