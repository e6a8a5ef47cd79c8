"""Which DistributedDataParallel holds a model: past it, every process trains with gradients of its own."""

import gc
import weakref

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

_wrappers: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _note(owner: nn.Module, name: str, module: nn.Module | None) -> None:
    if isinstance(owner, nn.parallel.DistributedDataParallel):
        _wrappers.add(owner)


# A wrapped module looks as it did before: the wrapper is seen only while it is made.
register_module_module_registration_hook(_note)


def passes_by_wrapper(model: nn.Module) -> bool:
    """Whether a call of ``model`` from here on would train it without the DistributedDataParallel that holds it."""
    if torch.compiler.is_compiling() or not _wrappers or not torch.is_grad_enabled():
        return False
    if nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None or not _held(model):
        return False
    gc.collect()  # a wrapper that nobody has any more may be part of a cycle
    return _held(model)


def _held(model: nn.Module) -> bool:
    # With the reducer in Python, the wrapper's forward does nothing that training needs
    wrappers = [wrapper for wrapper in _wrappers if not wrapper._use_python_reducer]
    return any(module is model for wrapper in wrappers for module in wrapper.modules())
