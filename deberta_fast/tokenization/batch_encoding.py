"""``BatchEncoding``, the result of a tokenizer."""

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
    """A dict of model inputs ("input_ids", ...), whose items are attributes too.

    The result of a fast tokenizer also maps tokens to characters and words. Methods for this take the index of a row
    first; given one index only, they use row 0. Indices of rows and tokens may count from the end.

    Args:
        data: the items.
        encoding: the ``tokenizers.Encoding`` of every row (or of a single row), if a fast tokenizer made them.
        tensor_type, prepend_batch_axis: see ``convert_to_tensors``.
        n_sequences: see below.

    Attributes:
        encodings: the ``tokenizers.Encoding`` of every row; None if no fast tokenizer made the rows.
        n_sequences: number of texts per row, 1 or 2 (pairs); None if it is unknown.
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
        self.encodings = encoding
        self.n_sequences = encoding[0].n_sequences if n_sequences is None and encoding else n_sequences
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

    @property
    def is_fast(self) -> bool:
        """Whether a fast tokenizer made the rows."""
        return self.encodings is not None

    def __getitem__(self, item):
        """Returns the item of that name. For an index or slice, returns the encodings of these rows; without a fast
        tokenizer, a slice returns a dict of the rows of every item."""
        if isinstance(item, str):
            return self.data[item]
        if self.encodings is not None:
            return self.encodings[item]
        if isinstance(item, slice):
            return {name: value[item] for name, value in self.data.items()}
        raise KeyError(f"expected a name or a slice, got {item!r}; rows by index need a fast tokenizer")

    def __getattr__(self, name: str):
        if name in self.__dict__.get("data", {}):  # Unpickling asks for attributes before data is set.
            return self.data[name]
        raise AttributeError(f"{type(self).__name__} has no attribute or item {name!r}")

    def tokens(self, batch_index: int = 0) -> list[str]:
        """Returns the tokens of a row."""
        return self._row(batch_index, "tokens").tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Returns the index of every token's word in its text; None for special tokens that the tokenizer added."""
        return self._row(batch_index, "word_ids").word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """Returns 0 (first text) or 1 (second text) per token; None for special tokens that the tokenizer added."""
        return self._row(batch_index, "sequence_ids").sequence_ids

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """Returns 0 (first text) or 1 (second text), or None for a special token."""
        return self._find("token_to_sequence", batch_or_token_index, token_index)

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """Returns the index of a token's word in its text, or None for a special token."""
        return self._find("token_to_word", batch_or_token_index, token_index)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        """Returns the characters of a token in its text, or None for a special token."""
        return self._find("token_to_chars", batch_or_token_index, token_index, span=CharSpan)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """Returns the tokens of a word of text ``sequence_index``, or None if it has none."""
        return self._find("word_to_tokens", batch_or_word_index, word_index, sequence_index, span=TokenSpan)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        """Returns the characters of a word of text ``sequence_index``, or None if it has none."""
        return self._find("word_to_chars", batch_or_word_index, word_index, sequence_index, span=CharSpan)

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """Returns the token of a character of text ``sequence_index``, or None if it is in none."""
        return self._find("char_to_token", batch_or_char_index, char_index, sequence_index)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """Returns the word of a character of text ``sequence_index``, or None if it is in none."""
        return self._find("char_to_word", batch_or_char_index, char_index, sequence_index)

    def _row(self, index: int, asked: str):
        if self.encodings is None:
            raise ValueError(f"{asked} needs a fast tokenizer's result (DebertaV2TokenizerFast, DebertaTokenizerFast)")
        return self.encodings[index]

    def _find(self, method: str, first: int, second: int | None, *sequence: int, span: type | None = None):
        """Calls a method of a row's ``Encoding``. The indices are row and item, or an item of row 0."""
        row, index = (self._row(0, method), first) if second is None else (self._row(first, method), second)
        if method.startswith("token") and index < 0:
            index += len(row)
        found = getattr(row, method)(index, *sequence)
        return found if span is None or found is None else span(*found)

    def convert_to_tensors(self, tensor_type: str | None = None, prepend_batch_axis: bool = False) -> "BatchEncoding":
        """Converts the items to tensors, in place. Raises ValueError if rows differ in length.

        Args:
            tensor_type: "pt", "np", or None to change nothing. Others raise ValueError.
            prepend_batch_axis: add a batch axis of one row.
        """
        tensor_type = getattr(tensor_type, "value", tensor_type)  # It may be transformers' TensorType.
        if tensor_type is None:
            return self
        if tensor_type == "pt":
            convert, kind = _torch_tensor, torch.Tensor
        elif tensor_type == "np":
            import numpy

            convert = lambda value: numpy.asarray(value, dtype=numpy.int64 if _empty(value) else None)
            kind = numpy.ndarray
        else:
            raise ValueError(f'expected return_tensors to be "pt" or "np", got {tensor_type!r}')
        for name, value in self.data.items():
            value = [value] if prepend_batch_axis else value
            try:
                self.data[name] = value if isinstance(value, kind) else convert(value)
            except (ValueError, TypeError, RuntimeError) as error:
                raise ValueError(f"{name} does not make one tensor{_why(name, value)}: {error}") from error
        return self

    def to(self, device: str | int | torch.device, *, non_blocking: bool = False) -> "BatchEncoding":
        """Moves the tensors to ``device``, in place. It converts no dtypes: ids stay integers."""
        if not isinstance(device, str | int | torch.device):
            warnings.warn(f"a BatchEncoding stays as it is: expected a device, got {device}")
            return self
        for name, value in self.data.items():
            if isinstance(value, torch.Tensor):
                self.data[name] = value.to(device, non_blocking=non_blocking)
        return self


def _empty(value) -> bool:
    """Whether ``value`` holds no number from which a dtype could follow."""
    return isinstance(value, list | tuple) and all(map(_empty, value))


def _torch_tensor(value) -> torch.Tensor:
    if isinstance(value, list | tuple) and value and hasattr(value[0], "__array__"):
        return torch.stack([torch.as_tensor(row) for row in value])
    return torch.tensor(value, dtype=torch.int64 if _empty(value) else None)


def _why(name: str, value) -> str:
    """Explains why an item makes no tensor; "" if the reason is unknown."""
    if name == "overflowing_tokens":
        return ", since rows overflow by different lengths (a fast tokenizer returns what overflows as more rows)"
    if isinstance(value, list | tuple) and all(isinstance(row, list | tuple) for row in value):
        lengths = sorted({len(row) for row in value})
        if len(lengths) > 1:
            return f", since its rows have {lengths[0]} to {lengths[-1]} items; pass padding=True, truncation=True"
    return ""
