"""Places of checkpoints: folders, and the files that huggingface_hub has downloaded."""

import sys

import pytest
import torch
from native_models import build, inputs_of
from tokenizer_files import spm_folder

from deberta_fast import DebertaV2Model, DebertaV2Tokenizer
from deberta_fast.checkpoint.hub import Source


@pytest.fixture
def cache(tmp_path):
    """A cache in the layout of huggingface_hub that holds one model."""
    pytest.importorskip("huggingface_hub")
    place = tmp_path / "models--someone--some-model"
    files = place / "snapshots" / ("0" * 40)
    build("v3").save_pretrained(files)
    (files / "spm.model").write_bytes((spm_folder() / "spm.model").read_bytes())
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    return tmp_path


def test_downloaded_model(cache):
    where = dict(cache_dir=cache, local_files_only=True)
    model = DebertaV2Model.from_pretrained("someone/some-model", **where)
    inputs = inputs_of("Model")
    assert torch.equal(model(**inputs)[0], build("v3")(**inputs)[0])
    tokenizer = DebertaV2Tokenizer.from_pretrained("someone/some-model", **where)
    assert tokenizer("A text.")["input_ids"] == DebertaV2Tokenizer.from_pretrained(spm_folder())("A text.")["input_ids"]
    assert Source("someone/some-model", **where).file("tf_model.h5") is None


def test_what_was_never_downloaded(cache):
    with pytest.raises(FileNotFoundError, match="there is no config.json in someone/other"):
        DebertaV2Model.from_pretrained("someone/other", cache_dir=cache, local_files_only=True)
    with pytest.raises(FileNotFoundError, match="there is no config.json in someone/some-model"):
        DebertaV2Model.from_pretrained("someone/some-model", cache_dir=cache, local_files_only=True, revision="v2")


@pytest.mark.parametrize(
    "error, kind, message",
    [
        ("EntryNotFoundError", None, None),
        ("LocalEntryNotFoundError", ConnectionError, "the hub does not answer, and config.json was never downloaded"),
        ("RepositoryNotFoundError", FileNotFoundError, "nor a model of that name and revision on the hub"),
        ("RevisionNotFoundError", FileNotFoundError, "nor a model of that name and revision on the hub"),
        ("GatedRepoError", FileNotFoundError, "on the hub that you may read"),
    ],
)
def test_answers_of_the_hub(error, kind, message, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants, errors

    def download(name, file, **options):
        assert (name, file, options["revision"]) == ("someone/some-model", "config.json", "v2")
        # ``__new__`` needs no response, which ``__init__`` requires.
        raise getattr(errors, error).__new__(getattr(errors, error), "as the hub says")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    source = Source("someone/some-model", revision="v2")
    if kind is None:
        assert source.file("config.json") is None
    else:
        with pytest.raises(kind, match=message):
            source.file("config.json")


def test_without_huggingface_hub(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", None)
    with pytest.raises(ImportError, match="there is no folder 'someone/some-model'; .*pip install huggingface_hub"):
        Source("someone/some-model")
    (tmp_path / "config.json").write_text("{}")
    assert Source(tmp_path).file("config.json") == tmp_path / "config.json"


def test_subfolder(tmp_path):
    build("v3").save_pretrained(tmp_path / "epochs" / "3")
    found = DebertaV2Model.from_pretrained(tmp_path, subfolder="epochs/3")
    inputs = inputs_of("Model")
    assert torch.equal(found(**inputs)[0], build("v3")(**inputs)[0])
    assert str(Source(str(tmp_path), subfolder="epochs/3")) == str(tmp_path / "epochs" / "3")
    assert str(Source(str(tmp_path) + "/", subfolder="")) == str(tmp_path) + "/"
    with pytest.raises(FileNotFoundError, match="there is no subfolder 'epochs/4' in "):
        Source(tmp_path, subfolder="epochs/4")
    for outside in ("../other", "epochs/../../other", "/tmp"):
        with pytest.raises(ValueError, match="expected subfolder to lie below .*, got "):
            Source(tmp_path, subfolder=outside)
    with pytest.raises(TypeError, match="expected subfolder to be text or a path, got int"):
        Source(tmp_path, subfolder=3)


def test_what_the_hub_is_asked_for(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = []
    monkeypatch.setattr(hub, "hf_hub_download", lambda *names, **options: asked.append((names, options)) or tmp_path)
    Source("someone/some-model", subfolder="a/b", force_download=True, token="secret").file("config.json")
    ((names, options),) = asked
    assert names == ("someone/some-model", "config.json")
    assert (options["subfolder"], options["force_download"], options["token"]) == ("a/b", True, "secret")


def test_subfolder_of_the_hubs_cache(cache):
    files = cache / "models--someone--some-model" / "snapshots" / ("0" * 40)
    (files / "part").mkdir()
    (files / "config.json").rename(files / "part" / "config.json")
    where = dict(cache_dir=cache, local_files_only=True)
    assert Source("someone/some-model", subfolder="part", **where).file("config.json") == files / "part" / "config.json"
    with pytest.raises(FileNotFoundError, match="there is no config.json in someone/some-model/other"):
        DebertaV2Model.from_pretrained("someone/some-model", subfolder="other", **where)
