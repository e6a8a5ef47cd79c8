"""Loading, saving, copying, and files that are missing, damaged or hostile."""

import copy
import json
import os
import pickle
import shutil

import pytest
from test_tokenization import ALL, FAST, SLOW, make
from test_tokenization_backends import Touch
from tokenizer_files import (
    byte_level_folder,
    processor,
    save_bpe_encoder,
    spm_folder,
    spm_model,
    texts,
    texts_with_specials,
)

from deberta_fast.tokenization import (
    AddedToken,
    DebertaTokenizer,
    DebertaTokenizerFast,
    DebertaV2Tokenizer,
    DebertaV2TokenizerFast,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TEXTS = [*texts()[::25], *texts_with_specials()[::5], "a <new>b <l> c <x> d", ""]
every = pytest.mark.parametrize("kind", ALL)


def published(kind):
    """A folder such as the hub's: no more than the vocabulary."""
    return spm_folder() if "V2" in kind.__name__ else byte_level_folder()


def same(tokenizer, other):
    assert type(tokenizer) is type(other)
    assert dict(tokenizer(TEXTS)) == dict(other(TEXTS))
    pairs = list(zip(TEXTS[:30], TEXTS[5:]))
    options = dict(padding=True, truncation=True, max_length=9)
    assert dict(tokenizer(pairs, **options)) == dict(other(pairs, **options))
    assert tokenizer.get_vocab() == other.get_vocab() and len(tokenizer) == len(other)
    assert tokenizer.special_tokens_map == other.special_tokens_map
    assert tokenizer.all_special_ids == other.all_special_ids
    assert tokenizer.added_tokens_decoder == other.added_tokens_decoder
    for name in ("padding_side", "truncation_side", "model_max_length", "clean_up_tokenization_spaces"):
        assert getattr(tokenizer, name) == getattr(other, name), name
    ids = tokenizer(TEXTS)["input_ids"]
    assert tokenizer.batch_decode(ids) == other.batch_decode(ids)


@every
def test_from_pretrained(kind, tmp_path):
    same(kind.from_pretrained(published(kind)), make(kind))
    same(kind.from_pretrained(str(published(kind))), make(kind))
    shutil.copytree(published(kind), tmp_path / "model")
    # Like Microsoft's, this config holds only the model's own settings.
    config = dict(tokenizer_class=kind.__name__.removesuffix("Fast"), model_max_length=512, vocab_type="spm")
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = kind.from_pretrained(tmp_path / "model")
    assert tokenizer.model_max_length == 512
    assert kind.from_pretrained(tmp_path / "model", model_max_length=64).model_max_length == 64


OPTIONS = {
    "plain": {},
    "sides": dict(padding_side="left", truncation_side="left", model_max_length=33),
    "tokens": dict(additional_special_tokens=["<x>"], mask_token=AddedToken("<m>", lstrip=True, special=True)),
    "unsplit": dict(clean_up_tokenization_spaces=True, split_special_tokens=True),
    "lower": dict(do_lower_case=True),
    "punctuation": dict(split_by_punct=True),
    "prefix": dict(add_prefix_space=True),
}
CASES = [
    pytest.param(kind, options, id=f"{kind.__name__}-{name}")
    for kind in ALL
    for name, options in OPTIONS.items()
    if name not in (("prefix",) if "V2" in kind.__name__ else ("lower", "punctuation"))
]


@pytest.mark.parametrize("kind, options", CASES)
def test_save_and_load(kind, options, tmp_path):
    tokenizer = make(kind, **options)
    tokenizer.add_tokens(["<new>", AddedToken("<l>", lstrip=True)])
    # Options of a call do not go into the files.
    tokenizer(TEXTS, padding="max_length", max_length=7, truncation=True)
    paths = tokenizer.save_pretrained(tmp_path / "a/b")
    assert set(map(str, paths)) == {str(path) for path in (tmp_path / "a/b").iterdir()}
    if kind in FAST:
        state = json.loads((tmp_path / "a/b/tokenizer.json").read_text("utf-8"))
        assert state["padding"] is state["truncation"] is None
    loaded = kind.from_pretrained(tmp_path / "a/b")
    same(tokenizer, loaded)
    loaded.save_pretrained(tmp_path / "again")
    for path in (tmp_path / "a/b").iterdir():
        if path.name != "tokenizer.json":  # whose numbers are rounded once more
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    same(tokenizer, kind.from_pretrained(tmp_path / "again"))
    if kind in FAST:
        for name in ("spm.model", "vocab.json", "merges.txt"):
            (tmp_path / "again" / name).unlink(missing_ok=True)
        same(tokenizer, kind.from_pretrained(tmp_path / "again"))


@pytest.mark.parametrize("slow, fast", list(zip(SLOW, FAST)))
def test_slow_and_fast(slow, fast, tmp_path):
    """Either loads what the other saved, with the same ids."""
    for first, second in ((slow, fast), (fast, slow)):
        tokenizer = make(first)
        tokenizer.add_tokens(["<new>"])
        tokenizer.add_special_tokens(dict(pad_token="<padding>", additional_special_tokens=["<x>"]))
        folder = tmp_path / first.__name__
        tokenizer.save_pretrained(folder)
        other = second.from_pretrained(folder)
        assert other.get_vocab() == tokenizer.get_vocab()
        assert other.special_tokens_map == tokenizer.special_tokens_map
        for text in ("the [MASK] class", "<new> class of", "<x> str", "a"):
            assert other(text, "b")["input_ids"] == tokenizer(text, "b")["input_ids"], text


@pytest.mark.parametrize("kind", [DebertaV2Tokenizer, DebertaV2TokenizerFast])
def test_spm_model_stays_as_it_is(kind, tmp_path):
    make(kind).save_pretrained(tmp_path)
    assert (tmp_path / "spm.model").read_bytes() == open(spm_model(), "rb").read()


@every
def test_copies(kind):
    tokenizer = make(kind)
    tokenizer.add_tokens(["<new>"])
    same(tokenizer, pickle.loads(pickle.dumps(tokenizer)))
    copied = copy.deepcopy(tokenizer)
    same(tokenizer, copied)
    copied.add_tokens(["<other>"])
    copied.padding_side = "left"
    assert len(copied) == len(tokenizer) + 1 and tokenizer.padding_side == "right"
    rows = pickle.loads(pickle.dumps(tokenizer(TEXTS[:5])))
    assert dict(rows) == dict(tokenizer(TEXTS[:5]))


def test_sampling_is_saved(tmp_path):
    options = dict(enable_sampling=True, nbest_size=-1, alpha=0.1)
    tokenizer = make(DebertaV2Tokenizer, sp_model_kwargs=options)
    tokenizer.save_pretrained(tmp_path)
    for other in (DebertaV2Tokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert other.sp_model_kwargs == options
        rows = {tuple(other("the class of strings and lists")["input_ids"]) for _ in range(20)}
        assert len(rows) > 1


# Microsoft's bpe_encoder.bin


@pytest.mark.parametrize("kind", [DebertaTokenizer, DebertaTokenizerFast])
def test_bpe_encoder(kind, tmp_path):
    save_bpe_encoder(tmp_path / "bpe_encoder.bin")
    same(kind.from_pretrained(tmp_path), make(kind))


@pytest.mark.parametrize("kind", [DebertaTokenizer, DebertaTokenizerFast])
def test_hostile_bpe_encoder(kind, tmp_path):
    for legacy in (True, False):
        save_bpe_encoder(tmp_path / "bpe_encoder.bin", Touch(tmp_path / "harm"), legacy)
        with pytest.raises(ValueError, match="bpe_encoder.bin.*mkdir"):
            kind.from_pretrained(tmp_path)
    assert not (tmp_path / "harm").exists()


# Missing and damaged files


@every
def test_missing(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"spm\.model|vocab\.json"):
        kind.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        kind.from_pretrained(tmp_path / "absent/deeper/still")
    with pytest.raises(TypeError):
        kind.from_pretrained(None)
    with pytest.raises(TypeError, match="nonsense"):
        kind.from_pretrained(published(kind), nonsense=1)
    absent = [str(tmp_path / "absent")] * (1 if "V2" in kind.__name__ else 2)
    with pytest.raises(FileNotFoundError, match="absent"):
        kind(*absent)
    if "V2" not in kind.__name__:
        shutil.copy(byte_level_folder() / "vocab.json", tmp_path)
        with pytest.raises(FileNotFoundError, match="merges.txt"):
            kind.from_pretrained(tmp_path)


def damaged(kind, tmp_path, name, content):
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    make(kind).save_pretrained(folder)
    (folder / name).write_bytes(content)
    if name != "tokenizer.json" and name in ("spm.model", "vocab.json", "merges.txt"):
        (folder / "tokenizer.json").unlink(missing_ok=True)
    return folder


JSON = [b"", b"{", b"[1, 2]", b"\xff\xfe", b"null", b'"text"']


@every
@pytest.mark.parametrize("content", JSON, ids=repr)
def test_wrong_json(kind, content, tmp_path):
    names = ["tokenizer_config.json"]
    names += ["tokenizer.json"] if kind in FAST else []
    names += ["vocab.json"] if "V2" not in kind.__name__ else []
    for name in names:
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            kind.from_pretrained(damaged(kind, tmp_path, name, content))


@pytest.mark.parametrize("kind", [DebertaTokenizer, DebertaTokenizerFast])
@pytest.mark.parametrize("content", [b'{"a": "b"}', b'{"a": 1.5}', b'{"a": null}'], ids=repr)
def test_wrong_vocab(kind, content, tmp_path):
    with pytest.raises(ValueError, match=r"vocab\.json"):
        kind.from_pretrained(damaged(kind, tmp_path, "vocab.json", content))


@pytest.mark.parametrize("kind", [DebertaTokenizer, DebertaTokenizerFast])
@pytest.mark.parametrize("content", [b"#version: 0.2\na b c\n", b"#version: 0.2\nabc\n", b"\xff\xfe"], ids=repr)
def test_wrong_merges(kind, content, tmp_path):
    with pytest.raises(ValueError, match=r"merges\.txt"):
        kind.from_pretrained(damaged(kind, tmp_path, "merges.txt", content))


@pytest.mark.parametrize("kind", [DebertaV2Tokenizer, DebertaV2TokenizerFast])
def test_wrong_spm(kind, tmp_path):
    content = open(spm_model(), "rb").read()
    contents = [b"", b"text", content[:500], content[:15000], content[:-50], b"\0" * 100, content[:100] + content]
    for damage in contents:
        with pytest.raises(ValueError, match=r"spm\.model"):
            kind.from_pretrained(damaged(kind, tmp_path, "spm.model", damage))


@every
def test_other_tokenizer(kind, tmp_path):
    make(kind).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    other = "DebertaTokenizer" if "V2" in kind.__name__ else "DebertaV2Tokenizer"
    path.write_text(json.dumps(config | {"tokenizer_class": other}))
    with pytest.raises(ValueError, match=other):
        kind.from_pretrained(tmp_path)


@every
def test_where_to_save(kind, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((NotADirectoryError, FileExistsError), match="file"):
        make(kind).save_pretrained(tmp_path / "file")
    files = make(kind).save_vocabulary(str(tmp_path), filename_prefix="my")
    assert all(os.path.basename(file).startswith("my-") and os.path.isfile(file) for file in files)
    if "V2" in kind.__name__:
        assert len(DebertaV2Tokenizer(files[0])) == len(processor()) + 1
    else:
        assert len(DebertaTokenizer(*files)) == len(make(kind))


@every
def test_a_full_disk_loses_no_file(kind, tmp_path, monkeypatch):
    make(kind).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changed = make(kind)
    changed.add_tokens(["<new>"])
    real = os.fsync
    for step in range(len(before)):
        left = [step]

        def full(descriptor, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            changed.save_pretrained(tmp_path)
        monkeypatch.setattr(os, "fsync", real)
        assert not list(tmp_path.glob("*.unfinished"))
        assert kind.from_pretrained(tmp_path)("A text.") == make(kind)("A text.")


@every
def test_links_are_replaced_not_followed(kind, tmp_path):
    make(kind).save_pretrained(tmp_path / "first")
    (tmp_path / "cache").mkdir()
    for path in list((tmp_path / "first").iterdir()):
        path.rename(tmp_path / "cache" / path.name)
        path.symlink_to(tmp_path / "cache" / path.name)
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    make(kind, additional_special_tokens=["<x>"]).save_pretrained(tmp_path / "first")
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before
