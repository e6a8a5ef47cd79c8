"""The dropout mask: the published generator, the right rate, independence, the same from any tile and any process."""

from contextlib import nullcontext

import pytest
import torch
from cases import ON_CPU, Case, make_inputs

from deberta_fast import disentangled_attention, disentangled_attention_varlen, testing
from deberta_fast.op import dropout
from deberta_fast.op.api import disentangled_attention_with_probabilities
from deberta_fast.op.backends import BACKENDS, cpu
from deberta_fast.op.dropout import keep_mask, number_heads, seed_at

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


def test_known_answers():
    """Philox-4x32-7 test vectors of Random123 (Salmon et al., 2011), kat_vectors."""
    assert philox((0,) * 4, (0, 0)) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    ones = 0xFFFFFFFF
    assert philox((ones,) * 4, (ones, ones)) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox(pi, (0xA4093822, 0x299F31D0)) == [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]


def mask(seed=1, heads=4, rows=(0, 64), keys=(0, 257), p=0.3):
    batch_head = torch.arange(heads)[:, None, None]
    return keep_mask(torch.tensor([seed]), batch_head, torch.arange(*rows)[:, None], keys, p)


def test_any_tile_shows_the_same_mask():
    whole = mask()
    assert whole.shape == (4, 64, 257)
    assert torch.equal(mask(rows=(10, 11)), whole[:, 10:11])
    assert torch.equal(mask(keys=(5, 130)), whole[:, :, 5:130])
    assert torch.equal(mask(heads=2), whole[:2])


def test_rate_and_independence():
    for p in (0.1, 0.5):
        kept = mask(heads=16, rows=(0, 256), keys=(0, 256), p=p).double()
        count = kept.numel()
        assert abs(kept.mean() - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
        centred = (kept - (1 - p)) / (p * (1 - p)) ** 0.5
        neighbours = (
            (centred[:, :, 1:], centred[:, :, :-1]),
            (centred[:, :, 4:], centred[:, :, :-4]),  # the next call of the generator
            (centred[:, 1:], centred[:, :-1]),
            (centred[1:], centred[:-1]),
        )
        for one, other in neighbours:
            assert (one * other).mean().abs() < 5 / one.numel() ** 0.5
        other_seed = (mask(seed=2, heads=16, rows=(0, 256), keys=(0, 256), p=p).double() - (1 - p)) / (
            p * (1 - p)
        ) ** 0.5
        assert (centred * other_seed).mean().abs() < 5 / count**0.5


def test_nothing_dropped_at_zero():
    assert mask(p=0.0).all()


# Seeds with an origin, and seeds that the caller gives


SEED = torch.tensor([(1 << 62) + 12345])


def masks(seed, batch, heads, rows, keys, p=0.4):
    """The mask (batch, heads, rows, keys) of a call by ``keep_mask``."""
    numbers = number_heads(seed, torch.arange(batch)[:, None], torch.arange(heads), heads)
    return keep_mask(seed, numbers[..., None, None], torch.arange(rows)[:, None], (0, keys), p)


def test_origins_cut_parts_from_one_mask():
    """The whole mask by the seed alone: of 3 batch rows, 4 heads, 30 rows, 50 keys."""
    whole = masks(SEED, 3, 4, 30, 50)
    assert torch.equal(masks(seed_at(SEED, heads=4), 3, 4, 30, 50), whole)
    assert torch.equal(masks(seed_at(SEED, first_row=11, heads=4), 3, 4, 19, 50), whole[:, :, 11:])
    assert torch.equal(masks(seed_at(SEED, first_key=28, heads=4), 3, 4, 30, 22), whole[..., 28:])
    assert torch.equal(masks(seed_at(SEED, first_batch_head=4, heads=4), 2, 4, 30, 50), whole[1:])
    assert torch.equal(masks(seed_at(SEED, first_batch_head=1, heads=4), 3, 2, 30, 50), whole[:, 1:3])
    last = seed_at(SEED, 20, 40, 2 * 4 + 3, heads=4)
    assert torch.equal(masks(last, 1, 1, 10, 10), whole[2:, 3:, 20:, 40:])


def test_numbers_of_an_origin_are_words():
    """Sums up to 2^32 - 1, the largest that the generator takes, neither wrap nor meet another word."""
    far = seed_at(SEED, 2**31, 2**31, 2**31, heads=4)
    words = dropout._philox(SEED, tuple(torch.tensor([x]) for x in (2**29 + 1, 2**31 + 3, 2**31 + 6, 0)))
    assert masks(far, 2, 4, 4, 8)[1, 2, 3, 4:].tolist() == [bool(w >= round(0.4 * 2**32)) for w in words]


BAD_ORIGINS = {
    "key": (dict(first_key=6), ValueError, "first_key must be a multiple of 4, got 6"),
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


def shown(query, key, p=0.4, **options):
    """The mask of a call. The values are the rows of an identity matrix, so the output shows every probability."""
    value = torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:2], -1, -1)
    query, key = (torch.nn.functional.pad(x, (0, value.shape[3] - x.shape[3])) for x in (query, key))
    return disentangled_attention(query, key, value, dropout_p=p, scale=0.01, **options) != 0


@each_run
def test_backends_make_parts_of_one_mask(name, dtype):
    """Every second part of rows, keys, heads and batch rows, and one that is all of these."""
    query, key = torch.randn(2, 2, 3, 88, 8, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    backend, context = by(name)
    with context:
        show = lambda query, key, seed: shown(query, key, dropout_seed=seed, backend=backend)
        whole = show(query, key, SEED)
        assert torch.equal(whole, masks(SEED, 2, 3, 88, 88))
        assert torch.equal(show(query[:, :, 37:], key, seed_at(SEED, first_row=37, heads=3)), whole[:, :, 37:])
        assert torch.equal(show(query, key[:, :, 20:], seed_at(SEED, first_key=20, heads=3)), whole[..., 20:])
        assert torch.equal(show(query[:, 1:], key[:, 1:], seed_at(SEED, 0, 0, 1, heads=3)), whole[:, 1:])
        assert torch.equal(show(query[1:], key[1:], seed_at(SEED, 0, 0, 3, heads=3)), whole[1:])
        corner = show(query[1:, 2:, 70:], key[1:, 2:, 52:], seed_at(SEED, 70, 52, 5, heads=3))
        assert torch.equal(corner, whole[1:, 2:, 70:, 52:])


@each_run
def test_packed_sequences_have_origins(name, dtype):
    """Rows and keys count within their sequence from the origin on, and sequences are as far apart as batch rows."""
    lengths, heads = (5, 64, 0, 30), 2
    rows = torch.randn(2, sum(lengths), heads, 64, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    value = torch.cat([torch.eye(64)[:n] for n in lengths])[:, None].expand(-1, heads, -1).to(rows)
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    seed = seed_at(SEED, 7, 36, 3, heads=6)
    backend, context = by(name)
    with context:
        output = disentangled_attention_varlen(
            *rows, value, cu_seqlens=ends, max_seqlen=64, scale=0.01, dropout_p=0.4, dropout_seed=seed, backend=backend
        )
    whole = masks(SEED, 8, 6, 71, 100).flatten(0, 1)
    for sequence, (start, stop) in enumerate(zip(ends.tolist(), ends.tolist()[1:])):
        first = 3 + 6 * sequence
        expected = whole[first : first + heads, 7 : 7 + stop - start, 36 : 36 + stop - start]
        assert torch.equal(output[start:stop, :, : stop - start].transpose(0, 1) != 0, expected), sequence


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
        seed = seed_at(seed, first_row=5, first_key=4 * first_key, heads=3)
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
