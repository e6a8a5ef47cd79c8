"""The position tables of some heads with one row per distance, and their gradients (equations 6, 7, 9 to 11).

Row t of a table by distance belongs to e = j - p = first_distance + t: keys before the query come first.
"""

import functools
import math

import torch

from ...call import Call
from ...relative_position import distance_slots
from .scratch import Scratch

LOG2E = 1 / math.log(2)
PART_ROWS = 16  # rows of a gradient by distance that are summed one after the other


class Tables:
    """K^r and C Q^r, (h, R', D), for far keys; the same by distance, (h, E, D), for near ones."""

    def __init__(self, x: Call, heads: slice, block_rows: int, scratch: Scratch):
        self.heads, self.block_rows = heads, block_rows
        self.scale, self.base = x.scale, x.scale * LOG2E
        self.pos_key, self.pos_query = (
            None if t is None else t[heads].to(x.work_dtype) for t in (x.pos_key, x.pos_query)
        )
        self.has_positions = x.has_positions
        if not x.has_positions:
            self.past_slot = self.future_slot = 0
            return
        table = x.table
        self.far_past, self.far_future = table.far_past, table.far_future
        self.past_slot, self.future_slot = x.past_row, x.future_row
        self.first_distance, count = self._distances(x)
        rows = (self.pos_key if self.pos_key is not None else self.pos_query).shape[1]
        distances = -torch.arange(self.first_distance, self.first_distance + count, device=x.query.device)
        # The clamp affects only the last row: the tables hold every row that these lengths can reach.
        self.slots = (distance_slots(x.device_tables.slots, distances) - x.first_slot).clamp_(0, rows - 1)
        if self.pos_key is not None:
            self.key_by_distance = self._by_distance(self.pos_key, scratch, "K by distance")
        if self.pos_query is not None:
            self.pos_query = self.base * self.pos_query
            self.query_by_distance = self._by_distance(self.pos_query, scratch, "Q by distance")

    def _distances(self, x: Call) -> tuple[int, int]:
        """Returns the first distance and their number: those of any block's near segment, and one more."""
        nearest = 1 - self.block_rows  # distance between the first and the last query of a block
        first = max(1 - x.query.shape[2] - x.query_offset, nearest - self.far_past)
        stop = min(x.key.shape[2] - x.query_offset, -nearest - self.far_future)
        return first, max(stop - first, 0) + 1

    def _by_distance(self, table: torch.Tensor, scratch: Scratch, name: str) -> torch.Tensor:
        out = scratch(name, len(table), len(self.slots), table.shape[2])
        return torch.index_select(table, 1, self.slots, out=out)

    def from_distance(self, distance: int) -> slice:
        """Returns the rows of the tables by distance, from this distance on."""
        return slice(distance - self.first_distance, None)

    def start_gradients(self, scratch: Scratch) -> None:
        """Zeroes the sums of a backward pass: by distance, and by row for the far segments."""
        if self.pos_key is not None:
            self.grad_key_by_distance = scratch("grad K by distance", *self.key_by_distance.shape).zero_()
            self.grad_pos_key = scratch("grad pos_key", *self.pos_key.shape).zero_()
        if self.pos_query is not None:
            self.grad_query_by_distance = scratch("grad Q by distance", *self.query_by_distance.shape).zero_()
            self.grad_pos_query = scratch("grad pos_query", *self.pos_query.shape).zero_()

    def add_gradients(self, grad_pos_key: torch.Tensor | None, grad_pos_query: torch.Tensor | None) -> None:
        """Adds equation 11 to the gradients (H, R', D) of the whole tables."""
        if grad_pos_key is not None:
            by_slot = self._sum_by_slot(self.grad_key_by_distance).add_(self.grad_pos_key)
            grad_pos_key[self.heads] += by_slot.div_(LOG2E)  # the sums hold C q instead of s q
        if grad_pos_query is not None:
            by_slot = self._sum_by_slot(self.grad_query_by_distance).add_(self.grad_pos_query)
            grad_pos_query[self.heads] += by_slot.mul_(self.scale)

    def _sum_by_slot(self, by_distance: torch.Tensor) -> torch.Tensor:
        """Sums (h, E, D) to (h, R', D), in order and without atomics: the distances of a slot are consecutive.

        Rows are summed in parts first, because rounding would add up over the hundreds of rows of a far slot.
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
