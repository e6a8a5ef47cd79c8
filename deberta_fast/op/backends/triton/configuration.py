"""Launch configurations: tile shape, warps and pipeline stages per kernel, by architecture, head size and dtype.

The defaults follow from the compiled code (``bench/compile_report.py``): no spills inside a loop, few instructions per
score. ``bench/triton_kernels.py`` measures others on a GPU.
"""

import functools
from typing import NamedTuple

import torch

from ..gpu import properties_of


class Tiles(NamedTuple):
    """Tile shape: a program owns ``rows`` and takes ``columns`` per loop step. Both divide the alignment."""

    rows: int
    columns: int
    warps: int
    stages: int

    def smaller(self) -> "Tiles | None":
        """Returns tiles that need less shared memory: fewer stages first, then fewer columns, then fewer rows."""
        if self.stages > 1:
            return self._replace(stages=self.stages - 1)
        if self.columns > 16 and self.columns >= self.rows:
            return self._replace(columns=self.columns // 2)
        if self.rows > 16:
            return self._replace(rows=self.rows // 2)
        return None


class Configuration(NamedTuple):
    """The tiles of every kernel.

    ``alignment``: near and far segments begin and end at multiples of it, at most 128. All kernels that share a band
    share it.
    """

    alignment: int
    bands: Tiles
    forward: Tiles
    backward_key: Tiles
    backward_query: Tiles
    backward_tables: Tiles

    def smaller(self, kernel: str) -> "Configuration | None":
        """Returns a configuration with less shared memory for one kernel, or None if it has the least."""
        tiles = getattr(self, kernel).smaller()
        return None if tiles is None else self._replace(**{kernel: tiles})


class Target(NamedTuple):
    """The key of a configuration.

    ``architecture``: an NVIDIA GPU's compute capability, 90; an AMD GPU's processor, "gfx942"; "xpu" for Intel's.
    ``block_d``: the head size, padded to a power of two.
    """

    architecture: int | str
    block_d: int
    itemsize: int


def default(target: Target) -> Configuration:
    """Returns the untuned default configuration."""
    capability, size, itemsize = target
    if isinstance(capability, str):
        return _default_elsewhere(size)
    if itemsize == 4:
        return Configuration(64, *[Tiles(32, 32, 4, 2) if size <= 128 else Tiles(16, 16, 4, 1)] * 5)
    plain = Tiles(64, 64, 4, 2)
    if size <= 64:
        # Other tiles spill on these architectures.
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


def _default_elsewhere(size: int) -> Configuration:
    """Returns the default for AMD and Intel, any dtype: small tiles, and one stage to save registers and shared memory.

    AMD's wavefronts are 64 wide: four of them are 256 threads, which have 512 registers each, two such workgroups 256.
    A workgroup may ask for 64 KiB.
    """
    if size > 128:
        return Configuration(64, *[Tiles(32, 32, 8, 1)] * 5)
    plain, wide = Tiles(64, 64, 4, 1), Tiles(64, 32, 4, 1)
    return Configuration(64, plain, wide, wide if size <= 64 else Tiles(32, 32, 4, 1), wide, plain)


_chosen: dict[Target, Configuration] = {}  # by shared memory or by a benchmark, for the rest of the process


def choose(target: Target) -> Configuration:
    """Returns the configuration set for a target, else the default."""
    return _chosen.get(target) or default(target)


def set_configuration(target: Target, configuration: Configuration | None) -> None:
    """Sets a target's configuration for the rest of the process; None restores the default."""
    if configuration is None:
        _chosen.pop(target, None)
    else:
        _chosen[target] = configuration


@functools.lru_cache(maxsize=64)
def target_of(device: torch.device, block_d: int, itemsize: int) -> Target:
    gpu = properties_of(device)
    if device.type == "xpu":
        architecture = "xpu"
    elif torch.version.hip is not None:
        architecture = gpu.gcnArchName.partition(":")[0]  # gfx942:sramecc+:xnack-
    else:
        architecture = 10 * gpu.major + gpu.minor
    return Target(architecture, block_d, itemsize)
