"""Memory that nobody has written to yet reads as NaN, or as the largest integer, in every test."""

import functools
from collections.abc import Callable

import torch
import torch.utils._device
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

ALLOCATORS = [(torch, name) for name in ("empty", "empty_like", "empty_strided", "empty_permuted")]
ALLOCATORS += [(torch.Tensor, name) for name in ("new_empty", "new_empty_strided")]
LARGEST = 1 << 28  # bytes; some tests reserve more memory than the machine has, and never touch it


def poison_empty_memory() -> None:
    """Replaces torch's allocators by functions that fill what they return. A second call does nothing."""
    # ``with torch.device(...)`` looks up the functions that it affects in a set, which must hold torch's own.
    torch.utils._device._device_constructors()
    for owner, name in ALLOCATORS:
        allocate = getattr(owner, name)
        if not hasattr(allocate, "__wrapped__"):
            setattr(owner, name, _poisoned(allocate))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def poisoned(*arguments, **options):
        x = allocate(*arguments, **options)
        # A program that is being captured would record the fill.
        captured = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()
        if captured or type(x) is not torch.Tensor or x.is_meta or x.is_sparse or x.nbytes > LARGEST:
            return x
        floating = x.is_floating_point() or x.is_complex()
        with torch.no_grad():
            x.fill_(torch.nan if floating else True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)
        return x

    return poisoned
