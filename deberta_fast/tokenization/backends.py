"""Builds ``tokenizers.Tokenizer`` objects, the backends of the fast tokenizers."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.json_object import read_object

# sentencepiece refuses longer pieces (in bytes); tokenizers overflows the stack on them.
_LONGEST_PIECE = 7999
# Bound on the bytes read to find the merges of a BPE model: about one second of work.
_MOST_HALVES = 10**9
# Model types and piece types of sentencepiece's ModelProto.
UNIGRAM, BPE = 1, 2
CONTROL, USER_DEFINED = 3, 4


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
    """Checks that each token has an id of its own.

    Raises:
        ValueError: two tokens share an id, or an id is no integer; the message begins with ``what``.
    """
    tokens = {}
    for token, index in vocab.items():
        if type(index) is not int or index < 0:  # isinstance(True, int) holds
            raise ValueError(f"{what}: expected the id of every token, got {index!r} for {token!r}")
        if tokens.setdefault(index, token) != token:
            raise ValueError(f"{what}: {tokens[index]!r} and {token!r} both have the id {index}")


def unigram_backend(
    spm_path: str | os.PathLike,
    *,
    do_lower_case: bool = False,
    split_by_punct: bool = False,
    add_prefix_space: bool = True,
):
    """Builds the backend of DeBERTa v2 and v3 from spm.model, whose model may be unigram or BPE.

    The backend has the model's control and user-defined symbols as added tokens, and no post-processor yet. It does not
    use pieces of bytes (byte_fallback): characters without a piece become the unknown token. A warning says so.

    Raises:
        ValueError: the file is no sentencepiece model, is cut short, or holds another type than unigram or BPE; it
            has pieces that sentencepiece refuses, or a character map that tokenizers cannot use.
    """
    tokenizers = tokenizers_library()
    normalizers = tokenizers.normalizers
    path, content = os.fspath(spm_path), Path(spm_path).read_bytes()
    kinds, trainer, charsmap = _read_model(path, content)
    steps = [normalizers.Lowercase()] if do_lower_case else []
    steps.append(normalizers.Strip())
    with without_panics(path):
        if charsmap:
            try:
                steps.append(normalizers.Precompiled(charsmap))
            except Exception as error:
                raise ValueError(f"{path}: precompiled_charsmap cannot be read: {error}") from None
        normalizer = normalizers.Sequence([*steps, normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
        _try_normalizer(normalizer)
        # sentencepiece itself must not meet a character map that tokenizers refuses: it might read beyond its end.
        spm = sentencepiece_processor(path, content)
        scores = [(spm.id_to_piece(index), spm.get_score(index)) for index in range(len(spm))]
        unknown = scores[spm.unk_id()][0]
        if trainer.get(35):  # byte_fallback
            warnings.warn(
                f"{path} has pieces for single bytes, which the fast tokenizer does not use: characters that have no "
                f"piece become {unknown}; the slow tokenizer splits them into bytes"
            )
        model_type = trainer.get(3, UNIGRAM)
        if model_type == UNIGRAM:
            model = tokenizers.models.Unigram(scores, unk_id=spm.unk_id(), byte_fallback=False)
        elif model_type == BPE:
            vocab = {piece: index for index, (piece, _) in enumerate(scores)}
            if sum(len(piece) ** 2 for piece in vocab) > _MOST_HALVES:
                raise ValueError(f"{path}: its pieces are too long to find how they are merged (the slow one can)")
            model = tokenizers.models.BPE(vocab, _merges(vocab, dict(scores)), unk_token=unknown, fuse_unk=True)
        else:
            raise ValueError(f"{path}: expected a unigram (1) or BPE (2) model, got model_type {model_type}")
        backend = tokenizers.Tokenizer(model)
    # The normalizer must be set first: tokens that are matched in normalized text are normalized when added.
    backend.normalizer = normalizer
    backend.add_tokens(
        [
            tokenizers.AddedToken(piece, normalized=False, special=kind == CONTROL)
            for (piece, _), kind in zip(scores, kinds)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    set_metaspace(backend, split_by_punct, add_prefix_space)
    return backend


def set_metaspace(backend, split_by_punct: bool, add_prefix_space: bool) -> None:
    """Makes ``backend`` write spaces as "▁" and, if asked, split at every punctuation mark."""
    pre_tokenizers = tokenizers_library().pre_tokenizers
    spaces = dict(replacement="▁", prepend_scheme="always" if add_prefix_space else "never")
    splits = [pre_tokenizers.Punctuation(behavior="isolated")] if split_by_punct else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.Metaspace(**spaces)])
    backend.decoder = tokenizers_library().decoders.Metaspace(**spaces)


def byte_level_backend(vocab: dict[str, int], merges: list[tuple[str, str]], name: str | os.PathLike = "the model"):
    """Builds the backend of DeBERTa v1, byte-level BPE, without added tokens and post-processor.

    Args:
        vocab: id of every piece, in the letters that stand for bytes.
        merges: pairs of pieces in the order in which they are merged.
        name: what messages name.

    Raises:
        ValueError: a merge needs or makes a piece that is not in ``vocab``.
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
    """Reads a tokenizer.json.

    Raises:
        ValueError: the installed ``tokenizers`` cannot read the file.
    """
    tokenizers = tokenizers_library()
    model = read_object(path).get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        check_ids(os.fspath(path), vocab)
    elif isinstance(vocab, list):
        for entry in vocab:
            if isinstance(entry, list) and entry and isinstance(entry[0], str):
                piece, length = entry[0], len(entry[0].encode(errors="surrogatepass"))
                if length > _LONGEST_PIECE:
                    limit = f"a piece must be of at most {_LONGEST_PIECE} bytes"
                    raise ValueError(f"{os.fspath(path)}: {limit}, got {length}: {piece[:20]!r}...")
    with without_panics(os.fspath(path)):
        try:
            backend = tokenizers.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # tokenizers raises no narrower class
            raise ValueError(f"{path} is not a tokenizer.json that tokenizers can read: {error}") from None
        _try_normalizer(backend.normalizer)
    return backend


def _try_normalizer(normalizer):
    """Normalizes a few texts, so that a damaged character map panics now and not on the first text."""
    if normalizer is not None:
        for text in ("a B\t1.", "é ﬁ ①", "\u3000ｶ 日本", "😀\u200d"):
            normalizer.normalize_str(text)


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Finds the merges of a sentencepiece BPE model, which stores only pieces and scores; in the order of merging."""
    merges = []
    for piece, score in scores.items():
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        halves = [(a, b) for a, b in halves if a in vocab and b in vocab]
        merges += [(score, a, b) for a, b in sorted(halves, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(a, b) for _, a, b in merges]


def sentencepiece_processor(path: str, content: bytes, settings: dict | None = None):
    """Loads the model in ``content`` with sentencepiece.

    Raises:
        ValueError: it is damaged, or cut short; names ``path``.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(**(settings or {}))
    try:
        # sentencepiece accepts a file that is cut short after any piece.
        if not {1, 2, 3} <= {number for number, _ in message_fields(content)}:
            raise ValueError("it lacks pieces, trainer_spec or normalizer_spec")
        processor.LoadFromSerializedProto(content)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a model of sentencepiece's, or is damaged: {error}") from None
    return processor


def _read_model(path: str, content: bytes) -> tuple[list[int], dict, bytes]:
    """Reads what sentencepiece does not tell: the types of the pieces, trainer_spec, and precompiled_charsmap.

    The file is a protobuf message (ModelProto). If a field occurs twice, the last one counts; messages are merged.
    """
    try:
        fields = list(message_fields(content))
        kinds = [dict(message_fields(value)).get(3, 1) for number, value in fields if number == 1]
        trainer, normalizer = (
            dict(message_fields(b"".join(value for number, value in fields if number == part))) for part in (2, 3)
        )
        return kinds, trainer, bytes(memoryview(normalizer.get(2, b"")))
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
