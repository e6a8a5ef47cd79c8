"""Forward and backward of some heads and batch rows, query block by query block (equations 6 to 10).

Heads come before batch rows, so that one product per head and table serves all batch rows: G = h b.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...call import Call
from ...dropout import keep_mask, number_heads, threshold_and_scale
from . import band
from .scratch import Scratch
from .tables import LOG2E, Tables


class _Block(NamedTuple):
    """Queries, last first, and the positions of the first and the last of them in the sequence."""

    rows: slice
    query: torch.Tensor  # (G, rows, D), times C
    first: int
    last: int


class _Segment(NamedTuple):
    """Keys start to stop. Far: all read row ``slot`` of the tables. Near: slot None."""

    start: int
    stop: int
    slot: int | None


class Chunk:
    """Some batch rows of the heads of ``tables``."""

    def __init__(self, x: Call, tables: Tables, batches: slice, first_batch: int, scratch: Scratch):
        self.x, self.tables, self.batches, self.first_batch, self.scratch = x, tables, batches, first_batch, scratch
        self.grid = tables.heads.stop - tables.heads.start, batches.stop - batches.start
        self.key_length = x.key.shape[2]
        self.visible, self.masked = self._visible_keys()
        self.key, self.value = (self._load_keys(name, t) for name, t in (("key", x.key), ("value", x.value)))

    def _load_keys(self, name: str, source: torch.Tensor) -> torch.Tensor:
        """Copies (B, H, Lk, D) as (G, Lk, D)."""
        part = source[self.batches, self.tables.heads].transpose(0, 1)
        return self.scratch(name, *part.shape).copy_(part).flatten(0, 1)

    def forward(self, output: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Fills its part of output (B, H, Lq, D) and lse (B, H, Lq)."""
        for block in self._blocks():
            segments = self._segments(block)
            scores = [self._scores(block, segment, f"scores {n}") for n, segment in enumerate(segments)]
            row_max = block.query.new_full((*block.query.shape[:-1], 1), -torch.inf)
            for z in scores:
                row_max = torch.maximum(row_max, z.amax(-1, keepdim=True))
            row_max.masked_fill_(row_max == -torch.inf, 0.0)
            row_sum, out = torch.zeros_like(row_max), self._zeros(block)
            for segment, z in zip(segments, scores, strict=True):
                p = z.sub_(row_max).exp2_()
                row_sum += p.sum(-1, keepdim=True)
                if self.x.dropout_p > 0:
                    p *= self._dropout_factors(block, segment)
                out.baddbmm_(p, self.value[:, segment.start : segment.stop])
            self._store(block, out.div_(row_sum.masked_fill(row_sum == 0, 1.0)), output)
            if lse is not None:
                self._store(block, row_max.add_(row_sum.log2_()).div_(LOG2E), lse[..., None])

    def backward(
        self,
        output: torch.Tensor | None,
        lse: torch.Tensor,
        grad_output: torch.Tensor,
        grad_lse: torch.Tensor,
        grad_query: torch.Tensor,
        grad_key: torch.Tensor,
        grad_value: torch.Tensor,
    ) -> None:
        """Fills its part of the gradients of query, key and value, and adds to those of ``tables``.

        output and lse are over more keys than these. Without output, lse is over these keys alone.
        """
        self.dk = self.scratch("grad key", *self.key.shape).zero_()
        dv = self.scratch("grad value", *self.value.shape).zero_()
        for block in self._blocks():
            do, segments = self._load(block.rows, grad_output), self._segments(block)
            shift = self._load(block.rows, lse[..., None]).mul_(LOG2E)
            shift.masked_fill_(shift == -torch.inf, 0.0)  # rows that see no key: 2^(-inf - 0) = 0
            probabilities = [
                self._scores(block, segment, f"scores {n}").sub_(shift).exp2_() for n, segment in enumerate(segments)
            ]
            row_sum, delta = torch.ones_like(shift), -self._load(block.rows, grad_lse[..., None])
            if output is None:
                # Division by the sum of P removes the rounding error of lse.
                row_sum = sum((p.sum(-1, keepdim=True) for p in probabilities), torch.zeros_like(shift))
                do /= row_sum.masked_fill_(row_sum == 0, 1.0)
            else:
                delta += (self._load(block.rows, output) * do).sum(-1, keepdim=True)
            pairs = []
            for n, (segment, p) in enumerate(zip(segments, probabilities, strict=True)):
                keys = slice(segment.start, segment.stop)
                dp = self.scratch.matmul(f"grad p {n}", do, self.value[:, keys].mT)
                dropped = p
                if self.x.dropout_p > 0:
                    factors = self._dropout_factors(block, segment)
                    dp *= factors
                    dropped = p * factors
                dv[:, keys].baddbmm_(dropped.mT, do)
                if output is None:
                    # P and dP give Delta, not O and dO: the rounding of dP then cancels in dZ, as in a softmax.
                    delta += torch.mul(p, dp, out=self.scratch("product", *p.shape)).sum(-1, keepdim=True)
                pairs.append((p, dp))
            delta /= row_sum
            dq = self._zeros(block)
            for segment, (p, dp) in zip(segments, pairs, strict=True):
                da = dp.sub_(delta).mul_(p)
                keys = slice(segment.start, segment.stop)
                if segment.slot is None:
                    self.dk[:, keys].baddbmm_(da.mT, block.query)
                    dq.baddbmm_(da, self.key[:, keys])
                    self._add_near_gradients(block, segment, da, dq)
                else:
                    self.dk[:, keys].baddbmm_(da.mT, self._far_query(block, segment))
                    self._add_far_gradients(block, segment, da, dq)
            self._store(block, dq.mul_(self.x.scale), grad_query)
        self.dk /= LOG2E  # the sums hold C q instead of s q
        for grad, target in ((self.dk, grad_key), (dv, grad_value)):
            target[self.batches, self.tables.heads] = self._split_heads(grad).transpose(0, 1).to(target.dtype)

    def _visible_keys(self) -> tuple[tuple[int, int], bool]:
        """Returns the range of keys that any of these batch rows sees, and whether the mask hides some inside it."""
        mask, every = self.x.mask, (0, self.key_length)
        if mask is None:
            return every, False
        if mask.device.type != "cpu" or mask.shape[1] > 1 or mask.shape[2] > 1:
            return every, True  # reading the mask would synchronise with the device, or read a whole matrix
        mask = mask[self.batches if mask.shape[0] > 1 else slice(None), 0, 0]
        seen = mask.any(0).nonzero()
        if len(seen) == 0:
            return (0, 0), False
        start, stop = int(seen[0]), int(seen[-1]) + 1
        return (start, stop), not bool(mask[:, start:stop].all())

    def _blocks(self) -> Iterator[_Block]:
        length, step, offset = self.x.query.shape[2], self.tables.block_rows, self.x.query_offset
        for start in range(0, length, step):
            rows = slice(start, min(start + step, length))
            query = self._load(rows, self.x.query).mul_(self.tables.base)
            yield _Block(rows, query, start + offset, rows.stop - 1 + offset)

    def _segments(self, block: _Block) -> list[_Segment]:
        (start, stop), tables = self.visible, self.tables
        if not tables.has_positions:
            return [_Segment(start, stop, 0)] if start < stop else []
        past = min(max(block.first - tables.far_past + 1, start), stop)
        future = min(max(block.last - tables.far_future, past), stop)
        segments = (
            _Segment(start, past, tables.past_slot),
            _Segment(past, future, None),
            _Segment(future, stop, tables.future_slot),
        )
        return [segment for segment in segments if segment.start < segment.stop]

    def _scores(self, block: _Block, segment: _Segment, name: str) -> torch.Tensor:
        """Computes Z of equations 6 and 7, (G, rows, keys), minus infinity where a query may not attend."""
        start, stop = segment.start, segment.stop
        query = block.query if segment.slot is None else self._far_query(block, segment)
        z = self.scratch.matmul(name, query, self.key[:, start:stop].mT)
        if segment.slot is None:
            self._add_near_terms(block, segment, z)
        elif self.tables.pos_key is not None:
            row = self._split_heads(block.query) @ self.tables.pos_key[:, None, segment.slot, :, None]
            z += row.flatten(0, 1)
        if self.masked:
            mask = self.x.mask.transpose(0, 1)
            where = zip((self.tables.heads, self.batches, block.rows), mask.shape, strict=False)
            mask = mask[tuple(part if size > 1 else slice(None) for part, size in where)]
            self._split_heads(z).masked_fill_(~mask[..., start:stop].flip(-2), -torch.inf)
        return z

    def _far_query(self, block: _Block, segment: _Segment) -> torch.Tensor:
        if self.tables.pos_query is None:
            return block.query
        return (self._split_heads(block.query) + self.tables.pos_query[:, None, segment.slot, None]).flatten(0, 1)

    def _add_far_gradients(self, block: _Block, segment: _Segment, da: torch.Tensor, dq: torch.Tensor) -> None:
        """Adds equation 10, except dK."""
        tables, slot = self.tables, segment.slot
        grad_shifted = da @ self.key[:, segment.start : segment.stop]
        dq += grad_shifted
        if tables.pos_query is not None:
            tables.grad_pos_query[:, slot] += self._split_heads(grad_shifted).sum((1, 2))
        if tables.pos_key is not None:
            da_sum = da.sum(-1, keepdim=True)
            tables.grad_pos_key[:, slot] += self._split_heads(da_sum * block.query).sum((1, 2))
            self._split_heads(dq).add_(self._split_heads(da_sum) * tables.pos_key[:, None, slot, None])

    def _add_near_terms(self, block: _Block, segment: _Segment, z: torch.Tensor) -> None:
        """Adds the two position terms of equation 6."""
        tables, z = self.tables, self._split_heads(z)
        distances = tables.from_distance(segment.start - block.last)
        if tables.pos_key is not None:
            band.add_term(z, self._split_heads(block.query), tables.key_by_distance[:, distances], self.scratch)
        if tables.pos_query is not None:
            keys = self._split_heads(self.key)[:, :, segment.start : segment.stop]
            band.add_term(z.mT, keys, tables.query_by_distance[:, distances], self.scratch)

    def _add_near_gradients(self, block: _Block, segment: _Segment, da: torch.Tensor, dq: torch.Tensor) -> None:
        """Adds equation 9, except the c2c terms."""
        tables, da = self.tables, self._split_heads(da)
        distances = tables.from_distance(segment.start - block.last)
        if tables.pos_key is not None:
            by_distance, grad = tables.key_by_distance[:, distances], tables.grad_key_by_distance[:, distances]
            band.add_gradients(
                da, self._split_heads(block.query), by_distance, self._split_heads(dq), grad, self.scratch
            )
        if tables.pos_query is not None:
            by_distance, grad = tables.query_by_distance[:, distances], tables.grad_query_by_distance[:, distances]
            key, grad_key = (self._split_heads(t)[:, :, segment.start : segment.stop] for t in (self.key, self.dk))
            band.add_gradients(da.mT, key, by_distance, grad_key, grad, self.scratch)

    def _split_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """Views (G, n, m) as (h, b, n, m)."""
        return tensor.unflatten(0, self.grid)

    def _zeros(self, block: _Block) -> torch.Tensor:
        return block.query.new_zeros(block.query.shape)

    def _load(self, rows: slice, source: torch.Tensor) -> torch.Tensor:
        """Copies (B, H, Lq, n) at these rows as (G, rows, n), last row first."""
        part = source[self.batches, self.tables.heads, rows].transpose(0, 1)
        return part.to(self.x.work_dtype).flip(-2).reshape(-1, *part.shape[2:])

    def _store(self, block: _Block, part: torch.Tensor, target: torch.Tensor) -> None:
        """Inverts ``_load``."""
        part = self._split_heads(part).flip(-2).transpose(0, 1)
        target[self.batches, self.tables.heads, block.rows] = part.to(target.dtype)

    def _dropout_factors(self, block: _Block, segment: _Segment) -> torch.Tensor:
        """Returns the factors of dropout (12) on the probabilities."""
        device, heads = block.query.device, self.x.query.shape[1]
        batch = torch.arange(self.batches.start, self.batches.stop, device=device) + self.first_batch
        head = torch.arange(self.tables.heads.start, self.tables.heads.stop, device=device)
        rows = torch.arange(block.rows.start, block.rows.stop, device=device).flip(0)
        batch_head = number_heads(self.x.seed, batch, head[:, None], heads)[..., None, None]
        keep = keep_mask(self.x.seed, batch_head, rows[:, None], (segment.start, segment.stop), self.x.dropout_p)
        return keep.flatten(0, 1).to(block.query.dtype).mul_(threshold_and_scale(self.x.dropout_p)[1])
