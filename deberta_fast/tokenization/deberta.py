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
from ..checkpoint.replace import replace_file
from .backends import byte_level_backend, check_ids, load_backend, tokenizers_library, without_panics
from .bpe_encoder import read_bpe_encoder
from .fast import FastTokenizer, backend_token
from .files import TOKENIZER, existing, missing, path_in, write_json
from .slow import SlowTokenizer
from .special_tokens import AddedToken, as_added_token

VOCAB, MERGES, ENCODER = "vocab.json", "merges.txt", "bpe_encoder.bin"


class _ByteLevel:
    """The files of both tokenizers. ``_tokenizer`` is a ``tokenizers.Tokenizer`` with the model."""

    model_input_names = ["input_ids", "attention_mask", "token_type_ids"]

    @classmethod
    def _find_files(cls, source: Source) -> dict:
        tokenizer = source.file(TOKENIZER)
        if cls.is_fast and tokenizer is not None:
            return {"tokenizer_file": tokenizer}
        vocab, merges = source.file(VOCAB), source.file(MERGES)
        if vocab is not None and merges is not None:
            files = {"vocab_file": vocab, "merges_file": merges}
        else:
            files = {"vocab_file": source.file(ENCODER) or tokenizer}
            if files["vocab_file"] is None and vocab is merges:
                raise missing(source, VOCAB, TOKENIZER, ENCODER)
            if files["vocab_file"] is None:
                raise missing(source, VOCAB if vocab is None else MERGES)
        template = None if tokenizer is None else _pair_template(tokenizer)
        return files if template is None else {**files, "pair_template": template}

    def save_vocabulary(self, save_directory: str | os.PathLike, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes vocab.json and merges.txt into a folder that exists.

        Returns:
            Their paths.
        """
        paths = [path_in(save_directory, filename_prefix, name) for name in (VOCAB, MERGES)]
        model = json.loads(self._tokenizer.to_str())["model"]
        write_json(paths[0], model["vocab"])
        lines = ["#version: 0.2", *(" ".join(pair) for pair in _pairs(model["merges"])), ""]
        replace_file(paths[1], "\n".join(lines).encode())
        return tuple(map(str, paths))


class DebertaTokenizer(_ByteLevel, SlowTokenizer):
    """The tokenizer of DeBERTa v1: byte-level BPE. A space belongs to the word after it.

    Args:
        vocab_file: vocab.json, tokenizer.json, or Microsoft's bpe_encoder.bin.
        merges_file: merges.txt, with vocab.json.
        errors: how to decode bytes that are no UTF-8, as in ``bytes.decode``.
        mask_token: takes the space before it along, unless an ``AddedToken`` or tokenizer.json says otherwise.
        pair_template: the parts of a row of two texts with their types; None for
            ["[CLS]:0", "$A:0", "[SEP]:0", "$B:1", "[SEP]:1"]. ``from_pretrained`` takes that of tokenizer.json.
        add_prefix_space: put a space before a text that does not begin with one; also an option of ``__call__``.
        add_bos_token: has no effect, as in transformers.
        options: see ``TokenizerBase``.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is damaged.
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
        self._bytes = _byte_of_letter()
        # Only its model and pre-tokenizer are used; SlowTokenizer finds the added tokens.
        self._tokenizer = byte_level_backend(self._vocab, merges, vocab_file)
        super().__init__(settings, mask_token=_mask(mask_token), **options)

    @classmethod
    def _saved_tokens(cls, source: Source, config: dict, overrides: dict) -> dict:
        settings = super()._saved_tokens(source, config, overrides)
        if "added_tokens_decoder" not in config:
            # added_tokens.json has no flags; tokenizer.json has.
            mask = config.get("mask_token") or "[MASK]"
            mask = mask["content"] if isinstance(mask, dict) else mask
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
                # The model drops letters that it does not know; they must become the unknown token.
                for known, letters in groupby(word, key=self._vocab.__contains__):
                    tokens += [token.value for token in model.tokenize("".join(letters))] if known else letters
        return tokens

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Returns the text of tokens."""
        # Letters of added tokens may stand for no byte; they stand for themselves.
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
        add_prefix_space: put a space before a text that does not begin with one; needed for texts that come in words.
        tokenizer_object: a ``tokenizers.Tokenizer`` to take instead.
        pair_template: see ``DebertaTokenizer``; None for that of ``tokenizer_file``.
        options: see ``TokenizerBase``.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is damaged, or there is none.
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
            backend = load_backend(existing(tokenizer_file))
            pair_template = pair_template or _pair_template(tokenizer_file)
            if not isinstance(backend.model, tokenizers.models.BPE):
                raise ValueError(f"{tokenizer_file}: expected a BPE model, got {type(backend.model).__name__}")
        elif vocab_file is not None:
            mask_token = _mask(mask_token)
            backend = byte_level_backend(*_read_tables(vocab_file, merges_file), vocab_file)
        else:
            raise ValueError("expected a vocab_file and merges_file, a tokenizer_file or a tokenizer_object")
        if not from_vocabulary and mask_token is not None and not isinstance(mask_token, str):
            # The flags that were asked for replace those of the file.
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


def _read_tables(vocab_file, merges_file) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Reads the ids of the pieces and the merges in their order."""
    path = Path(existing(vocab_file))
    if path.name.endswith(".bin"):
        return read_bpe_encoder(path)
    vocab = read_object(path)
    if isinstance(vocab.get("model"), dict):  # tokenizer.json
        if vocab["model"].get("type") != "BPE":
            raise ValueError(f"{path}: expected a BPE model, got {vocab['model'].get('type')}")
        model = {"vocab": {}, "merges": [], **vocab["model"]}
        if not isinstance(model["vocab"], dict) or not isinstance(model["merges"], list):
            raise ValueError(f"{path}: expected a BPE model with an object vocab and a list merges")
        check_ids(str(path), model["vocab"])
        return model["vocab"], _pairs(model["merges"])
    check_ids(str(path), vocab)
    if merges_file is None:
        raise ValueError(f"{path.name} needs a merges_file ({MERGES}) too")
    try:
        lines = Path(existing(merges_file)).read_bytes().decode().split("\n")  # splitlines splits at more letters
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


def _pairs(merges: list) -> list[tuple[str, str]]:
    # tokenizers before 0.20 writes both pieces as one text.
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _mask(token: str | AddedToken | None) -> AddedToken | None:
    return None if token is None else as_added_token(token, lstrip=True, normalized=True, special=True)


def _pair_template(path: str | os.PathLike) -> list[str] | None:
    """Reads the pair template of a tokenizer.json; None for [CLS] A [SEP] B [SEP], a warning for others."""
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


def _byte_of_letter() -> dict[str, bytes]:
    """Maps letters of byte-level BPE to bytes: visible Latin-1 letters to themselves, those from 256 on to the rest."""
    letters = set(tokenizers_library().pre_tokenizers.ByteLevel.alphabet())
    hidden = [byte for byte in range(256) if chr(byte) not in letters]
    return {letter: bytes([ord(letter) if ord(letter) < 256 else hidden[ord(letter) - 256]]) for letter in letters}
