"""Rows of padding with the values that Hugging Face's models give them.

In those models, all scores of a query that is padding or sees no key are the dtype's lowest number, and their softmax
is uniform. Its output is therefore the mean of V over all keys, including padding, and independent of its own state.
Losses, pooling over all positions and heads that read a padded first token see such rows. No token attends to them.

Embeddings of padding are zero, so all rows of a sequence's padding have the same state in every layer. A packed batch
keeps one of them per sequence.
"""

from typing import NamedTuple

import torch
from torch.autograd import forward_ad
from torch.nn import functional as F


def with_means(context: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Replaces rows of ``context`` whose queries are padding or see no key by the mean of V.

    Attention dropout is not applied to these rows: their mean over many draws is the same. context is (B, Lq, H D),
    value (B, Lk, H, D), mask as in ``DisentangledSelfAttention``.
    """
    if mask.dim() == 2 and type(mask) is torch.Tensor and mask.is_cpu and not is_traced():
        rows = (~mask).flatten().nonzero().squeeze(1)
        if len(rows) == 0:
            return context
        if not context.requires_grad:
            means = value.mean(1).flatten(1).index_select(0, rows // mask.shape[1])
            context.flatten(0, 1).index_copy_(0, rows, means)  # writes rows of padding only
            return context
    mean = value.mean(1, keepdim=True)
    if mask.dim() == 2:
        return torch.where(mask.unsqueeze(-1), context, mean.flatten(2))
    sees = mask.any(-1, keepdim=True).transpose(1, 2)  # (B or 1, Lq or 1, H or 1, 1)
    return torch.where(sees, context.view(*context.shape[:2], *mean.shape[2:]), mean).flatten(2)


def is_traced() -> bool:
    """Whether torch is tracing or transforming, so that control flow must not depend on values of tensors."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def pairs(mask: torch.Tensor) -> torch.Tensor:
    """Hugging Face's mask of pairs, (B, 1, L, L), from a mask of tokens, (B, L): padding attends to nothing."""
    return mask[:, None, :, None] & mask[:, None, None, :]


class PackedPadding(NamedTuple):
    """Positions of padding among packed states (T, ...).

    A sequence has one row for all padding before its first and after its last token, placed behind them, and one row
    per hole between them.

    Attributes:
        rows: int64 (K,), the packed rows that are padding.
        sequences: int64 (T,), the sequence of each packed row.
        starts: int64 (n,), the first row of each sequence.
        weights: int64 (T,), the number of rows of the padded batch that each packed row stands for.
        length: L of the padded batch.
        source: int64 (B L,), the packed row that holds the state of each row of the padded batch.
    """

    rows: torch.Tensor
    sequences: torch.Tensor
    starts: torch.Tensor
    weights: torch.Tensor
    length: int
    source: torch.Tensor

    def with_means(self, context: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Replaces rows of padding in ``context`` (T, H D) by the mean of V (T, H, D) over the padded sequence."""
        exact = torch.promote_types(value.dtype, torch.float32)
        weights = (self.weights.to(exact) / self.length).to(value.dtype)
        means = _SumsOfSequences.apply(value.flatten(1), weights, self.sequences, self.starts)
        means = means.index_select(0, self.sequences.index_select(0, self.rows))
        return context.index_copy(0, self.rows, means.to(context.dtype))

    def pad(self, states: torch.Tensor, batch: int) -> torch.Tensor:
        """(T, ...) to (B, L, ...)."""
        # On a GPU, backward of embedding is deterministic; that of index_select is not
        return F.embedding(self.source, states.flatten(1)).view(batch, self.length, *states.shape[1:])


class _SumsOfSequences(torch.autograd.Function):
    """s_n = sum of w_t x_t over the rows t of sequence n, with dx_t = w_t ds_n.

    Unlike torch's embedding_bag, it is differentiable more than once.
    """

    @staticmethod
    def forward(ctx, x, weights, sequences, starts):
        ctx.save_for_backward(weights, sequences)
        rows = torch.arange(x.shape[0], device=x.device)
        return F.embedding_bag(rows, x, starts, mode="sum", per_sample_weights=weights)

    @staticmethod
    def backward(ctx, gradient):
        weights, sequences = ctx.saved_tensors
        return F.embedding(sequences, gradient) * weights.unsqueeze(1), None, None, None
