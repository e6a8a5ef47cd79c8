"""The position tables of some heads with one row a distance, and their gradients (equations 6, 7, 9 to 11).

Row t of a table by distance belongs to e = j - p = first_distance + t: to keys before the query first.
"""

import functools
import math

import torch

from ...relative_position import distance_slots
from ..inputs import AttentionInputs
from .scratch import Scratch

LOG2E = 1 / math.log(2)
PART_ROWS = 16  # of a gradient by distance, summed one after the other


class Tables:
    """K^e (h, E, D), and of Q^e the windows (w, h, rows + keys of a block, D) that a block of keys reads.

    Block m of the keys and block n of the queries read window ``window(n, m)``: all blocks at the same distance the
    same one.
    """

    def __init__(self, x: AttentionInputs, heads: slice, block_rows: int, block_keys: int, scratch: Scratch):
        self.heads, self.block_rows, self.block_keys = heads, block_rows, block_keys
        self.offset, self.scale, self.base = x.query_offset, x.scale, x.scale * LOG2E
        self.pos_key, self.pos_query = (
            None if t is None else t[heads].to(x.work_dtype) for t in (x.pos_key, x.pos_query)
        )
        self.has_positions = x.has_positions
        if not x.has_positions:
            self.past_slot = self.future_slot = 0
            return
        table = x.table
        self.far_past, self.far_future = table.far_past, table.far_future
        self.past_slot, self.future_slot = table.slots[-1] - x.first_slot, table.slots[0] - x.first_slot
        self._choose_distances(x.query.shape[2], x.key.shape[2])
        rows = (self.pos_key if self.pos_key is not None else self.pos_query).shape[1]
        distances = -torch.arange(self.first_distance, self.first_distance + self.count, device=x.query.device)
        # The clamp serves padding alone: what the lengths can reach lies within the rows that were given.
        self.slots = (distance_slots(table, distances) - x.first_slot).clamp_(0, rows - 1)
        if self.pos_key is not None:
            self.key_by_distance = self._by_distance(self.pos_key, scratch, "K by distance")
        if self.pos_query is not None:
            by_distance = self._by_distance(self.pos_query, scratch, "Q by distance").transpose(0, 1)
            windows = by_distance.unfold(0, block_rows + block_keys, block_keys).mT
            self.windows = scratch("windows", *windows.shape).copy_(windows)

    def _by_distance(self, table: torch.Tensor, scratch: Scratch, name: str) -> torch.Tensor:
        out = scratch(name, len(table), self.count, table.shape[2])
        return torch.index_select(table, 1, self.slots, out=out)

    def _choose_distances(self, query_length: int, key_length: int) -> None:
        """As far as a near segment reaches, padding of blocks included, in whole windows."""
        rows, keys = self.block_rows, self.block_keys
        whole_queries, whole_keys = -(-query_length // rows) * rows, -(-key_length // keys) * keys
        first = max(1 - self.offset - whole_queries, -self.far_past - rows - keys)
        first -= (first + self.offset + rows - 1) % keys
        stop = min(whole_keys - self.offset + 1, rows + keys - self.far_future)
        windows = max(1, -(-(stop - first - rows) // keys))
        self.first_distance, self.count = first, windows * keys + rows

    def window(self, first_position: int, first_key: int) -> int:
        """Number of the window for a block of queries and a block of keys that start there."""
        return (first_key - first_position - self.block_rows + 1 - self.first_distance) // self.block_keys

    def distances(self, last_position: int, first_key: int, count: int) -> slice:
        """Rows of the tables by distance: ``count`` of them from the pair of this query and this key on."""
        start = first_key - last_position - self.first_distance
        return slice(start, start + count)

    def start_gradients(self, scratch: Scratch) -> None:
        """Zeroes what a backward pass adds to, by distance and for the far segments by row."""
        if self.pos_key is not None:
            self.grad_key_by_distance = scratch("grad by distance", *self.key_by_distance.shape).zero_()
            self.grad_pos_key = scratch("grad pos_key", *self.pos_key.shape).zero_()
        if self.pos_query is not None:
            self.grad_windows = scratch("grad windows", *self.windows.shape).zero_()
            self.grad_pos_query = scratch("grad pos_query", *self.pos_query.shape).zero_()

    def add_gradients(self, grad_pos_key: torch.Tensor | None, grad_pos_query: torch.Tensor | None) -> None:
        """Equation 11, added to the gradients (H, R, D) of the whole tables."""
        if grad_pos_key is not None:
            by_slot = self._sum_by_slot(self.grad_key_by_distance) + self.grad_pos_key
            grad_pos_key[self.heads] += by_slot / LOG2E  # made with C q, wants s q
        if grad_pos_query is not None:
            # The adjoint of unfold: windows overlap, their slices of one block's width do not.
            by_distance = self.pos_query.new_zeros(self.count + self.block_keys, *self.windows.shape[1::2])
            count = len(self.grad_windows)
            for part, grad in enumerate(self.grad_windows.split(self.block_keys, 2)):
                start = part * self.block_keys
                place = by_distance[start : start + count * self.block_keys].unflatten(0, (count, self.block_keys))
                place[:, : grad.shape[2]] += grad.transpose(1, 2)
            by_slot = self._sum_by_slot(by_distance[: self.count].transpose(0, 1)) + self.grad_pos_query
            grad_pos_query[self.heads] += self.scale * by_slot

    def _sum_by_slot(self, by_distance: torch.Tensor) -> torch.Tensor:
        """(h, E, D) to (h, R', D). Distances of a slot are neighbours: bags, summed in order, without atomics.

        In parts first: the far slots take hundreds of rows, whose rounding adds up when they are summed one by one.
        """
        heads, count, size = by_distance.shape
        table = self.pos_key if self.pos_key is not None else self.pos_query
        arange = functools.partial(torch.arange, device=by_distance.device)
        starts = torch.searchsorted(self.slots.flip(0), arange(table.shape[1]))  # slots fall while e grows
        part_starts = torch.cat((starts, arange(0, count, PART_ROWS))).sort().values
        rows = by_distance.transpose(0, 1).reshape(count, heads * size)
        parts = torch.nn.functional.embedding_bag(arange(count - 1, -1, -1), rows, part_starts, mode="sum")
        first_parts = torch.searchsorted(part_starts, starts)
        sums = torch.nn.functional.embedding_bag(arange(len(parts)), parts, first_parts, mode="sum")
        return sums.unflatten(1, (heads, size)).transpose(0, 1)
