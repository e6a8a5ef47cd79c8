"""Cuts the tokens of shards into rows of training data, which can be read in any order."""

import array
import bisect
import operator
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .shards import Shards

# A row is closed where fewer tokens are left: a sequence of so few would teach little.
LEAST_ROOM = 16
_DOCUMENTS = 2**18  # whose ends are in memory while rows are counted


class Row(NamedTuple):
    """Sequences in a row, each [CLS] pieces [SEP].

    input_ids: int64 (T,); ends: where each of the n sequences ends, int32 (n,), the last at T.
    """

    input_ids: np.ndarray
    ends: np.ndarray


class PackedRows:
    """Rows of several documents, one after the other; no token is lost or repeated.

    Each sequence of a row holds tokens of one document. A document that is longer than the rest of the row goes on in
    the next one, as a new sequence. Where fewer than ``LEAST_ROOM`` tokens are left, the row is closed.

    Args:
        shards: the tokens. The number of rows and their places are computed once, 8 bytes per row.
        length: most tokens per row, ``LEAST_ROOM`` or more.
        tokenizer: the one that made the shards.

    Raises ValueError if length is too small, or another tokenizer made the shards.
    """

    def __init__(self, shards: Shards, length: int, tokenizer):
        self.length = _length(length, LEAST_ROOM)
        shards.check_tokenizer(tokenizer)
        self.shards = shards
        self._cls, self._sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        self._starts = _row_starts(shards, self.length)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Row:
        """Returns a row. IndexError if there is none of this number."""
        index = _index(index, len(self))
        start, stop = self._starts[index : index + 2].tolist()
        first, last = self.shards.document_at(start), self.shards.document_at(stop - 1)
        ends = self.shards.ends(first, last + 1)
        ends[-1] = stop  # The last document may go on in the next row.
        lengths = np.diff(ends, prepend=start)
        return framed_row(self.shards.ids(start, stop), lengths, self._cls, self._sep)


class ChunkedRows:
    """Rows of one sequence each, cut from all documents joined without a separator, as Microsoft pretrained.

    The last one may be shorter. Arguments and errors are those of ``PackedRows``, but length may be 3 or more.
    """

    def __init__(self, shards: Shards, length: int, tokenizer):
        self.length = _length(length, 3)
        shards.check_tokenizer(tokenizer)
        self.shards = shards
        self._cls, self._sep = tokenizer.cls_token_id, tokenizer.sep_token_id

    def __len__(self) -> int:
        return -(-self.shards.tokens // (self.length - 2))

    def __getitem__(self, index: int) -> Row:
        """Returns a row. IndexError if there is none of this number."""
        start = _index(index, len(self)) * (self.length - 2)
        ids = self.shards.ids(start, min(start + self.length - 2, self.shards.tokens))
        return framed_row(ids, np.array([len(ids)]), self._cls, self._sep)


class SampleOrder:
    """``order[k]`` is the row of sample k = 0, 1, 2, ... without end.

    Each epoch of ``rows`` samples has every row once. The order depends on rows, seed and k alone.

    Args:
        rows: their number.
        seed: 0 or more.
        shuffle: each epoch has an order of its own; otherwise rows come in theirs.
    """

    def __init__(self, rows: int, seed: int, shuffle: bool = True):
        if rows < 1:
            raise ValueError(f"rows must be 1 or more, got {rows}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        self.rows, self.seed, self.shuffle = rows, seed, shuffle
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, sample: int) -> int:
        sample = operator.index(sample)
        if sample < 0:
            raise IndexError(f"samples count from 0, got {sample}")
        epoch, within = divmod(sample, self.rows)
        if not self.shuffle:
            return within
        if epoch != self._epoch:
            self._order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.rows)
            self._epoch = epoch
        return int(self._order[within])

    def __iter__(self) -> Iterator[int]:
        raise TypeError("the order has no end: ask for order[k]")


def framed_row(ids: np.ndarray, lengths: np.ndarray, cls: int, sep: int) -> Row:
    """Makes a row of pieces, (sum of lengths,): sequences of so many pieces each, within [CLS] and [SEP]."""
    ends = np.cumsum(lengths + 2)
    content = np.empty(ends[-1], np.int64)
    pieces = np.ones(ends[-1], bool)
    starts = ends - lengths - 2
    content[starts], content[ends - 1] = cls, sep
    pieces[starts] = pieces[ends - 1] = False
    content[pieces] = ids
    return Row(content, ends.astype(np.int32))


def _row_starts(shards: Shards, length: int) -> np.ndarray:
    """Returns the first token of every row of ``PackedRows``, and the number of tokens, uint64 (rows + 1,).

    Places are counted with two more for each document that ended before: that of token t in document d is t + 2 d, and
    document d ends at end + 2 (d + 1). A row that starts at place p has room up to p + length. It stops at the first
    end that leaves fewer than LEAST_ROOM, or else within a document, at p + length - 2, where the next row starts,
    because that document needs two more again.
    """
    starts, place, first = array.array("Q"), 0, 0  # first: number of the document at ends[0]
    ends: list[int] = []
    most = length // 3 + 1  # documents per row
    for low in range(0, shards.documents, _DOCUMENTS):
        high = min(low + _DOCUMENTS, shards.documents)
        ends += (shards.ends(low, high) + 2 * np.arange(low + 1, high + 1)).tolist()
        next_, count = 0, len(ends)
        while next_ < count:
            limit = place + length
            found = bisect.bisect_right(ends, limit - LEAST_ROOM, next_, min(next_ + most, count))
            if found == count:  # All that are left fit, and perhaps more of the following.
                break
            starts.append(place - 2 * (first + next_))
            next_ = found
            end = ends[found]
            if end <= limit:
                place, next_ = end, found + 1
                continue
            place = limit - 2
            whole = (end - place - length) // (length - 2)  # rows within this document that it fills
            if whole > 0:
                start = place - 2 * (first + found)
                starts.extend(range(start, start + whole * (length - 2), length - 2))
                place += whole * (length - 2)
        first += next_
        del ends[:next_]
    last = place - 2 * first
    if last < shards.tokens:
        starts.append(last)
    starts.append(shards.tokens)
    return np.array(starts, np.uint64)


def _length(length: int, least: int) -> int:
    length = operator.index(length)
    if length < least:
        raise ValueError(f"length must be {least} or more, got {length}")
    return length


def _index(index: int, count: int) -> int:
    index = operator.index(index)
    if not 0 <= index < count:
        raise IndexError(f"there are {count} rows, got {index}")
    return index
