"""Memory-efficient disentangled attention in pure PyTorch, forward and written-out backward, on any device.

Queries are taken in blocks. For one block the keys fall into three segments: far before, near, far after. Scores are
held in base 2 (C = s log2 e); e = j - p is the distance from a query at position p to a key, and K^e = K^r[sigma(-e)]:

    near   Z = C q . k_j  +  skew(C q . K^e)  +  skew(k_j . C Q^e)^T                                      (6)
    far    Z = C (q + Q^r_r) . k_j  +  C q . K^r_r            sigma = r all over the segment              (7)
    P = 2^(Z - lse log2 e)     dZ = ln 2 P o (dP - Delta)     Delta = rowsum(P o dP) - dlse                (8)

Rows of a block are taken last to first: then e grows along rows and along keys, and both skews are plain views of
products with consecutive rows of the expanded tables (``_skew``): nothing is gathered, no slot is looked up. Backward
writes dZ through the same views. Nothing of size Lq x Lk or L x R is kept; temporaries are a few times CHUNK_ELEMENTS.
float16 and bfloat16 are computed in float32.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..dropout import keep_mask
from ..relative_position import distance_slots
from .inputs import AttentionInputs

BLOCK_ROWS = 128
BLOCK_KEYS = 64  # keys that share one window of distances in the p2c product
CHUNK_ELEMENTS_CPU = 1 << 19  # scores held at once: what a core's caches hold,
CHUNK_ELEMENTS = 1 << 25  # or what fills a GPU
LOG2E = 1 / math.log(2)


def why_not(inputs: AttentionInputs) -> list[str]:
    """Reasons not to serve these inputs: none."""
    return []


def forward(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, Lq, D) and log-sum-exp (B, H, Lq)."""
    output, lse = inputs.new_like_heads(inputs.query), inputs.new_lse()
    for first_batch, x, rows in _dense_calls(inputs):
        _DenseCall(x, first_batch).forward(output[:, :, rows], lse[:, :, rows])
    return output, lse


def backward(
    inputs: AttentionInputs,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of query, key, value, pos_key and pos_query, shaped and typed as these; None for an absent table."""
    grad_heads = [inputs.new_like_heads(x) for x in (inputs.query, inputs.key, inputs.value)]
    grad_tables = [
        None if x is None else x.new_zeros(x.shape, dtype=inputs.work_dtype) for x in (inputs.pos_key, inputs.pos_query)
    ]
    for first_batch, x, rows in _dense_calls(inputs):
        given = [t[:, :, rows] for t in (lse, grad_output, grad_lse)]
        _DenseCall(x, first_batch).backward(*given, [t[:, :, rows] for t in grad_heads], grad_tables)
    return *grad_heads, *(None if t is None else t.to(inputs.query.dtype) for t in grad_tables)


def _dense_calls(inputs: AttentionInputs) -> Iterator[tuple[int, AttentionInputs, slice]]:
    """(number of the first batch row, dense call, its place along the length)."""
    if inputs.cu_seqlens is None:
        yield 0, inputs, slice(None)
        return
    start = 0
    for sequence, x in enumerate(inputs.sequences()):
        stop = start + x.query.shape[2]
        yield sequence, x, slice(start, stop)
        start = stop


def _skew(product: torch.Tensor, columns: int) -> torch.Tensor:
    """The view v[..., r, c] = product[..., r, r + c] of a contiguous tensor."""
    *outer, row, one = product.stride()
    return product.as_strided((*product.shape[:-1], columns), (*outer, row + one, one))


class _Block(NamedTuple):
    """Queries of some heads and batch rows, last first; the keys that any of them may see."""

    heads: slice
    batches: slice
    rows: slice
    query: torch.Tensor  # (h, b, rows, D), times C
    first_position: int  # of the first query in the sequence, which is the last row here
    keys: tuple[int, int]
    masked: bool  # whether the mask hides any of these keys

    @property
    def last_position(self) -> int:
        return self.first_position + self.query.shape[2] - 1


class _Segment(NamedTuple):
    """Keys start to stop. Far: all read row ``slot`` of the table. Near (slot None): whole blocks of keys."""

    start: int
    stop: int
    slot: int | None


class _DenseCall:
    """One dense problem. Heads come before batch rows, so that these fold into the rows of products with a table."""

    def __init__(self, x: AttentionInputs, first_batch: int):
        self.x, self.first_batch = x, first_batch
        self.base = x.scale * LOG2E
        self.query_length, self.key_length = x.query.shape[2], x.key.shape[2]
        self.block_rows = max(1, min(BLOCK_ROWS, self.query_length))
        self.block_keys = max(1, min(BLOCK_KEYS, self.key_length))
        # A near segment's last block of keys may run past the end: padded here, masked in _scores.
        self.key, self.value = (
            torch.nn.functional.pad(t.transpose(0, 1).to(x.work_dtype), (0, 0, 0, self.block_keys)).contiguous()
            for t in (x.key, x.value)
        )
        self.pos_key = self.pos_query = self.key_by_distance = self.query_by_distance = None
        if x.has_positions:
            self._expand_tables()

    def _expand_tables(self) -> None:
        """K^e and Q^e, (H, D, E): a column for each distance that a near segment can hold, padding included."""
        x, table = self.x, self.x.table
        slack = self.block_rows + self.block_keys
        first = max(1 - x.query_offset - self.query_length, -table.far_past - slack)
        last = min(self.key_length - x.query_offset, slack - table.far_future) + self.block_keys
        self.first_distance = first
        self.pos_key, self.pos_query = (None if t is None else t.to(x.work_dtype) for t in (x.pos_key, x.pos_query))
        rows = (x.pos_key if x.pos_key is not None else x.pos_query).shape[1]
        distances = -torch.arange(first, max(first, last), device=x.query.device)
        # The clamp serves padding alone: what the lengths can reach lies within the rows that were given.
        self.slots = (distance_slots(table, distances) - x.first_slot).clamp_(0, rows - 1)
        self.key_by_distance, self.query_by_distance = (
            None if t is None else t.index_select(1, self.slots).mT.contiguous() for t in (self.pos_key, self.pos_query)
        )

    def forward(self, output: torch.Tensor, lse: torch.Tensor) -> None:
        """Fills output (B, H, Lq, D) and lse (B, H, Lq)."""
        for block in self._blocks():
            segments = self._segments(block)
            scores = [self._scores(block, segment) for segment in segments]
            peak = block.query.new_full((*block.query.shape[:-1], 1), -torch.inf)
            for z in scores:
                peak = torch.maximum(peak, z.amax(-1, keepdim=True))
            peak.masked_fill_(peak == -torch.inf, 0.0)
            total, out = torch.zeros_like(peak), torch.zeros_like(block.query)
            for segment, z in zip(segments, scores, strict=True):
                p = z.sub_(peak).exp2_()
                total += p.sum(-1, keepdim=True)
                if self.x.dropout_p > 0:
                    p *= self._kept(block, segment)
                out += p @ self._of(self.value, block, segment)
            self._store(block, out.div_(total.masked_fill(total == 0, 1.0)), output)
            self._store(block, peak.add_(total.log2_()).div_(LOG2E), lse[..., None])

    def backward(
        self,
        lse: torch.Tensor,
        grad_output: torch.Tensor,
        grad_lse: torch.Tensor,
        grad_heads: list[torch.Tensor],
        grad_tables: list[torch.Tensor | None],
    ) -> None:
        """Fills grad_heads (of query, key, value) and adds to grad_tables (of pos_key, pos_query)."""
        grad_query, grad_key, grad_value = grad_heads
        self.grad_key, grad_v = torch.zeros_like(self.key), torch.zeros_like(self.value)
        self.grad_pos_key, self.grad_pos_query = grad_tables
        self.grad_key_by_distance, self.grad_query_by_distance = (
            None if t is None else t.new_zeros(t.shape[0], t.shape[2] + self.block_keys, t.shape[1])
            for t in (self.key_by_distance, self.query_by_distance)
        )
        for block in self._blocks():
            grad_out, segments = self._load(block, grad_output), self._segments(block)
            lse_2 = self._load(block, lse[..., None]) * LOG2E
            lse_2.masked_fill_(lse_2 == -torch.inf, 0.0)  # rows that see nothing: 2^(-inf - 0) = 0
            # From P and dP, not from O and dO: what is rounded in dP then cancels in dZ, as it does in a softmax.
            delta = -self._load(block, grad_lse[..., None])
            ps, grad_ps = [], []
            for segment in segments:
                p = self._scores(block, segment).sub_(lse_2).exp2_()
                grad_p = grad_out @ self._of(self.value, block, segment).mT
                dropped = p
                if self.x.dropout_p > 0:
                    kept = self._kept(block, segment)
                    grad_p *= kept
                    dropped = p * kept
                self._of(grad_v, block, segment).add_(dropped.mT @ grad_out)
                delta += (p * grad_p).sum(-1, keepdim=True)
                ps.append(p)
                grad_ps.append(grad_p)
            grad_q = torch.zeros_like(block.query)
            for segment, p, grad_p in zip(segments, ps, grad_ps, strict=True):
                grad_z = grad_p.sub_(delta).mul_(p).mul_(1 / LOG2E)
                grad_scores = self._grad_near_scores if segment.slot is None else self._grad_far_scores
                grad_q += grad_scores(block, segment, grad_z)
            self._store(block, grad_q.mul_(self.base), grad_query)
        grad_key.copy_(self.grad_key[:, :, : self.key_length].transpose(0, 1))
        grad_value.copy_(grad_v[:, :, : self.key_length].transpose(0, 1))
        near = (self.grad_key_by_distance, self.grad_query_by_distance)
        for total, by_distance, factor in zip(grad_tables, near, (1.0, self.base), strict=True):
            if total is not None:
                # The sum over the distances of a slot, as a product: atomic-free, so the same in every run.
                rows = torch.arange(total.shape[1], device=total.device)
                of_slot = (rows[:, None] == self.slots).to(total.dtype)
                total.add_(of_slot @ by_distance[:, : len(self.slots)], alpha=factor)

    def _blocks(self) -> Iterator[_Block]:
        x = self.x
        batch, heads = x.query.shape[:2]
        budget = CHUNK_ELEMENTS_CPU if x.query.device.type == "cpu" else CHUNK_ELEMENTS
        budget = max(1, budget // max(1, self.block_rows * self.key_length))
        heads_step = min(heads, budget)
        batch_step = max(1, budget // heads)
        for b in range(0, batch, batch_step):
            batches = slice(b, min(b + batch_step, batch))
            keys, masked = self._visible_keys(batches)
            for h in range(0, heads, heads_step):
                for i in range(0, self.query_length, self.block_rows):
                    where = slice(h, min(h + heads_step, heads)), batches, slice(i, i + self.block_rows)
                    block = _Block(*where, x.query, i + x.query_offset, keys, masked)
                    yield block._replace(query=self._load(block, x.query) * self.base)

    def _visible_keys(self, batches: slice) -> tuple[tuple[int, int], bool]:
        """The range of keys that any of these batch rows may see, and whether the mask hides some inside it."""
        mask, every = self.x.mask, (0, self.key_length)
        if mask is None:
            return every, False
        if mask.device.type != "cpu" or mask.shape[1] > 1 or mask.shape[2] > 1:
            return every, True  # to look would mean to wait for the device, or to read a whole matrix
        mask = mask[batches if mask.shape[0] > 1 else slice(None), 0, 0]
        seen = mask.any(0).nonzero()
        if len(seen) == 0:
            return (0, 0), False
        start, stop = int(seen[0]), int(seen[-1]) + 1
        return (start, stop), not bool(mask[:, start:stop].all())

    def _segments(self, block: _Block) -> list[_Segment]:
        start, stop = block.keys
        if not self.x.has_positions:
            return [_Segment(start, stop, 0)] if start < stop else []
        table = self.x.table
        past = min(max(block.first_position - table.far_past + 1, start), stop)
        future = min(max(block.last_position - table.far_future, past), stop)
        near = past + -(-(future - past) // self.block_keys) * self.block_keys
        segments = (
            _Segment(start, past, table.slots[-1] - self.x.first_slot),
            _Segment(past, near, None),
            _Segment(near, stop, table.slots[0] - self.x.first_slot),
        )
        return [segment for segment in segments if segment.start < segment.stop]

    def _scores(self, block: _Block, segment: _Segment) -> torch.Tensor:
        """Z of equations 6 and 7, (h, b, rows, keys), minus infinity where a query may not attend."""
        z = self._near_scores(block, segment) if segment.slot is None else self._far_scores(block, segment)
        z[..., max(0, block.keys[1] - segment.start) :] = -torch.inf
        if block.masked:
            mask = self.x.mask.transpose(0, 1)
            where = zip((block.heads, block.batches, block.rows), mask.shape, strict=False)
            mask = mask[tuple(part if size > 1 else slice(None) for part, size in where)]
            hidden = ~mask[..., segment.start : min(segment.stop, self.key_length)].flip(-2)
            z[..., : hidden.shape[-1]].masked_fill_(hidden, -torch.inf)
        return z

    def _far_scores(self, block: _Block, segment: _Segment) -> torch.Tensor:
        z = self._far_query(block, segment) @ self._of(self.key, block, segment).mT
        if self.pos_key is not None:
            z += block.query @ self.pos_key[block.heads, None, segment.slot, :, None]
        return z

    def _far_query(self, block: _Block, segment: _Segment) -> torch.Tensor:
        if self.pos_query is None:
            return block.query
        return block.query + self.base * self.pos_query[block.heads, None, segment.slot, None]

    def _grad_far_scores(self, block: _Block, segment: _Segment, grad_z: torch.Tensor) -> torch.Tensor:
        """The share of the query's gradient; adds the shares of the key's and the tables'."""
        self._of(self.grad_key, block, segment).add_(grad_z.mT @ self._far_query(block, segment))
        grad_q = grad_z @ self._of(self.key, block, segment)
        if self.pos_query is not None:
            self.grad_pos_query[block.heads, segment.slot] += self.base * grad_q.sum((1, 2))
        if self.pos_key is not None:
            row_sum = grad_z.sum(-1, keepdim=True)
            self.grad_pos_key[block.heads, segment.slot] += (row_sum * block.query).sum((1, 2))
            grad_q += row_sum * self.pos_key[block.heads, None, segment.slot, None]
        return grad_q

    def _near_scores(self, block: _Block, segment: _Segment) -> torch.Tensor:
        z = block.query @ self._of(self.key, block, segment).mT
        if self.pos_key is not None:
            c2p = block.query.flatten(1, 2) @ self._distances(self.key_by_distance, block, segment)
            z += _skew(c2p.unflatten(1, block.query.shape[1:3]), z.shape[-1])
        if self.pos_query is not None:
            p2c = self._key_blocks(block, segment) @ self._windows(block, segment)
            p2c = p2c.unflatten(2, (-1, self.block_keys))  # (h, blocks, b, keys of a block, distances)
            z.unflatten(-1, (-1, self.block_keys)).add_(_skew(p2c, z.shape[2]).permute(0, 2, 4, 1, 3), alpha=self.base)
        return z

    def _grad_near_scores(self, block: _Block, segment: _Segment, grad_z: torch.Tensor) -> torch.Tensor:
        """The share of the query's gradient; adds the shares of the key's and the tables'."""
        grad_q = grad_z @ self._of(self.key, block, segment)
        grad_k = self._of(self.grad_key, block, segment)
        grad_k += grad_z.mT @ block.query
        rows, columns = grad_z.shape[2:]
        if self.pos_key is not None:
            skewed = grad_z.new_zeros(*grad_z.shape[:3], rows + columns)
            _skew(skewed, columns).copy_(grad_z)
            skewed = skewed.flatten(1, 2)
            grad_q += (skewed @ self._distances(self.key_by_distance, block, segment).mT).view_as(grad_q)
            grad = self._distances(self.grad_key_by_distance.mT, block, segment).mT
            grad += skewed.mT @ block.query.flatten(1, 2)
        if self.pos_query is not None:
            blocks = grad_z.unflatten(-1, (-1, self.block_keys)).permute(0, 3, 1, 4, 2)
            skewed = grad_z.new_zeros(*blocks.shape[:4], rows + self.block_keys)
            _skew(skewed, rows).copy_(blocks)
            skewed = skewed.flatten(2, 3)
            grad_blocks = (skewed @ self._windows(block, segment).mT).unflatten(2, (-1, self.block_keys))
            grad_k.add_(grad_blocks.transpose(1, 2).flatten(2, 3), alpha=self.base)
            self._add_windows(block, segment, skewed.mT @ self._key_blocks(block, segment))
        return grad_q

    def _distances(self, by_distance: torch.Tensor, block: _Block, segment: _Segment) -> torch.Tensor:
        """The columns of all distances between block and segment, ascending, and one more: (h, D, rows + keys)."""
        start = segment.start - block.last_position - self.first_distance
        return by_distance[block.heads].narrow(2, start, block.query.shape[2] + segment.stop - segment.start)

    def _windows(self, block: _Block, segment: _Segment) -> torch.Tensor:
        """Of these, the columns that each block of keys needs: (h, blocks, D, rows + block_keys)."""
        distances = self._distances(self.query_by_distance, block, segment)
        return distances.unfold(2, block.query.shape[2] + self.block_keys, self.block_keys).transpose(1, 2).contiguous()

    def _add_windows(self, block: _Block, segment: _Segment, grad_windows: torch.Tensor) -> None:
        """The adjoint of ``_windows``: neighbouring windows overlap, their slices of one block's width do not."""
        step, count = self.block_keys, grad_windows.shape[1]
        start = segment.start - block.last_position - self.first_distance
        grad = self.grad_query_by_distance[block.heads]
        for part in grad_windows.split(step, 2):
            grad.narrow(1, start, count * step).unflatten(1, (count, step))[:, :, : part.shape[2]].add_(part)
            start += step

    def _key_blocks(self, block: _Block, segment: _Segment) -> torch.Tensor:
        """(h, blocks, b * block_keys, D)."""
        keys = self._of(self.key, block, segment).unflatten(2, (-1, self.block_keys))
        return keys.transpose(1, 2).flatten(2, 3)

    def _of(self, keys: torch.Tensor, block: _Block, segment: _Segment) -> torch.Tensor:
        return keys[block.heads, block.batches, segment.start : segment.stop]

    def _load(self, block: _Block, source: torch.Tensor) -> torch.Tensor:
        """(B, H, Lq, n) at the block's place, as (h, b, rows, n), last row first."""
        part = source[block.batches, block.heads, block.rows].transpose(0, 1)
        return part.to(self.x.work_dtype).flip(-2).contiguous()

    def _store(self, block: _Block, part: torch.Tensor, target: torch.Tensor) -> None:
        """The inverse of ``_load``."""
        target[block.batches, block.heads, block.rows] = part.flip(-2).transpose(0, 1).to(target.dtype)

    def _kept(self, block: _Block, segment: _Segment) -> torch.Tensor:
        """What dropout multiplies the probabilities by: 0 or 1 / (1 - p)."""
        device, heads = block.query.device, self.x.query.shape[1]
        batch = torch.arange(block.batches.start, block.batches.stop, device=device) + self.first_batch
        head = torch.arange(block.heads.start, block.heads.stop, device=device)
        rows = torch.arange(block.rows.start, block.rows.start + block.query.shape[2], device=device).flip(0)
        batch_head = (batch * heads + head[:, None])[..., None, None]
        keep = keep_mask(self.x.seed, batch_head, rows[:, None], (segment.start, segment.stop), self.x.dropout_p)
        return keep.to(block.query.dtype).div_(1 - self.x.dropout_p)
