"""Files and arguments that end tokenizers, or open what they should not: a ValueError that names the file."""

import base64
import json
import math
import os
import struct
import time
import warnings

import pytest
from test_tokenization import ALL, FAST, make
from tokenizer_files import byte_level, spm_model

from deberta_fast.tokenization import (
    DebertaTokenizer,
    DebertaTokenizerFast,
    DebertaV2Tokenizer,
    DebertaV2TokenizerFast,
)
from deberta_fast.tokenization.backends import load_backend, unigram_backend
from deberta_fast.tokenization.model_inputs import LONGEST_ROW

every = pytest.mark.parametrize("kind", ALL)
V1, V2 = (DebertaTokenizer, DebertaTokenizerFast), (DebertaV2Tokenizer, DebertaV2TokenizerFast)


def varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def field(number, content):
    return varint(number * 8 + 2) + varint(len(content)) + content


def piece(text, score=-3.0):
    return field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score))


def spm(folder, *more):
    """A sound spm.model with more fields."""
    (folder / "spm.model").write_bytes(open(spm_model(), "rb").read() + b"".join(more))
    return folder


# spm.model

BOTH_REFUSE = {
    "long": (piece("z" * 8000), "too long|at most 7999 bytes, got 8000"),
    "longer": (piece("z" * 200_000), "too long|at most 7999 bytes, got 200000"),
    "long in bytes": (piece("é" * 4000), "too long|at most 7999 bytes, got 8000"),
    "NaN": (piece("zz", math.nan), "score is NaN or Inf|the score of 'zz' must be finite, got nan"),
    "infinite": (piece("zz", -math.inf), "score is NaN or Inf|the score of 'zz' must be finite, got -inf"),
    "twice": (piece("zz") * 2, "already defined|is there twice"),
    "empty": (piece(""), "must not be empty|a piece is empty"),
}


@pytest.mark.parametrize("kind", V2)
@pytest.mark.parametrize("name", BOTH_REFUSE)
def test_pieces(kind, name, tmp_path):
    content, message = BOTH_REFUSE[name]
    with pytest.raises(ValueError, match=rf"spm\.model.*({message})"):
        kind.from_pretrained(spm(tmp_path, content))


@pytest.mark.parametrize("kind", V2)
def test_the_longest_piece(kind, tmp_path):
    assert kind.from_pretrained(spm(tmp_path, piece("z" * 7999))).get_vocab()["z" * 7999] > 0


def charsmap(units, replacements=b"a\0b\0"):
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + replacements


CHARSMAPS = {
    "no units": charsmap([]),
    "one unit": charsmap([0]),
    "far": charsmap([0xFFFFFFFF] * 256),
    "past the replacements": charsmap([1 << 8 | 0x100 | 97] * 512),
    "a size that is no multiple": struct.pack("<I", 5) + bytes(100),
    "a size beyond the file": struct.pack("<I", 2**31) + bytes(100),
    "short": b"\1\2",
    "no UTF-8": charsmap([0] * 256, b"\xff\xfe\xff"),
}


@pytest.mark.parametrize("name", CHARSMAPS)
def test_maps_of_characters(name, tmp_path):
    spm(tmp_path, field(3, field(2, CHARSMAPS[name])))
    with pytest.raises(ValueError, match=r"spm\.model"):
        DebertaV2TokenizerFast.from_pretrained(tmp_path)


def test_pieces_that_contain_each_other(tmp_path):
    """A BPE model has two halves to find for each merge."""
    pieces = b"".join(piece("Ж" * n, -float(n)) for n in range(1, 3001))
    spm(tmp_path, pieces, field(2, b"\x18\x02"))
    began = time.perf_counter()
    with pytest.raises(ValueError, match="spm.model: its pieces are too long to find how they are merged"):
        unigram_backend(tmp_path / "spm.model")
    assert time.perf_counter() - began < 5


# tokenizer.json


def save(tmp_path, change, kind=DebertaTokenizerFast):
    make(kind).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    return tmp_path


def test_a_regex_without_end(tmp_path):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = DebertaTokenizerFast.from_pretrained(save(tmp_path, lambda x: x.update(pre_tokenizer=split)))
    assert tokenizer("b")["input_ids"]
    for call in (tokenizer, tokenizer.tokenize, lambda text: tokenizer([text, "b"])):
        with pytest.raises(ValueError, match=f"{tmp_path}: tokenizers cannot go on: .*retry-limit"):
            call("a" * 60 + "b")
    assert tokenizer("b")["input_ids"]


@pytest.mark.parametrize("name", CHARSMAPS)
def test_maps_of_characters_of_tokenizer_json(name, tmp_path):
    def change(content):
        for step in content["normalizer"]["normalizers"]:
            if step["type"] == "Precompiled":
                step["precompiled_charsmap"] = base64.b64encode(CHARSMAPS[name]).decode()

    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        DebertaV2TokenizerFast.from_pretrained(save(tmp_path, change, DebertaV2TokenizerFast))


def test_a_long_piece_of_tokenizer_json(tmp_path):
    save(tmp_path, lambda x: x["model"]["vocab"].append(["z" * 200_000, -1.0]), DebertaV2TokenizerFast)
    with pytest.raises(ValueError, match="tokenizer.json: a piece must be of at most 7999 bytes, got 200000"):
        load_backend(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("depth", [150, 10**5])
@every
def test_nested(kind, depth, tmp_path):
    nest = ("[" * depth + "]" * depth).encode()
    for name in ("tokenizer_config.json", *(["tokenizer.json"] if kind in FAST else [])):
        make(kind).save_pretrained(tmp_path)
        (tmp_path / name).write_bytes(b'{"mine": ' + nest + b"}")
        with pytest.raises(ValueError, match=f"{name} is nested too deeply"):
            kind.from_pretrained(tmp_path)


# vocab.json


@pytest.mark.parametrize("kind", V1)
@pytest.mark.parametrize("name", ["twice", "true", "negative"])
def test_ids(kind, name, tmp_path):
    vocab, merges = byte_level()
    vocab = {**vocab, "zzz": {"twice": 5, "true": True, "negative": -1}[name]}
    other = next(token for token, index in vocab.items() if index == 5)
    message = {
        "twice": f"'{other}' and 'zzz' both have the id 5",
        "true": "expected the id of every token, got True for 'zzz'",
        "negative": "expected the id of every token, got -1 for 'zzz'",
    }[name]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (tmp_path / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    with pytest.raises(ValueError, match=f"vocab.json: {message}"):
        kind.from_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    save(tmp_path, lambda x: x["model"]["vocab"].update(zzz=vocab["zzz"]))
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(ValueError, match=f"tokenizer.json: {message}"):
        kind.from_pretrained(tmp_path)


# tokenizer_config.json

SETTINGS = [
    ("model_max_length", math.inf),
    ("model_max_length", math.nan),
    ("model_max_length", "many"),
    ("model_max_length", []),
    ("added_tokens_decoder", []),
    ("added_tokens_decoder", {"0": {}}),
    ("added_tokens_decoder", {"x": {"content": "a"}}),
    ("added_tokens_decoder", {"0": 3}),
    ("mask_token", 3),
    ("mask_token", {"text": "[MASK]"}),
    ("extra_special_tokens", 3),
    ("additional_special_tokens", [3]),
    ("padding_side", "middle"),
    ("padding_side", 3),
    ("model_input_names", 3),
]


@every
@pytest.mark.parametrize("name, value", SETTINGS, ids=[f"{name}-{value}" for name, value in SETTINGS])
def test_settings(kind, name, value, tmp_path):
    make(kind).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), name: value}), "utf-8")
    with pytest.raises(ValueError, match=str(path)):
        kind.from_pretrained(tmp_path)


@every
def test_what_a_caller_gives_is_no_fault_of_the_file(kind, tmp_path):
    make(kind).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="expected a token as text or AddedToken, got int"):
        kind.from_pretrained(tmp_path, mask_token=3)


OPENED = [
    ({"model_file": "{fifo}"}, "sp_model_kwargs may hold enable_sampling, .*, got 'model_file'"),
    ({"model_proto": "abc"}, "got 'model_proto'"),
    ({"nonsense": 1}, "got 'nonsense'"),
    ({"alpha": "x"}, "alpha must be of type .*, got 'x'"),
    ({"alpha": math.nan}, "alpha must be finite, got nan"),
    ({"enable_sampling": 1}, "enable_sampling must be of type bool, got 1"),
    ({"nbest_size": 10**9}, "nbest_size must be at most 512, got 1000000000"),
    ([], "sp_model_kwargs must be a dict, got list"),
]


@pytest.mark.parametrize("kind", V2)
@pytest.mark.parametrize("settings, message", OPENED, ids=[str(settings) for settings, _ in OPENED])
def test_no_other_file_is_opened(kind, settings, message, tmp_path):
    """A fifo that no one writes to would be waited for without end."""
    make(kind).save_pretrained(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    path = tmp_path / "tokenizer_config.json"
    content = {**json.loads(path.read_text("utf-8")), "sp_model_kwargs": settings}
    path.write_text(json.dumps(content).replace("{fifo}", str(tmp_path / "fifo")), "utf-8")
    with pytest.raises(ValueError, match=f"{path} cannot be used: .*{message}"):
        kind.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", V2)
def test_settings_of_sentencepiece(kind, tmp_path):
    settings = dict(enable_sampling=False, nbest_size=-1, alpha=0.1, num_threads=1, add_bos=False, reverse=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make(kind, sp_model_kwargs=settings)("a text") == make(kind)("a text")


# Lengths


@every
@pytest.mark.parametrize("length", [LONGEST_ROW + 1, 2**31, 2**40, 2**63, 2**64, 10**20])
def test_rows_without_end(kind, length):
    tokenizer = make(kind)
    for texts in ("a", ["a", "b"]):
        with pytest.raises(
            ValueError, match=f'max_length must be at most 1048576 with padding="max_length", got {length}'
        ):
            tokenizer(texts, max_length=length, padding="max_length", truncation=True)
    with pytest.raises(ValueError, match=f"max_length must be at most 1048576 .*, got {length}"):
        tokenizer.pad([{"input_ids": [1]}], max_length=length, padding="max_length")
    with pytest.raises(ValueError, match=f"pad_to_multiple_of must be at most 1048576, got {length}"):
        tokenizer("a", padding=True, pad_to_multiple_of=length)
    with pytest.raises(ValueError, match=f"model_max_length must be at most 1048576 .*, got {length}"):
        make(kind, model_max_length=length)("a", padding="max_length")
    assert tokenizer("a", max_length=length, truncation=True) == tokenizer("a")


@every
def test_the_longest_row(kind):
    assert len(make(kind)("a", max_length=LONGEST_ROW, padding="max_length")["input_ids"]) == LONGEST_ROW
