import io
import itertools
import json

import numpy as np
import pytest
import torch
from tokenizer_files import sentences, spm_folder

from deberta_fast import DebertaV2Tokenizer
from deberta_fast.pretraining.rows import ChunkedRows, PackedRows
from deberta_fast.pretraining.shards import write_shards
from deberta_fast.pretraining.sources import Sources
from deberta_fast.pretraining.streaming import StreamedRows


@pytest.fixture(scope="module")
def tokenizer():
    return DebertaV2Tokenizer.from_pretrained(spm_folder())


def corpus():
    lines = sentences()
    documents = [". ".join(lines[i : i + 1 + i % 7]) for i in range(0, 200, 3)]
    documents[5] = " "
    return [*documents, ". ".join(lines), ""]


def taken(rows, count):
    return [(row.input_ids.tolist(), row.ends.tolist()) for row in itertools.islice(rows, count)]


@pytest.fixture(scope="module")
def shards(tokenizer, tmp_path_factory):
    return write_shards(Sources(texts=corpus()), tokenizer, tmp_path_factory.mktemp("data") / "shards")


@pytest.mark.parametrize("packed, kind", [(True, PackedRows), (False, ChunkedRows)])
def test_the_rows_are_those_of_shards(shards, tokenizer, packed, kind):
    expected = kind(shards, 64, tokenizer)
    expected = [(row.input_ids.tolist(), row.ends.tolist()) for row in (expected[i] for i in range(len(expected)))]
    stream = StreamedRows(Sources(texts=corpus()), tokenizer, 64, packed=packed, shuffle_rows=1)
    row = next(stream)
    assert row.input_ids.dtype == np.int64 and row.ends.dtype == np.int32
    assert [(row.input_ids.tolist(), row.ends.tolist()), *taken(stream, 2 * len(expected) - 1)] == expected * 2


def test_passes_are_shuffled_and_complete(shards, tokenizer):
    expected = PackedRows(shards, 64, tokenizer)
    ordered = sorted(expected[i].input_ids.tolist() for i in range(len(expected)))
    stream = StreamedRows(Sources(texts=corpus()), tokenizer, 64, shuffle_rows=20, seed=1)
    passes = [[ids for ids, _ in taken(stream, len(expected))] for _ in range(2)]
    assert stream.epoch == 1
    assert sorted(passes[0]) == sorted(passes[1]) == ordered
    assert passes[0] != passes[1]
    again = StreamedRows(Sources(texts=corpus()), tokenizer, 64, shuffle_rows=20, seed=1)
    assert [ids for ids, _ in taken(again, len(expected))] == passes[0]
    other = StreamedRows(Sources(texts=corpus()), tokenizer, 64, shuffle_rows=20, seed=2)
    assert [ids for ids, _ in taken(other, len(expected))] != passes[0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_are_disjoint_and_complete(tokenizer, ranks):
    documents = [f"{i} " * (1 + i) for i in range(1, 40)]
    pieces = lambda text: tokenizer.encode(text, add_special_tokens=False)
    found = []
    for rank in range(ranks):
        stream = StreamedRows(Sources(texts=documents), tokenizer, 64, rank=rank, ranks=ranks, shuffle_rows=1)
        rows = []
        while True:
            row = next(stream)
            if stream.epoch:
                break
            rows.append(row.input_ids[~np.isin(row.input_ids, [1, 2])])
        expected = sum((pieces(text) for text in documents[rank::ranks]), [])
        assert np.concatenate(rows).tolist() == expected
        found.append(len(expected))
    assert sum(found) == sum(len(pieces(text)) for text in documents)


CUTS = [0, 1, 17, 40, 130, 400]  # The first pass ends before the last one.


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("cut", CUTS)
def test_a_stream_resumes_at_the_next_row(tmp_path, tokenizer, cut, packed):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus()[:30]))
    (tmp_path / "b.txt").write_text("\n".join(text for text in corpus()[30:]))
    make = lambda: StreamedRows(
        Sources(tmp_path, documents="line"), tokenizer, 64, packed=packed, shuffle_rows=16, seed=5, rank=1, ranks=2
    )
    whole = taken(make(), CUTS[-1] + 60)
    stream = make()
    assert taken(stream, cut) == whole[:cut]
    file = io.BytesIO()
    torch.save(stream.state_dict(), file)
    assert taken(stream, 5) == whole[cut : cut + 5]  # Saving changes nothing.
    file.seek(0)
    resumed = make()
    next(resumed)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert taken(resumed, 60) == whole[cut : cut + 60]
    assert resumed.state_dict()["given"] == cut + 60


def test_the_cuts_lie_where_they_should(tokenizer, tmp_path):
    stream = StreamedRows(Sources(texts=corpus()), tokenizer, 64, shuffle_rows=16, seed=5, rank=1, ranks=2)
    states = []
    for cut in range(CUTS[-1] + 1):
        if cut in CUTS:
            states.append(stream.state_dict())
        next(stream)
    assert states[-1]["epoch"] == 1 and states[-2]["epoch"] == 0
    assert any(len(state["open_ids"]) for state in states)
    assert any(len(state["row_sequences"]) > state["buffered"] for state in states)  # rows of a long document wait


def test_processes_do_not_change_the_order(tokenizer, monkeypatch):
    monkeypatch.setattr("deberta_fast.pretraining.encoding._DOCUMENTS", 3)
    make = lambda processes: StreamedRows(Sources(texts=corpus()), tokenizer, 64, shuffle_rows=8, processes=processes)
    expected = taken(make(0), 100)
    stream = make(2)
    found = taken(stream, 30)
    state = stream.state_dict()
    assert found + taken(stream, 20) == expected[:50]
    stream.load_state_dict(state)
    assert taken(stream, 70) == expected[30:]
    stream.close()
    other = make(0)
    other.load_state_dict(state)
    assert taken(other, 70) == expected[30:]


def test_states_of_something_else_are_refused(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(corpus()))
    make = lambda length=64, tokenizer=tokenizer, **options: StreamedRows(Sources(path), tokenizer, length, **options)
    stream = make()
    next(stream)
    state = stream.state_dict()
    expected = taken(stream, 3)
    lower = DebertaV2Tokenizer.from_pretrained(spm_folder(), do_lower_case=True)
    for other, message in [
        (make(length=65), "length=64, but this is 65"),
        (make(seed=1), "seed=0, but this is 1"),
        (make(ranks=2), "ranks=1, but this is 2"),
        (make(packed=False), "packed=1, but this is 0"),
        (make(shuffle_rows=9), "shuffle_rows=1024, but this is 9"),
        (make(tokenizer=lower), "other tokenizer"),
    ]:
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="it has no .*row_ids"):
        make().load_state_dict({"epoch": 0})
    good = make()
    path.write_text("more " + path.read_text())
    with pytest.raises(ValueError, match="other sources"):
        make().load_state_dict(state)
    good.load_state_dict(state)  # made before the file changed
    assert taken(good, 3) == expected


def test_an_error_in_the_sources_is_no_end(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "good"}) + "\n{bad\n")
    stream = StreamedRows(Sources(path), tokenizer, 64)
    for _ in range(2):
        with pytest.raises(ValueError, match="line 2"):
            next(stream)


def test_arguments(tokenizer):
    sources = Sources(texts=["a", " "])
    for options, message in [
        (dict(length=15), "length must be an integer of 16 or more, got 15"),
        (dict(length=2, packed=False), "length must be an integer of 3 or more"),
        (dict(shuffle_rows=0), "shuffle_rows must be"),
        (dict(rank=1), "rank must be less than ranks=1, got 1"),
        (dict(processes=-1), "processes must be 0 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            StreamedRows(sources, tokenizer, **{"length": 64, **options})
    with pytest.raises(TypeError, match="must be Sources"):
        StreamedRows(["a"], tokenizer, 64)
    with pytest.raises(ValueError, match="holds no text"):
        StreamedRows(Sources(texts=[""]), tokenizer, 64)
    with pytest.raises(ValueError, match="rank 1 of 2 gets no document"):
        next(StreamedRows(sources, tokenizer, 64, rank=1, ranks=2))
