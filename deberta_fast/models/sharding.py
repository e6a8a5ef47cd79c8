"""Batches of which every process has a stretch of each sequence: what a model does besides the operator.

Layers take a ``Sharding`` in place of a mask. Token-wise operations run on a rank's rows unchanged. Attention, the
convolution, the mean over padded rows, heads that read a first token, and losses need the other ranks.

A rank's loss is the whole loss, so what all ranks differentiate together is W times it: the mean of the W ranks'
gradients is its gradient. DistributedDataParallel and FSDP take that mean.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from ..op.call import check_cu_seqlens_form, check_cu_seqlens_values
from ..op.context_parallel import disentangled_attention_context_parallel
from ..op.context_parallel.exchange import agree, all_reduced, exchange, require_equal, summed
from ..op.context_parallel.stretches import Stretches, positions_of
from .losses import span_loss
from .packing import Packing


class Sharding(NamedTuple):
    """One batch, of which this rank has some rows.

    Attributes:
        group, method: see ``disentangled_attention_context_parallel``.
        stretches: who has which rows.
        batch: B of a dense batch, 1 of packed sequences.
        cu_seqlens: int32 (n + 1,), the ends of all packed sequences; None for a dense batch.
        max_seqlen: the length of the longest sequence.
        mask: bool (B, L) or (T,), all ranks' tokens that are attended to; None if all are.
        padding_rows: see ``Unpadding``.
        device: that of the rows.
    """

    group: Any
    method: str
    stretches: Stretches
    batch: int
    cu_seqlens: torch.Tensor | None
    max_seqlen: int
    mask: torch.Tensor | None
    padding_rows: str
    device: torch.device

    @property
    def tokens(self) -> torch.Tensor | None:
        """This rank's part of the mask, (B, L_r) or (T_r,)."""
        return None if self.mask is None else self.mask[..., self.stretches.start : self.stretches.stop]

    @torch.compiler.disable
    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, share: tuple[int, int] | None, **arguments
    ) -> torch.Tensor:
        """Attention of heads (B, L_r, H, D) or (T_r, H, D); returns (B, L_r, H D) or (T_r, H D)."""
        heads, packed = (query, key, value), self.cu_seqlens is not None
        output = disentangled_attention_context_parallel(
            *(heads if packed else (x.transpose(1, 2) for x in heads)), group=self.group, method=self.method,
            stretches=self.stretches, cu_seqlens=self.cu_seqlens, max_seqlen=self.max_seqlen if packed else None,
            attention_mask=self.mask, sum_table_gradients=False, share=share, **arguments,
        )  # fmt: skip
        return (output if packed else output.transpose(1, 2)).flatten(-2)

    @torch.compiler.disable
    def with_means(self, context: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Gives rows of padding the mean of V over all ranks' rows, as Hugging Face's models do; see ``padding``."""
        if self.mask is None or self.padding_rows == "zeros" or self.cu_seqlens is not None:
            return context
        exact = torch.promote_types(value.dtype, torch.float32)
        mean = summed(value.sum(1, keepdim=True, dtype=exact), self.group, "sum of values") / self.stretches.total
        return torch.where(self.tokens.unsqueeze(-1), context, mean.flatten(2).to(context.dtype))

    @torch.compiler.disable
    def convolve(self, layer, embeddings: torch.Tensor, output: torch.Tensor, token_mask) -> torch.Tensor:
        """Applies a convolution layer, whose kernel reaches into the stretches before and behind.

        The arguments are those of ``encoder.ConvLayer``, of this rank's rows.
        """
        reach = layer.conv.weight.shape[-1] // 2
        before, behind = self._around(self.stretches.rank, reach)
        start, stop = self.stretches.start - before, self.stretches.stop + behind
        own = slice(before, before + self.stretches.length)
        embeddings = self._with_neighbours(embeddings, reach)
        # Results for the neighbours' rows are dropped, whatever their residual is.
        output = F.pad(output, (0, 0, before, behind))
        mask = None if self.mask is None else self.mask[..., start:stop]
        if self.cu_seqlens is None:
            if token_mask is not None:
                mask = token_mask.new_ones((self.batch, stop - start)) if mask is None else mask.to(token_mask.dtype)
            return layer(embeddings, output, mask)[:, own]
        first, last = self.stretches.sequence(start), self.stretches.sequence(stop - 1)
        ends = self.cu_seqlens[first : last + 2].clamp(start, stop) - start
        return Packing(ends, self.max_seqlen, mask).convolve(layer, embeddings, output, None)[own]

    def _around(self, rank: int, reach: int) -> tuple[int, int]:
        """How many rows before and behind a rank's stretch are within ``reach``."""
        starts = self.stretches.starts
        return min(reach, starts[rank]), min(reach, starts[-1] - starts[rank + 1])

    def _with_neighbours(self, rows: torch.Tensor, reach: int) -> torch.Tensor:
        """This rank's rows between those of other ranks that are within ``reach``."""
        starts, mine, packed = self.stretches.starts, self.stretches.rank, self.cu_seqlens is not None
        rows = rows if packed else rows.transpose(0, 1)

        def wanted(rank: int, owner: int) -> tuple[int, int]:
            before, behind = self._around(rank, reach)
            start, stop = starts[rank] - before, starts[rank + 1] + behind
            start, stop = max(start, starts[owner]), min(stop, starts[owner + 1])
            return (start, stop) if owner != rank and start < stop else (starts[owner], starts[owner])

        ranks = range(len(self.stretches.lengths))
        sent = [wanted(rank, mine) for rank in ranks]
        received = [stop - start for start, stop in (wanted(mine, owner) for owner in ranks)]
        parts = torch.cat([rows[start - starts[mine] : stop - starts[mine]] for start, stop in sent])
        others = exchange(parts, [stop - start for start, stop in sent], received, self.group, "neighbours' rows")
        before, behind = others.split([sum(received[:mine]), sum(received[mine:])])
        rows = torch.cat((before, rows, behind))
        return rows if packed else rows.transpose(0, 1)

    def positions(self, tokens: int) -> torch.Tensor:
        """Each row's place in its sequence, int64 (tokens,), of this rank's L_r or T_r rows."""
        return positions_of(self.stretches, self.cu_seqlens, self.device)

    def first_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """Each sequence's first token, on every rank: (B, L_r, width) to (B, width), or (T_r, width) to (n, width)."""
        packed, length = self.cu_seqlens is not None, self.stretches.length
        if packed:
            first, exists = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff() > 0
            picked = lambda rows: states.index_select(0, rows)
        else:
            by_mask = self.mask is not None and self.padding_rows == "zeros"
            batch, exists = torch.arange(self.batch, device=self.device), True
            first = self.mask.int().argmax(1) if by_mask else torch.zeros_like(batch)
            picked = lambda rows: states[batch, rows]
        rows = first - self.stretches.start
        here = (rows >= 0) & (rows < length) & exists
        mine = picked(rows.clamp(0, length - 1)).masked_fill(~here.unsqueeze(-1), 0)
        return summed(mine, self.group, "first tokens")

    def repeated(self, values: torch.Tensor, tokens: int) -> torch.Tensor:
        """One value per sequence for each row that is here: (B, width) to (B, 1, width), packed (n, width) to
        (T_r, width)."""
        if self.cu_seqlens is None:
            return values.unsqueeze(1)
        rows = torch.arange(self.stretches.start, self.stretches.stop, device=self.device)
        return values.index_select(0, torch.searchsorted(self.cu_seqlens, rows, right=True, out_int32=True) - 1)

    def whole(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks on every rank, (B, L_r, ...) to (B, L, ...) or (T_r, ...) to (T, ...)."""
        return gathered(rows, self.stretches.lengths, 1 if self.cu_seqlens is None else 0, self.group)

    def token_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy over the labels of all ranks other than -100; logits (..., N) and labels of this rank."""
        if labels.shape != logits.shape[:-1]:
            raise ValueError(f"labels must be of shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}")
        total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
        count = all_reduced((labels != -100).sum(), self.group, "number of labels")
        return summed(total, self.group, "loss") / count

    def span_loss(
        self, start_logits: torch.Tensor, end_logits: torch.Tensor, start: torch.Tensor, end: torch.Tensor
    ) -> torch.Tensor:
        """``losses.span_loss``; logits (B, L_r) or (T_r,) of this rank, positions (n,) within whole sequences."""
        logits = [self.whole(x) for x in (start_logits, end_logits)]
        if self.cu_seqlens is not None:
            return Packing(self.cu_seqlens, self.max_seqlen, self.mask).span_loss(*logits, start, end)
        return span_loss(*logits, start, end, self.mask if self.padding_rows == "zeros" else None)


class ContextParallel(NamedTuple):
    """A model's setting: the process group that shares its sequences, and the operator's method."""

    group: Any
    method: str

    def __deepcopy__(self, memo: dict) -> "ContextParallel":
        return self  # copies of the model belong to the same group, which cannot be copied

    def sharding(
        self,
        rows: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        max_seqlen: int | None,
        padding_rows: str,
    ) -> Sharding:
        """Compares this rank's part of a batch with the others'. Synchronises.

        Args:
            rows: ids (B, L_r) or (T_r,), or embeddings with one more dimension.
            attention_mask: this rank's part, (B, L_r) or (T_r,); anything but 0 is a token.
            cu_seqlens, max_seqlen: those of all ranks' packed sequences together.

        Raises:
            TypeError, ValueError: an argument is not as described, or differs from that of another rank.
            RuntimeError: an argument of another rank is not as described.
        """
        packed = cu_seqlens is not None
        shape = rows.shape[: 1 if packed else 2]
        mask = attention_mask

        def described() -> tuple:
            if rows.dim() not in (len(shape), len(shape) + 1) or 0 in shape:
                raise ValueError(f"input_ids must hold rows on every rank, got shape {tuple(rows.shape)}")
            if packed:
                check_cu_seqlens_form(cu_seqlens, rows.device)
            if mask is not None and mask.shape not in (shape, (shape[0], 1, 1, shape[-1])):
                raise ValueError(
                    f"attention_mask must be of shape {tuple(shape)} where processes share sequences, "
                    f"got {tuple(mask.shape)}"
                )
            ends = tuple(cu_seqlens.tolist()) if packed else None
            hides = mask is not None and not bool((mask != 0).all())
            return shape[-1], hides, (1 if packed else shape[0], ends, rows.device.type)

        found = agree(self.group, described)
        require_equal([same for *_, same in found], "the number of sequences, cu_seqlens and the device")
        lengths, ends = tuple(length for length, *_ in found), found[0][2][1]
        stretches = Stretches(lengths, self.group.rank(), ends)
        longest = stretches.total
        if packed:
            longest = max((b - a for a, b in itertools.pairwise(ends)), default=0)
            check_cu_seqlens_values(cu_seqlens.cpu(), stretches.total, longest if max_seqlen is None else max_seqlen)
            cu_seqlens = cu_seqlens.clone()  # backward reads it, and the caller may have changed it by then
        whole = None
        if any(hides for _, hides, _ in found):
            own = torch.ones(shape, dtype=torch.uint8, device=rows.device) if mask is None else mask.reshape(shape) != 0
            whole = gathered(own.to(torch.uint8), lengths, len(shape) - 1, self.group).bool()
        batch = 1 if packed else shape[0]
        return Sharding(
            self.group, self.method, stretches, batch, cu_seqlens, longest, whole, padding_rows, rows.device
        )


def gathered(rows: torch.Tensor, lengths: Sequence[int], dim: int, group: Any) -> torch.Tensor:
    """The rows of all ranks along ``dim``, on every rank; ``lengths`` are their numbers by rank."""
    rows, ranks = rows.movedim(dim, 0), len(lengths)
    copies = rows.unsqueeze(0).expand(ranks, *rows.shape).flatten(0, 1)
    mine = [rows.shape[0]] * ranks
    return exchange(copies, mine, lengths, group, "rows of other ranks").movedim(0, dim)
