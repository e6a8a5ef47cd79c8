"""Masked batches of a run, in an order that its seed alone determines.

Samples have numbers 0, 1, 2, ... without end. A number determines its row of tokens and the masks in it, whatever
process or worker makes it: a run continues at any number, with any number of workers. Step s takes samples s B to
(s + 1) B, of which rank r of W takes every W-th. A stream is the exception: its ranks read different documents, so its
state is each rank's own.
"""

import itertools
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from .masking import Masking, Vocabulary, chosen, hidden
from .objectives import MaskedBatch
from .rows import Row, SampleOrder


class Rows(Protocol):
    """Rows of tokens by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


class MaskedRows(torch.utils.data.Dataset):
    """Samples by number: (row, hidden ids, places).

    Args:
        rows: the rows.
        order: which row a sample is; None takes them as they are.
        masking, vocabulary: see ``masking``.
        seed: of the masks, with the sample's number.
    """

    def __init__(self, rows: Rows, order: SampleOrder | None, masking: Masking, vocabulary: Vocabulary, seed: int):
        self.rows, self.order, self.masking, self.vocabulary, self.seed = rows, order, masking, vocabulary, seed

    def __getitem__(self, number: int) -> tuple[Row, np.ndarray, np.ndarray]:
        row = self.rows[number if self.order is None else self.order[number]]
        return masked(row, self.masking, self.vocabulary, self.seed, number)


def masked(
    row: Row, masking: Masking, vocabulary: Vocabulary, seed: int, number: int
) -> tuple[Row, np.ndarray, np.ndarray]:
    """Masks a row as sample ``number`` of a run; returns the row, hidden ids (T,) and places (M,)."""
    generator = np.random.default_rng([seed, number])
    places = chosen(row.input_ids, row.ends, masking, vocabulary, generator)
    return row, hidden(row.input_ids, places, masking, vocabulary, generator), places


def packed(samples: list[tuple[Row, np.ndarray, np.ndarray]]) -> MaskedBatch:
    """Puts rows one after the other into a batch."""
    ids = np.concatenate([row.input_ids for row, _, _ in samples])
    starts = np.cumsum([0, *(len(row.input_ids) for row, _, _ in samples)])
    ends = np.concatenate([row.ends + start for (row, _, _), start in zip(samples, starts)])
    cu_seqlens = np.concatenate(([0], ends)).astype(np.int32)
    lengths = np.diff(cu_seqlens)
    return MaskedBatch(
        input_ids=torch.from_numpy(ids),
        hidden_ids=torch.from_numpy(np.concatenate([hidden_ids for _, hidden_ids, _ in samples])),
        places=torch.from_numpy(np.concatenate([places + start for (*_, places), start in zip(samples, starts)])),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        position_ids=torch.from_numpy(np.arange(len(ids)) - np.repeat(cu_seqlens[:-1], lengths)),
        max_seqlen=int(lengths.max()),
    )


class Share:
    """A rank's part of each step's samples: ``micro_batches`` batches of ``micro_rows`` samples.

    Args:
        step_rows: samples of a step, over all ranks.
        micro_rows: samples of a batch; None means the rank's whole share.

    Raises ValueError if the ranks' shares cannot be equal.
    """

    def __init__(self, step_rows: int, micro_rows: int | None, rank: int, ranks: int):
        own, rest = divmod(step_rows, ranks)
        if rest or own == 0:
            raise ValueError(
                f"training.batch_tokens must be a multiple of rows x processes: {step_rows} rows for {ranks} processes"
            )
        self.micro_rows = own if micro_rows is None else min(micro_rows, own)
        if own % self.micro_rows:
            raise ValueError(
                f"training.micro_batch_tokens must divide a process's share: {own} rows are no multiple of "
                f"{self.micro_rows}"
            )
        self.micro_batches, self.step_rows, self.rank, self.ranks = own // self.micro_rows, step_rows, rank, ranks

    def numbers(self, first_step: int) -> Iterator[list[int]]:
        """Yields the sample numbers of one batch after the other, from a step on."""
        for step in itertools.count(first_step):
            own = range(step * self.step_rows + self.rank, (step + 1) * self.step_rows, self.ranks)
            for start in range(0, len(own), self.micro_rows):
                yield list(own[start : start + self.micro_rows])


def loaded(dataset: MaskedRows, share: Share, first_step: int, workers: int, pin: bool) -> Iterator[MaskedBatch]:
    """Yields a rank's batches from a step on, made by ``workers`` processes beside training, or by this one if 0."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=share.numbers(first_step),
        collate_fn=packed,
        num_workers=workers,
        pin_memory=pin,
        # A loader draws a seed at its start: from a generator of its own, or the dropout of a run that continues would
        # differ.
        generator=torch.Generator(),
    )
    return iter(loader)


def evaluation_numbers(rows: int, micro_rows: int, rank: int, ranks: int) -> list[list[int]]:
    """Returns the sample numbers of a rank's evaluation batches, of which all ranks have as many.

    Raises ValueError if there are fewer rows than ranks.
    """
    if rows < ranks:
        raise ValueError(f"data.evaluation must have a row for each of {ranks} processes, got {rows}: give more text")
    own = range(rank, rows, ranks)
    most = -(-rows // ranks)  # of a rank
    batches = min(-(-most // micro_rows), rows // ranks)
    return [list(own[len(own) * i // batches : len(own) * (i + 1) // batches]) for i in range(batches)]
