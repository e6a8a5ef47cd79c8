"""Damaged and hostile checkpoint files: each error names the file and a reason, and no code in a file runs."""

import copyreg
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    TENSORS,
    Hostile,
    assert_same,
    hostile_pickles,
    legacy_pickles,
    read,
    read_only,
    save_legacy,
    save_zip,
    text,
    write_keras,
)
from safetensors.torch import save_file

from deberta_fast.checkpoint import CheckpointError


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
            "a" * 300 + ".safetensors", "é" * 130 + ".safetensors",
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
        pass  # the folder exists by then
    assert mark.is_dir()  # so the trick works on Python's pickle
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
    assert "a program" in refused(path, mark)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:  # torch 0.1
        for name in ("sys_info", "pickle", "storages", "tensors", "../../escaped"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    refused(path, mark)
    assert not (tmp_path.parent.parent / "escaped").exists()


def tensor(key="0", offset=0, size=2):
    """Pickle opcodes for a tensor whose values are in the record ``data/key``."""
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
    """The helpers write valid archives, so the archives above are refused for their content."""
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
