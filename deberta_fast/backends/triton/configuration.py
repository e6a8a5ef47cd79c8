"""Launch configurations: tile shapes, warps and pipeline stages of each kernel, by head size and dtype."""

from typing import NamedTuple


class Tiles(NamedTuple):
    """rows are a program's own, columns what it meets in one step of its loop; both divide the grain."""

    rows: int
    columns: int
    warps: int
    stages: int


class Configuration(NamedTuple):
    """``grain``: what near and far are told apart by, the same for all kernels that share a band."""

    grain: int
    bands: Tiles
    forward: Tiles
    backward_key: Tiles
    backward_query: Tiles
    backward_tables: Tiles


def default(block_size: int, itemsize: int) -> Configuration:
    """The configuration of a head size, padded to a power of two, and a dtype."""
    return Configuration(
        64,
        Tiles(64, 64, 4, 2),
        Tiles(64, 64, 4, 3),
        Tiles(64, 64, 4, 2),
        Tiles(64, 64, 4, 2),
        Tiles(64, 64, 4, 2),
    )
