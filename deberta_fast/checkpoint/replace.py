"""How files take the place of earlier ones: whole, or not at all, whatever stops a save and whoever reads meanwhile.

A save writes all its files beside those of the earlier one. Then it renames config.json, and in the next step, with one
rename or removal, the file by which the weights are found becomes the new one. Should it stop between the two, the new
configuration would describe the old weights; hence the old one is kept until then, and ``config_file`` finds it.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from .error import CheckpointError
from .hub import Source

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# By which of these the weights are found: by the first that is there.
ENTRIES = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5")
# A reader that is overtaken by more saves than this reads a folder that is no checkpoint's.
_MOST_READS = 100
_Result = TypeVar("_Result")


def unfinished(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(path.name + ".unfinished")


def write_beside(path: Path, content: bytes) -> None:
    """Writes ``content`` to ``unfinished(path)``, down to the disk."""
    beside = unfinished(path)
    try:
        beside.unlink(missing_ok=True)  # which may be a link to anywhere
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def replace_file(path: Path, content: bytes) -> None:
    """Makes ``content`` that of the file; a link is replaced, and what it points to is not touched.

    Raises:
        OSError: it cannot be written; then the earlier file is as it was.
    """
    write_beside(path, content)
    os.replace(unfinished(path), path)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, other saves into the folder wait. Where its file system has no locks they do not."""
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
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # by name: a process that was forked meanwhile has it open too
        os.close(descriptor)


def publish(folder: Path, entry: str, config: bytes | None) -> None:
    """Makes ``config``, if any, config.json, and then the unfinished ``entry``, SINGLE or INDEX, the one that counts.

    Where this raises or is killed, ``settle`` must follow.
    """
    path = folder / CONFIG
    hides = entry == INDEX and (folder / SINGLE).is_file()
    if hides:
        os.replace(unfinished(folder / INDEX), folder / INDEX)
    if config is not None:
        write_beside(path, config)
        if path.is_file() and path.read_bytes() != config:
            replace_file(_kept(folder, config), path.read_bytes())
        os.replace(unfinished(path), path)
    if hides:
        (folder / SINGLE).unlink()
    else:
        os.replace(unfinished(folder / entry), folder / entry)


def config_file(source: Source) -> Path | None:
    """The config.json that belongs to the weights that are there; None if there is none."""
    path = source.file(CONFIG)
    if path is None or source.folder is None or not _all_kept(source.folder):
        return path
    kept = _kept(source.folder, path.read_bytes())
    return kept if kept.is_file() else path


def settle(folder: Path) -> None:
    """Tidies up behind a save or one that was stopped: the old config.json returns where the old weights still are."""
    path = config_file(Source(folder))
    if path is not None and path.name != CONFIG:
        os.replace(path, folder / CONFIG)
    for stale in [*_all_kept(folder), *(unfinished(folder / x) for x in (CONFIG, SINGLE, INDEX))]:
        stale.unlink(missing_ok=True)


def unmixed(source: Source, read: Callable[[], _Result]) -> _Result:
    """Returns what ``read`` gives, and reads again where a save has replaced the checkpoint meanwhile.

    Raises:
        CheckpointError: it was replaced every time.
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


def _kept(folder: Path, config: bytes) -> Path:
    """Where the configuration before ``config`` is kept until the weights that are there now are replaced.

    The name says which both are, so that it means nothing once others have written to the folder.
    """
    import hashlib  # which torch does not import, and few need

    weights = next(filter(None, (_state(folder / name) for name in ENTRIES)), None)
    return folder / f"{CONFIG}.before-{hashlib.sha256(config + repr(weights).encode()).hexdigest()[:16]}"


def _all_kept(folder: Path) -> list[Path]:
    return list(folder.glob(f"{CONFIG}.before-*"))


def _identity(source: Source) -> list[tuple | None]:
    """A save changes it: which files are meant by the names that readers begin with."""
    return [] if source.folder is None else [_state(source.folder / name) for name in (CONFIG, *ENTRIES)]


def _state(path: Path) -> tuple | None:
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns, state.st_size
