"""The forwards that ``patch`` gives Hugging Face's modules. Each hands over to ``models.attention`` or
``models.encoder``; what those lack runs the original forward.

The module itself is every forward's first argument, so that copies and pickles of a patched model are patched too.
"""

import functools
import sys
from collections.abc import Collection

import torch
from torch import nn

from ..models.attention import (
    AttentionCache,
    PositionTerms,
    dropout_of,
    prepare,
    project_heads,
    run_attention,
    split_heads,
)
from ..models.encoder import add_and_norm, intermediate, normalised_table, run_layers
from ..models.onednn_linear import project
from ..models.packing import Packing
from ..models.weight_cache import WeightCache
from .fallback import Shared, attention_reason, encoder_reason, hf_class, is_v1, module_reason

# The encoder hands this to its layers as relative_pos: distances of tokens need no tensor. None would not do, because
# DeBERTa v1 leaves out the position terms then.
_TOKEN_DISTANCES = "token distances"


def _encoder(
    encoder: nn.Module,
    shared: Shared,
    cache: AttentionCache,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    output_hidden_states: bool = True,
    output_attentions: bool = False,
    query_states: torch.Tensor | None = None,
    relative_pos: torch.Tensor | None = None,
    return_dict: bool = True,
):
    """DebertaEncoder and DebertaV2Encoder without the (B, 1, L, L) mask and the (L, L) relative positions."""
    reason = encoder_reason(encoder, output_attentions, query_states, relative_pos)
    if reason is not None:
        shared.warn(reason)
        return type(encoder).forward(
            encoder, hidden_states, attention_mask, output_hidden_states, output_attentions, query_states, relative_pos,
            return_dict,
        )  # fmt: skip

    table = _table(encoder, cache.tables)

    def call(index: int, states: torch.Tensor, mask: torch.Tensor | Packing) -> tuple[torch.Tensor, None]:
        run = encoder.layer[index]
        if encoder.gradient_checkpointing and encoder.training and not hasattr(run, "gradient_checkpointing"):
            run = functools.partial(encoder._gradient_checkpointing_func, run.__call__)  # transformers < 4.53
        # By position: reentrant checkpointing detaches only positional tensors. Otherwise every layer's backward would
        # walk the graph of the normalised table.
        return run(states, mask, None, _TOKEN_DISTANCES, table, False)[0], None

    mask, conv = _bool_mask(attention_mask), getattr(encoder, "conv", None)
    token_mask = attention_mask if conv is None or attention_mask.dim() <= 2 else attention_mask.sum(-2) > 0
    packing = shared.packing(mask, encoder)
    states, _ = run_layers(
        call, len(encoder.layer), hidden_states, mask, packing, shared.unpadding, conv, token_mask, output_hidden_states
    )
    output, states = states[-1], tuple(states) if output_hidden_states else None
    if not return_dict:
        return tuple(x for x in (output, states) if x is not None)
    kind = sys.modules[hf_class(type(encoder)).__module__].BaseModelOutput
    return kind(last_hidden_state=output, hidden_states=states)


def _table(encoder: nn.Module, cache: WeightCache) -> torch.Tensor | None:
    """The table of relative positions, (R, hidden_size)."""
    if not (encoder.relative_attention and "layer_norm" in getattr(encoder, "norm_rel_ebd", ())):
        return encoder.get_rel_embedding()
    return normalised_table(encoder.rel_embeddings.weight, encoder.LayerNorm, cache)


def _bool_mask(mask: torch.Tensor | Packing | None) -> torch.Tensor | Packing | None:
    """A mask as ``models.attention`` takes it, from (B, L), (B, L, L) or what broadcasts to (B, H, L, L)."""
    if not isinstance(mask, torch.Tensor):
        return mask
    return mask.bool().unsqueeze(1) if mask.dim() == 3 else mask.bool()


def _attention(
    attention: nn.Module,
    shared: Shared,
    cache: AttentionCache,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | Packing | None,
    output_attentions: bool = False,
    query_states: torch.Tensor | None = None,
    relative_pos: torch.Tensor | str | None = None,
    rel_embeddings: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """DisentangledSelfAttention of v1, v2 and v3; the mask may be (B, L), (B, L, L) or (B, 1, L, L)."""
    reason = attention_reason(attention, output_attentions, query_states, relative_pos)
    if reason is not None:
        shared.warn_unless_warned(reason)
        return type(attention).forward(
            attention, hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
        )
    names = attention.pos_att_type
    # Hugging Face counts names where relative_attention is off too, and v1 counts those that make no term.
    if is_v1(attention):
        heads, scale_terms = _heads_v1(attention, hidden_states), 1 + len(names)
        positions = rel_embeddings is not None and relative_pos is not None
        terms = _terms_v1(attention, names) if attention.relative_attention and positions else None
    else:
        heads = project_heads(attention, hidden_states, query_states, cache.joint)
        scale_terms = 1 + ("c2p" in names) + ("p2c" in names)
        terms = _terms_v2(attention, names) if attention.relative_attention else None
    context = run_attention(
        heads,
        _bool_mask(attention_mask),
        rel_embeddings,
        terms,
        cache.tables,
        scale=(heads[0].shape[-1] * scale_terms) ** -0.5,
        dropout_p=dropout_of(attention.dropout),
        backend=shared.backend,
        padding_rows=shared.unpadding.padding_rows,
    )
    return context, None


def prepare_attention(module: nn.Module, backend: str | None) -> None:
    """Does what a first call would do otherwise and a CUDA graph cannot capture. An encoder needs nothing."""
    if not hasattr(module, "pos_att_type") or module_reason(module) is not None:
        return
    terms = module.pos_att_type if module.relative_attention else ()
    table = {
        "position_buckets": getattr(module, "position_buckets", -1),
        "max_relative_positions": getattr(module, "max_relative_positions", 0),  # there is none without terms
        "far_negative": "hf",
    }
    prepare(module, module.attention_head_size, terms, table, backend)


def _heads_v1(attention: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """v1 projects all three at once, head by head, and keeps two of the biases apart.

    Those may be float32 in a half-precision model: transformers 5 loads them so.
    """
    size = attention.attention_head_size
    query, key, value = split_heads(project(attention.in_proj, hidden_states), 3 * size).chunk(3, dim=-1)
    query_bias, value_bias = (bias.view(-1, size) for bias in (attention.q_bias, attention.v_bias))
    return (query + query_bias).to(key.dtype), key, (value + value_bias).to(key.dtype)


def _terms_v1(attention: nn.Module, names: Collection[str]) -> PositionTerms:
    return PositionTerms(
        key_proj=attention.pos_proj if "c2p" in names else None,
        query_proj=attention.pos_q_proj if "p2c" in names else None,
        dropout=attention.pos_dropout,
        table={"position_buckets": -1, "max_relative_positions": attention.max_relative_positions},
        cut=True,
    )


def _terms_v2(attention: nn.Module, names: Collection[str]) -> PositionTerms:
    table = {name: getattr(attention, name) for name in ("position_buckets", "max_relative_positions")}
    return PositionTerms.of(attention, names, table)


def _add_and_norm(module: nn.Module, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
    return add_and_norm(module.dense, module.dropout, module.LayerNorm, hidden_states, input_tensor)


def _intermediate(module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    return intermediate(module.dense, module.intermediate_act_fn, hidden_states)


def _layer_norm(norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """v1's own norm: Hugging Face writes it out in eight passes over memory, in float32 whatever the dtype."""
    if not hidden_states.dtype == norm.weight.dtype == norm.bias.dtype or hidden_states.dtype == torch.float64:
        return type(norm).forward(norm, hidden_states)
    return nn.functional.layer_norm(hidden_states, norm.weight.shape, norm.weight, norm.bias, norm.variance_epsilon)


# By module (under transformers.models) and class. These forwards take the module, what the patched modules share, and a
# cache of their own.
FUSED = {
    ("deberta.modeling_deberta", "DebertaEncoder"): _encoder,
    ("deberta.modeling_deberta", "DisentangledSelfAttention"): _attention,
    ("deberta_v2.modeling_deberta_v2", "DebertaV2Encoder"): _encoder,
    ("deberta_v2.modeling_deberta_v2", "DisentangledSelfAttention"): _attention,
}
# These take only the module. A module whose forward other code has replaced keeps it.
POINTWISE = {
    ("deberta.modeling_deberta", "DebertaSelfOutput"): _add_and_norm,
    ("deberta.modeling_deberta", "DebertaOutput"): _add_and_norm,
    ("deberta.modeling_deberta", "DebertaIntermediate"): _intermediate,
    ("deberta.modeling_deberta", "DebertaLayerNorm"): _layer_norm,
    ("deberta_v2.modeling_deberta_v2", "DebertaV2SelfOutput"): _add_and_norm,
    ("deberta_v2.modeling_deberta_v2", "DebertaV2Output"): _add_and_norm,
    ("deberta_v2.modeling_deberta_v2", "DebertaV2Intermediate"): _intermediate,
}
