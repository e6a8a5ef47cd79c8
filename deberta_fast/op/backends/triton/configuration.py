"""Launch configurations: tile shapes, warps and pipeline stages of each kernel, by GPU, head size and dtype.

The defaults were chosen by what the compiler makes of them (``bench/compile_report.py``): no spills inside a loop, few
instructions a score. ``autotune`` measures instead, and its choice goes before them.
"""

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from ..gpu import properties_of


class Tiles(NamedTuple):
    """rows are a program's own, columns what it meets in one step of its loop; both divide the grain."""

    rows: int
    columns: int
    warps: int
    stages: int

    def smaller(self) -> "Tiles | None":
        """What needs less shared memory: fewer stages first, then fewer columns, then fewer rows."""
        if self.stages > 1:
            return self._replace(stages=self.stages - 1)
        if self.columns > 16 and self.columns >= self.rows:
            return self._replace(columns=self.columns // 2)
        if self.rows > 16:
            return self._replace(rows=self.rows // 2)
        return None


class Configuration(NamedTuple):
    """``grain``: what near and far are told apart by, the same for all kernels that share a band; 128 at most."""

    grain: int
    bands: Tiles
    forward: Tiles
    backward_key: Tiles
    backward_query: Tiles
    backward_tables: Tiles

    def smaller(self, kernel: str) -> "Configuration | None":
        """With less shared memory for one kernel; None if there is no less."""
        tiles = getattr(self, kernel).smaller()
        return None if tiles is None else self._replace(**{kernel: tiles})


class Target(NamedTuple):
    """A configuration is made for one of these.

    ``architecture``: an NVIDIA GPU's compute capability, 90; an AMD GPU's processor, "gfx942"; "xpu" for Intel's.
    ``block_size``: the head size, padded to a power of two.
    """

    architecture: int | str
    block_size: int
    itemsize: int


def default(target: Target) -> Configuration:
    """The configuration that nobody has measured."""
    capability, size, itemsize = target
    if isinstance(capability, str):
        return _default_elsewhere(size)
    if itemsize == 4:
        return _default_32_bit(size)
    plain = Tiles(64, 64, 4, 2)
    if size <= 64:
        # Without the exceptions they would spill.
        key = Tiles(32, 64, 4, 2) if capability == 100 else Tiles(64, 32, 4, 2)
        query = {90: plain, 100: Tiles(64, 64, 4, 3), 120: Tiles(64, 64, 4, 3)}.get(capability, Tiles(64, 32, 4, 2))
        return Configuration(64, plain, plain, key, query, plain)
    if size == 128 and capability == 90:
        return Configuration(128, plain, plain, Tiles(64, 32, 4, 2), Tiles(128, 64, 8, 2), plain)
    small = Tiles(32, 32, 4 if size == 128 else 8, 2)
    if size == 128:
        wide = Tiles(64, 64, 8, 2)
        key, query = (small, Tiles(64, 32, 4, 1)) if capability == 100 else (wide, wide)
        return Configuration(128, plain, Tiles(128, 64, 8, 2), key, query, Tiles(64, 32, 4, 2))
    forward = {80: Tiles(64, 64, 8, 2), 90: Tiles(64, 32, 8, 2)}.get(capability, small)
    return Configuration(64, Tiles(64, 32, 8, 2), forward, small, small, small)


def _default_32_bit(size: int) -> Configuration:
    return Configuration(64, *[Tiles(32, 32, 4, 2) if size <= 128 else Tiles(16, 16, 4, 1)] * 5)


def _default_elsewhere(size: int) -> Configuration:
    """For AMD and Intel, any dtype: small tiles, and one stage, since a second one takes registers and shared memory.

    AMD's wavefronts are 64 wide: four of them are 256 threads, which have 512 registers each, two such workgroups 256.
    A workgroup may ask for 64 KiB.
    """
    if size > 128:
        return Configuration(64, *[Tiles(32, 32, 8, 1)] * 5)
    plain, wide = Tiles(64, 64, 4, 1), Tiles(64, 32, 4, 1)
    return Configuration(64, plain, wide, wide if size <= 64 else Tiles(32, 32, 4, 1), wide, plain)


_chosen: dict[tuple[str, Target], Configuration] = {}


def choose(device: torch.device, block_size: int, itemsize: int) -> tuple[tuple[str, Target], Configuration]:
    """The configuration for a device, by what it is remembered: shrunk, tuned or default."""
    key = _identity(device, block_size, itemsize)
    if key not in _chosen:
        # The interpreter takes as long for a small tile as for a large one.
        usual = Configuration(64, *[Tiles(64, 64, 4, 1)] * 5) if device.type == "cpu" else default(key[1])
        _chosen[key] = _saved(key) or usual
    return key, _chosen[key]


def remember(key: tuple[str, Target], configuration: Configuration) -> None:
    """For the rest of the process."""
    _chosen[key] = configuration


def save(key: tuple[str, Target], configuration: Configuration) -> Path:
    """For all processes to come on this GPU; returns the file."""
    path = _file(key[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = json.loads(path.read_text()) if path.exists() else {}
    saved[_entry(key[1])] = configuration._asdict()
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(saved, indent=1) + "\n")
    partial.replace(path)
    remember(key, configuration)
    return path


@functools.lru_cache(maxsize=64)
def _identity(device: torch.device, block_size: int, itemsize: int) -> tuple[str, Target]:
    if device.type == "cpu":
        return "cpu", Target(90, block_size, itemsize)
    gpu = properties_of(device)
    if device.type == "xpu":
        architecture = "xpu"
    elif torch.version.hip is not None:
        architecture = gpu.gcnArchName.partition(":")[0]  # gfx942:sramecc+:xnack-
    else:
        architecture = 10 * gpu.major + gpu.minor
    return gpu.name, Target(architecture, block_size, itemsize)


def _saved(key: tuple[str, Target]) -> Configuration | None:
    path = _file(key[0])
    if not path.exists():
        return None
    try:
        entry = json.loads(path.read_text()).get(_entry(key[1]))
        if entry is None:
            return None
        grain = entry.pop("grain")
        return Configuration(grain, **{name: Tiles(*tiles) for name, tiles in entry.items()})
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is no file of tuned configurations: delete it or tune again") from error


def _file(gpu: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "deberta_fast" / f"triton-{gpu.replace(' ', '-')}.json"


def _entry(target: Target) -> str:
    return f"head size to {target.block_size}, {8 * target.itemsize} bit"
