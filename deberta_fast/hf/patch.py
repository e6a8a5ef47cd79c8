"""``patch`` and ``unpatch``: they give modules of a Hugging Face model another ``forward``, and take it away again.

The encoder, every attention module and the linear layers and norms between them get it, on the instance, and so do
whole models, which take packed sequences then. Parameters, names, hooks, adapters around the projections, train/eval
and state_dict stay as they are. A call that the fused path cannot serve runs the encoder's original ``forward``, with
one warning per model and reason.

transformers is recognised by the names of classes, never imported: whoever has a model to patch has imported it.
"""

import functools
from collections.abc import Callable

from torch import nn

from ..models.attention import AttentionCache
from ..op import backends
from .fallback import MARK, Shared, hf_class, inherits_forward, is_own_forward, place_of_forward
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
            on a GPU, backends have to prove themselves for half-precision weights now (``set_backend_check``).
        unpad: True takes padding out between the embeddings and the last layer's output, wherever a (B, L) mask has
            some: layers see (T, hidden_size). Where padding stays (masks of pairs, captured programs), one warning
            says so. "auto" does so where it pays, without a warning. Compiled and exported programs keep padding. On a
            GPU this costs one synchronisation per call.
        padding_rows: what the encoder gives for rows of padding. With "hf", Hugging Face's values, as losses, pooling
            over all positions and heads behind left padding read them; with unpad, one row a sequence stands for all
            of its padding, with one draw of dropout. With "zeros", zeros, for who reads no such row.
        constant_weights: the promise that no weight will be written through ``.data``, which torch cannot see. In
            inference, values that depend only on weights are then kept on every device, and no call compares the
            weights; a copy of the three projections as one matrix is kept too. Writes that torch sees, steps of
            optimizers, casts, moves and training still count. Without the promise, only projected position tables are
            kept, on a CPU, with a copy of what they were made of, which every call is compared with.

    Returns:
        ``model``. Patching again replaces the earlier settings.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` contains nothing to patch, no backend has that name, unpad or padding_rows is another
            value, or a ``forward`` that another tool put on one of the modules would be lost.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    backends.check_name(backend)
    shared = Shared(backend, unpad, padding_rows)
    unpatch(model)
    found = [(module, forward) for module in model.modules() if (forward := _fused_forward(module, FUSED)) is not None]
    if not found:
        raise ValueError(
            f"nothing to patch in {type(model).__name__}: it contains no Hugging Face DeBERTa v1, v2 or v3 encoder or "
            "attention module with its own forward"
        )
    for module, _ in found:
        if not is_own_forward(module, vars(module).get(place_of_forward(module))):
            raise ValueError(
                f"the forward of a {type(module).__name__} was replaced by other code; undo that, or patch before it"
            )
    for module, forward in found:
        _replace(module, functools.partial(forward, module, shared, AttentionCache(constant_weights)))
        prepare_attention(module, backend)
    for module in model.modules():
        forward = _fused_forward(module, POINTWISE)
        if forward is not None and is_own_forward(module, vars(module).get(place_of_forward(module))):
            _replace(module, functools.partial(forward, module))
        if _is_model(module) and is_own_forward(module, vars(module).get(place_of_forward(module))):
            run = functools.partial(run_model, module, shared)
            run.__signature__ = signature_of(module)  # the Trainer, PEFT and exporters look at it
            _replace(module, run)
    return model


def _replace(module: nn.Module, forward: Callable) -> None:
    place = place_of_forward(module)
    setattr(module, MARK, {place: vars(module)[place]} if place in vars(module) else {})
    setattr(module, place, forward)


def unpatch(model: nn.Module) -> nn.Module:
    """Gives every patched module in ``model`` its own ``forward`` back. A model without any stays as it is.

    Raises:
        ValueError: other code replaced a patched ``forward`` and may still call it.
    """
    patched = [module for module in model.modules() if MARK in vars(module)]
    for module in patched:
        # Code that replaced a whole model's forward, as accelerate does, may go on calling it: it runs the original.
        if not (_is_fused(vars(module).get(place_of_forward(module))) or _is_model(module)):
            raise ValueError(
                f"the patched forward of a {type(module).__name__} was replaced by other code; undo that first"
            )
    for module in patched:
        place, before = place_of_forward(module), getattr(module, MARK)
        if not _is_fused(vars(module).get(place)):
            delattr(module, MARK)
            continue
        delattr(module, place)
        if place in before:
            setattr(module, place, before[place])
        elif place != "forward":  # a hook came after patch: accelerate calls this attribute
            setattr(module, place, type(module).forward.__get__(module))
        delattr(module, MARK)
    return model


def _is_fused(forward: Callable | None) -> bool:
    return isinstance(forward, functools.partial) and forward.func in (*FUSED.values(), *POINTWISE.values(), run_model)


def _fused_forward(module: nn.Module, forwards: dict) -> Callable | None:
    return forwards.get(_own_class(module))


def _is_model(module: nn.Module) -> bool:
    return _own_class(module) in MODELS


def _own_class(module: nn.Module) -> tuple[str, str] | None:
    """Module and class of Hugging Face's, as the tables of forwards call them; None for other modules."""
    own = hf_class(type(module))
    if own is None or not inherits_forward(type(module)):
        return None  # a subclass with a forward of its own computes something else
    return own.__module__.removeprefix("transformers.models."), own.__name__
