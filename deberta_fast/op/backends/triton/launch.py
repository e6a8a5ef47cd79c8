"""Launches and workspaces of a plan, which hold no tensors: those of a call are handed to them in a fixed order."""

from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

import torch

from ...call import TENSORS, Call

# The tensors that a caller hands over, and those that a plan allocates. A kernel's parameters have the same names.
GIVEN = (
    *Call._fields[:TENSORS], "slots", "first_of_slot", "output", "lse",
    "grad_output", "grad_lse", "grad_query", "grad_key", "grad_value", "grad_pos_key", "grad_pos_query",
)  # fmt: skip
ALLOCATED = (
    "key_spans", "key_table", "query_table", "c2p", "p2c", "partial_query", "partial_key", "lse_log2", "delta",
    "far_pos_key", "far_pos_query", "sums_pos_key", "sums_pos_query",
)  # fmt: skip
POSITION = {name: position for position, name in enumerate((*GIVEN, *ALLOCATED))}

Tensors = Sequence[torch.Tensor | None]  # in the order of POSITION


class Form(NamedTuple):
    """What a plan knows of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Workspace(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    zero: bool = False

    def allocate(self, like: torch.Tensor) -> torch.Tensor:
        return (like.new_zeros if self.zero else like.new_empty)(self.shape, dtype=self.dtype)


class Launch(NamedTuple):
    """One kernel on one grid.

    Attributes:
        tensors: picks the kernel's tensors, which are its first parameters.
        numbers: the values of its other parameters by name.
        configured: the field of the configuration that its tiles come from.
        compiled: Triton's compiled kernels by what it specialises on besides the numbers. Later calls, and launches for
            other parts, launch them directly: Triton takes several times longer to look a kernel up than to launch it.
            Settings of Triton's own, such as ``debug``, are those of the first launch.
    """

    kernel: object
    grid: tuple[int, int, int]
    tensors: itemgetter
    numbers: dict[str, object]
    warps: int
    stages: int
    configured: str | None
    compiled: dict[tuple, object]

    def run(self, tensors: Tensors, special: tuple) -> None:
        """Launches on the tensors, of which ``special`` is the result of ``specialisation``."""
        compiled = self.compiled.get(special)
        if compiled is not None:
            compiled[self.grid](*self.tensors(tensors), *self.numbers.values())
            return
        launch = self.kernel[self.grid]
        compiled = launch(**self.arguments(tensors), num_warps=self.warps, num_stages=self.stages)
        if compiled is not None:  # as with Triton's interpreter and with hooks that prevent a compilation
            self.compiled[special] = compiled

    def arguments(self, tensors: Tensors) -> dict[str, object]:
        """Returns all arguments by name, in the kernel's order."""
        return dict(zip(self.kernel.arg_names, (*self.tensors(tensors), *self.numbers.values()), strict=True))


def new_launch(kernel, grid: tuple[int, int, int], values: dict, tiles, configured: str | None) -> Launch:
    """Returns a launch; ``values`` has the kernel's numbers and perhaps others, ``tiles`` its warps and stages."""
    names = kernel.arg_names
    numbers = [name for name in names if name not in POSITION]
    tensors = [POSITION[name] for name in names[: -len(numbers)]]
    values = {name: values[name] for name in numbers}
    return Launch(kernel, grid, itemgetter(*tensors), values, tiles.warps, tiles.stages, configured, {})


def form_of(tensor: torch.Tensor | None) -> tuple | None:
    """Returns the fields of a tensor's ``Form``: a plain tuple is made faster."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


def specialisation(tensors: Tensors) -> tuple:
    """Returns what Triton specialises a kernel on besides numbers, dtypes and missing tensors.

    That is whether a tensor is aligned to 16 bytes, and on AMD whether its storage is below 2 GiB.
    """
    if torch.version.hip is None:
        return tuple([x is not None and x.data_ptr() % 16 == 0 for x in tensors])
    return tuple([x is not None and (x.data_ptr() % 16 == 0, x.untyped_storage().nbytes() < 2**31) for x in tensors])
