"""Files of checkpoints: what is read from them, how they are written, and what damaged or hostile ones lead to."""

import copyreg
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    Hostile,
    as_keras,
    hostile_pickles,
    legacy_pickles,
    native,
    save_legacy,
    save_zip,
    text,
    write_keras,
)
from safetensors import safe_open
from safetensors.torch import save_file

from deberta_fast.checkpoint import CheckpointError, read_tensors, write_tensors
from deberta_fast.checkpoint import files as checkpoint_files_module
from deberta_fast.hub import Source

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b.c": torch.ones(4, dtype=torch.bfloat16)}


def read(path, **options):
    """Of a folder, or of the file of that name."""
    path = Path(path)
    return read_tensors(Source(path) if path.is_dir() else Source(path.parent), **options)[0]


def read_only(path):
    return read(path, weights=path.name)


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].device.type == "cpu", name
        assert torch.equal(got[name], tensor.detach()), name
        assert not got[name].requires_grad


def write_index(folder, weight_map, name="model.safetensors.index.json"):
    path = folder / name
    path.write_text(weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map}))
    return path


# What is read


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
    read(tmp_path)["a"].add_(1)  # of a map of the file; the file stays
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
    """torch maps its records as if they were not."""
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


# Damaged files


def damaged_header(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


F32 = {"dtype": "F32", "shape": [2]}
HTML, POINTER = b"\n<!DOCTYPE html><html>404</html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
META = torch.empty(2, device="meta")
CONTENTS = {
    "empty.bin": (b"", "is empty"),
    "empty.safetensors": (b"", "is empty"),
    "empty.h5": (b"", "is empty"),
    "pointer.bin": (POINTER, "git-lfs"),
    "pointer.safetensors": (POINTER, "git-lfs"),
    "pointer.h5": (POINTER, "git-lfs"),
    "page.bin": (HTML, "web page"),
    "page.safetensors": (HTML, "web page"),
    "noise.bin": (b"hello, world", r"no file of torch.save: it begins with b'hello"),
    "json.bin": (b'{"a": [1, 2]}', "no file of torch.save"),
    "zeros.bin": (bytes(100), "no file of torch.save"),
    "zip-of-nothing.bin": (b"PK\x03\x04" + bytes(100), "damaged"),
    "pickle-of-a-dict.bin": (pickle.dumps({"a": 1}, 2), "damaged"),
    "noise.safetensors": (b"hello, world, hello", "damaged"),
    "short-header.safetensors": (struct.pack("<Q", 99) + b"{}", "damaged"),
    "huge-header.safetensors": (struct.pack("<Q", 2**62) + b"{}", "damaged"),
    "no-json.safetensors": (damaged_header(b"hello"), "damaged"),
    "no-data.safetensors": (damaged_header({"x": F32 | {"data_offsets": [0, 8]}}), "damaged"),
    "overlap.safetensors": (
        damaged_header({x: F32 | {"data_offsets": [i, i + 8]} for i, x in enumerate("ab")}, bytes(9)),
        "damaged",
    ),
    "wrong-size.safetensors": (damaged_header({"x": F32 | {"data_offsets": [0, 4]}}, bytes(4)), "damaged"),
    "odd-dtype.safetensors": (
        damaged_header({"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        "damaged",
    ),
    "no-tensors.safetensors": (damaged_header({}), "holds no tensors"),
    "noise.h5": (b"hello, world", "damaged"),
    "signature.h5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "damaged"),
}
SAVED = {
    "a list": ([torch.ones(1)], "a list; expected a dict"),
    "a tensor": (torch.ones(1), "a Tensor; expected a dict"),
    "no tensors": ({"config": 3}, "no tensors"),
    "nothing": ({}, "no tensors"),
    "a number for a name": ({"a": torch.ones(1), 3: torch.ones(1)}, "no text but 3"),
    "a tuple for a name": ({("a",): torch.ones(1)}, r"no text but \('a',\)"),
    "numbers for a weight": ({"a": torch.ones(1), "x.weight": [1.0]}, "x.weight is no tensor but a list"),
    "None for a weight": ({"x.weight": None}, "x.weight is no tensor but a NoneType"),
    "sparse": ({"x": torch.eye(2).to_sparse()}, "x is no ordinary tensor"),
    "quantized": (
        lambda: {"x": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)},
        "x is no ordinary .*quantized",
    ),
    "without values": ({"x": META}, "x has a shape, but no values"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_damaged(tmp_path, name):
    if name.endswith("h5"):
        pytest.importorskip("h5py")
    (tmp_path / name).write_bytes(CONTENTS[name][0])
    with pytest.raises(CheckpointError, match=CONTENTS[name][1]) as raised:
        read_only(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.filterwarnings("ignore:.*quantize", "ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", SAVED)
def test_saved_but_no_state_dict(tmp_path, name, zipped):
    path = tmp_path / "pytorch_model.bin"
    content, message = SAVED[name]
    torch.save(content() if callable(content) else content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=message) as raised:
        read(tmp_path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "h5"])
def test_cut_short_anywhere(tmp_path, kind):
    whole, cut = tmp_path / "whole", tmp_path / ("cut." + {"zip": "bin", "legacy": "bin"}.get(kind, kind))
    if kind == "safetensors":
        save_file(TENSORS, whole)
    elif kind == "h5":
        pytest.importorskip("h5py")
        write_keras(whole, {"layer": {"m/x:0": torch.arange(64.0)}})
    else:
        torch.save(TENSORS, whole, _use_new_zipfile_serialization=kind == "zip")
    content = whole.read_bytes()
    for length in [*range(0, len(content), max(1, len(content) // 60)), len(content) - 1]:
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError) as raised:
            read_only(cut)
        assert str(cut) in str(raised.value)


def test_a_broken_disk_is_no_damaged_file(tmp_path, monkeypatch):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: os.stat(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError):
        read(tmp_path)


INDICES = {
    "not JSON": ("{", "not JSON"),
    "not text": (b"\xff\xfe\x00", "not JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "a list": ("[]", "no .weight_map."),
    "no weight_map": ("{}", "no .weight_map."),
    "weight_map a list": ('{"weight_map": ["a"]}', "no .weight_map."),
    "weight_map empty": ('{"weight_map": {}}', "no .weight_map."),
    **{
        f"shard {shard!r}": (json.dumps({"weight_map": {"a": shard}}), "a must lie in a .safetensors file beside")
        for shard in (
            "../outside.safetensors", "/outside.safetensors", "sub/x.safetensors", "..\\x.safetensors",
            "C:x.safetensors",
            "x\0.safetensors", "", ".", "..", "x.bin", "model.safetensors.index.json", 3, None, ["x.safetensors"],
        )
    },
    "shard missing": (json.dumps({"weight_map": {"a": "gone.safetensors"}}), "lists gone.safetensors, which is"),
    "tensor missing": (json.dumps({"weight_map": {"b": "one.safetensors"}}), "one.safetensors lacks .* promises: b"),
    "tensor elsewhere": (
        json.dumps({"weight_map": {"a": "one.safetensors", "c": "one.safetensors", "d": "two.safetensors"}}),
        "one.safetensors lacks what .* promises: c",
    ),
    "tensor twice": (
        json.dumps({"weight_map": {"a": "one.safetensors", "d": "two.safetensors"}}),
        "two.safetensors and another shard of .* both hold a",
    ),
    "shard damaged": (json.dumps({"weight_map": {"a": "torn.safetensors"}}), "torn.safetensors is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", INDICES)
def test_index(tmp_path, name):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "outside", folder / "sub" / "x", folder / "one", Path(str(folder / "..\\x"))):
        save_file({"a": torch.ones(1)}, f"{path}.safetensors")
    save_file({"a": torch.ones(1), "d": torch.ones(1)}, folder / "two.safetensors")
    torch.save({"a": torch.ones(1)}, folder / "x.bin")
    (folder / "torn.safetensors").write_bytes(b"hello, world, hello")
    content, message = INDICES[name]
    index = folder / "model.safetensors.index.json"
    index.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CheckpointError, match=message) as raised:
        read(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize(
    "name",
    ["no layer_names", "no weight_names", "no layer", "no weight", "twice", "text", "virtual", "external", "link"],
)
def test_damaged_keras(tmp_path, name):
    h5py = pytest.importorskip("h5py")
    other = write_keras(tmp_path / "other.h5", {"layer": {"m/x:0": torch.ones(2)}})
    path = write_keras(tmp_path / "tf_model.h5", {x: {"m/x:0": torch.ones(2)} for x in ("layer", "second")})
    with h5py.File(path, "r+") as file:
        layer = file["layer"]
        if name == "no layer_names":
            del file.attrs["layer_names"]
        elif name == "no weight_names":
            del layer.attrs["weight_names"]
        elif name == "no layer":
            del file["layer"]
        else:
            del layer["m/x:0"]
        if name == "twice":
            layer["m/x:0"] = [1.0, 2.0]
        elif name == "text":
            layer["m/x:0"] = ["a", "b"]
        elif name == "virtual":
            layout = h5py.VirtualLayout((2,), "f4")
            layout[:] = h5py.VirtualSource(other, "layer/m/x:0", (2,))
            layer.create_virtual_dataset("m/x:0", layout)
        elif name == "external":
            layer.create_dataset("m/x:0", (2,), "f4", external=[(str(other), 0, 8)])
        elif name == "link":
            layer["m/x:0"] = h5py.ExternalLink(str(other), "layer/m/x:0")
    message = {
        "no layer_names": "/ has no layer_names", "no weight_names": "/layer has no weight_names",
        "no layer": "layer is listed, but there is no such group", "no weight": "m/x:0 is listed, but .* dataset",
        "twice": "m/x:0 is there twice", "text": "m/x:0 holds object", "virtual": "the values of m/x:0 lie in another",
        "external": "the values of m/x:0 lie in another", "link": "m/x:0 lies in another file",
    }[name]  # fmt: skip
    with pytest.raises(CheckpointError, match=message) as raised:
        read(tmp_path)
    assert str(path) in str(raised.value)


# Hostile files


@pytest.fixture
def extension():
    copyreg.add_extension("os", "mkdir", 17)
    yield
    copyreg.remove_extension("os", "mkdir", 17)


def refused(path, mark):
    with pytest.raises(CheckpointError) as raised:
        read_only(path)
    assert str(path) in str(raised.value)
    assert not mark.exists()
    return str(raised.value)


@pytest.mark.usefixtures("extension")
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("trick", hostile_pickles("mark"))
def test_no_code_is_run(tmp_path, trick):
    mark, path = tmp_path / "mark", tmp_path / "pytorch_model.bin"
    content = hostile_pickles(mark)[trick]
    try:
        pickle.loads(content)
    except AttributeError:
        pass  # the harm is done by then
    assert mark.is_dir()  # which proves that the trick works on whoever falls for it
    mark.rmdir()
    advice = "refused, as it holds more than tensors .*convert it to safetensors"
    for variant in (
        lambda: save_zip(path, content),
        lambda: save_zip(path, content, compression=zipfile.ZIP_DEFLATED),
        *(lambda i=i: save_legacy(path, content, i) for i in range(5)),
        lambda: path.write_bytes(content),
    ):
        variant()
        message = refused(path, mark)
        assert "refused" in message or "no file of torch.save" in message or "damaged" in message
    save_zip(path, content)
    with pytest.raises(CheckpointError, match=advice):
        read_only(path)


def test_what_is_refused_is_named(tmp_path):
    save_zip(tmp_path / "x.bin", pickle.dumps(Hostile("mark"), 2))
    message = refused(tmp_path / "x.bin", tmp_path / "mark")
    assert "(Trying to load unsupported GLOBAL posix.mkdir whose module posix is blocked)" in message
    save_zip(tmp_path / "x.bin", b"\x80\x02cbuiltins\ngetattr\n.")
    message = refused(tmp_path / "x.bin", tmp_path / "mark")
    assert "(Unsupported global: GLOBAL getattr was not an allowed global by default)" in message
    save_zip(tmp_path / "x.bin", b"\x80\x02i.")
    assert "(Unsupported operand 105)" in refused(tmp_path / "x.bin", tmp_path / "mark")


def test_other_kinds_of_archives_run_nothing(tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "pytorch_model.bin"
    content = pickle.dumps(Hostile(mark))
    save_zip(path, pickle.dumps({}, 2), records=[("constants.pkl", content), ("code/x.py", "import os")])  # TorchScript
    refused(path, mark)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:  # torch 0.1
        for name in ("sys_info", "pickle", "storages", "tensors", "../../escaped"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    refused(path, mark)
    assert not (tmp_path.parent.parent / "escaped").exists()


def tensor(key="0", offset=0, size=2):
    """A pickle of a tensor over the record ``data/key``."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + b"K\x02tQ"
    numbers = b"K" + bytes([offset]) + b"K" + bytes([size]) + b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + b"tR"


@pytest.mark.parametrize(
    "content",
    [
        b"}" + text("x") + tensor(size=255) + b"s",
        b"}" + text("x") + tensor(offset=255) + b"s",
        b"}" + text("x") + tensor(key="../../0") + b"s",
        b"}" + text("x") + tensor(key="9") + b"s",
        text("anything") + b"Q",
        b"(" + text("file") + text("/etc/passwd") + b"tQ",
        b"Pfile\n",
        b"}" + b"h\x07",
        b"s",
        b"X\xff\xff\xff\xffab",
        b"\x8b\xff\xff\xff\x7f",
        b"(" * 10_000,
        b"",
    ],
    ids=[
        "size past the data", "offset past the data", "key that is a path", "no such key", "persistent id of text",
        "persistent id of a file", "persistent id, old", "memo that is not there", "empty stack", "short text",
        "short number", "marks without end", "nothing",
    ],
)  # fmt: skip
def test_odd_pickles(tmp_path, content):
    path = tmp_path / "pytorch_model.bin"
    save_zip(path, b"\x80\x02" + content + b".", records=DATA)
    refused(path, tmp_path / "mark")


DATA = [("data/0", struct.pack("<2f", 1, 2))]


def test_the_written_archives_are_read_when_sound(tmp_path):
    """So that what is refused above is refused for its content."""
    path = save_zip(tmp_path / "zip.bin", b"\x80\x02}" + text("x") + tensor() + b"s.", records=DATA)
    assert_same(read_only(path), {"x": torch.tensor([1.0, 2.0])})
    path = save_legacy(tmp_path / "legacy.bin", legacy_pickles()[0][3])
    assert_same(read_only(path), {"weight": torch.arange(4.0)})


def test_methods_that_a_pickle_shadows(tmp_path):
    """The attributes of an OrderedDict and of a parameter may be anything."""
    shadows = lambda names: b"}(" + b"".join(text(x) + b"K\x03" for x in names) + b"u"
    parameter = b"ctorch._utils\n_rebuild_parameter_with_state\n(" + tensor() + b"\x89ccollections\nOrderedDict\n)R"
    parameter += shadows(["detach", "requires_grad_"]) + b"tR"
    content = b"\x80\x02ccollections\nOrderedDict\n)R" + text("x") + parameter + b"s"
    content += shadows(["items", "get", "keys", "values"]) + b"b."
    save_zip(tmp_path / "pytorch_model.bin", content, records=DATA)
    assert torch.load(tmp_path / "pytorch_model.bin", weights_only=True).items == 3
    assert_same(read(tmp_path), {"x": torch.tensor([1.0, 2.0])})


def test_a_dict_that_holds_itself(tmp_path):
    content = {}
    content["state_dict"] = content["model"] = content
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no tensors"):
        read(tmp_path)


# What is written


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
    shards = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
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
    """At any moment the folder holds the old weights, the new ones or none; the new ones are complete by then."""
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
            assert written  # under their temporary names or already under their own
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
        ({"a": META}, "a has no values"),
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
