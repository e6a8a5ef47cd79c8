"""The dropout mask: the published generator, the right rate, independence, the same from any tile."""

import torch

from deberta_fast.op import dropout
from deberta_fast.op.dropout import keep_mask


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
