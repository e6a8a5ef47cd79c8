"""Tokenizers on the ``tokenizers`` library: ``FastTokenizer``."""

import json
import sys
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path

from ..checkpoint.replace import replace_file
from .backends import without_panics
from .base import TokenizerBase
from .batch_encoding import BatchEncoding
from .files import TOKENIZER
from .model_inputs import Options
from .special_tokens import NAMES, AddedToken, as_added_token

DEFAULTS = dict(zip(NAMES, ("[CLS]", "[SEP]", "[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")))


class FastTokenizer(TokenizerBase):
    """A tokenizer whose work a ``tokenizers.Tokenizer`` does.

    Args:
        backend: the ``tokenizers.Tokenizer``; it becomes this object's own.
        options: see ``TokenizerBase``.
    """

    is_fast = True

    def __init__(self, backend, /, **options):
        self._tokenizer = backend
        # Padding and truncation are settings of the backend: threads must not change them under each other.
        self._lock = threading.Lock()
        # A tokenizer.json may hold the settings that were in force when it was written.
        for name, settings in (("truncation_side", backend.truncation), ("padding_side", backend.padding)):
            if settings is not None:
                options.setdefault(name, settings["direction"].lower())
        self._reset_backend()
        super().__init__(**options)
        backend.encode_special_tokens = self.split_special_tokens

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict):
        self.__dict__.update(state, _lock=threading.Lock())

    @property
    def backend_tokenizer(self):
        """The ``tokenizers.Tokenizer``."""
        return self._tokenizer

    @property
    def decoder(self):
        return self._tokenizer.decoder

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        tokens = self._tokenizer.get_added_tokens_decoder()
        return {index: as_added_token(token) for index, token in sorted(tokens.items())}

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def _add_first_tokens(self, decoder: dict[int, AddedToken]):
        present = {token.content: token for token in self.added_tokens_decoder.values()}
        # The backend's own know best how they are found.
        for name, token in self._special_tokens.items():
            if token is not None:
                self._special_tokens[name] = present.get(token.content, token)
        named = set(self.all_special_tokens)
        tokens = [token for _, token in sorted(decoder.items()) if token.content not in present]
        tokens += [token for token in self.all_special_tokens_extended if token.content not in present]
        with self._without_panics():
            self._tokenizer.add_tokens(
                [backend_token(token, token.special or token.content in named) for token in dict.fromkeys(tokens)]
            )
        for index, token in decoder.items():
            own = self._tokenizer.token_to_id(token.content)
            if own != index:
                warnings.warn(f"the files disagree on the id of the added token {token.content!r}: {index}, here {own}")

    def _add_tokens(self, tokens: list[AddedToken]) -> int:
        with self._lock, self._without_panics():
            return self._tokenizer.add_tokens([backend_token(token, token.special) for token in tokens])

    def _token_to_id(self, token: str) -> int | None:
        index = self._tokenizer.token_to_id(token)
        if index is None and self.unk_token is not None:
            return self._tokenizer.token_to_id(self.unk_token)
        return index

    def _id_to_token(self, index: int) -> str | None:
        return self._tokenizer.id_to_token(index)

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options) -> list[str]:
        """The tokens of a text (of two, one behind the other), as text; for ``options`` see ``__call__``."""
        return self.encode_plus(text, pair, add_special_tokens=add_special_tokens, **options).tokens()

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens."""
        with self._without_panics():
            return self._tokenizer.decoder.decode(tokens)

    def _decode(self, ids: list[int], skip_special_tokens: bool, spaces_between_special_tokens: bool) -> str:
        with self._without_panics():
            return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def _without_panics(self):
        return without_panics(self.name_or_path or type(self).__name__)

    def _encode(self, examples: list[tuple], single: bool, options: Options) -> BatchEncoding:
        if options.add_prefix_space is not None:
            raise TypeError("a fast tokenizer takes add_prefix_space when it is made, not with a text")
        encodings = self._encodings(examples, options)
        data: dict[str, list] = {}
        rows, samples = [], []
        for i, encoding in enumerate(encodings):
            more = encoding.overflowing if options.return_overflowing_tokens else []
            rows += [encoding, *more]
            samples += [i] * (1 + len(more))
        data["input_ids"] = [row.ids for row in rows]
        if self._wants("token_type_ids", options.return_token_type_ids):
            data["token_type_ids"] = [row.type_ids for row in rows]
        if self._wants("attention_mask", options.return_attention_mask):
            data["attention_mask"] = [row.attention_mask for row in rows]
        if options.return_special_tokens_mask:
            data["special_tokens_mask"] = [row.special_tokens_mask for row in rows]
        if options.return_offsets_mapping:
            data["offset_mapping"] = [row.offsets for row in rows]
        if options.return_length:
            data["length"] = [len(row) for row in rows]
        if options.return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = samples
        for ids in data["input_ids"]:
            self._warn_if_too_long(ids, options)
        if single and options.return_tensors is None and not options.return_overflowing_tokens:
            data = {name: value if name == "length" else value[0] for name, value in data.items()}
        return BatchEncoding(data, rows, tensor_type=options.return_tensors)

    def _encodings(self, examples: list[tuple], options: Options) -> list:
        inputs = [first if second is None else (first, second) for first, second in examples]
        if options.truncation != "do_not_truncate":
            self._check_stride(options, examples)
        split = options.split_special_tokens
        with self._lock, self._without_panics():
            self._set_backend(options)
            self._tokenizer.encode_special_tokens = self.split_special_tokens if split is None else split
            try:
                encodings = self._tokenizer.encode_batch(
                    inputs, is_pretokenized=options.is_split_into_words, add_special_tokens=options.add_special_tokens
                )
            except BaseException as error:
                if "Truncation error" in str(error):
                    why = "the text that it may shorten is too short"
                elif type(error).__name__ == "PanicException" and "stride" in str(error):  # a BaseException
                    why = f"stride={options.stride} is no less than the tokens that a row has room for"
                else:
                    raise
            else:
                return encodings
        raise ValueError(f"truncation={options.truncation!r} to max_length={options.max_length}: {why}")

    def _check_stride(self, options: Options, examples: list[tuple]):
        room = options.max_length - (self.num_special_tokens_to_add(False) if options.add_special_tokens else 0)
        if options.stride and options.stride >= room:
            raise ValueError(
                f"stride is {options.stride}: max_length leaves room for {room} tokens, which must be more"
            )

    def _set_backend(self, options: Options):
        backend = self._tokenizer
        truncation = padding = None
        if options.truncation != "do_not_truncate":
            truncation = dict(
                max_length=min(int(options.max_length), sys.maxsize),
                stride=int(options.stride),
                strategy=options.truncation,
                direction=self.truncation_side,
            )
        if options.padding != "do_not_pad":
            padding = dict(
                length=int(options.max_length) if options.padding == "max_length" else None,
                direction=options.padding_side or self.padding_side,
                pad_id=self.pad_token_id,
                pad_token=self.pad_token,
                pad_type_id=self.pad_token_type_id,
                pad_to_multiple_of=options.pad_to_multiple_of,
            )
        if backend.truncation != truncation:
            backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
        if backend.padding != padding:
            backend.no_padding() if padding is None else backend.enable_padding(**padding)

    def _reset_backend(self):
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def can_save_slow_tokenizer(self) -> bool:
        """Whether there is what the slow tokenizer needs."""
        return True

    def _saved_class(self) -> str:
        name = type(self).__name__
        return name.removesuffix("Fast") if self.can_save_slow_tokenizer else name

    def _save_backend(self, folder: Path, legacy_format: bool | None, filename_prefix: str | None) -> tuple[str, ...]:
        paths = ()
        if legacy_format and not self.can_save_slow_tokenizer:
            raise ValueError("legacy_format=True needs the vocabulary of the slow tokenizer, which is not there")
        if legacy_format is not False and self.can_save_slow_tokenizer:
            paths = super()._save_backend(folder, None, filename_prefix)
        if not legacy_format:
            path = str(folder / f"{f'{filename_prefix}-' if filename_prefix else ''}{TOKENIZER}")
            with self._lock:
                self._reset_backend()
                replace_file(Path(path), self._tokenizer.to_str(pretty=True).encode())
            paths = (*paths, path)
        return paths

    @classmethod
    def _tokens_of_backend_file(cls, source) -> dict[int, AddedToken]:
        return {}  # the backend has them

    def train_new_from_iterator(
        self,
        text_iterator: Iterable[str] | Iterable[list[str]],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: list | None = None,
        **options,
    ):
        """A tokenizer like this one with a vocabulary of other texts.

        Args:
            text_iterator: the texts, or lists of them.
            vocab_size: how many tokens.
            length: how many texts there are, for a progress bar.
            new_special_tokens: special tokens besides those of this tokenizer.
            options: of the trainer (``tokenizers.trainers``).
        """
        import tokenizers

        description = json.loads(self._tokenizer.to_str())
        model = description["model"]
        unigram = model["type"] == "Unigram"
        if unigram:
            model["vocab"], model["unk_id"] = [[self.unk_token, 0.0]], 0
            options["unk_token"] = self.unk_token
        else:
            model["vocab"], model["merges"] = {}, []
            if description["normalizer"] is None:  # bytes, all of which must be there
                options["initial_alphabet"] = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        description.update(added_tokens=[], post_processor=None)
        backend = tokenizers.Tokenizer.from_str(json.dumps(description))
        special = [token for token in self.added_tokens_decoder.values() if token.special or unigram]
        special += [as_added_token(token, special=True) for token in new_special_tokens or ()]
        kind = tokenizers.trainers.UnigramTrainer if unigram else tokenizers.trainers.BpeTrainer
        trainer = kind(
            vocab_size=vocab_size, special_tokens=[backend_token(token, True) for token in special], **options
        )
        with self._without_panics():
            backend.train_from_iterator(text_iterator, trainer=trainer, length=length)
        more = self._additional_special_tokens + [as_added_token(t, special=True) for t in new_special_tokens or ()]
        settings = {name: value for name, value in self.init_kwargs.items() if name in self._arguments()}
        settings.update(self._special_tokens, model_max_length=self.model_max_length)
        return type(self)(tokenizer_object=backend, additional_special_tokens=more, **settings)


def backend_library():
    try:
        import tokenizers
    except ImportError:
        raise ImportError("this tokenizer needs tokenizers: pip install tokenizers") from None
    return tokenizers


def backend_tokens(options: dict) -> dict:
    """The tokens among arguments of a tokenizer, as the functions of ``backends`` take them, which add them.

    Tokens get their ids in the order in which they are added: first those that had one, then the special ones by name.
    """
    decoder = {int(index): token for index, token in (options.get("added_tokens_decoder") or {}).items()}
    added = [as_added_token(token) for _, token in sorted(decoder.items())]
    known = {token.content for token in added}
    named = {name: options.get(name, default) for name, default in DEFAULTS.items()}
    named = {name: None if token is None else as_added_token(token, special=True) for name, token in named.items()}
    added += [token for token in named.values() if token is not None and token.content not in known]
    special = {token.content for token in named.values() if token is not None}
    tokens = {name: None if token is None else backend_token(token, True) for name, token in named.items()}
    del tokens["bos_token"], tokens["eos_token"]
    return {
        "added_tokens": [backend_token(token, token.special or token.content in special) for token in added],
        **tokens,
    }


def set_template(backend, tokenizer):
    """Makes ``backend`` build rows as ``tokenizer`` does: [CLS] A [SEP], of type 0, and for two texts as it says."""
    from tokenizers.processors import TemplateProcessing

    pair = tokenizer._pair_parts()
    single = [(tokenizer.cls_token, 0), ("$A", 0), (tokenizer.sep_token, 0)]
    tokens = {name for name, _ in [*single, *pair]} - {"$A", "$B"}
    backend.post_processor = TemplateProcessing(
        single=[f"{name}:{kind}" for name, kind in single],
        pair=[f"{name}:{kind}" for name, kind in pair],
        special_tokens=[(token, backend.token_to_id(token)) for token in tokens],
    )


def backend_token(token: AddedToken, special: bool):
    from tokenizers import AddedToken as BackendToken

    return BackendToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=special,
    )
