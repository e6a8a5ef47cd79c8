"""Tokenizers of DeBERTa v1: ``DebertaTokenizer``, ``DebertaTokenizerFast``."""

import json
import os
import re
import warnings
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from ..checkpoint.hub import Source
from ..checkpoint.json_object import read_object
from .backends import byte_level_backend, check_ids, load_backend, tokenizers_library, without_panics
from .bpe_encoder import read_bpe_encoder
from .fast import FastTokenizer, backend_token
from .files import TOKENIZER, content_of, existing, missing, save
from .slow import SlowTokenizer
from .special_tokens import AddedToken, as_added_token

VOCAB, MERGES, ENCODER = "vocab.json", "merges.txt", "bpe_encoder.bin"


class _ByteLevel:
    """Finds and writes the files of both tokenizers, whose ``_tokenizer`` is a ``tokenizers.Tokenizer``."""

    model_input_names = ["input_ids", "attention_mask", "token_type_ids"]

    @classmethod
    def _find_files(cls, source: Source) -> dict:
        tokenizer = source.file(TOKENIZER)
        if cls.is_fast and tokenizer is not None:
            return {"tokenizer_file": tokenizer}
        files = {"vocab_file": source.file(VOCAB), "merges_file": source.file(MERGES)}
        lacking = [name for name, path in zip((VOCAB, MERGES), files.values()) if path is None]
        if lacking:
            files = {"vocab_file": source.file(ENCODER) or tokenizer}
            if files["vocab_file"] is None:
                raise missing(source, *(lacking if len(lacking) == 1 else (VOCAB, TOKENIZER, ENCODER)))
        template = None if tokenizer is None else _pair_template(tokenizer)
        return files if template is None else {**files, "pair_template": template}

    def save_vocabulary(self, save_directory: str | os.PathLike, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes vocab.json and merges.txt into a folder that exists; returns their paths."""
        vocab, merges = _tables(self._tokenizer)
        lines = "\n".join(["#version: 0.2", *map(" ".join, merges), ""])
        contents = {VOCAB: vocab, MERGES: lines.encode()}
        return tuple(save(save_directory, filename_prefix, name, content) for name, content in contents.items())


class DebertaTokenizer(_ByteLevel, SlowTokenizer):
    """The tokenizer of DeBERTa v1: byte-level BPE. A space belongs to the word after it.

    Args:
        vocab_file: vocab.json, tokenizer.json, or Microsoft's bpe_encoder.bin.
        merges_file: merges.txt, with vocab.json.
        errors: how to decode bytes that are no UTF-8, as in ``bytes.decode``.
        mask_token: includes the space before it, unless an ``AddedToken`` or tokenizer.json says otherwise.
        pair_template: the parts of a row of two texts with their types; None for
            ["[CLS]:0", "$A:0", "[SEP]:0", "$B:1", "[SEP]:1"]. ``from_pretrained`` takes that of tokenizer.json.
        add_prefix_space: put a space before a text that does not begin with one; also an option of ``__call__``.
        add_bos_token: has no effect, as in transformers.
        options: see ``TokenizerBase``.

    Raises FileNotFoundError if a file does not exist, ValueError if it is damaged.
    """

    vocab_files_names = {"vocab_file": VOCAB, "merges_file": MERGES}

    def __init__(
        self,
        vocab_file: str | os.PathLike,
        merges_file: str | os.PathLike | None = None,
        errors: str = "replace",
        mask_token: str | AddedToken | None = "[MASK]",
        add_prefix_space: bool = False,
        add_bos_token: bool = False,
        pair_template: list[str] | None = None,
        **options,
    ):
        settings = _settings(errors, add_prefix_space, add_bos_token, pair_template)
        self._vocab, merges = _read_tables(vocab_file, merges_file)
        # In byte-level BPE a visible Latin-1 letter stands for its own byte, and letters from 256 on for the others.
        letters = set(tokenizers_library().pre_tokenizers.ByteLevel.alphabet())
        byte_of = [*range(256), *(byte for byte in range(256) if chr(byte) not in letters)]
        self._bytes = {letter: bytes([byte_of[ord(letter)]]) for letter in letters}
        # Only its model and pre-tokenizer are used; SlowTokenizer finds the added tokens.
        self._tokenizer = byte_level_backend(self._vocab, merges, vocab_file)
        super().__init__(settings, mask_token=_mask(mask_token), **options)

    @classmethod
    def _saved_tokens(cls, source: Source, config: dict, overrides: dict) -> dict:
        settings = super()._saved_tokens(source, config, overrides)
        if "added_tokens_decoder" not in config:
            # added_tokens.json has no flags, so the mask token gets its default ones, unless tokenizer.json has others.
            mask = content_of(config.get("mask_token") or "[MASK]")
            own = cls._tokens_of_backend_file(source)
            for index, token in settings["added_tokens_decoder"].items():
                if token.content == mask and index not in own:
                    settings["added_tokens_decoder"][index] = _mask(mask)
        return settings

    @property
    def encoder(self) -> dict[str, int]:
        return self._vocab

    def _base_id_to_token(self, index: int) -> str | None:
        return self._tokenizer.model.id_to_token(index)

    def _prepare(self, text: str, word: bool, add_prefix_space: bool | None) -> str:
        prefix = self.add_prefix_space if add_prefix_space is None else add_prefix_space
        return f" {text}" if (word or prefix) and text and not text[0].isspace() else text

    def _tokenize(self, text: str) -> list[str]:
        model, tokens = self._tokenizer.model, []
        with without_panics(self.name_or_path or type(self).__name__):
            for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text):
                # The model would drop unknown letters. As tokens of their own, they become the unknown token.
                for known, letters in groupby(word, key=self._vocab.__contains__):
                    tokens += [token.value for token in model.tokenize("".join(letters))] if known else letters
        return tokens

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Returns the text of tokens."""
        # A letter of an added token may stand for no byte. Then it stands for itself.
        letters = "".join(token or "" for token in tokens)
        data = b"".join([self._bytes.get(letter) or letter.encode() for letter in letters])
        return data.decode(errors=self.errors)


class DebertaTokenizerFast(_ByteLevel, FastTokenizer):
    """The tokenizer of DeBERTa v1 (byte-level BPE), which knows the characters of every token.

    Args:
        vocab_file: vocab.json, or Microsoft's bpe_encoder.bin.
        merges_file: merges.txt, with vocab.json.
        tokenizer_file: tokenizer.json; it takes precedence.
        errors: kept for the slow tokenizer.
        mask_token, add_bos_token: see ``DebertaTokenizer``.
        add_prefix_space: put a space before a text that does not begin with one; needed for lists of words.
        tokenizer_object: a ``tokenizers.Tokenizer`` to take instead.
        pair_template: see ``DebertaTokenizer``; None for that of ``tokenizer_file``.
        options: see ``TokenizerBase``.

    Raises FileNotFoundError if a file does not exist, ValueError if it is damaged or none is given.
    """

    vocab_files_names = {"vocab_file": VOCAB, "merges_file": MERGES, "tokenizer_file": TOKENIZER}

    def __init__(
        self,
        vocab_file: str | os.PathLike | None = None,
        merges_file: str | os.PathLike | None = None,
        tokenizer_file: str | os.PathLike | None = None,
        errors: str = "replace",
        mask_token: str | AddedToken | None = "[MASK]",
        add_prefix_space: bool = False,
        add_bos_token: bool = False,
        tokenizer_object=None,
        pair_template: list[str] | None = None,
        **options,
    ):
        tokenizers = tokenizers_library()
        from_vocabulary = tokenizer_object is None and tokenizer_file is None
        if tokenizer_object is not None:
            backend = tokenizers.Tokenizer.from_str(tokenizer_object.to_str())
        elif tokenizer_file is not None:
            backend = _load(existing(tokenizer_file))
            pair_template = pair_template or _pair_template(tokenizer_file)
        elif vocab_file is not None:
            mask_token = _mask(mask_token)
            backend = byte_level_backend(*_read_tables(vocab_file, merges_file), vocab_file)
        else:
            raise ValueError("expected a vocab_file and merges_file, a tokenizer_file or a tokenizer_object")
        if not from_vocabulary and mask_token is not None and not isinstance(mask_token, str):
            # The flags of the argument replace those of the file.
            mask = as_added_token(mask_token)
            if backend.token_to_id(mask.content) is not None:
                backend.add_tokens([backend_token(replace(mask, special=True))])
        if isinstance(backend.pre_tokenizer, tokenizers.pre_tokenizers.ByteLevel):
            backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        settings = _settings(errors, add_prefix_space, add_bos_token, pair_template)
        super().__init__(backend, from_vocabulary, settings, mask_token=mask_token, **options)

    def _encodings(self, examples, options):
        if options.is_split_into_words and not self.add_prefix_space:
            raise ValueError("is_split_into_words needs a tokenizer made with add_prefix_space=True")
        return super()._encodings(examples, options)


def _settings(errors: str, add_prefix_space: bool, add_bos_token: bool, pair_template: list[str] | None) -> dict:
    """Checks the template, and collects the settings that are saved."""
    settings = dict(errors=errors, add_prefix_space=add_prefix_space, add_bos_token=add_bos_token)
    if pair_template is None:
        return settings
    parts = list(pair_template) if isinstance(pair_template, list | tuple) else [None]
    if not all(isinstance(x, str) and re.fullmatch(r"(?s).+:[01]", x) for x in parts):
        raise ValueError(f'pair_template must be a list of texts such as "$A:0" and "[SEP]:1", got {pair_template!r}')
    if [x[:-2] for x in parts if x[:-2] in ("$A", "$B")] != ["$A", "$B"]:
        raise ValueError(f"pair_template must hold $A and then $B, each once, got {pair_template!r}")
    return {**settings, "pair_template": parts}


def _load(path: str | os.PathLike):
    """Reads the backend of a tokenizer.json."""
    backend = load_backend(path)
    if not isinstance(backend.model, tokenizers_library().models.BPE):
        raise ValueError(f"{os.fspath(path)}: expected a BPE model, got {type(backend.model).__name__}")
    return backend


def _tables(backend) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns the ids of the pieces and the merges in their order."""
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pieces) for pieces in model["merges"]]


def _read_tables(vocab_file, merges_file) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Reads the ids of the pieces and the merges in their order."""
    path = Path(existing(vocab_file))
    if path.name.endswith(".bin"):
        return read_bpe_encoder(path)
    vocab = read_object(path)
    if isinstance(vocab.get("model"), dict):  # tokenizer.json
        return _tables(_load(path))
    check_ids(str(path), vocab)
    if merges_file is None:
        raise ValueError(f"{path.name} needs a merges_file ({MERGES}) too")
    try:
        lines = Path(existing(merges_file)).read_bytes().decode().split("\n")  # Pieces may hold other line ends.
    except UnicodeDecodeError as error:
        raise ValueError(f"{merges_file} is no text: {error}") from None
    merges = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if line and not (number == 1 and line.startswith("#version")):
            merges.append(tuple(line.split(" ")))
            if len(merges[-1]) != 2:
                raise ValueError(f"{merges_file}, line {number}: expected two pieces, got {line!r}")
    return vocab, merges


def _mask(token: str | AddedToken | None) -> AddedToken | None:
    return None if token is None else as_added_token(token, lstrip=True, normalized=True, special=True)


def _pair_template(path: str | os.PathLike) -> list[str] | None:
    """Reads the pair template of a tokenizer.json. Returns None for [CLS] A [SEP] B [SEP], and warns of others."""
    processor = read_object(path).get("post_processor")
    if not isinstance(processor, dict) or processor.get("type") != "TemplateProcessing":
        return None
    parts = [(kind, part) for piece in processor["pair"] for kind, part in piece.items()]
    template = [f"{'$' if kind == 'Sequence' else ''}{part['id']}:{part['type_id']}" for kind, part in parts]
    cls, sep = (template[i].rpartition(":")[0] for i in (0, -1))
    trained = [f"{cls}:0", "$A:0", f"{sep}:0", "$B:1", f"{sep}:1"]
    if template == trained:
        return None
    warnings.warn(
        f"{os.fspath(path)}: pairs become {' '.join(template)}, as transformers 5 writes it; the published models were "
        f"trained with {' '.join(trained)}, which pair_template={trained} gives"
    )
    return template
