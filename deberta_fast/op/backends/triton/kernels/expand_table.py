"""A position table with one row per distance: out[t] = table[sigma(first_distance + t)], for near tiles."""

import triton.language as tl

from .tile import kernel


@kernel(first_integer="table_h")
def expand_table(
    table, slots, out, table_h, table_l, first_distance, distances, reach, first_slot, rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    distance = tl.minimum(tl.maximum(t + first_distance, -reach), reach)
    # The clamp affects only distances that no pair of tokens has: the table holds every row that a pair reads.
    slot = tl.load(slots + distance + reach) - first_slot
    slot = tl.minimum(tl.maximum(slot, 0), rows - 1)
    d = tl.arange(0, BLOCK_D)
    inside = (t < distances)[:, None] & (d < HEAD_DIM)[None, :]
    source = table + head * table_h + slot.to(tl.int64)[:, None] * table_l + d[None, :]
    values = tl.load(source, mask=inside)  # (BLOCK_E, BLOCK_D)
    tl.store(out + (head * distances + t)[:, None] * HEAD_DIM + d[None, :], values, mask=inside)
