"""Attention dropout by a counter-based mask, which backward recomputes.

The mask depends only on (seed, batch * heads + head, i, j), so that every backend and every tile shape makes the same
one. A seed with an origin (``seed_at``) counts these from other numbers than zero, so that several processes, each with
some of the rows, keys, heads or sequences, make the mask that one process would. The generator is Philox-4x32 with 7
rounds, the fewest that pass BigCrush (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011). One call of
it serves eight consecutive keys, each by 16 bits:

    words = philox(key = seed, counter = (j // 8, i, batch * heads + head, 0))
    u     = (words[e // 2] >> 16 (e % 2)) & 0xffff,  e = j % 8
    keep  = u >= t,  t = round(p 2^16);   kept probabilities are divided by 1 - t / 2^16                     (12)

So p is rounded to a multiple of 2^-16, save that 0 < p < 1 never becomes 0 or 1. The divisor has the rounded p too, so
the mean over all masks is the result without dropout.

A seed is int64, of shape (1,), or of shape (5,) with its origin: seed, first_row, first_key, first_batch_head, heads.
"""

import torch

SEED_SIZES = (1, 5)  # without and with an origin
GROUP = 8  # keys that one call of the generator serves
ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD, _HALF = 0xFFFFFFFF, 0xFFFF


def new_seed(device: torch.device) -> torch.Tensor:
    """Draws a seed, int64 (1,), from torch's generator: reproducible under ``torch.manual_seed``."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def new_seed_of_heads(device: torch.device, share: tuple[int, int] | None) -> torch.Tensor | None:
    """Draws a seed for a process that has some of the heads; processes with equal generators make one process's mask.

    Args:
        share: (first, all), the number of its first head and that of all heads. None, for a process that has all,
            returns None: the operator draws the seed.
    """
    return None if share is None else seed_at(new_seed(device), first_batch_head=share[0], heads=share[1])


def seed_at(
    seed: torch.Tensor, first_row: int = 0, first_key: int = 0, first_batch_head: int = 0, *, heads: int
) -> torch.Tensor:
    """Returns a seed for a call that computes a part of a larger one and makes that part of its mask.

    The call's row i, key j, and head h of batch row (or packed sequence) b are then row first_row + i, key
    first_key + j, and head first_batch_head + b * heads + h of the larger call, whose heads are counted on from batch
    row to batch row.

    Args:
        seed: int64 (1,), the same for all parts. Nothing synchronises with its device.
        first_row, first_key, first_batch_head: not negative; first_key must be a multiple of 8. A part that begins at
            another key needs hidden keys in front.
        heads: number of heads of the larger call, more than the part has if heads are divided too.

    Returns:
        Int64 (5,), on the seed's device, for ``dropout_seed``.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    check_seed("seed", seed, seed.device if isinstance(seed, torch.Tensor) else None, SEED_SIZES[:1])
    if first_key % GROUP:
        raise ValueError(
            f"first_key must be a multiple of {GROUP}, got {first_key}: put {first_key % GROUP} hidden keys in front"
        )
    origin = {"first_row": first_row, "first_key": first_key, "first_batch_head": first_batch_head, "heads": heads}
    for name, number in origin.items():
        if number < 0:
            raise ValueError(f"{name} must not be negative, got {number}")
    # A tensor made of a list would be copied to the device, which synchronises; these are filled there.
    return torch.cat([seed, *(seed.new_full((1,), number) for number in origin.values())])


def check_seed(name: str, seed, device, sizes: tuple[int, ...] = SEED_SIZES) -> None:
    """Checks type, shape and device of a seed, not its values.

    Raises:
        TypeError, ValueError: it is not int64 of a shape (n,), n one of ``sizes``, on that device.
    """
    if not isinstance(seed, torch.Tensor) or seed.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {getattr(seed, 'dtype', type(seed).__name__)}")
    if seed.dim() != 1 or seed.shape[0] not in sizes or seed.device != device:
        shapes = " or ".join(f"({size},)" for size in sizes)
        raise ValueError(f"{name} must be of shape {shapes} on {device}, got {tuple(seed.shape)} on {seed.device}")


def number_heads(seed: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns first_batch_head + batch * heads + head, the third word of the counter of equation 12.

    Args:
        seed: int64 (1,) or (5,), whose number of heads then counts instead of ``heads``.
        batch, head: int64, of shapes that broadcast.
        heads: number of heads of the call.
    """
    return batch * heads + head if len(seed) == 1 else seed[3] + batch * seed[4] + head


def threshold_and_scale(dropout_p: float) -> tuple[int, float]:
    """Returns t of equation 12, 0 for p = 0 and otherwise 1 to 2^16 - 1, and 1 / (1 - t / 2^16)."""
    threshold = min(max(round(dropout_p * 2**16), 1), 2**16 - 1) if dropout_p > 0 else 0
    return threshold, 2**16 / (2**16 - threshold)


def keep_mask(
    seed: torch.Tensor, batch_head: torch.Tensor, rows: torch.Tensor, keys: tuple[int, int], dropout_p: float
) -> torch.Tensor:
    """Returns which probabilities to keep (equation 12).

    Args:
        seed: int64 (1,) or (5,).
        batch_head: ``number_heads``, int64, of a shape ending in (1, 1).
        rows: query indices i, int64, of a shape ending in (rows, 1) that broadcasts with ``batch_head``.
        keys: half-open range of key indices j.
        dropout_p: probability of dropping, in [0, 1).

    Returns:
        Bool, of shape (..., rows, keys).
    """
    start, stop = keys
    groups = torch.arange(start // GROUP, -(-stop // GROUP), dtype=torch.int64, device=seed.device)
    if len(seed) > 1:
        rows, groups = rows + seed[1], groups + seed[2] // GROUP
    words = _philox(seed[:1], (groups, rows, batch_head, torch.zeros_like(groups)))
    halves = torch.stack([half for word in words for half in (word & _HALF, word >> 16)], dim=-1)
    first, (threshold, _) = start % GROUP, threshold_and_scale(dropout_p)
    return halves.flatten(-2)[..., first : first + stop - start] >= threshold


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
