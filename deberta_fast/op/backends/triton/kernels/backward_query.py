"""dQ of one query block (equations 8 to 10).

    near   dQ += dA K + sum_e dA^e K^e         dA as ``backward_key`` left it: nothing is made a second time
    far    dQ += dA K + t K^r_r                t_i = sum_j dA_ij, dA from Q, K, V and lse as in forward

dA of a near tile is copied to where its c2p scores were, queries along rows: ``backward_tables`` reads it there, and
``backward_rows``, which makes the sum over distances.
"""

import triton
import triton.language as tl

from .tile import (
    band_of,
    find_keys,
    find_rows,
    find_solid_keys,
    hide,
    kept,
    load_rows,
    load_rows_below,
    load_table_row,
    matmul,
    matmul_add,
    near_span,
    place_of,
    room_of,
    skip_rows,
    solid_tiles,
    start_of,
    store_rows,
)

INTEGERS = (
    "q_b", "q_h", "q_l", "k_b", "k_h", "k_l", "v_b", "v_h", "v_l", "do_b", "do_h", "do_l", "delta_b", "delta_h",
    "dq_b", "dq_h", "dq_l", "pos_key_h", "pos_key_l", "pos_query_h", "pos_query_l",
    "mask_b", "mask_h", "mask_i", "mask_j", "c2p_b", "c2p_h", "c2p_pitch", "p2c_b", "p2c_h", "p2c_pitch",
    "query_length", "key_length", "offset", "far_past", "far_future", "past_slot", "future_slot",
    "blocks", "first_batch", "first_head", "heads", "threshold",
)  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def backward_query(
    query, key, value, pos_key, pos_query, c2p, p2c, mask, cu_seqlens, key_spans, seed,
    grad_output, shift, delta, partial, grad_query,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, do_b, do_h, do_l, delta_b, delta_h, dq_b, dq_h, dq_l,
    pos_key_h, pos_key_l, pos_query_h, pos_query_l, mask_b, mask_h, mask_i, mask_j,
    c2p_b, c2p_h, c2p_pitch, p2c_b, p2c_h, p2c_pitch,
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
    solid_low, solid_high = find_solid_keys(batch, key_spans, key_length, SPANS, MASK)
    near_start, near_stop = low, low
    if C2P or P2C:
        near_start, near_stop = near_span(m0 // GRAIN * GRAIN, offset, far_past, far_future, low, high, GRAIN)

    local = tl.arange(0, ROWS)
    present = tl.minimum(local, query_length - 1 - m0)
    query = start_of(query, batch, head, first + m0, q_b, q_h, q_l, UNIT)
    q = load_rows(query, present, q_l * UNIT, SIZE, BLOCK_SIZE)
    grad_output = start_of(grad_output, batch, head, first + m0, do_b, do_h, do_l, UNIT)
    do = load_rows(grad_output, present, do_l * UNIT, SIZE, BLOCK_SIZE)
    key = start_of(key, batch, head, first, k_b, k_h, k_l, UNIT)
    value = start_of(value, batch, head, first, v_b, v_h, v_l, UNIT)
    room = room_of(first, batch, PACKED)
    place = place_of(batch, head, room, delta_b, delta_h) + m0 + local
    shift, delta = tl.load(shift + place), tl.load(delta + place)
    if MASK != "none":
        mask = start_of(mask, batch, head, first, mask_b, mask_h, mask_j, 1)
    keys = key, value, k_l * UNIT, v_l * UNIT, key_length
    hiding = mask, m0 + present, mask_i, mask_j
    dropping = seed, batch * heads + head, m0 + local, threshold

    dq = tl.zeros((ROWS, BLOCK_SIZE), tl.float32)
    for side in range(2):
        slot = tl.where(side == 0, past_slot, future_slot)
        start = tl.where(side == 0, low, near_stop)
        stop = tl.minimum(tl.where(side == 0, near_start, high), key_length)
        shifted, constant = q, -shift
        if P2C:
            row = load_table_row(pos_query, head, slot, pos_query_h, pos_query_l, SIZE, BLOCK_SIZE)
            shifted = (q.to(tl.float32) + row[None, :]).to(q.dtype)
        if C2P:
            row = load_table_row(pos_key, head, slot, pos_key_h, pos_key_l, SIZE, BLOCK_SIZE)
            constant += tl.sum(q.to(tl.float32) * row[None, :], 1) * scale
        row_sum = tl.zeros((ROWS,), tl.float32)
        solid, hollow = solid_tiles(start, stop, solid_low, solid_high, COLUMNS)
        dq, row_sum = _far_keys(
            dq, row_sum, shifted, constant, scale, do, delta, keys, hiding, dropping, inverse_keep, solid, hollow, 0, 0,
            SIZE, BLOCK_SIZE, PRECISION, MASK, DROPOUT, C2P, COLUMNS, False,
        )  # fmt: skip
        dq, row_sum = _far_keys(
            dq, row_sum, shifted, constant, scale, do, delta, keys, hiding, dropping, inverse_keep,
            start, stop, solid, hollow, SIZE, BLOCK_SIZE, PRECISION, MASK, DROPOUT, C2P, COLUMNS, True,
        )  # fmt: skip
        if C2P:
            dq += row_sum[:, None] * row[None, :]

    if C2P or P2C:
        p2c = band_of(p2c, part_batch, part_head, room, p2c_b, p2c_h, p2c_pitch) + m0
        if C2P:
            c2p = band_of(c2p, part_batch, part_head, room + m0, c2p_b, c2p_h, c2p_pitch) - near_start
        c2p_pitch, p2c_pitch = c2p_pitch * 16, p2c_pitch * 16
        query_grains = tl.cdiv(query_length, GRAIN) * GRAIN
        columns = tl.arange(0, COLUMNS)
        for n0 in range(near_start, near_stop, COLUMNS):
            query_start, _ = near_span(n0 // GRAIN * GRAIN, -offset, -far_future, -far_past, 0, query_grains, GRAIN)
            band = skip_rows(p2c, n0, p2c_pitch) - query_start + (columns[:, None] * p2c_pitch + local[None, :])
            da = tl.trans(tl.load(band, mask=(columns < key_length - n0)[:, None], other=0.0))
            here = tl.minimum(columns, key_length - 1 - n0)
            k = load_rows(skip_rows(key, n0, k_l * UNIT), here, k_l * UNIT, SIZE, BLOCK_SIZE)
            dq = matmul_add(da, k, dq, PRECISION)
            if C2P:
                tl.store(c2p + n0 + (local[:, None] * c2p_pitch + columns[None, :]), da)
    if C2P:
        partial = start_of(partial, part_batch, part_head, room + m0, c2p_b * SIZE, c2p_h * SIZE, SIZE, 1)
        store_rows(partial, local, ROWS, SIZE, dq, SIZE, BLOCK_SIZE)
    else:
        grad_query = start_of(grad_query, batch, head, first + m0, dq_b, dq_h, dq_l, UNIT)
        store_rows(grad_query, local, query_length - m0, dq_l * UNIT, dq * softmax_scale, SIZE, BLOCK_SIZE)


@triton.jit
def _far_keys(
    dq, row_sum, shifted, constant, scale, do, delta, keys, hiding, dropping, inverse_keep, start, stop, solid, hollow,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    C2P: tl.constexpr, COLUMNS: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Over the keys start to stop; HIDDEN as in forward."""
    key, value, k_l, v_l, key_length = keys
    local = tl.arange(0, COLUMNS)
    for n0 in range(start, stop - (hollow - solid), COLUMNS):
        if HIDDEN:
            n0 = tl.where(n0 < solid, n0, n0 + (hollow - solid))
            k = load_rows_below(key_length - n0, skip_rows(key, n0, k_l), local, k_l, SIZE, BLOCK_SIZE)
            v = load_rows_below(key_length - n0, skip_rows(value, n0, v_l), local, v_l, SIZE, BLOCK_SIZE)
        else:
            k = load_rows(skip_rows(key, n0, k_l), local, k_l, SIZE, BLOCK_SIZE)
            v = load_rows(skip_rows(value, n0, v_l), local, v_l, SIZE, BLOCK_SIZE)
        z = matmul(shifted, tl.trans(k), PRECISION) * scale + constant[:, None]
        if HIDDEN:
            z = hide(z, hiding, n0 + local, key_length, MASK)
        p = tl.exp2(z)
        dp = matmul(do, tl.trans(v), PRECISION)
        if DROPOUT:
            dp = tl.where(kept(dropping, n0, COLUMNS), dp * inverse_keep, 0.0)
        da = p * (dp - delta[:, None])
        if C2P:
            row_sum += tl.sum(da, 1)
        dq = matmul_add(da.to(k.dtype), k, dq, PRECISION)
    return dq, row_sum
