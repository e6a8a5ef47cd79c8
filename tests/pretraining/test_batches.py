"""Which samples a process takes, and how rows become a batch."""

import itertools

import numpy as np
import pytest

from deberta_fast.pretraining.batches import Share, evaluation_numbers, packed
from deberta_fast.pretraining.rows import Row


@pytest.mark.parametrize("ranks, micro_rows", [(1, None), (2, 3), (3, 2)])
def test_steps_have_the_same_samples_for_any_number_of_ranks(ranks, micro_rows):
    shares = [Share(12, micro_rows, rank, ranks) for rank in range(ranks)]
    for step in range(2, 4):
        found = []
        for share in shares:
            batches = list(itertools.islice(share.numbers(step), share.micro_batches))
            assert len(batches) * share.micro_rows * ranks == 12
            found += [number for batch in batches for number in batch]
        assert sorted(found) == list(range(12 * step, 12 * step + 12))
    later = itertools.islice(shares[0].numbers(0), shares[0].micro_batches, None)
    assert next(later) == next(shares[0].numbers(1))


@pytest.mark.parametrize("rows, micro_rows, ranks", [(9, 4, 1), (1025, 32, 8), (3, 1, 2), (5, 8, 3)])
def test_evaluation_takes_every_row_once_in_as_many_batches(rows, micro_rows, ranks):
    found = [evaluation_numbers(rows, micro_rows, rank, ranks) for rank in range(ranks)]
    assert len({len(batches) for batches in found}) == 1 and all(batch for batches in found for batch in batches)
    assert sorted(number for batches in found for batch in batches for number in batch) == list(range(rows))
    with pytest.raises(ValueError, match="a row for each of 4 processes, got 3"):
        evaluation_numbers(3, 1, 0, 4)


def test_packed():
    rows = [Row(np.arange(5), np.array([2, 5], np.int32)), Row(np.arange(10, 13), np.array([3], np.int32))]
    batch = packed([(rows[0], rows[0].input_ids * 2, np.array([1, 4])), (rows[1], rows[1].input_ids, np.array([0]))])
    assert batch.input_ids.tolist() == [0, 1, 2, 3, 4, 10, 11, 12]
    assert batch.hidden_ids.tolist() == [0, 2, 4, 6, 8, 10, 11, 12] and batch.places.tolist() == [1, 4, 5]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 8] and batch.max_seqlen == 3
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
