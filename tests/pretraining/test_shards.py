import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizer_files import byte_level_files, sentences, spm_folder

from deberta_fast import DebertaTokenizer, DebertaTokenizerFast, DebertaV2Tokenizer, DebertaV2TokenizerFast
from deberta_fast.pretraining.encoding import tokenizer_fingerprint
from deberta_fast.pretraining.shards import Shards, write_shards
from deberta_fast.pretraining.sources import Sources


@pytest.fixture(scope="module")
def tokenizer():
    return DebertaV2Tokenizer.from_pretrained(spm_folder())


def corpus():
    """Some hundred documents of different lengths, and empty ones among them and at the end."""
    lines = sentences()
    documents = [". ".join(lines[i : i + 1 + i % 5]) for i in range(0, 300, 2)]
    documents[7] = documents[40] = " "
    return [*documents, "", "\n"]


def expected_ids(tokenizer):
    return [ids for text in corpus() if text.strip() for ids in [tokenizer.encode(text, add_special_tokens=False)]]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def written(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "new"
    return write_shards(Sources(texts=corpus()), tokenizer, folder, shard_tokens=1000)


def test_shards_hold_every_document(written, tokenizer):
    expected = expected_ids(tokenizer)
    assert (written.documents, written.empty) == (len(expected), 4)
    assert written.tokens == sum(map(len, expected)) and written.vocab_size == len(tokenizer)
    assert len(written._tokens) > 3  # several shards, or the rest proves little
    joined, ends = np.concatenate(expected), np.cumsum([len(ids) for ids in expected])
    for start, stop in [(0, written.tokens), (0, 0), (900, 3100), (written.tokens - 1, written.tokens)]:
        assert written.ids(start, stop).dtype == np.int64
        assert np.array_equal(written.ids(start, stop), joined[start:stop])
    for start, stop in [(0, len(ends)), (3, 3), (5, 90), (60, 61), (len(ends) - 1, len(ends))]:
        assert np.array_equal(written.ends(start, stop), ends[start:stop])
    for token in (0, ends[0] - 1, ends[0], ends[50] - 1, ends[50], ends[-1] - 1):
        assert written.document_at(int(token)) == np.searchsorted(ends, token, side="right")
    for start, stop in [(-1, 2), (2, 1), (0, written.tokens + 1)]:
        with pytest.raises(IndexError, match="there are"):
            written.ids(start, stop)
    with pytest.raises(IndexError):
        written.document_at(written.tokens)


def test_an_ordinary_corpus_makes_one_shard_of_uint16(tokenizer, tmp_path):
    shards = write_shards(Sources(texts=corpus()), tokenizer, tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"shards.json", "00000.tokens", "00000.ends"}
    assert (tmp_path / "new" / "00000.tokens").stat().st_size == 2 * shards.tokens
    assert np.array_equal(shards.ids(0, shards.tokens), np.concatenate(expected_ids(tokenizer)))


def test_ids_beyond_16_bits(tokenizer, tmp_path):
    large = DebertaV2Tokenizer.from_pretrained(spm_folder())
    large.add_tokens([f"<{i}>" for i in range(65000)])
    shards = write_shards(Sources(texts=["a <64999> b"]), large, tmp_path / "new")
    assert shards.ids(0, shards.tokens).tolist() == large.encode("a <64999> b", add_special_tokens=False)
    assert max(shards.ids(0, shards.tokens)) > 2**16


def test_pickled_shards_open_the_files_again(written):
    sent = pickle.dumps(written)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent).ids(0, written.tokens), written.ids(0, written.tokens))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [0, 3, 60, 120, 151])
def test_a_stopped_call_is_continued_to_the_same_bytes(written, tokenizer, tmp_path, monkeypatch, at):
    documents, stopping = corpus(), False

    def texts():
        for i, text in enumerate(documents):
            if stopping and i == at:
                raise Stopped
            yield text

    starts, numbered = [], Sources.numbered
    monkeypatch.setattr("deberta_fast.pretraining.encoding._DOCUMENTS", 3)
    monkeypatch.setattr(Sources, "check", lambda self: None)
    monkeypatch.setattr(Sources, "numbered", lambda self, start: starts.append(start) or numbered(self, start))
    write = lambda folder: write_shards(Sources(texts=texts), tokenizer, folder, shard_tokens=1000)
    write(tmp_path / "whole")
    stopping = True
    with pytest.raises(Stopped):
        write(tmp_path / "new")
    with pytest.raises(ValueError, match="is not finished"):
        Shards(tmp_path / "new")
    stopping = False
    write(tmp_path / "new")
    assert starts[:2] == [0, 0] and (starts[2] > at - 30 if at >= 60 else starts[2] == 0)
    assert contents(tmp_path / "new") == contents(tmp_path / "whole")


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_call_with_processes_is_continued_to_the_same_bytes(tokenizer, tmp_path):
    text = tmp_path / "corpus.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in corpus() * 30))
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    program = f"""
from deberta_fast import DebertaV2Tokenizer
from deberta_fast.pretraining import shards, sources

tokenizer = DebertaV2Tokenizer.from_pretrained({str(spm_folder())!r})
shards.write_shards(sources.Sources({str(text)!r}), tokenizer, {str(folder)!r}, shard_tokens=20000, processes=2)
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait_until(lambda: (folder / "00002.tokens.unfinished").exists() or process.poll() is not None)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        process.kill()
        process.wait()
    assert len(children) >= 2
    assert len(json.loads((folder / "shards.json").read_text())["shards"]) >= 2
    wait_until(lambda: not any(map(alive, children)))
    with pytest.raises(ValueError, match="is not finished"):
        Shards(folder)
    for place in (folder, whole):
        write_shards(Sources(text), tokenizer, place, shard_tokens=20000)
    assert contents(folder) == contents(whole)


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_finished_folder_is_left_as_it_is(written, tokenizer):
    before = contents(written.folder)

    class Untouched(list):
        def __iter__(self):
            raise AssertionError("read")

    Untouched.__name__ = "list"  # which is all that the folder knows of the sources, besides their number
    write_shards(Sources(texts=Untouched(corpus())), tokenizer, written.folder, shard_tokens=1000)
    assert contents(written.folder) == before


def test_other_arguments_are_refused(written, tokenizer):
    before, sources = contents(written.folder), Sources(texts=corpus())
    lower = DebertaV2Tokenizer.from_pretrained(spm_folder(), do_lower_case=True)
    with pytest.raises(ValueError, match="other arguments, which differ in shard_tokens: 1000, now 999"):
        write_shards(sources, tokenizer, written.folder, shard_tokens=999)
    with pytest.raises(ValueError, match="other arguments, which differ in tokenizer"):
        write_shards(sources, lower, written.folder, shard_tokens=1000)
    with pytest.raises(ValueError, match="other arguments, which differ in sources"):
        write_shards(Sources(texts=["a"]), tokenizer, written.folder, shard_tokens=1000)
    assert contents(written.folder) == before


def test_a_folder_with_other_files_is_refused(tokenizer, tmp_path):
    (tmp_path / "notes").write_text("keep me")
    with pytest.raises(ValueError, match="no shards.json, but other files, such as notes"):
        write_shards(Sources(texts=["a"]), tokenizer, tmp_path)
    with pytest.raises(NotADirectoryError):
        write_shards(Sources(texts=["a"]), tokenizer, tmp_path / "notes")
    with pytest.raises(FileNotFoundError, match="there is no shards.json"):
        Shards(tmp_path)


def test_nothing_to_write_is_an_error(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="holds no text"):
        write_shards(Sources(texts=[" "]), tokenizer, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    for name in ("shard_tokens", "processes"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of 1 or more, got 0"):
            write_shards(Sources(texts=["a"]), tokenizer, tmp_path / "new", **{name: 0})


@pytest.fixture
def copied(written, tmp_path):
    for name, content in contents(written.folder).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("name", ["00001.tokens", "00002.ends"])
def test_damaged_files_are_named(copied, name):
    path = copied / name
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(
        ValueError, match=f"{name} is damaged: it has {len(content) - 2} bytes, expected {len(content)}"
    ):
        Shards(copied)
    path.write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:])
    with pytest.raises(ValueError, match=f"{name} is damaged: its CRC-32"):
        Shards(copied).check()
    path.write_bytes(content)
    Shards(copied).check()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Shards(copied)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 1}', '{"format": 2}'])
def test_a_damaged_index_is_named(copied, content):
    (copied / "shards.json").write_text(content)
    with pytest.raises(ValueError, match="shards.json"):
        Shards(copied)


def test_another_tokenizer_is_refused(written, tokenizer):
    written.check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="made by another tokenizer"):
        written.check_tokenizer(DebertaV2Tokenizer.from_pretrained(spm_folder("world")))


def test_fingerprints_follow_what_alters_ids():
    folder = spm_folder()
    first = tokenizer_fingerprint(DebertaV2Tokenizer.from_pretrained(folder))
    assert tokenizer_fingerprint(DebertaV2TokenizerFast.from_pretrained(folder)) == first
    assert tokenizer_fingerprint(pickle.loads(pickle.dumps(DebertaV2Tokenizer.from_pretrained(folder)))) == first
    changes = [dict(do_lower_case=True), dict(split_by_punct=True), dict(split_special_tokens=True)]
    changes += [dict(mask_token="<mask>"), dict(additional_special_tokens=["<a>"]), dict(cls_token="[SEP]")]
    found = {tokenizer_fingerprint(DebertaV2Tokenizer.from_pretrained(folder, **change)) for change in changes}
    assert len(found | {first}) == len(changes) + 1
    v1 = [tokenizer_fingerprint(kind(*byte_level_files())) for kind in (DebertaTokenizer, DebertaTokenizerFast)]
    assert v1[0] == v1[1] != first
