"""dQ of one query block (equations 8 to 10).

    near   dQ += dA K + sum_e dA^e K^e         dA as ``backward_key`` left it: it is not computed again
    far    dQ += dA K + t K^r_r                t_i = sum_j dA_ij, dA from Q, K, V and lse as in forward

dA of a near tile is copied over its c2p scores, with queries along rows. The kernels of ``bands`` read it there; of
these, ``backward_rows`` adds the sum over distances.
"""

import triton
import triton.language as tl

from .tile import (
    advance_rows,
    apply_mask,
    band_pointer,
    dropout_origin,
    full_tiles,
    keep_mask,
    kernel,
    load_rows,
    load_rows_below,
    load_table_row,
    near_span,
    row_pointer,
    sequence_bounds,
    store_rows,
    unmasked_span,
    vector_offset,
    visible_span,
    workspace_row,
)


@kernel(first_integer="q_b")
def backward_query(
    query, key, value, pos_key, pos_query, c2p, p2c, mask, cu_seqlens, key_spans, seed,
    grad_output, lse_log2, delta, partial_query, grad_query,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, do_b, do_h, do_l, delta_b, delta_h, dq_b, dq_h, dq_l,
    pos_key_h, pos_key_l, pos_query_h, pos_query_l, mask_b, mask_h, mask_i, mask_j,
    c2p_b, c2p_h, c2p_pitch, p2c_b, p2c_h, p2c_pitch,
    query_length, key_length, offset, far_past, far_future, past_slot, future_slot,
    blocks, first_batch, first_head, heads, scale, softmax_scale, threshold, inverse_keep,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, SPANS: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    ORIGIN: tl.constexpr, C2P: tl.constexpr, P2C: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    part_batch, part_head = tl.program_id(0) // blocks, tl.program_id(1)
    batch, head = part_batch + first_batch, part_head + first_head
    m0 = tl.program_id(0) % blocks * BLOCK_M
    first, query_length, key_length = sequence_bounds(batch, cu_seqlens, query_length, key_length, PACKED)
    if m0 >= query_length:
        return
    low, high = visible_span(batch, key_spans, key_length, ALIGN, SPANS)
    full_low, full_high = unmasked_span(batch, key_spans, key_length, SPANS, MASK)
    near_start, near_stop = low, low
    if C2P or P2C:
        near_start, near_stop = near_span(m0 // ALIGN * ALIGN, offset, far_past, far_future, low, high, ALIGN)

    offs_m = tl.arange(0, BLOCK_M)
    clamped_m = tl.minimum(offs_m, query_length - 1 - m0)
    query = row_pointer(query, batch, head, first + m0, q_b, q_h, q_l, UNIT)
    q = load_rows(query, clamped_m, q_l * UNIT, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    grad_output = row_pointer(grad_output, batch, head, first + m0, do_b, do_h, do_l, UNIT)
    do = load_rows(grad_output, clamped_m, do_l * UNIT, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    key = row_pointer(key, batch, head, first, k_b, k_h, k_l, UNIT)
    value = row_pointer(value, batch, head, first, v_b, v_h, v_l, UNIT)
    workspace = workspace_row(first, batch, PACKED)
    vectors = vector_offset(batch, head, workspace, delta_b, delta_h) + m0 + offs_m
    lse_log2, delta = tl.load(lse_log2 + vectors), tl.load(delta + vectors)  # (BLOCK_M,)
    if MASK != "none":
        mask = row_pointer(mask, batch, head, first, mask_b, mask_h, mask_j, 1)
    keys = key, value, k_l * UNIT, v_l * UNIT, key_length, full_low, full_high
    mask_args = mask, m0 + clamped_m, mask_i, mask_j
    first_row, first_group, batch_head = dropout_origin(seed, batch, head, heads, ORIGIN)
    dropout_args = seed, batch_head, first_row + m0 + offs_m, first_group, threshold

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for side in range(2):
        slot = tl.where(side == 0, past_slot, future_slot)
        start = tl.where(side == 0, low, near_stop)
        stop = tl.minimum(tl.where(side == 0, near_start, high), key_length)
        q_far, bias = q, -lse_log2
        if P2C:
            row = load_table_row(pos_query, head, slot, pos_query_h, pos_query_l, HEAD_DIM, BLOCK_D)  # (BLOCK_D,)
            q_far = (q.to(tl.float32) + row[None, :]).to(q.dtype)
        if C2P:
            row = load_table_row(pos_key, head, slot, pos_key_h, pos_key_l, HEAD_DIM, BLOCK_D)  # (BLOCK_D,)
            bias += tl.sum(q.to(tl.float32) * row[None, :], 1) * scale
        dq, da_sum = _process_far_tiles(
            dq, q_far, bias, scale, do, delta, keys, mask_args, dropout_args, inverse_keep, start, stop,
            HEAD_DIM, BLOCK_D, PRECISION, MASK, DROPOUT, C2P, BLOCK_N,
        )  # fmt: skip
        if C2P:
            dq += da_sum[:, None] * row[None, :]

    if C2P or P2C:
        p2c = band_pointer(p2c, part_batch, part_head, workspace, p2c_b, p2c_h, p2c_pitch) + m0
        if C2P:
            c2p = band_pointer(c2p, part_batch, part_head, workspace + m0, c2p_b, c2p_h, c2p_pitch) - near_start
        c2p_pitch, p2c_pitch = c2p_pitch * 16, p2c_pitch * 16
        queries = tl.cdiv(query_length, ALIGN) * ALIGN
        offs_n = tl.arange(0, BLOCK_N)
        for n0 in range(near_start, near_stop, BLOCK_N):
            query_start, _ = near_span(n0 // ALIGN * ALIGN, -offset, -far_future, -far_past, 0, queries, ALIGN)
            band = advance_rows(p2c, n0, p2c_pitch) - query_start + (offs_n[:, None] * p2c_pitch + offs_m[None, :])
            tile = tl.load(band, mask=(offs_n < key_length - n0)[:, None], other=0.0)  # (BLOCK_N, BLOCK_M)
            da = tl.trans(tile)
            clamped_n = tl.minimum(offs_n, key_length - 1 - n0)
            k = load_rows(advance_rows(key, n0, k_l * UNIT), clamped_n, k_l * UNIT, HEAD_DIM, BLOCK_D)
            dq = tl.dot(da, k, dq, input_precision=PRECISION)  # (BLOCK_M, BLOCK_D)
            if C2P:
                tl.store(c2p + n0 + (offs_m[:, None] * c2p_pitch + offs_n[None, :]), da)
    if C2P:
        partial = row_pointer(partial_query, part_batch, part_head, workspace + m0, c2p_b, c2p_h, 1, HEAD_DIM)
        store_rows(partial, offs_m, BLOCK_M, HEAD_DIM, dq, HEAD_DIM, BLOCK_D)
    else:
        grad_query = row_pointer(grad_query, batch, head, first + m0, dq_b, dq_h, dq_l, UNIT)
        store_rows(grad_query, offs_m, query_length - m0, dq_l * UNIT, dq * softmax_scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _process_far_tiles(
    dq, q_far, bias, scale, do, delta, keys, mask_args, dropout_args, inverse_keep, start, stop,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    SUM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the keys start to stop to dq (BLOCK_M, BLOCK_D), full tiles first as in forward.

    With SUM also returns the sums of dA per query, (BLOCK_M,).
    """
    key, value, k_l, v_l, key_length, full_low, full_high = keys
    full_start, full_stop = full_tiles(start, stop, full_low, full_high, BLOCK_N)
    offs_n = tl.arange(0, BLOCK_N)
    da_sum = tl.zeros_like(bias)
    for MASKED in tl.static_range(2):
        first, last = full_start, full_stop
        if MASKED:
            first, last = start, stop - (full_stop - full_start)
        for n0 in range(first, last, BLOCK_N):
            if MASKED:
                n0 = tl.where(n0 < full_start, n0, n0 + (full_stop - full_start))
                k = load_rows_below(key_length - n0, advance_rows(key, n0, k_l), offs_n, k_l, HEAD_DIM, BLOCK_D)
                v = load_rows_below(key_length - n0, advance_rows(value, n0, v_l), offs_n, v_l, HEAD_DIM, BLOCK_D)
            else:
                k = load_rows(advance_rows(key, n0, k_l), offs_n, k_l, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
                v = load_rows(advance_rows(value, n0, v_l), offs_n, v_l, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
            z = tl.dot(q_far, tl.trans(k), input_precision=PRECISION) * scale + bias[:, None]  # (BLOCK_M, BLOCK_N)
            if MASKED:
                z = apply_mask(z, mask_args, n0 + offs_n, key_length, MASK)
            p = tl.exp2(z)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
            if DROPOUT:
                dp = tl.where(keep_mask(dropout_args, n0, BLOCK_N), dp * inverse_keep, 0.0)
            da = p * (dp - delta[:, None])
            if SUM:
                da_sum += tl.sum(da, 1)
            dq = tl.dot(da.to(k.dtype), k, dq, input_precision=PRECISION)  # (BLOCK_M, BLOCK_D)
    return dq, da_sum
