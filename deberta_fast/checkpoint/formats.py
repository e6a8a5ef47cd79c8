"""One file of weights, in any of the three formats, as a dict of CPU tensors. Nothing in a file is executed."""

import contextlib
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from .error import CheckpointError

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors, .h5 or (any other name) ``torch.save`` file, under the names that it gives them.

    Raises:
        CheckpointError: the file is damaged, is something else, or holds what is no tensor under a tensor's name.
        ImportError: .h5 without h5py.
    """
    head = _head(path)
    with _explained(path):
        if path.suffix == ".safetensors":
            tensors = _read_safetensors(path)
        elif path.suffix in (".h5", ".hdf5"):
            tensors = _read_keras(path)
        else:
            tensors = _read_torch(path, head)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    return tensors


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        head = file.read(256)
    if not head:
        raise CheckpointError(f"{path} is empty; was its download cut short?")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a pointer of git-lfs, not the file that it stands for; fetch that with `git lfs pull`"
        )
    if head.lstrip().startswith(b"<"):
        raise CheckpointError(f"{path} is a web page (perhaps an error message that was downloaded), not a checkpoint")
    return head


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever the readers stumble over in a damaged file, as an error that names the file."""
    try:
        yield
    except (CheckpointError, ImportError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused, as it holds more than tensors ({_reason(error)}) and loading it could run code. "
            "If you trust it, convert it to safetensors where it was made: load it there and call "
            "safetensors.torch.save_file(state_dict, 'model.safetensors')"
        ) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file system's own: no permission, a broken disk
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path} is damaged or cut short ({reason})") from error


def _reason(error: Exception) -> str:
    """What torch objects to, without its advice to load the file all the same."""
    reason = str(error).split("\n\nCheck the documentation")[0].splitlines()[-1]
    return re.sub(r"^.*error: |\. Please.*$|\.$", "", reason)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _read_torch(path: Path, head: bytes) -> dict[str, torch.Tensor]:
    mappable = False
    if head.startswith(_ZIP):
        with zipfile.ZipFile(path) as archive:  # which also notices a cut file; torch would map compressed data as is
            entries = archive.infolist()
        if any(entry.filename.endswith("constants.pkl") for entry in entries):
            raise CheckpointError(f"{path} holds a program (TorchScript), not a state dict")
        mappable = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    elif not head.startswith(_PICKLE):
        raise CheckpointError(f"{path} is no file of torch.save: it begins with {head[:16]!r}")
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    return _state_dict(path, content)


def _state_dict(path: Path, content) -> dict[str, torch.Tensor]:
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a dict of tensors by name")
    for nest in ("state_dict", "model"):
        inner = dict.get(content, nest)
        if isinstance(inner, dict) and not any(isinstance(x, torch.Tensor) for x in dict.values(content)):
            content = inner
    tensors = {}
    for name, value in dict.items(content):  # dict's own methods: a pickle may shadow those of an OrderedDict
        if isinstance(value, torch.Tensor):
            if not isinstance(name, str):
                raise CheckpointError(f"{path}: the name of a tensor is no text but {name!r}")
            tensors[name] = _plain(path, name, value)
        elif isinstance(name, str) and "." in name:  # a weight's name; config, epoch and the like have no dots
            raise CheckpointError(f"{path}: {name} is no tensor but a {type(value).__name__}")
    return tensors


def _plain(path: Path, name: str, value: torch.Tensor) -> torch.Tensor:
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_quantized:
        kind = "quantized" if value.is_quantized else f"{type(value).__name__} of layout {value.layout}"
        raise CheckpointError(f"{path}: {name} is no ordinary tensor ({kind})")
    if value.device.type != "cpu":
        raise CheckpointError(f"{path}: {name} has a shape, but no values (device {value.device})")
    return torch.Tensor.detach(value)


def _read_keras(path: Path) -> dict[str, torch.Tensor]:
    try:
        import h5py
    except ImportError:
        raise ImportError(f"{path} is a file of TensorFlow; to read it, pip install h5py") from None
    tensors = {}
    with h5py.File(path, "r") as file:
        for layer in _texts(path, file, "layer_names"):
            for name in _texts(path, _member(path, file, layer, h5py.Group), "weight_names"):
                dataset = _member(path, file[layer], name, h5py.Dataset)
                if dataset.is_virtual or dataset.external:
                    raise CheckpointError(f"{path}: the values of {name} lie in another file")
                if dataset.dtype.kind not in "fiu":
                    raise CheckpointError(f"{path}: {name} holds {dataset.dtype}; expected numbers")
                tensor = torch.from_numpy(dataset.astype(dataset.dtype.newbyteorder("="))[...])
                # The head of a masked language model repeats the embeddings that it is tied to.
                if name in tensors and not torch.equal(tensor, tensors[name]):
                    raise CheckpointError(f"{path}: {name} is there twice, with different values")
                tensors[name] = tensor
    return tensors


def _texts(path: Path, group, attribute: str) -> list[str]:
    """A list of names beside a group; long ones are in pieces, ``weight_names0`` and so on."""
    pieces = [attribute] if attribute in group.attrs else []
    while not (pieces and pieces[0] == attribute) and f"{attribute}{len(pieces)}" in group.attrs:
        pieces.append(f"{attribute}{len(pieces)}")
    if not pieces:
        raise CheckpointError(f"{path}: {group.name} has no {attribute}, as files of Keras's save_weights have")
    names = [x for piece in pieces for x in group.attrs[piece]]
    return [x.decode() if isinstance(x, bytes) else str(x) for x in names]


def _member(path: Path, group, name: str, kind: type):
    member = group.get(name)
    if not isinstance(member, kind):
        raise CheckpointError(f"{path}: {name} is listed, but there is no such {kind.__name__.lower()}")
    if member.file.filename != group.file.filename:
        raise CheckpointError(f"{path}: {name} lies in another file")
    return member
