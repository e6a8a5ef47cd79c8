"""Attention dropout by a counter-based mask, which backward recomputes.

The mask depends only on (seed, batch * heads + head, i, j), so that every backend and every tile shape makes the same
one. The generator is Philox-4x32 with 7 rounds, the fewest that pass BigCrush (Salmon et al., Parallel Random Numbers:
As Easy as 1, 2, 3, SC 2011). One call of it serves four consecutive keys:

    words = philox(key = seed, counter = (j // 4, i, batch * heads + head, 0));   u = words[j % 4]
    keep  = u >= round(p 2^32);   kept probabilities are divided by 1 - p                                    (12)
"""

import torch

ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def new_seed(device: torch.device) -> torch.Tensor:
    """Draws a seed, int64 (1,), from torch's generator: reproducible under ``torch.manual_seed``."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def keep_mask(
    seed: torch.Tensor, batch_head: torch.Tensor, rows: torch.Tensor, keys: tuple[int, int], dropout_p: float
) -> torch.Tensor:
    """Returns which probabilities to keep (equation 12).

    Args:
        seed: (1,) int64.
        batch_head: batch * heads + head, int64, of a shape ending in (1, 1).
        rows: query indices i, int64, of a shape ending in (rows, 1) that broadcasts with ``batch_head``.
        keys: half-open range of key indices j.
        dropout_p: probability of dropping, in [0, 1).

    Returns:
        Bool, of shape (..., rows, keys).
    """
    start, stop = keys
    groups = torch.arange(start // 4, -(-stop // 4), dtype=torch.int64, device=seed.device)
    words = torch.stack(_philox(seed, (groups, rows, batch_head, torch.zeros_like(groups))), dim=-1)
    return words.flatten(-2)[..., start % 4 : start % 4 + stop - start] >= round(dropout_p * 2**32)


def _philox(seed: torch.Tensor, counter: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    # int64 holds 32-bit words. A product of two may wrap past 2^63, but its 64 bits are right. The shift to the upper
    # word then extends the sign, which the mask removes.
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) & _WORD ^ c1 ^ k0, p1 & _WORD, (p0 >> 32) & _WORD ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.broadcast_tensors(c0, c1, c2, c3)
