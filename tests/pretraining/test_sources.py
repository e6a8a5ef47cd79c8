import gzip
import json
import sys

import pytest

from deberta_fast.pretraining.sources import Sources

TEXT = "One\nstill one\n\n\n  \nTwo ü\n \nThree"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def json_lines(texts, field="text"):
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts))


def test_blank_lines_end_documents(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbf" + TEXT.encode())
    assert list(Sources(path)) == ["One\nstill one", "Two ü", "Three"]
    assert list(Sources(write(tmp_path / "b.txt", TEXT.replace("\n", "\r\n")))) == [
        "One\r\nstill one",
        "Two ü",
        "Three",
    ]


def test_each_line_is_a_document_and_empty_ones_keep_their_numbers(tmp_path):
    sources = Sources(write(tmp_path / "a.txt", TEXT), documents="line")
    assert list(sources.numbered()) == list(enumerate(["One", "still one", "", "", "", "Two ü", "", "Three"]))
    assert list(sources) == ["One", "still one", "Two ü", "Three"]


def test_folders_are_read_in_sorted_order(tmp_path):
    write(tmp_path / "c.jsonl", json_lines(["c", None, "d"]))
    write(tmp_path / "b" / "x.json.gz", gzip.compress(json_lines(["b"]).encode()))
    write(tmp_path / "a.txt.gz", gzip.compress(b"a"))
    write(tmp_path / "README.md", "not this")
    sources = Sources(tmp_path)
    assert list(sources) == ["a", "b", "c", "d"]
    assert [name for name, _ in sources.description()["files"]] == ["a.txt.gz", "b/x.json.gz", "c.jsonl"]
    assert list(Sources([tmp_path / "c.jsonl", tmp_path / "a.txt.gz"])) == ["c", "d", "a"]


def test_texts_of_python():
    items = ["a", {"body": "b"}, {"body": None}, "  "]
    assert list(Sources(texts=items, text_field="body").numbered()) == [(0, "a"), (1, "b"), (2, ""), (3, "")]
    assert list(Sources(texts=lambda: iter("abc")).numbered(1)) == [(1, "b"), (2, "c")]
    with pytest.raises(TypeError, match="can be read again"):
        Sources(texts=iter("abc"))
    with pytest.raises(ValueError, match=r"texts, item 1: expected text, got int"):
        list(Sources(texts=["a", 1]))


@pytest.mark.parametrize("start, rank, ranks", [(0, 0, 1), (3, 0, 1), (4, 1, 3), (9, 0, 2), (100, 0, 1)])
def test_start_and_rank_choose_by_number(tmp_path, start, rank, ranks):
    write(tmp_path / "a.txt", TEXT)
    write(tmp_path / "b.jsonl", json_lines(f"line {i}" if i % 3 else "" for i in range(7)))
    for sources in (Sources(tmp_path), Sources(texts=list(Sources(tmp_path)))):
        everything = list(sources.numbered())
        expected = [pair for pair in everything if pair[0] >= start and pair[0] % ranks == rank]
        assert list(sources.numbered(start, rank, ranks)) == expected


def test_documents_left_out_are_not_decoded(tmp_path):
    sources = Sources(write(tmp_path / "a.jsonl", "{bad\n" + json_lines(["b"])))
    assert list(sources.numbered(1)) == [(1, "b")]


BAD = {
    "bad-json": ("a.jsonl", json_lines(["a"]) + "{bad}\n", r"a.jsonl, line 2: expected a JSON object: Expecting"),
    "no-object": ("a.jsonl", json_lines(["a"]) + "[1]\n", r"a.jsonl, line 2: expected a JSON object, got list"),
    "no-field": ("a.jsonl", json_lines(["a"], "body"), r"a.jsonl, line 1: there is no field 'text', but id, body"),
    "no-text": ("a.jsonl", json_lines(["a", 3]), r"a.jsonl, line 2, field 'text': expected text, got int"),
    "surrogate": (
        "a.jsonl",
        '{"text": "a\\ud800"}',
        r"a.jsonl, line 1, field 'text': half a surrogate pair at char.* 1",
    ),
    "no-utf8": ("a.jsonl", json_lines(["a"]).encode() + b'{"text": "\xff"}', r"a.jsonl, line 2: expected UTF-8"),
    "text-no-utf8": ("a.txt", b"one\n\ntwo\nstill \xff two", r"a.txt, line 4: expected UTF-8"),
    "cut-gzip": ("a.txt.gz", gzip.compress(TEXT.encode() * 99)[:-20], r"a.txt.gz is damaged"),
    "no-gzip": ("a.txt.gz", TEXT, r"a.txt.gz is damaged"),
    "empty": ("a.txt", "", r"a.txt is empty"),
    "suffix": ("a.csv", "a,b", r"a.csv: expected a file that ends in .txt"),
}


@pytest.mark.parametrize("name, content, message", BAD.values(), ids=BAD)
def test_errors_name_file_and_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        list(Sources(write(tmp_path / name, content)))


def test_check_reads_the_first_document_of_every_file(tmp_path):
    write(tmp_path / "a.txt", TEXT)
    Sources(tmp_path).check()
    write(tmp_path / "b.txt", "\n \n")
    with pytest.raises(ValueError, match=r"b.txt holds no text"):
        Sources(tmp_path).check()
    write(tmp_path / "b.jsonl", json_lines(["a"], "body"))
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"b.jsonl, line 1: there is no field"):
        Sources(tmp_path).check()
    with pytest.raises(ValueError, match="texts holds no text"):
        Sources(texts=["", " "]).check()


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="either paths, or a dataset, or texts"):
        Sources()
    with pytest.raises(ValueError, match="either paths, or a dataset, or texts"):
        Sources("a.txt", texts=["a"])
    with pytest.raises(ValueError, match="documents must be"):
        Sources(texts=["a"], documents="page")
    with pytest.raises(FileNotFoundError, match="there is no .*a.txt"):
        Sources(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="holds no file that ends in"):
        Sources(tmp_path)


def test_fingerprint_follows_names_sizes_and_settings(tmp_path):
    path = write(tmp_path / "a.txt", TEXT)
    first = Sources(path).fingerprint()
    assert Sources(path).fingerprint() == first
    assert Sources(path, documents="line").fingerprint() != first
    assert Sources(write(tmp_path / "b.txt", TEXT)).fingerprint() != first
    write(path, TEXT + "!")
    assert Sources(path).fingerprint() != first


@pytest.mark.parametrize("library", ["pyarrow", "datasets"])
def test_a_missing_library_is_named(tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    sources = Sources(write(tmp_path / "a.parquet", "?")) if library == "pyarrow" else Sources(dataset="x")
    with pytest.raises(ImportError, match=f"pip install {library}"):
        sources.check()
