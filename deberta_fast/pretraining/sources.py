"""Reads the documents of a corpus: files of text, JSON lines or Parquet, Hugging Face datasets, Python's iterables."""

import gzip
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
BLANK_LINE, LINE = "blank-line", "line"
_BOM = b"\xef\xbb\xbf"
_ROWS = 1024  # rows of a Parquet file in memory at once


class Sources:
    """Where the documents of a corpus come from: files, a Hugging Face dataset, or an iterable of Python's.

    Documents are numbered from 0 in their order, those without text included. Give exactly one of paths, dataset and
    texts.

    Args:
        paths: files, or folders whose files with a suffix of ``SUFFIXES`` are taken in sorted order: text, JSON lines
            (an object per line), Parquet. Text and JSON lines are UTF-8.
        documents: what ends a document of a text file: "blank-line", one blank line or more, or "line".
        text_field: the field or column that holds the text, in JSON lines, Parquet files, datasets and dicts. Null
            counts as a document without text.
        dataset: the name of a Hugging Face dataset, which is streamed.
        config, split: of the dataset.
        texts: an iterable of str or dicts that can be read more than once, such as a list or a ``datasets`` object, or
            a function that returns a new iterator each time.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: not exactly one of the three is given, a file has another suffix or is empty, a folder has no file
            with such a suffix.
        TypeError: texts can be read only once, or is no iterable.
    """

    def __init__(
        self,
        paths: str | os.PathLike | Iterable[str | os.PathLike] = (),
        *,
        documents: str = BLANK_LINE,
        text_field: str = "text",
        dataset: str | None = None,
        config: str | None = None,
        split: str = "train",
        texts: Iterable[str | Mapping] | Callable[[], Iterable[str | Mapping]] | None = None,
    ):
        paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        if bool(paths) + (dataset is not None) + (texts is not None) != 1:
            raise ValueError("expected either paths, or a dataset, or texts")
        if documents not in (BLANK_LINE, LINE):
            raise ValueError(f'documents must be "{BLANK_LINE}" or "{LINE}", got {documents!r}')
        starts_anew = isinstance(texts, Iterable) and not isinstance(texts, Iterator | str | bytes)
        if texts is not None and not callable(texts) and not starts_anew:
            raise TypeError(
                "texts must be an iterable of str or dicts that can be read again, such as a list, or a function that "
                f"returns a new iterator, got {type(texts).__name__}"
            )
        self.documents, self.text_field = documents, text_field
        self.dataset, self.config, self.split, self.texts = dataset, config, split, texts
        self.files: list[Path] = []
        self._described: list[tuple[str, int]] = []  # name and size of every file
        for path in map(Path, paths):
            for file in _files(path):
                size = file.stat().st_size
                if size == 0:
                    raise ValueError(f"{file} is empty")
                self.files.append(file)
                self._described.append((file.relative_to(path).as_posix() if path.is_dir() else file.name, size))

    def description(self) -> dict:
        """Returns what determines the documents, as far as it can be known without reading them. JSON can hold it.

        Of files it has the names below the given paths and the sizes in bytes.
        """
        if self.dataset is not None:
            origin = dict(dataset=self.dataset, config=self.config, split=self.split)
        elif self.texts is not None:
            length = len(self.texts) if hasattr(self.texts, "__len__") else None
            origin = dict(texts=type(self.texts).__name__, length=length)
        else:
            origin = dict(files=[[name, size] for name, size in self._described])
        return {**origin, "documents": self.documents, "text_field": self.text_field}

    def fingerprint(self) -> str:
        """Returns the SHA-256 of ``description()``, 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.description(), sort_keys=True).encode()).hexdigest()

    def check(self) -> None:
        """Reads the first document of every file, so that most mistakes show before the work starts.

        Raises ValueError if a file, the dataset or the iterable holds no text, and what ``numbered`` raises.
        """
        for file in self.files:
            if not any(text for _, text in self._file(file, 0, 0, 0, 1)):
                raise ValueError(f"{file} holds no text")
        if not self.files and not any(text for _, text in self.numbered()):
            raise ValueError(f"{self._items_name()} holds no text")

    def __iter__(self) -> Iterator[str]:
        """Yields the documents that have text."""
        return (text for _, text in self.numbered() if text)

    def numbered(self, start: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, str]]:
        """Yields (number, text) of the documents rank, rank + ranks, ..., as far as their number is ``start`` or more.

        A document of nothing but white space gives "". Documents that are left out are not decoded; Parquet files skip
        whole row groups, and datasets skip as fast as they can.

        Raises:
            ValueError: a line is no UTF-8 or no JSON object, or has no such field, or the field is no text; there is
                no such column. The message names file and line, or the row.
            ImportError: pyarrow or datasets is needed and not installed.
        """
        number = 0
        for file in self.files:
            number = yield from self._file(file, number, start, rank, ranks)
        if not self.files:
            yield from self._items(start, rank, ranks)

    def _file(self, file: Path, number: int, start: int, rank: int, ranks: int):
        """Yields what ``numbered`` yields for a file, whose first document is ``number``; returns the next number."""
        if file.suffix == ".parquet":
            return (yield from self._parquet(file, number, start, rank, ranks))
        text = _kind(file) == ".txt"
        read = _blocks if text and self.documents == BLANK_LINE else enumerate
        try:
            with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as lines:
                for line, content in read(lines):
                    if number >= start and number % ranks == rank:
                        content = _decoded(file, line, content.removeprefix(_BOM) if line == 0 else content)
                        yield number, (content if text else self._json(f"{file}, line {line + 1}", content)).strip()
                    number += 1
        except (gzip.BadGzipFile, EOFError) as error:
            raise ValueError(f"{file} is damaged: {error}") from None
        return number

    def _json(self, where: str, line: str) -> str:
        if not line.strip():
            return ""
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: expected a JSON object: {error}") from None
        if not isinstance(item, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(item).__name__}")
        return self._text(where, item)

    def _text(self, where: str, item) -> str:
        """Returns the text of an item, which is a str or has it under text_field."""
        if isinstance(item, Mapping):
            if self.text_field not in item:
                raise ValueError(f"{where}: there is no field {self.text_field!r}, but {', '.join(map(str, item))}")
            item, where = item[self.text_field], f"{where}, field {self.text_field!r}"
        if item is None:
            return ""
        if not isinstance(item, str):
            raise ValueError(f"{where}: expected text, got {type(item).__name__}")
        if not item.isascii():
            try:
                item.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{where}: half a surrogate pair at character {error.start}: no UTF-8") from None
        return item

    def _parquet(self, file: Path, number: int, start: int, rank: int, ranks: int):
        pyarrow, parquet = _library("pyarrow"), _library("pyarrow.parquet")
        try:
            with parquet.ParquetFile(file) as opened:
                names = opened.schema_arrow.names
                if self.text_field not in names:
                    raise ValueError(f"{file}: there is no column {self.text_field!r}, but {', '.join(names)}")
                first = number
                for group in range(opened.num_row_groups):
                    rows = opened.metadata.row_group(group).num_rows
                    if number + rows <= start:
                        number += rows
                        continue
                    for batch in opened.iter_batches(_ROWS, row_groups=[group], columns=[self.text_field]):
                        column = batch.column(0)
                        for row in range(len(column)):
                            if number >= start and number % ranks == rank:
                                item = {self.text_field: column[row].as_py()}
                                yield number, self._text(f"{file}, row {number - first}", item).strip()
                            number += 1
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is damaged: {error}") from None
        return number

    def _items_name(self) -> str:
        return "texts" if self.dataset is None else f"dataset {self.dataset}"

    def _items(self, start: int, rank: int, ranks: int) -> Iterator[tuple[int, str]]:
        """Yields what ``numbered`` yields, of the dataset or the texts."""
        if self.dataset is not None:
            load = _library("datasets").load_dataset
            items = load(self.dataset, self.config, split=self.split, streaming=True)
        else:
            items = self.texts() if callable(self.texts) else self.texts
        first, skip = 0, getattr(items, "skip", None)
        if hasattr(items, "__len__") and start >= len(items):  # A dataset cannot skip all of its items.
            return
        if start and callable(skip):  # a dataset of Hugging Face's
            items, first = skip(start), start
        for number, item in enumerate(items, first):
            if number >= start and number % ranks == rank:
                yield number, self._text(f"{self._items_name()}, item {number}", item).strip()


def _kind(file: Path) -> str:
    """Returns the suffix of a file; with .gz, the one before it."""
    return Path(file.stem).suffix if file.suffix == ".gz" else file.suffix


def _files(path: Path) -> list[Path]:
    """Returns the file, or the files of a folder whose suffixes are known, sorted."""
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file()]
        if not found:
            raise ValueError(f"{path} holds no file that ends in {', '.join(SUFFIXES)}")
        return sorted(found, key=lambda file: file.relative_to(path).as_posix())
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    return [path]


def _blocks(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yields the blocks of lines that blank lines separate, with the index of the first line."""
    block, first = [], 0
    for index, line in enumerate(lines):
        if line.isspace():
            if block:
                yield first, b"".join(block)
                block = []
        else:
            if not block:
                first = index
            block.append(line)
    if block:
        yield first, b"".join(block)


def _decoded(file: Path, line: int, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line += 1 + content.count(b"\n", 0, error.start)
        raise ValueError(f"{file}, line {line}: expected UTF-8: {error.reason}") from None


def _library(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ImportError(f"these sources need {package}: pip install {package}") from None
