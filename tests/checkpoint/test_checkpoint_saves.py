"""Saves that are killed, run at the same time, are read meanwhile or fill the disk: loads find one whole checkpoint."""

import itertools
import json
import os
import stat
import sys
import threading
import warnings

import pytest
import torch
from native_models import settings

import deberta_fast
from deberta_fast import DebertaV2Config, DebertaV2Model
from deberta_fast.checkpoint import replace

WHOLE, SHARDS = "1GB", "20KB"
sizes = pytest.mark.parametrize("before, after", [*itertools.product((WHOLE, SHARDS), repeat=2)])


def model(number, **changes):
    """A model whose weights and whose configuration both say ``number``."""
    built = DebertaV2Model(DebertaV2Config(**settings("v3", layer_norm_eps=number * 1e-3, **changes)))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.fill_(number)
    return built


def number_of(folder):
    """The number of the model in a folder, which must not mix several models."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # about parameters that are initialised or left over
        found = DebertaV2Model.from_pretrained(folder)
    (number,) = {float(x) for tensor in found.state_dict().values() for x in tensor.unique()}
    assert found.config.layer_norm_eps == number * 1e-3
    return number


def kill_at(step, folder):
    """Ends this process before its ``step``-th change of a file in ``folder``. Opening a file to write is a change."""
    left = step

    def hook(event, arguments):
        nonlocal left
        if event == "open":
            changes = isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
        else:
            changes = event in ("os.rename", "os.remove")
        if changes and str(arguments[0]).startswith(str(folder)):
            left -= 1
            if left < 0:
                os._exit(9)

    sys.addaudithook(hook)


@sizes
def test_killed_at_any_step(tmp_path, before, after):
    old, new = model(1), model(2)
    found = []
    for step in range(40):
        folder = tmp_path / str(step)
        old.save_pretrained(folder, max_shard_size=before)
        child = os.fork()
        if child == 0:
            kill_at(step, folder)
            new.save_pretrained(folder, max_shard_size=after)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found.append(number_of(folder))
        old.save_pretrained(folder, max_shard_size=before)
        assert number_of(folder) == 1
        assert sum(x.suffix != ".safetensors" for x in folder.iterdir()) == (1 if before == WHOLE else 2)
        if status == 0:
            break
        assert status == 9
    assert found == sorted(found) and found.count(1) >= 4 and found[-1] == 2 and len(found) < 40


def test_killed_with_what_others_write_after(tmp_path, monkeypatch):
    """The configuration that is kept for the old weights does not hide a config.json that is saved later."""
    model(1).save_pretrained(tmp_path)
    real = os.replace

    def killed(source, target):
        if str(target).endswith("model.safetensors"):
            os._exit(9)
        real(source, target)

    child = os.fork()
    if child == 0:
        os.replace = killed
        model(2).save_pretrained(tmp_path)
    os.waitpid(child, 0)
    assert json.loads((tmp_path / "config.json").read_text())["layer_norm_eps"] == 2e-3
    assert number_of(tmp_path) == 1
    assert DebertaV2Config.from_pretrained(tmp_path).layer_norm_eps == 1e-3
    config = model(3).config
    config.save_pretrained(tmp_path)
    assert DebertaV2Config.from_pretrained(tmp_path) == config


@sizes
def test_stopped_at_any_step(tmp_path, monkeypatch, before, after):
    """After a full disk the old checkpoint is still there, and no unfinished file is."""
    folder, real = tmp_path / "model", os.replace
    for step in range(20):
        model(1).save_pretrained(folder, max_shard_size=before)
        files = sorted(x.name for x in folder.iterdir())
        count = itertools.count()

        def full(source, target, count=count, step=step):
            if next(count) == step:
                raise OSError(28, "No space left on device")
            real(source, target)

        monkeypatch.setattr(os, "replace", full)
        try:
            model(2).save_pretrained(folder, max_shard_size=after)
        except OSError:
            monkeypatch.setattr(os, "replace", real)
            assert number_of(folder) == 1
            there = sorted(x.name for x in folder.iterdir())
            assert there == files or there == sorted([*files, "model.safetensors.index.json"])
        else:
            break
    assert step >= 2
    assert number_of(folder) == 2


@pytest.mark.parametrize("size", [WHOLE, SHARDS])
def test_several_save_at_once(tmp_path, size):
    for _ in range(3):
        children = []
        for number in (1, 2, 3):
            children.append(os.fork())
            if children[-1] == 0:
                model(number, num_hidden_layers=number).save_pretrained(tmp_path, max_shard_size=size)
                os._exit(0)
        assert all(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 for child in children)
        assert number_of(tmp_path) in (1, 2, 3)
        assert sum(x.suffix != ".safetensors" for x in tmp_path.iterdir()) == (1 if size == WHOLE else 2)


def test_read_while_it_is_saved(tmp_path):
    models = [(model(number), size) for number in (1, 2) for size in (WHOLE, SHARDS)]
    models[0][0].save_pretrained(tmp_path)
    failures, done = [], threading.Event()

    def save():
        try:
            while not done.is_set():
                for saved, size in models:
                    saved.save_pretrained(tmp_path, max_shard_size=size)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=save)
    thread.start()
    try:
        assert {number_of(tmp_path) for _ in range(40)} <= {1, 2}
    finally:
        done.set()
        thread.join()
    assert not failures


def test_replaced_without_end(tmp_path, monkeypatch):
    model(1).save_pretrained(tmp_path)
    counter = itertools.count()
    monkeypatch.setattr(replace, "_identity", lambda source: next(counter))
    with pytest.raises(deberta_fast.checkpoint.CheckpointError, match="was replaced 100 times while it was read"):
        DebertaV2Model.from_pretrained(tmp_path)


def test_links_are_replaced_not_followed(tmp_path):
    blob, folder = tmp_path / "blob", tmp_path / "folder"
    folder.mkdir()
    for name in ("config.json", "config.json.unfinished", "model.safetensors", "model.safetensors.unfinished"):
        for save in (model(1).save_pretrained, model(1).config.save_pretrained):
            blob.write_text("{}")
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(blob)
            save(folder)
            assert blob.read_text() == "{}" and (name.startswith("model") or not (folder / name).is_symlink())
    model(1).save_pretrained(folder)
    assert number_of(folder) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_folder(tmp_path):
    model(1).save_pretrained(tmp_path)
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(PermissionError):
            model(2).save_pretrained(tmp_path)
        assert number_of(tmp_path) == 1
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_a_disk_that_is_full_for_the_configuration(tmp_path, monkeypatch):
    """A save of only the configuration and a save of a model both keep the old checkpoint."""
    model(1).save_pretrained(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        model(2).config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="No space"):
        model(2).save_pretrained(tmp_path)
    assert number_of(tmp_path) == 1
    assert sorted(x.name for x in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
