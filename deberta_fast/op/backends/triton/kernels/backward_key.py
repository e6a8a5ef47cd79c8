"""dK and dV of one key block, and its share of the other gradients from near tiles (equations 8 to 10).

Scores are held transposed, with keys along rows. Queries come in three segments as in forward. A far segment shifts the
keys where forward shifts the query, which leaves one constant per key:

    far    Z = C q.(k + K^r_r) + C k.Q^r_r      dK += dA^T q + t Q^r_r,  t_j = sum_i dA_ij
                                                dK^r_r += sum_j (dA^T q)_j,  dQ^r_r += sum_j t_j k_j
    near   Z = C (q.k + c2p + p2c)              dK += dA^T q + sum_e dA^e Q^e

dA of a near tile overwrites its p2c scores, which no program reads later. ``backward_query`` and the kernels of
``bands`` read it there; of these, ``backward_rows`` adds the last sum.
"""

import triton
import triton.language as tl

from .tile import (
    add_band_tile,
    advance_rows,
    band_pointer,
    dropout_origin,
    keep_mask,
    kernel,
    load_rows,
    load_table_row,
    near_span,
    row_pointer,
    scaled_identity,
    sequence_bounds,
    store_rows,
    vector_offset,
    visible_span,
    workspace_row,
)


@kernel(first_integer="q_b")
def backward_key(
    query, key, value, pos_key, pos_query, c2p, p2c, mask, cu_seqlens, key_spans, seed,
    grad_output, lse_log2, delta, partial_key, grad_key, grad_value, far_pos_key, far_pos_query,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, do_b, do_h, do_l, delta_b, delta_h, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    pos_key_h, pos_key_l, pos_query_h, pos_query_l, mask_b, mask_h, mask_i, mask_j,
    c2p_b, c2p_h, c2p_pitch, p2c_b, p2c_h, p2c_pitch, far_count,
    query_length, key_length, offset, far_past, far_future, past_slot, future_slot,
    blocks, first_batch, first_head, heads, scale, softmax_scale, inverse_band_scale, threshold, inverse_keep,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, SPANS: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    ORIGIN: tl.constexpr, C2P: tl.constexpr, P2C: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    part_batch, part_head = tl.program_id(0) // blocks, tl.program_id(1)
    batch, head = part_batch + first_batch, part_head + first_head
    n0 = tl.program_id(0) % blocks * BLOCK_N
    first, query_length, key_length = sequence_bounds(batch, cu_seqlens, query_length, key_length, PACKED)
    if n0 >= key_length:
        return
    low, high = visible_span(batch, key_spans, key_length, ALIGN, SPANS)
    queries = tl.cdiv(query_length, ALIGN) * ALIGN
    # A block that the padding mask hides entirely meets no query.
    query_stop = tl.where((n0 >= low) & (n0 < high), query_length, 0)
    near_start, near_stop = query_stop * 0, query_stop * 0
    if C2P or P2C:
        near_start, near_stop = near_span(n0 // ALIGN * ALIGN, -offset, -far_future, -far_past, 0, queries, ALIGN)
    near_stop = tl.multiple_of(tl.where(query_stop > 0, near_stop, 0), ALIGN)
    near_start = tl.multiple_of(tl.minimum(near_start, near_stop), ALIGN)

    offs_n = tl.arange(0, BLOCK_N)
    clamped_n = tl.minimum(offs_n, key_length - 1 - n0)
    key = row_pointer(key, batch, head, first + n0, k_b, k_h, k_l, UNIT)
    value = row_pointer(value, batch, head, first + n0, v_b, v_h, v_l, UNIT)
    query = row_pointer(query, batch, head, first, q_b, q_h, q_l, UNIT)
    grad_output = row_pointer(grad_output, batch, head, first, do_b, do_h, do_l, UNIT)
    workspace = workspace_row(first, batch, PACKED)
    vectors = vector_offset(batch, head, workspace, delta_b, delta_h)
    visible = offs_n < key_length - n0
    if MASK != "none":
        mask = row_pointer(mask, batch, head, first + n0, mask_b, mask_h, mask_j, 1)
    if MASK == "keys":
        visible = tl.load(mask + offs_n * mask_j, mask=visible, other=0) != 0
    mask_bias = tl.where(visible, 0.0, float("-inf"))  # (BLOCK_N,)
    if C2P:
        c2p = band_pointer(c2p, part_batch, part_head, workspace, c2p_b, c2p_h, c2p_pitch) + n0
    if C2P or P2C:
        p2c = band_pointer(p2c, part_batch, part_head, workspace + n0, p2c_b, p2c_h, p2c_pitch) - near_start
    query_args = query, grad_output, lse_log2 + vectors, delta + vectors, q_l * UNIT, do_l * UNIT, query_length
    bands = c2p, p2c, c2p_pitch * 16, p2c_pitch * 16, inverse_band_scale
    geometry = offset, far_past, far_future, low, high
    mask_args = mask, clamped_n, mask_i, mask_j
    first_row, first_group, batch_head = dropout_origin(seed, batch, head, heads, ORIGIN)
    dropout_args = seed, batch_head, first_row, first_group, n0, threshold, inverse_keep

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dk_before = tl.zeros((BLOCK_D,), tl.float32)
    d = tl.arange(0, BLOCK_D)
    # One record of far sums per key block. A packed sequence gets as many as its blocks can need.
    record = batch * blocks + n0 // BLOCK_N
    if PACKED:
        record = (first + n0) // BLOCK_N + batch
    for side in range(2):
        # Queries before the near ones see these keys in the far future.
        slot = tl.where(side == 0, future_slot, past_slot)
        start = tl.where(side == 0, 0, near_stop)
        stop = tl.where(side == 0, tl.minimum(near_start, query_stop), query_stop)
        # Each segment loads k and v again: held throughout, they would leave too few registers to the loops.
        k = load_rows(key, clamped_n, k_l * UNIT, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
        v = load_rows(value, clamped_n, v_l * UNIT, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
        k_far, bias = k, mask_bias
        if C2P:
            row = load_table_row(pos_key, head, slot, pos_key_h, pos_key_l, HEAD_DIM, BLOCK_D)  # (BLOCK_D,)
            k_far = (k.to(tl.float32) + row[None, :]).to(k.dtype)
        if P2C:
            row = load_table_row(pos_query, head, slot, pos_query_h, pos_query_l, HEAD_DIM, BLOCK_D)  # (BLOCK_D,)
            bias += tl.sum(k.to(tl.float32) * row[None, :], 1) * scale
        dk, dv, da_sum = _process_tiles(
            dk, dv, k_far, v, bias, scale, query_args, bands, geometry, mask_args, dropout_args, start, stop,
            HEAD_DIM, BLOCK_D, PRECISION, MASK, DROPOUT, False, False, P2C, ALIGN, BLOCK_M,
        )  # fmt: skip
        sums = ((head.to(tl.int64) * 2 + side) * far_count + record) * HEAD_DIM + d
        if C2P:
            tl.store(far_pos_key + sums, tl.sum(dk, 0) - dk_before, mask=d < HEAD_DIM)
        if P2C:
            k = load_rows(key, clamped_n, k_l * UNIT, HEAD_DIM, BLOCK_D)
            row = load_table_row(pos_query, head, slot, pos_query_h, pos_query_l, HEAD_DIM, BLOCK_D)
            tl.store(far_pos_query + sums, tl.sum(k.to(tl.float32) * da_sum[:, None], 0), mask=d < HEAD_DIM)
            dk += da_sum[:, None] * row[None, :]
        dk_before = tl.sum(dk, 0)

    if C2P or P2C:
        k = load_rows(key, clamped_n, k_l * UNIT, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
        v = load_rows(value, clamped_n, v_l * UNIT, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
        dk, dv, da_sum = _process_tiles(
            dk, dv, k, v, mask_bias, scale, query_args, bands, geometry, mask_args, dropout_args, near_start, near_stop,
            HEAD_DIM, BLOCK_D, PRECISION, MASK, DROPOUT, C2P, P2C, False, ALIGN, BLOCK_M,
        )  # fmt: skip
    if P2C:
        partial = row_pointer(partial_key, part_batch, part_head, workspace + n0, p2c_b, p2c_h, 1, HEAD_DIM)
        store_rows(partial, offs_n, BLOCK_N, HEAD_DIM, dk, HEAD_DIM, BLOCK_D)
    else:
        grad_key = row_pointer(grad_key, batch, head, first + n0, dk_b, dk_h, dk_l, UNIT)
        store_rows(grad_key, offs_n, key_length - n0, dk_l * UNIT, dk * softmax_scale, HEAD_DIM, BLOCK_D)
    grad_value = row_pointer(grad_value, batch, head, first + n0, dv_b, dv_h, dv_l, UNIT)
    store_rows(grad_value, offs_n, key_length - n0, dv_l * UNIT, dv, HEAD_DIM, BLOCK_D)


@triton.jit
def _process_tiles(
    dk, dv, k, v, bias, scale, query_args, bands, geometry, mask_args, dropout_args, start, stop,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    C2P: tl.constexpr, P2C: tl.constexpr, SUM: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Adds the queries start to stop to dk and dv (BLOCK_N, BLOCK_D), by equation 8.

    C2P and P2C say which position terms are read from bands; far queries have neither. With SUM also returns the sums
    of dA per key, (BLOCK_N,).
    """
    query, grad_output, lse_log2, delta, q_l, do_l, query_length = query_args
    c2p, p2c, c2p_pitch, p2c_pitch, inverse_band_scale = bands
    offset, far_past, far_future, low, high = geometry
    seed, batch_head, first_row, first_group, n0, threshold, inverse_keep = dropout_args
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, k.shape[0])
    da_sum = tl.zeros_like(bias)
    eye = scaled_identity(k.shape[0], inverse_band_scale, k.dtype)
    for m0 in range(start, stop, BLOCK_M):
        clamped_m = tl.minimum(offs_m, query_length - 1 - m0)
        q = load_rows(advance_rows(query, m0, q_l), clamped_m, q_l, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
        z = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        if C2P:
            key_start, _ = near_span(m0 // ALIGN * ALIGN, offset, far_past, far_future, low, high, ALIGN)
            band = advance_rows(c2p, m0, c2p_pitch) - key_start
            tile = tl.load(band + (offs_m[:, None] * c2p_pitch + offs_n[None, :]))  # (BLOCK_M, BLOCK_N)
            z = add_band_tile(z, tl.trans(tile), eye, inverse_band_scale, PRECISION)
        if P2C:
            tile = tl.load(p2c + m0 + (offs_n[:, None] * p2c_pitch + offs_m[None, :]))  # (BLOCK_N, BLOCK_M)
            z = add_band_tile(z, tile, eye, inverse_band_scale, PRECISION)
        z = z * scale + bias[:, None] - tl.load(lse_log2 + m0 + offs_m)[None, :]
        if MASK == "pairs":
            mask, rows, mask_i, mask_j = mask_args
            pairs = advance_rows(mask, m0, mask_i) + (clamped_m[None, :] * mask_i + rows[:, None] * mask_j)
            z = tl.where(tl.load(pairs) != 0, z, float("-inf"))
        p = tl.exp2(z)  # (BLOCK_N, BLOCK_M)
        do = load_rows(advance_rows(grad_output, m0, do_l), clamped_m, do_l, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        dropped = p
        if DROPOUT:
            keep_args = seed, batch_head, first_row + m0 + offs_m, first_group, threshold
            keep = tl.trans(keep_mask(keep_args, n0, k.shape[0]))
            dropped = tl.where(keep, p * inverse_keep, 0.0)
            dp = tl.where(keep, dp * inverse_keep, 0.0)
        dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)  # (BLOCK_N, BLOCK_D)
        da = p * (dp - tl.load(delta + m0 + offs_m)[None, :])  # (BLOCK_N, BLOCK_M)
        if SUM:
            da_sum += tl.sum(da, 1)
        rounded = da.to(q.dtype)
        dk = tl.dot(rounded, q, dk, input_precision=PRECISION)  # (BLOCK_N, BLOCK_D)
        if C2P or P2C:
            tl.store(p2c + m0 + (offs_n[:, None] * p2c_pitch + offs_m[None, :]), rounded)
    return dk, dv, da_sum
