"""The drop-in for Hugging Face DeBERTa v1, v2 and v3: ``patch`` and ``unpatch``.

``patch`` gives the encoder, every attention module and the linear layers and norms between them a ``forward`` of their
own, on the instance: parameters, names, hooks, adapters around the projections, train/eval and state_dict stay as they
are. What the fused path lacks runs the original ``forward`` of the encoder, with one warning a model and reason.

transformers is recognised, never imported: whoever has a model to patch has imported it already.
"""

import functools
import sys
import warnings
from collections.abc import Callable

import torch
from torch import nn

from ..models.attention import Kept, attend, project_heads, project_table, split_heads
from ..models.encoder import normalised_table
from ..models.onednn_linear import project
from ..models.packing import Packing, check_unpad, packing_of, why_not
from ..models.weight_cache import WeightCache
from ..op import backends

_MARK = "_deberta_fast"
# What the patched encoder hands its layers as relative_pos: distances of tokens, which need no tensor. None would not
# do, since DeBERTa v1 leaves out the position terms then.
_TOKEN_DISTANCES = "token distances"


class _Patch:
    """What the patched modules of one model share."""

    def __init__(self, backend: str | None, unpad: bool | str):
        self.backend = backend
        self.unpad = unpad
        self.warned: set[str] = set()
        self.warned_of_padding = False

    def warn(self, reason: str) -> None:
        if reason in self.warned or torch.compiler.is_compiling():
            return
        self.warned.add(reason)
        warnings.warn(f"deberta_fast: running Hugging Face's own attention: {reason}", stacklevel=3)

    def warn_unless_warned(self, reason: str) -> None:
        """For an attention module below an encoder that falls back, and has said why."""
        if not self.warned:
            self.warn(reason)


def patch(
    model: nn.Module, backend: str | None = None, *, unpad: bool | str = False, constant_weights: bool = False
) -> nn.Module:
    """Makes every Hugging Face DeBERTa inside ``model`` run fused attention, in place.

    Args:
        model: any module that is or contains a DeBERTa v1, v2 or v3 (or only its encoder or attention): task models,
            wrappers such as GLiNER or sentence-transformers, models with LoRA adapters. transformers 4.48 or newer.
        backend: a name of ``backends.BACKENDS`` that must then serve every call; None for the best one call by call.
        unpad: True leaves padding out between the embeddings and the last layer's output, wherever a (B, L) mask
            holds some: layers then see (T, hidden_size), rows of padding come out as zeros, and where it stays
            (masks of pairs, captured programs) one warning says so. "auto" does so where it pays, without a word.
            Compiled and exported programs keep padding. On a GPU, to learn how many tokens there are means to wait.
        constant_weights: the promise that no weight will be written through ``.data``, which torch cannot see. In
            inference, what depends on weights alone is then kept on every device, without looking at them, and a copy
            of the projections of queries, keys and values as one matrix too. Writes that torch sees, casts, moves and
            training still count. Without it, projected position tables alone are kept, on a CPU.

    Returns:
        ``model``. Patching again replaces what was asked for before.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there is nothing to patch in it, or no backend of that name, or unpad is another value, or a
            ``forward`` that another tool put on one of the modules would be lost.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if backend is not None and backend not in backends.BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(backends.BACKENDS)} or None, got {backend!r}")
    check_unpad(unpad)
    unpatch(model)
    found = [(module, forward) for module in model.modules() if (forward := _fused_forward(module, _FUSED)) is not None]
    if not found:
        raise ValueError(
            f"nothing to patch in {type(model).__name__}: it contains no Hugging Face DeBERTa v1, v2 or v3 encoder or "
            "attention module with its own forward"
        )
    for module, _ in found:
        if not _is_own(module, vars(module).get(_place(module))):
            raise ValueError(
                f"the forward of a {type(module).__name__} was replaced by other code; undo that, or patch before it"
            )
    shared = _Patch(backend, unpad)
    for module, forward in found:
        _replace(module, functools.partial(forward, module, shared, Kept(constant_weights)))
    for module in model.modules():
        forward = _fused_forward(module, _POINTWISE)
        if forward is not None and _is_own(module, vars(module).get(_place(module))):
            _replace(module, functools.partial(forward, module))
    return model


def _replace(module: nn.Module, forward: Callable) -> None:
    place = _place(module)
    setattr(module, _MARK, {place: vars(module)[place]} if place in vars(module) else {})
    setattr(module, place, forward)


def unpatch(model: nn.Module) -> nn.Module:
    """Gives every patched module in ``model`` its own ``forward`` back; a model without any stays as it is.

    Raises:
        ValueError: other code replaced a patched ``forward`` and may still call it.
    """
    patched = [module for module in model.modules() if _MARK in vars(module)]
    for module in patched:
        if not _is_fused(vars(module).get(_place(module))):
            raise ValueError(
                f"the patched forward of a {type(module).__name__} was replaced by other code; undo that first"
            )
    for module in patched:
        place, before = _place(module), getattr(module, _MARK)
        delattr(module, place)
        if place in before:
            setattr(module, place, before[place])
        elif place != "forward":  # hooked since: accelerate calls what it has kept
            setattr(module, place, type(module).forward.__get__(module))
        delattr(module, _MARK)
    return model


def _place(module: nn.Module) -> str:
    """The attribute that runs last: accelerate's hooks take ``forward`` and keep what was there aside."""
    return "_old_forward" if hasattr(module, "_hf_hook") and "_old_forward" in vars(module) else "forward"


def _is_own(module: nn.Module, forward: Callable | None) -> bool:
    """Whether an instance's forward is just its class's, as where a hook came and went."""
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


def _is_fused(forward: Callable | None) -> bool:
    return isinstance(forward, functools.partial) and forward.func in (*_FUSED.values(), *_POINTWISE.values())


def _fused_forward(module: nn.Module, forwards: dict) -> Callable | None:
    kind = type(module)
    for base in kind.__mro__:
        forward = forwards.get((base.__module__.removeprefix("transformers.models."), base.__name__))
        if forward is not None:
            # A subclass with a forward of its own computes something else.
            return forward if kind.forward is base.forward else None
    return None


def _encoder(
    encoder: nn.Module,
    shared: _Patch,
    kept: Kept,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    output_hidden_states: bool = True,
    output_attentions: bool = False,
    query_states: torch.Tensor | None = None,
    relative_pos: torch.Tensor | None = None,
    return_dict: bool = True,
):
    """DebertaEncoder and DebertaV2Encoder without the (B, 1, L, L) mask and the (L, L) relative positions."""
    reason = None
    if output_attentions:
        reason = "output_attentions=True needs the probabilities, which the fused path never holds"
    elif relative_pos is not None:
        reason = "a custom relative_pos is not fused"
    elif query_states is not None:
        reason = "query_states handed to the encoder are not fused"
    elif any(getattr(layer.attention.self, "talking_head", False) for layer in encoder.layer):
        reason = "talking heads are not fused"
    elif not all(hasattr(layer.attention.self, _MARK) for layer in encoder.layer):
        reason = "a layer's attention is not a patched one"
    if reason is not None:
        shared.warn(reason)
        return type(encoder).forward(
            encoder, hidden_states, attention_mask, output_hidden_states, output_attentions, query_states, relative_pos,
            return_dict,
        )  # fmt: skip

    states = _layers(encoder, shared, kept, hidden_states, attention_mask, output_hidden_states)
    output, states = states[-1], states if output_hidden_states else None
    if not return_dict:
        return tuple(x for x in (output, states) if x is not None)
    return sys.modules[type(encoder).__module__].BaseModelOutput(last_hidden_state=output, hidden_states=states)


def _layers(
    encoder: nn.Module,
    shared: _Patch,
    kept: Kept,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | Packing,
    output_hidden_states: bool,
) -> tuple[torch.Tensor, ...]:
    """Every layer's output, the embeddings first; the last one alone without output_hidden_states."""
    packing = _packing(shared, attention_mask)
    if packing is not None:
        shape = hidden_states.shape[:2]
        states = _layers(encoder, shared, kept, packing.pack(hidden_states), packing, output_hidden_states)
        return tuple(packing.pad(x, *shape) for x in states)
    mask = attention_mask if isinstance(attention_mask, Packing) else attention_mask.bool()
    rel_embeddings = _table(encoder, kept.tables)
    conv = getattr(encoder, "conv", None)
    states = (hidden_states,)
    for index, layer in enumerate(encoder.layer):
        call = layer
        if encoder.gradient_checkpointing and encoder.training and not hasattr(layer, "gradient_checkpointing"):
            call = functools.partial(encoder._gradient_checkpointing_func, layer.__call__)  # transformers < 4.53
        # By position, not by name: reentrant checkpointing detaches positional tensors alone, and would walk the graph
        # of the normalised table once a layer otherwise.
        output = call(states[-1], mask, None, _TOKEN_DISTANCES, rel_embeddings, False)[0]
        if index == 0 and conv is not None and isinstance(mask, Packing):
            output = mask.convolve(conv, hidden_states, output)
        elif index == 0 and conv is not None:
            token_mask = attention_mask if attention_mask.dim() <= 2 else attention_mask.sum(-2) > 0
            output = conv(hidden_states, output, token_mask)
        states = (*states, output) if output_hidden_states else (output,)
    return states


def _table(encoder: nn.Module, kept: WeightCache) -> torch.Tensor | None:
    """Relative positions, (R, hidden_size)."""
    own = type(encoder).get_rel_embedding.__qualname__ == "DebertaV2Encoder.get_rel_embedding"
    if not (own and encoder.relative_attention and "layer_norm" in encoder.norm_rel_ebd):
        return encoder.get_rel_embedding()
    return normalised_table(encoder.rel_embeddings.weight, encoder.LayerNorm, kept)


def _packing(shared: _Patch, attention_mask: torch.Tensor | Packing) -> Packing | None:
    if not shared.unpad or isinstance(attention_mask, Packing):
        return None
    reason = why_not(attention_mask)
    if reason is None:
        return packing_of(attention_mask.bool(), shared.unpad)
    if shared.unpad is True and not (shared.warned_of_padding or torch.compiler.is_compiling()):
        shared.warned_of_padding = True
        warnings.warn(f"deberta_fast: padding stays, in spite of unpad=True: {reason}", stacklevel=2)
    return None


def _attention_v2(
    attention: nn.Module,
    shared: _Patch,
    kept: Kept,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | Packing,
    output_attentions: bool = False,
    query_states: torch.Tensor | None = None,
    relative_pos: torch.Tensor | None = None,
    rel_embeddings: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """DisentangledSelfAttention of v2 and v3; the mask may be (B, L), (B, L, L) or (B, 1, L, L)."""
    reason = _attention_reason(attention, output_attentions, relative_pos)
    if reason is not None:
        shared.warn_unless_warned(reason)
        return type(attention).forward(
            attention, hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
        )
    linears = (attention.query_proj, attention.key_proj, attention.value_proj)
    query, key, value = project_heads(linears, hidden_states, query_states, attention.num_attention_heads, kept.joint)
    c2p, p2c = ("c2p" in attention.pos_att_type), ("p2c" in attention.pos_att_type)
    positions = {}
    if attention.relative_attention:
        names = ("key_proj", "query_proj") if attention.share_att_key else ("pos_key_proj", "pos_query_proj")
        positions = project_table(
            rel_embeddings,
            query,
            key,
            attention_mask,
            getattr(attention, names[0]) if c2p else None,
            getattr(attention, names[1]) if p2c else None,
            attention.pos_dropout,
            kept.tables,
            position_buckets=attention.position_buckets,
            max_relative_positions=attention.max_relative_positions,
        )
    return _fused(attention, shared, query, key, value, attention_mask, 1 + c2p + p2c, positions)


def _attention_v1(
    attention: nn.Module,
    shared: _Patch,
    kept: Kept,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | Packing,
    output_attentions: bool = False,
    query_states: torch.Tensor | None = None,
    relative_pos: torch.Tensor | None = None,
    rel_embeddings: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """DisentangledSelfAttention of v1; masks as in v2."""
    reason = _attention_reason(attention, output_attentions, relative_pos)
    if attention.talking_head:
        reason = "talking heads are not fused"
    elif query_states is not None:
        reason = "query_states of DeBERTa v1 are not fused"
    if reason is not None:
        shared.warn_unless_warned(reason)
        return type(attention).forward(
            attention, hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
        )
    heads = attention.num_attention_heads
    query, key, value = split_heads(project(attention.in_proj, hidden_states), heads).chunk(3, dim=-1)
    query = query + attention.q_bias.view(heads, -1)
    value = value + attention.v_bias.view(heads, -1)
    positions = {}
    if attention.relative_attention and rel_embeddings is not None and relative_pos is not None:
        positions = project_table(
            rel_embeddings,
            query,
            key,
            attention_mask,
            attention.pos_proj if "c2p" in attention.pos_att_type else None,
            attention.pos_q_proj if "p2c" in attention.pos_att_type else None,
            attention.pos_dropout,
            kept.tables,
            position_buckets=-1,
            max_relative_positions=attention.max_relative_positions,
        )
    return _fused(attention, shared, query, key, value, attention_mask, 1 + len(attention.pos_att_type), positions)


def _add_and_norm(module: nn.Module, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
    return module.LayerNorm(module.dropout(project(module.dense, hidden_states)) + input_tensor)


def _intermediate(module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    return module.intermediate_act_fn(project(module.dense, hidden_states))


def _layer_norm(norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """v1's own, which is written out in eight passes over memory, and is float32's whatever the dtype."""
    if not hidden_states.dtype == norm.weight.dtype == norm.bias.dtype or hidden_states.dtype == torch.float64:
        return type(norm).forward(norm, hidden_states)
    return nn.functional.layer_norm(hidden_states, norm.weight.shape, norm.weight, norm.bias, norm.variance_epsilon)


_FUSED = {
    ("deberta.modeling_deberta", "DebertaEncoder"): _encoder,
    ("deberta.modeling_deberta", "DisentangledSelfAttention"): _attention_v1,
    ("deberta_v2.modeling_deberta_v2", "DebertaV2Encoder"): _encoder,
    ("deberta_v2.modeling_deberta_v2", "DisentangledSelfAttention"): _attention_v2,
}
# Left as they are where other code replaced them
_POINTWISE = {
    ("deberta.modeling_deberta", "DebertaSelfOutput"): _add_and_norm,
    ("deberta.modeling_deberta", "DebertaOutput"): _add_and_norm,
    ("deberta.modeling_deberta", "DebertaIntermediate"): _intermediate,
    ("deberta.modeling_deberta", "DebertaLayerNorm"): _layer_norm,
    ("deberta_v2.modeling_deberta_v2", "DebertaV2SelfOutput"): _add_and_norm,
    ("deberta_v2.modeling_deberta_v2", "DebertaV2Output"): _add_and_norm,
    ("deberta_v2.modeling_deberta_v2", "DebertaV2Intermediate"): _intermediate,
}


def _attention_reason(attention: nn.Module, output_attentions: bool, relative_pos: torch.Tensor | None) -> str | None:
    if output_attentions:
        return "output_attentions=True needs the probabilities, which the fused path never holds"
    if isinstance(relative_pos, torch.Tensor):
        return "a custom relative_pos is not fused"
    if not isinstance(attention.dropout, nn.Dropout | nn.Identity):
        return f"the attention's dropout is a {type(attention.dropout).__name__}, not torch's"
    return None


def _fused(attention, shared, query, key, value, mask, terms, positions) -> tuple[torch.Tensor, None]:
    if isinstance(mask, torch.Tensor):
        mask = mask.bool().unsqueeze(1) if mask.dim() == 3 else mask.bool()
    context = attend(
        query,
        key,
        value,
        mask,
        # Hugging Face counts the terms of pos_att_type, also where relative_attention is off and none is there.
        scale=(query.shape[-1] * terms) ** -0.5,
        dropout_p=getattr(attention.dropout, "p", 0.0) if attention.dropout.training else 0.0,
        backend=shared.backend,
        **positions,
    )
    return context, None
