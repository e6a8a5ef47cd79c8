"""``patch`` and ``unpatch`` give modules of a Hugging Face model another ``forward``, and restore the original.

The forwards are set on the instances of the encoder, of every attention module, and of the linear layers and norms
between them. Whole models also get one, and then take packed sequences. Parameters, names, hooks, adapters around the
projections, train/eval and state_dict stay as they are. A call that the fused path cannot
serve runs the encoder's original ``forward``, with one warning per model and reason.

transformers is recognised by the names of classes and never imported: a caller with a model to patch has imported it.
"""

import functools
from collections.abc import Callable

from torch import nn

from ..models.attention import AttentionCache
from ..op import backends
from .fallback import MARK, Shared, forward_attribute, hf_class, inherits_forward, instance_forward, runs_class_forward
from .forwards import FUSED, POINTWISE, prepare_attention
from .packed import MODELS, run_model, signature_of


def patch(
    model: nn.Module,
    backend: str | None = None,
    *,
    unpad: bool | str = False,
    padding_rows: str = "hf",
    constant_weights: bool = False,
) -> nn.Module:
    """Makes every Hugging Face DeBERTa inside ``model`` run fused attention, in place.

    Args:
        model: any module that is or contains a DeBERTa v1, v2 or v3 (or only its encoder or attention): task models,
            wrappers such as GLiNER or sentence-transformers, models with LoRA adapters. transformers 4.48 or newer.
        backend: a name of ``backends.BACKENDS`` that must then serve every call. None chooses the best for each call;
            on a GPU, the backends are checked now if the weights are half-precision (``set_backend_check``).
        unpad, padding_rows: see ``PreTrainedModel.set_unpad``; here the default keeps padding.
        constant_weights: promises that weights stay constant, see ``PreTrainedModel.set_constant_weights``.

    Returns:
        ``model``. Patching again replaces the earlier settings.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` contains nothing to patch, backend, unpad or padding_rows is not as described, or a
            ``forward`` that another tool put on one of the modules would be lost.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    backends.check_name(backend)
    shared = Shared(backend, unpad, padding_rows)
    unpatch(model)
    found = [(module, FUSED[key]) for module in model.modules() if (key := _own_class(module)) in FUSED]
    if not found:
        raise ValueError(
            f"nothing to patch in {type(model).__name__}: it contains no Hugging Face DeBERTa v1, v2 or v3 encoder or "
            "attention module with its own forward"
        )
    for module, _ in found:
        if not runs_class_forward(module):
            raise ValueError(
                f"the forward of a {type(module).__name__} was replaced by other code; undo that, or patch before it"
            )
    for module, forward in found:
        _replace(module, functools.partial(forward, module, shared, AttentionCache(constant_weights)))
        prepare_attention(module, backend)
    for module in model.modules():
        key = _own_class(module)
        if key in POINTWISE and runs_class_forward(module):
            _replace(module, functools.partial(POINTWISE[key], module))
        if key in MODELS and runs_class_forward(module):
            run = functools.partial(run_model, module, shared)
            # The Trainer, PEFT and exporters read the signature.
            run.__signature__ = signature_of(module)  # type: ignore[attr-defined]
            _replace(module, run)
    return model


def _replace(module: nn.Module, forward: Callable) -> None:
    name = forward_attribute(module)
    setattr(module, MARK, {name: vars(module)[name]} if name in vars(module) else {})
    setattr(module, name, forward)


def unpatch(model: nn.Module) -> nn.Module:
    """Gives every patched module in ``model`` its own ``forward`` back. A model without any stays as it is.

    Raises:
        ValueError: other code replaced a patched ``forward`` and may still call it, or processes share sequences.
    """
    patched = [module for module in model.modules() if MARK in vars(module)]
    for module in patched:
        settings = (x for x in getattr(instance_forward(module), "args", ()) if isinstance(x, Shared))
        if any(shared.context is not None for shared in settings):
            raise ValueError(
                "processes share the sequences of this model, which only patched modules can: end that first, "
                "context_parallel(model, False)"
            )
        # Code that replaced a whole model's forward, as accelerate does, may still call it: it runs the original.
        if not (_is_patched(module) or _own_class(module) in MODELS):
            raise ValueError(
                f"the patched forward of a {type(module).__name__} was replaced by other code; undo that first"
            )
    for module in patched:
        name, before = forward_attribute(module), getattr(module, MARK)
        if _is_patched(module):
            delattr(module, name)
            if name in before:
                setattr(module, name, before[name])
            elif name != "forward":  # a hook came after patch: accelerate calls this attribute
                setattr(module, name, type(module).forward.__get__(module))
        delattr(module, MARK)
    return model


def _is_patched(module: nn.Module) -> bool:
    forward = instance_forward(module)
    return isinstance(forward, functools.partial) and forward.func in (*FUSED.values(), *POINTWISE.values(), run_model)


def _own_class(module: nn.Module) -> str | None:
    """The name of the module's Hugging Face class, by which forwards are looked up; None for other modules."""
    own = hf_class(type(module))
    if own is None or not inherits_forward(type(module)):
        return None  # a subclass with another forward computes something else
    return own.__name__
