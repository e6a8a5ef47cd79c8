"""The attention module of DeBERTa v1, v2 and v3: projections around ``disentangled_attention``."""

import torch
from torch import nn

from ..op.api import (
    disentangled_attention,
    disentangled_attention_varlen,
    disentangled_attention_with_probabilities,
)
from ..op.relative_position import slot_table, table_rows
from .config import DebertaConfig
from .onednn_linear import is_plain, product, project
from .packing import Packing
from .weight_cache import WeightCache


class Kept:
    """What an attention module keeps in inference: its projected tables, and where its weights are promised to be
    constant, the three projections as one."""

    def __init__(self, constant: bool = False):
        self.tables, self.joint = WeightCache(constant), WeightCache(constant)


class DisentangledSelfAttention(nn.Module):
    """Self-attention with the position terms that the configuration names (He et al., arXiv 2006.03654, equation 4).

    v1 and v2 differ in biases alone: v1 has none on keys and on the table's keys. ``backend`` is a name of
    ``backends.BACKENDS``, or None for the best one call by call.
    """

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.num_attention_heads = heads = config.num_attention_heads
        self.attention_head_size = getattr(config, "attention_head_size", None) or config.hidden_size // heads
        width = heads * self.attention_head_size
        key_bias = config.generation > 1
        self.query_proj = nn.Linear(config.hidden_size, width)
        self.key_proj = nn.Linear(config.hidden_size, width, bias=key_bias)
        self.value_proj = nn.Linear(config.hidden_size, width)
        self.terms = config.position_terms
        self.share_att_key = getattr(config, "share_att_key", False)
        if "c2p" in self.terms and not self.share_att_key:
            self.pos_key_proj = nn.Linear(config.hidden_size, width, bias=key_bias)
        if "p2c" in self.terms and not self.share_att_key:
            self.pos_query_proj = nn.Linear(config.hidden_size, width)
        self.talking_head = config.talking_head
        if self.talking_head:
            self.head_logits_proj = nn.Linear(heads, heads, bias=False)
            self.head_weights_proj = nn.Linear(heads, heads, bias=False)
        self.pos_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.table = config.table
        self.scale = (self.attention_head_size * config.scale_terms) ** -0.5
        self.backend: str | None = None
        self.kept = Kept()

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | Packing | None = None,
        rel_embeddings: torch.Tensor | None = None,
        query_states: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: (B, L, hidden_size), of which keys and values are made; or packed, (T, hidden_size).
            mask: bool, True where a query may attend; (B, L), or broadcastable to (B, H, L, L). None masks nothing.
                A ``Packing`` where states are packed; then there are no probabilities.
            rel_embeddings: the table of relative positions, (R, hidden_size).
            query_states: (B, Lq, hidden_size), of which queries are made; None means hidden_states.
            output_attentions: also return the probabilities, by the dense reference.

        Returns:
            (B, Lq, H D), and the probabilities after dropout (B, H, Lq, L) or None.
        """
        heads = self.num_attention_heads
        linears = (self.query_proj, self.key_proj, self.value_proj)
        query, key, value = project_heads(linears, hidden_states, query_states, heads, self.kept.joint)
        arguments = {"scale": self.scale, "dropout_p": self.dropout.p if self.training else 0.0}
        if self.terms:
            pos_key_proj, pos_query_proj = (
                (self.key_proj, self.query_proj)
                if self.share_att_key
                else (getattr(self, "pos_key_proj", None), getattr(self, "pos_query_proj", None))
            )
            arguments |= project_table(
                rel_embeddings,
                query,
                key,
                mask,
                pos_key_proj if "c2p" in self.terms else None,
                pos_query_proj if "p2c" in self.terms else None,
                self.pos_dropout,
                self.kept.tables,
                **self.table,
            )
        if not (output_attentions or self.talking_head):
            return attend(query, key, value, mask, backend=self.backend, **arguments), None
        if isinstance(mask, Packing):
            raise ValueError("talking heads and output_attentions are computed densely, not on packed states")
        output, probabilities = disentangled_attention_with_probabilities(
            *(x.transpose(1, 2) for x in (query, key, value)),
            attention_mask=mask,
            head_logits_proj=self.head_logits_proj if self.talking_head else None,
            head_weights_proj=self.head_weights_proj if self.talking_head else None,
            **arguments,
        )
        return output.transpose(1, 2).flatten(2), probabilities if output_attentions else None


def project_heads(
    linears: tuple[nn.Module, nn.Module, nn.Module],
    hidden_states: torch.Tensor,
    query_states: torch.Tensor | None,
    heads: int,
    joint: WeightCache,
) -> list[torch.Tensor]:
    """Queries, keys and values, (..., H, D), of (..., hidden_size); queries of query_states where there are any.

    By one product where ``joint`` may keep a matrix of all three. To put it together each time costs as much as it
    saves.
    """
    if joint.constant and query_states is None:
        if all(map(is_plain, linears)):
            weights = [x for linear in linears for x in (linear.weight, linear.bias)]
            if joint.keeps(weights):
                weight, bias = joint.get(weights, lambda: _joined(linears))
                return split_heads(product(hidden_states, weight, bias), 3 * heads).split(heads, -2)
            joint.clear()
    states = (hidden_states if query_states is None else query_states, hidden_states, hidden_states)
    return [split_heads(project(linear, x), heads) for linear, x in zip(linears, states, strict=True)]


def _joined(linears: tuple[nn.Module, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    weights = [linear.weight for linear in linears]
    biases = [w.new_zeros(w.shape[0]) if x.bias is None else x.bias for x, w in zip(linears, weights, strict=True)]
    return torch.cat(weights), torch.cat(biases)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | Packing | None, **arguments
) -> torch.Tensor:
    """``disentangled_attention`` of projected states, (B, L, H, D) to (B, L, H D); or packed, (T, H, D) to (T, H D).

    Args:
        mask: as of ``disentangled_attention``; a ``Packing`` where states are packed.
        arguments: the others of ``disentangled_attention``.
    """
    if isinstance(mask, Packing):
        arguments |= {"cu_seqlens": mask.cu_seqlens, "max_seqlen": mask.max_seqlen, "attention_mask": mask.mask}
        return disentangled_attention_varlen(query, key, value, **arguments).flatten(1)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return disentangled_attention(query, key, value, attention_mask=mask, **arguments).transpose(1, 2).flatten(2)


def project_table(
    rel_embeddings: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | Packing | None,
    pos_key_proj: nn.Module | None,
    pos_query_proj: nn.Module | None,
    pos_dropout: nn.Module,
    kept: WeightCache,
    **table,
) -> dict:
    """Keywords of ``disentangled_attention``: ``table``, and of it the projected rows that these lengths can reach.

    Args:
        rel_embeddings: (R, hidden_size).
        query, key: (B, L, H, D), or packed, (T, H, D).
        mask: a ``Packing`` where they are packed.
        pos_key_proj, pos_query_proj: from hidden_size to H D; None leaves a term out.
        pos_dropout: runs on the rows.
        kept: keeps the projected tables, whole ones, in inference.
        table: position_buckets, max_relative_positions and far_negative.
    """
    start, stop = 0, table_rows(table["position_buckets"], table["max_relative_positions"])
    projections = [("pos_key", pos_key_proj), ("pos_query", pos_query_proj)]
    projections = [(name, linear) for name, linear in projections if linear is not None]

    def projected() -> dict[str, torch.Tensor]:
        rows = pos_dropout(rel_embeddings[start:stop])
        return {
            name: project(linear, rows).unflatten(-1, (query.shape[-2], -1)).transpose(0, 1)
            for name, linear in projections
        }

    # Compiled, all rows: one graph for every length
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return {**table, **projected()}
    if not pos_dropout.training and all(is_plain(linear) for _, linear in projections):
        weights = [rel_embeddings, *(x for _, linear in projections for x in (linear.weight, linear.bias))]
        if kept.keeps(weights):
            return {**table, **kept.get(weights, projected)}
    kept.clear()
    lengths = (mask.max_seqlen,) * 2 if isinstance(mask, Packing) else (query.shape[1], key.shape[1])
    start, stop = slot_table(**table).window(*lengths)
    return {**table, "first_slot": start, **projected()}


def split_heads(projected: torch.Tensor, heads: int) -> torch.Tensor:
    """(..., H D) to (..., H, D)."""
    return projected.unflatten(-1, (heads, -1))
