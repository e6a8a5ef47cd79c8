"""Attention of this rank's queries to the keys of all ranks, which arrive one stretch after the other.

Partial results over keys of some ranks, with log-sum-exp lse_b, merge into those over all keys:

    lse = log sum_b exp(lse_b)        O = sum_b exp(lse_b - lse) O_b                                         (15)

In step k, keys and values come from the rank k before this one, and go to the rank k behind. The transfers of the next
step are under way while this step's scores are computed. If all keys and values are small, one step gathers them.

Backward takes the merged O and lse. Then P = exp(A - lse) and Delta = rowsum(O o dO) - dlse are those of the whole row,
and each step yields exactly its keys' share of the gradients (8). Keys and values travel again, and their gradients go
back to the rank that holds them. A rank keeps its own q, k, v, O and lse only.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .. import backends, selection
from ..call import Call
from ..dropout import GROUP, seed_at
from .exchange import Transfers
from .stretches import Piece, Rows, Stretches

# Keys and values of all ranks together of up to this many bytes arrive at once, and one call reads them: many small
# transfers and calls take more time. This was measured with two processes on a CPU only (docs/measured.md): gathering
# takes 0.93 of the ring's time at 1 MiB, and 0.89 to 1.02 without a trend from 2 to 16 MiB.
GATHER_BYTES = 1 << 22


class Ring(NamedTuple):
    """Holds what all steps share.

    Attributes:
        group: the process group.
        stretches: who holds which rows.
        call: this rank's query, key and value, (B, H, L, D), and the settings. Of packed sequences, B is 1. Its mask
            covers the keys of all ranks: (B or 1, H or 1, Lq or 1, keys of all ranks). query_offset is 0.
        cu_seqlens: the ends of ``stretches.inner`` on the device, or None.
        backend: the one that the user named, or None.
        share: (first, all), the number of this process's first head and that of all heads, for dropout.
    """

    group: Any
    stretches: Stretches
    call: Call
    cu_seqlens: torch.Tensor | None
    backend: str | None
    share: tuple[int, int]

    def steps(self) -> list[list[int]]:
        """Distances to the ranks whose keys each step reads; 0 is this rank."""
        ranks, query = len(self.stretches.lengths), self.call.query
        rows = self.stretches.total
        if self.stretches.ends is not None:
            rows = min(rows, 2 * self.call.max_seqlen)  # a rank's first sequence and its last one
        # All ranks must choose the same order of transfers, so this is a bound and not this rank's own number.
        if 2 * query.shape[0] * query.shape[1] * query.shape[3] * rows * query.element_size() <= GATHER_BYTES:
            return [list(range(ranks))]
        return [[distance] for distance in range(ranks)]

    def transfers(self, step: Sequence[int], own: torch.Tensor) -> Transfers:
        """Starts to move keys and values (B, L, 2, H, D): this rank's to those behind it, others' to this one."""
        transfers, size = Transfers(self.group, "keys and values"), len(self.stretches.lengths)
        for distance in (d for d in step if d):
            behind, before = (self.stretches.rank + distance) % size, (self.stretches.rank - distance) % size
            if piece := self.piece_of(behind):
                transfers.send(behind, own[:, piece.queries.start : piece.queries.stop])
            if piece := self.piece_of(before):
                transfers.receive(before, own, (own.shape[0], piece.keys[before].count, *own.shape[2:]))
        return transfers.start()

    def returns(self, step: Sequence[int], gradients: dict[int, torch.Tensor], own: torch.Tensor) -> Transfers:
        """Starts to move the gradients of keys and values back: others' to their owners, this rank's to it."""
        transfers, size = Transfers(self.group, "gradients of keys and values"), len(self.stretches.lengths)
        for distance in (d for d in step if d):
            behind, before = (self.stretches.rank + distance) % size, (self.stretches.rank - distance) % size
            if before in gradients:
                transfers.send(before, gradients[before])
            if piece := self.piece_of(behind):
                transfers.receive(behind, own, (own.shape[0], piece.queries.count, *own.shape[2:]))
        return transfers.start()

    def piece_of(self, rank: int) -> Piece | None:
        """The piece whose sequence another rank has keys of. Two ranks share at most one sequence."""
        return next((piece for piece in self.stretches.pieces if rank in piece.keys), None)

    def blocks(self, step: Sequence[int], own: torch.Tensor, received: dict[int, torch.Tensor]) -> Iterator["Block"]:
        """Yields what one step computes."""
        call, stretches = self.call, self.stretches
        if 0 in step and (inner := stretches.inner) is not None:
            rows, number, ends = inner
            longest = max(b - a for a, b in itertools.pairwise(ends))
            mask = self._mask(slice(None), stretches.start + rows.start, rows.count)
            whole = call._replace(
                cu_seqlens=self.cu_seqlens, seed=self._seed(0, 0, number), mask=mask, max_seqlen=longest
            )
            yield self._block(whole, rows, own[:, rows.start : rows.stop], {stretches.rank: rows.count})
        ranks = sorted((stretches.rank - distance) % len(stretches.lengths) for distance in step)
        for piece in stretches.pieces:
            owners = [rank for rank in ranks if rank in piece.keys]
            if not owners:
                continue
            parts, lengths = [], {}
            for rank in owners:
                rows, lengths[rank] = piece.keys[rank], piece.keys[rank].count
                parts.append(own[:, rows.start : rows.stop] if rank == stretches.rank else received[rank])
            first = piece.keys[owners[0]]
            place = stretches.starts[owners[0]] + first.start  # of the first key among those of all ranks
            keys = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
            yield self._dense_block(piece, keys, first.position, place, lengths)

    def _dense_block(self, piece: Piece, keys: torch.Tensor, position: int, place: int, owners: dict) -> "Block":
        queries, call = piece.queries, self.call
        mask, seed, lead = self._mask(slice(queries.start, queries.stop), place, keys.shape[1]), None, 0
        if call.seed is not None:
            lead = position % GROUP  # hidden keys in front: the mask is made for that many keys at a time
            seed = self._seed(queries.position, position - lead, piece.sequence)
        if lead:
            count = keys.shape[1]
            keys = torch.nn.functional.pad(keys, (0, 0, 0, 0, 0, 0, lead, 0))
            visible = mask if mask is not None else keys.new_ones((1, 1, 1, count), dtype=torch.bool)
            mask = torch.nn.functional.pad(visible.expand(*visible.shape[:3], count), (lead, 0))
        dense = call._replace(
            cu_seqlens=None, seed=seed, mask=mask, query_offset=queries.position - position + lead,
            max_seqlen=queries.count,
        )  # fmt: skip
        return self._block(dense, queries, keys, owners, lead)

    def _block(self, call: Call, queries: Rows, keys: torch.Tensor, owners: dict, lead: int = 0) -> "Block":
        rows = slice(queries.start, queries.stop)
        key, value = (keys[:, :, n].transpose(1, 2) for n in range(2))
        call = call._replace(query=call.query[:, :, rows], key=key, value=value)
        lengths = (call.max_seqlen,) * 2 if call.cu_seqlens is not None else (queries.count, key.shape[2])
        slots = slice(0, 0)
        if call.has_positions:
            # Far keys read one row of the tables. Kernels then spend nothing on the others.
            first, last = call.table.window(*lengths, call.query_offset)
            slots = slice(first - call.first_slot, last - call.first_slot)
            tables = [None if x is None else x[:, slots] for x in (call.pos_key, call.pos_query)]
            call = call._replace(pos_key=tables[0], pos_query=tables[1], first_slot=first)
        name = selection.choose(self.backend, call)
        if name == "reference":
            why = backends.only_reference(call) or "no other backend serves this call"
            raise RuntimeError(f"backend 'reference' has no backward over keys of several processes: {why}")
        return Block(call, name, rows, slots, owners, lead)

    def _seed(self, row: int, key: int, sequence: int) -> torch.Tensor | None:
        """Where the dropout counter of a block starts: as in one process with all rows."""
        if self.call.seed is None:
            return None
        first, heads = self.share
        return seed_at(self.call.seed, row, key, first + sequence * heads, heads=heads)

    def _mask(self, queries: slice, start: int, count: int) -> torch.Tensor | None:
        mask = self.call.mask
        if mask is None:
            return None
        mask = mask[..., start : start + count]
        return mask if mask.shape[2] == 1 else mask[:, :, queries]


class Block(NamedTuple):
    """One call of a backend: some of this rank's queries with keys of one or more ranks.

    Attributes:
        call, backend: the call and who runs it.
        rows: the queries among this rank's rows.
        slots: the rows of the position tables that it reads.
        owners: number of keys of each rank, in their order.
        lead: hidden keys in front of them.
    """

    call: Call
    backend: str
    rows: slice
    slots: slice
    owners: dict[int, int]
    lead: int


class RingAttention(torch.autograd.Function):
    """Returns output (B, H, L, D) in query's dtype and log-sum-exp (B, H, L) of this rank's queries."""

    @staticmethod
    def forward(ctx, ring: Ring, query, key, value, pos_key, pos_query):
        call = ring.call
        own = _joined(key, value)
        output = query.new_empty(query.transpose(1, 2).shape, dtype=call.work_dtype).transpose(1, 2)
        lse = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float64)  # one rounding for any number of parts
        with contextlib.ExitStack() as under_way:
            for step, received in _received(ring, own, under_way):
                for block in ring.blocks(step, own, received):
                    part, part_lse = backends.forward(block.call, block.backend)
                    rows = block.rows
                    if 0 in step:  # the first one for all rows
                        output[:, :, rows], lse[:, :, rows] = part, part_lse
                    else:
                        _merge(output[:, :, rows], lse[:, :, rows], part, part_lse)
        output, lse = output.to(query.dtype), lse.to(call.work_dtype)
        ctx.save_for_backward(query, own, pos_key, pos_query, call.mask, call.seed, ring.cu_seqlens, output, lse)
        ctx.ring = ring._replace(call=_without_tensors(call), cu_seqlens=None)
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_lse):
        query, own, pos_key, pos_query, mask, seed, cu_seqlens, output, lse = ctx.saved_tensors
        key, value = (own[:, :, n].transpose(1, 2) for n in range(2))
        call = ctx.ring.call._replace(
            query=query, key=key, value=value, pos_key=pos_key, pos_query=pos_query, mask=mask, seed=seed
        )
        ring = ctx.ring._replace(call=call, cu_seqlens=cu_seqlens)
        if grad_output is None:
            grad_output = output.new_zeros(()).expand(output.shape)
        wanted = ctx.needs_input_grad[1:]
        exact = call.work_dtype
        grad_query, grad_own = (torch.zeros_like(x, dtype=exact) for x in (query, own))
        grad_tables = [
            None if x is None or not want else torch.zeros_like(x, dtype=exact)
            for x, want in zip((pos_key, pos_query), wanted[3:], strict=True)
        ]
        with contextlib.ExitStack() as under_way:
            returning: list[Transfers] = []
            for step, received in _received(ring, own, under_way):
                for_others: dict[int, torch.Tensor] = {}
                for block in ring.blocks(step, own, received):
                    rows = block.rows
                    of_rows = [None if x is None else x[:, :, rows] for x in (output, lse, grad_output, grad_lse)]
                    grads = backends.backward(block.call, block.backend, *of_rows, wanted, partial=True)
                    grad_query[:, :, rows] += grads[0]
                    for total, part in zip(grad_tables, grads[3:], strict=True):
                        if total is not None:
                            total[:, block.slots] += part
                    grad_keys = _joined(*grads[1:3])[:, block.lead :]
                    for rank, part in zip(block.owners, grad_keys.split(list(block.owners.values()), 1), strict=True):
                        if rank == ring.stretches.rank:
                            grad_own[:, rows] += part  # its keys are the rows of its queries
                        else:
                            for_others[rank] = part
                returning.append(ring.returns(step, for_others, own))
                under_way.callback(returning[-1].abandon)
            for transfers in returning:
                for rank, part in transfers.wait().items():
                    piece = ring.piece_of(rank)
                    grad_own[:, piece.queries.start : piece.queries.stop] += part
        grad_key, grad_value = (grad_own[:, :, n].transpose(1, 2).to(query.dtype) for n in range(2))
        tables = [None if x is None else x.to(query.dtype) for x in grad_tables]
        return None, grad_query.to(query.dtype), grad_key, grad_value, *tables


def _received(
    ring: Ring, own: torch.Tensor, under_way: contextlib.ExitStack
) -> Iterator[tuple[list[int], dict[int, torch.Tensor]]]:
    """Yields each step and the keys and values (B, L, 2, H, D) of others that it needs; the next ones are under way."""

    def started(step: list[int]) -> Transfers:
        transfers = ring.transfers(step, own)
        under_way.callback(transfers.abandon)
        return transfers

    steps = ring.steps()
    transfers = started(steps[0])
    for number, step in enumerate(steps):
        received = transfers.wait()
        if number + 1 < len(steps):
            transfers = started(steps[number + 1])
        yield step, received


def _merge(output: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Adds a part to output and lse in place, by equation 15."""
    merged = torch.logaddexp(lse, part_lse.double())
    known = merged.masked_fill(merged == -torch.inf, 0.0)  # a row that has seen no key yet: weights exp(-inf - 0) = 0
    weights = [(x - known).exp_().to(output.dtype).unsqueeze(-1) for x in (lse, part_lse)]
    output.mul_(weights[0]).add_(part * weights[1])
    lse.copy_(merged)


def _joined(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(B, H, L, D) twice to (B, L, 2, H, D): rows of keys and values are sent together and without another copy."""
    return torch.stack((key.transpose(1, 2), value.transpose(1, 2)), 2)


def _without_tensors(call: Call) -> Call:
    return Call(*(None,) * 8, *call[8:])  # type: ignore[arg-type]
