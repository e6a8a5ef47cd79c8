"""Attention of whole sequences to a share of the heads: two exchanges turn stretches into heads and back.

Rank r of W gets heads r H/W to (r + 1) H/W of all rows, attends, and returns every rank its rows (Jacobs et al.,
DeepSpeed Ulysses, arXiv 2309.14509). A head's rows lie together as in one process, so its results have the same bits.
"""

from collections.abc import Callable
from typing import Any

import torch

from .exchange import exchange
from .stretches import Stretches


def by_heads(
    group: Any,
    stretches: Stretches,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attend: Callable,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns output (B, H, L, D) and log-sum-exp (B, H, L) of this rank's rows.

    Args:
        query, key, value: (B, H, L, D), this rank's stretch.
        attend: takes query, key and value (B, H/W, rows of all ranks, D) of this rank's heads, and returns output and
            log-sum-exp.
    """
    ranks, mine = len(stretches.lengths), [stretches.length] * len(stretches.lengths)
    # (L, B, W, 3, H/W, D): rows of every rank's heads, which is the order of an exchange, are one permutation away.
    rows = torch.stack([x.permute(2, 0, 1, 3).unflatten(2, (ranks, -1)) for x in (query, key, value)], 3)
    rows = rows.permute(2, 0, 1, 3, 4, 5).flatten(0, 1)
    rows = exchange(rows, mine, stretches.lengths, group, "queries, keys and values")
    output, lse = attend(*(rows[:, :, n].permute(1, 2, 0, 3) for n in range(3)))
    output = exchange(output.permute(2, 0, 1, 3), stretches.lengths, mine, group, "attention's output")
    lse = exchange(lse.permute(2, 0, 1), stretches.lengths, mine, group, "log-sum-exp")
    # (W L, B, H/W, ...) to (B, H, L, ...)
    output = output.unflatten(0, (ranks, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)
    return output, lse.unflatten(0, (ranks, -1)).permute(2, 0, 3, 1).flatten(1, 2)
