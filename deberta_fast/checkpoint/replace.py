"""Replaces files atomically, so that a killed save or a concurrent reader never sees half a checkpoint.

A save writes all its files beside those of the earlier one. It then renames config.json, and after that, with one
rename or removal, the file by which readers find the weights. A save that stops between the two steps leaves the new
configuration beside the old weights. Therefore the old configuration is kept until the second step, and ``config_file``
returns it.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from .error import CheckpointError
from .hub import Source

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Readers find the weights by the first of these files that exists.
ENTRIES = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5")
# Number of times that a reader starts again because a save has replaced the checkpoint.
_MOST_READS = 100
_Result = TypeVar("_Result")


def unfinished(path: Path) -> Path:
    """Returns the path where a file is written before it is renamed to ``path``."""
    return path.with_name(path.name + ".unfinished")


def write_beside(path: Path, content: bytes) -> None:
    """Writes ``content`` to ``unfinished(path)`` and flushes it to the disk."""
    beside = unfinished(path)
    try:
        beside.unlink(missing_ok=True)  # It may be a link, which writing would follow.
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def replace_file(path: Path, content: bytes) -> None:
    """Replaces a file or a link, not the file that a link points to. If that raises OSError, the file is unchanged."""
    write_beside(path, content)
    os.replace(unfinished(path), path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes other saves into the folder wait, if its file system supports locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            # Closing is not enough: a process forked meanwhile may hold the descriptor too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def publish(folder: Path, entry: str, config: bytes | None) -> None:
    """Publishes ``config``, if any, as config.json, and then the unfinished ``entry``, SINGLE or INDEX.

    If this raises or is killed, ``recover`` must follow.
    """
    path = folder / CONFIG
    hides = entry == INDEX and (folder / SINGLE).is_file()
    if hides:
        os.replace(unfinished(folder / INDEX), folder / INDEX)
    if config is not None:
        write_beside(path, config)
        if path.is_file() and path.read_bytes() != config:
            replace_file(_old_config(folder, config), path.read_bytes())
        os.replace(unfinished(path), path)
    if hides:
        (folder / SINGLE).unlink()
    else:
        os.replace(unfinished(folder / entry), folder / entry)


def config_file(source: Source) -> Path | None:
    """Returns the config.json that belongs to the weights in the folder; None if there is none."""
    path = source.file(CONFIG)
    if path is None or source.folder is None or not _old_configs(source.folder):
        return path
    old = _old_config(source.folder, path.read_bytes())
    return old if old.is_file() else path


def recover(folder: Path) -> None:
    """Cleans up after a save. If it stopped before it replaced the weights, the old config.json returns."""
    path = config_file(Source(folder))
    if path is not None and path.name != CONFIG:
        os.replace(path, folder / CONFIG)
    for stale in [*_old_configs(folder), *(unfinished(folder / x) for x in (CONFIG, SINGLE, INDEX))]:
        stale.unlink(missing_ok=True)


def unmixed(source: Source, read: Callable[[], _Result]) -> _Result:
    """Calls ``read`` until no save replaces the checkpoint meanwhile, and returns its result.

    Raises CheckpointError if a save replaces the checkpoint every time.
    """
    for _ in range(_MOST_READS):
        before = _identity(source)
        try:
            result = read()
        except (OSError, ValueError):
            if _identity(source) == before:
                raise
        else:
            if _identity(source) == before:
                return result
    raise CheckpointError(f"{source} was replaced {_MOST_READS} times while it was read")


def _old_config(folder: Path, config: bytes) -> Path:
    """Returns the path that keeps the configuration before ``config`` until the weights are replaced.

    Its name holds a hash of ``config`` and the weights, so it is ignored once either of them has changed.
    """
    import hashlib  # torch does not import it, and few processes need it.

    weights = next(filter(None, (_state(folder / name) for name in ENTRIES)), None)
    return folder / f"{CONFIG}.before-{hashlib.sha256(config + repr(weights).encode()).hexdigest()[:16]}"


def _old_configs(folder: Path) -> list[Path]:
    return list(folder.glob(f"{CONFIG}.before-*"))


def _identity(source: Source) -> list[tuple | None]:
    """Returns the states of the files that readers look for first. Every save changes them."""
    return [] if source.folder is None else [_state(source.folder / name) for name in (CONFIG, *ENTRIES)]


def _state(path: Path) -> tuple | None:
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns, state.st_size
