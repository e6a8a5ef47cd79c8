"""The dropout masks that backends make, and those that they should make (equation 12)."""

import torch

from deberta_fast import disentangled_attention, disentangled_attention_varlen
from deberta_fast.op.dropout import keep_mask, number_heads, seed_at

SEED = torch.tensor([(1 << 62) + 12345])
P = 0.4


def masks(seed, batch, heads, rows, keys):
    """The mask (batch, heads, rows, keys) of a call by ``keep_mask``."""
    numbers = number_heads(seed, torch.arange(batch)[:, None], torch.arange(heads), heads)
    return keep_mask(seed, numbers[..., None, None], torch.arange(rows)[:, None], (0, keys), P)


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
    assert torch.equal(shown(query, key[:, :, 20:], seed_at(SEED, first_key=20, heads=3)), whole[..., 20:])
    assert torch.equal(shown(query[:, 1:], key[:, 1:], seed_at(SEED, 0, 0, 1, heads=3)), whole[:, 1:])
    assert torch.equal(shown(query[1:], key[1:], seed_at(SEED, 0, 0, 3, heads=3)), whole[1:])
    corner = shown(query[1:, 2:, 70:], key[1:, 2:, 52:], seed_at(SEED, 70, 52, 5, heads=3))
    assert torch.equal(corner, whole[1:, 2:, 70:, 52:])


def assert_packed_parts_of_one_mask(backend: str, dtype: torch.dtype) -> None:
    """Rows and keys count within their sequence from the origin on, and sequences are as far apart as batch rows."""
    lengths, heads = (5, 64, 0, 30), 2
    query, key = torch.randn(2, sum(lengths), heads, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    value = torch.cat([torch.eye(64, dtype=dtype)[:length] for length in lengths])[:, None].expand_as(key)
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    output = disentangled_attention_varlen(
        query, key, value, cu_seqlens=ends, max_seqlen=64, scale=0.01, dropout_p=P,
        dropout_seed=seed_at(SEED, 7, 36, 3, heads=6), backend=backend,
    )  # fmt: skip
    whole = masks(SEED, 5, 6, 71, 100).flatten(0, 1)
    for sequence, (start, stop) in enumerate(zip(ends.tolist(), ends.tolist()[1:])):
        first, length = 3 + 6 * sequence, stop - start
        expected = whole[first : first + heads, 7 : 7 + length, 36 : 36 + length]
        assert torch.equal(output[start:stop, :, :length].transpose(0, 1) != 0, expected), sequence
