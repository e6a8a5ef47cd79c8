"""Tokenizers of DeBERTa v2 and v3: ``DebertaV2Tokenizer``, ``DebertaV2TokenizerFast``."""

import math
import os
import unicodedata
import warnings
from pathlib import Path

from ..checkpoint.hub import Source
from ..checkpoint.replace import replace_file
from .backends import load_backend, unigram_backend
from .fast import FastTokenizer, backend_library, backend_tokens, set_template
from .files import missing
from .slow import SlowTokenizer
from .special_tokens import AddedToken

SPM = "spm.model"
# What sp_model_kwargs may say: how a text is split, and never which other files are opened.
_SETTINGS = {
    "enable_sampling": bool,
    "nbest_size": int,
    "alpha": int | float,
    "num_threads": int,
    "out_type": type | str,
    "add_bos": bool,
    "add_eos": bool,
    "reverse": bool,
    "emit_unk_piece": bool,
}
_MOST_BEST = 512  # segmentations to sample from; sentencepiece refuses more with the first text


class DebertaV2Tokenizer(SlowTokenizer):
    """The tokenizer of DeBERTa v2 and v3 on sentencepiece. It can split into other pieces every time (sampling).

    Args:
        vocab_file: spm.model.
        do_lower_case: lower case first.
        split_by_punct: make every punctuation mark a word of its own.
        sp_model_kwargs: of ``sentencepiece.SentencePieceProcessor``: ``enable_sampling``, ``nbest_size`` and ``alpha``.
        unk_token, options: see ``TokenizerBase``.

    Raises:
        FileNotFoundError: there is no ``vocab_file``.
        ValueError: it is damaged.
    """

    vocab_files_names = {"vocab_file": SPM}

    def __init__(
        self,
        vocab_file: str | os.PathLike,
        do_lower_case: bool = False,
        split_by_punct: bool = False,
        sp_model_kwargs: dict | None = None,
        unk_token: str | AddedToken | None = "[UNK]",
        add_prefix_space: bool = True,
        **options,
    ):
        if not add_prefix_space:
            raise ValueError("sentencepiece always adds the space: add_prefix_space=False needs DebertaV2TokenizerFast")
        self.vocab_file = os.fspath(vocab_file)
        self.do_lower_case = do_lower_case
        self.split_by_punct = split_by_punct
        self.sp_model_kwargs = _settings(sp_model_kwargs)
        if not os.path.isfile(vocab_file):
            raise FileNotFoundError(f"there is no file {self.vocab_file}")
        self._load(Path(vocab_file).read_bytes())
        super().__init__(unk_token=_unknown(unk_token), **options)
        self.init_kwargs.update(
            do_lower_case=do_lower_case, split_by_punct=split_by_punct, sp_model_kwargs=self.sp_model_kwargs
        )

    def _load(self, model: bytes):
        try:
            import sentencepiece
        except ImportError:
            raise ImportError("DebertaV2Tokenizer needs sentencepiece: pip install sentencepiece") from None
        self.spm = sentencepiece.SentencePieceProcessor(**self.sp_model_kwargs)
        try:
            _check_complete(model)
            self.spm.LoadFromSerializedProto(model)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{self.vocab_file} is no model of sentencepiece's, or is cut short: {error}") from None
        self._vocab = {self.spm.IdToPiece(index): index for index in range(self.spm.GetPieceSize())}

    def __getstate__(self) -> dict:
        state = {name: value for name, value in self.__dict__.items() if name not in ("spm", "_vocab")}
        return {**state, "_model": self.spm.serialized_model_proto()}

    def __setstate__(self, state: dict):
        model = state.pop("_model")
        self.__dict__.update(state)
        self._load(model)

    @classmethod
    def _find_files(cls, source: Source) -> dict:
        path = source.file(SPM)
        if path is None:
            hint = "; DebertaV2TokenizerFast reads its tokenizer.json" if source.file("tokenizer.json") else ""
            raise FileNotFoundError(f"{missing(source, SPM)}{hint}")
        return {"vocab_file": path}

    @property
    def _base_vocab(self) -> dict[str, int]:
        return self._vocab

    def _base_id_to_token(self, index: int) -> str | None:
        return self.spm.IdToPiece(index) if index < len(self._vocab) else self.unk_token

    def _token_to_id(self, token: str) -> int:
        index = self._added_ids.get(token)
        return self.spm.PieceToId(token) if index is None else index

    def _prepare(self, text: str, word: bool, add_prefix_space: bool | None) -> str:
        return f" {text}" if word or add_prefix_space else text

    def _tokenize(self, text: str) -> list[str]:
        if not self.split_by_punct:
            return self.spm.encode(text, out_type=str)
        return [piece for word in _split_by_punctuation(text) for piece in self.spm.encode(word, out_type=str)]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens."""
        special = set(self.all_special_tokens)
        text, current, after_special = "", [], False
        for token in tokens:
            if token in special:
                # As the models' users know it: a space before the text, none between it and the special token.
                text += ("" if after_special else " ") + self.spm.decode_pieces(current) + token
                current = []
            else:
                current.append(token)
            after_special = token in special
        return (text + self.spm.decode_pieces(current)).strip()

    def save_vocabulary(self, save_directory: str | os.PathLike, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes spm.model into a folder that exists.

        Returns:
            Its path.
        """
        path = _vocabulary_path(save_directory, filename_prefix)
        replace_file(path, self.spm.serialized_model_proto())
        return (str(path),)


class DebertaV2TokenizerFast(FastTokenizer):
    """The tokenizer of DeBERTa v2 and v3 on ``tokenizers``, which knows the characters of every token.

    Args:
        vocab_file: spm.model.
        tokenizer_file: tokenizer.json; it takes precedence.
        do_lower_case: lower case first.
        split_by_punct: make every punctuation mark a word of its own.
        add_prefix_space: put a space before a text that does not begin with one.
        tokenizer_object: a ``tokenizers.Tokenizer`` to take instead.
        from_slow: build from ``vocab_file`` though there is a ``tokenizer_file``.
        unk_token, options: see ``TokenizerBase``.

    Raises:
        ValueError: a file is damaged, or there is none.
    """

    vocab_files_names = {"vocab_file": SPM, "tokenizer_file": "tokenizer.json"}

    def __init__(
        self,
        vocab_file: str | os.PathLike | None = None,
        tokenizer_file: str | os.PathLike | None = None,
        do_lower_case: bool = False,
        split_by_punct: bool = False,
        add_prefix_space: bool = True,
        sp_model_kwargs: dict | None = None,
        tokenizer_object=None,
        from_slow: bool = False,
        unk_token: str | AddedToken | None = "[UNK]",
        **options,
    ):
        tokenizers = backend_library()
        if _settings(sp_model_kwargs).get("enable_sampling"):
            warnings.warn("a fast tokenizer does not sample: sp_model_kwargs counts for DebertaV2Tokenizer only")
        unk_token = _unknown(unk_token)
        self.vocab_file = None if vocab_file is None else os.fspath(vocab_file)
        self.do_lower_case = do_lower_case
        self.split_by_punct = split_by_punct
        self.add_prefix_space = add_prefix_space
        self.sp_model_kwargs = _settings(sp_model_kwargs)
        for path in (vocab_file, tokenizer_file):
            if path is not None and not os.path.isfile(path):
                raise FileNotFoundError(f"there is no file {os.fspath(path)}")
        settings = dict(do_lower_case=do_lower_case, split_by_punct=split_by_punct, add_prefix_space=add_prefix_space)
        if tokenizer_object is not None:
            backend = tokenizers.Tokenizer.from_str(tokenizer_object.to_str())
        elif tokenizer_file is not None and not from_slow:
            backend = _load(tokenizer_file, self.vocab_file, **settings)
        elif self.vocab_file is not None:
            tokens = backend_tokens({"unk_token": unk_token, **options})
            backend = unigram_backend(self.vocab_file, **settings, **tokens)
        else:
            raise ValueError(
                "expected a vocab_file (spm.model), a tokenizer_file (tokenizer.json) or a tokenizer_object"
            )
        super().__init__(backend, unk_token=unk_token, **options)
        set_template(self._tokenizer, self)
        self.init_kwargs.update(
            do_lower_case=do_lower_case, split_by_punct=split_by_punct, sp_model_kwargs=self.sp_model_kwargs
        )
        if not add_prefix_space:
            self.init_kwargs["add_prefix_space"] = False

    @classmethod
    def _find_files(cls, source: Source) -> dict:
        files = {name: source.file(file) for name, file in cls.vocab_files_names.items()}
        if not any(files.values()):
            raise missing(source, *cls.vocab_files_names.values())
        return files

    @property
    def can_save_slow_tokenizer(self) -> bool:
        return self.vocab_file is not None and os.path.isfile(self.vocab_file)

    def save_vocabulary(self, save_directory: str | os.PathLike, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copies spm.model into a folder that exists.

        Returns:
            Its path.

        Raises:
            ValueError: the tokenizer was made from tokenizer.json alone, or the file is gone.
        """
        if not self.can_save_slow_tokenizer:
            raise ValueError(
                f"there is no {SPM} to copy: the tokenizer was made from {self.vocab_file or 'other files'}"
            )
        path = _vocabulary_path(save_directory, filename_prefix)
        if not (path.exists() and path.samefile(self.vocab_file)):
            replace_file(path, Path(self.vocab_file).read_bytes())
        return (str(path),)


def _settings(sp_model_kwargs: dict | None) -> dict:
    """Raises ValueError for what is no setting, such as a file to open."""
    if not isinstance(sp_model_kwargs, dict | None):
        raise ValueError(f"sp_model_kwargs must be a dict, got {type(sp_model_kwargs).__name__}")
    for name, value in (sp_model_kwargs or {}).items():
        if name not in _SETTINGS:
            raise ValueError(f"sp_model_kwargs may hold {', '.join(_SETTINGS)}, got {name!r}")
        if not isinstance(value, _SETTINGS[name]) or (isinstance(value, bool) and _SETTINGS[name] is not bool):
            kind = getattr(_SETTINGS[name], "__name__", _SETTINGS[name])
            raise ValueError(f"sp_model_kwargs: {name} must be of type {kind}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"sp_model_kwargs: {name} must be finite, got {value}")
        if name == "nbest_size" and value > _MOST_BEST:
            raise ValueError(f"sp_model_kwargs: nbest_size must be at most {_MOST_BEST}, got {value}")
    return dict(sp_model_kwargs or {})


def _unknown(token: str | AddedToken | None) -> str | AddedToken | None:
    # Looked for in the normalized text, other than the rest: what transformers made of the published checkpoints.
    return AddedToken(token, normalized=True, special=True) if isinstance(token, str) else token


def _load(tokenizer_file, vocab_file: str | None, do_lower_case: bool, split_by_punct: bool, add_prefix_space: bool):
    """The backend in tokenizer.json, with the settings that it may lack."""
    tokenizers = backend_library()
    backend = load_backend(tokenizer_file)
    if b"ByteLevel" in _state(backend.pre_tokenizer):
        raise ValueError(f"{os.fspath(tokenizer_file)}: expected a model of sentencepiece's, got byte-level BPE")
    if b"Precompiled" not in _state(backend.normalizer):
        # As transformers 5 writes it: without the map that makes "ﬁ" fi and "①" 1.
        whole = None if vocab_file is None else unigram_backend(vocab_file)
        if whole is not None and whole.get_vocab_size(False) == backend.get_vocab_size(False):
            backend.normalizer = whole.normalizer
        else:
            warnings.warn(
                f"{os.fspath(tokenizer_file)} has no map of characters, as transformers 5 writes it: letters such as "
                f"full-width ones are unknown, unless the {SPM} it was made from lies beside it"
            )
    if do_lower_case and b"Lowercase" not in _state(backend.normalizer):
        backend.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Lowercase(), backend.normalizer])
    state = _state(backend.pre_tokenizer)
    splits = b"Punctuation" in state
    if (split_by_punct and not splits) or (not add_prefix_space and b'"always"' in state):
        words = dict(prepend_scheme="always" if add_prefix_space else "never")
        steps = [tokenizers.pre_tokenizers.Punctuation(behavior="isolated")] if splits or split_by_punct else []
        steps.append(tokenizers.pre_tokenizers.Metaspace(**words))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
        backend.decoder = tokenizers.decoders.Metaspace(**words)
    return backend


def _state(part) -> bytes:
    return b"" if part is None else part.__getstate__()


def _vocabulary_path(folder: str | os.PathLike, prefix: str | None) -> Path:
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"expected a folder to save in, got {os.fspath(folder)}")
    return Path(folder) / f"{f'{prefix}-' if prefix else ''}{SPM}"


def _check_complete(model: bytes):
    """Sentencepiece takes a file that ends behind any piece for a whole one."""
    # A message of protobuf's: fields with number * 8 + type, here always 2 (bytes): a length and the bytes.
    position, seen = 0, set()
    while position < len(model):
        key, position = _varint(model, position)
        length, position = _varint(model, position) if key & 7 == 2 else (len(model), position)
        position += length
        seen.add(key >> 3)
    if position != len(model) or not {1, 2, 3} <= seen:
        raise ValueError("it lacks pieces, trainer_spec or normalizer_spec")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data):
        value |= (data[position] & 127) << shift
        shift, position = shift + 7, position + 1
        if data[position - 1] < 128:
            break
    return value, position


def _split_by_punctuation(text: str) -> list[str]:
    words, new = [], True
    for char in text:
        if new or _is_punctuation(char):
            words.append(char)
        else:
            words[-1] += char
        new = _is_punctuation(char)
    return words


def _is_punctuation(char: str) -> bool:
    # All ASCII marks, also those that Unicode calls symbols ($, ^, `).
    return (
        33 <= ord(char) <= 47
        or 58 <= ord(char) <= 64
        or 91 <= ord(char) <= 96
        or 123 <= ord(char) <= 126
        or (unicodedata.category(char).startswith("P"))
    )
