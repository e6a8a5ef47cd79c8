"""``FastTokenizer``, the base of tokenizers that run on the ``tokenizers`` library."""

import json
import sys
import threading
import warnings
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from .backends import tokenizers_library, without_panics
from .base import TokenizerBase
from .batch_encoding import BatchEncoding
from .files import TOKENIZER, save
from .model_inputs import Options
from .special_tokens import AddedToken, as_added_token


class FastTokenizer(TokenizerBase):
    """A tokenizer that runs on a ``tokenizers.Tokenizer``.

    Args:
        backend: the ``tokenizers.Tokenizer``. This object changes it, so it must not be shared.
        from_vocabulary: the backend was made from a vocabulary, so the flags of added tokens are those of ``options``;
            otherwise the backend's flags count.
        settings, options: see ``TokenizerBase``.
    """

    is_fast = True

    def __init__(self, backend, from_vocabulary: bool, settings: dict, /, **options):
        self._tokenizer = backend
        self._from_vocabulary = from_vocabulary
        # Padding and truncation are settings of the backend. The lock keeps other threads from changing them in a call.
        self._lock = threading.Lock()
        # A tokenizer.json may hold the padding and truncation that were set when it was written.
        for name, saved in (("truncation_side", backend.truncation), ("padding_side", backend.padding)):
            if saved is not None:
                options.setdefault(name, saved["direction"].lower())
        self._reset_backend()
        super().__init__(settings, **options)
        backend.encode_special_tokens = self.split_special_tokens
        single, pair = self._template(pair=False), self._template(pair=True)
        special = {name for name, _ in single + pair} - {"$A", "$B"}
        backend.post_processor = tokenizers_library().processors.TemplateProcessing(
            single=[f"{name}:{kind}" for name, kind in single],
            pair=[f"{name}:{kind}" for name, kind in pair],
            special_tokens=[(token, backend.token_to_id(token)) for token in special],
        )

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
        tokens = [token for _, token in sorted(decoder.items())]
        known = {token.content for token in tokens}
        tokens += [token for token in self.all_special_tokens_extended if token.content not in known]
        if not self._from_vocabulary:
            known = self.added_tokens_encoder
            tokens = [token for token in tokens if token.content not in known]
        special = set(self.all_special_tokens)
        self._add_tokens([replace(token, special=token.special or token.content in special) for token in tokens])
        added = {token.content: token for token in self.added_tokens_decoder.values()}
        for name, token in self._special_tokens.items():
            self._special_tokens[name] = token and added.get(token.content, token)
        for index, token in decoder.items():
            own = self._tokenizer.token_to_id(token.content)
            if own != index:
                warnings.warn(f"the files disagree on the id of the added token {token.content!r}: {index}, here {own}")

    def _add_tokens(self, tokens: list[AddedToken]) -> int:
        with self._lock, self._without_panics():
            return self._tokenizer.add_tokens([backend_token(token) for token in tokens])

    def _token_to_id(self, token: str) -> int | None:
        index = self._tokenizer.token_to_id(token)
        return self._tokenizer.token_to_id(self.unk_token) if index is None and self.unk_token is not None else index

    def _id_to_token(self, index: int) -> str | None:
        return self._tokenizer.id_to_token(index)

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options) -> list[str]:
        """Returns the tokens of a text, or of two texts in a row, as text; for ``options`` see ``__call__``."""
        return self.encode_plus(text, pair, add_special_tokens=add_special_tokens, **options).tokens()

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Returns the text of tokens."""
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
        rows, samples = [], []
        for i, encoding in enumerate(self._encodings(examples, options)):
            found = [encoding, *(encoding.overflowing if options.return_overflowing_tokens else ())]
            rows += found
            samples += [i] * len(found)
        columns = {
            "ids": ("input_ids", True),
            "type_ids": ("token_type_ids", self._wants("token_type_ids", options.return_token_type_ids)),
            "attention_mask": ("attention_mask", self._wants("attention_mask", options.return_attention_mask)),
            "special_tokens_mask": ("special_tokens_mask", options.return_special_tokens_mask),
            "offsets": ("offset_mapping", options.return_offsets_mapping),
        }
        data = {item: [getattr(row, name) for row in rows] for name, (item, wanted) in columns.items() if wanted}
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
        truncates = options.truncation != "do_not_truncate"
        if truncates and options.stride:
            room = options.max_length - (self.num_special_tokens_to_add() if options.add_special_tokens else 0)
            if options.stride >= room:
                raise ValueError(
                    f"stride is {options.stride}: max_length leaves room for {room} tokens, which must be more"
                )
        backend, split = self._tokenizer, options.split_special_tokens
        with self._lock, self._without_panics():
            self._reset_backend()
            if truncates:
                backend.enable_truncation(
                    max_length=min(int(options.max_length), sys.maxsize),
                    stride=int(options.stride),
                    strategy=options.truncation,
                    direction=self.truncation_side,
                )
            if options.padding != "do_not_pad":
                backend.enable_padding(
                    length=int(options.max_length) if options.padding == "max_length" else None,
                    direction=options.padding_side or self.padding_side,
                    pad_id=self.pad_token_id,
                    pad_token=self.pad_token,
                    pad_type_id=self.pad_token_type_id,
                    pad_to_multiple_of=options.pad_to_multiple_of,
                )
            backend.encode_special_tokens = self.split_special_tokens if split is None else split
            try:
                return backend.encode_batch(
                    inputs, is_pretokenized=options.is_split_into_words, add_special_tokens=options.add_special_tokens
                )
            except BaseException as error:  # PanicException does not derive from Exception.
                if "Truncation error" in str(error):
                    why = "the text that it may shorten is too short"
                elif type(error).__name__ == "PanicException" and "stride" in str(error):
                    why = f"stride={options.stride} is no less than the tokens that a row has room for"
                else:
                    raise
        raise ValueError(f"truncation={options.truncation!r} to max_length={options.max_length}: {why}")

    def _reset_backend(self):
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def _save_backend(self, folder: Path, legacy_format: bool | None, filename_prefix: str | None) -> tuple[str, ...]:
        if legacy_format and not self.can_save_slow_tokenizer:
            raise ValueError("legacy_format=True needs the vocabulary of the slow tokenizer, which is not there")
        saves_slow = legacy_format is not False and self.can_save_slow_tokenizer
        paths = super()._save_backend(folder, None, filename_prefix) if saves_slow else ()
        if legacy_format:
            return paths
        with self._lock:
            self._reset_backend()
            content = self._tokenizer.to_str(pretty=True)
        return (*paths, save(folder, filename_prefix, TOKENIZER, content.encode()))

    def train_new_from_iterator(
        self,
        text_iterator: Iterable[str] | Iterable[list[str]],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: list | None = None,
        **options,
    ):
        """Trains a tokenizer like this one on other texts.

        Args:
            text_iterator: the texts, or lists of them.
            vocab_size: number of tokens.
            length: number of texts, for a progress bar.
            new_special_tokens: special tokens besides those of this tokenizer.
            options: of the trainer (``tokenizers.trainers``).
        """
        tokenizers = tokenizers_library()
        description = json.loads(self._tokenizer.to_str())
        model = description["model"]
        unigram = model["type"] == "Unigram"
        if unigram:
            model["vocab"], model["unk_id"] = [[self.unk_token, 0.0]], 0
            options["unk_token"] = self.unk_token
        else:
            model["vocab"], model["merges"] = {}, []
            if description["normalizer"] is None:  # byte-level BPE, which needs a letter for every byte
                options["initial_alphabet"] = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        description.update(added_tokens=[], post_processor=None)
        backend = tokenizers.Tokenizer.from_str(json.dumps(description))
        new = [as_added_token(token, special=True) for token in new_special_tokens or ()]
        special = [token for token in self.added_tokens_decoder.values() if token.special or unigram] + new
        special = [backend_token(replace(token, special=True)) for token in special]
        kind = tokenizers.trainers.UnigramTrainer if unigram else tokenizers.trainers.BpeTrainer
        trainer = kind(vocab_size=vocab_size, special_tokens=special, **options)
        with self._without_panics():
            backend.train_from_iterator(text_iterator, trainer=trainer, length=length)
        settings = {name: value for name, value in self.init_kwargs.items() if name in self._arguments()}
        settings.update(self._special_tokens, model_max_length=self.model_max_length)
        return type(self)(
            tokenizer_object=backend, additional_special_tokens=self._additional_special_tokens + new, **settings
        )


def backend_token(token: AddedToken):
    """Converts ``token`` to the ``tokenizers.AddedToken`` with the same flags."""
    flags = asdict(token)
    return tokenizers_library().AddedToken(flags.pop("content"), **flags)
