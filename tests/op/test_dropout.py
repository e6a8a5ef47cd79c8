"""The dropout mask: the published generator, the right rate, independence, the same from any tile and any process."""

from contextlib import nullcontext

import numpy
import pytest
import torch
from cases import ON_CPU, Case, make_inputs
from masks import (
    SEED,
    P,
    assert_exact_divisor,
    assert_packed_parts_of_one_mask,
    assert_parts_of_one_mask,
    masks,
    random_bits,
    threshold,
)
from masks import philox as defined_philox

from deberta_fast import disentangled_attention, disentangled_attention_varlen, testing
from deberta_fast.op import dropout
from deberta_fast.op.api import disentangled_attention_with_probabilities
from deberta_fast.op.backends import BACKENDS, cpu
from deberta_fast.op.dropout import keep_mask, number_heads, seed_at, threshold_and_scale

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SETS = [(name, dtype) for dtype in DTYPES for name in (cpu.instruction_sets(DTYPES[dtype]) if "cpu" in ON_CPU else [])]
RUNS = [("reference", "fp32"), ("eager", "fp32"), ("eager", "bf16"), *SETS]
each_run = pytest.mark.parametrize("name, dtype", RUNS)


def by(name):
    """The backend, and the context in which it computes by an instruction set if that is its name."""
    return (name, nullcontext()) if name in BACKENDS else ("cpu", cpu.using(name))


def philox(counter, key):
    seed = torch.tensor([key[0] | (key[1] - (1 << 32 if key[1] >> 31 else 0)) << 32])
    return [int(word) for word in dropout._philox(seed, tuple(torch.tensor([word]) for word in counter))]


def of_the_tests(counter, key):
    return [int(word) for word in defined_philox(key[0] | key[1] << 32, *counter)]


@pytest.mark.parametrize("words", [philox, of_the_tests])
def test_known_answers(words):
    """Philox-4x32-7 test vectors of Random123 (Salmon et al., 2011), kat_vectors."""
    assert words((0,) * 4, (0, 0)) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    ones = 0xFFFFFFFF
    assert words((ones,) * 4, (ones, ones)) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(pi, (0xA4093822, 0x299F31D0)) == [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]


def made(seed, batch, heads, rows, keys, p=P):
    """The mask (batch, heads, rows, keys) of a call by ``keep_mask``."""
    numbers = number_heads(seed, torch.arange(batch)[:, None], torch.arange(heads), heads)
    return keep_mask(seed, numbers[..., None, None], torch.arange(rows)[:, None], (0, keys), p)


@pytest.mark.parametrize("p", [1e-12, 1e-4, 0.1, 0.5, 0.9999, 1 - 1e-12])
def test_keep_mask_is_the_definition(p):
    for seed in (SEED, torch.tensor([-7]), seed_at(SEED, 1001, 2008, 5, heads=7)):
        assert torch.equal(made(seed, 2, 3, 70, 333, p), masks(seed, 2, 3, 70, 333, p))


def test_probabilities_are_multiples_of_a_65536th():
    """Kept probabilities are divided by the probability of keeping that results, so that means stay right."""
    for p in (1e-12, 1e-4, 0.1, 0.3, 0.5, 0.9999, 1 - 1e-12):
        dropped, scale = threshold_and_scale(p)
        assert dropped == threshold(p) and scale == 1 / (1 - dropped / 65536)
    assert threshold_and_scale(1e-12)[0] == 1 and threshold_and_scale(1 - 1e-12)[0] == 65535
    assert threshold_and_scale(0.0) == (0, 1)


@each_run
def test_kept_probabilities_are_divided_by_what_is_kept(name, dtype):
    backend, context = by(name)
    with context:
        assert_exact_divisor(backend, DTYPES[dtype])


def mask(seed=1, heads=4, rows=(0, 64), keys=(0, 257), p=0.3):
    batch_head = torch.arange(heads)[:, None, None]
    return keep_mask(torch.tensor([seed]), batch_head, torch.arange(*rows)[:, None], keys, p)


def test_any_tile_shows_the_same_mask():
    whole = mask()
    assert whole.shape == (4, 64, 257)
    assert torch.equal(mask(rows=(10, 11)), whole[:, 10:11])
    assert torch.equal(mask(keys=(5, 130)), whole[:, :, 5:130])
    assert torch.equal(mask(heads=2), whole[:2])


@pytest.mark.parametrize("p", [1e-4, 0.1, 0.5])
def test_rate_and_independence(p):
    rate = threshold(p) / 65536
    deviation = (rate * (1 - rate)) ** 0.5

    def centred(seed):
        return (mask(seed=seed, heads=16, rows=(0, 256), keys=(0, 256), p=p).double() - (1 - rate)) / deviation

    x = centred(1)
    # The rate of all keys, and of each of the eight of a call.
    for part in (x, *(x[..., e::8] for e in range(8))):
        assert part.mean().abs() < 5 / part.numel() ** 0.5
    neighbours = [(x[..., n:], x[..., :-n]) for n in range(1, 9)]  # up to the next call of the generator
    neighbours += [(x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), (x, centred(2))]
    for one, other in neighbours:
        assert (one * other).mean().abs() < 5 / one.numel() ** 0.5


def test_all_bits_are_used():
    """Each of the 16 bits of each key of a call is set half of the time, and no two keys of a call share one."""
    bits = random_bits(1, range(4), range(64), range(512)).reshape(-1, 8)
    each = (bits[:, :, None] >> numpy.arange(16, dtype=numpy.uint64) & numpy.uint64(1)).reshape(
        len(bits), 128
    ) * 2.0 - 1
    bound = 5.5 / len(bits) ** 0.5  # of 8128 pairs
    assert abs(each.mean(0)).max() < bound
    assert abs(each.T @ each / len(bits) - numpy.eye(128)).max() < bound


def test_the_mean_over_masks_is_the_result_without_dropout():
    query, key, value = torch.randn(3, 1, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    many = [x.expand(1, 4096, 16, 16) for x in (query, key, value)]  # heads are independent
    found = disentangled_attention(*many, dropout_p=0.3, dropout_seed=SEED, backend="eager")
    error = found.mean(1) - disentangled_attention(query, key, value, backend="eager")[:, 0]
    assert (error / (found.std(1) / 64)).abs().max() < 5


def test_nothing_dropped_at_zero():
    assert mask(p=0.0).all()


# Seeds with an origin, and seeds that the caller gives


def test_origins_cut_parts_from_one_mask():
    """The whole mask by the seed alone: of 3 batch rows, 4 heads, 30 rows, 50 keys."""
    whole = made(SEED, 3, 4, 30, 50)
    assert torch.equal(made(seed_at(SEED, heads=4), 3, 4, 30, 50), whole)
    assert torch.equal(made(seed_at(SEED, first_row=11, heads=4), 3, 4, 19, 50), whole[:, :, 11:])
    assert torch.equal(made(seed_at(SEED, first_key=24, heads=4), 3, 4, 30, 26), whole[..., 24:])
    assert torch.equal(made(seed_at(SEED, first_batch_head=4, heads=4), 2, 4, 30, 50), whole[1:])
    assert torch.equal(made(seed_at(SEED, first_batch_head=1, heads=4), 3, 2, 30, 50), whole[:, 1:3])
    last = seed_at(SEED, 20, 40, 2 * 4 + 3, heads=4)
    assert torch.equal(made(last, 1, 1, 10, 10), whole[2:, 3:, 20:, 40:])


def test_numbers_of_an_origin_are_words():
    """Sums up to 2^32 - 1, the largest that the generator takes, neither wrap nor meet another word."""
    far = seed_at(SEED, 2**31, 2**31, 2**31, heads=4)
    words = defined_philox(int(SEED), 2**28 + 1, 2**31 + 3, 2**31 + 6, 0)
    halves = [half for word in words for half in (int(word) & 0xFFFF, int(word) >> 16)]
    assert made(far, 2, 4, 4, 16)[1, 2, 3, 8:].tolist() == [half >= round(0.4 * 2**16) for half in halves]


BAD_ORIGINS = {
    "key": (dict(first_key=12), ValueError, "first_key must be a multiple of 8, got 12: put 4 hidden keys in front"),
    "row": (dict(first_row=-1), ValueError, "first_row must not be negative, got -1"),
    "head": (dict(first_batch_head=-2), ValueError, "first_batch_head must not be negative, got -2"),
    "origin": (dict(seed=torch.zeros(5).long()), ValueError, r"seed must be of shape \(1,\) on cpu, got \(5,\) on cpu"),
    "dtype": (dict(seed=torch.zeros(1)), TypeError, "seed must be an int64 tensor, got torch.float32"),
    "type": (dict(seed=7), TypeError, "seed must be an int64 tensor, got int"),
}


@pytest.mark.parametrize("name", BAD_ORIGINS)
def test_bad_origins_are_refused(name):
    options, error, message = BAD_ORIGINS[name]
    with pytest.raises(error, match=message):
        seed_at(**{"seed": SEED, "heads": 4} | options)


BAD_SEEDS = {
    "type": (3, TypeError, "dropout_seed must be an int64 tensor, got int"),
    "dtype": (torch.ones(1, dtype=torch.int32), TypeError, "dropout_seed must be an int64 tensor, got torch.int32"),
    "shape": (torch.ones(2).long(), ValueError, r"must be of shape \(1,\) or \(5,\) on cpu, got \(2,\) on cpu"),
    "no dimension": (torch.tensor(1), ValueError, r"must be of shape \(1,\) or \(5,\) on cpu, got \(\) on cpu"),
    "device": (torch.ones(1, device="meta").long(), ValueError, r"or \(5,\) on cpu, got \(1,\) on meta"),
}


@pytest.mark.parametrize("name", BAD_SEEDS)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bad_seeds_are_refused(name, p):
    """Without dropout too, so that a mistake shows before training."""
    seed, error, message = BAD_SEEDS[name]
    x, rows = torch.randn(1, 1, 5, 8), torch.randn(5, 1, 8)
    with pytest.raises(error, match=message):
        disentangled_attention(x, x, x, dropout_p=p, dropout_seed=seed)
    with pytest.raises(error, match=message):
        ends = torch.tensor([0, 5], dtype=torch.int32)
        disentangled_attention_varlen(rows, rows, rows, cu_seqlens=ends, max_seqlen=5, dropout_p=p, dropout_seed=seed)
    with pytest.raises(error, match=message):
        disentangled_attention_with_probabilities(x, x, x, dropout_p=p, dropout_seed=seed)


@each_run
def test_backends_make_parts_of_one_mask(name, dtype):
    backend, context = by(name)
    with context:
        assert_parts_of_one_mask(backend, DTYPES[dtype])
        assert_packed_parts_of_one_mask(backend, DTYPES[dtype])


ORIGINS = (testing.Kind(mask="keys", dropout=True, origin=True), testing.Kind(packed=True, dropout=True, origin=True))


@pytest.mark.parametrize("name, dtype", [run for run in RUNS if run[0] != "reference"])
def test_forward_and_backward_make_the_same_mask(name, dtype):
    backend, context = by(name)
    with context:
        testing.assert_backend(BACKENDS[backend], dtype=DTYPES[dtype], kinds=ORIGINS)


def test_probabilities_of_a_given_seed():
    query, key, value = make_inputs(Case("", 20, 20, size=16), torch.float32)[:3]
    seed = seed_at(SEED, 3, 8, 2, heads=5)
    _, probabilities = disentangled_attention_with_probabilities(query, key, value, dropout_p=0.4, dropout_seed=seed)
    assert torch.equal(probabilities != 0, masks(seed, 2, 3, 20, 20))


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_given_seed_leaves_the_generator_alone(backend):
    """The same seed gives the same results, which are those of the seed that the generator draws."""
    x = make_inputs(Case("", 20, 20, size=16), torch.float32)[:3]
    torch.manual_seed(3)
    seed, before = dropout.new_seed(torch.device("cpu")), torch.get_rng_state()
    one, other = (disentangled_attention(*x, dropout_p=0.4, dropout_seed=seed, backend=backend) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    drawn = disentangled_attention(*x, dropout_p=0.4, backend=backend)
    assert torch.equal(one, drawn) and torch.equal(other, drawn)
    strided = torch.stack([seed, seed + 1], 1)[:, 0].expand(1)
    assert torch.equal(disentangled_attention(*x, dropout_p=0.4, dropout_seed=strided, backend=backend), drawn)


def test_compiled_with_a_given_seed():
    """One graph serves all seeds and origins; their gradients are those of eager mode."""
    torch._dynamo.reset()
    leaves = [x.requires_grad_() for x in make_inputs(Case("", 20, 20, size=16), torch.float32)[:3]]

    def attention(seed, first_key):
        seed = seed_at(seed, first_row=5, first_key=8 * first_key, heads=3)
        return disentangled_attention(*leaves, dropout_p=0.4, dropout_seed=seed)

    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for number, first_key in ((1, 3), (2, 7)):
        results = [function(torch.tensor([number]), first_key) for function in (compiled, attention)]
        assert torch.equal(*results) and (results[0] == 0).sum() < results[0].numel()
        for got, expected in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in results)):
            torch.testing.assert_close(got, expected)


def test_exported_with_a_given_seed():
    class Attention(torch.nn.Module):
        def forward(self, x, seed):
            return disentangled_attention(x, x, x, dropout_p=0.4, dropout_seed=seed)

    x, seeds = torch.randn(2, 3, 20, 16), [seed_at(SEED, n, heads=3) for n in (0, 9)]
    program = torch.export.export(Attention(), (x, seeds[0])).module()
    for seed in seeds:
        assert torch.equal(program(x, seed), Attention()(x, seed))


def test_a_seed_that_is_written_to_before_backward_is_an_error():
    x, seed = torch.randn(1, 1, 5, 8, requires_grad=True), SEED.clone()
    output = disentangled_attention(x, x, x, dropout_p=0.4, dropout_seed=seed)
    seed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
