"""Whether a module is its class's and nothing more.

Only then may another computation stand in for a call of it, and only then does its output depend on nothing but its
input, its weights and its settings. Patched and native models ask here before they fuse a module or keep a value.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules import module as modules

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def why_not_ordinary(module: nn.Module, *kinds: type) -> str | None:
    """Says what makes a call of ``module`` more than the ``forward`` of one of ``kinds``; None if nothing does.

    A subclass is more, and so are a ``forward`` on the instance and hooks of any kind, global ones included. So is a
    parametrization, as it gives the module a class of its own.
    """
    if type(module) not in kinds:
        return f"a {type(module).__name__}, not {' or '.join(f'{kind.__module__}.{kind.__name__}' for kind in kinds)}"
    if "forward" in vars(module):
        return f"a {type(module).__name__} with another forward"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return f"a {type(module).__name__} with hooks"
    if modules._has_any_global_hook():
        return f"a {type(module).__name__} that hooks of all modules run on"
    return None


def overridden(module: nn.Module, base: type) -> str | None:
    """The first method of ``base`` that somebody has replaced: in the class of ``module``, on the module itself, or in
    ``base``; None if none is.

    ``forward`` is left to the caller: on a patched instance it is replaced. Special methods do not count.
    """
    methods = _methods(base)
    own = methods & vars(module).keys()
    if own:
        return min(own)
    if not torch.compiler.is_compiling():
        for name in methods:
            if not is_own_code(vars(base).get(name), base):
                return name
    return _overridden_by_class(type(module), base)


def is_own_code(function: Callable | None, kind: type) -> bool:
    """Whether a method comes from the module of its class: what others put there does not."""
    return getattr(function, "__module__", None) == kind.__module__


def constant(function: Callable) -> Callable:
    """A function of classes and numbers whose result never changes: computed once, and not traced by torch.compile."""
    cached = functools.lru_cache(maxsize=256)(function)

    @functools.wraps(function)
    def looked_up(*arguments):
        return cached(*arguments)

    looked_up._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result, which imports Dynamo
    return looked_up


@constant
def _methods(base: type) -> frozenset[str]:
    methods = {name for name, value in vars(base).items() if callable(value) and not name.startswith("__")}
    return frozenset(methods - {"forward"})


@constant
def _overridden_by_class(kind: type, base: type) -> str | None:
    return next((name for name in sorted(_methods(base)) if getattr(kind, name) is not vars(base)[name]), None)
