"""The dropout masks that backends make, and those that they should make (equation 12)."""

import numpy
import torch

from deberta_fast import disentangled_attention, disentangled_attention_varlen
from deberta_fast.op.dropout import seed_at

SEED = torch.tensor([(1 << 62) + 12345])
EXACT_SEED = torch.tensor([131])  # among the bits for assert_exact_divisor are 0, 1, 65534 and 65535
P = 0.4


def philox(seed, *counter):
    """The words of Philox-4x32 with 7 rounds, uint64, for a seed of 64 bits and a counter of four words."""
    c0, c1, c2, c3 = (numpy.asarray(word, numpy.uint64) for word in counter)
    word, upper = numpy.uint64(0xFFFFFFFF), numpy.uint64(32)
    for number in range(7):
        k0, k1 = (
            numpy.uint64((half + number * step) & 0xFFFFFFFF)
            for half, step in ((seed & 0xFFFFFFFF, 0x9E3779B9), (seed >> 32 & 0xFFFFFFFF, 0xBB67AE85))
        )
        p0, p1 = c0 * numpy.uint64(0xD2511F53), c2 * numpy.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = p1 >> upper ^ c1 ^ k0, p1 & word, p0 >> upper ^ c3 ^ k1, p0 & word
    return numpy.broadcast_arrays(c0, c1, c2, c3)


def random_bits(seed, batch_head, rows, keys):
    """The 16 bits of each (number of a head, row, key), from three lists."""
    batch_head, rows, keys = (numpy.asarray(x) for x in (batch_head, rows, keys))
    words = numpy.stack(philox(seed, keys // 8, rows[:, None], batch_head[:, None, None], 0))
    chosen = words[keys % 8 // 2, :, :, numpy.arange(len(keys))]  # (keys, heads, rows)
    return numpy.moveaxis(chosen, 0, -1) >> (16 * (keys % 2)).astype(numpy.uint64) & numpy.uint64(0xFFFF)


def threshold(p):
    return min(max(round(p * 65536), 1), 65535)


def masks(seed, batch, heads, rows, keys, p=P):
    """The mask (batch, heads, rows, keys) of a call, by the definition."""
    numbers = seed.tolist() if len(seed) == 5 else [*seed.tolist(), 0, 0, 0, heads]
    seed, first_row, first_key, first_head, all_heads = numbers
    numbers = [first_head + b * all_heads + h for b in range(batch) for h in range(heads)]
    bits = random_bits(seed, numbers, range(first_row, first_row + rows), range(first_key, first_key + keys))
    return torch.from_numpy(bits >= numpy.uint64(threshold(p))).view(batch, heads, rows, keys)


def assert_exact_divisor(backend: str, dtype: torch.dtype) -> None:
    """What dropout keeps is divided by the probability of keeping, a multiple of 2^-16, and not by 1 - p.

    All scores are equal and the values are the rows of an identity matrix. Of 1 - p = 0.0001 become 7 / 65536.
    """
    p, length = 0.9999, 64
    query = torch.zeros(2, 3, length, length, dtype=dtype)
    value = torch.eye(length, dtype=dtype).expand_as(query).requires_grad_()
    output = disentangled_attention(query, query, value, dropout_p=p, dropout_seed=EXACT_SEED, backend=backend)
    [gradient] = torch.autograd.grad(output.sum(), value)
    kept = masks(EXACT_SEED, 2, 3, length, length, p)
    assert kept.any()
    factors = kept / (length * (7 / 65536))
    torch.testing.assert_close(output.detach().double(), factors.double(), rtol=0.02, atol=0)
    summed = factors.sum(2)[..., None].expand_as(gradient)
    torch.testing.assert_close(gradient.double(), summed.double(), rtol=0.02, atol=0)
    for p in (1e-9, 1 - 1e-9):  # thresholds 1 and 65535, where one less or more shows
        output = disentangled_attention(query, query, value, dropout_p=p, dropout_seed=EXACT_SEED, backend=backend)
        kept = masks(EXACT_SEED, 2, 3, length, length, p)
        assert kept.any() and not kept.all()
        assert torch.equal(output != 0, kept)


def assert_parts_of_one_mask(backend: str, dtype: torch.dtype) -> None:
    """Compares the masks of parts of the rows, keys, heads and batch rows, and of one that is all of these.

    The values are the rows of an identity matrix, so the output shows every probability.
    """
    query, key = torch.randn(2, 2, 3, 88, 88, generator=torch.Generator().manual_seed(0)).to(dtype)

    def shown(query, key, seed):
        value = torch.eye(88, dtype=dtype)[: key.shape[2]].expand_as(key)
        output = disentangled_attention(
            query, key, value, dropout_p=P, dropout_seed=seed, scale=0.01, backend=backend
        )  # fmt: skip
        return output[..., : key.shape[2]] != 0

    whole = shown(query, key, SEED)
    assert torch.equal(whole, masks(SEED, 2, 3, 88, 88))
    assert torch.equal(shown(query[:, :, 37:], key, seed_at(SEED, first_row=37, heads=3)), whole[:, :, 37:])
    assert torch.equal(shown(query, key[:, :, 24:], seed_at(SEED, first_key=24, heads=3)), whole[..., 24:])
    assert torch.equal(shown(query[:, 1:], key[:, 1:], seed_at(SEED, 0, 0, 1, heads=3)), whole[:, 1:])
    assert torch.equal(shown(query[1:], key[1:], seed_at(SEED, 0, 0, 3, heads=3)), whole[1:])
    corner = shown(query[1:, 2:, 70:], key[1:, 2:, 56:], seed_at(SEED, 70, 56, 5, heads=3))
    assert torch.equal(corner, whole[1:, 2:, 70:, 56:])


def assert_packed_parts_of_one_mask(backend: str, dtype: torch.dtype) -> None:
    """Rows and keys count within their sequence from the origin on, and sequences are as far apart as batch rows."""
    lengths, heads = (5, 64, 0, 30), 2
    query, key = torch.randn(2, sum(lengths), heads, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    value = torch.cat([torch.eye(64, dtype=dtype)[:length] for length in lengths])[:, None].expand_as(key)
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    output = disentangled_attention_varlen(
        query, key, value, cu_seqlens=ends, max_seqlen=64, scale=0.01, dropout_p=P,
        dropout_seed=seed_at(SEED, 7, 40, 3, heads=6), backend=backend,
    )  # fmt: skip
    whole = masks(SEED, 5, 6, 71, 104).flatten(0, 1)
    for sequence, (start, stop) in enumerate(zip(ends.tolist(), ends.tolist()[1:])):
        first, length = 3 + 6 * sequence, stop - start
        expected = whole[first : first + heads, 7 : 7 + length, 40 : 40 + length]
        assert torch.equal(output[start:stop, :, :length].transpose(0, 1) != 0, expected), sequence
