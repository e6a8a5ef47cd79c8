"""Checks that a module is exactly its class, without hooks or overrides.

Only then may another computation replace a call of it, and its output depends only on its input, weights and settings.
Patched and native models check this before they fuse a module or cache a value.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules import module as modules

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def why_not_ordinary(module: nn.Module, *kinds: type) -> str | None:
    """The reason why a call of ``module`` may do more than the ``forward`` of one of ``kinds``, or None.

    Reasons are a subclass, a ``forward`` on the instance, and hooks of any kind, including global ones. A
    parametrization counts as a subclass, because it changes the module's class.
    """
    if type(module) not in kinds:
        return f"a {type(module).__name__}, not {' or '.join(f'{kind.__module__}.{kind.__name__}' for kind in kinds)}"
    if "forward" in vars(module):
        return f"a {type(module).__name__} with another forward"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return f"a {type(module).__name__} with hooks"
    if modules._has_any_global_hook():
        return f"a {type(module).__name__} on which global hooks run"
    return None


def overridden(module: nn.Module, base: type) -> str | None:
    """The first method of ``base`` that was replaced in the class of ``module``, on it, or in ``base``; or None.

    Special methods do not count, nor does ``forward``, which patching replaces.
    """
    methods = _methods(base)
    if own := methods & vars(module).keys():
        return min(own)
    if not torch.compiler.is_compiling():
        for name in methods:
            if not is_own_code(vars(base).get(name), base):
                return name
    return _overridden_by_class(type(module), base)


def is_own_code(function: Callable | None, kind: type) -> bool:
    """Whether a method is defined in the module of its class."""
    return getattr(function, "__module__", None) == kind.__module__


def constant(function: Callable) -> Callable:
    """Decorates a function of classes and numbers: the result is cached, and torch.compile does not trace it."""
    cached = functools.lru_cache(maxsize=256)(function)

    @functools.wraps(function)
    def looked_up(*arguments):
        return cached(*arguments)

    looked_up._dynamo_marked_constant = True  # torch.compiler.assume_constant_result sets this too, but imports Dynamo
    return looked_up


@constant
def _methods(base: type) -> frozenset[str]:
    methods = {name for name, value in vars(base).items() if callable(value) and not name.startswith("__")}
    return frozenset(methods - {"forward"})


@constant
def _overridden_by_class(kind: type, base: type) -> str | None:
    return next((name for name in sorted(_methods(base)) if getattr(kind, name) is not vars(base)[name]), None)
