"""Weights of small models under this package's names, and files of them, sound and damaged, in every layout."""

import functools
import io
import json
import os
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path

import torch

from deberta_fast.checkpoint import read_tensors
from deberta_fast.checkpoint.hub import Source

LAYERS, HEADS, WIDTH, INNER, VOCABULARY, SPAN = 2, 2, 8, 12, 20, 6


def native_shapes(version=2, head="", *, embedding=WIDTH, conv=False, positions=False, types=0, norm=False, tied=True):
    """Names and shapes of a model, as in its state_dict, written out by hand. ``head`` is "", mlm, cls or qa."""
    shapes = {"embeddings.word_embeddings.weight": (VOCABULARY, embedding)}
    if positions:
        shapes["embeddings.position_embeddings.weight"] = (16, embedding)
    if types:
        shapes["embeddings.token_type_embeddings.weight"] = (types, embedding)
    if embedding != WIDTH:
        shapes["embeddings.embed_proj.weight"] = (WIDTH, embedding)
    layer_norm = lambda name, width=WIDTH: {name + ".weight": (width,), name + ".bias": (width,)}
    shapes |= layer_norm("embeddings.LayerNorm")
    for i in range(LAYERS):
        attention, layer = f"encoder.layer.{i}.attention.", f"encoder.layer.{i}."
        for name in ("query", "key", "value", "pos_key", "pos_query"):
            shapes[f"{attention}self.{name}_proj.weight"] = (WIDTH, WIDTH)
            if version == 2 or "key" not in name:
                shapes[f"{attention}self.{name}_proj.bias"] = (WIDTH,)
        for name, rows, columns in (
            (attention + "output.dense", WIDTH, WIDTH),
            (layer + "intermediate.dense", INNER, WIDTH),
            (layer + "output.dense", WIDTH, INNER),
        ):
            shapes |= {name + ".weight": (rows, columns), name + ".bias": (rows,)}
        shapes |= layer_norm(attention + "output.LayerNorm") | layer_norm(layer + "output.LayerNorm")
    shapes["encoder.rel_embeddings.weight"] = (2 * SPAN, WIDTH)
    if norm:
        shapes |= layer_norm("encoder.LayerNorm")
    if conv:
        shapes |= {"encoder.conv.conv.weight": (WIDTH, WIDTH, 3), "encoder.conv.conv.bias": (WIDTH,)}
        shapes |= layer_norm("encoder.conv.LayerNorm")
    if not head:
        return shapes
    shapes = {"deberta." + name: shape for name, shape in shapes.items()}
    if head == "mlm":
        name = "lm_predictions.lm_head."
        shapes |= {name + "dense.weight": (embedding, WIDTH), name + "dense.bias": (embedding,)}
        shapes |= layer_norm(name + "LayerNorm", embedding) | {name + "bias": (VOCABULARY,)}
        if not tied:
            shapes[name + "decoder.weight"] = (VOCABULARY, embedding)
    elif head == "cls":
        shapes |= {"pooler.dense.weight": (WIDTH, WIDTH), "pooler.dense.bias": (WIDTH,)}
        shapes |= {"classifier.weight": (3, WIDTH), "classifier.bias": (3,)}
    else:
        shapes |= {"qa_outputs.weight": (2, WIDTH), "qa_outputs.bias": (2,)}
    return shapes


def native(version=2, head="", seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    shapes = native_shapes(version, head, **options)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def renamed(tensors, replacements):
    """The tensors with parts of their names replaced, one replacement after the other."""
    result = {}
    for name, tensor in tensors.items():
        for old, new in replacements:
            name = name.replace(old, new)
        result[name] = tensor
    return result


def as_v1(tensors):
    """Hugging Face's v1 layout: in_proj holds the query's, key's and value's rows of head 0, then those of head 1."""
    tensors = dict(tensors)
    for name in [x for x in tensors if x.endswith("self.query_proj.weight")]:
        prefix = name.removesuffix("query_proj.weight")
        parts = [tensors.pop(f"{prefix}{x}_proj.weight") for x in ("query", "key", "value")]
        size = WIDTH // HEADS
        rows = [part[head * size + i] for head in range(HEADS) for part in parts for i in range(size)]
        tensors[prefix + "in_proj.weight"] = torch.stack(rows)
    return renamed(
        tensors,
        [
            ("self.query_proj.bias", "self.q_bias"),
            ("self.value_proj.bias", "self.v_bias"),
            ("pos_key_proj", "pos_proj"),
            ("pos_query_proj", "pos_q_proj"),
        ],
    )


LEGACY = [
    ("lm_predictions.lm_head.bias", "cls.predictions.bias"),
    ("lm_predictions.lm_head.decoder", "cls.predictions.decoder"),
    ("lm_predictions.lm_head", "cls.predictions.transform"),
]


def as_keras(tensors, model="tf_deberta_model"):
    """The tensors by Keras layer, under the names of Hugging Face's TensorFlow classes.

    Those classes give the position terms v1's names in v2 too.
    """
    layers = {}
    kernel = lambda x: x.permute(*reversed(range(x.dim())))
    replacements = [*LEGACY, ("pos_key_proj", "pos_proj"), ("pos_query_proj", "pos_q_proj")]
    for name, tensor in renamed(tensors, replacements).items():
        if not name.startswith(("deberta.", "cls.", "pooler.", "classifier.", "qa_outputs.")):
            name = "deberta." + name
        *scopes, last = name.split(".")
        if scopes[-1] == "rel_embeddings":
            scopes, last = scopes[:-1], "rel_embeddings.weight"
        elif scopes[-1].endswith("_embeddings"):
            last = "weight" if scopes[-1] == "word_embeddings" else "embeddings"
        elif scopes[-1] == "LayerNorm":
            last = {"weight": "gamma", "bias": "beta"}[last]
        elif last == "weight":
            last, tensor = "kernel", kernel(tensor)
        path = f"{model}/{'/'.join(scopes)}/{last}:0".replace("layer/", "layer_._")
        layers.setdefault(scopes[0], {})[path] = tensor
    if "cls" in layers:  # the head lists the embeddings that it shares
        shared = {k: x for k, x in layers["deberta"].items() if "/embeddings/" in k and "position" not in k}
        layers["cls"] = shared | layers["cls"]
    return layers


def write_keras(path, layers):
    """Writes the layout of Keras's save_weights, which also lists layers without weights (dropout).

    Older versions of h5py stored these lists as strings of fixed length, newer ones as strings of variable length. The
    file contains both.
    """
    import h5py
    import numpy

    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = numpy.array([x.encode() for x in [*layers, "dropout_1"]])
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.19.0"
        file.create_group("dropout_1").attrs["weight_names"] = []
        for layer, tensors in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [x.encode() for x in tensors]
            for name, tensor in tensors.items():
                group[name] = tensor.contiguous().numpy()
    return path


TENSORS = {"a": torch.arange(6.0).view(2, 3), "b.c": torch.ones(4, dtype=torch.bfloat16)}


def read(path, **options):
    """The tensors of a folder. If ``path`` is a file, of the folder that contains it."""
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


# Pickles


def text(x):
    data = x.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def save_zip(path, content, *, records=(), compression=zipfile.ZIP_STORED):
    """Writes an archive in the layout of torch.save; ``content`` is the pickle of the saved object."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", b"little")
        for name, data in records:
            archive.writestr(f"archive/{name}", data)
        archive.writestr("archive/version", b"3\n")
    return path


@functools.cache
def legacy_pickles():
    """The five pickles that torch.save's older format has for {"weight": a tensor}, and the data behind them."""
    stream = io.BytesIO()
    torch.save({"weight": torch.arange(4.0)}, stream, _use_new_zipfile_serialization=False)
    stream.seek(0)
    pickles = []
    for _ in range(5):
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        pickles.append(stream.getvalue()[start : stream.tell()])
    return tuple(pickles), stream.read()


def save_legacy(path, content, place=3):
    """Writes the older format with one of its pickles replaced, by default the fourth: that of the saved object."""
    pickles, data = legacy_pickles()
    Path(path).write_bytes(b"".join([*pickles[:place], content, *pickles[place + 1 :], data]))
    return path


class Hostile:
    """Python's pickle creates the folder ``mark`` when it loads such an object."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def hostile_pickles(mark):
    """Pickles that run code: each creates the folder ``mark`` when Python's pickle loads it."""
    mark = str(mark)
    path, code = text(mark), text(f"__import__('os').mkdir({mark!r})")
    mkdir, partial = b"cos\nmkdir\n", b"cfunctools\npartial\n"
    imported_os = b"cbuiltins\n__import__\n" + text("os") + b"\x85R"
    rebuild = b"ctorch._tensor\n"
    inner = text(f"cos\nmkdir\n(S{mark!r}\ntR.")
    opcodes = {
        "posix": b"cposix\nmkdir\n" + path + b"\x85R",
        "inst": b"(" + path + b"ios\nmkdir\n",
        "obj": b"(" + mkdir + path + b"o",
        "stack global": text("os") + text("mkdir") + b"\x93" + path + b"\x85R",
        "extension": b"\x82\x11" + path + b"\x85R",
        "eval": b"cbuiltins\neval\n" + code + b"\x85R",
        "exec": b"cbuiltins\nexec\n" + code + b"\x85R",
        "python 2's eval": b"c__builtin__\neval\n" + code + b"\x85R",
        "getattr": b"cbuiltins\ngetattr\n" + imported_os + text("mkdir") + b"\x86R" + path + b"\x85R",
        "partial": partial + mkdir + path + b"\x86R)R",
        "newobj": partial + mkdir + path + b"\x86\x81)R",
        "newobj_ex": partial + mkdir + b"\x85}" + text("path") + path + b"s\x92)R",
        "build": partial + b"cbuiltins\nint\n\x85R(" + mkdir + path + b"\x85}Ntb)R",
        "build of an OrderedDict": b"ccollections\nOrderedDict\n)R}" + text("x") + mkdir + path + b"\x85Rsb",
        "operator": b"coperator\nmethodcaller\n" + text("mkdir") + path + b"\x86R" + imported_os + b"\x85R",
        "pickle": b"cpickle\nloads\nc_codecs\nencode\n" + inner + text("latin1") + b"\x86R\x85R",
        "runpy": b"crunpy\n_run_code\n(cbuiltins\ncompile\n(" + code + text("x") + text("exec") + b"tR}tR",
        "timeit": b"ctimeit\ntimeit\n(" + code + text("pass") + b"ctime\nperf_counter\nK\x01tR",
        "subprocess": b"csubprocess\ncheck_call\n(" + text("mkdir") + path + b"l\x85R",
        "shell": b"cos\nsystem\n" + text(f"mkdir '{mark}'") + b"\x85R",
        "a tensor's type": rebuild + b"_rebuild_from_type_v2\n(" + mkdir + b"ctorch\nTensor\n" + path + b"\x85}tR",
        "a parameter's data": b"ctorch._utils\n_rebuild_parameter\n(" + mkdir + path + b"\x85R\x89}tR",
        "a key": b"}" + mkdir + path + b"\x85RK\x00s",
    }  # fmt: skip
    protocols = {f"reduce, protocol {x}": pickle.dumps({"weight": Hostile(mark)}, protocol=x) for x in range(6)}
    protocols["a dotted name"] = b"\x80\x04" + text("torch") + text("os.mkdir") + b"\x93" + path + b"\x85R."
    return protocols | {name: b"\x80\x02" + x + b"." for name, x in opcodes.items()}
