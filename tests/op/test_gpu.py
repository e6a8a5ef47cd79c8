"""Every backend against the reference on a CUDA device, and errors that need a device to show. ``make gpu``."""

import copy

import pytest
import torch
from cases import CASES, TENSORS, Case, as_dtype, forward_and_gradients, make_inputs, seed_after
from comparison import compare, public
from gpu import (  # noqa: F401
    BACKENDS,
    DEVICE,
    FUSED,
    HALF_ONLY,
    TABLE,
    by_backend,
    by_fused_backend,
    normal,
    on_device,
    pytestmark,
    usual_dtype,
)
from tolerance import assert_as_precise, hf_style_attention

from deberta_fast import backends, disentangled_attention, disentangled_attention_varlen, patch
from deberta_fast.op.backends import reference
from deberta_fast.op.dropout import keep_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
by_cuda = pytest.mark.parametrize("backend", [name for name in FUSED if name == "cuda"])
# The cases that a backend declines on purpose, in half precision, and how its reasons begin. Nothing else is skipped.
DECLINED = {"cuda": {"pairwise-mask-L150", "block-diagonal-mask-L150", "mask-per-head-L70", "D256-L65"}}
REASONS = {
    "cuda": (
        "dtype must be bfloat16 or float16, got torch.float32",
        "head size must be a multiple of 8 up to 128, got 256",
        "a mask must be the same for all heads and queries",
    )
}


def unlisted(backend, reasons):
    """Returns the reasons outside of REASONS, except too little shared memory on GPUs that have little."""
    little = torch.cuda.is_available() and torch.cuda.get_device_properties(0).shared_memory_per_block_optin < 160 << 10
    listed = lambda text: text.startswith(REASONS.get(backend, ())) or (little and "bytes of shared memory" in text)
    return [reason for reason in reasons if not listed(reason)]


def serve_or_skip(backend, inputs):
    if reasons := backends.BACKENDS[backend].why_not(inputs):
        assert not unlisted(backend, reasons), reasons
        pytest.skip(", ".join(reasons))


# Precision


@by_dtype
@by_backend
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_precise_as_eager(case, backend, dtype):
    case = on_device(case)
    serve_or_skip(backend, make_inputs(case, dtype))
    compare(public(backend), case, dtype)


# CASES do not cover these: kernels for other head sizes, more tiles, tables and offsets of other widths.
MORE = [
    Case("L64-D96", 64, 64, size=96),
    Case("L65-D104", 65, 65, size=104),
    Case("L127-D128", 127, 127, size=128),
    Case("L191-D40", 191, 191, size=40),
    Case("L260-D96-holes", 260, 260, batch=1, size=96, mask="holes"),
    Case("L260-D128-c2p-only", 260, 260, batch=1, size=128, p2c=False),
    Case("L200-D128-p2c-only-dropout", 200, 200, batch=1, size=128, c2p=False, dropout_p=0.2),
    Case("one-query-of-193-keys", 1, 193, offset=192),
    Case("one-key", 193, 1, offset=-100),
    Case("odd-offset", 150, 193, offset=37),
    Case("two-distances", 193, 193, buckets=-1, longest=1),
    Case("few-distances", 193, 193, buckets=2, longest=8),
    Case("wide-table-window", 150, 150, buckets=64, longest=256, window=True),
    Case("all-near-L330", 330, 330, batch=1, buckets=-1, longest=400),
    Case("next-to-far", 64, 64, offset=96),
    Case("many-heads", 70, 70, batch=1, heads=86, size=16),
    Case("v3-table-L2500-dropout", 2500, 2500, batch=1, heads=2, buckets=256, longest=512, dropout_p=0.1),
    Case("v3-table-L2500-holes", 2500, 2500, batch=1, heads=2, buckets=256, longest=512, mask="holes"),
]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bf16", "fp16"])
@by_cuda
@pytest.mark.parametrize("case", MORE, ids=lambda case: case.name)
def test_more_is_as_precise_as_eager(case, backend, dtype):
    case = on_device(case)
    serve_or_skip(backend, make_inputs(case, dtype))
    compare(public(backend), case, dtype)


@by_fused_backend
def test_half_precision_survives_large_weights(backend):
    """Unscaled products of these inputs exceed float16's range, although every score fits."""
    inputs = make_inputs(on_device(Case("large", 70, 70, batch=1, heads=1)), torch.float16)
    inputs = inputs._replace(query=inputs.query * 300, pos_key=inputs.pos_key * 60)
    exact = forward_and_gradients(reference.attention, as_dtype(inputs, torch.float64))
    got = forward_and_gradients(public(backend), as_dtype(inputs, torch.float16))
    assert torch.isfinite(got["output"]).all()
    torch.testing.assert_close(got["output"].double(), exact["output"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["v3-table-L1100", "holes-L200", "dropout-L140"])
def test_float64(name):
    compare(public("eager"), on_device(name), torch.float64)


@pytest.mark.parametrize("backend", [name for name in FUSED if name not in HALF_ONLY])
@pytest.mark.parametrize("name", ["ragged-L129-D64", "v3-table-L1100"])
def test_float32_where_tensor_cores_are_allowed(name, backend):
    """The yardstick is eager code under the same switch."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        compare(public(backend), on_device(name), torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


@by_dtype
@by_fused_backend
def test_declines_nothing_that_it_should_serve(backend, dtype):
    """It serves all calls except those that DECLINED and HALF_ONLY name. This test fails where other tests skip."""
    inputs = {case.name: make_inputs(on_device(case), dtype) for case in CASES}
    inputs["packed"] = packed_inputs([5, 0, 70], dtype)
    inputs["packed-dropout-D128"] = packed_inputs([5, 0, 70], dtype, dropout_p=0.3, size=128)
    inputs["large-L16384"] = make_inputs(on_device(Case("", 16384, 16384, batch=1, heads=1)), dtype)
    found = {name: reasons for name, x in inputs.items() if (reasons := backends.BACKENDS[backend].why_not(x))}
    if backend in HALF_ONLY and dtype == torch.float32:
        assert found.keys() == inputs.keys()
        assert all(reasons[0] == REASONS[backend][0] for reasons in found.values())
        return
    assert not any(unlisted(backend, reasons) for reasons in found.values()), found
    on_purpose = {name for name, reasons in found.items() if "bytes of shared memory" not in str(reasons)}
    assert on_purpose == DECLINED.get(backend, set()), found


@by_backend
def test_odd_strides_and_addresses(backend):
    """Rows of inputs and of the incoming gradient start anywhere, and are not a multiple of 16 bytes apart."""
    wide = [normal(2, 3, 150, 69, dtype=torch.bfloat16, seed=n) for n in range(4)]
    tables = [normal(3, 32, 67, dtype=torch.bfloat16, seed=n) for n in (4, 5)]
    *views, gradient = [x[:, :, 1:, 3:67] for x in wide]
    views += [x[..., 1:65] for x in tables]
    results = []
    for tensors, cotangent in ((views, gradient), ([x.contiguous() for x in views], gradient.contiguous())):
        leaves = [x.detach().requires_grad_() for x in tensors]
        output = disentangled_attention(*leaves, **TABLE, backend=backend)
        results.append([output, *torch.autograd.grad(output, leaves, cotangent)])
    # Wider loads may add in another order.
    assert all((x - y).float().norm() <= 2e-3 * y.float().norm() for x, y in zip(*results))


# Packed sequences

LENGTHS = [5, 200, 1, 0, 64, 129, 0]


def packed_inputs(lengths, dtype, seed=0, dropout_p=0.0, size=64):
    total = sum(lengths)
    case = on_device(Case("packed", total, total, batch=1, size=size, dropout_p=dropout_p))
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)
    return make_inputs(case, dtype, seed)._replace(cu_seqlens=ends, max_seqlen=max(lengths, default=0))


def public_packed(backend):
    def attention(inputs):
        rows = [x[0].transpose(0, 1) for x in inputs[:3]]
        output, lse = disentangled_attention_varlen(
            *rows, *inputs[3:5], **TABLE, cu_seqlens=inputs.cu_seqlens, max_seqlen=inputs.max_seqlen,
            return_lse=True, backend=backend,
        )  # fmt: skip
        return output.transpose(0, 1)[None], lse[None]

    return attention


def hf_style_packed(inputs):
    parts = [hf_style_attention(x) for x in inputs.sequences() if x.query.shape[2]]
    return tuple(torch.cat([part[index] for part in parts], 2) for index in range(2))


@by_dtype
@by_backend
def test_packed_sequences_equal_each_alone(backend, dtype):
    draws = [packed_inputs(LENGTHS, dtype, seed) for seed in range(4)]
    serve_or_skip(backend, draws[0])

    def run(attention, dtype):
        results = [forward_and_gradients(attention, as_dtype(inputs, dtype)) for inputs in draws]
        return {name: torch.stack([result[name].detach() for result in results]) for name in results[0]}

    exact, got = run(reference.attention, torch.float64), run(public_packed(backend), dtype)
    yardstick = run(hf_style_packed, dtype)
    yardstick["lse"] = yardstick["lse"].float()
    for name, x in got.items():
        assert_as_precise(name, x, yardstick[name], exact[name])


@by_fused_backend
@pytest.mark.parametrize("lengths", [[], [0, 0], [1]], ids=["none", "empty", "one-token"])
def test_hardly_anything_packed(lengths, backend):
    inputs = as_dtype(packed_inputs(lengths, torch.bfloat16), torch.bfloat16)
    got = forward_and_gradients(public_packed(backend), inputs)
    assert all(torch.isfinite(x).all() for x in got.values())
    assert torch.equal(got["output"], inputs.value.detach())  # a single token attends to itself
    assert (got["grad_pos_key"] == 0).all() or lengths == [1]


# Repeatability and dropout


@by_dtype
@by_backend
def test_runs_are_bit_equal(backend, dtype):
    case = Case("bits", 700, 700, batch=3, mask="holes", buckets=256, longest=512, dropout_p=0.1)
    inputs = make_inputs(on_device(case), dtype)
    serve_or_skip(backend, inputs)
    first, second = (forward_and_gradients(public(backend), as_dtype(inputs, dtype)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@by_fused_backend
@pytest.mark.parametrize("name", ["holes-L200", "dropout-L140", "v3-table-L1100", "packed"])
def test_reads_no_memory_that_nobody_wrote(name, backend):
    """Results are bit-equal if all new memory, including scratch memory, is filled with NaN."""
    if name == "packed":
        attention, inputs = public_packed(backend), packed_inputs(LENGTHS, torch.bfloat16)
    else:
        attention, inputs = public(backend), make_inputs(on_device(name), torch.bfloat16)
    results = []
    for poisoned in (False, True):
        torch.use_deterministic_algorithms(poisoned, warn_only=True)
        try:
            assert torch.empty(9, device=DEVICE).isnan().all() or not poisoned
            results.append(forward_and_gradients(attention, as_dtype(inputs, torch.bfloat16)))
        finally:
            torch.use_deterministic_algorithms(False)
    usual, poisoned = results
    assert all(torch.equal(poisoned[key], x) for key, x in usual.items())


def kept(backend, batch, heads, length, dropout_p, dtype):
    """Reads from the output which probabilities a backend keeps: all are equal, and each column of V picks one key."""
    query = torch.zeros(batch, heads, length, 64, dtype=dtype, device=DEVICE)
    columns = []
    for start in range(0, length, 64):
        value = torch.zeros_like(query)
        rows = torch.arange(start, min(start + 64, length), device=DEVICE)
        value[:, :, rows, rows - start] = 1
        torch.manual_seed(5)
        columns.append(disentangled_attention(query, query, value, dropout_p=dropout_p, backend=backend) != 0)
    return torch.cat(columns, -1)[..., :length]


@by_backend
def test_dropout_keeps_what_every_backend_keeps(backend):
    batch, heads, length, p = 3, 4, 300, 0.3
    batch_head = torch.arange(batch * heads, device=DEVICE).view(batch, heads, 1, 1)
    rows = torch.arange(length, device=DEVICE)[:, None]
    expected = keep_mask(seed_after(5, DEVICE), batch_head, rows, (0, length), p)
    for dtype in (usual_dtype(backend), torch.bfloat16, torch.float16):
        assert torch.equal(kept(backend, batch, heads, length, p, dtype), expected)
    count = expected.numel()
    assert abs(expected.double().mean() - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5


@by_backend
def test_packed_dropout_is_that_of_a_padded_batch(backend):
    lengths = [40, 0, 117, 1]
    inputs = packed_inputs(lengths, usual_dtype(backend))
    rows = [x[0].transpose(0, 1) for x in inputs[:3]]
    options = dict(TABLE, dropout_p=0.4, backend=backend)
    torch.manual_seed(5)
    output = disentangled_attention_varlen(
        *rows, *inputs[3:5], **options, cu_seqlens=inputs.cu_seqlens, max_seqlen=inputs.max_seqlen
    )
    mask = torch.arange(117, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    padded = [x.new_zeros(4, 117, 3, 64).masked_scatter(mask[..., None, None], x).transpose(1, 2) for x in rows]
    torch.manual_seed(5)
    dense = disentangled_attention(*padded, *inputs[3:5], attention_mask=mask, **options)
    tolerance = dict(rtol=0.02, atol=0.01) if output.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(output, dense.transpose(1, 2)[mask], **tolerance)


# Hugging Face's models


def compare_patched(name, backend, dtype):
    """Asserts that all results are as precise as Hugging Face's in this dtype, and returns the number of calls."""
    import hf_models

    model = hf_models.build(name, "ForSequenceClassification").to(DEVICE, dtype)
    draws = [{key: x.to(DEVICE) for key, x in hf_models.tokens("right", seed=seed).items()} for seed in range(6)]
    run = lambda model: [hf_models.results(model, inputs) for inputs in draws]
    exact, eager, got = run(copy.deepcopy(model).double()), run(model), run(patch(model, backend))
    # The precision of only four logits is a matter of luck, so they are compared together with all gradients.
    trained = [name for name, grad in exact[0][1].items() if grad is not None]
    flat = ([[*outputs, *(grads[name] for name in trained)] for outputs, grads in runs] for runs in (got, eager, exact))
    hf_models.assert_as_precise(*flat)
    return 2 * len(draws)


@pytest.mark.usefixtures("exact_hf")
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in HALF_ONLY])
@pytest.mark.parametrize("name", ["v1", "v3"])
def test_patched_model(name, backend, fused_calls):
    calls = compare_patched(name, backend, torch.float32)
    assert fused_calls == [backend] * calls


@pytest.mark.usefixtures("exact_hf")
@by_fused_backend
@pytest.mark.parametrize("name", ["v1", "v3"])
def test_patched_model_in_bfloat16(name, backend, fused_calls):
    calls = compare_patched(name, backend, torch.bfloat16)
    assert fused_calls == [backend] * calls


@by_fused_backend
def test_patched_model_trains_under_autocast(backend, fused_calls):
    """Losses are those of eager code, which drops the same, with float32 weights, dropout and padding as is usual."""
    import hf_models

    inputs = {key: x.to(DEVICE) for key, x in hf_models.tokens("right").items()}
    labels = torch.tensor([0, 1], device=DEVICE)

    def losses(backend):
        model = hf_models.build("v3", "ForSequenceClassification", attention_probs_dropout_prob=0.1)
        patch(model.to(DEVICE).train(), backend)
        optimizer, found = torch.optim.SGD(model.parameters(), lr=1e-3), []
        torch.manual_seed(3)
        for _ in range(5):
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                loss = model(**inputs, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    got = losses(backend)
    assert fused_calls == [backend] * 10
    assert all(abs(x - y) < 0.02 for x, y in zip(got, losses("eager")))


@by_backend
def test_autocast(backend):
    leaves = [x.requires_grad_() for x in make_inputs(on_device("ragged-L129-D64"), torch.float32)[:5]]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        output = disentangled_attention(*leaves, **TABLE, backend=backend)
    assert torch.equal(output, disentangled_attention(*(x.bfloat16() for x in leaves), **TABLE, backend=backend))
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(output.float().sum(), leaves))


# Size


@pytest.mark.parametrize("length", [512, 16384])
@by_fused_backend
def test_scratch_memory_is_bounded(backend, length):
    """Forward and backward of 16384 tokens take at most 256 MiB besides inputs, outputs and gradients."""
    heads = [normal(16384 // length, length, 12, 64, dtype=torch.bfloat16, seed=n).transpose(1, 2) for n in range(4)]
    leaves = [x.requires_grad_() for x in (*heads[:3], *(normal(12, 512, 64, dtype=torch.bfloat16) for _ in range(2)))]

    def run():
        output = disentangled_attention(*leaves, backend=backend)
        return [output, *torch.autograd.grad(output, leaves, heads[3])]

    del run()[:]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    torch.cuda.synchronize()
    scratch = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)
    assert scratch <= 256 << 20, f"{scratch / 2**20:.0f} MiB"


@by_fused_backend
def test_offsets_beyond_32_bits(backend):
    """Tensors exceed 2^31 elements. The reference judges the first, a middle and the last sequence one by one."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("needs 48 GiB of free GPU memory")
    heads, length, size = 16, 1024, 64
    batch = 2**31 // (heads * length * size) + 1
    shape = (batch, length, heads, size)
    query, key, value, gradient = (normal(*shape, dtype=torch.bfloat16, seed=n).transpose(1, 2) for n in range(4))
    tables = [normal(heads, 512, size, dtype=torch.bfloat16, seed=n) for n in (4, 5)]
    some = [0, batch // 2, batch - 1]

    def dense(leaves):
        return disentangled_attention(*leaves, backend=backend)

    def packed(leaves):
        rows = [x.transpose(1, 2).flatten(0, 1) for x in leaves[:3]]
        ends = torch.arange(0, len(rows[0]) + 1, length, dtype=torch.int32, device=DEVICE)
        output = disentangled_attention_varlen(*rows, *leaves[3:], cu_seqlens=ends, max_seqlen=length, backend=backend)
        return output.unflatten(0, (-1, length)).transpose(1, 2)

    def run(attention, rows):
        leaves = [x[rows].requires_grad_() for x in (query, key, value)] + [x.detach().requires_grad_() for x in tables]
        output = attention(leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, gradient[rows])]

    def alone(attention, row, dtype):
        leaves = [x[row : row + 1].to(dtype).requires_grad_() for x in (query, key, value)]
        inputs = make_inputs(Case("one", 1, 1, batch=1, heads=heads, buckets=256, longest=512), dtype)
        inputs = inputs._replace(**dict(zip(TENSORS, (*leaves, *(x.to(dtype) for x in tables)))), max_seqlen=length)
        output = attention(inputs)[0]
        return [output.detach(), *torch.autograd.grad(output, leaves, gradient[row : row + 1].to(dtype))]

    exact, eager = (
        [torch.cat(results) for results in zip(*(alone(attention, row, dtype) for row in some))]
        for attention, dtype in ((reference.attention, torch.float64), (hf_style_attention, torch.bfloat16))
    )
    # The tables' gradients are sums over all sequences, so they are compared with sums over parts below the limit.
    parts = [run(dense, slice(start, start + 256))[-2:] for start in range(0, batch, 256)]
    tables_exact = [torch.stack([x.float() for x in each]).sum(0) for each in zip(*parts)]
    for attention in (dense, packed):
        *whole, grad_key_table, grad_query_table = run(attention, slice(None))
        got = [x[some] for x in whole]
        del whole
        for name, *results in zip(("output", "grad_query", "grad_key", "grad_value"), got, eager, exact):
            assert_as_precise(f"{attention.__name__} {name}", *results)
        for grad, want in zip((grad_key_table, grad_query_table), tables_exact):
            assert (grad.float() - want).norm() <= 0.02 * want.norm()


# Refusals

CPU = torch.ones(1, 2, 5, 16)
MIXED = {
    "key": dict(key=CPU, value=CPU),
    "value": dict(value=CPU),
    "pos_key": dict(pos_key=torch.ones(2, 32, 16)),
    "pos_query": dict(pos_query=torch.ones(2, 32, 16)),
    "attention_mask": dict(attention_mask=torch.ones(1, 5, dtype=torch.bool)),
    "query": dict(query=CPU),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("backend", [None, *backends.BACKENDS])
def test_two_devices_are_refused(name, backend):
    tensors = dict.fromkeys(("query", "key", "value"), CPU.to(DEVICE)) | MIXED[name]
    with pytest.raises(ValueError, match="must be on query's device"):
        disentangled_attention(**tensors, **TABLE, backend=backend)


@pytest.mark.parametrize("backend", [None, *backends.BACKENDS])
def test_sequence_ends_on_another_device_are_refused(backend):
    rows = torch.ones(5, 2, 16, device=DEVICE)
    ends = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens must be .* on cuda"):
        disentangled_attention_varlen(rows, rows, rows, cu_seqlens=ends, max_seqlen=5, backend=backend)
