"""Forward pass of one query block: online softmax in base 2 over near keys, then far keys on both sides.

near   Z = C (q.k + c2p + p2c)              adds two tiles of the bands that ``band_scores`` wrote    (equation 6)
far    Z = C (q + Q^r_r).k + C q.K^r_r      plain flash attention with a shifted query                (equation 7)

The second term of a far score is one number per row, ``bias``; it joins the offset of the exponent.
"""

import triton
import triton.language as tl

from .tile import (
    add_band_tile,
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
    scaled_identity,
    sequence_bounds,
    store_rows,
    unmasked_span,
    visible_span,
    workspace_row,
)


@kernel(first_integer="q_b")
def forward(
    query, key, value, pos_key, pos_query, c2p, p2c, mask, cu_seqlens, key_spans, seed, output, lse,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, o_b, o_h, o_l, lse_b, lse_h,
    pos_key_h, pos_key_l, pos_query_h, pos_query_l, mask_b, mask_h, mask_i, mask_j,
    c2p_b, c2p_h, c2p_pitch, p2c_b, p2c_h, p2c_pitch,
    query_length, key_length, offset, far_past, far_future, past_slot, future_slot,
    blocks, first_batch, first_head, heads, scale, inverse_band_scale, threshold, inverse_keep,
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
    key = row_pointer(key, batch, head, first, k_b, k_h, k_l, UNIT)
    value = row_pointer(value, batch, head, first, v_b, v_h, v_l, UNIT)
    if MASK != "none":
        mask = row_pointer(mask, batch, head, first, mask_b, mask_h, mask_j, 1)
    workspace, queries = workspace_row(first, batch, PACKED), tl.cdiv(query_length, ALIGN) * ALIGN
    if C2P:
        c2p = band_pointer(c2p, part_batch, part_head, workspace + m0, c2p_b, c2p_h, c2p_pitch) - near_start
    if P2C:
        p2c = band_pointer(p2c, part_batch, part_head, workspace, p2c_b, p2c_h, p2c_pitch) + m0
    keys = key, value, k_l * UNIT, v_l * UNIT, key_length, full_low, full_high
    bands = c2p, p2c, c2p_pitch * 16, p2c_pitch * 16, inverse_band_scale
    geometry = offset, far_past, far_future, queries
    mask_args = mask, m0 + clamped_m, mask_i, mask_j
    first_row, first_group, batch_head = dropout_origin(seed, batch, head, heads, ORIGIN)
    dropout_args = seed, batch_head, first_row + m0 + offs_m, first_group, threshold

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    bias = tl.zeros((BLOCK_M,), tl.float32)
    if C2P or P2C:
        # Each segment loads its queries again: held throughout, they would leave too few registers to the loops.
        q = load_rows(query, clamped_m, q_l * UNIT, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
        stop = tl.minimum(near_stop, key_length)
        acc, row_sum, row_max = _online_softmax(
            acc, row_sum, row_max, q, bias, scale, keys, bands, geometry, mask_args, dropout_args, near_start, stop,
            HEAD_DIM, BLOCK_D, PRECISION, MASK, DROPOUT, C2P, P2C, ALIGN, BLOCK_N,
        )  # fmt: skip
    for side in range(2):
        slot = tl.where(side == 0, past_slot, future_slot)
        start = tl.where(side == 0, low, near_stop)
        stop = tl.minimum(tl.where(side == 0, near_start, high), key_length)
        q = load_rows(query, clamped_m, q_l * UNIT, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
        q_far = q
        if P2C:
            row = load_table_row(pos_query, head, slot, pos_query_h, pos_query_l, HEAD_DIM, BLOCK_D)  # (BLOCK_D,)
            q_far = (q.to(tl.float32) + row[None, :]).to(q.dtype)
        if C2P:
            row = load_table_row(pos_key, head, slot, pos_key_h, pos_key_l, HEAD_DIM, BLOCK_D)  # (BLOCK_D,)
            bias = tl.sum(q.to(tl.float32) * row[None, :], 1) * scale  # (BLOCK_M,)
        acc, row_sum, row_max = _online_softmax(
            acc, row_sum, row_max, q_far, bias, scale, keys, bands, geometry, mask_args, dropout_args, start, stop,
            HEAD_DIM, BLOCK_D, PRECISION, MASK, DROPOUT, False, False, ALIGN, BLOCK_N,
        )  # fmt: skip

    if DROPOUT:
        acc *= inverse_keep
    acc /= tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    output = row_pointer(output, batch, head, first + m0, o_b, o_h, o_l, UNIT)
    store_rows(output, offs_m, query_length - m0, o_l * UNIT, acc, HEAD_DIM, BLOCK_D)
    lse = row_pointer(lse, batch, head, first + m0, lse_b, lse_h, 1, 1)
    tl.store(lse + offs_m, (row_max + tl.log2(row_sum)) * 0.6931471805599453, mask=offs_m < query_length - m0)


@triton.jit
def _online_softmax(
    acc, row_sum, row_max, q, bias, scale, keys, bands, geometry, mask_args, dropout_args, start, stop,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    C2P: tl.constexpr, P2C: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the keys start to stop to acc (BLOCK_M, BLOCK_D), row_sum and row_max (BLOCK_M,).

    C2P and P2C say which position terms are read from bands; far keys have neither. Full tiles come first, without
    bounds checks or mask; then the tiles around them.
    """
    key, value, k_l, v_l, key_length, full_low, full_high = keys
    c2p, p2c, c2p_pitch, p2c_pitch, inverse_band_scale = bands
    offset, far_past, far_future, queries = geometry
    full_start, full_stop = full_tiles(start, stop, full_low, full_high, BLOCK_N)
    offs_n, offs_m = tl.arange(0, BLOCK_N), tl.arange(0, q.shape[0])
    eye = scaled_identity(q.shape[0], inverse_band_scale, q.dtype)
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
            z = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
            if C2P:
                tile = tl.load(c2p + n0 + (offs_m[:, None] * c2p_pitch + offs_n[None, :]))  # (BLOCK_M, BLOCK_N)
                z = add_band_tile(z, tile, eye, inverse_band_scale, PRECISION)
            if P2C:
                query_start, _ = near_span(n0 // ALIGN * ALIGN, -offset, -far_future, -far_past, 0, queries, ALIGN)
                band = advance_rows(p2c, n0, p2c_pitch) - query_start
                tile = tl.load(band + (offs_n[:, None] * p2c_pitch + offs_m[None, :]))  # (BLOCK_N, BLOCK_M)
                z = add_band_tile(z, tl.trans(tile), eye, inverse_band_scale, PRECISION)
            if MASKED:
                z = apply_mask(z, mask_args, n0 + offs_n, key_length, MASK)
            new_max = tl.maximum(row_max, tl.max(z, 1) * scale + bias)  # (BLOCK_M,)
            shift = new_max
            if MASKED:
                shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # rows that have seen no key yet
            p = tl.exp2(z * scale - (shift - bias)[:, None])  # (BLOCK_M, BLOCK_N)
            alpha = tl.exp2(row_max - shift)
            row_sum = row_sum * alpha + tl.sum(p, 1)
            if DROPOUT:
                p = tl.where(keep_mask(dropout_args, n0, BLOCK_N), p, 0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)  # (BLOCK_M, BLOCK_D)
            row_max = new_max
    return acc, row_sum, row_max
