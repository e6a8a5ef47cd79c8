"""What each process of a ring computes and sends, without processes."""

import pytest
import torch

from deberta_fast.op.call import checked_call
from deberta_fast.op.context_parallel.ring import Ring
from deberta_fast.op.context_parallel.stretches import Stretches, even_stretches


def blocks_of(ranks, rank, length, ends=None):
    stretches = Stretches(even_stretches(length, ranks), rank, ends)
    query = torch.zeros(1, 2, stretches.length, 8)
    tables = torch.zeros(2, 2, 512, 8).unbind(0)
    call = checked_call(
        query, query, query, *tables, None, None, 256, 512, "hf", 0, 0, None, None, 0.0
    )  # fmt: skip
    cu_seqlens = None if stretches.inner is None else torch.tensor(stretches.inner[2], dtype=torch.int32)
    call = call._replace(max_seqlen=length)
    ring = Ring(None, stretches, call, cu_seqlens, None, (0, 2))
    own = torch.zeros(1, stretches.length, 2, 2, 8)
    for distance in range(ranks):
        other = (rank - distance) % ranks
        piece = ring.piece_of(other)
        rows = piece.keys[other].count if piece else 0
        yield from ring.blocks([distance], own, {other: torch.zeros(1, rows, 2, 2, 8)})


@pytest.mark.parametrize("ranks", [2, 5, 8])
def test_only_neighbours_read_more_than_one_row_of_the_tables(ranks):
    """Of n x n blocks, 3 n - 2 are near: stretches of 1024 rows, and tables that are constant beyond distance 512."""
    rows = [block.call.pos_key.shape[1] for rank in range(ranks) for block in blocks_of(ranks, rank, 1024 * ranks)]
    assert len(rows) == ranks**2
    assert sum(count > 1 for count in rows) == 3 * ranks - 2


def test_packed_sequences_meet_only_where_ranks_share_one():
    """Sequences of 300, 20 and 480 rows on four processes of 200: ranks 0 and 1, 1 to 3."""
    pairs = set()
    for rank in range(4):
        for block in blocks_of(4, rank, 800, (0, 300, 320, 800)):
            pairs |= {(rank, owner) for owner in block.owners}
    assert pairs == {(a, b) for a in range(4) for b in range(4)} - {(0, 2), (0, 3), (2, 0), (3, 0)}


def test_pieces_cover_every_row_once():
    random = torch.Generator().manual_seed(0)
    for _ in range(100):
        lengths = torch.randint(0, 40, (int(torch.randint(1, 9, (), generator=random)),), generator=random)
        ends = (0, *lengths.cumsum(0).tolist())
        ranks = int(torch.randint(1, 6, (), generator=random))
        cuts = torch.randint(0, ends[-1] + 1, (ranks - 1,), generator=random).sort().values.tolist()
        stretches = [b - a for a, b in zip([0, *cuts], [*cuts, ends[-1]])]
        for rank in range(ranks):
            mine = Stretches(tuple(stretches), rank, ends)
            spans = [(piece.queries.start, piece.queries.stop) for piece in mine.pieces]
            if mine.inner is not None:
                rows, first, inner = mine.inner
                spans.append((rows.start, rows.stop))
                assert (inner[0], inner[-1]) == (0, rows.count) and ends[first] == mine.start + rows.start
            spans.sort()
            assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])][: len(spans)]
            assert (spans[-1][1] if spans else 0) == mine.length
            for piece in mine.pieces:
                whole = ends[piece.sequence + 1] - ends[piece.sequence]
                assert sum(rows.count for rows in piece.keys.values()) == whole
