"""Finds the weights of a checkpoint and reads them onto the CPU; writes weights as safetensors."""

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
from .replace import ENTRIES, INDEX, SINGLE, locked, publish, recover, unfinished, write_beside

_LONGEST_NAME = 255  # bytes, the limit of file systems
_SAVED_NAME = re.compile(r"model((-[0-9a-f]{8})?-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.unfinished)?")


def read_tensors(source: Source, *, weights: str | Sequence[str] | None = None) -> tuple[dict[str, torch.Tensor], str]:
    """Returns all tensors of a checkpoint, on the CPU and under the file's own names, and the name of that file.

    Tensors may map the file. Copy those that are kept, because the file may be overwritten later. ``weights`` names the
    file to read, or several files of which the first that exists is read; by default these are ``ENTRIES``.

    Raises:
        FileNotFoundError: none of the files exists.
        CheckpointError: a file is damaged, holds more than tensors, or does not agree with its index.
    """
    sought = ENTRIES if weights is None else (weights,) if isinstance(weights, str) else weights
    for name in sought:
        path = source.file(name)
        if path is not None:
            return (_read_shards(source, path) if name.endswith(".index.json") else read_file(path)), name
    found = ""
    if source.folder is not None:
        found = "; there lie " + (", ".join(sorted(x.name for x in source.folder.iterdir())) or "no files at all")
    raise FileNotFoundError(f"{source} has no weights: looked for {', '.join(sought)}{found}")


def _read_shards(source: Source, index: Path) -> dict[str, torch.Tensor]:
    shards: dict[str, set[str]] = {}
    suffix = ".safetensors" if ".safetensors" in index.name else ".bin"
    for name, shard in _weight_map(index).items():
        # Shards lie in the folder of their index: a downloaded index must not choose which other files are read.
        fits = isinstance(shard, str) and re.fullmatch(r"[^/\\:\0]+", shard) and shard.endswith(suffix)
        if not fits or len(shard.encode(errors="surrogatepass")) > _LONGEST_NAME:
            raise CheckpointError(f"{index}: {name} must lie in a {suffix} file beside the index, not in {shard!r:.80}")
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
    """Writes model.safetensors, or shards and their index if it would be larger than ``max_shard_bytes``.

    ``config`` is the text of a config.json to write too. An earlier checkpoint in the folder stays whole until the new
    one is complete, even if the save is killed; see ``replace``. Saves into one folder wait for each other. Returns the
    names of the files of weights.

    Raises:
        ValueError: there are no tensors, tensors share memory or have no values, or ``max_shard_bytes`` is below 1.
        ImportError: NumPy is not installed, which safetensors needs to write.
        OSError: a file cannot be written; the earlier checkpoint is unchanged.
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
    with locked(folder):
        recover(folder)
        try:
            for name, content in shards.items():
                # Shards get their final names at once: no other save uses these names, and no index lists them yet.
                path = folder / name
                _write_shard({x: tensors[x] for x in content}, unfinished(path) if name == SINGLE else path)
            if entry == INDEX:
                total = sum(x.nbytes for x in tensors.values())
                weight_map = {x: shard for shard, content in shards.items() for x in content}
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
                write_beside(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
            publish(folder, entry, None if config is None else config.encode())
        except BaseException:
            recover(folder)
            if not _published(folder, shards):
                for name in shards.keys() - {SINGLE}:
                    (folder / name).unlink(missing_ok=True)
            raise
        names = [*shards, entry] if entry == INDEX else [entry]
        for path in list(folder.iterdir()):
            if _SAVED_NAME.fullmatch(path.name) and path.name not in names:
                path.unlink()
        recover(folder)
    return names


def _published(folder: Path, shards: dict[str, list[str]]) -> bool:
    """Whether readers find these shards."""
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
    """Assigns the tensors, in their order, to as few files as possible; returns their names by file."""
    contents: list[list[str]] = []
    free = 0
    for name, tensor in tensors.items():
        if not contents or tensor.nbytes > free:
            contents.append([])
            free = max_shard_bytes
        contents[-1].append(name)
        free -= tensor.nbytes
    if len(contents) == 1:
        return {SINGLE: contents[0]}
    save = os.urandom(4).hex()
    return {f"model-{save}-{i:05d}-of-{len(contents):05d}.safetensors": x for i, x in enumerate(contents, 1)}


def _write_shard(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    path.unlink(missing_ok=True)  # It may be a link, which writing would follow.
    save_file({x: y.detach().cpu().contiguous() for x, y in tensors.items()}, path, metadata={"format": "pt"})
    with open(path, "rb+") as file:  # The data must be on the disk before the file replaces an earlier one.
        os.fsync(file.fileno())
