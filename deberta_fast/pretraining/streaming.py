"""Makes rows of training data while the documents are read, without shards."""

import collections
from collections.abc import Iterator

import numpy as np
import torch

from .encoding import Encoder, tokenizer_fingerprint
from .rows import LEAST_ROOM, Row, framed_row
from .sources import Sources

_FORMAT = 1
_DRAWS = 4096  # random numbers that are drawn at once


class StreamedRows:
    """An endless iterator of ``Row``: passes over the sources, tokenized on the way, each in an order of its own.

    Rows are made as ``PackedRows`` and ``ChunkedRows`` make them, of the documents rank, rank + ranks, ... alone. They
    are shuffled as they come: each one given out is drawn from ``shuffle_rows`` rows, and the next one takes its place.
    So a row stays near its place in the sources, and those should be shuffled themselves. At the end of a pass the
    remaining rows are given out before the next begins. The order depends on sources, tokenizer and arguments, but not
    on ``processes``.

    Args:
        sources: the documents.
        tokenizer: slow or fast.
        length: most tokens per row.
        packed: rows as those of ``PackedRows``; False: of ``ChunkedRows``.
        shuffle_rows: rows to draw from; 1 keeps the order of the documents.
        seed: 0 or more.
        rank, ranks: ``get_rank()`` and ``get_world_size()`` of torch.distributed. Ranks may get different numbers of
            rows in a pass, and begin the next one at different times.
        processes: number that tokenize besides this one; see ``Encoder``.

    Raises:
        ValueError: an argument is out of range; the sources hold no text, or what they raise; on iteration, this rank
            gets no document.
    """

    def __init__(
        self,
        sources: Sources,
        tokenizer,
        length: int,
        *,
        packed: bool = True,
        shuffle_rows: int = 1024,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        processes: int = 0,
    ):
        if not isinstance(sources, Sources):
            raise TypeError(f"sources must be Sources, got {type(sources).__name__}")
        least = dict(length=LEAST_ROOM if packed else 3, shuffle_rows=1, seed=0, rank=0, ranks=1)
        values = dict(length=length, shuffle_rows=shuffle_rows, seed=seed, rank=rank, ranks=ranks)
        for name, value in values.items():
            if not isinstance(value, int) or value < least[name]:
                raise ValueError(f"{name} must be an integer of {least[name]} or more, got {value!r}")
        if rank >= ranks:
            raise ValueError(f"rank must be less than ranks={ranks}, got {rank}")
        self._encoder = Encoder(tokenizer, processes)
        sources.check()
        self.sources, self.length, self.packed, self.shuffle_rows = sources, length, bool(packed), shuffle_rows
        self.seed, self.rank, self.ranks = seed, rank, ranks
        # What must be the same when a state is loaded
        self._fixed = {
            "format": _FORMAT,
            **values,
            "packed": int(self.packed),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "sources": sources.fingerprint(),
        }
        self._cls, self._sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        self._block, self._draws = -1, np.empty(0)
        self.epoch = 0  # passes that have ended
        self.given = 0  # rows given out in all passes
        self._begin()

    def _begin(self) -> None:
        """Begins a pass."""
        self._document = 0  # number of the next one to take
        self._documents: Iterator[tuple[int, np.ndarray]] | None = None  # encoded, from there on
        self._ended = False  # There are no more documents in this pass.
        self._made = 0  # rows of this pass
        self._buffer: list[Row] = []
        self._ready: collections.deque[Row] = collections.deque()  # rows of documents already taken
        self._open: list[np.ndarray] = []  # pieces for the row that is not full yet, of one sequence each if packed
        self._used = 0  # tokens of that row

    def __iter__(self) -> "StreamedRows":
        return self

    def __next__(self) -> Row:
        self._fill()
        if not self._buffer:
            if self._made:
                self.epoch += 1
                self._begin()
                self._fill()
            if not self._made:
                raise ValueError(f"rank {self.rank} of {self.ranks} gets no document with text: there are too few")
        buffer, drawn = self._buffer, int(self._draw() * len(self._buffer))
        buffer[drawn], buffer[-1] = buffer[-1], buffer[drawn]
        self.given += 1
        return buffer.pop()

    def close(self) -> None:
        """Ends the processes. They start again with the next row."""
        self._documents = None
        self._encoder.close()

    def _draw(self) -> float:
        """Returns a number of [0, 1) that depends on seed, rank and the rows given out alone."""
        block, within = divmod(self.given, _DRAWS)
        if block != self._block:
            self._draws = np.random.Generator(np.random.PCG64([self.seed, self.rank, block])).random(_DRAWS)
            self._block = block
        return float(self._draws[within])

    def _fill(self) -> None:
        """Fills the buffer, as far as the pass has rows left."""
        while len(self._buffer) < self.shuffle_rows:
            if self._ready:
                self._buffer.append(self._ready.popleft())
            elif self._ended:
                return
            else:
                self._take_document()

    def _take_document(self) -> None:
        """Makes rows of the next document, or of what is left at the end of the pass."""
        if self._documents is None:
            self._documents = self._encoder.encode(self.sources.numbered(self._document, self.rank, self.ranks))
        try:
            number, ids = next(self._documents, (-1, None))
        except BaseException:
            self._documents = None  # A generator that has raised looks as if it had ended.
            raise
        if ids is None:
            self._ended, self._documents = True, None
            if self._open:
                self._close_row()
            return
        self._document = number + 1
        frame = 2 if self.packed else 0  # A sequence of a document's own needs [CLS] and [SEP].
        length, least = (self.length, LEAST_ROOM) if self.packed else (self.length - 2, 1)
        while len(ids):
            taken, ids = np.split(ids, [length - self._used - frame])
            self._open.append(taken)
            self._used += len(taken) + frame
            if length - self._used < least:
                self._close_row()

    def _close_row(self) -> None:
        lengths = [len(pieces) for pieces in self._open] if self.packed else [self._used]
        self._ready.append(framed_row(np.concatenate(self._open), np.array(lengths), self._cls, self._sep))
        self._open, self._used = [], 0
        self._made += 1

    def state_dict(self) -> dict:
        """Returns the position, as tensors, ints and strings, which ``torch.load(weights_only=True)`` takes.

        Its size is that of the rows in the buffer, 4 bytes per token.
        """
        rows = [*self._buffer, *self._ready]
        return {
            **self._fixed,
            "epoch": self.epoch,
            "given": self.given,
            "document": self._document,
            "ended": int(self._ended),
            "made": self._made,
            "buffered": len(self._buffer),
            "row_ids": _joined([row.input_ids for row in rows]),
            "row_ends": _joined([row.ends for row in rows]),
            "row_sequences": torch.tensor([len(row.ends) for row in rows], dtype=torch.int64),
            "open_ids": _joined(self._open),
            "open_lengths": torch.tensor([len(pieces) for pieces in self._open], dtype=torch.int64),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues with the row behind those that were given out when the state was taken.

        Raises ValueError if the sources have other files, names or sizes since, or another argument differs; the
        present position stays.
        """
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"expected a state of StreamedRows, but it has no {', '.join(sorted(missing))}")
        for name, value in self._fixed.items():
            if state[name] != value:
                if name in ("sources", "tokenizer"):
                    raise ValueError(f"the state is of other {name}: they have changed since, or differ in a setting")
                raise ValueError(f"the state is of {name}={state[name]}, but this is {value}")
        self._begin()
        self.epoch, self.given, self._made = int(state["epoch"]), int(state["given"]), int(state["made"])
        self._document, self._ended = int(state["document"]), bool(state["ended"])
        rows, low = [], 0
        for ends in _parts(state["row_ends"], state["row_sequences"]):
            high = low + int(ends[-1])
            rows.append(Row(state["row_ids"][low:high].numpy().astype(np.int64), ends))
            low = high
        buffered = int(state["buffered"])
        self._buffer, self._ready = rows[:buffered], collections.deque(rows[buffered:])
        self._open = _parts(state["open_ids"], state["open_lengths"])
        self._used = sum(len(pieces) + (2 if self.packed else 0) for pieces in self._open)


def _joined(arrays: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, np.int32), *arrays], dtype=np.int32, casting="same_kind"))


def _parts(joined: torch.Tensor, lengths: torch.Tensor) -> list[np.ndarray]:
    """Cuts a tensor into int32 arrays of such lengths, which are copies."""
    return [part.numpy().copy() for part in torch.split(joined, lengths.tolist())]
