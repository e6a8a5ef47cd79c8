import itertools
import json
import pickle
import zlib

import numpy as np
import pytest
from tokenizer_files import spm_folder

from deberta_fast import DebertaV2Tokenizer
from deberta_fast.pretraining import rows
from deberta_fast.pretraining.encoding import tokenizer_fingerprint
from deberta_fast.pretraining.rows import LEAST_ROOM, ChunkedRows, PackedRows, SampleOrder
from deberta_fast.pretraining.shards import Shards

CLS, SEP = 1, 2


@pytest.fixture(scope="module")
def tokenizer():
    return DebertaV2Tokenizer.from_pretrained(spm_folder())


def made_shards(folder, tokenizer, lengths, per_shard):
    """Shards of documents of such lengths, whose ids differ."""
    folder.mkdir()
    index = dict(format=1, tokenizer=tokenizer_fingerprint(tokenizer), vocab_size=2**31, dtype="<u4", shard_tokens=1)
    index |= dict(sources={}, next_document=len(lengths), empty=0, finished=True, shards=[])
    first = 10
    for number, low in enumerate(range(0, len(lengths), per_shard)):
        ends = np.cumsum(lengths[low : low + per_shard]).astype("<i8")
        tokens = np.arange(first, first + ends[-1]).astype("<u4")
        first += int(ends[-1])
        (folder / f"{number:05}.tokens").write_bytes(tokens.tobytes())
        (folder / f"{number:05}.ends").write_bytes(ends.tobytes())
        sums = dict(tokens_crc32=zlib.crc32(tokens), ends_crc32=zlib.crc32(ends))
        index["shards"].append(dict(documents=len(ends), tokens=int(ends[-1]), **sums))
    (folder / "shards.json").write_text(json.dumps(index))
    return Shards(folder)


def packed(lengths, length):
    """The rows of PackedRows, token by token as its docstring says: lists of sequences of pieces."""
    rows, first = [[]], 10
    room = length
    for count in lengths:
        pieces = list(range(first, first + count))
        first += count
        while pieces:
            if room < LEAST_ROOM:
                rows.append([])
                room = length
            rows[-1].append(pieces[: room - 2])
            pieces = pieces[room - 2 :]
            room -= len(rows[-1][-1]) + 2
    return rows


def sequences(row):
    """The pieces of every sequence of a row, whose frames are checked."""
    assert row.input_ids.dtype == np.int64 and row.ends.dtype == np.int32
    assert row.ends[-1] == len(row.input_ids)
    found = []
    for start, end in itertools.pairwise([0, *row.ends.tolist()]):
        assert row.input_ids[start] == CLS and row.input_ids[end - 1] == SEP
        found.append(row.input_ids[start + 1 : end - 1].tolist())
    return found


def flat(rows):
    return itertools.chain.from_iterable(itertools.chain.from_iterable(rows))


def some_lengths(kind):
    draw = np.random.default_rng(3)
    return {
        "short": lambda: draw.integers(1, 12, 400),
        "long": lambda: draw.integers(1, 900, 60),
        "mixed": lambda: np.where(draw.random(300) < 0.9, draw.integers(1, 40, 300), draw.integers(40, 3000, 300)),
        "one": lambda: np.array([1]),
        "one-long": lambda: np.array([5000]),
        "fill-exactly": lambda: np.array([62] * 9 + [46, 46, 47, 45, 1, 124, 62]),
        "end-with-the-row": lambda: np.array([30, 30, 62]),
    }[kind]().tolist()


@pytest.mark.parametrize("length", [16, 17, 64, 200])
@pytest.mark.parametrize("kind", ["short", "long", "mixed", "one", "one-long", "fill-exactly", "end-with-the-row"])
def test_packed_rows(tmp_path, tokenizer, monkeypatch, kind, length):
    monkeypatch.setattr(rows, "_DOCUMENTS", 7)
    lengths = some_lengths(kind)
    shards = made_shards(tmp_path / "shards", tokenizer, lengths, 50)
    found = PackedRows(shards, length, tokenizer)
    result = [sequences(found[i]) for i in range(len(found))]
    assert result == packed(lengths, length)
    assert list(flat(result)) == list(range(10, 10 + sum(lengths)))  # No token is lost or repeated.
    assert all(length - LEAST_ROOM < len(found[i].input_ids) <= length for i in range(len(found) - 1))
    assert found._starts.dtype == np.uint64 and len(found._starts) == len(found) + 1
    for beyond in (len(found), -1):
        with pytest.raises(IndexError):
            found[beyond]
    again = pickle.loads(pickle.dumps(found))
    assert [sequences(again[i]) for i in range(len(again))] == result


@pytest.mark.parametrize("length", [3, 17, 64])
@pytest.mark.parametrize("kind", ["short", "long", "one", "fill-exactly"])
def test_chunked_rows(tmp_path, tokenizer, kind, length):
    lengths = some_lengths(kind)
    found = ChunkedRows(made_shards(tmp_path / "shards", tokenizer, lengths, 50), length, tokenizer)
    result = [sequences(found[i]) for i in range(len(found))]
    assert all(len(row) == 1 for row in result)
    assert list(flat(result)) == list(range(10, 10 + sum(lengths)))
    assert all(len(row[0]) == length - 2 for row in result[:-1])
    with pytest.raises(IndexError):
        found[len(found)]


@pytest.mark.parametrize("kind, length", [(PackedRows, 15), (ChunkedRows, 2)])
def test_arguments_of_rows(tmp_path, tokenizer, kind, length):
    shards = made_shards(tmp_path / "shards", tokenizer, [20], 1)
    with pytest.raises(ValueError, match=f"length must be {length + 1} or more, got {length}"):
        kind(shards, length, tokenizer)
    with pytest.raises(ValueError, match="another tokenizer"):
        kind(shards, 64, DebertaV2Tokenizer.from_pretrained(spm_folder("world")))


def test_every_epoch_is_a_permutation_of_its_own():
    order = SampleOrder(50, 3)
    epochs = [[order[epoch * 50 + i] for i in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len(set(map(tuple, [*epochs, range(50)]))) == 4
    assert [SampleOrder(50, 3)[k] for k in (149, 0, 77)] == [epochs[2][49], epochs[0][0], epochs[1][27]]
    assert [SampleOrder(50, 4)[k] for k in range(50)] != epochs[0]
    assert [SampleOrder(3, 4, shuffle=False)[k] for k in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_arguments_of_the_order():
    for arguments, message in [((0, 0), "rows must be 1"), ((3, -1), "seed must be 0")]:
        with pytest.raises(ValueError, match=message):
            SampleOrder(*arguments)
    with pytest.raises(IndexError):
        SampleOrder(3, 0)[-1]
    with pytest.raises(TypeError, match="no end"):
        list(SampleOrder(3, 0))
