"""Parquet files and Hugging Face datasets as sources of documents."""

import itertools
import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizer_files import spm_folder

from deberta_fast import DebertaV2Tokenizer
from deberta_fast.pretraining.shards import write_shards
from deberta_fast.pretraining.sources import Sources
from deberta_fast.pretraining.streaming import StreamedRows

TEXTS = [f"Text number {i} ü. " * (1 + i % 5) if i % 6 else (None if i % 4 else " ") for i in range(50)]
EXPECTED = [(i, (text or "").strip()) for i, text in enumerate(TEXTS)]


def parquet(path, texts=TEXTS, name="text", group=7):
    columns = {"id": list(range(len(texts))), name: texts}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=group)
    return path


def json_file(path):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def dataset(folder, **options):
    # Not Dataset.from_list: the dill of these versions cannot pickle its table.
    return datasets.load_dataset(
        "json", data_files=json_file(folder / "a.json"), split="train", cache_dir=str(folder / "cache"), **options
    )


KINDS = {
    "parquet": lambda folder: Sources(parquet(folder / "a.parquet")),
    "two-files": lambda folder: Sources(
        [parquet(folder / "a.parquet", TEXTS[:20]), parquet(folder / "b.parquet", TEXTS[20:])]
    ),
    "map-style": lambda folder: Sources(texts=dataset(folder)),
    "iterable": lambda folder: Sources(texts=dataset(folder).to_iterable_dataset()),
    "streamed-json": lambda folder: Sources(texts=dataset(folder, streaming=True)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_documents_have_their_numbers(tmp_path, kind):
    sources = KINDS[kind](tmp_path)
    sources.check()
    assert list(sources.numbered()) == EXPECTED
    assert list(sources) == [text for _, text in EXPECTED if text]
    for start, rank, ranks in [(1, 0, 1), (13, 0, 1), (14, 1, 3), (21, 2, 3), (49, 0, 2), (50, 0, 1), (60, 0, 1)]:
        expected = [pair for pair in EXPECTED if pair[0] >= start and pair[0] % ranks == rank]
        assert list(sources.numbered(start, rank, ranks)) == expected


def test_a_dataset_by_name_is_streamed(tmp_path, monkeypatch):
    json_file(tmp_path / "train.jsonl")  # A folder is a dataset too.
    asked, load = [], datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append(k) or load(*a, **k))
    sources = Sources(dataset=str(tmp_path))
    assert list(sources.numbered()) == EXPECTED
    assert list(sources.numbered(20)) == EXPECTED[20:]
    assert asked[0] == {"split": "train", "streaming": True}


def test_row_groups_are_skipped(tmp_path, monkeypatch):
    path, read = parquet(tmp_path / "a.parquet"), []
    own = pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "iter_batches",
        lambda self, *a, **k: read.append(k["row_groups"]) or own(self, *a, **k),
    )
    assert list(Sources(path).numbered(30)) == EXPECTED[30:]
    assert read == [[4], [5], [6], [7]]


def test_errors_name_file_and_row(tmp_path):
    with pytest.raises(ValueError, match=r"a.parquet: there is no column 'text', but id, body"):
        Sources(parquet(tmp_path / "a.parquet", name="body")).check()
    numbers = parquet(tmp_path / "b.parquet", [1, 2, 3])
    with pytest.raises(ValueError, match=r"b.parquet, row 0, field 'text': expected text, got int"):
        Sources(numbers).check()
    with pytest.raises(ValueError, match=r"c.parquet holds no text"):
        Sources(parquet(tmp_path / "c.parquet", [None, ""])).check()
    whole = parquet(tmp_path / "d.parquet").read_bytes()
    (tmp_path / "d.parquet").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"d.parquet is damaged"):
        Sources(tmp_path / "d.parquet").check()
    with pytest.raises(ValueError, match=r"texts, item 0: there is no field 'body', but text"):
        Sources(texts=dataset(tmp_path), text_field="body").check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_resumes_at_the_next_row(tmp_path, kind):
    tokenizer = DebertaV2Tokenizer.from_pretrained(spm_folder())
    sources = KINDS[kind](tmp_path)
    make = lambda: StreamedRows(sources, tokenizer, 32, shuffle_rows=4, rank=1, ranks=2)
    taken = lambda stream, count: [row.input_ids.tolist() for row in itertools.islice(stream, count)]
    whole = taken(make(), 120)
    for cut in (3, 20, 70):
        stream, resumed = make(), make()
        taken(stream, cut)
        resumed.load_state_dict(stream.state_dict())
        assert taken(resumed, 40) == whole[cut : cut + 40]


def test_shards_of_parquet(tmp_path):
    tokenizer = DebertaV2Tokenizer.from_pretrained(spm_folder())
    shards = write_shards(KINDS["parquet"](tmp_path), tokenizer, tmp_path / "shards", shard_tokens=200)
    ids = tokenizer([text for _, text in EXPECTED if text], add_special_tokens=False)["input_ids"]
    assert np.array_equal(shards.ids(0, shards.tokens), np.concatenate(ids))
    assert shards.empty == sum(not text for _, text in EXPECTED)
