"""``TokenizerBase``, the common part of all tokenizers."""

import re
from collections.abc import Iterable, Mapping, Sequence

from .batch_encoding import BatchEncoding
from .files import Files
from .model_inputs import SIDES, ModelInputs, Options, check_choice, describe, make_options
from .special_tokens import NAMES, AddedToken, SpecialTokens, as_added_token

# A str may hold half of a surrogate pair, which UTF-8 cannot encode.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class TokenizerBase(SpecialTokens, ModelInputs, Files):
    """Converts text to ids and back.

    A subclass has ``is_fast``, ``vocab_size`` (without added tokens), ``added_tokens_decoder``, ``get_vocab``,
    ``tokenize``, ``convert_tokens_to_string``, ``_token_to_id``, ``_id_to_token``, ``_add_tokens``, and

    * ``_add_first_tokens(decoder)``, which adds the tokens of ``decoder`` and the special tokens;
    * ``_encode(examples, single, options)``, which encodes pairs (text, second text or None); if ``single``, there is
      one pair and the result has no batch axis;
    * ``_decode(ids, skip_special_tokens, spaces_between_special_tokens)``.

    Args:
        settings: a subclass's own settings, which become attributes and are saved.
        bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token: text or ``AddedToken``; those that
            the vocabulary lacks are added.
        additional_special_tokens: more special tokens.
        extra_special_tokens: another name of ``additional_special_tokens``; may be a dict.
        added_tokens_decoder: tokens that are never split, by id.
        model_max_length: ``max_length`` of ``truncation=True`` and ``padding="max_length"``; None for no limit (1e30).
        padding_side, truncation_side: "right" or "left".
        model_input_names: items that ``__call__`` returns, ids first.
        clean_up_tokenization_spaces: ``decode`` removes the spaces before English punctuation and contractions.
        split_special_tokens: special tokens in a text are split like other text.
        name_or_path: where the tokenizer comes from.
        verbose: warn of options that do nothing.
    """

    model_input_names = ["input_ids", "token_type_ids", "attention_mask"]

    def __init__(
        self,
        settings: dict,
        /,
        *,
        bos_token: str | AddedToken | None = "[CLS]",
        eos_token: str | AddedToken | None = "[SEP]",
        unk_token: str | AddedToken | None = "[UNK]",
        sep_token: str | AddedToken | None = "[SEP]",
        pad_token: str | AddedToken | None = "[PAD]",
        cls_token: str | AddedToken | None = "[CLS]",
        mask_token: str | AddedToken | None = "[MASK]",
        additional_special_tokens: Sequence[str | AddedToken] | None = None,
        extra_special_tokens: Sequence[str | AddedToken] | Mapping[str, str | AddedToken] | None = None,
        added_tokens_decoder: Mapping[int, AddedToken] | None = None,
        model_max_length: int | None = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        model_input_names: list[str] | None = None,
        clean_up_tokenization_spaces: bool = False,
        split_special_tokens: bool = False,
        name_or_path: str = "",
        verbose: bool = True,
    ):
        for name, value in settings.items():
            setattr(self, name, value)
        self._special_tokens = {}
        for name, token in zip(NAMES, (bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token)):
            setattr(self, name, token)
        if isinstance(extra_special_tokens, Mapping):
            extra_special_tokens = list(extra_special_tokens.values())
        more = [*(additional_special_tokens or ()), *(extra_special_tokens or ())]
        self.additional_special_tokens = list({str(token): token for token in more}.values())
        self.model_max_length = int(1e30 if model_max_length is None else model_max_length)
        self.padding_side = check_choice("padding_side", padding_side, SIDES)
        self.truncation_side = check_choice("truncation_side", truncation_side, SIDES)
        self.model_input_names = list(self.model_input_names if model_input_names is None else model_input_names)
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.split_special_tokens = split_special_tokens
        self.name_or_path = str(name_or_path)
        self.verbose = verbose
        # The topics of the warnings that were given. transformers' collators write into a dict of this name.
        self.deprecation_warnings: dict[str, bool] = {}
        self._add_first_tokens({int(i): as_added_token(token) for i, token in (added_tokens_decoder or {}).items()})
        defaults = dict(padding_side="right", truncation_side="right", split_special_tokens=False)
        defaults["model_input_names"] = type(self).model_input_names
        changed = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        # save_pretrained writes these settings beside the special tokens.
        self.init_kwargs = changed | settings

    @property
    def vocab(self) -> dict[str, int]:
        return self.get_vocab()

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """The ids of the tokens that are never split."""
        return {token.content: index for index, token in self.added_tokens_decoder.items()}

    def get_added_vocab(self) -> dict[str, int]:
        """Returns the ids of the tokens that are never split."""
        return self.added_tokens_encoder

    @property
    def max_len_single_sentence(self) -> int:
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        added = "\n\t".join(f"{index}: {token!r}," for index, token in self.added_tokens_decoder.items())
        return (
            f"{type(self).__name__}(name_or_path='{self.name_or_path}', vocab_size={self.vocab_size}, "
            f"model_max_length={self.model_max_length}, is_fast={self.is_fast}, padding_side='{self.padding_side}', "
            f"truncation_side='{self.truncation_side}', special_tokens={self.special_tokens_map}, "
            f"clean_up_tokenization_spaces={self.clean_up_tokenization_spaces}, "
            f"added_tokens_decoder={{\n\t{added}\n}}\n)"
        )

    def __call__(
        self,
        text: str | Sequence | None = None,
        text_pair: str | Sequence | None = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        *,
        text_target: str | Sequence | None = None,
        text_pair_target: str | Sequence | None = None,
        **options,
    ) -> BatchEncoding:
        """Encodes one text or pair of texts, or a list of them, as inputs of a model.

        Args:
            text: a text, a list of texts, or a list of pairs of texts; with ``is_split_into_words`` each text is a list
                of words.
            text_pair: the second text, or a list of as many as ``text`` has.
            add_special_tokens: make [CLS] A [SEP] or [CLS] A [SEP] B [SEP] instead of A or A B.
            padding: True or "longest": to the length of the longest row; "max_length": to ``max_length``; False or
                "do_not_pad".
            truncation: True or "longest_first": to ``max_length``, token by token from the longer text; "only_first",
                "only_second": from that text; False or "do_not_truncate". None: True if there is a ``max_length`` and
                no padding.
            max_length: number of tokens, including special ones; None: ``model_max_length``.
            stride: number of tokens that overflowing rows repeat.
            is_split_into_words: texts are lists of words.
            pad_to_multiple_of: round the padded length up to a multiple of it.
            padding_side: "right" or "left"; None: the tokenizer's.
            return_tensors: "pt" or "np"; None: lists.
            text_target, text_pair_target: encoded as ``text`` and ``text_pair`` are. Their ids become the item
                "labels"; without ``text`` they are the whole result.
            options: return_token_type_ids, return_attention_mask (None: if ``model_input_names`` has them),
                return_special_tokens_mask (1 for special tokens), return_length, return_offsets_mapping (characters of
                each token, fast tokenizers only), return_overflowing_tokens (a slow tokenizer returns them and
                num_truncated_tokens as items, a fast one as more rows, with overflow_to_sample_mapping),
                split_special_tokens (None: the tokenizer's), add_prefix_space (slow tokenizers only), verbose.

        Raises:
            TypeError: texts are of another type, or there is no such option.
            ValueError: the numbers of first and second texts differ, options have impossible values or do not fit
                together, ``max_length`` leaves no room, or rows of different lengths do not make a tensor.
            NotImplementedError: a slow tokenizer cannot return offsets.
        """
        options = make_options(
            options, add_special_tokens, padding, truncation, max_length, stride, is_split_into_words,
            pad_to_multiple_of, padding_side, return_tensors,
        )  # fmt: skip
        if text_target is None and text_pair_target is not None:
            raise ValueError("text_pair_target needs a text_target")
        if text_target is None:
            return self._encode_any(text, text_pair, options)
        labels = self._encode_any(text_target, text_pair_target, options)
        if text is None:
            return labels
        inputs = self._encode_any(text, text_pair, options)
        inputs["labels"] = labels["input_ids"]
        return inputs

    def _encode_any(self, text, text_pair, options: Options) -> BatchEncoding:
        """Decides whether ``text`` is a single text or a batch, and encodes it."""
        rows = (list, tuple)
        if not isinstance(text, (str, *rows)):
            raise TypeError(f"expected text to be a str, a list of str or a list of pairs, got {type(text).__name__}")
        words = options.is_split_into_words
        if isinstance(text, str) or (words and not (text and isinstance(text[0], rows))):
            return self._check_and_encode([(text, text_pair)], True, options)
        if text_pair is None:
            return self._encode_batch(text, options)
        if not isinstance(text_pair, rows):
            raise TypeError(f"expected text_pair to be a list, as text is, got {type(text_pair).__name__}")
        if len(text) != len(text_pair):
            raise ValueError(f"got {len(text)} texts, but {len(text_pair)} as text_pair")
        return self._check_and_encode(list(zip(text, text_pair)), False, options)

    def encode(self, text: str, text_pair: str | None = None, add_special_tokens: bool = True, **options) -> list[int]:
        """Returns the ids of a text or pair of texts; for ``options`` see ``__call__``."""
        return self.encode_plus(text, text_pair, add_special_tokens=add_special_tokens, **options)["input_ids"]

    def encode_plus(self, text: str, text_pair: str | None = None, **options) -> BatchEncoding:
        """Encodes one text or pair of texts. A slow tokenizer takes lists of tokens or ids too."""
        return self._check_and_encode([(text, text_pair)], True, make_options(options))

    def batch_encode_plus(self, batch_text_or_text_pairs: Sequence, **options) -> BatchEncoding:
        """Encodes a list of texts, or of pairs of texts."""
        if not isinstance(batch_text_or_text_pairs, list | tuple):
            raise TypeError(f"expected a list of texts or pairs, got {type(batch_text_or_text_pairs).__name__}")
        return self._encode_batch(batch_text_or_text_pairs, make_options(options))

    def _encode_batch(self, rows: Sequence, options: Options) -> BatchEncoding:
        kind = (list, tuple) if options.is_split_into_words else str
        examples = []
        for row in rows:
            pair = isinstance(row, list | tuple) and len(row) == 2 and all(isinstance(text, kind) for text in row)
            examples.append(tuple(row) if pair else (row, None))
        return self._check_and_encode(examples, False, options)

    def _check_and_encode(self, examples: list[tuple], single: bool, options: Options) -> BatchEncoding:
        options = self._resolve(options, any(second is not None for _, second in examples))
        for i, (first, second) in enumerate(examples):
            where = "" if single else f" {i} of the batch"
            for name, text in (("text", first), ("text_pair", second)):
                if (text is not None or name == "text") and not (single and self._is_encoded(text, options)):
                    self._check_text(f"{name}{where}", text, options)
        if not examples:
            names = [name for name in ("token_type_ids", "attention_mask") if name in self.model_input_names]
            return BatchEncoding({name: [] for name in ("input_ids", *names)}, tensor_type=options.return_tensors)
        return self._encode(examples, single, options)

    def _is_encoded(self, text, options: Options) -> bool:
        """Whether ``text`` is a list of tokens or ids, which ``encode_plus`` of slow tokenizers takes."""
        if self.is_fast or options.is_split_into_words or not isinstance(text, list | tuple) or not text:
            return False
        return all(isinstance(item, str) for item in text) or all(isinstance(item, int) for item in text)

    def _check_text(self, what: str, text, options: Options):
        expected, parts = "a str", [text]
        if options.is_split_into_words:
            expected, parts = "a list of words (str)", text if isinstance(text, list | tuple) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise TypeError(f"expected {what} to be {expected}, got {describe(text)}")
        for part in parts:
            lone = None if part.isascii() else _LONE_SURROGATE.search(part)
            if lone:
                raise ValueError(f"{what} has half a surrogate pair, {lone[0]!r} at {lone.start()}: no UTF-8")

    def convert_tokens_to_ids(self, tokens: str | Iterable[str] | None) -> int | list[int] | None:
        """Returns the id of a token or of several; unknown tokens have the id of ``unk_token``."""
        if tokens is None or isinstance(tokens, str):
            return None if tokens is None else self._token_to_id(tokens)
        return [self._token_to_id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str | list[str]:
        """Returns the token of an id, or of several (a tensor or list)."""
        ids = _to_ids(ids)
        if isinstance(ids, int):
            return self._id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        return [self._id_to_token(index) for index in ids if index not in skipped]

    def decode(
        self,
        token_ids,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Returns the text of ids.

        Args:
            token_ids: one row: a list or tensor of ids, or one id.
            skip_special_tokens: leave out the special tokens.
            clean_up_tokenization_spaces: remove the spaces before English punctuation and contractions; None: the
                tokenizer's setting.
            spaces_between_special_tokens: write a space around added tokens (slow tokenizers only).

        Raises:
            TypeError: ``token_ids`` is a batch of rows, or holds no ids.
            ValueError: an id is negative.
        """
        ids = _to_ids(token_ids)
        ids = [ids] if isinstance(ids, int) else ids
        if ids and min(ids) < 0:
            raise ValueError(f"there is no token with id {min(ids)} (labels hold -100 where there is none)")
        text = self._decode(ids, skip_special_tokens, spaces_between_special_tokens)
        clean_up = clean_up_tokenization_spaces
        clean_up = self.clean_up_tokenization_spaces if clean_up is None else clean_up
        return self.clean_up_tokenization(text) if clean_up else text

    def batch_decode(self, sequences, skip_special_tokens: bool = False, **options) -> list[str]:
        """Returns the texts of several rows of ids; for ``options`` see ``decode``."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens, **options) for row in sequences]

    @staticmethod
    def clean_up_tokenization(out_string: str) -> str:
        """Removes the spaces before English punctuation and contractions."""
        for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
            out_string = out_string.replace(spaced, spaced.strip())
        return out_string


def _to_ids(ids) -> int | list[int]:
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(ids, int):
        return ids
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise TypeError(f"expected ids as a number, list or tensor, got {type(ids).__name__}")
    try:
        return [index if type(index) is int else int(index) for index in ids]
    except (TypeError, ValueError):
        raise TypeError("expected one row of ids; batch_decode takes several") from None
