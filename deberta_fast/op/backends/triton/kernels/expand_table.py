"""A position table with one row a distance: out[t] = table[sigma(first_distance + t)], for near tiles."""

import triton
import triton.language as tl

INTEGERS = ("table_h", "table_l", "first_distance", "distances", "reach", "first_slot", "rows")


@triton.jit(do_not_specialize=INTEGERS)
def expand_table(
    table, slots, out, table_h, table_l, first_distance, distances, reach, first_slot, rows,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    distance = tl.minimum(tl.maximum(t + first_distance, -reach), reach)
    # The clamp serves rows alone that no pair of the sequences reads: those that pairs read were given.
    slot = tl.load(slots + distance + reach) - first_slot
    slot = tl.minimum(tl.maximum(slot, 0), rows - 1)
    d = tl.arange(0, BLOCK_SIZE)
    inside = (t < distances)[:, None] & (d < SIZE)[None, :]
    values = tl.load(table + head * table_h + slot.to(tl.int64)[:, None] * table_l + d[None, :], mask=inside)
    tl.store(out + (head * distances + t)[:, None] * SIZE + d[None, :], values, mask=inside)
