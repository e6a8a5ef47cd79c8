"""Builds ``tokenizers.Tokenizer`` objects, the backends of the fast tokenizers."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.json_object import read_object

# In bytes. sentencepiece refuses longer pieces, and tokenizers overflows the stack on them.
_LONGEST_PIECE = 7999
# Finding the merges of a BPE model reads as many letters as the squared lengths of its pieces add up to. This bound is
# about one second of work.
_MOST_LETTERS = 10**9
# Model types and piece types of sentencepiece's ModelProto.
_UNIGRAM, _BPE = 1, 2
_CONTROL, _USER_DEFINED = 3, 4


def tokenizers_library():
    """Imports ``tokenizers``, an optional dependency."""
    try:
        import tokenizers
    except ImportError:
        raise ImportError("this tokenizer needs tokenizers: pip install tokenizers") from None
    return tokenizers


@contextlib.contextmanager
def without_panics(what: str) -> Iterator[None]:
    """Turns a panic of ``tokenizers`` into a ValueError that begins with ``what``.

    Its PanicException does not derive from Exception, so ``except Exception`` does not catch it.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: tokenizers cannot go on: {error}") from None


def check_ids(what: str, vocab: dict) -> None:
    """Raises ValueError, beginning with ``what``, if two tokens share an id or an id is no natural number."""
    tokens = {}
    for token, index in vocab.items():
        if type(index) is not int or index < 0:  # isinstance(True, int) holds
            raise ValueError(f"{what}: expected the id of every token, got {index!r} for {token!r}")
        if tokens.setdefault(index, token) != token:
            raise ValueError(f"{what}: {tokens[index]!r} and {token!r} both have the id {index}")


def unigram_backend(
    path: str | os.PathLike, *, do_lower_case: bool = False, split_by_punct: bool = False, add_prefix_space: bool = True
):
    """Builds the backend of DeBERTa v2 and v3 from spm.model, whose model may be unigram or BPE.

    The backend has the model's control and user-defined symbols as added tokens, and no post-processor. It ignores
    pieces of bytes (byte_fallback) with a warning: characters without a piece become the unknown token.

    Raises ValueError for a damaged file, a model of another type, and a character map that tokenizers cannot use.
    """
    tokenizers = tokenizers_library()
    normalizers = tokenizers.normalizers
    path, content = os.fspath(path), Path(path).read_bytes()
    kinds, trainer, charsmap = _read_model(path, content)
    steps = [*([normalizers.Lowercase()] if do_lower_case else []), normalizers.Strip()]
    with without_panics(path):
        if charsmap:
            try:
                steps.append(normalizers.Precompiled(charsmap))
            except Exception as error:
                raise ValueError(f"{path}: precompiled_charsmap cannot be read: {error}") from None
        normalizer = normalizers.Sequence([*steps, normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
        _try_normalizer(normalizer)
        # tokenizers has checked the character map. sentencepiece might read beyond the end of a damaged one.
        spm, pieces = load_sentencepiece(path, content, {})
        scores = [(piece, spm.get_score(index)) for index, piece in enumerate(pieces)]
        unknown = pieces[spm.unk_id()]
        if trainer.get(35):  # byte_fallback
            warnings.warn(
                f"{path} has pieces for single bytes, which the fast tokenizer does not use: characters that have no "
                f"piece become {unknown}; the slow tokenizer splits them into bytes"
            )
        model_type = trainer.get(3, _UNIGRAM)
        if model_type == _UNIGRAM:
            model = tokenizers.models.Unigram(scores, unk_id=spm.unk_id(), byte_fallback=False)
        elif model_type == _BPE:
            vocab = {piece: index for index, piece in enumerate(pieces)}
            if sum(len(piece) ** 2 for piece in vocab) > _MOST_LETTERS:
                raise ValueError(f"{path}: its pieces are too long to find how they are merged (the slow one can)")
            model = tokenizers.models.BPE(vocab, _merges(vocab, dict(scores)), unk_token=unknown, fuse_unk=True)
        else:
            raise ValueError(f"{path}: expected a unigram (1) or BPE (2) model, got model_type {model_type}")
        backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizer
    symbols = [(piece, kind) for piece, kind in zip(pieces, kinds) if kind in (_CONTROL, _USER_DEFINED)]
    token = tokenizers.AddedToken
    backend.add_tokens([token(piece, normalized=False, special=kind == _CONTROL) for piece, kind in symbols])
    set_metaspace(backend, split_by_punct, add_prefix_space)
    return backend


def set_metaspace(backend, split_by_punct: bool, add_prefix_space: bool) -> None:
    """Makes ``backend`` write spaces as "▁" and, if asked, split at every punctuation mark."""
    pre_tokenizers = tokenizers_library().pre_tokenizers
    spaces = dict(replacement="▁", prepend_scheme="always" if add_prefix_space else "never")
    punctuation = [pre_tokenizers.Punctuation(behavior="isolated")] if split_by_punct else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*punctuation, pre_tokenizers.Metaspace(**spaces)])
    backend.decoder = tokenizers_library().decoders.Metaspace(**spaces)


def byte_level_backend(vocab: dict[str, int], merges: list[tuple[str, str]], name: str | os.PathLike = "the model"):
    """Builds the backend of DeBERTa v1, byte-level BPE, without added tokens and post-processor.

    Args:
        vocab: id of every piece, in the letters that stand for bytes.
        merges: pairs of pieces in the order in which they are merged.
        name: the name of the model in messages.

    Raises ValueError for a merge whose pieces are not in ``vocab``.
    """
    tokenizers = tokenizers_library()
    with without_panics(f"{name}: vocab and merges"):
        try:
            model = tokenizers.models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="")
        except Exception as error:  # tokenizers raises no narrower class
            raise ValueError(f"{name}: vocab and merges do not fit together: {error}") from None
        backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def load_backend(path: str | os.PathLike):
    """Reads a tokenizer.json. Raises ValueError if the installed ``tokenizers`` cannot."""
    tokenizers, path = tokenizers_library(), os.fspath(path)
    model = read_object(path).get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        check_ids(path, vocab)
    elif isinstance(vocab, list):
        for piece in [x[0] for x in vocab if isinstance(x, list) and x and isinstance(x[0], str)]:
            length = len(piece.encode(errors="surrogatepass"))
            if length > _LONGEST_PIECE:
                limit = f"a piece must be of at most {_LONGEST_PIECE} bytes"
                raise ValueError(f"{path}: {limit}, got {length}: {piece[:20]!r}...")
    with without_panics(path):
        try:
            backend = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # tokenizers raises no narrower class
            raise ValueError(f"{path} is not a tokenizer.json that tokenizers can read: {error}") from None
        _try_normalizer(backend.normalizer)
    return backend


def _try_normalizer(normalizer):
    """Normalizes a few texts, so that a damaged character map panics before the user's first text."""
    if normalizer is not None:
        for text in ("a B\t1.", "é ﬁ ①", "\u3000ｶ 日本", "😀\u200d"):
            normalizer.normalize_str(text)


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Finds the merges of a sentencepiece BPE model, which stores only pieces and their scores. The best come first."""
    merges = []
    for piece, score in scores.items():
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        halves = [(a, b) for a, b in halves if a in vocab and b in vocab]
        merges += [(score, a, b) for a, b in sorted(halves, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(a, b) for _, a, b in merges]


def load_sentencepiece(path: str, content: bytes, settings: dict):
    """Loads the model in ``content``. Raises ValueError, with ``path``, if it is damaged or cut short.

    Returns:
        The ``SentencePieceProcessor`` with these settings, and the pieces by id.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(**settings)
    try:
        # sentencepiece accepts a file that is cut short after any piece.
        if not {1, 2, 3} <= {number for number, _ in message_fields(content)}:
            raise ValueError("it lacks pieces, trainer_spec or normalizer_spec")
        processor.LoadFromSerializedProto(content)
        return processor, [processor.id_to_piece(index) for index in range(len(processor))]
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a model of sentencepiece's, or is damaged: {error}") from None


def _read_model(path: str, content: bytes) -> tuple[list[int], dict, bytes]:
    """Reads the types of the pieces, trainer_spec and precompiled_charsmap, which sentencepiece does not expose.

    The file is a protobuf message (ModelProto). If a field occurs twice, the last one counts; messages are merged.
    The numbers of fields are those of sentencepiece_model.proto.
    """
    try:
        fields = list(message_fields(content))
        kinds = [dict(message_fields(value)).get(3, 1) for number, value in fields if number == 1]
        specs = [b"".join(value for number, value in fields if number == part) for part in (2, 3)]
        trainer, normalizer = (dict(message_fields(spec)) for spec in specs)
        return kinds, trainer, b"".join([normalizer.get(2, b"")])  # TypeError if it is a number
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a model of sentencepiece's, or is damaged: {error}") from None


def message_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields number and value of every field of a protobuf message.

    A field is a key and a value. The key is a varint, field number * 8 + wire type; a varint has seven bits per byte,
    lowest first, and the top bit set on all bytes except the last. The value is a varint (wire type 0), 8 bytes (1),
    4 bytes (5), or a length as varint and as many bytes, which are text or a message (2).
    """
    position, end = 0, len(data)
    while position < end:
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type not in (0, 1, 2, 5):
            raise ValueError(f"wire type {wire_type} at byte {position}")
        if wire_type in (0, 2):
            value, position = _varint(data, position)
        if wire_type > 0:
            length = value if wire_type == 2 else {1: 8, 5: 4}[wire_type]
            value = data[position : position + length]
            position += length
            if position > end:
                raise ValueError(f"cut short: a field of {length} bytes, of which {len(value)} are there")
        yield number, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Returns the number that begins at ``position`` and the position after it."""
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
