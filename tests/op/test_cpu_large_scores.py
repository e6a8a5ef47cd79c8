"""The C++ backend where scores are large: probabilities add up to 1 for any rounding of the log-sum-exp."""

import pytest
import torch
from cases import TENSORS, Case, as_dtype, make_inputs
from comparison import compare_draws, public

from deberta_fast import backends, disentangled_attention
from deberta_fast.op.backends import cpu

pytestmark = pytest.mark.skipif(cpu.NOT_LOADED is not None, reason=str(cpu.NOT_LOADED))

each_set = pytest.mark.parametrize("capability", cpu.instruction_sets())
# Backward cuts the second into parts, and forward cuts it into smaller blocks. The first two have near and far keys.
# The blocks of the last one do not end at a multiple of a vector.
SHAPES = {
    "near-and-far": Case("", 200, 200, heads=2),
    "parts": Case("", 400, 400, batch=1, heads=1, mask="holes"),
    "near": Case("", 90, 150, batch=1, buckets=256, longest=512, offset=60),
    "pairwise": Case("", 150, 150, batch=1, size=24, mask="pairwise"),
}


def louder(inputs, names, amplitude):
    return inputs._replace(**{name: getattr(inputs, name) * amplitude for name in names})


def draws_of(case, names=(), amplitude=1.0, dtype=torch.float32, **fields):
    return [louder(make_inputs(case, dtype, seed), names, amplitude)._replace(**fields) for seed in range(4)]


# Scores of up to some hundreds, and of 1e4 and more


@pytest.mark.parametrize("names", [TENSORS[:1], ("query", "key", "pos_key", "pos_query")], ids=["query", "both"])
@pytest.mark.parametrize("amplitude", [1, 4, 8, 16, 40])
@pytest.mark.parametrize("name", SHAPES)
def test_as_precise_as_a_softmax_that_was_kept(name, amplitude, names):
    compare_draws(public("cpu"), draws_of(SHAPES[name], names, amplitude))


@each_set
@pytest.mark.parametrize("name", ["near-and-far", "parts"])
def test_by_every_instruction_set(name, capability):
    with cpu.using(capability):
        compare_draws(public("cpu"), draws_of(SHAPES[name], TENSORS[:1], 40))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_in_half_precision(dtype):
    compare_draws(public("cpu"), draws_of(SHAPES["near-and-far"], TENSORS[:1], 40, dtype))


@pytest.mark.parametrize("name", SHAPES)
def test_a_scale_of_1e30(name):
    compare_draws(public("cpu"), draws_of(SHAPES[name], scale=1e30))


# Results that are known exactly


@each_set
@pytest.mark.parametrize("offset", [0, -500, 500], ids=["near", "future", "past"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_one_key_has_a_probability_of_one(dtype, offset, capability):
    inputs = louder(make_inputs(Case("", 32, 1, offset=offset), dtype), TENSORS[:1], 40)
    inputs = as_dtype(inputs, dtype)
    with cpu.using(capability):
        output, _ = public("cpu")(inputs)
        cotangent = torch.arange(32.0).to(dtype)[:, None].expand_as(output)
        grads = dict(zip(TENSORS, torch.autograd.grad(output, inputs[:5], cotangent), strict=True))
    assert torch.equal(output, inputs.value.expand_as(output))
    assert (grads.pop("value") == 496).all() and all((x == 0).all() for x in grads.values())


@pytest.mark.parametrize("scale", [None, 1e5, 1e30, 3e34])
def test_equal_keys_share_alike(scale):
    """A float32 log-sum-exp of 1e31 is too coarse to contain the logarithm of the number of keys."""
    inputs = make_inputs(Case("", 5, 37, heads=2), torch.float32)
    query, value = inputs.query, inputs.value.requires_grad_()
    key = inputs.key[:, :, :1].expand_as(inputs.key)
    output = disentangled_attention(query, key, value, scale=scale, backend="cpu")
    torch.testing.assert_close(output, value.mean(2, keepdim=True).expand_as(output))
    (grad,) = torch.autograd.grad(output.sum(), value)
    torch.testing.assert_close(grad, torch.full_like(grad, 5 / 37))


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_but_minus_infinity_has_no_softmax(backend, far):
    """A row whose scores are all minus infinity gives NaN; a row that sees no key gives zero."""
    inputs = make_inputs(Case("", 6, 9, size=16, offset=-500 * far), torch.float32)
    inputs.query.abs_(), inputs.key.abs_()
    inputs.query[0, 1, 2:4] = torch.inf
    inputs.key[0, 1] *= -1
    mask = torch.ones(1, 1, 6, 9, dtype=torch.bool)
    mask[..., 3, :], mask[..., 2, :4] = False, False
    inputs = as_dtype(inputs._replace(pos_key=None, pos_query=None, mask=mask), torch.float32)
    output, lse = public(backend)(inputs)
    nothing = torch.zeros_like(lse, dtype=torch.bool)
    nothing[0, 1, 2] = True
    assert output[nothing].isnan().all() and not output[~nothing].isnan().any() and (output[:, :, 3] == 0).all()
    assert (lse[nothing] == -torch.inf).all() and (lse[:, :, 3] == -torch.inf).all()
    (grad,) = torch.autograd.grad(output.sum(), inputs.value)
    assert grad[0, 1, 4:].isnan().all() and not grad[1].isnan().any()


# The statistics that are stored behind the log-sum-exp


def gradients(inputs, output, lse):
    return backends.backward(inputs, "cpu", output, lse, output, None)


def test_a_copied_log_sum_exp_will_do():
    """A copy loses the statistics behind it, as does a log-sum-exp that saved-tensor hooks move."""
    (inputs, *_) = draws_of(SHAPES["near-and-far"])
    output, lse = backends.forward(inputs, "cpu")
    for got, expected in zip(gradients(inputs, output, lse.clone()), gradients(inputs, output, lse), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_other_numbers_behind_a_log_sum_exp_are_not_taken_for_its_own():
    (inputs, *_) = draws_of(SHAPES["near-and-far"])
    output, lse = backends.forward(inputs, "cpu")
    stacked = torch.stack([lse, lse + 1, lse + 2])
    for got, expected in zip(
        gradients(inputs, output, stacked[0]), gradients(inputs, output, lse.clone()), strict=True
    ):
        assert torch.equal(got, expected)


def test_a_log_sum_exp_over_more_keys_than_these():
    """Query gradients over parts of the keys, each with the log-sum-exp over all keys, add up to the whole gradient."""
    (inputs, *_) = draws_of(SHAPES["near-and-far"])
    parts = [
        inputs._replace(key=inputs.key[:, :, at], value=inputs.value[:, :, at], query_offset=-at.start)
        for at in (slice(0, 90), slice(90, 200))
    ]
    results = [backends.forward(part, "cpu") for part in parts]
    lse = torch.logsumexp(torch.stack([lse for _, lse in results]), 0)
    output = sum(output * (part - lse).exp()[..., None] for output, part in results)
    whole, whole_lse = backends.forward(inputs, "cpu")
    torch.testing.assert_close(output, whole)
    got = [gradients(part, output, lse)[0] for part in parts]
    torch.testing.assert_close(sum(got), gradients(inputs, whole, whole_lse)[0], rtol=1e-4, atol=1e-5)


def test_compiled_gradients_are_the_same():
    inputs = as_dtype(draws_of(SHAPES["parts"], TENSORS[:1], 40)[0], torch.float32)
    options = dict(position_buckets=16, max_relative_positions=32, attention_mask=inputs.mask, backend="cpu")
    function = lambda *tensors: disentangled_attention(*tensors, **options)
    outputs = function(*inputs[:5]), torch.compile(function, backend="aot_eager", fullgraph=True)(*inputs[:5])
    grads = [torch.autograd.grad(output.square().sum(), inputs[:5]) for output in outputs]
    assert torch.equal(*outputs) and all(map(torch.equal, *grads))
