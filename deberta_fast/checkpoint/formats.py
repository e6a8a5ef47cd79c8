"""Reads one file of weights, in any of three formats, as a dict of CPU tensors. No code in a file is executed."""

import pickle
import re
import zipfile
from pathlib import Path

import torch

from .error import CheckpointError

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a .safetensors, .h5 or (any other name) ``torch.save`` file under the file's own names.

    Raises:
        CheckpointError: the file is damaged or of another kind, or something under a tensor's name is not a tensor.
        ImportError: an .h5 file needs h5py.
    """
    head = _head(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)
        elif path.suffix in (".h5", ".hdf5"):
            tensors = _read_keras(path)
        else:
            tensors = _read_torch(path, head)
    except (CheckpointError, ImportError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused, as it holds more than tensors ({_reason(error)}) and loading it could run code. "
            "If you trust it, convert it to safetensors where it was made: load it there and call "
            "safetensors.torch.save_file(state_dict, 'model.safetensors')"
        ) from None
    except Exception as error:  # Readers raise many types of errors for a damaged file.
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the file system: no permission, a broken disk
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path} is damaged or cut short ({reason})") from error
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


def _reason(error: Exception) -> str:
    """Returns torch's reason for refusing a file, without its advice to load the file anyway."""
    reason = str(error).split("\n\nCheck the documentation")[0].splitlines()[-1]
    return re.sub(r"^.*error: |\. Please.*$|\.$", "", reason)


def _read_torch(path: Path, head: bytes) -> dict[str, torch.Tensor]:
    mappable = False
    if head.startswith(_ZIP):
        with zipfile.ZipFile(path) as archive:  # raises if the file was cut short
            entries = archive.infolist()
        if any(entry.filename.endswith("constants.pkl") for entry in entries):
            raise CheckpointError(f"{path} holds a program (TorchScript), not a state dict")
        # torch would map compressed records as if they were data.
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
    for name, value in dict.items(content):  # dict's own methods, because a pickle may shadow those of an OrderedDict
        if isinstance(value, torch.Tensor):
            if not isinstance(name, str):
                raise CheckpointError(f"{path}: the name of a tensor is no text but {name!r}")
            tensors[name] = _plain(path, name, value)
        elif isinstance(name, str) and "." in name:  # Names of weights have dots; "config" or "epoch" have none.
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
                # The head of a masked language model repeats the tied embeddings.
                if name in tensors and not torch.equal(tensor, tensors[name]):
                    raise CheckpointError(f"{path}: {name} is there twice, with different values")
                tensors[name] = tensor
    return tensors


def _texts(path: Path, group, attribute: str) -> list[str]:
    """Returns a group's list of names. A long list is split into ``weight_names0``, ``weight_names1`` and so on."""
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
