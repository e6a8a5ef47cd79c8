"""Which rows of a batch each rank holds, and which keys its queries attend to.

The ranks' stretches follow each other. A dense batch (B, L, ...) is cut along L, packed sequences (T, ...) along T. A
sequence may begin on one rank and end on a later one. Positions count from the start of a sequence.
"""

import bisect
import functools
import itertools
from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """Rows [start, stop) of a rank's stretch; the first one is at ``position`` of its sequence."""

    start: int
    stop: int
    position: int

    @property
    def count(self) -> int:
        return self.stop - self.start


class Piece(NamedTuple):
    """The part of a sequence that lies on this rank, where other ranks have the rest.

    Attributes:
        sequence: its number; 0 for a dense batch, whose sequences are all cut alike.
        queries: its rows here.
        keys: its rows on every rank that has some, by rank.
    """

    sequence: int
    queries: Rows
    keys: dict[int, Rows]


class Stretches:
    """The stretches of all ranks.

    Args:
        lengths: rows of each rank; columns of a dense batch.
        rank: this rank.
        ends: cu_seqlens of all packed sequences on the host, (n + 1,); None for a dense batch.
    """

    def __init__(self, lengths: tuple[int, ...], rank: int, ends: tuple[int, ...] | None = None):
        self.lengths, self.rank, self.ends = lengths, rank, ends
        self.starts = tuple(itertools.accumulate(lengths, initial=0))

    @property
    def total(self) -> int:
        """Rows of all ranks: L of a dense batch, or T."""
        return self.starts[-1]

    @property
    def start(self) -> int:
        return self.starts[self.rank]

    @property
    def stop(self) -> int:
        return self.starts[self.rank + 1]

    @property
    def length(self) -> int:
        return self.lengths[self.rank]

    def owner(self, row: int) -> int:
        """The rank that has a row, counted from the first rank's first one."""
        return bisect.bisect_right(self.starts, row) - 1

    def sequence(self, row: int) -> int:
        """The number of the packed sequence that has a row. Empty sequences have none."""
        assert self.ends is not None
        return bisect.bisect_right(self.ends, row) - 1

    @functools.cached_property
    def pieces(self) -> list[Piece]:
        """The sequences that this rank shares with others: of packed ones its first, its last, or one that is both."""
        if self.length == 0:
            return []
        if self.ends is None:
            return [self._piece(0, 0, self.total)]
        shared = []
        for number in dict.fromkeys((self.sequence(self.start), self.sequence(self.stop - 1))):
            first, stop = self.ends[number : number + 2]
            if first < self.start or stop > self.stop:
                shared.append(self._piece(number, first, stop))
        return shared

    def _piece(self, number: int, first: int, stop: int) -> Piece:
        keys = {}
        for rank, (a, b) in enumerate(itertools.pairwise(self.starts)):
            begin, end = max(a, first), min(b, stop)
            if begin < end:
                keys[rank] = Rows(begin - a, end - a, begin - first)
        return Piece(number, keys[self.rank], keys)

    @functools.cached_property
    def inner(self) -> tuple[Rows, int, tuple[int, ...]] | None:
        """The packed sequences that lie wholly on this rank: their rows, the first one's number, and their ends.

        The ends count from the first of these rows. None if there are no such rows.
        """
        if self.ends is None:
            return None
        start, stop = 0, self.length
        for piece in self.pieces:
            if piece.queries.start == 0:
                start = piece.queries.stop
            else:
                stop = piece.queries.start
        if start >= stop:
            return None
        first, last = self.sequence(self.start + start), self.sequence(self.start + stop - 1)
        ends = tuple(end - self.start - start for end in self.ends[first : last + 2])
        return Rows(start, stop, 0), first, ends


def even_stretches(total: int, ranks: int) -> tuple[int, ...]:
    """Cuts ``total`` rows into one stretch a rank, as even as multiples of 8 allow.

    Kernels read keys in groups, and attention dropout draws one random number per four keys. Few rows are cut anywhere.
    """
    step = 8 if total >= 64 * ranks else 1
    cuts = [total * rank // ranks // step * step for rank in range(ranks)]
    return tuple(b - a for a, b in itertools.pairwise([*cuts, total]))


def positions_of(stretches: Stretches, cu_seqlens: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """The position of each of this rank's rows in its sequence, int64 (rows,)."""
    rows = torch.arange(stretches.start, stretches.stop, device=device)
    if cu_seqlens is None:
        return rows
    sequences = torch.searchsorted(cu_seqlens, rows.to(cu_seqlens.dtype), right=True) - 1
    return rows - cu_seqlens.long()[sequences]
