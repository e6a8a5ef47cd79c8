"""Forward of one query block (equations 2, 3, 6, 7): online softmax in base 2 over near keys, then both far sides.

near   Z = C (q.k + c2p + p2c)              two tiles of bands that ``band_scores`` wrote
far    Z = C (q + Q^r_r).k + C q.K^r_r      plain flash attention with a shifted query; the constant of a row joins
                                            the exponent's offset
"""

import triton
import triton.language as tl

from .tile import (
    add_tile,
    band_of,
    find_keys,
    find_rows,
    find_solid_keys,
    hide,
    identity,
    kept,
    load_rows,
    load_rows_below,
    load_table_row,
    matmul,
    matmul_add,
    near_span,
    room_of,
    skip_rows,
    solid_tiles,
    start_of,
    store_rows,
)

INTEGERS = (
    "q_b", "q_h", "q_l", "k_b", "k_h", "k_l", "v_b", "v_h", "v_l", "o_b", "o_h", "o_l", "lse_b", "lse_h",
    "pos_key_h", "pos_key_l", "pos_query_h", "pos_query_l", "mask_b", "mask_h", "mask_i", "mask_j",
    "c2p_b", "c2p_h", "c2p_pitch", "p2c_b", "p2c_h", "p2c_pitch",
    "query_length", "key_length", "offset", "far_past", "far_future", "past_slot", "future_slot",
    "blocks", "first_batch", "first_head", "heads", "threshold",
)  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def forward(
    query, key, value, pos_key, pos_query, c2p, p2c, mask, cu_seqlens, key_spans, seed, output, lse,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, o_b, o_h, o_l, lse_b, lse_h,
    pos_key_h, pos_key_l, pos_query_h, pos_query_l, mask_b, mask_h, mask_i, mask_j,
    c2p_b, c2p_h, c2p_pitch, p2c_b, p2c_h, p2c_pitch,
    query_length, key_length, offset, far_past, far_future, past_slot, future_slot,
    blocks, first_batch, first_head, heads, scale, inverse_band_scale, threshold, inverse_keep,
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
    key = start_of(key, batch, head, first, k_b, k_h, k_l, UNIT)
    value = start_of(value, batch, head, first, v_b, v_h, v_l, UNIT)
    if MASK != "none":
        mask = start_of(mask, batch, head, first, mask_b, mask_h, mask_j, 1)
    room, query_grains = room_of(first, batch, PACKED), tl.cdiv(query_length, GRAIN) * GRAIN
    if C2P:
        c2p = band_of(c2p, part_batch, part_head, room + m0, c2p_b, c2p_h, c2p_pitch) - near_start
    if P2C:
        p2c = band_of(p2c, part_batch, part_head, room, p2c_b, p2c_h, p2c_pitch) + m0
    keys = key, value, k_l * UNIT, v_l * UNIT, key_length
    bands = c2p, p2c, c2p_pitch * 16, p2c_pitch * 16, inverse_band_scale
    table = offset, far_past, far_future, query_grains
    hiding = mask, m0 + present, mask_i, mask_j
    dropping = seed, batch * heads + head, m0 + local, threshold

    acc = tl.zeros((ROWS, BLOCK_SIZE), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    constant = tl.zeros((ROWS,), tl.float32)
    if C2P or P2C:
        # Loaded anew for each segment: kept, it would not leave enough registers to the loops.
        q = load_rows(query, present, q_l * UNIT, SIZE, BLOCK_SIZE)
        stop = tl.minimum(near_stop, key_length)
        solid, hollow = solid_tiles(near_start, stop, solid_low, solid_high, COLUMNS)
        acc, total, peak = _attend(
            acc, total, peak, q, constant, scale, keys, bands, table, hiding, dropping, solid, hollow, 0, 0,
            SIZE, BLOCK_SIZE, PRECISION, MASK, DROPOUT, C2P, P2C, GRAIN, COLUMNS, False,
        )  # fmt: skip
        acc, total, peak = _attend(
            acc, total, peak, q, constant, scale, keys, bands, table, hiding, dropping, near_start, stop, solid, hollow,
            SIZE, BLOCK_SIZE, PRECISION, MASK, DROPOUT, C2P, P2C, GRAIN, COLUMNS, True,
        )  # fmt: skip
    for side in range(2):
        slot = tl.where(side == 0, past_slot, future_slot)
        start = tl.where(side == 0, low, near_stop)
        stop = tl.minimum(tl.where(side == 0, near_start, high), key_length)
        q = load_rows(query, present, q_l * UNIT, SIZE, BLOCK_SIZE)
        shifted = q
        if P2C:
            row = load_table_row(pos_query, head, slot, pos_query_h, pos_query_l, SIZE, BLOCK_SIZE)
            shifted = (q.to(tl.float32) + row[None, :]).to(q.dtype)
        if C2P:
            row = load_table_row(pos_key, head, slot, pos_key_h, pos_key_l, SIZE, BLOCK_SIZE)
            constant = tl.sum(q.to(tl.float32) * row[None, :], 1) * scale
        solid, hollow = solid_tiles(start, stop, solid_low, solid_high, COLUMNS)
        acc, total, peak = _attend(
            acc, total, peak, shifted, constant, scale, keys, bands, table, hiding, dropping, solid, hollow, 0, 0,
            SIZE, BLOCK_SIZE, PRECISION, MASK, DROPOUT, False, False, GRAIN, COLUMNS, False,
        )  # fmt: skip
        acc, total, peak = _attend(
            acc, total, peak, shifted, constant, scale, keys, bands, table, hiding, dropping,
            start, stop, solid, hollow, SIZE, BLOCK_SIZE, PRECISION, MASK, DROPOUT, False, False, GRAIN, COLUMNS, True,
        )  # fmt: skip

    if DROPOUT:
        acc *= inverse_keep
    acc /= tl.where(total == 0, 1.0, total)[:, None]
    output = start_of(output, batch, head, first + m0, o_b, o_h, o_l, UNIT)
    store_rows(output, local, query_length - m0, o_l * UNIT, acc, SIZE, BLOCK_SIZE)
    lse = start_of(lse, batch, head, first + m0, lse_b, lse_h, 1, 1)
    tl.store(lse + local, (peak + tl.log2(total)) * 0.6931471805599453, mask=local < query_length - m0)


@triton.jit
def _attend(
    acc, total, peak, q, constant, scale, keys, bands, table, hiding, dropping, start, stop, solid, hollow,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    C2P: tl.constexpr, P2C: tl.constexpr, GRAIN: tl.constexpr, COLUMNS: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys start to stop, near ones with C2P or P2C, far ones without.

    HIDDEN: save those from solid to hollow, which were done without asking whether a key is there and may be seen.
    """
    key, value, k_l, v_l, key_length = keys
    c2p, p2c, c2p_pitch, p2c_pitch, inverse_band_scale = bands
    offset, far_past, far_future, query_grains = table
    local, local_rows = tl.arange(0, COLUMNS), tl.arange(0, q.shape[0])
    eye = identity(q.shape[0], inverse_band_scale, q.dtype)
    for n0 in range(start, stop - (hollow - solid), COLUMNS):
        if HIDDEN:
            n0 = tl.where(n0 < solid, n0, n0 + (hollow - solid))
            k = load_rows_below(key_length - n0, skip_rows(key, n0, k_l), local, k_l, SIZE, BLOCK_SIZE)
            v = load_rows_below(key_length - n0, skip_rows(value, n0, v_l), local, v_l, SIZE, BLOCK_SIZE)
        else:
            k = load_rows(skip_rows(key, n0, k_l), local, k_l, SIZE, BLOCK_SIZE)
            v = load_rows(skip_rows(value, n0, v_l), local, v_l, SIZE, BLOCK_SIZE)
        z = matmul(q, tl.trans(k), PRECISION)
        if C2P:
            tile = tl.load(c2p + n0 + (local_rows[:, None] * c2p_pitch + local[None, :]))
            z = add_tile(z, tile, eye, inverse_band_scale, PRECISION)
        if P2C:
            grain = n0 // GRAIN * GRAIN
            query_start, _ = near_span(grain, -offset, -far_future, -far_past, 0, query_grains, GRAIN)
            place = skip_rows(p2c, n0, p2c_pitch) - query_start
            tile = tl.load(place + (local[:, None] * p2c_pitch + local_rows[None, :]))
            z = add_tile(z, tl.trans(tile), eye, inverse_band_scale, PRECISION)
        if HIDDEN:
            z = hide(z, hiding, n0 + local, key_length, MASK)
        new_peak = tl.maximum(peak, tl.max(z, 1) * scale + constant)
        shift = new_peak
        if HIDDEN:
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # rows that have seen nothing yet
        p = tl.exp2(z * scale - (shift - constant)[:, None])
        fade = tl.exp2(peak - shift)
        total = total * fade + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(kept(dropping, n0, COLUMNS), p, 0.0)
        acc = matmul_add(p.to(v.dtype), v, acc * fade[:, None], PRECISION)
        peak = new_peak
    return acc, total, peak
