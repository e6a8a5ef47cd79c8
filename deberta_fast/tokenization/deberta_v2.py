"""Tokenizers of DeBERTa v2 and v3: ``DebertaV2Tokenizer``, ``DebertaV2TokenizerFast``."""

import math
import os
import string
import unicodedata
import warnings
from itertools import groupby
from pathlib import Path

from ..checkpoint.hub import Source
from .backends import load_backend, load_sentencepiece, set_metaspace, tokenizers_library, unigram_backend
from .fast import FastTokenizer
from .files import TOKENIZER, existing, missing, save
from .slow import SlowTokenizer
from .special_tokens import AddedToken

SPM = "spm.model"
# Types of the settings that sp_model_kwargs may hold. They say how to split a text; others could open another file.
_SPM_SETTINGS = dict.fromkeys(("enable_sampling", "add_bos", "add_eos", "reverse", "emit_unk_piece"), bool)
_SPM_SETTINGS |= {"nbest_size": int, "num_threads": int, "alpha": int | float, "out_type": type | str}
_LARGEST_NBEST = 512  # sentencepiece refuses a larger nbest_size, but only when it encodes the first text.


class DebertaV2Tokenizer(SlowTokenizer):
    """The tokenizer of DeBERTa v2 and v3 on sentencepiece. It can sample segmentations.

    Args:
        vocab_file: spm.model.
        do_lower_case: convert text to lower case.
        split_by_punct: make every punctuation mark a word of its own.
        sp_model_kwargs: arguments of ``sentencepiece.SentencePieceProcessor``, such as ``enable_sampling``,
            ``nbest_size`` and ``alpha``.
        unk_token, options: see ``TokenizerBase``.

    Raises FileNotFoundError if there is no ``vocab_file``, ValueError if it is damaged.
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
        settings = _settings(do_lower_case, split_by_punct, sp_model_kwargs)
        self.vocab_file = existing(vocab_file)
        self._load(Path(vocab_file).read_bytes(), settings["sp_model_kwargs"])
        super().__init__(settings, unk_token=_unknown(unk_token), **options)

    def _load(self, model: bytes, settings: dict):
        self.spm, pieces = load_sentencepiece(self.vocab_file, model, settings)
        self._vocab = {piece: index for index, piece in enumerate(pieces)}

    def __getstate__(self) -> dict:
        state = {name: value for name, value in self.__dict__.items() if name not in ("spm", "_vocab")}
        return {**state, "_model": self.spm.serialized_model_proto()}

    def __setstate__(self, state: dict):
        model = state.pop("_model")
        self.__dict__.update(state)
        self._load(model, self.sp_model_kwargs)

    @classmethod
    def _find_files(cls, source: Source) -> dict:
        path = source.file(SPM)
        if path is None:
            hint = "; DebertaV2TokenizerFast reads its tokenizer.json" if source.file(TOKENIZER) else ""
            raise FileNotFoundError(f"{missing(source, SPM)}{hint}")
        return {"vocab_file": path}

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
        runs = [(marks, "".join(run)) for marks, run in groupby(text, _is_punctuation)]
        words = [word for marks, run in runs for word in (run if marks else [run])]
        return [piece for word in words for piece in self.spm.encode(word, out_type=str)]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Returns the text of tokens."""
        special = set(self.all_special_tokens)
        text, current = "", []
        for token in tokens:
            if token in special:
                # As in transformers, a space precedes a text, and none separates it from the special token after it.
                text += (" " if current else "") + self.spm.decode_pieces(current) + token
                current = []
            else:
                current.append(token)
        return (text + self.spm.decode_pieces(current)).strip()

    def save_vocabulary(self, save_directory: str | os.PathLike, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes spm.model into a folder that exists; returns its path."""
        return (save(save_directory, filename_prefix, SPM, self.spm.serialized_model_proto()),)


class DebertaV2TokenizerFast(FastTokenizer):
    """The tokenizer of DeBERTa v2 and v3 on ``tokenizers``, which knows the characters of every token.

    Args:
        vocab_file: spm.model.
        tokenizer_file: tokenizer.json; it takes precedence.
        do_lower_case: convert text to lower case.
        split_by_punct: make every punctuation mark a word of its own.
        add_prefix_space: put a space before a text that does not begin with one.
        tokenizer_object: a ``tokenizers.Tokenizer`` to take instead.
        from_slow: build from ``vocab_file`` even if a ``tokenizer_file`` is given.
        sp_model_kwargs: kept for the slow tokenizer.
        unk_token, options: see ``TokenizerBase``.

    Raises FileNotFoundError if a file does not exist, ValueError if it is damaged or none is given.
    """

    vocab_files_names = {"vocab_file": SPM, "tokenizer_file": TOKENIZER}
    add_prefix_space = True

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
        settings = _settings(do_lower_case, split_by_punct, sp_model_kwargs)
        if settings["sp_model_kwargs"].get("enable_sampling"):
            warnings.warn("a fast tokenizer does not sample: sp_model_kwargs counts for DebertaV2Tokenizer only")
        self.vocab_file = None if vocab_file is None else existing(vocab_file)
        if tokenizer_file is not None:
            existing(tokenizer_file)
        steps = dict(do_lower_case=do_lower_case, split_by_punct=split_by_punct, add_prefix_space=add_prefix_space)
        from_vocabulary = tokenizer_object is None and (tokenizer_file is None or from_slow)
        if tokenizer_object is not None:
            backend = tokenizers_library().Tokenizer.from_str(tokenizer_object.to_str())
        elif not from_vocabulary:
            backend = _load(tokenizer_file, self.vocab_file, **steps)
        elif self.vocab_file is not None:
            backend = unigram_backend(self.vocab_file, **steps)
        else:
            raise ValueError(f"expected a vocab_file ({SPM}), a tokenizer_file ({TOKENIZER}) or a tokenizer_object")
        if not add_prefix_space:
            settings["add_prefix_space"] = False
        super().__init__(backend, from_vocabulary, settings, unk_token=_unknown(unk_token), **options)

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
        """Copies spm.model into a folder that exists; returns its path. Raises ValueError if there is no spm.model."""
        if not self.can_save_slow_tokenizer:
            made_from = self.vocab_file or "other files"
            raise ValueError(f"there is no {SPM} to copy: the tokenizer was made from {made_from}")
        return (save(save_directory, filename_prefix, SPM, Path(self.vocab_file).read_bytes()),)


def _settings(do_lower_case: bool, split_by_punct: bool, sp_model_kwargs: dict | None) -> dict:
    """Collects the settings that are saved. Raises ValueError for unknown sp_model_kwargs, such as a file to open."""
    if not isinstance(sp_model_kwargs, dict | None):
        raise ValueError(f"sp_model_kwargs must be a dict, got {type(sp_model_kwargs).__name__}")
    for name, value in (sp_model_kwargs or {}).items():
        if name not in _SPM_SETTINGS:
            raise ValueError(f"sp_model_kwargs may hold {', '.join(_SPM_SETTINGS)}, got {name!r}")
        if not isinstance(value, _SPM_SETTINGS[name]) or (isinstance(value, bool) and _SPM_SETTINGS[name] is not bool):
            kind = getattr(_SPM_SETTINGS[name], "__name__", _SPM_SETTINGS[name])
            raise ValueError(f"sp_model_kwargs: {name} must be of type {kind}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"sp_model_kwargs: {name} must be finite, got {value}")
        if name == "nbest_size" and value > _LARGEST_NBEST:
            raise ValueError(f"sp_model_kwargs: nbest_size must be at most {_LARGEST_NBEST}, got {value}")
    sp_model_kwargs = dict(sp_model_kwargs or {})
    return dict(do_lower_case=do_lower_case, split_by_punct=split_by_punct, sp_model_kwargs=sp_model_kwargs)


def _unknown(token: str | AddedToken | None) -> str | AddedToken | None:
    # As in transformers, only this special token is searched for in the normalized text.
    return AddedToken(token, normalized=True, special=True) if isinstance(token, str) else token


def _load(tokenizer_file, vocab_file: str | None, do_lower_case: bool, split_by_punct: bool, add_prefix_space: bool):
    """Reads the backend of tokenizer.json, and adds the character map and the given settings if it lacks them."""
    normalizers = tokenizers_library().normalizers
    backend = load_backend(tokenizer_file)
    if b"ByteLevel" in _state(backend.pre_tokenizer):
        raise ValueError(f"{os.fspath(tokenizer_file)}: expected a model of sentencepiece's, got byte-level BPE")
    if b"Precompiled" not in _state(backend.normalizer):
        # transformers 5 omits the character map, which turns "ﬁ" into "fi" and "①" into "1". spm.model has it.
        from_spm = None if vocab_file is None else unigram_backend(vocab_file)
        if from_spm is not None and from_spm.get_vocab_size(False) == backend.get_vocab_size(False):
            backend.normalizer = from_spm.normalizer
        else:
            warnings.warn(
                f"{os.fspath(tokenizer_file)} has no map of characters, as transformers 5 writes it: letters such as "
                f"full-width ones are unknown, unless the {SPM} it was made from lies beside it"
            )
    if do_lower_case and b"Lowercase" not in _state(backend.normalizer):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), backend.normalizer])
    state = _state(backend.pre_tokenizer)
    splits = b"Punctuation" in state
    if (split_by_punct and not splits) or (not add_prefix_space and b'"always"' in state):
        set_metaspace(backend, splits or split_by_punct, add_prefix_space)
    return backend


def _state(part) -> bytes:
    """Returns the JSON of a part of the backend; b"" if there is none."""
    return b"" if part is None else part.__getstate__()


def _is_punctuation(char: str) -> bool:
    # Some marks of string.punctuation are symbols in Unicode ($, ^, `).
    return char in string.punctuation or unicodedata.category(char).startswith("P")
