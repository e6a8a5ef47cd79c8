"""Tokenizers of DeBERTa v1: ``DebertaTokenizer``, ``DebertaTokenizerFast``."""

import json
import os
import re
import warnings
from itertools import groupby
from pathlib import Path

from ..checkpoint.hub import Source
from ..checkpoint.json_object import read_object
from ..checkpoint.replace import replace_file
from .backends import byte_level_backend, check_ids, load_backend, without_panics
from .fast import FastTokenizer, backend_library, backend_tokens, set_template
from .files import missing, write_json
from .slow import SlowTokenizer
from .special_tokens import AddedToken, as_added_token

VOCAB, MERGES, ENCODER = "vocab.json", "merges.txt", "bpe_encoder.bin"


class DebertaTokenizer(SlowTokenizer):
    """The tokenizer of DeBERTa v1: byte-level BPE. A space belongs to the word behind it.

    Args:
        vocab_file: vocab.json, tokenizer.json, or Microsoft's bpe_encoder.bin.
        merges_file: merges.txt, with vocab.json.
        errors: what to do with bytes that are no UTF-8, as ``bytes.decode`` has it.
        mask_token: takes the space before it along, unless it is an ``AddedToken`` or tokenizer.json's that does not.
        pair_template: what stands in a row of two texts, and its type; None for
            ["[CLS]:0", "$A:0", "[SEP]:0", "$B:1", "[SEP]:1"]. ``from_pretrained`` takes that of tokenizer.json.
        add_prefix_space: put a space before a text that does not begin with one; also an option of ``__call__``.
        add_bos_token: has no effect, as in transformers.
        options: see ``TokenizerBase``.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is damaged.
    """

    vocab_files_names = {"vocab_file": VOCAB, "merges_file": MERGES}
    model_input_names = ["input_ids", "attention_mask", "token_type_ids"]

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
        self.errors = errors
        self.add_prefix_space = add_prefix_space
        self.add_bos_token = add_bos_token
        self.pair_template = _checked_template(pair_template)
        self._vocab, self._merges = _read_tables(vocab_file, merges_file)
        self._bytes = _byte_of_letter()
        # Only its model and its way to find words are used; added tokens are found before.
        self._backend = _make_backend(vocab_file, self._vocab, self._merges)
        super().__init__(mask_token=_mask(mask_token), **options)
        self.init_kwargs.update(errors=errors, add_prefix_space=add_prefix_space, add_bos_token=add_bos_token)
        if self.pair_template is not None:
            self.init_kwargs["pair_template"] = self.pair_template

    @classmethod
    def _find_files(cls, source: Source) -> dict:
        path = source.file("tokenizer.json")
        template = None if path is None else _pair_template(path)
        found = _find_tables(source) or _only(source, "vocab_file", "tokenizer.json")
        return found if template is None else {**found, "pair_template": template}

    @classmethod
    def _saved_tokens(cls, source: Source, config: dict, overrides: dict) -> dict:
        settings = super()._saved_tokens(source, config, overrides)
        if "added_tokens_decoder" not in config:
            # Those of added_tokens.json have no flags; those of tokenizer.json are found as that file says.
            mask = config.get("mask_token") or "[MASK]"
            mask = mask["content"] if isinstance(mask, dict) else mask
            own = cls._tokens_of_backend_file(source)
            tokens = settings["added_tokens_decoder"].items()
            settings["added_tokens_decoder"] = {
                i: _mask(mask) if token.content == mask and i not in own else token for i, token in tokens
            }
        return settings

    @property
    def _base_vocab(self) -> dict[str, int]:
        return self._vocab

    @property
    def encoder(self) -> dict[str, int]:
        return self._vocab

    def _base_id_to_token(self, index: int) -> str | None:
        return self._backend.model.id_to_token(index)

    def _prepare(self, text: str, word: bool, add_prefix_space: bool | None) -> str:
        prefix = self.add_prefix_space if add_prefix_space is None else add_prefix_space
        return f" {text}" if (word or prefix) and text and not text[0].isspace() else text

    def _tokenize(self, text: str) -> list[str]:
        model, tokens = self._backend.model, []
        with without_panics(self.name_or_path or type(self).__name__):
            for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(text):
                # The model drops letters that it does not know, which must become the unknown token.
                for known, letters in groupby(word, key=self._vocab.__contains__):
                    tokens += [token.value for token in model.tokenize("".join(letters))] if known else letters
        return tokens

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens."""
        # Letters that stand for no byte stand for themselves: they come from added tokens.
        letters = "".join(token or "" for token in tokens)
        data = b"".join([self._bytes.get(letter) or letter.encode() for letter in letters])
        return data.decode(errors=self.errors)

    def save_vocabulary(self, save_directory: str | os.PathLike, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes vocab.json and merges.txt into a folder that exists.

        Returns:
            Their paths.
        """
        return _save_tables(save_directory, filename_prefix, self._vocab, self._merges)


class DebertaTokenizerFast(FastTokenizer):
    """The tokenizer of DeBERTa v1 (byte-level BPE), which knows the characters of every token.

    Args:
        vocab_file: vocab.json, or Microsoft's bpe_encoder.bin.
        merges_file: merges.txt, with vocab.json.
        tokenizer_file: tokenizer.json; it takes precedence.
        errors: kept for the slow tokenizer.
        mask_token: takes the space before it along, unless it is an ``AddedToken`` or tokenizer.json's that does not.
        pair_template: what stands in a row of two texts, and its type; None for that of ``tokenizer_file``, or else
            ["[CLS]:0", "$A:0", "[SEP]:0", "$B:1", "[SEP]:1"].
        add_prefix_space: put a space before a text that does not begin with one; needed for texts that come in words.
        add_bos_token: has no effect, as in transformers.
        tokenizer_object: a ``tokenizers.Tokenizer`` to take instead.
        options: see ``TokenizerBase``.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is damaged, or there is none.
    """

    vocab_files_names = {"vocab_file": VOCAB, "merges_file": MERGES, "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask", "token_type_ids"]

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
        tokenizers = backend_library()
        self.errors = errors
        self.add_prefix_space = add_prefix_space
        self.add_bos_token = add_bos_token
        if tokenizer_object is not None:
            backend = tokenizers.Tokenizer.from_str(tokenizer_object.to_str())
        elif tokenizer_file is not None:
            backend = load_backend(_existing(tokenizer_file))
            pair_template = pair_template or _pair_template(tokenizer_file)
            if not isinstance(backend.model, tokenizers.models.BPE):
                raise ValueError(f"{tokenizer_file}: expected a BPE model, got {type(backend.model).__name__}")
        elif vocab_file is not None:
            mask_token = _mask(mask_token)
            tokens = backend_tokens({"mask_token": mask_token, **options})
            backend = _make_backend(vocab_file, *_read_tables(vocab_file, merges_file), **tokens)
        else:
            raise ValueError("expected a vocab_file and merges_file, a tokenizer_file or a tokenizer_object")
        if mask_token is not None and not isinstance(mask_token, str):
            backend = _with_flags_of(backend, as_added_token(mask_token))
        if isinstance(backend.pre_tokenizer, tokenizers.pre_tokenizers.ByteLevel):
            backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        super().__init__(backend, mask_token=mask_token, **options)
        self.pair_template = _checked_template(pair_template)
        set_template(self._tokenizer, self)
        self.init_kwargs.update(errors=errors, add_prefix_space=add_prefix_space, add_bos_token=add_bos_token)
        if self.pair_template is not None:
            self.init_kwargs["pair_template"] = self.pair_template

    @classmethod
    def _find_files(cls, source: Source) -> dict:
        path = source.file("tokenizer.json")
        if path is not None:
            return {"tokenizer_file": path}
        return _find_tables(source) or _only(source, "vocab_file", ENCODER)

    def _encodings(self, examples, options):
        if options.is_split_into_words and not self.add_prefix_space:
            raise ValueError("is_split_into_words needs a tokenizer made with add_prefix_space=True")
        return super()._encodings(examples, options)

    def save_vocabulary(self, save_directory: str | os.PathLike, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes vocab.json and merges.txt into a folder that exists.

        Returns:
            Their paths.
        """
        model = json.loads(self._tokenizer.to_str())["model"]
        return _save_tables(save_directory, filename_prefix, model["vocab"], _pairs(model["merges"]))


def _find_tables(source: Source) -> dict:
    """vocab.json with merges.txt, or bpe_encoder.bin, where they are there."""
    vocab, merges = source.file(VOCAB), source.file(MERGES)
    if vocab is not None and merges is not None:
        return {"vocab_file": vocab, "merges_file": merges}
    encoder = source.file(ENCODER)
    if encoder is not None:
        return {"vocab_file": encoder}
    return {}


def _only(source: Source, argument: str, name: str) -> dict:
    path = source.file(name)
    if path is not None:
        return {argument: path}
    if (source.file(VOCAB) is None) != (source.file(MERGES) is None):
        raise missing(source, VOCAB if source.file(VOCAB) is None else MERGES)
    raise missing(source, VOCAB, "tokenizer.json", ENCODER)


def _existing(path: str | os.PathLike) -> str:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)}")
    return os.fspath(path)


def _read_tables(vocab_file, merges_file) -> tuple[dict[str, int], list[tuple[str, str]]]:
    path = Path(_existing(vocab_file))
    if path.name.endswith(".bin"):
        from .bpe_encoder import read_bpe_encoder

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
    merges = []
    try:
        lines = Path(_existing(merges_file)).read_bytes().decode().split("\n")  # splitlines splits at more letters
    except UnicodeDecodeError as error:
        raise ValueError(f"{merges_file} is no text: {error}") from None
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if line and not (number == 1 and line.startswith("#version")):
            pair = tuple(line.split(" "))
            if len(pair) != 2:
                raise ValueError(f"{merges_file}, line {number}: expected two pieces, got {line!r}")
            merges.append(pair)
    return vocab, merges


def _make_backend(vocab_file, vocab: dict[str, int], merges: list[tuple[str, str]], **tokens):
    backend_library()
    try:
        with without_panics("vocab and merges"):
            return byte_level_backend(vocab, merges, **tokens)
    except ValueError as error:
        raise ValueError(f"{os.fspath(vocab_file)}: {error}") from None


def _pairs(merges: list) -> list[tuple[str, str]]:
    # tokenizers before 0.20 wrote both pieces as one text.
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _save_tables(folder, prefix: str | None, vocab: dict, merges: list) -> tuple[str, ...]:
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"expected a folder to save in, got {os.fspath(folder)}")
    paths = [Path(folder) / f"{f'{prefix}-' if prefix else ''}{name}" for name in (VOCAB, MERGES)]
    write_json(paths[0], vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    replace_file(paths[1], "\n".join(lines).encode())
    return tuple(map(str, paths))


def _mask(token: str | AddedToken | None) -> AddedToken | None:
    return None if token is None else as_added_token(token, lstrip=True, normalized=True, special=True)


def _pair_template(path: str | os.PathLike) -> list[str] | None:
    """The rows of two texts by a tokenizer.json, where they are not [CLS] A [SEP] B [SEP], with a warning."""
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


def _checked_template(template: list[str] | None) -> list[str] | None:
    if template is None:
        return None
    parts = list(template) if isinstance(template, list | tuple) else [None]
    if not all(isinstance(x, str) and re.fullmatch(r"(?s).+:[01]", x) for x in parts):
        raise ValueError(f'pair_template must be a list of texts such as "$A:0" and "[SEP]:1", got {template!r}')
    if [x[:-2] for x in parts if x[:-2] in ("$A", "$B")] != ["$A", "$B"]:
        raise ValueError(f"pair_template must hold $A and then $B, each once, got {template!r}")
    return parts


def _with_flags_of(backend, token: AddedToken):
    """``backend`` with ``token``'s flags for the added token of that text."""
    found = [own for own in backend.get_added_tokens_decoder().values() if own.content == token.content]
    if not found or found[0].lstrip == token.lstrip:
        return backend
    description = json.loads(backend.to_str())
    for own in description["added_tokens"]:
        if own["content"] == token.content:
            own.update(lstrip=token.lstrip, normalized=token.normalized)
    return type(backend).from_str(json.dumps(description))


def _byte_of_letter() -> dict[str, bytes]:
    """Which byte a letter of byte-level BPE stands for: itself, or where that is no visible letter, one from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    return {letter: bytes([byte]) for letter, byte in letters.items()}
