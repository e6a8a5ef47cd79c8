"""The public functions: packed sequences, dropout, autocast, refusals."""

import pytest
import torch
from cases import ON_CPU, Case, make_inputs

import deberta_fast
from deberta_fast import backends, disentangled_attention, disentangled_attention_varlen
from deberta_fast.op.relative_position import slot_table

TABLE = dict(position_buckets=16, max_relative_positions=32)


def tensors(length=10, batch=2, dtype=torch.float32, requires_grad=False):
    inputs = make_inputs(Case("x", length, length, batch=batch, size=16), dtype)
    return [x.requires_grad_(requires_grad) for x in inputs[:5]]


# Packed sequences


# How much two computations of the same numbers may differ by rounding. The cpu backend does not take float64.
BOUND = {torch.float64: dict(rtol=1e-10, atol=1e-10), torch.float32: dict(rtol=1e-4, atol=1e-5)}


def packed(lengths, backend, heads=3, size=16):
    dtype = torch.float32 if backend == "cpu" else torch.float64
    random = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(sum(lengths), heads, size, generator=random, dtype=dtype).requires_grad_() for _ in range(3)
    )
    tables = [torch.randn(heads, 32, size, generator=random, dtype=dtype).requires_grad_() for _ in range(2)]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)] if lengths else [0], dtype=torch.int32)
    return query, key, value, *tables, ends


LENGTHS = {"mixed": [5, 200, 1, 64], "one": [70], "with-empty": [0, 9, 0, 0, 30, 0], "none": []}


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", LENGTHS)
def test_packed_sequences_equal_each_alone(name, backend):
    lengths = LENGTHS[name]
    *leaves, ends = packed(lengths, backend)
    bound = BOUND[leaves[0].dtype]
    visible = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(1)) > 0.2
    options = dict(TABLE, return_lse=True, backend=backend)
    longest = max(lengths, default=0)
    output, lse = disentangled_attention_varlen(
        *leaves, cu_seqlens=ends, max_seqlen=longest, attention_mask=visible, **options
    )
    assert output.is_contiguous() and lse.shape == (3, sum(lengths))
    outputs, lses = [], []
    for start, stop in zip(ends[:-1], ends[1:]):
        alone = [x[start:stop].transpose(0, 1)[None] for x in leaves[:3]]
        one, one_lse = disentangled_attention(
            *alone, *leaves[3:], attention_mask=visible[None, start:stop], **dict(options, backend="reference")
        )
        outputs.append(one[0].transpose(0, 1))
        lses.append(one_lse[0])
    expected = torch.cat(outputs) if outputs else output
    torch.testing.assert_close(output, expected, **bound)
    torch.testing.assert_close(lse, torch.cat(lses, 1) if lses else lse, **bound)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=output.dtype)
    if outputs:
        got, want = (torch.autograd.grad((x * cotangent).sum(), leaves) for x in (output, expected))
        for g, w in zip(got, want):
            torch.testing.assert_close(g, w, **bound)


@pytest.mark.parametrize("backend", ON_CPU)
def test_packed_dropout_is_that_of_a_padded_batch(backend):
    """The mask depends only on (sequence, head, i, j), so packing changes nothing."""
    lengths = [40, 17]
    *leaves, ends = packed(lengths, backend)
    options = dict(TABLE, dropout_p=0.4, backend=backend)
    torch.manual_seed(5)
    output = disentangled_attention_varlen(*leaves, cu_seqlens=ends, max_seqlen=40, **options)
    padded = [x.new_zeros(2, 40, 3, 16) for _, x in zip(range(3), leaves)]
    for batch, length in enumerate(lengths):
        for x, source in zip(padded, leaves):
            x[batch, :length] = source[ends[batch] : ends[batch + 1]]
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]
    torch.manual_seed(5)
    dense = disentangled_attention(*(x.transpose(1, 2) for x in padded), *leaves[3:], attention_mask=mask, **options)
    torch.testing.assert_close(output, dense.transpose(1, 2)[mask])


# Dropout


@pytest.mark.parametrize("backend", ON_CPU)
def test_dropout_follows_the_seed(backend):
    arguments = tensors(60)

    def run(seed, p=0.5):
        torch.manual_seed(seed)
        return disentangled_attention(*arguments, **TABLE, dropout_p=p, backend=backend)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(run(1, 0.0), run(2, 0.0))


def test_dropout_keeps_the_mean():
    """E[output] is the output without dropout: the kept probabilities are divided by the share that is kept."""
    arguments = tensors(32)
    plain = disentangled_attention(*arguments, **TABLE)
    torch.manual_seed(0)
    many = torch.stack([disentangled_attention(*arguments, **TABLE, dropout_p=0.25) for _ in range(100)])
    standard_error = many.std(0) / 10
    assert ((many.mean(0) - plain).abs() < 5 * standard_error + 1e-6).float().mean() > 0.999


# Autograd, autocast, layouts


def test_second_derivative_of_the_reference():
    inputs = make_inputs(Case("x", 3, 4, batch=1, heads=2, size=4, buckets=4, longest=8), torch.float64)
    leaves = [x.requires_grad_() for x in inputs[:5]]

    def attention(*leaves):
        return disentangled_attention(*leaves, position_buckets=4, max_relative_positions=8, backend="reference")

    assert torch.autograd.gradgradcheck(attention, leaves)


@pytest.mark.parametrize("backend", ON_CPU)
def test_autocast_casts_as_torchs_own_attention(backend):
    arguments = tensors(20, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = disentangled_attention(*arguments, **TABLE, backend=backend)
        assert output.dtype == torch.bfloat16
        mixed = disentangled_attention(arguments[0].bfloat16(), *arguments[1:], **TABLE, backend=backend)
    assert torch.equal(output, mixed)
    by_hand = disentangled_attention(*(x.bfloat16() for x in arguments), **TABLE, backend=backend)
    assert torch.equal(output, by_hand)
    output.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in arguments)


def test_output_joins_heads_without_a_copy():
    output = disentangled_attention(*tensors(12), **TABLE)
    assert output.transpose(1, 2).is_contiguous()


def test_any_strides():
    query, key, value, pos_key, pos_query = tensors(33)
    expected = disentangled_attention(query, key, value, pos_key, pos_query, **TABLE)
    odd = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (query, key, value, pos_key, pos_query)]
    expanded = key[:, :1].expand_as(key)
    assert torch.equal(disentangled_attention(*odd, **TABLE), expected)
    assert torch.equal(
        disentangled_attention(query, expanded, value, **TABLE),
        disentangled_attention(query, expanded.contiguous(), value, **TABLE),
    )


# Choice of a backend


def test_choice():
    assert list(deberta_fast.op.backends.BACKENDS)[-1] == "reference"
    with pytest.raises(ValueError, match="backend must be one of .*eager.*'fast'"):
        disentangled_attention(*tensors(), **TABLE, backend="fast")


def test_a_named_backend_that_cannot_serve_lists_its_reasons(monkeypatch):
    monkeypatch.setattr(backends.eager, "why_not", lambda inputs: ["needs a full moon", "and silence"])
    with pytest.raises(RuntimeError, match="'eager' cannot serve this call: needs a full moon, and silence"):
        disentangled_attention(*tensors(), **TABLE, backend="eager")
    disentangled_attention(*tensors(), **TABLE)  # the next one serves
    monkeypatch.setattr(backends.reference, "why_not", lambda inputs: ["is asleep"])
    monkeypatch.setattr(backends.cpu, "why_not", lambda inputs: ["is hot"])
    with pytest.raises(RuntimeError, match="eager: needs a full moon, and silence; .*reference: is asleep"):
        disentangled_attention(*tensors(), **TABLE)


# Bad input: (what to change, exception, words of its message)

BAD = {
    "no tensor": (dict(query=[1.0]), TypeError, "query must be a tensor, got list"),
    "three dimensions": (dict(key=torch.ones(3, 10, 16)), ValueError, r"key must be of shape \(B, H, L, D\)"),
    "integers": (dict(query=torch.ones(2, 3, 10, 16, dtype=torch.int64)), TypeError, "query must be one of .*int64"),
    "two dtypes": (dict(value=torch.ones(2, 3, 10, 16).bfloat16()), TypeError, "value must have query's dtype"),
    "table's dtype": (dict(pos_key=torch.ones(3, 32, 16).half()), TypeError, "pos_key must have query's dtype"),
    "device": (dict(key=torch.ones(2, 3, 10, 16, device="meta")), ValueError, "key must be on query's device"),
    "table's device": (dict(pos_query=torch.ones(3, 32, 16, device="meta")), ValueError, "pos_query must be on"),
    "batch": (dict(query=torch.ones(3, 3, 10, 16)), ValueError, "key must match query"),
    "value's length": (dict(value=torch.ones(2, 3, 11, 16)), ValueError, "value must have key's shape"),
    "no head size": (dict(query=torch.ones(2, 3, 10, 0), key=torch.ones(2, 3, 10, 0), value=torch.ones(2, 3, 10, 0)),
                     ValueError, "head size"),
    "table's heads": (dict(pos_key=torch.ones(2, 32, 16)), ValueError, r"pos_key must be of shape \(3, R, 16\)"),
    "table's rows": (dict(pos_key=torch.ones(3, 30, 16)), ValueError, "pos_query must have pos_key's rows, 30, got 32"),
    "both tables' rows": (dict(pos_key=torch.ones(3, 8, 16), pos_query=torch.ones(3, 8, 16)), ValueError,
                          "all 32 rows .* rows 7 to 26 .* got rows 0 to 8"),
    "first_slot": (dict(first_slot=2), ValueError, "got rows 2 to 34"),
    "buckets": (dict(position_buckets=70), ValueError, "position_buckets=70"),
    "no distance": (dict(position_buckets=0, max_relative_positions=0), ValueError, "max_relative_positions must be"),
    "rule": (dict(far_negative="google"), ValueError, "far_negative must be one of"),
    "float mask": (dict(attention_mask=torch.ones(2, 10)), TypeError, "attention_mask must be a bool .*float32"),
    "mask's shape": (dict(attention_mask=torch.ones(2, 9).bool()), ValueError, r"attention_mask must be .*\(2, 10\)"),
    "mask of 3 dimensions": (dict(attention_mask=torch.ones(2, 10, 10).bool()), ValueError, "attention_mask must be"),
    "mask's device": (dict(attention_mask=torch.ones(2, 10, device="meta").bool()), ValueError, "on query's device"),
    "dropout": (dict(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "negative dropout": (dict(dropout_p=-0.1), ValueError, "dropout_p must be in"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    arguments = dict(zip(("query", "key", "value", "pos_key", "pos_query"), tensors()), **TABLE) | change
    with pytest.raises(error, match=message):
        disentangled_attention(**arguments)


BAD_PACKED = {
    "int64": (dict(cu_seqlens=torch.tensor([0, 10])), TypeError, "cu_seqlens must be an int32 tensor, got torch.int64"),
    "list": (dict(cu_seqlens=[0, 10]), TypeError, "cu_seqlens must be an int32 tensor, got"),
    "empty": (dict(cu_seqlens=torch.tensor([], dtype=torch.int32)), ValueError, "cu_seqlens must be .* not empty"),
    "falling": (dict(cu_seqlens=torch.tensor([0, 7, 5, 10]).int()), ValueError, r"must rise .* got \[0, 7, 5, 10\]"),
    "short": (dict(cu_seqlens=torch.tensor([0, 9]).int()), ValueError, "cu_seqlens must rise from 0 to 10"),
    "not from zero": (dict(cu_seqlens=torch.tensor([1, 10]).int()), ValueError, "cu_seqlens must rise from 0"),
    "longer than max_seqlen": (dict(max_seqlen=9), ValueError, "in steps of 0 to max_seqlen=9"),
    "negative": (dict(max_seqlen=-1), ValueError, "max_seqlen must not be negative, got -1"),
    "mask": (dict(attention_mask=torch.ones(1, 10).bool()), ValueError, r"attention_mask must be of shape \(10,\)"),
    "two lengths": (dict(key=torch.ones(9, 3, 16)), ValueError, "value must have key's shape"),
    "cross": (
        dict(key=torch.ones(9, 3, 16), value=torch.ones(9, 3, 16)),
        ValueError,
        "as many rows as query, 10, got 9",
    ),
    "four dimensions": (dict(query=torch.ones(1, 10, 3, 16)), ValueError, r"query must be of shape \(T, H, D\)"),
}


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", BAD_PACKED)
def test_bad_packed_input(name, backend):
    change, error, message = BAD_PACKED[name]
    arguments = dict(zip(("query", "key", "value"), torch.ones(3, 10, 3, 16)), backend=backend)
    arguments |= dict(cu_seqlens=torch.tensor([0, 10]).int(), max_seqlen=10) | change
    with pytest.raises(error, match=message):
        disentangled_attention_varlen(**arguments)


def test_rows_that_the_lengths_reach_are_enough():
    query, key, value, pos_key, pos_query = tensors(10)
    start, stop = slot_table(16, 32).window(10, 10)
    assert (start, stop) == (7, 26)
    expected = disentangled_attention(query, key, value, pos_key, pos_query, **TABLE)
    narrow = [table[:, start:stop] for table in (pos_key, pos_query)]
    assert torch.equal(disentangled_attention(query, key, value, *narrow, **TABLE, first_slot=start), expected)


@pytest.mark.parametrize("backend", ON_CPU)
def test_no_heads(backend):
    tensors = [torch.randn(shape, requires_grad=True) for shape in [(2, 0, 5, 8)] * 3 + [(0, 32, 8)] * 2]
    output = disentangled_attention(*tensors, **TABLE, backend=backend)
    output.sum().backward()
    assert output.shape == (2, 0, 5, 8) and all(x.grad.shape == x.shape for x in tensors)
