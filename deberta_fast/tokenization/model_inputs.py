"""From token ids to what a model gets: special tokens, truncation, padding."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral

from .batch_encoding import BatchEncoding

PADDINGS = ("longest", "max_length", "do_not_pad")
TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")
SIDES = ("right", "left")
# Tokens that a row is padded to at most; libraries take the memory at once, and end the process where there is none.
LONGEST_ROW = 2**20
# A model_max_length beyond this means that there is none.
UNLIMITED = int(1e20)


@dataclass(frozen=True)
class Options:
    """What ``__call__``, ``encode`` and the others take besides texts; documented at ``__call__``."""

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


def make_options(options: dict) -> Options:
    unknown = [name for name in options if name not in Options.__dataclass_fields__]
    if unknown:
        raise TypeError(f"there is no option {', '.join(unknown)}, but {', '.join(Options.__dataclass_fields__)}")
    return Options(**options)


def check_choice(name: str, value, choices: tuple) -> str:
    value = getattr(value, "value", value)  # an enumeration of transformers'
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


class ModelInputs:
    """Builds, truncates and pads rows of ids. Needs ``SpecialTokens`` and the attributes of ``TokenizerBase``."""

    # Instead of [CLS] A [SEP] B [SEP]: such as ["[CLS]:0", "$A:0", "[SEP]:0", "$B:1", "[SEP]:1"], which is the default.
    pair_template: list[str] | None = None

    def _pair_parts(self) -> list[tuple[str, int]]:
        """What stands in a row of two texts, one behind the other, and its type: "$A", "$B" and special tokens."""
        cls, sep = self.cls_token, self.sep_token
        template = self.pair_template or [f"{cls}:0", "$A:0", f"{sep}:0", "$B:1", f"{sep}:1"]
        parts = [part.rpartition(":") for part in template]
        return [(name, int(number)) for name, _, number in parts]

    def build_inputs_with_special_tokens(self, token_ids_0: list, token_ids_1: list | None = None) -> list:
        """[CLS] A [SEP], or for two as ``pair_template`` has it: [CLS] A [SEP] B [SEP]."""
        if token_ids_1 is None:
            return [self.cls_token_id, *token_ids_0, self.sep_token_id]
        texts = {"$A": token_ids_0, "$B": token_ids_1}
        parts = [texts[name] if name in texts else [self._token_to_id(name)] for name, _ in self._pair_parts()]
        return [index for part in parts for index in part]

    def create_token_type_ids_from_sequences(self, token_ids_0: list, token_ids_1: list | None = None) -> list[int]:
        """0 for [CLS] A [SEP]; for two as ``pair_template`` has it: 1 for B [SEP]."""
        if token_ids_1 is None:
            return [0] * (len(token_ids_0) + 2)
        lengths = {"$A": len(token_ids_0), "$B": len(token_ids_1)}
        return [kind for name, kind in self._pair_parts() for _ in range(lengths.get(name, 1))]

    def get_special_tokens_mask(
        self, token_ids_0: list, token_ids_1: list | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for special tokens, 0 for others.

        Args:
            token_ids_0, token_ids_1: ids of one or two texts, to which the special tokens are still to be added.
            already_has_special_tokens: ``token_ids_0`` is a whole row instead, with all special tokens.
        """
        if already_has_special_tokens:
            if token_ids_1 is not None:
                raise ValueError("a row that already has its special tokens is given as token_ids_0 alone")
            special = set(self.all_special_ids)
            return [int(int(index) in special) for index in token_ids_0]
        if token_ids_1 is None:
            return [1, *[0] * len(token_ids_0), 1]
        lengths = {"$A": len(token_ids_0), "$B": len(token_ids_1)}
        return [x for name, _ in self._pair_parts() for x in ([0] * lengths[name] if name in lengths else [1])]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many special tokens a text (two texts) gets."""
        return len(self._pair_parts()) - 2 if pair else 2

    def prepare_for_model(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        add_special_tokens: bool = True,
        prepend_batch_axis: bool = False,
        **options,
    ) -> BatchEncoding:
        """One row from the ids of one or two texts: truncated, with special tokens, padded.

        Args:
            ids, pair_ids: ids without special tokens.
            prepend_batch_axis: make tensors with one row, where ``return_tensors`` is given.
            add_special_tokens, options: see ``__call__``.

        Raises:
            ValueError: options do not fit together, or ``max_length`` leaves no room.
        """
        options = self._resolve(
            make_options({"add_special_tokens": add_special_tokens, **options}), pair_ids is not None
        )
        row = self._row(list(ids), None if pair_ids is None else list(pair_ids), options)
        if options.padding != "do_not_pad" or self._wants("attention_mask", options.return_attention_mask):
            row = self._pad_row(row, options.padding, options.max_length, options)
        if options.return_length:
            row["length"] = len(row["input_ids"])
        return BatchEncoding(row, tensor_type=options.return_tensors, prepend_batch_axis=prepend_batch_axis)

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: str = "longest_first",
        stride: int = 0,
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """Takes tokens away, at ``truncation_side``.

        Args:
            ids, pair_ids: ids of one or two texts.
            num_tokens_to_remove: how many.
            truncation_strategy: from which: "longest_first" (token by token), "only_first", "only_second",
                "do_not_truncate".
            stride: how many of the tokens that stay are given with those taken away.

        Returns:
            What is left of both, and what was taken away: nothing for two texts and "longest_first".

        Raises:
            ValueError: there are not as many tokens.
        """
        strategy = check_choice("truncation_strategy", truncation_strategy, TRUNCATIONS)
        if num_tokens_to_remove <= 0 or strategy == "do_not_truncate":
            return ids, pair_ids, []
        if strategy == "longest_first" and pair_ids is not None:
            lengths = len(ids), len(pair_ids)
            uneven = min(abs(lengths[0] - lengths[1]), num_tokens_to_remove)
            even = num_tokens_to_remove - uneven
            from_first = even // 2 + (uneven if lengths[0] > lengths[1] else 0)
            from_second = num_tokens_to_remove - from_first
            if from_first > lengths[0] or from_second > lengths[1]:
                raise ValueError(
                    f"cannot take {num_tokens_to_remove} tokens from texts of {lengths[0]} and {lengths[1]}"
                )
            return self._cut(ids, from_first)[0], self._cut(pair_ids, from_second)[0], []
        if strategy == "only_second" and pair_ids is None:
            raise ValueError('truncation="only_second" needs a second text')
        long = pair_ids if strategy == "only_second" else ids
        if num_tokens_to_remove > len(long):
            hint = "; another truncation could take some from the other text" if pair_ids is not None else ""
            raise ValueError(f"cannot take {num_tokens_to_remove} tokens from a text of {len(long)}{hint}")
        kept, overflow = self._cut(long, num_tokens_to_remove, stride)
        return (ids, kept, overflow) if strategy == "only_second" else (kept, pair_ids, overflow)

    def _cut(self, ids: list[int], count: int, stride: int = 0) -> tuple[list[int], list[int]]:
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
        """Pads rows that were encoded before, as a ``collate_fn`` does.

        Args:
            encoded_inputs: a dict with a list or tensor of rows an item, one with one row, or a list of dicts with one
                row each. ``input_ids``, ``token_type_ids``, ``attention_mask``, ``special_tokens_mask`` and
                ``offset_mapping`` are padded; other items (labels) stay as they are.
            return_tensors: "pt" or "np"; None for lists, or for tensors where there were tensors.
            padding, max_length, pad_to_multiple_of, padding_side, return_attention_mask: see ``__call__``.

        Raises:
            ValueError: there are no ``input_ids``, items differ in their number of rows, or rows in their items.
        """
        if isinstance(encoded_inputs, list | tuple):
            names = list(encoded_inputs[0]) if encoded_inputs else []
            for row in encoded_inputs:
                if not isinstance(row, Mapping) or set(row) != set(names):
                    raise ValueError(f"expected rows that are dicts with {', '.join(names)}, got {_describe(row)}")
            encoded_inputs = {name: [row[name] for row in encoded_inputs] for name in names}
        main = self.model_input_names[0]
        if main not in encoded_inputs:
            raise ValueError(f"pad needs {main}, got {_describe(encoded_inputs)}")
        lists = {}
        for name, value in encoded_inputs.items():
            lists[name], kind = _to_lists(value)
            if name == main and return_tensors is None:
                return_tensors = kind
        options = Options(
            padding=padding,
            truncation=False,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
            verbose=verbose,
        )
        options = self._resolve(options, pair=False)
        ids = lists[main]
        if not (ids and isinstance(ids[0], list | tuple)):  # one row
            if not ids and self._wants("attention_mask", return_attention_mask):
                lists.setdefault("attention_mask", [])
            row = self._pad_row(lists, options.padding, options.max_length, options) if ids else lists
            return BatchEncoding(row, tensor_type=return_tensors)
        wrong = [name for name, value in lists.items() if not isinstance(value, list) or len(value) != len(ids)]
        if wrong:
            raise ValueError(f"expected {len(ids)} rows as in {main}, got others in {', '.join(wrong)}")
        rows = [{name: value[i] for name, value in lists.items()} for i in range(len(ids))]
        return BatchEncoding(self._pad_rows(rows, options), tensor_type=return_tensors)

    def _pad_rows(self, rows: list[dict], options: Options) -> dict[str, list]:
        padding, length = options.padding, options.max_length
        if padding == "longest":
            padding, length = "max_length", max(len(row[self.model_input_names[0]]) for row in rows)
        rows = [self._pad_row(row, padding, length, options) for row in rows]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _pad_row(self, row: dict, padding: str, length: int | None, options: Options) -> dict:
        main = self.model_input_names[0]
        row = dict(row)
        row[main] = list(row[main])
        count = len(row[main])
        wants_mask = self._wants("attention_mask", options.return_attention_mask)
        if wants_mask:
            row.setdefault("attention_mask", [1] * count)
        if padding == "do_not_pad":
            return row
        if padding == "longest":
            length = count
        if options.pad_to_multiple_of:
            length = -(-length // options.pad_to_multiple_of) * options.pad_to_multiple_of
        fill = {
            main: self.pad_token_id,
            "token_type_ids": self.pad_token_type_id,
            "special_tokens_mask": 1,
            "offset_mapping": (0, 0),
            **({"attention_mask": 0} if wants_mask else {}),
        }
        for name, value in fill.items():
            if name in row:
                more = [value] * (length - count)
                left = (options.padding_side or self.padding_side) == "left"
                row[name] = more + list(row[name]) if left else list(row[name]) + more
        return row

    def _row(self, ids: list[int], pair_ids: list[int] | None, options: Options) -> dict:
        """A row that is not padded yet. ``options`` are resolved."""
        if options.return_token_type_ids and not options.add_special_tokens:
            raise ValueError("return_token_type_ids=True needs add_special_tokens=True")
        row = {}
        pair = pair_ids is not None
        if options.return_overflowing_tokens and pair and options.truncation == "longest_first":
            raise ValueError(
                'return_overflowing_tokens with two texts needs truncation="only_first" or "only_second", or a fast '
                "tokenizer"
            )
        special = self.num_special_tokens_to_add(pair) if options.add_special_tokens else 0
        total = len(ids) + len(pair_ids or ()) + special
        surplus = 0 if options.max_length is None else total - options.max_length
        overflow = []
        if options.truncation != "do_not_truncate" and surplus > 0:
            ids, pair_ids, overflow = self.truncate_sequences(
                ids, pair_ids, surplus, options.truncation, options.stride
            )
        if options.return_overflowing_tokens:
            row["overflowing_tokens"], row["num_truncated_tokens"] = overflow, surplus
        if options.add_special_tokens:
            row["input_ids"] = self.build_inputs_with_special_tokens(ids, pair_ids)
            types = self.create_token_type_ids_from_sequences(ids, pair_ids)
            mask = self.get_special_tokens_mask(ids, pair_ids)
        else:
            row["input_ids"] = ids + (pair_ids or [])
            types = mask = [0] * len(row["input_ids"])
        if self._wants("token_type_ids", options.return_token_type_ids):
            row["token_type_ids"] = types
        if options.return_special_tokens_mask:
            row["special_tokens_mask"] = list(mask)
        self._warn_if_too_long(row["input_ids"], options)
        return row

    def _wants(self, name: str, asked: bool | None) -> bool:
        return name in self.model_input_names if asked is None else asked

    def _resolve(self, options: Options, pair: bool) -> Options:
        """``options`` with padding, truncation and max_length said in full, and checked.

        Args:
            pair: whether there are rows with two texts.
        """
        padding, truncation, max_length = options.padding, options.truncation, options.max_length
        unlimited = self.model_max_length > UNLIMITED
        for name, value in (("max_length", max_length), ("stride", options.stride)):
            if value is not None and (not isinstance(value, Integral) or value < 0):
                raise ValueError(f"expected {name} to be a number of tokens, got {value!r}")
        if max_length is not None and max_length > UNLIMITED:  # a model_max_length that is none
            max_length = None
        if padding is False and truncation is None and max_length is not None:
            truncation = "longest_first"
            if options.verbose:
                self._warn_once("max_length without truncation", "max_length is given: truncating to it, longest first")
        padding = {True: "longest", False: "do_not_pad", None: "do_not_pad"}.get(padding, padding)
        padding = check_choice("padding", padding, PADDINGS)
        truncation = {True: "longest_first", False: "do_not_truncate", None: "do_not_truncate"}.get(
            truncation, truncation
        )
        truncation = check_choice("truncation", truncation, TRUNCATIONS)
        truncates = truncation != "do_not_truncate"
        if options.padding_side is not None:
            check_choice("padding_side", options.padding_side, SIDES)
        if options.padding is True and max_length is not None and not truncates and options.verbose:
            self._warn_once(
                "padding=True with max_length",
                'max_length does nothing with padding=True and without truncation; there is padding="max_length"',
            )
        if max_length is None and unlimited and (padding == "max_length" or truncates):
            if options.verbose:
                self._warn_once(
                    "no max_length", "neither max_length nor the tokenizer's model_max_length is set: taking no length"
                )
            padding = "do_not_pad" if padding == "max_length" else padding
            truncation, truncates = "do_not_truncate", False
        elif max_length is None and (padding == "max_length" or truncates):
            max_length = self.model_max_length
        if padding != "do_not_pad" and self.pad_token is None:
            raise ValueError(
                "padding needs a padding token: tokenizer.pad_token = ..., or "
                "tokenizer.add_special_tokens({'pad_token': '[PAD]'})"
            )
        multiple = options.pad_to_multiple_of
        if multiple is not None and (not isinstance(multiple, Integral) or multiple < 1):
            raise ValueError(f"expected pad_to_multiple_of to be a positive number or None, got {multiple!r}")
        if padding == "max_length" and max_length > LONGEST_ROW:
            source = "max_length" if options.max_length is not None else "model_max_length"
            raise ValueError(f'{source} must be at most {LONGEST_ROW} with padding="max_length", got {max_length}')
        if padding != "do_not_pad" and multiple and multiple > LONGEST_ROW:
            raise ValueError(f"pad_to_multiple_of must be at most {LONGEST_ROW}, got {multiple}")
        if truncates:
            if padding != "do_not_pad" and multiple and max_length % multiple:
                raise ValueError(f"max_length is {max_length}, no multiple of pad_to_multiple_of={multiple}")
            special = self.num_special_tokens_to_add(pair) if options.add_special_tokens else 0
            if max_length < special:
                raise ValueError(f"max_length is {max_length}: no room for {special} special tokens")
        return replace(options, padding=padding, truncation=truncation, max_length=max_length)

    def _warn_if_too_long(self, ids: list[int], options: Options):
        if options.max_length is None and len(ids) > self.model_max_length > 0 and options.verbose:
            self._warn_once(
                "too long", f"a row has {len(ids)} tokens, more than the model_max_length, {self.model_max_length}"
            )

    def _warn_once(self, topic: str, message: str):
        if not self.deprecation_warnings.get(topic):
            self.deprecation_warnings[topic] = True
            warnings.warn(message, stacklevel=2)


def _describe(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__


def _to_lists(value) -> tuple[list, str | None]:
    """The lists of a list or tensor, and "pt" or "np" where there were tensors."""
    if isinstance(value, list | tuple):
        rows = [_to_lists(row) for row in value] if value and not isinstance(value[0], int | str) else []
        return ([row for row, _ in rows] if rows else list(value)), (rows[0][1] if rows else None)
    if hasattr(value, "tolist"):
        return value.tolist(), "pt" if type(value).__module__.startswith("torch") else "np"
    return value, None
