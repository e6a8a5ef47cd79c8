"""Prepares what a call needs first: tables by distance, key spans of a mask, and per-query vectors of backward."""

import triton
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


@kernel(first_integer="pos_key_h")
def prepare(
    pos_key, pos_query, slots, mask, cu_seqlens, output, lse, grad_output, grad_lse,
    key_table, query_table, key_spans, lse_log2, delta,
    pos_key_h, pos_key_l, pos_query_h, pos_query_l, first_distance, distances, reach, first_slot, rows, mask_b, mask_j,
    o_b, o_h, o_l, do_b, do_h, do_l, lse_b, lse_h, dlse_b, dlse_h, dlse_l, delta_b, delta_h,
    query_length, key_length, distance_blocks, batches, blocks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, PACKED: tl.constexpr, SPANS: tl.constexpr,
    C2P: tl.constexpr, P2C: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Does three independent things in one launch: first programs for tables, then for key spans, then for backward."""
    program, head = tl.program_id(0), tl.program_id(1)
    if C2P or P2C:
        term = program // distance_blocks
        if term < C2P + P2C:
            keys = rows_are_keys(term, C2P, P2C)
            table, out = of_term(keys, pos_query, pos_key), of_term(keys, query_table, key_table)
            strides = of_term(keys, pos_query_h, pos_key_h), of_term(keys, pos_query_l, pos_key_l)
            slot_args = slots, reach, first_slot, rows
            t = program % distance_blocks * BLOCK_E + tl.arange(0, BLOCK_E)
            _expand_table(table, out, head, t, strides, slot_args, first_distance, distances, HEAD_DIM, BLOCK_D)
        program -= distance_blocks * (C2P + P2C)
    if SPANS:
        if (program >= 0) & (program < batches) & (head == 0):
            _find_key_spans(mask + program.to(tl.int64) * mask_b, key_spans + 4 * program, mask_j, key_length, BLOCK_N)
        program -= batches
    if BACKWARD:
        if program >= 0:
            batch, m0 = program // blocks, program % blocks * BLOCK_M
            first, length, _ = sequence_bounds(batch, cu_seqlens, query_length, key_length, PACKED)
            if m0 < length:
                row = first + m0
                o_rows = row_pointer(output, batch, head, row, o_b, o_h, o_l, UNIT)
                do_rows = row_pointer(grad_output, batch, head, row, do_b, do_h, do_l, UNIT)
                lse_rows = row_pointer(lse, batch, head, row, lse_b, lse_h, 1, 1)
                dlse_rows = row_pointer(grad_lse, batch, head, row, dlse_b, dlse_h, dlse_l, 1)
                strides = o_l * UNIT, do_l * UNIT, dlse_l
                vectors = vector_offset(batch, head, workspace_row(first, batch, PACKED), delta_b, delta_h) + m0
                _write_vectors(
                    lse_log2 + vectors, delta + vectors, o_rows, do_rows, lse_rows, dlse_rows, strides, length - m0,
                    HEAD_DIM, BLOCK_D, BLOCK_M,
                )  # fmt: skip


@triton.jit
def _expand_table(
    table, out, head, t, strides, slot_args, first_distance, distances, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Writes a position table with one row per distance: out[t] = table[sigma(first_distance + t)], for near tiles."""
    slots, reach, first_slot, rows = slot_args
    table_h, table_l = strides
    head = head.to(tl.int64)
    distance = tl.minimum(tl.maximum(t + first_distance, -reach), reach)
    # The clamp affects only distances that no pair of tokens has: the table holds every row that a pair reads.
    slot = tl.load(slots + distance + reach) - first_slot
    slot = tl.minimum(tl.maximum(slot, 0), rows - 1)
    d = tl.arange(0, BLOCK_D)
    inside = (t < distances)[:, None] & (d < HEAD_DIM)[None, :]
    source = table + head * table_h + slot.to(tl.int64)[:, None] * table_l + d[None, :]
    values = tl.load(source, mask=inside)  # (BLOCK_E, BLOCK_D)
    tl.store(out + (head * distances + t)[:, None] * HEAD_DIM + d[None, :], values, mask=inside)


@triton.jit
def _find_key_spans(mask, span, mask_j, key_length, BLOCK_N: tl.constexpr):
    """Writes the range of keys that a padding mask leaves to a batch row: kernels read nothing outside it.

    span = first key, one past the last key, and the same range again if it has no holes, else an empty range
    """
    low, high, count = key_length, key_length * 0, key_length * 0
    for start in range(0, key_length, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        seen = tl.load(mask + j.to(tl.int64) * mask_j, mask=j < key_length, other=0) != 0  # (BLOCK_N,)
        low = tl.minimum(low, tl.min(tl.where(seen, j, key_length)))
        high = tl.maximum(high, tl.max(tl.where(seen, j + 1, 0)))
        count += tl.sum(seen.to(tl.int32))
    low = tl.minimum(low, high)
    tl.store(span, low)
    tl.store(span + 1, high)
    tl.store(span + 2, low)
    tl.store(span + 3, tl.where(count == high - low, high, low))


@triton.jit
def _write_vectors(
    lse_log2, delta, output, grad_output, lse, grad_lse, strides, length,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Writes the base-2 log-sum-exp and Delta of equation 8.

    lse_log2_i = lse_i log2 e,  infinite where a query sees no key, so that its probabilities are zero
    Delta_i    = dO_i . O_i - dlse_i
    """
    o_l, do_l, dlse_l = strides
    offs_m = tl.arange(0, BLOCK_M)
    clamped_m = tl.minimum(offs_m, length - 1)
    o = load_rows(output, clamped_m, o_l, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    do = load_rows(grad_output, clamped_m, do_l, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    value = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # (BLOCK_M,)
    value -= tl.load(grad_lse + clamped_m * dlse_l)
    lse_rows = tl.load(lse + clamped_m)
    # Rows between the sequence's end and the next multiple of ALIGN have no probability either.
    sees = (lse_rows != float("-inf")) & (offs_m < length)
    tl.store(lse_log2 + offs_m, tl.where(sees, lse_rows * 1.4426950408889634, float("inf")))
    tl.store(delta + offs_m, tl.where(sees, value, 0.0))
