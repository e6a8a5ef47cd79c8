"""The forwards that ``patch`` gives Hugging Face's modules. Each calls ``models.attention`` or ``models.encoder``, and
runs the original forward where these cannot serve the call.

The module itself is every forward's first argument, so that copies and pickles of a patched model are patched too.
"""

import functools
import sys
from collections.abc import Callable, Collection

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
from ..models.encoder import AddAndNorm, DebertaIntermediate, position_table, run_layers
from ..models.onednn_linear import project
from ..models.packing import Sequences
from .fallback import Shared, attention_reason, encoder_reason, hf_class, is_v1, module_reason

# The encoder passes this to its layers as relative_pos, because the fused kernels need no tensor of distances. None
# would make DeBERTa v1 leave out the position terms.
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
    if reason := encoder_reason(encoder, output_attentions, query_states, relative_pos):
        shared.fall_back(reason)
        return type(encoder).forward(
            encoder, hidden_states, attention_mask, output_hidden_states, output_attentions, query_states, relative_pos,
            return_dict,
        )  # fmt: skip

    norm = encoder.LayerNorm if "layer_norm" in getattr(encoder, "norm_rel_ebd", ()) else None
    table = position_table(encoder.rel_embeddings if encoder.relative_attention else None, norm, cache.tables)

    def call(index: int, states: torch.Tensor, mask: torch.Tensor | Sequences) -> tuple[torch.Tensor, None]:
        run = encoder.layer[index]
        if encoder.gradient_checkpointing and encoder.training and not hasattr(run, "gradient_checkpointing"):
            run = functools.partial(encoder._gradient_checkpointing_func, run.__call__)  # transformers < 4.53
        # Tensors are passed by position; models.encoder.DebertaLayer says why.
        return run(states, mask, None, _TOKEN_DISTANCES, table, False)[0], None

    mask, conv = _bool_mask(attention_mask), getattr(encoder, "conv", None)
    token_mask = attention_mask if conv is None or attention_mask.dim() <= 2 else attention_mask.sum(-2) > 0
    sharding = shared.sequences()
    packing = shared.packing(mask, encoder) if sharding is None else None
    is_row = sharding is not None and sharding.cu_seqlens is not None  # packed rows come as a batch of one
    states, _ = run_layers(
        call, len(encoder.layer), hidden_states.squeeze(0) if is_row else hidden_states,
        mask if sharding is None else sharding, packing, shared.unpadding, conv, token_mask, output_hidden_states,
    )  # fmt: skip
    states = [x.unsqueeze(0) for x in states] if is_row else states
    output, states = states[-1], tuple(states) if output_hidden_states else None
    if not return_dict:
        return tuple(x for x in (output, states) if x is not None)
    kind = sys.modules[hf_class(type(encoder)).__module__].BaseModelOutput
    return kind(last_hidden_state=output, hidden_states=states)


def _bool_mask(mask: torch.Tensor | Sequences | None) -> torch.Tensor | Sequences | None:
    """Converts a mask (B, L), (B, L, L) or broadcastable to (B, H, L, L) to the form of ``models.attention``."""
    if not isinstance(mask, torch.Tensor):
        return mask
    return mask.bool().unsqueeze(1) if mask.dim() == 3 else mask.bool()


def _attention(
    attention: nn.Module,
    shared: Shared,
    cache: AttentionCache,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | Sequences | None,
    output_attentions: bool = False,
    query_states: torch.Tensor | None = None,
    relative_pos: torch.Tensor | str | None = None,
    rel_embeddings: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """DisentangledSelfAttention of v1, v2 and v3; the mask may be (B, L), (B, L, L) or (B, 1, L, L)."""
    if reason := attention_reason(attention, output_attentions, query_states, relative_pos):
        shared.fall_back(reason, once=True)  # the encoder above may have warned of its own fallback
        return type(attention).forward(
            attention, hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
        )
    names = attention.pos_att_type
    # Hugging Face counts names even where relative_attention is off, and v1 counts names that make no term.
    if is_v1(attention):
        heads, scale_terms = _heads_v1(attention, hidden_states), 1 + len(names)
        has_terms = attention.relative_attention and rel_embeddings is not None and relative_pos is not None
    else:
        heads = project_heads(attention, hidden_states, query_states, cache.joint)
        scale_terms, has_terms = 1 + ("c2p" in names) + ("p2c" in names), attention.relative_attention
    context = run_attention(
        heads,
        _bool_mask(attention_mask),
        rel_embeddings,
        _position_terms(attention, names) if has_terms else None,
        cache.tables,
        scale=(heads[0].shape[-1] * scale_terms) ** -0.5,
        dropout_p=dropout_of(attention.dropout),
        backend=shared.backend,
        padding_rows=shared.unpadding.padding_rows,
    )
    return context, None


def prepare_attention(module: nn.Module, backend: str | None) -> None:
    """Calls ``models.attention.prepare`` for an attention module. An encoder needs no preparation."""
    if not hasattr(module, "pos_att_type") or module_reason(module) is not None:
        return
    terms = module.pos_att_type if module.relative_attention else ()
    prepare(module, module.attention_head_size, terms, _table_options(module) if terms else {}, backend)


def _table_options(attention: nn.Module) -> dict:
    buckets = -1 if is_v1(attention) else attention.position_buckets
    longest = attention.max_relative_positions
    return {"position_buckets": buckets, "max_relative_positions": longest, "far_negative": "hf"}


def _heads_v1(attention: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of v1, which has one projection, interleaved by head, and two separate biases.

    The biases may be float32 in a half-precision model, as transformers 5 loads them.
    """
    size = attention.attention_head_size
    query, key, value = split_heads(project(attention.in_proj, hidden_states), 3 * size).chunk(3, dim=-1)
    query_bias, value_bias = (_local(bias).view(-1, size) for bias in (attention.q_bias, attention.v_bias))
    return (query + query_bias).to(key.dtype), key, (value + value_bias).to(key.dtype)


def _local(bias: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor-parallel bias; a projection hands over this process's part by itself."""
    return bias.to_local() if hasattr(bias, "to_local") else bias


def _position_terms(attention: nn.Module, names: Collection[str]) -> PositionTerms:
    table = _table_options(attention)
    if not is_v1(attention):
        return PositionTerms.of(attention, names, table)
    key_proj = attention.pos_proj if "c2p" in names else None
    query_proj = attention.pos_q_proj if "p2c" in names else None
    return PositionTerms(key_proj, query_proj, attention.pos_dropout, table, cut=True)


def _layer_norm(norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """v1's LayerNorm. Hugging Face's code makes eight passes over memory, in float32 for every dtype."""
    if not hidden_states.dtype == norm.weight.dtype == norm.bias.dtype or hidden_states.dtype == torch.float64:
        return type(norm).forward(norm, hidden_states)
    return nn.functional.layer_norm(hidden_states, norm.weight.shape, norm.weight, norm.bias, norm.variance_epsilon)


# By class name. These forwards take the module, the settings shared by all patched modules, and the module's cache.
FUSED: dict[str, Callable] = {
    "DebertaEncoder": _encoder,
    "DebertaV2Encoder": _encoder,
    "DisentangledSelfAttention": _attention,
}
# These forwards take no settings of the patch. Native forwards run on Hugging Face's modules, whose submodules have the
# same names. A module whose forward other code replaced is not patched.
_OUTPUTS = ("DebertaSelfOutput", "DebertaV2SelfOutput", "DebertaOutput", "DebertaV2Output")
POINTWISE: dict[str, Callable] = {
    **dict.fromkeys(_OUTPUTS, AddAndNorm.forward),
    **dict.fromkeys(("DebertaIntermediate", "DebertaV2Intermediate"), DebertaIntermediate.forward),
    "DebertaLayerNorm": _layer_norm,
}
