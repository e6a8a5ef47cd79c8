"""Rows of padding as Hugging Face's models have them.

There a query that is padding, or that sees no key, weighs all keys alike, those of padding too: all its scores are the
lowest number, whose softmax is uniform. So its output is the mean of V, whatever its own state (fully masked rows of
``DisentangledSelfAttention`` in transformers). Losses, pooling over all positions and heads that read a padded first
token see such rows; no token attends to them.

Embeddings of padding are zero, hence all rows of a sequence's padding have one state in every layer. A packed batch
keeps one of them a sequence.
"""

from typing import NamedTuple

import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

PADDING_ROWS = ("hf", "zeros")


def check_padding_rows(padding_rows: str) -> str:
    if padding_rows not in PADDING_ROWS:
        raise ValueError(f'padding_rows must be "hf" or "zeros", got {padding_rows!r}')
    return padding_rows


def with_means(context: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``context`` with the mean of V in the rows of queries that are padding or see no key.

    Attention dropout leaves these rows alone: their mean over many draws is the same.

    Args:
        context: (B, Lq, H D).
        value: (B, Lk, H, D).
        mask: bool, True where a query may attend; (B, L), for queries and keys alike, or broadcastable to
            (B, H, Lq, Lk).
    """
    if mask.dim() == 2 and type(mask) is torch.Tensor and mask.is_cpu and not is_traced():
        rows = (~mask).flatten().nonzero().squeeze(1)
        if len(rows) == 0:
            return context
        if not context.requires_grad:
            means = value.mean(1).flatten(1).index_select(0, rows // mask.shape[1])
            context.flatten(0, 1).index_copy_(0, rows, means)  # which writes where padding is, and nowhere else
            return context
    mean = value.mean(1, keepdim=True)
    if mask.dim() == 2:
        return torch.where(mask.unsqueeze(-1), context, mean.flatten(2))
    sees = mask.any(-1, keepdim=True).transpose(1, 2)  # (B or 1, Lq or 1, H or 1, 1)
    return torch.where(sees, context.view(*context.shape[:2], *mean.shape[2:]), mean).flatten(2)


def is_traced() -> bool:
    """Whether a program is being made in which nothing may depend on the values of tensors."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def pairs(mask: torch.Tensor) -> torch.Tensor:
    """A mask of tokens (B, L) as Hugging Face's of pairs, (B, 1, L, L): padding attends to nothing either."""
    return mask[:, None, :, None] & mask[:, None, None, :]


class PackedPadding(NamedTuple):
    """Where padding lies among packed states (T, ...): one row for all of a sequence's outside of its first and last
    token, behind these, and a row for every hole between them.

    Attributes:
        rows: int64 (K,), the packed rows that are padding.
        sequences: int64 (T,), the sequence that each packed row belongs to.
        starts: int64 (n,), where each sequence starts.
        weights: int64 (T,), how many rows of the padded batch each packed row stands for.
        length: L of the padded batch.
        source: int64 (B L,), for every row of the padded batch the packed one that holds its state.
    """

    rows: torch.Tensor
    sequences: torch.Tensor
    starts: torch.Tensor
    weights: torch.Tensor
    length: int
    source: torch.Tensor

    def with_means(self, context: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """``context`` (T, H D), in rows of padding with the mean of V (T, H, D) over the sequence's padded rows."""
        exact = torch.promote_types(value.dtype, torch.float32)
        weights = (self.weights.to(exact) / self.length).to(value.dtype)
        means = _SumsOfSequences.apply(value.flatten(1), weights, self.sequences, self.starts)
        of_padding = means.index_select(0, self.sequences.index_select(0, self.rows))
        return context.index_copy(0, self.rows, of_padding.to(context.dtype))

    def pad(self, states: torch.Tensor, batch: int) -> torch.Tensor:
        """(T, ...) to (B, L, ...)."""
        # Its backward adds in a fixed order, that of index_select does not on a GPU
        return F.embedding(self.source, states.flatten(1)).view(batch, self.length, *states.shape[1:])


class _SumsOfSequences(torch.autograd.Function):
    """s_n = sum of w_t x_t over the rows t of sequence n, and dx_t = w_t ds_n, which has derivatives of any order.

    The derivative of torch's own embedding_bag has none.
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
