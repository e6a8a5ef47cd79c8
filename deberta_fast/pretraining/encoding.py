"""Tokenizes documents in order, in this process or in several, and tells tokenizers apart."""

import collections
import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator

import numpy as np

# A batch ends at so many documents or characters.
_DOCUMENTS, _CHARACTERS = 256, 2**18
_AHEAD = 4  # batches per process that are read ahead


def vocabulary_size(tokenizer) -> int:
    """Returns one more than the largest id."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def tokenizer_fingerprint(tokenizer) -> str:
    """Returns a SHA-256, 64 hexadecimal digits, of the vocabulary, the special ids and the settings that alter ids.

    The slow and the fast tokenizer of a checkpoint have the same.
    """
    special = ("pad_token_id", "cls_token_id", "sep_token_id", "unk_token_id", "mask_token_id")
    settings = dict(do_lower_case=False, split_by_punct=False, add_prefix_space=None, split_special_tokens=False)
    kind = type(tokenizer).__name__.removesuffix("Fast")
    if kind == "DebertaV2Tokenizer":  # Only the fast one has this setting; the slow one always adds the space.
        settings["add_prefix_space"] = True
    content = [
        kind,
        sorted(tokenizer.get_vocab().items()),
        [getattr(tokenizer, name) for name in special],
        [getattr(tokenizer, name, default) for name, default in settings.items()],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Encoder:
    """Tokenizes documents in order. The result does not depend on the number of processes.

    Args:
        tokenizer: one of this package's, or of transformers'.
        processes: number of processes besides this one; 0 for none. They start with the first documents, and import
            the main module of the program, which therefore needs ``if __name__ == "__main__"``.

    Raises ValueError if processes is negative, or this process cannot start any, as a worker of a DataLoader.
    """

    def __init__(self, tokenizer, processes: int = 0):
        if processes < 0:
            raise ValueError(f"processes must be 0 or more, got {processes}")
        if processes and multiprocessing.current_process().daemon:
            raise ValueError(f"processes={processes}: a worker of a DataLoader cannot start processes: use 0")
        self._tokenizer, self._processes = tokenizer, processes
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def encode(self, documents: Iterable[tuple[int, str]]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (number, ids int32 (n,)) for pairs (number, text), without special tokens; n is 0 for "".

        Raises RuntimeError if a process dies.
        """
        if not self._processes:
            for batch in _batches(documents):
                yield from zip([number for number, _ in batch], _encode(self._tokenizer, [text for _, text in batch]))
            return
        if self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._processes, multiprocessing.get_context("spawn"), _start, (self._tokenizer,)
            )
        batches, waiting = _batches(documents), collections.deque()
        try:
            while True:
                for batch in itertools.islice(batches, _AHEAD * self._processes - len(waiting)):
                    texts = [text for _, text in batch]
                    waiting.append(([number for number, _ in batch], self._pool.submit(_encode_in_process, texts)))
                if not waiting:
                    return
                numbers, future = waiting.popleft()
                yield from zip(numbers, future.result())
        except concurrent.futures.process.BrokenProcessPool:
            self.close()
            raise RuntimeError(
                "a process that tokenizes has died; was it killed, or is there too little memory?"
            ) from None
        finally:
            for _, future in waiting:
                future.cancel()

    def close(self) -> None:
        """Ends the processes. They start again when needed."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _batches(documents: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch, characters = [], 0
    for number, text in documents:
        batch.append((number, text))
        characters += len(text)
        if len(batch) == _DOCUMENTS or characters >= _CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer, texts: list[str]) -> list[np.ndarray]:
    options = dict(add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    return [np.asarray(ids, np.int32) for ids in tokenizer(texts, **options)["input_ids"]]


def _start(tokenizer) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # The processes are as many as the caller wants cores to work.
    _tokenizer = tokenizer


def _end_with_parent() -> None:
    """Ends this process when its parent was killed, for which the pool would wait without end."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_process(texts: list[str]) -> list[np.ndarray]:
    return _encode(_tokenizer, texts)
