"""Builders of ``tokenizers.Tokenizer`` objects: what the fast tokenizers run on."""

import contextlib
import math
import os
import struct
import warnings
from collections.abc import Iterable, Iterator

from ..checkpoint.json_object import read_object

# The bytes of a piece; of more, sentencepiece takes no model, and tokenizers runs out of stack.
_LONGEST_PIECE = 7999
# What looking for the halves of all pieces of a BPE model may read, in bytes: about a second's work.
_MOST_HALVES = 10**9
# Of sentencepiece's ModelProto: kinds of model and of pieces.
UNIGRAM, BPE = 1, 2
CONTROL, USER_DEFINED = 3, 4


def _tokenizers():
    try:
        import tokenizers
    except ImportError:
        raise ImportError("the fast tokenizers need tokenizers: pip install tokenizers") from None
    return tokenizers


@contextlib.contextmanager
def without_panics(what: str) -> Iterator[None]:
    """Inside, where ``tokenizers`` panics, it is a ValueError that begins with ``what``.

    Its PanicException is no Exception, so that it would pass all that looks for errors.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: tokenizers cannot go on: {error}") from None


def check_ids(what: str, vocab: dict) -> None:
    """Whether each token has an id of its own.

    Raises:
        ValueError: it begins with ``what``, and names the token.
    """
    tokens = {}
    for token, index in vocab.items():
        if type(index) is not int or index < 0:  # True is an int too
            raise ValueError(f"{what}: expected the id of every token, got {index!r} for {token!r}")
        if tokens.setdefault(index, token) != token:
            raise ValueError(f"{what}: {tokens[index]!r} and {token!r} both have the id {index}")


def unigram_backend(
    spm_path: str | os.PathLike,
    *,
    do_lower_case: bool = False,
    split_by_punct: bool = False,
    add_prefix_space: bool = True,
    unk_token: str = "[UNK]",
    sep_token: str = "[SEP]",
    pad_token: str = "[PAD]",
    cls_token: str = "[CLS]",
    mask_token: str = "[MASK]",
    added_tokens: Iterable = (),
):
    """The tokenizer of DeBERTa v2 and v3, from sentencepiece's spm.model (which may hold a BPE model too).

    Pieces of bytes (byte_fallback) are never used: what has no piece becomes ``unk_token``, with a warning here.

    Args:
        do_lower_case: lower case first of all.
        split_by_punct: make every punctuation mark a word of its own.
        add_prefix_space: put a "▁" before every word that lacks one.
        unk_token, sep_token, pad_token, cls_token, mask_token: text, or a ``tokenizers.AddedToken``; those that are no
            pieces get the ids after the last piece's. Where there is no such token, None (not for cls and sep).
        added_tokens: more ``tokenizers.AddedToken``; their ids come before those of the special tokens.

    Raises:
        ValueError: the file is no model of sentencepiece's, is cut short, or of a type that is not unigram or BPE; it
            has pieces that sentencepiece refuses, or a map of characters that tokenizers cannot use.
    """
    tokenizers = _tokenizers()
    normalizers, pre_tokenizers = tokenizers.normalizers, tokenizers.pre_tokenizers
    spm = _SentencePieceFile(spm_path)
    if spm.byte_fallback:
        warnings.warn(
            f"{spm.path} has pieces for single bytes, which the fast tokenizer does not use: characters that have no "
            f"piece become {unk_token}; the slow tokenizer splits them into bytes"
        )
    with without_panics(spm.path):
        model = _model(spm)
    backend = tokenizers.Tokenizer(model)
    steps = [normalizers.Lowercase()] if do_lower_case else []
    steps.append(normalizers.Strip())
    with without_panics(spm.path):
        if spm.charsmap:
            try:
                steps.append(normalizers.Precompiled(spm.charsmap))
            except Exception as error:
                raise ValueError(f"{spm.path}: precompiled_charsmap cannot be read: {error}") from None
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
        _try_out(backend)
    # After the normalizer, which decides how tokens that are looked for in the normalized text are spelt there.
    backend.add_tokens(
        [
            tokenizers.AddedToken(piece, normalized=False, special=kind == CONTROL)
            for (piece, _), kind in zip(spm.scores, spm.types)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    backend.add_tokens(list(added_tokens))
    unknown = _special(unk_token, normalized=True)
    backend.add_tokens(
        _present(_special(cls_token), _special(sep_token), unknown, _special(pad_token), _special(mask_token))
    )
    words = dict(replacement="▁", prepend_scheme="always" if add_prefix_space else "never")
    splits = [pre_tokenizers.Punctuation(behavior="isolated")] if split_by_punct else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.Metaspace(**words)])
    backend.decoder = tokenizers.decoders.Metaspace(**words)
    backend.post_processor = _template(backend, str(cls_token), str(sep_token))
    return backend


def byte_level_backend(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    add_prefix_space: bool = False,
    unk_token: str = "[UNK]",
    sep_token: str = "[SEP]",
    pad_token: str = "[PAD]",
    cls_token: str = "[CLS]",
    mask_token: str = "[MASK]",
    added_tokens: Iterable = (),
):
    """The tokenizer of DeBERTa v1: byte-level BPE. ``mask_token`` takes the space before it.

    Args:
        vocab: id of every piece, in the letters that stand for bytes.
        merges: pairs of pieces, first the one to merge first.
        add_prefix_space: put a space before a text that does not begin with one.
        unk_token, sep_token, pad_token, cls_token, mask_token: text, or a ``tokenizers.AddedToken``; those that are not
            in ``vocab`` get the ids from its length on. Where there is no such token, None (not for cls and sep).
        added_tokens: more ``tokenizers.AddedToken``; their ids come before those of the special tokens.

    Raises:
        ValueError: a merge needs or makes a piece that is not in ``vocab``.
    """
    tokenizers = _tokenizers()
    try:
        model = tokenizers.models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="")
    except Exception as error:  # of no narrower class
        raise ValueError(f"vocab and merges do not fit together: {error}") from None
    backend = tokenizers.Tokenizer(model)
    backend.add_tokens(list(added_tokens))
    mask = _special(mask_token, lstrip=True, normalized=True)
    backend.add_tokens(_present(*map(_special, (cls_token, sep_token, unk_token, pad_token)), mask))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.post_processor = _template(backend, str(cls_token), str(sep_token))
    return backend


def load_backend(path: str | os.PathLike):
    """The tokenizer of a tokenizer.json.

    Raises:
        ValueError: the file is not one, or of a newer kind than the installed ``tokenizers`` knows.
    """
    tokenizers = _tokenizers()
    model = read_object(path).get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        check_ids(os.fspath(path), vocab)
    elif isinstance(vocab, list):
        for entry in vocab:
            if isinstance(entry, list) and entry and isinstance(entry[0], str):
                _check_length(os.fspath(path), entry[0])
    with open(path, "rb") as file:
        content = file.read()
    with without_panics(os.fspath(path)):
        try:
            backend = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # of no narrower class
            raise ValueError(f"{path} is not a tokenizer.json that tokenizers can read: {error}") from None
        _try_out(backend)
    return backend


def _try_out(backend):
    """Has the map of characters read a few: a damaged one panics then, and not with the first text."""
    if backend.normalizer is not None:
        for text in ("a B\t1.", "é ﬁ ①", "\u3000ｶ 日本", "😀\u200d"):
            backend.normalizer.normalize_str(text)


def _check_length(what: str, piece: str):
    length = len(piece.encode(errors="surrogatepass"))
    if length > _LONGEST_PIECE:
        raise ValueError(f"{what}: a piece must be of at most {_LONGEST_PIECE} bytes, got {length}: {piece[:20]!r}...")


def _special(token, **flags):
    return _tokenizers().AddedToken(token, special=True, **flags) if isinstance(token, str) else token


def _present(*tokens) -> list:
    return [token for token in tokens if token is not None]


def _template(backend, cls: str, sep: str):
    return _tokenizers().processors.TemplateProcessing(
        single=[f"{cls}:0", "$A:0", f"{sep}:0"],
        pair=[f"{cls}:0", "$A:0", f"{sep}:0", "$B:1", f"{sep}:1"],
        special_tokens=[(token, backend.token_to_id(token)) for token in (cls, sep)],
    )


def _model(spm: "_SentencePieceFile"):
    models = _tokenizers().models
    if spm.model_type == UNIGRAM:
        return models.Unigram(spm.scores, unk_id=spm.unk_id, byte_fallback=False)
    if spm.model_type != BPE:
        raise ValueError(f"{spm.path}: expected a unigram (1) or BPE (2) model, got model_type {spm.model_type}")
    vocab = {piece: i for i, (piece, _) in enumerate(spm.scores)}
    if sum(len(piece) ** 2 for piece in vocab) > _MOST_HALVES:
        raise ValueError(f"{spm.path}: its pieces are too long to find how they are merged (the slow one can)")
    return models.BPE(vocab, _merges(vocab, dict(spm.scores)), unk_token=spm.unk_piece, fuse_unk=True)


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges behind a sentencepiece BPE model, which keeps pieces and scores only, first the one to do first."""
    merges = []
    for piece, score in scores.items():
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        halves = [(a, b) for a, b in halves if a in vocab and b in vocab]
        merges += [(score, a, b) for a, b in sorted(halves, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(a, b) for _, a, b in merges]


class _SentencePieceFile:
    """What a fast tokenizer needs of spm.model, a protobuf message (ModelProto), without the protobuf package.

    A message is a row of fields, each a key and a value. The key is a varint, number of the field * 8 + wire type; a
    varint has seven bits a byte, the lowest first, and the top bit set on all bytes but the last. Wire type 0: the
    value is a varint; 1: 8 bytes; 5: 4 bytes; 2: a varint, the length, and as many bytes (text or a message). A field
    that is missing has its default; of one that comes twice the last counts, and messages are merged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        with open(path, "rb") as file:
            content = file.read()
        try:
            self._read(content)
        except ValueError as error:  # UnicodeDecodeError is one too
            raise ValueError(f"{self.path} is not a model of sentencepiece's, or is damaged: {error}") from None

    def _read(self, content: bytes):
        self.scores: list[tuple[str, float]] = []
        self.types: list[int] = []
        parts: dict[int, list[bytes]] = {2: [], 3: []}  # TrainerSpec, NormalizerSpec
        for number, value in _fields(content):
            if number == 1:  # SentencePiece: piece, score, type (1 is normal)
                piece = {1: b"", 2: b"\0\0\0\0", 3: 1} | dict(_fields(_expect(bytes, value)))
                self.scores.append(
                    (_expect(bytes, piece[1]).decode(), *struct.unpack("<f", _expect(bytes, piece[2], 4)))
                )
                self.types.append(_expect(int, piece[3]))
            elif number in parts:
                parts[number].append(_expect(bytes, value))
        pieces = set()
        for piece, score in self.scores:
            _check_length("it cannot be used", piece)
            if not math.isfinite(score):
                raise ValueError(f"the score of {piece!r} must be finite, got {score}")
            if not piece or piece in pieces:
                raise ValueError(f"the piece {piece!r} is there twice" if piece else "a piece is empty")
            pieces.add(piece)
        # They follow the pieces: without them the file ends early.
        if not all([self.scores, *parts.values()]):
            raise ValueError("it lacks pieces, trainer_spec or normalizer_spec")
        trainer = {3: UNIGRAM, 35: 0, 40: 0, 45: b"<unk>"} | dict(_fields(b"".join(parts[2])))
        self.model_type = _expect(int, trainer[3])
        self.byte_fallback = bool(trainer[35])
        self.unk_id = _expect(int, trainer[40])
        self.unk_piece = _expect(bytes, trainer[45]).decode()
        self.charsmap = _expect(bytes, dict(_fields(b"".join(parts[3]))).get(2, b""))
        if self.unk_id >= len(self.scores):
            raise ValueError(f"unk_id is {self.unk_id}, of {len(self.scores)} pieces")


def _expect(kind: type, value, length: int | None = None):
    if not isinstance(value, kind) or (length is not None and len(value) != length):
        raise ValueError("a field is of another type than expected")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of every field of a message."""
    position, end = 0, len(data)
    while position < end:
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(data, position)
        else:
            if wire_type == 2:
                length, position = _varint(data, position)
            else:
                length = {1: 8, 5: 4}.get(wire_type)
                if length is None:
                    raise ValueError(f"wire type {wire_type} at byte {position}")
            value = data[position : position + length]
            position += length
            if position > end:
                raise ValueError(f"cut short: a field of {length} bytes, of which {len(value)} are there")
        yield number, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number that begins at ``position``, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("cut short within a number")
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError(f"a number of more than ten bytes at byte {position - 10}")
