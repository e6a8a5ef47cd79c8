"""The backends of the fast tokenizers, and the readers of spm.model, tokenizer.json and bpe_encoder.bin."""

import collections
import io
import json
import os
import pickle
import struct
import zipfile

import pytest
import tokenizers
import torch
from tokenizer_files import (
    INVISIBLE,
    SPACES,
    bpe_encoder,
    byte_level,
    byte_level_files,
    processor,
    save_bpe_encoder,
    spm_model,
    texts,
    texts_with_specials,
)

from deberta_fast.tokenization import DebertaTokenizerFast, DebertaV2TokenizerFast, backends
from deberta_fast.tokenization.backends import load_backend
from deberta_fast.tokenization.bpe_encoder import read_bpe_encoder

pytestmark = pytest.mark.filterwarnings("ignore:.*pieces for single bytes")


def unigram_backend(path, **options):
    return DebertaV2TokenizerFast(path, **options).backend_tokenizer


def byte_level_backend(**options):
    return DebertaTokenizerFast(*byte_level_files(), **options).backend_tokenizer


def parts(backend):
    return json.loads(backend.to_str())


def token(content, id, special=True, lstrip=False, normalized=False):
    flags = dict(single_word=False, lstrip=lstrip, rstrip=False, normalized=normalized, special=special)
    return dict(id=id, content=content, **flags)


TEMPLATE = {
    "single": ["[CLS]:0", "A:0", "[SEP]:0"],
    "pair": ["[CLS]:0", "A:0", "[SEP]:0", "B:1", "[SEP]:1"],
}


def template(backend):
    """Returns the templates of the post-processor as text."""
    state = parts(backend)["post_processor"]
    assert state["type"] == "TemplateProcessing"
    assert {name: value["ids"] for name, value in state["special_tokens"].items()} == {"[CLS]": [1], "[SEP]": [2]}
    text = lambda part: ":".join(str(value) for value in next(iter(part.values())).values())
    return {name: [text(part) for part in state[name]] for name in ("single", "pair")}


@pytest.mark.parametrize("kind", ["english", "world", "bytes", "symbols"])
def test_pieces(kind):
    """Against sentencepiece's own reading of the file."""
    spm, backend = processor(kind), unigram_backend(spm_model(kind))
    model = parts(backend)["model"]
    assert (model["type"], model["unk_id"], model["byte_fallback"]) == ("Unigram", 3, False)
    pieces = [(spm.id_to_piece(i), spm.get_score(i)) for i in range(len(spm))]
    assert [(piece, pytest.approx(score, rel=1e-6)) for piece, score in model["vocab"]] == pieces


def test_steps():
    charsmap = {"type": "Precompiled"}
    squeeze = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    punctuation = {"type": "Punctuation", "behavior": "Isolated"}
    for options, lower, punctuated in [
        ({}, [], []),
        (dict(do_lower_case=True), [{"type": "Lowercase"}], []),
        (dict(split_by_punct=True), [], [punctuation]),
    ]:
        state = parts(unigram_backend(spm_model(), **options))
        steps = state["normalizer"]["normalizers"]
        assert len([step for step in steps if step.pop("precompiled_charsmap", None)]) == 1
        assert steps == [*lower, strip, charsmap, squeeze]
        assert state["pre_tokenizer"] == {"type": "Sequence", "pretokenizers": [*punctuated, metaspace]}
        assert state["decoder"] == metaspace
    state = parts(unigram_backend(spm_model(), add_prefix_space=False))
    assert state["decoder"]["prepend_scheme"] == "never"
    assert state["pre_tokenizer"]["pretokenizers"][0]["prepend_scheme"] == "never"


def test_added_tokens():
    size = len(processor())
    backend = unigram_backend(spm_model())
    first = [token("[PAD]", 0), token("[CLS]", 1), token("[SEP]", 2), token("[UNK]", 3, normalized=True)]
    assert parts(backend)["added_tokens"] == [*first, token("[MASK]", size)]
    assert template(backend) == TEMPLATE

    # Control symbols are special, the user's are not; here [MASK] is a piece.
    pieces = {piece: processor("symbols").piece_to_id(piece) for piece in ("[MASK]", "<control>", "<entity>", "@@")}
    backend = unigram_backend(spm_model("symbols"))
    symbols = [token(piece, i, special=piece[0] != "@" and piece != "<entity>") for piece, i in pieces.items()]
    assert parts(backend)["added_tokens"] == first + sorted(symbols, key=lambda symbol: symbol["id"])
    assert backend.encode("a<entity>b [MASK]", add_special_tokens=False).ids.count(pieces["<entity>"]) == 1

    more = {size: tokenizers.AddedToken("[MASK]", special=True), size + 1: tokenizers.AddedToken("<more>")}
    backend = unigram_backend(spm_model(), added_tokens_decoder=more, pad_token="<pad>")
    assert [backend.token_to_id(piece) for piece in ("[MASK]", "<more>", "<pad>")] == [size, size + 1, size + 2]

    # The names are free; those that are no pieces come last.
    backend = unigram_backend(spm_model(), cls_token="<s>", sep_token="</s>", mask_token=tokenizers.AddedToken("<m>"))
    assert [backend.token_to_id(piece) for piece in ("</s>", "<s>", "<m>")] == [size, size + 1, size + 2]
    assert backend.encode("a", "b").ids[0] == size + 1 and backend.encode("a", "b").type_ids[-1] == 1


def test_ids():
    """sentencepiece's, wherever the two are meant to agree."""
    # Only sentencepiece strips what the charsmap makes spaces of; marks and symbols are read differently too.
    edges = "".join(SPACES + INVISIBLE)
    chosen = [text for text in texts() if text.strip(edges) == text and not set("▁<@") & set(text)]
    assert len(chosen) > 1500
    for kind in ("english", "world", "symbols"):
        spm, backend = processor(kind), unigram_backend(spm_model(kind))
        differ = [text for text in chosen if backend.encode(text, add_special_tokens=False).ids != spm.encode(text)]
        # Equally likely orders of the same pieces, and rows of accents, which tokenizers composes one letter at a time
        assert len(differ) <= 3, differ


def test_bytes_become_unknown():
    with pytest.warns(UserWarning, match="single bytes"):
        backend = unigram_backend(spm_model("bytes"))
    text = "a\U0001f9ffb"
    assert len(processor("bytes").encode(text)) >= 6
    assert 3 in backend.encode(text).ids and len(backend.encode(text).ids) <= 6


def test_lower_case_and_punctuation():
    lower = unigram_backend(spm_model(), do_lower_case=True)
    plain = unigram_backend(spm_model())
    assert lower.encode("The STRING Class").ids == plain.encode("the string class").ids
    assert lower.encode("The STRING Class").ids != plain.encode("The STRING Class").ids
    split = unigram_backend(spm_model(), split_by_punct=True)
    separate = [
        word for text in ("a", ".", "b", ",", "c") for word in plain.encode(text, add_special_tokens=False).tokens
    ]
    assert split.encode("a.b,c", add_special_tokens=False).tokens == separate


def test_sentencepiece_bpe():
    """Ids of a BPE model, where sentencepiece merges by score."""
    spm, backend = processor("bpe"), unigram_backend(spm_model("bpe"))
    model = parts(backend)["model"]
    assert (model["type"], model["unk_token"], model["fuse_unk"], model["byte_fallback"]) == (
        "BPE",
        "[UNK]",
        True,
        False,
    )
    words = [word for text in texts() for word in text.split() if word.isascii() and not set("<[@") & set(word)]
    assert len(words) > 500
    for word in words:
        assert backend.encode(word, add_special_tokens=False).ids == spm.encode(word), word


def test_offsets():
    """Offsets refer to the original text, not to what the charsmap turns it into."""
    text = " the ﬁrst  class, ①"
    encoding = unigram_backend(spm_model()).encode(text, add_special_tokens=False)
    words = [(word, text[start:end].strip()) for word, (start, end) in zip(encoding.word_ids, encoding.offsets)]
    expected = [(0, "the"), (1, "ﬁ"), (1, "r"), (1, "st"), (2, "class"), (2, ","), (3, "①")]
    assert list(dict.fromkeys(words)) == expected


# Byte-level BPE


def test_byte_level_steps():
    vocab, merges = byte_level()
    backend = byte_level_backend()
    state = parts(backend)
    assert state["model"]["vocab"] == vocab
    assert [tuple(x.split()) if isinstance(x, str) else tuple(x) for x in state["model"]["merges"]] == merges
    assert not state["model"]["unk_token"] and not state["model"]["dropout"] and not state["model"]["byte_fallback"]
    byte_level_step = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    assert state["pre_tokenizer"] == byte_level_step
    assert state["decoder"]["type"] == "ByteLevel" and state["normalizer"] is None
    assert state["added_tokens"] == [
        *[token(name, i) for i, name in enumerate(("[PAD]", "[CLS]", "[SEP]", "[UNK]"))],
        token("[MASK]", vocab["[MASK]"], lstrip=True, normalized=True),
    ]
    assert template(backend) == TEMPLATE
    assert parts(byte_level_backend(add_prefix_space=True))["pre_tokenizer"]["add_prefix_space"] is True


def test_byte_level_ids():
    vocab, merges = byte_level()
    backend = byte_level_backend()
    oracle = tokenizers.ByteLevelBPETokenizer(vocab, merges)
    for text in texts():
        encoding = backend.encode(text)
        assert encoding.ids == [1, *oracle.encode(text).ids, 2]
        assert backend.decode(encoding.ids) == text
    assert backend.encode("a [MASK] b").tokens == ["[CLS]", "a", " [MASK]", "Ġb", "[SEP]"]
    assert backend.encode("a", "b").type_ids == [0, 0, 0, 1, 1]


def test_merges_without_pieces():
    with pytest.raises(ValueError, match="vocab and merges"):
        backends.byte_level_backend({"a": 0}, [("a", "b")])


# Files


def test_tokenizer_json(tmp_path):
    path = tmp_path / "tokenizer.json"
    for backend in (unigram_backend(spm_model("world")), byte_level_backend()):
        backend.save(str(path))
        loaded = load_backend(path)
        state, loaded_state = parts(backend), parts(loaded)
        assert state.pop("model")["type"] == loaded_state.pop("model")["type"] and state == loaded_state
        for text in texts()[::20] + texts_with_specials():
            assert loaded.encode(text).ids == backend.encode(text).ids


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": 3}', b'{"version": "1.0"', b"null"], ids=repr
)
def test_wrong_tokenizer_json(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json"):
        load_backend(path)


def test_missing_files(tmp_path):
    for read in (load_backend, unigram_backend, read_bpe_encoder):
        with pytest.raises(FileNotFoundError, match="absent"):
            read(tmp_path / "absent")


def test_spm_cut_short(tmp_path):
    content = open(spm_model(), "rb").read()
    path = tmp_path / "spm.model"
    lengths = [*range(60), *range(60, 16000, 997), *range(len(content) - 40, len(content)), len(content) - 1000]
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="spm.model"):
            unigram_backend(path)


@pytest.mark.parametrize(
    "content",
    [
        b"this is text",
        b'{"json": 1}',
        b"\x80" * 40,
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x0b",
        b"\x0a\x02\x0a\x05",
        b"\x0a\x03\x0a\x01\xff" + b"\x12\x00\x1a\x00",
        b"\x0a\x03\x0a\x01a\x12\x03\xc0\x02\x07\x1a\x02\x0a\x00",
        b"\x08\x01",
        pickle.dumps({"a": 1}),
    ],
    ids=repr,
)
def test_wrong_spm(content, tmp_path):
    path = tmp_path / "spm.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="spm.model is not a model of sentencepiece's"):
        unigram_backend(path)


def field(number, content):
    return bytes([number * 8 + 2, len(content)]) + content


def test_other_models_of_sentencepiece(tmp_path):
    with pytest.raises(ValueError, match="spm.model.*model_type 4"):
        unigram_backend(spm_model("characters"))
    # Written by hand: the fields' defaults, fields in another order and twice, unknown ones, no charsmap.
    piece = lambda text, score: field(1, b"\x15" + struct.pack("<f", score) + field(1, text) + b"\x78\x05")
    unknown = field(1, field(1, b"<unk>") + b"\x18\x02")
    path = tmp_path / "spm.model"
    path.write_bytes(
        field(3, field(1, b"none")) + unknown + piece("▁a".encode(), -1.5) + field(2, b"\x18\x02")
        + piece(b"b", -2) + field(2, b"\x18\x01") + field(9, b"?")
    )  # fmt: skip
    backend = unigram_backend(path)
    assert parts(backend)["model"]["vocab"] == [["<unk>", 0.0], ["▁a", -1.5], ["b", -2.0]]
    assert [step["type"] for step in parts(backend)["normalizer"]["normalizers"]] == ["Strip", "Replace"]
    assert backend.encode("ab?", add_special_tokens=False).ids == [1, 2, 0]
    path.write_bytes(path.read_bytes() + field(3, field(2, b"not a charsmap")))
    with pytest.raises(ValueError, match="spm.model.*precompiled_charsmap"):
        unigram_backend(path)


# bpe_encoder.bin


@pytest.mark.parametrize("legacy", [True, False])
def test_bpe_encoder(legacy, tmp_path):
    path = save_bpe_encoder(tmp_path / "bpe_encoder.bin", legacy=legacy)
    vocab, merges = read_bpe_encoder(path)
    assert vocab == byte_level()[0] and list(vocab) == list(byte_level()[0])
    assert merges == byte_level()[1]
    assert vocab["[MASK]"] == 4 + len(bpe_encoder()["dict_map"])
    assert "madeupword0001" in vocab and "<|endoftext|>" in vocab


@pytest.mark.parametrize("legacy", [True, False])
def test_bpe_encoder_of_other_containers(legacy, tmp_path):
    content = bpe_encoder()
    content = collections.OrderedDict(
        dict_map=tuple(map(list, content["dict_map"])),
        vocab=list(map(list, content["vocab"])),
        encoder=collections.OrderedDict(content["encoder"]),
    )
    vocab, merges = read_bpe_encoder(save_bpe_encoder(tmp_path / "bpe_encoder.bin", content, legacy))
    assert (vocab, merges) == byte_level()


class Touch:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("place", ["whole", "key", "value", "extra"])
def test_bpe_encoder_runs_nothing(place, legacy, tmp_path):
    harm, content = Touch(tmp_path / "harm"), bpe_encoder()
    content = {
        "whole": harm,
        "key": content | {"encoder": {harm: 1}},
        "value": content | {"dict_map": [("1", harm)]},
        "extra": content | {"extra": harm},
    }[place]
    path = save_bpe_encoder(tmp_path / "bpe_encoder.bin", content, legacy)
    with pytest.raises(ValueError, match=r"bpe_encoder\.bin.*posix\.mkdir|nt\.mkdir"):
        read_bpe_encoder(path)
    assert not (tmp_path / "harm").exists()


def test_bpe_encoder_runs_nothing_before_the_object(tmp_path):
    """The older format is several pickles in a row."""
    path = tmp_path / "bpe_encoder.bin"
    save_bpe_encoder(path)
    whole, first = path.read_bytes(), len(pickle.dumps(0x1950A86A20F9469CFC6C, 2))
    for harmful in (
        pickle.dumps(Touch(tmp_path / "harm"), 2),
        b"cposix\nsystem\n(S'touch harm'\ntR.",
        b"cbuiltins\neval\n.",
    ):
        for content in (harmful + whole, whole[:first] + harmful + whole[first:]):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="asks for"):
                read_bpe_encoder(path)
    assert not (tmp_path / "harm").exists()


def test_bpe_encoder_with_tensors(tmp_path):
    for legacy in (True, False):
        path = save_bpe_encoder(tmp_path / "bpe_encoder.bin", bpe_encoder() | {"encoder": torch.ones(2)}, legacy)
        with pytest.raises(ValueError, match="bpe_encoder.bin.*asks for"):
            read_bpe_encoder(path)


@pytest.mark.parametrize("legacy", [True, False])
def test_bpe_encoder_cut_short(legacy, tmp_path):
    path = tmp_path / "bpe_encoder.bin"
    content = open(save_bpe_encoder(path, legacy=legacy), "rb").read()
    # The older format ends with a list of storages, which nothing needs.
    for length in [*range(0, 200, 9), *range(200, len(content) - 9, 2999), len(content) - 9]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="bpe_encoder.bin"):
            read_bpe_encoder(path)


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(encoder=None), "encoder"),
        (dict(encoder={"a": "1"}), "encoder"),
        (dict(encoder={1: 1}), "encoder"),
        (dict(vocab="ab"), "vocab"),
        (dict(vocab=[("a", "b", "c")]), "vocab"),
        (dict(vocab=[("a", 1)]), "vocab"),
        (dict(vocab=[("q", "☃")]), "merges need the piece '☃'"),
        (dict(dict_map={"1": 1}), "dict_map"),
        (dict(dict_map=[1, 2]), "dict_map"),
        (dict(dict_map=[("1", 1)]), "dict_map does not have"),
    ],
)
def test_wrong_bpe_encoder(change, reason, tmp_path):
    path = save_bpe_encoder(tmp_path / "bpe_encoder.bin", bpe_encoder() | change)
    with pytest.raises(ValueError, match=f"bpe_encoder.bin.*{reason}"):
        read_bpe_encoder(path)


def test_no_bpe_encoder(tmp_path):
    path = tmp_path / "bpe_encoder.bin"
    compressed, other = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(bpe_encoder()))
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("something", b"else")
    memory = b"\x80\x02K\x01r\xff\xff\xff\xff."  # stored under number 4294967295: as large a table, in C
    for content in (b"", b"text", pickle.dumps(bpe_encoder()), compressed.getvalue(), other.getvalue(), memory):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="bpe_encoder.bin"):
            read_bpe_encoder(path)
    for content in ([1], {"vocab": []}, {(1, 2): 3}, "text"):
        with pytest.raises(ValueError, match="expected a dict with dict_map, vocab, encoder"):
            read_bpe_encoder(save_bpe_encoder(path, content))
