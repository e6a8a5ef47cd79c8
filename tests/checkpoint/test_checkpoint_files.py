"""Files of checkpoints: which are read, what is read from them, and how they are written."""

import json
import os
import re
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch
from checkpoint_files import (
    TENSORS,
    as_keras,
    assert_same,
    native,
    read,
    read_only,
    write_index,
    write_keras,
)
from safetensors import safe_open
from safetensors.torch import save_file

from deberta_fast.checkpoint import files as checkpoint_files_module
from deberta_fast.checkpoint import read_tensors, write_tensors
from deberta_fast.checkpoint.hub import Source

# Reading


def test_files_are_sought_in_order(tmp_path):
    write_keras(tmp_path / "tf_model.h5", {"layer": {"m/x:0": torch.zeros(1)}})
    for i, name in enumerate(["pytorch_model.bin.index.json", "pytorch_model.bin"]):
        assert read_tensors(Source(tmp_path))[1] == ["tf_model.h5", "pytorch_model.bin.index.json"][i]
        if name.endswith("json"):
            write_index(tmp_path, {"x": "pytorch_model-0001.bin"}, name)
        torch.save({"x": torch.ones(1)}, tmp_path / ("pytorch_model-0001.bin" if i == 0 else name))
    assert read_tensors(Source(tmp_path))[1] == "pytorch_model.bin"
    save_file({"x": torch.ones(1)}, tmp_path / "part.safetensors")
    write_index(tmp_path, {"x": "part.safetensors"})
    assert read_tensors(Source(tmp_path))[1] == "model.safetensors.index.json"
    save_file({"x": torch.full((1,), 7.0)}, tmp_path / "model.safetensors")
    tensors, name = read_tensors(Source(tmp_path))
    assert name == "model.safetensors" and tensors["x"] == 7


def test_a_file_is_named(tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model.generator.bin")
    tensors, name = read_tensors(Source(tmp_path), weights="pytorch_model.generator.bin")
    assert name == "pytorch_model.generator.bin" and tensors["x"] == 1
    write_index(tmp_path, {"x": "pytorch_model.bin"}, "mine.bin.index.json")
    assert read(tmp_path, weights="mine.bin.index.json")["x"] == 0


def test_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no files at all"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "rust_model.ot").write_text("x")
    with pytest.raises(FileNotFoundError) as raised:
        read(tmp_path)
    for part in (str(tmp_path), "model.safetensors", "pytorch_model.bin.index.json", "tf_model.h5", "rust_model.ot"):
        assert part in str(raised.value)
    with pytest.raises(FileNotFoundError, match=r"looked for missing\.bin; there lie config\.json, rust_model\.ot"):
        read(tmp_path, weights="missing.bin")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_save(tmp_path, zipped):
    tied = torch.nn.Parameter(torch.randn(3, 2))
    tensors = TENSORS | {"tied": tied, "tied too": tied, "view": torch.arange(9.0)[2:8:2], "buffer": torch.tensor(3)}
    path = tmp_path / "pytorch_model.bin"
    torch.save(OrderedDict(tensors), path, _use_new_zipfile_serialization=zipped)
    assert_same(read(tmp_path), tensors)
    read(tmp_path)["a"].add_(1)  # changes the tensor, not the file behind it
    assert_same(read(tmp_path), tensors)


@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
def test_other_entries_of_a_state_dict_are_left_out(tmp_path, nest):
    content = TENSORS | {"config": {"hidden_size": 8}, "epoch": 3, "lr": None}
    if nest is not None:
        content = {nest: content, "epoch": 3}
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert_same(read(tmp_path), TENSORS)


def test_a_tensor_may_be_called_model(tmp_path):
    torch.save({"model": torch.ones(1), "state_dict": {"x": torch.zeros(1)}}, tmp_path / "pytorch_model.bin")
    assert_same(read(tmp_path), {"model": torch.ones(1)})


def test_an_archive_that_was_compressed(tmp_path):
    """torch maps the records of such an archive as if they were uncompressed."""
    path, packed = tmp_path / "pytorch_model.bin", tmp_path / "packed.bin"
    torch.save(TENSORS, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for entry in archive.infolist():
            other.writestr(entry.filename, archive.read(entry))
    assert_same(read_only(packed), TENSORS)


def test_shards_behind_links_of_the_hubs_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for i, name in enumerate(TENSORS):
        save_file({name: TENSORS[name]}, blobs / f"{i}")
        (snapshot / f"shard-{i}.safetensors").symlink_to(blobs / f"{i}")
    write_index(blobs, {"a": "shard-0.safetensors", "b.c": "shard-1.safetensors"}, "index")
    (snapshot / "model.safetensors.index.json").symlink_to(blobs / "index")
    assert_same(read(snapshot), TENSORS)


def test_keras(tmp_path):
    pytest.importorskip("h5py")
    tensors = native(head="mlm", embedding=6, conv=True)
    layers = as_keras(tensors)
    assert sum(x.count("word_embeddings") for layer in layers.values() for x in layer) == 2  # in the head's layer too
    write_keras(tmp_path / "tf_model.h5", layers)
    assert_same(read(tmp_path), {name: x for layer in layers.values() for name, x in layer.items()})


def test_keras_lists_in_pieces(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = write_keras(tmp_path / "tf_model.h5", {"layer": {f"m/{i}:0": torch.tensor(float(i)) for i in range(4)}})
    with h5py.File(path, "r+") as file:
        names = list(file["layer"].attrs["weight_names"])
        del file["layer"].attrs["weight_names"]
        file["layer"].attrs["weight_names0"], file["layer"].attrs["weight_names1"] = names[:3], names[3:]
    assert_same(read(tmp_path), {f"m/{i}:0": torch.tensor(float(i)) for i in range(4)})


def test_keras_without_h5py(tmp_path, monkeypatch):
    (tmp_path / "tf_model.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="pip install h5py"):
        read(tmp_path)


# Writing


def listing(folder):
    return sorted(x.name for x in folder.iterdir())


def test_written_whole(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    tensors = {
        "transposed": base.t(), "first": base.clone()[0], "strided": torch.arange(24.0).view(4, 6)[:, ::2],
        "half": torch.ones(3, dtype=torch.float16), "bfloat": torch.ones(2, 2, dtype=torch.bfloat16),
        "long": torch.arange(3), "bool": torch.tensor([True]), "scalar": torch.tensor(2.0), "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    assert write_tensors(tensors, tmp_path / "new" / "folder") == ["model.safetensors"]
    assert listing(tmp_path / "new" / "folder") == ["model.safetensors"]
    assert_same(read(tmp_path / "new" / "folder"), tensors)
    with safe_open(tmp_path / "new" / "folder" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_written_in_shards(tmp_path):
    tensors = {f"x{i}": torch.full((4,), float(i)) for i in range(5)} | {"large": torch.ones(100)}
    names = write_tensors(tensors, tmp_path, max_shard_bytes=32)
    save = names[0][6:14]
    shards = [f"model-{save}-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert re.fullmatch("[0-9a-f]{8}", save)
    assert names == [*shards, "model.safetensors.index.json"] and listing(tmp_path) == sorted(names)
    index = json.loads((tmp_path / names[-1]).read_text())
    assert index["metadata"] == {"total_size": 5 * 16 + 400}
    assert index["weight_map"] == {f"x{i}": shards[i // 2] for i in range(5)} | {"large": shards[3]}
    for shard in shards:
        with safe_open(tmp_path / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert {x: shard for x in file.keys()}.items() <= index["weight_map"].items()
    assert_same(read(tmp_path), tensors)


def test_exactly_full_shards(tmp_path):
    tensors = {f"x{i}": torch.ones(4) for i in range(4)}
    assert len(write_tensors(tensors, tmp_path, max_shard_bytes=64)) == 1
    assert len(write_tensors(tensors, tmp_path, max_shard_bytes=63)) == 3
    assert len(write_tensors(tensors, tmp_path, max_shard_bytes=32)) == 3


@pytest.mark.parametrize("before", [10**6, 32, 16])
@pytest.mark.parametrize("after", [10**6, 32, 16])
def test_an_earlier_save_is_replaced(tmp_path, before, after):
    kept = ["config.json", "model.txt", "model_2.safetensors", "pytorch_model.bin", "spm.model"]
    for name in kept:
        (tmp_path / name).write_text("kept")
    write_tensors({f"old{i}": torch.zeros(4) for i in range(4)}, tmp_path, max_shard_bytes=before)
    (tmp_path / "model-00007-of-00009.safetensors.unfinished").write_text("of a save that crashed")
    tensors = {f"new{i}": torch.ones(4) for i in range(4)}
    names = write_tensors(tensors, tmp_path, max_shard_bytes=after)
    assert listing(tmp_path) == sorted(kept + names)
    assert_same(read(tmp_path), tensors)


@pytest.mark.parametrize("before", [10**6, 32])
@pytest.mark.parametrize("after", [10**6, 32])
def test_a_crash_while_writing_loses_nothing(tmp_path, monkeypatch, before, after):
    old = {f"x{i}": torch.zeros(4) for i in range(4)}
    write_tensors(old, tmp_path, max_shard_bytes=before)
    files = listing(tmp_path)
    real, calls = checkpoint_files_module._write_shard, []

    def full_disk(tensors, path):
        calls.append(path)
        real(tensors, path)
        if len(calls) == (1 if after > 100 else 2):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files_module, "_write_shard", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_tensors({f"x{i}": torch.ones(4) for i in range(4)}, tmp_path, max_shard_bytes=after)
    assert listing(tmp_path) == files
    assert_same(read(tmp_path), old)


@pytest.mark.parametrize("before", [10**6, 32, 16])
@pytest.mark.parametrize("after", [10**6, 32, 16])
def test_a_crash_while_renaming_mixes_nothing(tmp_path, monkeypatch, before, after):
    """At any moment the old or the new weights can be loaded, or none; if none, the new ones are already written."""
    tensors = lambda value: {f"x{i}": torch.full((4,), value) for i in range(4)}
    real = os.replace
    for moment in range(10):
        folder = tmp_path / str(moment)
        write_tensors(tensors(0.0), folder, max_shard_bytes=before)
        calls = []

        def killed(a, b, calls=calls, moment=moment):
            if len(calls) == moment:
                raise KeyboardInterrupt
            calls.append(b)
            real(a, b)

        monkeypatch.setattr(os, "replace", killed)
        try:
            write_tensors(tensors(1.0), folder, max_shard_bytes=after)
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(os, "replace", real)
        try:
            values = {float(x) for tensor in read(folder).values() for x in tensor}
        except FileNotFoundError:
            assert before == after != 10**6
            written = [x for x in folder.iterdir() if x.suffix in (".unfinished", ".safetensors")]
            assert written  # under temporary or final names
        else:
            assert values in ({0.0}, {1.0})
    assert values == {1.0}


def test_a_link_into_the_hubs_cache_is_replaced_not_followed(tmp_path):
    blob, folder = tmp_path / "blob", tmp_path / "folder"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, blob)
    (folder / "model.safetensors").symlink_to(blob)
    write_tensors({"x": torch.ones(1)}, folder)
    assert read(folder)["x"] == 1 and not (folder / "model.safetensors").is_symlink()
    os.rename(blob, tmp_path / "blob.safetensors")
    assert read_only(tmp_path / "blob.safetensors")["x"] == 0


def test_weights_that_came_from_the_file_are_saved_over_it(tmp_path):
    for save in (write_tensors, lambda x, folder: torch.save(x, folder / "pytorch_model.bin")):
        save(TENSORS, tmp_path)
        tensors = read(tmp_path)
        write_tensors({name: x + 1 for name, x in tensors.items()}, tmp_path)
        assert_same(tensors, TENSORS)
        assert_same(read(tmp_path), {name: x + 1 for name, x in TENSORS.items()})
        (tmp_path / "model.safetensors").unlink()


def test_what_cannot_be_written(tmp_path):
    base = torch.arange(12.0)
    for tensors, message in (
        ({}, "no tensors"),
        ({"a": base, "b": base}, "a and b share memory"),
        ({"a": base[:8], "c": torch.ones(2), "b": base[7:]}, "a and b share memory"),
        ({"a": base.view(3, 4).t(), "b": base[11:]}, "a and b share memory"),
        ({"a": torch.empty(2, device="meta")}, "a has no values"),
    ):
        with pytest.raises(ValueError, match=message):
            write_tensors(tensors, tmp_path / "folder")
    with pytest.raises(ValueError, match="max_shard_bytes must be at least 1, got 0"):
        write_tensors({"a": base}, tmp_path / "folder", max_shard_bytes=0)
    assert not (tmp_path / "folder").exists()
    write_tensors({"a": base[:6], "b": base[6:], "c": torch.empty(0), "d": torch.empty(0)}, tmp_path)
    assert_same(read(tmp_path), {"a": base[:6], "b": base[6:], "c": torch.empty(0), "d": torch.empty(0)})


def test_without_numpy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ImportError, match="pip install numpy"):
        write_tensors(TENSORS, tmp_path)
