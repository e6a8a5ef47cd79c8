"""dQ of one query block (equations 8 to 10).

    near   dQ += dA K + sum_e dA^e K^e         dA as ``backward_key`` left it: nothing is made a second time
    far    dQ += dA K + t K^r_r                t_i = sum_j dA_ij, dA from Q, K, V and lse as in forward

dA of a near tile is copied to where its c2p scores were, queries along rows: ``backward_tables`` reads it there, and so
does the sum over distances, the program's own rows of it.
"""

import triton
import triton.language as tl

from .tile import (
    find_keys,
    find_rows,
    hide,
    kept,
    load_columns,
    load_rows,
    load_vector,
    matmul,
    matmul_add,
    near_span,
    start_of,
    store_rows,
)

INTEGERS = (
    "q_b", "q_h", "q_l", "k_b", "k_h", "k_l", "v_b", "v_h", "v_l", "do_b", "do_h", "do_l", "lse_b", "lse_h",
    "dq_b", "dq_h", "dq_l", "pos_key_h", "pos_key_l", "pos_query_h", "pos_query_l",
    "mask_b", "mask_h", "mask_i", "mask_j", "c2p_b", "c2p_h", "c2p_pitch", "p2c_b", "p2c_h", "p2c_pitch",
    "table_h", "first_distance", "distances",
    "query_length", "key_length", "offset", "far_past", "far_future", "past_slot", "future_slot",
    "blocks", "first_batch", "first_head", "heads", "threshold",
)  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def backward_query(
    query, key, value, pos_key, pos_query, key_table, c2p, p2c, mask, cu_seqlens, key_spans, seed,
    grad_output, lse, delta, grad_query,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, do_b, do_h, do_l, lse_b, lse_h, dq_b, dq_h, dq_l,
    pos_key_h, pos_key_l, pos_query_h, pos_query_l, mask_b, mask_h, mask_i, mask_j,
    c2p_b, c2p_h, c2p_pitch, p2c_b, p2c_h, p2c_pitch, table_h, first_distance, distances,
    query_length, key_length, offset, far_past, far_future, past_slot, future_slot,
    blocks, first_batch, first_head, heads, scale, softmax_scale, threshold, inverse_keep,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, SPANS: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    C2P: tl.constexpr, P2C: tl.constexpr, GRAIN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    part_batch, part_head = tl.program_id(0) // blocks, tl.program_id(1)
    batch, head = part_batch + first_batch, part_head + first_head
    m0 = tl.program_id(0) % blocks * ROWS
    first, query_length, key_length = find_rows(batch, cu_seqlens, query_length, key_length, PACKED)
    if m0 >= query_length:
        return
    low, high = find_keys(batch, key_spans, key_length, GRAIN, SPANS)
    near_start, near_stop = low, low
    if C2P or P2C:
        near_start, near_stop = near_span(m0 // GRAIN * GRAIN, offset, far_past, far_future, low, high, GRAIN)

    rows = m0 + tl.arange(0, ROWS)
    present = tl.minimum(rows, query_length - 1)
    q = load_rows(start_of(query, batch, head, first, q_b, q_h, q_l, UNIT), present, q_l * UNIT, SIZE, BLOCK_SIZE)
    grad_output = start_of(grad_output, batch, head, first, do_b, do_h, do_l, UNIT)
    do = load_rows(grad_output, present, do_l * UNIT, SIZE, BLOCK_SIZE)
    key = start_of(key, batch, head, first, k_b, k_h, k_l, UNIT)
    value = start_of(value, batch, head, first, v_b, v_h, v_l, UNIT)
    shift = tl.load(start_of(lse, batch, head, first, lse_b, lse_h, 1, 1) + present) * 1.4426950408889634
    shift = tl.where(shift == float("-inf"), float("inf"), shift)  # sees nothing: probabilities of zero
    delta = tl.load(start_of(delta, batch, head, first, lse_b, lse_h, 1, 1) + present)
    if MASK != "none":
        mask = start_of(mask, batch, head, first, mask_b, mask_h, mask_j, 1)
    batch_head = batch * heads + head

    dq = tl.zeros((ROWS, BLOCK_SIZE), tl.float32)
    for side in range(2):
        slot = tl.where(side == 0, past_slot, future_slot)
        start = tl.where(side == 0, low, near_stop)
        stop = tl.minimum(tl.where(side == 0, near_start, high), key_length)
        shifted, constant = q, -shift
        if P2C:
            row = load_vector(pos_query + head.to(tl.int64) * pos_query_h + slot * pos_query_l, BLOCK_SIZE, SIZE)
            shifted = (q.to(tl.float32) + row[None, :]).to(q.dtype)
        if C2P:
            row = load_vector(pos_key + head.to(tl.int64) * pos_key_h + slot * pos_key_l, BLOCK_SIZE, SIZE)
            constant += tl.sum(q.to(tl.float32) * row[None, :], 1) * scale
        row_sum = tl.zeros((ROWS,), tl.float32)
        whole = start
        if MASK == "none":
            whole = tl.maximum(stop // COLUMNS * COLUMNS, start)
            dq, row_sum = _far_keys(
                dq, row_sum, shifted, constant, do, delta, key, value, mask, seed, start, whole, k_l * UNIT, v_l * UNIT,
                mask_i, mask_j, batch_head, rows, present, key_length, scale, threshold, inverse_keep,
                SIZE, BLOCK_SIZE, PRECISION, MASK, DROPOUT, C2P, COLUMNS, False,
            )  # fmt: skip
        dq, row_sum = _far_keys(
            dq, row_sum, shifted, constant, do, delta, key, value, mask, seed, whole, stop, k_l * UNIT, v_l * UNIT,
            mask_i, mask_j, batch_head, rows, present, key_length, scale, threshold, inverse_keep,
            SIZE, BLOCK_SIZE, PRECISION, MASK, DROPOUT, C2P, COLUMNS, True,
        )  # fmt: skip
        if C2P:
            dq += row_sum[:, None] * row[None, :]

    if C2P or P2C:
        p2c = start_of(p2c, part_batch, part_head, first, p2c_b * p2c_pitch, p2c_h * p2c_pitch, p2c_pitch, 16)
    if C2P:
        c2p = start_of(c2p, part_batch, part_head, first, c2p_b * c2p_pitch, c2p_h * c2p_pitch, c2p_pitch, 16)
        c2p += rows.to(tl.int64)[:, None] * (c2p_pitch * 16) - near_start
    query_grains = tl.cdiv(query_length, GRAIN) * GRAIN
    for n0 in range(near_start, near_stop, COLUMNS):
        columns = n0 + tl.arange(0, COLUMNS)
        j = tl.minimum(columns, key_length - 1)
        grain = n0 // GRAIN * GRAIN
        query_start, _ = near_span(grain, -offset, -far_future, -far_past, 0, query_grains, GRAIN)
        da = tl.load(
            p2c + (j.to(tl.int64)[None, :] * (p2c_pitch * 16) - query_start) + rows[:, None],
            mask=(columns < key_length)[None, :],
            other=0.0,
        )
        dq = matmul_add(da, load_rows(key, j, k_l * UNIT, SIZE, BLOCK_SIZE), dq, PRECISION)
        if C2P:
            tl.store(c2p + columns[None, :], da, mask=(rows < query_length)[:, None])
    if C2P:
        tl.debug_barrier()  # what other threads of this program stored is read next
        key_table += head.to(tl.int64) * table_h
        lowest = near_start - (m0 + ROWS - 1) - offset
        for window in range(0, near_stop - near_start + ROWS - 1, COLUMNS):
            e = lowest + window + tl.arange(0, COLUMNS)
            column = e[None, :] + rows[:, None] + offset
            inside = (column >= near_start) & (column < near_stop) & (rows < query_length)[:, None]
            da = tl.load(c2p + column, mask=inside, other=0.0)
            t = tl.minimum(tl.maximum(-e - first_distance, 0), distances - 1)
            dq = matmul_add(da, load_rows(key_table, t, SIZE, SIZE, BLOCK_SIZE), dq, PRECISION)

    grad_query = start_of(grad_query, batch, head, first, dq_b, dq_h, dq_l, UNIT)
    store_rows(grad_query, rows, query_length, dq_l * UNIT, dq * softmax_scale, SIZE, BLOCK_SIZE)


@triton.jit
def _far_keys(
    dq, row_sum, shifted, constant, do, delta, key, value, mask, seed, start, stop, k_l, v_l,
    mask_i, mask_j, batch_head, rows, present, key_length, scale, threshold, inverse_keep,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    C2P: tl.constexpr, COLUMNS: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    for n0 in range(start, stop, COLUMNS):
        columns = n0 + tl.arange(0, COLUMNS)
        j = columns
        if HIDDEN:
            j = tl.minimum(columns, key_length - 1)
        k = load_rows(key, j, k_l, SIZE, BLOCK_SIZE)
        z = matmul(shifted, tl.trans(k), PRECISION) * scale + constant[:, None]
        if HIDDEN:
            z = hide(z, mask, present, columns, key_length, mask_i, mask_j, MASK)
        p = tl.exp2(z)
        dp = matmul(do, load_columns(value, j, v_l, SIZE, BLOCK_SIZE), PRECISION)
        if DROPOUT:
            dp = tl.where(kept(seed, batch_head, rows, n0, threshold, COLUMNS), dp * inverse_keep, 0.0)
        da = p * (dp - delta[:, None])
        if C2P:
            row_sum += tl.sum(da, 1)
        dq = matmul_add(da.to(k.dtype), k, dq, PRECISION)
    return dq, row_sum
