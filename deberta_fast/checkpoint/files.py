"""The weights of a checkpoint: found in a folder or on the hub and read onto the CPU; written as safetensors."""

import json
import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from .error import CheckpointError
from .formats import read_file
from .hub import Source
from .replace import ENTRIES, INDEX, SINGLE, alone, publish, settle, unfinished, write_beside

_LONGEST_NAME = 255  # bytes that file systems take
_OF_A_SAVE = re.compile(r"model((-[0-9a-f]{8})?-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.unfinished)?")


def read_tensors(source: Source, *, weights: str | Sequence[str] | None = None) -> tuple[dict[str, torch.Tensor], str]:
    """All tensors of a checkpoint, on the CPU and under the file's own names, and the name of that file.

    They may be maps of it: whoever keeps them copies them, lest the file be overwritten below them.

    Args:
        source: the folder, or the model on the hub.
        weights: the file to read ("pytorch_model.generator.bin"), or several names of which the first that is there is
            read; None for model.safetensors, pytorch_model.bin (each in one piece or an index of shards) and
            tf_model.h5.

    Raises:
        FileNotFoundError: none of them is there.
        CheckpointError: a file is damaged, holds more than tensors, or does not agree with its index.
    """
    sought = ENTRIES if weights is None else (weights,) if isinstance(weights, str) else weights
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
    suffix = ".safetensors" if ".safetensors" in index.name else ".bin"
    for name, shard in _weight_map(index).items():
        # Of the index's own folder: an index that was downloaded does not choose which files are read.
        fits = isinstance(shard, str) and re.fullmatch(r"[^/\\:\0]+", shard) and shard.endswith(suffix)
        if not fits or len(shard.encode(errors="surrogatepass")) > _LONGEST_NAME:
            what = f"{shard[:80]}..." if isinstance(shard, str) and len(shard) > 80 else shard
            raise CheckpointError(f"{index}: {name} must lie in a {suffix} file beside the index, not in {what!r}")
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
    tensors: dict[str, torch.Tensor],
    folder: str | os.PathLike,
    *,
    max_shard_bytes: int = 5 * 2**30,
    config: str | None = None,
) -> list[str]:
    """Writes model.safetensors, or shards of it and their index where it would be larger than ``max_shard_bytes``.

    An earlier checkpoint in the folder stays whole until this one is, whatever stops it; see ``replace``. Saves into
    one folder wait for each other.

    Args:
        tensors: by name.
        folder: made if need be.
        max_shard_bytes: what one file holds at most, unless a single tensor is larger.
        config: the text of a config.json to write too.

    Returns:
        The names of the files of weights.

    Raises:
        ValueError: no tensors, tensors that share memory or have no values, or ``max_shard_bytes`` below 1.
        ImportError: there is no NumPy, by which safetensors writes.
        OSError: a file cannot be written; the earlier checkpoint is as it was.
    """
    try:
        import numpy  # noqa: F401
    except ImportError:
        raise ImportError("safetensors needs NumPy to write files: pip install numpy") from None
    _check(tensors, max_shard_bytes)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(tensors, max_shard_bytes)
    entry = SINGLE if len(shards) == 1 else INDEX
    with alone(folder):
        settle(folder)
        try:
            for name, content in shards.items():
                # Shards have their names from the start: no other save knows them, and no index lists them yet.
                path = folder / name
                _write_shard({x: tensors[x] for x in content}, unfinished(path) if name == SINGLE else path)
            if entry == INDEX:
                total = sum(x.nbytes for x in tensors.values())
                weight_map = {x: shard for shard, content in shards.items() for x in content}
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
                write_beside(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
            publish(folder, entry, None if config is None else config.encode())
        except BaseException:
            settle(folder)
            if not _published(folder, shards):
                for name in shards.keys() - {SINGLE}:
                    (folder / name).unlink(missing_ok=True)
            raise
        names = [*shards, entry] if entry == INDEX else [entry]
        for path in list(folder.iterdir()):
            if _OF_A_SAVE.fullmatch(path.name) and path.name not in names:
                path.unlink()
        settle(folder)
    return names


def _published(folder: Path, shards: dict[str, list[str]]) -> bool:
    """Whether these shards are those that readers find."""
    index = folder / INDEX
    return index.is_file() and not (folder / SINGLE).exists() and next(iter(shards)).encode() in index.read_bytes()


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
        return {SINGLE: contents[0]}
    save = os.urandom(4).hex()
    return {f"model-{save}-{i:05d}-of-{len(contents):05d}.safetensors": x for i, x in enumerate(contents, 1)}


def _write_shard(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    path.unlink(missing_ok=True)  # which may be a link to anywhere
    save_file({x: y.detach().cpu().contiguous() for x, y in tensors.items()}, path, metadata={"format": "pt"})
    with open(path, "rb+") as file:  # on the disk before it takes the place of an earlier one
        os.fsync(file.fileno())
