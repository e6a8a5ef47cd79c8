"""Small kernels that prepare a call: key spans of a padding mask, tables by distance, per-query vectors of backward."""

import triton.language as tl

from .tile import (
    kernel,
    load_rows,
    of_term,
    row_pointer,
    rows_are_keys,
    sequence_bounds,
    vector_offset,
    workspace_row,
)


@kernel(first_integer="mask_b")
def find_key_spans(mask, key_spans, mask_b, mask_j, key_length, BLOCK_N: tl.constexpr):
    """Writes the range of keys that a padding mask leaves per batch row: kernels read nothing outside it.

    key_spans[b] = first key, one past the last key, and the same range again if it has no holes, else an empty range
    """
    batch = tl.program_id(0)
    mask += batch.to(tl.int64) * mask_b
    low, high, count = key_length, key_length * 0, key_length * 0
    for start in range(0, key_length, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        seen = tl.load(mask + j.to(tl.int64) * mask_j, mask=j < key_length, other=0) != 0  # (BLOCK_N,)
        low = tl.minimum(low, tl.min(tl.where(seen, j, key_length)))
        high = tl.maximum(high, tl.max(tl.where(seen, j + 1, 0)))
        count += tl.sum(seen.to(tl.int32))
    low = tl.minimum(low, high)
    tl.store(key_spans + 4 * batch, low)
    tl.store(key_spans + 4 * batch + 1, high)
    tl.store(key_spans + 4 * batch + 2, low)
    tl.store(key_spans + 4 * batch + 3, tl.where(count == high - low, high, low))


@kernel(first_integer="pos_key_h")
def expand_tables(
    pos_key, pos_query, slots, key_table, query_table,
    pos_key_h, pos_key_l, pos_query_h, pos_query_l, first_distance, distances, reach, first_slot, rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, C2P: tl.constexpr, P2C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Writes position tables with one row per distance: out[t] = table[sigma(first_distance + t)], for near tiles."""
    keys = rows_are_keys(tl.program_id(2), C2P, P2C)
    table, out = of_term(keys, pos_query, pos_key), of_term(keys, query_table, key_table)
    table_h, table_l = of_term(keys, pos_query_h, pos_key_h), of_term(keys, pos_query_l, pos_key_l)
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


@kernel(first_integer="o_b")
def backward_delta(
    output, lse, grad_output, grad_lse, cu_seqlens, lse_log2, delta,
    o_b, o_h, o_l, do_b, do_h, do_l, lse_b, lse_h, dlse_b, dlse_h, dlse_l, delta_b, delta_h,
    query_length, key_length, blocks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, PACKED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Writes the base-2 log-sum-exp and Delta of equation 8.

    lse_log2_i = lse_i log2 e,  infinite where a query sees no key, so that its probabilities are zero
    Delta_i    = dO_i . O_i - dlse_i
    """
    batch, head = tl.program_id(0) // blocks, tl.program_id(1)
    m0 = tl.program_id(0) % blocks * BLOCK_M
    first, query_length, key_length = sequence_bounds(batch, cu_seqlens, query_length, key_length, PACKED)
    if m0 >= query_length:
        return
    offs_m = tl.arange(0, BLOCK_M)
    clamped_m = tl.minimum(offs_m, query_length - 1 - m0)
    output = row_pointer(output, batch, head, first + m0, o_b, o_h, o_l, UNIT)
    o = load_rows(output, clamped_m, o_l * UNIT, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    grad_output = row_pointer(grad_output, batch, head, first + m0, do_b, do_h, do_l, UNIT)
    do = load_rows(grad_output, clamped_m, do_l * UNIT, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    value = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # (BLOCK_M,)
    value -= tl.load(row_pointer(grad_lse, batch, head, first + m0, dlse_b, dlse_h, dlse_l, 1) + clamped_m * dlse_l)
    lse = tl.load(row_pointer(lse, batch, head, first + m0, lse_b, lse_h, 1, 1) + clamped_m)
    # Rows between the sequence's end and the next multiple of ALIGN have no probability either.
    sees = (lse != float("-inf")) & (offs_m < query_length - m0)
    vectors = vector_offset(batch, head, workspace_row(first, batch, PACKED), delta_b, delta_h) + m0 + offs_m
    tl.store(lse_log2 + vectors, tl.where(sees, lse * 1.4426950408889634, float("inf")))
    tl.store(delta + vectors, tl.where(sees, value, 0.0))
