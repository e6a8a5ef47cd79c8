"""``BatchEncoding``: what a tokenizer returns."""

import warnings
from collections import UserDict
from typing import NamedTuple

import torch


class CharSpan(NamedTuple):
    """Characters ``start`` to ``end`` (exclusive) of the text."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens ``start`` to ``end`` (exclusive) of a row."""

    start: int
    end: int


class BatchEncoding(UserDict):
    """A dict of what a model gets ("input_ids", ...), whose items are attributes too.

    What a fast tokenizer made also knows which characters and words each token is of. The methods that answer this take
    the index of a row first; with one index only, that of row 0 is meant. Rows and tokens may be counted from the end.

    Args:
        data: the items.
        encoding: the ``tokenizers.Encoding`` of every row (or of the one row), where a fast tokenizer made them.
        tensor_type: "pt" or "np" to make tensors of the items.
        prepend_batch_axis: make tensors with one row of items that have no rows.
        n_sequences: 1 or 2 (pairs) texts a row.
    """

    def __init__(
        self,
        data: dict | None = None,
        encoding=None,
        tensor_type: str | None = None,
        prepend_batch_axis: bool = False,
        n_sequences: int | None = None,
    ):
        super().__init__(data)
        if encoding is not None and not isinstance(encoding, list | tuple):
            encoding = [encoding]
        self._encodings = encoding
        self._n_sequences = encoding[0].n_sequences if n_sequences is None and encoding else n_sequences
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

    @property
    def n_sequences(self) -> int | None:
        """1 or 2 (pairs) texts a row; None where that is unknown."""
        return self._n_sequences

    @property
    def is_fast(self) -> bool:
        """Whether a fast tokenizer made it."""
        return self._encodings is not None

    @property
    def encodings(self) -> list | None:
        """The ``tokenizers.Encoding`` of every row; None where no fast tokenizer made them."""
        return self._encodings

    def __getitem__(self, item):
        """The item of that name; for an index or slice the encodings of these rows (without a fast tokenizer a slice
        gives a dict of the rows of every item)."""
        if isinstance(item, str):
            return self.data[item]
        if self._encodings is not None:
            return self._encodings[item]
        if isinstance(item, slice):
            return {name: value[item] for name, value in self.data.items()}
        raise KeyError(f"expected a name or a slice, got {item!r}; rows by index need a fast tokenizer")

    def __getattr__(self, name: str):
        data = self.__dict__.get("data", {})  # which is not there yet while one is unpickled
        if name in data:
            return data[name]
        raise AttributeError(f"{type(self).__name__} has no attribute or item {name!r}")

    def __getstate__(self) -> dict:
        return self.__dict__.copy()

    def __setstate__(self, state: dict):
        self.__dict__.update(state)

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row."""
        return self._row(batch_index, "tokens").tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """The index of every token's word in its text; None for special tokens that the tokenizer added."""
        return self._row(batch_index, "word_ids").word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """0 (first text) or 1 (second text) for every token; None for special tokens that the tokenizer added."""
        return self._row(batch_index, "sequence_ids").sequence_ids

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """0 (first text) or 1 (second text), or None for a special token."""
        row, token = self._row_and_token("token_to_sequence", batch_or_token_index, token_index)
        return row.token_to_sequence(token)

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """The index of a token's word in its text, or None for a special token."""
        row, token = self._row_and_token("token_to_word", batch_or_token_index, token_index)
        return row.token_to_word(token)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        """The characters of a token in its text, or None for a special token."""
        row, token = self._row_and_token("token_to_chars", batch_or_token_index, token_index)
        span = row.token_to_chars(token)
        return None if span is None else CharSpan(*span)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """The tokens of a word of the first (second: ``sequence_index=1``) text, or None where it has none."""
        row, word = self._row_and_index("word_to_tokens", batch_or_word_index, word_index)
        span = row.word_to_tokens(word, sequence_index)
        return None if span is None else TokenSpan(*span)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        """The characters of a word of the first (second: ``sequence_index=1``) text, or None where it has none."""
        row, word = self._row_and_index("word_to_chars", batch_or_word_index, word_index)
        span = row.word_to_chars(word, sequence_index)
        return None if span is None else CharSpan(*span)

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The token of a character of the first (second: ``sequence_index=1``) text, or None where it is in none."""
        row, char = self._row_and_index("char_to_token", batch_or_char_index, char_index)
        return row.char_to_token(char, sequence_index)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The word of a character of the first (second: ``sequence_index=1``) text, or None where it is in none."""
        row, char = self._row_and_index("char_to_word", batch_or_char_index, char_index)
        return row.char_to_word(char, sequence_index)

    def convert_to_tensors(self, tensor_type: str | None = None, prepend_batch_axis: bool = False) -> "BatchEncoding":
        """Makes tensors of the items that are none, in place.

        Args:
            tensor_type: "pt", "np", or None to change nothing.
            prepend_batch_axis: make tensors with one row.

        Raises:
            ValueError: ``tensor_type`` is another one, or rows differ in length.
        """
        tensor_type = getattr(tensor_type, "value", tensor_type)  # an enumeration of transformers'
        if tensor_type is None:
            return self
        if tensor_type == "pt":
            convert, kind = _torch_tensor, torch.Tensor
        elif tensor_type == "np":
            numpy = _numpy()
            convert = lambda value: numpy.asarray(value, dtype=numpy.int64 if _empty(value) else None)
            kind = numpy.ndarray
        else:
            raise ValueError(f'expected return_tensors to be "pt" or "np", got {tensor_type!r}')
        for name, value in self.data.items():
            value = [value] if prepend_batch_axis else value
            if not isinstance(value, kind):
                try:
                    self.data[name] = convert(value)
                except (ValueError, TypeError, RuntimeError) as error:
                    raise ValueError(f"{name} does not make one tensor{_why(name, value)}: {error}") from error
        return self

    def to(self, device: str | int | torch.device, *, non_blocking: bool = False) -> "BatchEncoding":
        """Moves the tensors to ``device``, in place. Not for other dtypes: ids stay integers."""
        if isinstance(device, str | int | torch.device):
            self.data = {
                name: value.to(device=device, non_blocking=non_blocking) if isinstance(value, torch.Tensor) else value
                for name, value in self.data.items()
            }
        else:
            warnings.warn(f"a BatchEncoding stays as it is: expected a device, got {device}")
        return self

    def _row(self, index: int, asked: str):
        if self._encodings is None:
            raise ValueError(f"{asked} needs what a fast tokenizer (DebertaV2TokenizerFast, DebertaTokenizerFast) made")
        return self._encodings[index]

    def _row_and_index(self, asked: str, first: int, second: int | None):
        return (self._row(0, asked), first) if second is None else (self._row(first, asked), second)

    def _row_and_token(self, asked: str, first: int, second: int | None):
        row, token = self._row_and_index(asked, first, second)
        return row, token + len(row) if token < 0 else token


def _numpy():
    try:
        import numpy
    except ImportError:
        raise ImportError('return_tensors="np" needs numpy: pip install numpy') from None
    return numpy


def _empty(value) -> bool:
    """Whether there is no number in it, so that no dtype follows from it."""
    return isinstance(value, list | tuple) and all(map(_empty, value))


def _torch_tensor(value) -> torch.Tensor:
    if isinstance(value, list | tuple) and value and hasattr(value[0], "__array__"):
        return torch.stack([torch.as_tensor(row) for row in value])
    return torch.tensor(value, dtype=torch.int64 if _empty(value) else None)


def _why(name: str, value) -> str:
    if name == "overflowing_tokens":
        return ", since rows overflow by different lengths (a fast tokenizer returns what overflows as more rows)"
    if isinstance(value, list | tuple) and all(isinstance(row, list | tuple) for row in value):
        lengths = sorted({len(row) for row in value})
        if len(lengths) > 1:
            return f", since its rows have {lengths[0]} to {lengths[-1]} items; pass padding=True, truncation=True"
    return ""
