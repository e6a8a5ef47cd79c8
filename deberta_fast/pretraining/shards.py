"""Keeps the tokens of a corpus in memory-mapped files, the shards.

A folder holds shards.json and, per shard, 00000.tokens (ids, uint16 or uint32) and 00000.ends (the cumulative ends of
its documents, int64), both little-endian. A document lies in one shard as a whole. There are no special tokens.
"""

import bisect
import contextlib
import importlib.util
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..checkpoint.replace import locked, replace_file, unfinished
from .encoding import Encoder, tokenizer_fingerprint, vocabulary_size
from .sources import Sources

INDEX = "shards.json"
FORMAT = 1
_ENDS = np.dtype("<i8")
_CHECKED_AT_ONCE = 2**24  # bytes


class Shards:
    """The tokens of a folder that ``write_shards`` has finished. It can be pickled, and then opens the files anew.

    Attributes:
        documents, tokens: their numbers.
        empty: number of documents left out because they have no token.
        vocab_size: one more than the tokenizer's largest id.

    Raises:
        FileNotFoundError: there is no shards.json, or a file of a shard is missing.
        ValueError: the folder is not finished, or a file is damaged, as far as its size tells. ``check`` reads all.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._index = index = _read_index(self.folder)
        if not index["finished"]:
            raise ValueError(f"{self.folder} is not finished: call write_shards again with the same arguments")
        dtype = np.dtype(index["dtype"])
        self.vocab_size, self.empty = index["vocab_size"], index["empty"]
        self._tokens, self._ends = [], []
        for number, shard in enumerate(index["shards"]):
            tokens, ends = _paths(self.folder, number)
            self._tokens.append(_mapped(tokens, dtype, shard["tokens"]))
            self._ends.append(_mapped(ends, _ENDS, shard["documents"]))
            if self._ends[-1][-1] != shard["tokens"]:
                raise ValueError(
                    f"{ends} is damaged: its last document ends at {self._ends[-1][-1]}, not at the last token"
                )
        # First token and first document of every shard, and of the one that would follow
        self._token_starts = [0, *itertools.accumulate(shard["tokens"] for shard in index["shards"])]
        self._document_starts = [0, *itertools.accumulate(shard["documents"] for shard in index["shards"])]
        self.tokens, self.documents = self._token_starts[-1], self._document_starts[-1]

    def __reduce__(self):
        return Shards, (self.folder,)

    def __repr__(self) -> str:
        return f"Shards({str(self.folder)!r}): {self.documents:,} documents, {self.tokens:,} tokens"

    def check_tokenizer(self, tokenizer) -> None:
        """Raises ValueError if the shards were made by another tokenizer."""
        if tokenizer_fingerprint(tokenizer) != self._index["tokenizer"]:
            size = vocabulary_size(tokenizer)
            raise ValueError(
                f"{self.folder} was made by another tokenizer (vocabulary of {self.vocab_size} ids, here {size}): its "
                "pieces, special tokens or settings differ. Load that tokenizer, or write new shards"
            )

    def check(self) -> None:
        """Reads all files. Raises ValueError, naming the file, if a checksum differs."""
        for number, shard in enumerate(self._index["shards"]):
            for path, expected in zip(_paths(self.folder, number), (shard["tokens_crc32"], shard["ends_crc32"])):
                with open(path, "rb") as file:
                    found = 0
                    while content := file.read(_CHECKED_AT_ONCE):
                        found = zlib.crc32(content, found)
                if found != expected:
                    raise ValueError(f"{path} is damaged: its CRC-32 is {found:08x}, expected {expected:08x}")

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Returns the ids of tokens start to stop of the whole corpus, int64 (stop - start,). IndexError beyond it."""
        return _stretch(self._tokens, self._token_starts, start, stop, "tokens")

    def ends(self, start: int, stop: int) -> np.ndarray:
        """Returns where documents start to stop end, in tokens of the whole corpus, int64 (stop - start,)."""
        ends = _stretch(self._ends, self._document_starts, start, stop, "documents")
        first = bisect.bisect_right(self._document_starts, start) - 1
        for shard in range(first, len(self._ends)):  # The files count from the start of their shard.
            low, high = self._document_starts[shard : shard + 2]
            if low >= stop:
                break
            ends[max(low - start, 0) : high - start] += self._token_starts[shard]
        return ends

    def document_at(self, token: int) -> int:
        """Returns the number of the document that holds the token. IndexError beyond the last one."""
        if not 0 <= token < self.tokens:
            raise IndexError(f"there are {self.tokens} tokens, got {token}")
        shard = bisect.bisect_right(self._token_starts, token) - 1
        within = np.searchsorted(self._ends[shard], token - self._token_starts[shard], side="right")
        return self._document_starts[shard] + int(within)


def write_shards(
    sources: Sources,
    tokenizer,
    folder: str | os.PathLike,
    *,
    shard_tokens: int = 2**27,
    processes: int = 1,
    progress: bool = True,
) -> Shards:
    """Tokenizes all documents into a folder of shards.

    A call that was killed continues behind the last finished shard when it is made again with the same arguments; if
    the folder is finished, it returns at once. The bytes are the same as those of an uncut call, and for any number of
    processes. Another call for the same folder waits until this one ends. Documents without a token are left out.

    Args:
        sources: the documents.
        tokenizer: slow or fast. Special tokens in the text become their ids, unless it has split_special_tokens.
        folder: is made if it does not exist; it must be empty otherwise, or have been begun by such a call.
        shard_tokens: a shard ends behind the document with which it has so many tokens.
        processes: number that tokenize; 1: this process alone. See ``Encoder``.
        progress: shows a bar on stderr if that is a terminal and tqdm is installed.

    Raises:
        ValueError: an argument is out of range; the folder was begun with other arguments, or holds other files; the
            sources hold no text, or what they raise.
        NotADirectoryError: folder is a file.
    """
    if not isinstance(sources, Sources):
        raise TypeError(f"sources must be Sources, got {type(sources).__name__}")
    for name, value in (("shard_tokens", shard_tokens), ("processes", processes)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of 1 or more, got {value!r}")
    encoder = Encoder(tokenizer, processes if processes > 1 else 0)
    size = vocabulary_size(tokenizer)
    fixed = {
        "format": FORMAT,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocab_size": size,
        "dtype": "<u2" if size <= 2**16 else "<u4",
        "shard_tokens": shard_tokens,
        "sources": sources.description(),
    }
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder")
    if not (folder / INDEX).exists():
        sources.check()
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        index = _begun(folder, fixed)
        if index is None:
            index = {**fixed, "shards": [], "next_document": 0, "empty": 0, "finished": False}
            _write_index(folder, index)
        if not index["finished"]:
            try:
                _write(sources, encoder, folder, index, progress)
            finally:
                encoder.close()
    return Shards(folder)


def _begun(folder: Path, fixed: dict) -> dict | None:
    """Returns the index of a folder that was begun with the same arguments; None if it is empty."""
    if not (folder / INDEX).exists():
        others = sorted(path.name for path in folder.iterdir() if path != unfinished(folder / INDEX))
        if others:
            raise ValueError(f"{folder} has no {INDEX}, but other files, such as {others[0]}: give a new folder")
        return None
    index = _read_index(folder)
    for name, value in fixed.items():
        if index[name] != value:
            found = "" if name in ("sources", "tokenizer") else f": {index[name]}, now {value}"
            raise ValueError(
                f"{folder} was begun with other arguments, which differ in {name}{found}; give a new folder"
            )
    return index


def _write(sources: Sources, encoder: Encoder, folder: Path, index: dict, progress: bool) -> None:
    """Writes the shards that are missing. After each one the index counts it, so that a later call continues there."""
    dtype, limit, size = np.dtype(index["dtype"]), index["shard_tokens"], index["vocab_size"]
    encoded = encoder.encode(sources.numbered(index["next_document"]))
    with _progress(progress, sum(shard["tokens"] for shard in index["shards"])) as advance:
        more = True
        while more:
            paths = _paths(folder, len(index["shards"]))
            with _Written(paths[0]) as tokens, _Written(paths[1]) as ends:
                count, documents, more = 0, 0, False
                for number, ids in encoded:
                    index["next_document"] = number + 1
                    if not len(ids):
                        index["empty"] += 1
                        continue
                    if ids.min() < 0 or ids.max() >= size:
                        raise ValueError(f"the tokenizer gave the id {ids.max()}, but has {size} ids")
                    tokens.write(ids.astype(dtype))
                    count, documents = count + len(ids), documents + 1
                    ends.write(np.array(count, _ENDS))
                    advance(len(ids))
                    if count >= limit:
                        more = True
                        break
                if documents:
                    tokens.finish(), ends.finish()
            if documents:
                shard = dict(documents=documents, tokens=count, tokens_crc32=tokens.crc32, ends_crc32=ends.crc32)
                index["shards"].append(shard)
            elif not index["shards"]:
                raise ValueError("the sources hold no text that the tokenizer has tokens for")
            index["finished"] = not more
            _write_index(folder, index)


class _Written:
    """A file that is written beside its place, and gets there when it is finished."""

    def __init__(self, path: Path):
        self.path, self.crc32 = path, 0

    def __enter__(self):
        self._file = open(unfinished(self.path), "wb", buffering=2**20)
        return self

    def write(self, array: np.ndarray) -> None:
        content = array.tobytes()
        self.crc32 = zlib.crc32(content, self.crc32)
        self._file.write(content)

    def finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(unfinished(self.path), self.path)

    def __exit__(self, *_):
        self._file.close()
        unfinished(self.path).unlink(missing_ok=True)


@contextlib.contextmanager
def _progress(wanted: bool, done: int) -> Iterator[Callable[[int], object]]:
    """Gives a function that counts tokens on a bar, if one is wanted, stderr is a terminal, and tqdm is installed."""
    if not (wanted and sys.stderr.isatty() and importlib.util.find_spec("tqdm")):
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(desc="tokenizing", unit=" tokens", unit_scale=True, initial=done) as bar:
        yield bar.update


def _paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number:05}.tokens", folder / f"{number:05}.ends"


def _write_index(folder: Path, index: dict) -> None:
    replace_file(folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())


def _read_index(folder: Path) -> dict:
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"there is no {INDEX} in {folder}")
    try:
        index = json.loads(path.read_bytes())
        version = index["format"]
        if version == FORMAT:
            numbers = [shard[name] for shard in index["shards"] for name in ("tokens", "documents")]
            numbers += [shard[name] for shard in index["shards"] for name in ("tokens_crc32", "ends_crc32")]
            numbers += [index[name] for name in ("vocab_size", "shard_tokens", "next_document", "empty")]
            known = index["dtype"] in ("<u2", "<u4") and {"tokenizer", "sources", "finished"} <= index.keys()
            if not known or not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError("a value is missing or impossible")
            if index["finished"] and not index["shards"]:
                raise ValueError("there is no shard")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if version != FORMAT:
        raise ValueError(
            f"{path}: expected format {FORMAT}, got {version!r}: it is from another version of deberta_fast"
        )
    return index


def _mapped(path: Path, dtype: np.dtype, items: int) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}")
    expected, found = items * dtype.itemsize, path.stat().st_size
    if found != expected or not items:
        raise ValueError(f"{path} is damaged: it has {found} bytes, expected {expected}")
    # An ordinary array on the mapped file: slices of np.memmap take several times as long.
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


def _stretch(arrays: list[np.ndarray], starts: list[int], start: int, stop: int, what: str) -> np.ndarray:
    """Returns items start to stop of the arrays in a row as int64; ``starts`` are their first items."""
    if not 0 <= start <= stop <= starts[-1]:
        raise IndexError(f"there are {starts[-1]} {what}, got {start} to {stop}")
    parts, shard = [], bisect.bisect_right(starts, start) - 1
    while start < stop:
        end = min(stop, starts[shard + 1])
        parts.append(arrays[shard][start - starts[shard] : end - starts[shard]])
        start, shard = end, shard + 1
    return np.concatenate(parts, dtype=np.int64) if parts else np.empty(0, np.int64)
