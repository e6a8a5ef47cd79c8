"""The weights of a checkpoint: found in a folder or on the hub and read onto the CPU; written as safetensors."""

import json
import os
import re
from itertools import pairwise
from pathlib import Path

import torch

from .error import CheckpointError
from .formats import read_file
from .hub import Source

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SOUGHT = (_SINGLE, _INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5")


def read_tensors(source: Source, *, weights: str | None = None) -> tuple[dict[str, torch.Tensor], str]:
    """All tensors of a checkpoint, on the CPU and under the file's own names, and the name of that file.

    They may be maps of it: whoever keeps them copies them, lest the file be overwritten below them.

    Args:
        source: the folder, or the model on the hub.
        weights: the file to read ("pytorch_model.generator.bin"); None for the first that is there of
            model.safetensors, pytorch_model.bin (each in one piece or an index of shards) and tf_model.h5.

    Raises:
        FileNotFoundError: none of them is there.
        CheckpointError: a file is damaged, holds more than tensors, or does not agree with its index.
    """
    sought = _SOUGHT if weights is None else (weights,)
    for name in sought:
        path = source.file(name)
        if path is not None:
            return (_read_shards(source, path) if name.endswith(".index.json") else read_file(path)), name
    there = ""
    if source.folder is not None:
        there = "; there lie " + (", ".join(sorted(x.name for x in source.folder.iterdir())) or "no files at all")
    raise FileNotFoundError(f"{source} has no weights: looked for {', '.join(sought)}{there}")


def _read_shards(source: Source, index: Path) -> dict[str, torch.Tensor]:
    shards: dict[str, set[str]] = {}
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    for name, shard in _weight_map(index).items():
        # Of the index's own folder: an index that was downloaded does not choose which files are read.
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\:\0]+", shard) or not shard.endswith(suffix):
            raise CheckpointError(f"{index}: {name} must lie in a {suffix} file beside the index, not in {shard!r}")
        shards.setdefault(shard, set()).add(name)
    tensors: dict[str, torch.Tensor] = {}
    for shard, promised in shards.items():
        path = source.file(shard)
        if path is None:
            raise CheckpointError(f"{index} lists {shard}, which is missing from {source}")
        found = read_file(path)
        if lacking := promised - found.keys():
            raise CheckpointError(f"{path} lacks what {index.name} promises: {_some(lacking)}")
        if twice := tensors.keys() & found.keys():
            raise CheckpointError(f"{path} and another shard of {index.name} both hold {_some(twice)}")
        tensors |= found
    return tensors


def _weight_map(index: Path) -> dict:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is not JSON ({error})") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index} has no "weight_map" of tensors\' names to files')
    return weight_map


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def write_tensors(
    tensors: dict[str, torch.Tensor], folder: str | os.PathLike, *, max_shard_bytes: int = 5 * 2**30
) -> list[str]:
    """Writes model.safetensors, or shards of it and their index where it would be larger than ``max_shard_bytes``.

    Everything is written beside the files of an earlier save before the first of those is replaced; those that the new
    ones do not replace are removed last.

    Returns:
        The names of the files.

    Raises:
        ValueError: no tensors, tensors that share memory or have no values, or ``max_shard_bytes`` below 1.
        ImportError: there is no NumPy, by which safetensors writes.
    """
    try:
        import numpy  # noqa: F401
    except ImportError:
        raise ImportError("safetensors needs NumPy to write files: pip install numpy") from None
    _check(tensors, max_shard_bytes)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(tensors, max_shard_bytes)
    names = list(shards)
    try:
        for name, content in shards.items():
            _write_shard({x: tensors[x] for x in content}, folder / _unfinished(name))
        if len(shards) > 1:
            total = sum(x.nbytes for x in tensors.values())
            weight_map = {x: shard for shard, content in shards.items() for x in content}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / _unfinished(_INDEX)).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            names.append(_INDEX)
    except BaseException:
        for name in (*shards, _INDEX):
            (folder / _unfinished(name)).unlink(missing_ok=True)
        raise
    if any((folder / x).exists() for x in shards if x != _SINGLE):
        # Were this to stop halfway, the index of an earlier save would join its shards to new ones of the same names.
        (folder / _INDEX).unlink(missing_ok=True)
    for name in names:
        os.replace(folder / _unfinished(name), folder / name)
    for path in list(folder.iterdir()):
        if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.unfinished)?", path.name):
            if path.name not in names:
                path.unlink()
    return names


def _unfinished(name: str) -> str:
    return name + ".unfinished"


def _check(tensors: dict[str, torch.Tensor], max_shard_bytes: int) -> None:
    if not tensors:
        raise ValueError("there are no tensors to write")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    spans = []
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name} has no values (device meta)")
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            start = tensor.data_ptr()
            spans.append((str(tensor.device), start, start + (last + 1) * tensor.element_size(), name))
    for (device, _, end, name), (other_device, start, _, other) in pairwise(sorted(spans)):
        if device == other_device and start < end:
            raise ValueError(f"{name} and {other} share memory; leave one of them out, or clone it")


def _split(tensors: dict[str, torch.Tensor], max_shard_bytes: int) -> dict[str, list[str]]:
    """Names of the tensors by file, in their order, each file as full as may be."""
    contents: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        if not contents or tensor.nbytes > room:
            contents.append([])
            room = max_shard_bytes
        contents[-1].append(name)
        room -= tensor.nbytes
    if len(contents) == 1:
        return {_SINGLE: contents[0]}
    return {f"model-{i:05d}-of-{len(contents):05d}.safetensors": x for i, x in enumerate(contents, 1)}


def _write_shard(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({x: y.detach().cpu().contiguous() for x, y in tensors.items()}, path, metadata={"format": "pt"})
    with open(path, "rb+") as file:  # on the disk before it takes the place of an earlier one
        os.fsync(file.fileno())
