"""Detects a DistributedDataParallel that holds a model: calls that bypass it would train with unreduced gradients."""

import gc
import weakref

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

_wrappers: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _note(owner: nn.Module, name: str, module: nn.Module | None) -> None:
    if isinstance(owner, nn.parallel.DistributedDataParallel):
        _wrappers.add(owner)


# A module has no reference to its wrapper, so the wrapper is recorded when it registers the module.
register_module_module_registration_hook(_note)


def passes_by_wrapper(model: nn.Module) -> bool:
    """Whether a call of ``model`` here would bypass the DistributedDataParallel that holds it, and train."""
    if torch.compiler.is_compiling() or not _wrappers or not torch.is_grad_enabled():
        return False
    if nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None or not _held(model):
        return False
    gc.collect()  # an unused wrapper may still be alive in a reference cycle
    return _held(model)


def _held(model: nn.Module) -> bool:
    # The reducer in Python does not need the wrapper's forward in training
    wrappers = [wrapper for wrapper in _wrappers if not wrapper._use_python_reducer]
    return any(module is model for wrapper in wrappers for module in wrapper.modules())
