"""The attention module of DeBERTa v1, v2 and v3: projections around ``disentangled_attention``."""

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..op import selection
from ..op.api import disentangled_attention, disentangled_attention_with_probabilities
from ..op.problems import Kind
from ..op.relative_position import device_tables, slot_table, table_rows
from .config import DebertaConfig
from .onednn_linear import is_plain, product, project
from .ordinary import why_not_ordinary
from .packing import Sequences, is_sequences
from .padding import pairs, with_means
from .weight_cache import WeightCache


class AttentionCache:
    """Values that an attention module caches in inference.

    ``tables`` caches the projected position tables. ``joint`` caches the weights of the three projections as one
    matrix, but only if the weights are promised to be constant.
    """

    def __init__(self, constant: bool = False):
        self.tables, self.joint = WeightCache(constant), WeightCache(constant)


class PositionTerms(NamedTuple):
    """The parts of an attention module that make its position terms.

    Attributes:
        key_proj, query_proj: project the table for content-to-position and position-to-content, hidden_size to H D.
            None leaves the term out.
        dropout: runs on the table's rows before they are projected.
        table: position_buckets, max_relative_positions and far_negative, see ``disentangled_attention``.
        cut: whether Hugging Face's code projects only the rows that the lengths can reach (v1) instead of all (v2).
            Projections with hooks or adapters get the same rows here.
    """

    key_proj: nn.Module | None
    query_proj: nn.Module | None
    dropout: nn.Module
    table: dict
    cut: bool = False

    @classmethod
    def of(cls, module: nn.Module, names: Collection[str], table: dict) -> "PositionTerms":
        """Makes the terms in ``names`` ("c2p", "p2c") of this library's module or of Hugging Face's v2."""
        key, query = ("key_proj", "query_proj") if module.share_att_key else ("pos_key_proj", "pos_query_proj")
        key_proj = getattr(module, key) if "c2p" in names else None
        query_proj = getattr(module, query) if "p2c" in names else None
        return cls(key_proj, query_proj, module.pos_dropout, table)

    def window(self, query_length: int, key_length: int) -> tuple[int, int]:
        """The rows that Hugging Face's code projects, as the first one and the one behind the last."""
        longest = self.table["max_relative_positions"]
        if not self.cut:
            return 0, table_rows(self.table["position_buckets"], longest)
        reach = min(max(query_length, key_length), longest)
        return longest - reach, longest + reach


class DisentangledSelfAttention(nn.Module):
    """Self-attention with the position terms that the configuration names (He et al., arXiv 2006.03654, equation 4).

    v1 differs from v2 only in biases: keys and the table's keys have none. ``backend`` names one of
    ``backends.BACKENDS``; None chooses the best for each call. With ``padding_rows`` "hf", queries that are padding or
    see no key get the mean of all values, as in Hugging Face's models.
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
        self.padding_rows = "hf"
        self.cache = AttentionCache()
        self._warned = False
        self._prepare()

    def _apply(self, *arguments, **keywords):
        module = super()._apply(*arguments, **keywords)
        self._prepare()
        return module

    def _prepare(self) -> None:
        backend = "reference" if self.talking_head else self.backend
        prepare(self, self.attention_head_size, self.terms, self.table, backend)

    def dense_reason(self) -> str | None:
        """The reason why attention materialises its probabilities even without output_attentions, or None."""
        if self.talking_head:
            return "talking heads"
        reason = why_not_ordinary(self.dropout, nn.Dropout, nn.Identity)
        return reason and f"its dropout is {reason}"

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | Sequences | None = None,
        rel_embeddings: torch.Tensor | None = None,
        query_states: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: the input of keys and values, (B, L, hidden_size); or packed, (T, hidden_size).
            mask: bool, True where a query may attend; (B, L), or broadcastable to (B, H, L, L). None masks nothing.
                Packed or sharded states need ``Sequences``, and cannot return probabilities.
            rel_embeddings: the table of relative positions, (R, hidden_size).
            query_states: the input of queries, (B, Lq, hidden_size); None means hidden_states.
            output_attentions: also return the probabilities, computed by the dense reference.

        Returns:
            (B, Lq, H D), and the probabilities after dropout (B, H, Lq, L) or None.
        """
        heads = project_heads(self, hidden_states, query_states, self.cache.joint)
        terms = PositionTerms.of(self, self.terms, self.table) if self.terms else None
        reason = self.dense_reason()
        if not (output_attentions or reason):
            context = run_attention(
                heads, mask, rel_embeddings, terms, self.cache.tables, scale=self.scale,
                dropout_p=dropout_of(self.dropout), backend=self.backend, padding_rows=self.padding_rows,
            )  # fmt: skip
            return context, None
        if is_sequences(mask):
            what = reason or "output_attentions"
            raise ValueError(f"{what}: computed densely, which packed and sharded states do not support")
        if reason and not (self.talking_head or self._warned or torch.compiler.is_compiling()):
            self._warned = True
            warnings.warn(f"deberta_fast: attention is computed densely: {reason}", stacklevel=2)
        hf_rows = self.padding_rows == "hf"
        output, probabilities = disentangled_attention_with_probabilities(
            *(x.transpose(1, 2) for x in heads),
            attention_mask=pairs(mask) if hf_rows and mask is not None and mask.dim() == 2 else mask,
            scale=self.scale,
            dropout=self.dropout,
            head_logits_proj=self.head_logits_proj if self.talking_head else None,
            head_weights_proj=self.head_weights_proj if self.talking_head else None,
            uniform=hf_rows,
            **project_table(rel_embeddings, heads, mask, terms, self.cache.tables),
        )
        return output.transpose(1, 2).flatten(2), probabilities if output_attentions else None


def dropout_of(dropout: nn.Module) -> float:
    """The current drop probability of a Dropout, or of an Identity in its place."""
    return dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0


def prepare(attention: nn.Module, head_size: int, terms: Collection[str], table: dict, backend: str | None) -> None:
    """Copies tables to the device, and chooses a backend if half-precision weights determine the dtype.

    Otherwise the first call does this, which is impossible while a CUDA graph is captured. ``attention`` is a module of
    this library or of Hugging Face. ``backend`` is the one that the user named, or None.
    """
    weight = next(attention.parameters(), None)  # A module whose projections are quantised has none.
    if weight is None:
        return
    if terms:
        device_tables(**table, device=weight.device)
    if backend is None:
        kind = Kind("c2p" in terms, "p2c" in terms, mask="keys", dropout=dropout_of(attention.dropout) > 0)
        selection.prepare(weight.device, weight.dtype, head_size, kind)


def project_heads(
    module: nn.Module, hidden_states: torch.Tensor, query_states: torch.Tensor | None, joint: WeightCache
) -> Sequence[torch.Tensor]:
    """Queries, keys and values, (..., H, D), from states (..., hidden_size); query_states None means hidden_states.

    If ``joint`` may cache the three weights as one matrix, one product makes all three. Concatenating them in every
    call would cost as much as it saves.
    """
    linears, size = (module.query_proj, module.key_proj, module.value_proj), module.attention_head_size
    if joint.constant and query_states is None and all(map(is_plain, linears)):
        weights = [x for linear in linears for x in (linear.weight, linear.bias)]
        if (cached := joint.get(weights, lambda: _joined(linears))) is not None:
            return split_heads(product(hidden_states, *cached), size).chunk(3, -2)
    states = (hidden_states if query_states is None else query_states, hidden_states, hidden_states)
    return [split_heads(project(linear, x), size) for linear, x in zip(linears, states, strict=True)]


def _joined(linears: tuple[nn.Module, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    weights = [linear.weight for linear in linears]
    biases = [w.new_zeros(w.shape[0]) if x.bias is None else x.bias for x, w in zip(linears, weights, strict=True)]
    return torch.cat(weights), torch.cat(biases)


def run_attention(
    heads: Sequence[torch.Tensor],
    mask: torch.Tensor | Sequences | None,
    rel_embeddings: torch.Tensor | None,
    terms: PositionTerms | None,
    cache: WeightCache,
    *,
    scale: float,
    dropout_p: float,
    backend: str | None,
    padding_rows: str,
) -> torch.Tensor:
    """Fused attention of projected heads, with position terms from the table.

    Args:
        heads: queries, keys and values, (B, L, H, D); or packed, (T, H, D).
        mask, rel_embeddings, padding_rows: see ``DisentangledSelfAttention``. ``Sequences`` have their padding_rows.
        terms: None for attention without position terms.
        cache: caches the projected tables in inference.
        scale, dropout_p, backend: see ``disentangled_attention``.

    Returns:
        (B, Lq, H D); or packed, (T, H D).
    """
    positions = project_table(rel_embeddings, heads, mask, terms, cache)
    context = attend(*heads, mask, scale=scale, dropout_p=dropout_p, backend=backend, **positions)
    if is_sequences(mask):
        return mask.with_means(context, heads[2])
    return context if mask is None or padding_rows == "zeros" else with_means(context, heads[2], mask)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | Sequences | None, **arguments
) -> torch.Tensor:
    """``disentangled_attention`` for heads (B, L, H, D), returning (B, L, H D); or packed, (T, H, D) and (T, H D).

    ``mask`` is that of ``run_attention``; ``arguments`` are the other ones of ``disentangled_attention``.
    """
    if is_sequences(mask):
        return mask.attend(query, key, value, **arguments)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return disentangled_attention(query, key, value, attention_mask=mask, **arguments).transpose(1, 2).flatten(2)


def project_table(
    rel_embeddings: torch.Tensor | None,
    heads: Sequence[torch.Tensor],
    mask: torch.Tensor | Sequences | None,
    terms: PositionTerms | None,
    cache: WeightCache,
) -> dict:
    """Keywords of ``disentangled_attention``: ``terms.table``, and the projected rows that these lengths can reach.

    The arguments are those of ``run_attention``. Without terms, the result is empty.
    """
    if terms is None:
        return {}
    table, size = terms.table, heads[0].shape[-1]
    projections = {"pos_key": terms.key_proj, "pos_query": terms.query_proj}
    projections = {name: linear for name, linear in projections.items() if linear is not None}

    def projected(rows: torch.Tensor, project: Callable = project) -> dict[str, torch.Tensor]:
        return {name: split_heads(project(linear, rows), size).transpose(0, 1) for name, linear in projections.items()}

    # A compiled program projects all rows, so that one graph serves every length.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return {**table, **projected(terms.dropout(rel_embeddings))}
    lengths = (mask.max_seqlen,) * 2 if is_sequences(mask) else (heads[0].shape[1], heads[1].shape[1])
    is_dropout = why_not_ordinary(terms.dropout, nn.Dropout, nn.Identity) is None
    if not (is_dropout and all(map(is_plain, projections.values()))):
        # Hooks and adapters get the same input as in Hugging Face's code, (1, rows, hidden_size).
        cache.clear()
        start, stop = terms.window(*lengths)
        rows = terms.dropout(rel_embeddings)[start:stop].unsqueeze(0)
        once = projected(rows, lambda linear, rows: linear(rows).squeeze(0))
        return {**table, "first_slot": start, **once}
    if terms.dropout.training:
        cache.clear()
    else:
        weights = [rel_embeddings, *(x for linear in projections.values() for x in (linear.weight, linear.bias))]
        make = lambda: projected(terms.dropout(rel_embeddings))  # all rows, so that every length can use them
        if (cached := cache.get(weights, make, (size, *projections))) is not None:
            return {**table, **cached}
    start, stop = slot_table(**table).window(*lengths)
    return {**table, "first_slot": start, **projected(terms.dropout(rel_embeddings[start:stop]))}


def split_heads(projected: torch.Tensor, size: int) -> torch.Tensor:
    """(..., H D) to (..., H, D). H is inferred, because a tensor-parallel projection makes only some of the heads."""
    # unflatten would make torch.onnx.export(dynamo=False) treat the traced lengths as constants.
    return projected.view(*projected.shape[:-1], projected.shape[-1] // size, size)
