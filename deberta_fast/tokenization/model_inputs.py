"""Turns token ids into model inputs: special tokens, truncation, padding."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral

from .batch_encoding import BatchEncoding

PADDINGS = ("longest", "max_length", "do_not_pad")
TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")
SIDES = ("right", "left")
# Bound on the length to which rows are padded. tokenizers would end the process if there is too little memory.
LONGEST_ROW = 2**20
# A larger model_max_length means that the model has no limit.
UNLIMITED = int(1e20)


@dataclass(frozen=True)
class Options:
    """Arguments of ``__call__``, ``encode`` and the others, except texts; ``__call__`` documents them."""

    add_special_tokens: bool = True
    padding: bool | str = False
    truncation: bool | str | None = None
    max_length: int | None = None
    stride: int = 0
    is_split_into_words: bool = False
    pad_to_multiple_of: int | None = None
    padding_side: str | None = None
    return_tensors: str | None = None
    return_token_type_ids: bool | None = None
    return_attention_mask: bool | None = None
    return_overflowing_tokens: bool = False
    return_special_tokens_mask: bool = False
    return_offsets_mapping: bool = False
    return_length: bool = False
    verbose: bool = True
    split_special_tokens: bool | None = None
    add_prefix_space: bool | None = None


def make_options(options: dict, *values) -> Options:
    """Makes ``Options`` from ``values``, in the order of the fields, and from ``options`` by name."""
    unknown = [name for name in options if name not in Options.__dataclass_fields__]
    if unknown:
        raise TypeError(f"there is no option {', '.join(unknown)}, but {', '.join(Options.__dataclass_fields__)}")
    return Options(*values, **options)


def check_choice(name: str, value, choices: tuple) -> str:
    value = getattr(value, "value", value)  # It may be a member of transformers' enumeration of the choices.
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


class ModelInputs:
    """Builds, truncates and pads rows of ids. Needs ``SpecialTokens`` and the attributes of ``TokenizerBase``."""

    # None stands for ["[CLS]:0", "$A:0", "[SEP]:0", "$B:1", "[SEP]:1"], with this tokenizer's special tokens.
    pair_template: list[str] | None = None

    def _template(self, pair: bool) -> list[tuple[str, int]]:
        """Lists the parts of a row in order, with their types: "$A", "$B" and special tokens."""
        if pair and self.pair_template:
            return [(part[:-2], int(part[-1])) for part in self.pair_template]
        first = [(self.cls_token, 0), ("$A", 0), (self.sep_token, 0)]
        return [*first, ("$B", 1), (self.sep_token, 1)] if pair else first

    def _parts(self, token_ids_0: list, token_ids_1: list | None) -> list[tuple[list, int, int]]:
        """Lists the parts of a row in order: ids, type, and 1 for special tokens or 0 for a text."""
        texts = {"$A": token_ids_0, "$B": token_ids_1}
        return [
            (texts[name], kind, 0) if name in texts else ([self.convert_tokens_to_ids(name)], kind, 1)
            for name, kind in self._template(token_ids_1 is not None)
        ]

    def build_inputs_with_special_tokens(self, token_ids_0: list, token_ids_1: list | None = None) -> list:
        """Returns [CLS] A [SEP], and for two texts the row of ``pair_template``, by default [CLS] A [SEP] B [SEP]."""
        return [index for ids, _, _ in self._parts(token_ids_0, token_ids_1) for index in ids]

    def create_token_type_ids_from_sequences(self, token_ids_0: list, token_ids_1: list | None = None) -> list[int]:
        """Returns 0 for [CLS] A [SEP], and for two texts the types of ``pair_template``, by default 1 for B [SEP]."""
        return [kind for ids, kind, _ in self._parts(token_ids_0, token_ids_1) for _ in ids]

    def get_special_tokens_mask(
        self, token_ids_0: list, token_ids_1: list | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Returns 1 for special tokens, 0 for others.

        Args:
            token_ids_0, token_ids_1: ids of one or two texts, without special tokens.
            already_has_special_tokens: ``token_ids_0`` is a whole row instead, with all special tokens.
        """
        if not already_has_special_tokens:
            return [special for ids, _, special in self._parts(token_ids_0, token_ids_1) for _ in ids]
        if token_ids_1 is not None:
            raise ValueError("already_has_special_tokens=True takes a whole row as token_ids_0, and no token_ids_1")
        special = set(self.all_special_ids)
        return [int(int(index) in special) for index in token_ids_0]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Returns how many special tokens the row of a text, or of two texts, has."""
        return len(self._template(pair)) - (2 if pair else 1)

    def prepare_for_model(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        add_special_tokens: bool = True,
        prepend_batch_axis: bool = False,
        **options,
    ) -> BatchEncoding:
        """Makes one row from the ids of one or two texts: truncates, adds special tokens, pads.

        Args:
            ids, pair_ids: ids without special tokens.
            prepend_batch_axis: make tensors with one row, if ``return_tensors`` is given.
            add_special_tokens, options: see ``__call__``, which raises the same errors.
        """
        options = make_options({"add_special_tokens": add_special_tokens, **options})
        options = self._resolve(options, pair_ids is not None)
        row = self._row(list(ids), None if pair_ids is None else list(pair_ids), options)
        return self._finish([row], options, single=True, prepend_batch_axis=prepend_batch_axis)

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: str = "longest_first",
        stride: int = 0,
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """Removes tokens at ``truncation_side``. Raises ValueError if there are too few.

        Args:
            ids, pair_ids: ids of one or two texts.
            num_tokens_to_remove: number of tokens.
            truncation_strategy: the text to shorten: "longest_first" (token by token), "only_first", "only_second",
                "do_not_truncate".
            stride: number of remaining tokens that are returned with the removed ones.

        Returns:
            The remaining ids of both texts, and the removed ones: none for two texts and "longest_first".
        """
        strategy, count = check_choice("truncation_strategy", truncation_strategy, TRUNCATIONS), num_tokens_to_remove
        if count <= 0 or strategy == "do_not_truncate":
            return ids, pair_ids, []
        if strategy == "only_second" and pair_ids is None:
            raise ValueError('truncation="only_second" needs a second text')
        lengths = len(ids), len(pair_ids or ())
        both = strategy == "longest_first" and pair_ids is not None
        first = 0 if strategy == "only_second" else count
        if both:
            # The longer text first shrinks to the length of the other one, then they shrink in turn.
            uneven = min(abs(lengths[0] - lengths[1]), count)
            first = (count - uneven) // 2 + (uneven if lengths[0] > lengths[1] else 0)
        second = count - first
        if first > lengths[0] or second > lengths[1]:
            hint = "" if both or pair_ids is None else "; another truncation could take some from the other text"
            source = f"texts of {lengths[0]} and {lengths[1]}" if both else f"a text of {lengths[second > 0]}"
            raise ValueError(f"cannot take {count} tokens from {source}{hint}")
        ids, overflow = self._cut(ids, first, stride)
        if second:
            pair_ids, overflow = self._cut(pair_ids, second, stride)
        return ids, pair_ids, [] if both else overflow

    def _cut(self, ids: list[int], count: int, stride: int) -> tuple[list[int], list[int]]:
        """Returns the remaining ids, and the ``count`` removed ones with the ``stride`` ids next to them."""
        window = min(len(ids), stride + count)
        if self.truncation_side == "left":
            return ids[count:], ids[:window]
        return ids[: len(ids) - count], ids[len(ids) - window :]

    def pad(
        self,
        encoded_inputs: Mapping | list[Mapping],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pads rows that are already encoded, as a ``collate_fn`` does.

        Args:
            encoded_inputs: a dict of lists or tensors of rows, a dict with a single row, or a list of dicts with a row
                each. ``input_ids``, ``token_type_ids``, ``attention_mask``, ``special_tokens_mask`` and
                ``offset_mapping`` are padded; other items (labels) stay as they are.
            return_tensors: "pt" or "np"; None for the kind of ``encoded_inputs``, lists or tensors.
            padding, max_length, pad_to_multiple_of, padding_side, return_attention_mask: see ``__call__``.

        Raises:
            ValueError: there are no ``input_ids``, or the numbers of rows, or the items of the rows, differ.
        """
        if isinstance(encoded_inputs, list | tuple):
            names = list(encoded_inputs[0]) if encoded_inputs else []
            for row in encoded_inputs:
                if not isinstance(row, Mapping) or set(row) != set(names):
                    raise ValueError(f"expected rows that are dicts with {', '.join(names)}, got {describe(row)}")
            encoded_inputs = {name: [row[name] for row in encoded_inputs] for name in names}
        main = self.model_input_names[0]
        if main not in encoded_inputs:
            raise ValueError(f"pad needs {main}, got {describe(encoded_inputs)}")
        return_tensors = _kind(encoded_inputs[main]) if return_tensors is None else return_tensors
        lists = {name: _to_lists(value) for name, value in encoded_inputs.items()}
        options = Options(
            padding=padding, truncation=False, max_length=max_length, pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side, return_tensors=return_tensors, return_attention_mask=return_attention_mask,
            verbose=verbose,
        )  # fmt: skip
        options = self._resolve(options, pair=False)
        ids = lists[main]
        if not ids:
            if self._wants("attention_mask", return_attention_mask):
                lists.setdefault("attention_mask", [])
            return BatchEncoding(lists, tensor_type=return_tensors)
        if not isinstance(ids[0], list | tuple):
            return self._finish([lists], options, single=True)
        wrong = [name for name, value in lists.items() if not isinstance(value, list) or len(value) != len(ids)]
        if wrong:
            raise ValueError(f"expected {len(ids)} rows as in {main}, got others in {', '.join(wrong)}")
        return self._finish([dict(zip(lists, values)) for values in zip(*lists.values())], options)

    def _finish(
        self, rows: list[dict], options: Options, single: bool = False, prepend_batch_axis: bool = False
    ) -> BatchEncoding:
        """Pads rows and makes their tensors. As in transformers, the length of a single row includes its padding."""
        lengths = [len(row["input_ids"]) for row in rows] if options.return_length else None
        self._pad_rows(rows, options)
        data = rows[0] if single else {name: [row[name] for row in rows] for name in rows[0]}
        if options.return_length:
            data["length"] = len(data["input_ids"]) if single else lengths
        return BatchEncoding(data, tensor_type=options.return_tensors, prepend_batch_axis=prepend_batch_axis)

    def _pad_rows(self, rows: list[dict], options: Options):
        """Adds the attention mask and the padding, in place."""
        main = self.model_input_names[0]
        fill = {main: self.pad_token_id, "token_type_ids": self.pad_token_type_id}
        fill |= {"special_tokens_mask": 1, "offset_mapping": (0, 0)}
        if self._wants("attention_mask", options.return_attention_mask):
            fill["attention_mask"] = 0
            for row in rows:
                row.setdefault("attention_mask", [1] * len(row[main]))
        if options.padding == "do_not_pad":
            return
        length = max(len(row[main]) for row in rows) if options.padding == "longest" else options.max_length
        multiple = options.pad_to_multiple_of or 1
        length = -(-length // multiple) * multiple
        left = (options.padding_side or self.padding_side) == "left"
        for row in rows:
            missing = length - len(row[main])
            for name in fill.keys() & row.keys():
                more = [fill[name]] * missing
                row[name] = [*more, *row[name]] if left else [*row[name], *more]

    def _row(self, ids: list[int], pair_ids: list[int] | None, options: Options) -> dict:
        """Makes a row without padding. ``options`` are resolved."""
        if options.return_token_type_ids and not options.add_special_tokens:
            raise ValueError("return_token_type_ids=True needs add_special_tokens=True")
        pair = pair_ids is not None
        if options.return_overflowing_tokens and pair and options.truncation == "longest_first":
            needs = 'truncation="only_first" or "only_second", or a fast tokenizer'
            raise ValueError(f"return_overflowing_tokens with two texts needs {needs}")
        special = self.num_special_tokens_to_add(pair) if options.add_special_tokens else 0
        total = len(ids) + len(pair_ids or ()) + special
        surplus = 0 if options.max_length is None else total - options.max_length
        ids, pair_ids, overflow = self.truncate_sequences(ids, pair_ids, surplus, options.truncation, options.stride)
        asked = options.return_overflowing_tokens
        row = {"overflowing_tokens": overflow, "num_truncated_tokens": surplus} if asked else {}
        parts = self._parts(ids, pair_ids) if options.add_special_tokens else [(ids, 0, 0), (pair_ids or [], 0, 0)]
        row["input_ids"] = [index for part, _, _ in parts for index in part]
        if self._wants("token_type_ids", options.return_token_type_ids):
            row["token_type_ids"] = [kind for part, kind, _ in parts for _ in part]
        if options.return_special_tokens_mask:
            row["special_tokens_mask"] = [special for part, _, special in parts for _ in part]
        self._warn_if_too_long(row["input_ids"], options)
        return row

    def _wants(self, name: str, asked: bool | None) -> bool:
        return name in self.model_input_names if asked is None else asked

    def _resolve(self, options: Options, pair: bool) -> Options:
        """Checks ``options`` and spells out padding, truncation and max_length. ``pair``: a row has two texts."""
        max_length, multiple = options.max_length, options.pad_to_multiple_of
        for name, value in (("max_length", max_length), ("stride", options.stride)):
            if value is not None and (not isinstance(value, Integral) or value < 0):
                raise ValueError(f"expected {name} to be a number of tokens, got {value!r}")
        if multiple is not None and (not isinstance(multiple, Integral) or multiple < 1):
            raise ValueError(f"expected pad_to_multiple_of to be a positive number or None, got {multiple!r}")
        if options.padding_side is not None:
            check_choice("padding_side", options.padding_side, SIDES)
        if max_length is not None and max_length > UNLIMITED:  # the model_max_length of a model without a limit
            max_length = None
        truncation = options.truncation
        if truncation is None and options.padding is False and max_length is not None:
            truncation = True
            self._warn_once(options, "truncation", "max_length is given: truncating to it, longest first")
        short = {True: "longest_first", False: "do_not_truncate", None: "do_not_truncate"}
        truncation = check_choice("truncation", short.get(truncation, truncation), TRUNCATIONS)
        short = {True: "longest", False: "do_not_pad", None: "do_not_pad"}
        padding = check_choice("padding", short.get(options.padding, options.padding), PADDINGS)
        if options.padding is True and max_length is not None and truncation == "do_not_truncate":
            message = 'max_length does nothing with padding=True and without truncation; there is padding="max_length"'
            self._warn_once(options, "padding", message)
        if max_length is None and (padding == "max_length" or truncation != "do_not_truncate"):
            if self.model_max_length <= UNLIMITED:
                max_length = self.model_max_length
            else:
                message = "there is no max_length or model_max_length to which rows could be truncated or padded"
                self._warn_once(options, "no max_length", message)
                padding = "do_not_pad" if padding == "max_length" else padding
                truncation = "do_not_truncate"
        if padding != "do_not_pad":
            if self.pad_token is None:
                raise ValueError(
                    "padding needs a padding token: tokenizer.pad_token = ..., or "
                    "tokenizer.add_special_tokens({'pad_token': '[PAD]'})"
                )
            if padding == "max_length" and max_length > LONGEST_ROW:
                source = "max_length" if options.max_length is not None else "model_max_length"
                raise ValueError(f'{source} must be at most {LONGEST_ROW} with padding="max_length", got {max_length}')
            if multiple and multiple > LONGEST_ROW:
                raise ValueError(f"pad_to_multiple_of must be at most {LONGEST_ROW}, got {multiple}")
            if multiple and truncation != "do_not_truncate" and max_length % multiple:
                raise ValueError(f"max_length is {max_length}, no multiple of pad_to_multiple_of={multiple}")
        if truncation != "do_not_truncate":
            special = self.num_special_tokens_to_add(pair) if options.add_special_tokens else 0
            if max_length < special:
                raise ValueError(f"max_length is {max_length}: no room for {special} special tokens")
        return replace(options, padding=padding, truncation=truncation, max_length=max_length)

    def _warn_if_too_long(self, ids: list[int], options: Options):
        if options.max_length is None and len(ids) > self.model_max_length > 0:
            message = f"a row has {len(ids)} tokens, more than the model_max_length, {self.model_max_length}"
            self._warn_once(options, "too long", message)

    def _warn_once(self, options: Options, topic: str, message: str):
        if options.verbose and not self.deprecation_warnings.get(topic):
            self.deprecation_warnings[topic] = True
            warnings.warn(message, stacklevel=2)


def describe(value) -> str:
    """Describes an unexpected value: the names in a dict, or its type and the types of its items."""
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {', '.join(sorted({type(x).__name__ for x in value})) or 'nothing'}"
    return ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__


def _to_lists(value):
    """Returns a copy of nested lists and tensors, as lists."""
    if isinstance(value, list | tuple):
        return list(value) if value and isinstance(value[0], int | str) else [_to_lists(row) for row in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _kind(value) -> str | None:
    """Names the kind of a tensor, or of the first tensor in a list: "pt", "np", or None for numbers."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    if not hasattr(value, "tolist"):
        return None
    return "pt" if type(value).__module__.startswith("torch") else "np"
