"""dK, dV of one key block, and what its near tiles give to the other gradients (equations 8 to 10).

Everything is held transposed, keys along rows. Queries come in three segments as in forward; a far segment shifts the
keys where forward shifts the query, which leaves one constant a key:

    far    Z = C q.(k + K^r_r) + C k.Q^r_r      dK += dA^T q + t Q^r_r,  t_j = sum_i dA_ij
                                                dK^r_r += sum_j (dA^T q)_j,  dQ^r_r += sum_j t_j k_j
    near   Z = C (q.k + c2p + p2c)              dK += dA^T q + sum_e dA^e Q^e

dA of a near tile takes the place of its p2c scores, which nobody reads after this program: ``backward_query`` and
``backward_tables`` find it there, and ``backward_rows``, which makes the last sum.
"""

import triton
import triton.language as tl

from .tile import (
    add_tile,
    band_of,
    find_keys,
    find_rows,
    identity,
    kept,
    load_rows,
    load_table_row,
    matmul,
    matmul_add,
    near_span,
    place_of,
    room_of,
    skip_rows,
    start_of,
    store_rows,
)

INTEGERS = (
    "q_b", "q_h", "q_l", "k_b", "k_h", "k_l", "v_b", "v_h", "v_l", "do_b", "do_h", "do_l", "delta_b", "delta_h",
    "dk_b", "dk_h", "dk_l", "dv_b", "dv_h", "dv_l",
    "pos_key_h", "pos_key_l", "pos_query_h", "pos_query_l", "mask_b", "mask_h", "mask_i", "mask_j",
    "c2p_b", "c2p_h", "c2p_pitch", "p2c_b", "p2c_h", "p2c_pitch",
    "far_count",
    "query_length", "key_length", "offset", "far_past", "far_future", "past_slot", "future_slot",
    "blocks", "first_batch", "first_head", "heads", "threshold",
)  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def backward_key(
    query, key, value, pos_key, pos_query, c2p, p2c, mask, cu_seqlens, key_spans, seed,
    grad_output, shift, delta, partial, grad_key, grad_value, far_pos_key, far_pos_query,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, do_b, do_h, do_l, delta_b, delta_h, dk_b, dk_h, dk_l, dv_b, dv_h, dv_l,
    pos_key_h, pos_key_l, pos_query_h, pos_query_l, mask_b, mask_h, mask_i, mask_j,
    c2p_b, c2p_h, c2p_pitch, p2c_b, p2c_h, p2c_pitch, far_count,
    query_length, key_length, offset, far_past, far_future, past_slot, future_slot,
    blocks, first_batch, first_head, heads, scale, softmax_scale, inverse_band_scale, threshold, inverse_keep,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, SPANS: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    C2P: tl.constexpr, P2C: tl.constexpr, GRAIN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    part_batch, part_head = tl.program_id(0) // blocks, tl.program_id(1)
    batch, head = part_batch + first_batch, part_head + first_head
    n0 = tl.program_id(0) % blocks * ROWS
    first, query_length, key_length = find_rows(batch, cu_seqlens, query_length, key_length, PACKED)
    if n0 >= key_length:
        return
    low, high = find_keys(batch, key_spans, key_length, GRAIN, SPANS)
    query_grains = tl.cdiv(query_length, GRAIN) * GRAIN
    # A block that the padding mask hides whole meets no query.
    query_stop = tl.where((n0 >= low) & (n0 < high), query_length, 0)
    near_start, near_stop = query_stop * 0, query_stop * 0
    if C2P or P2C:
        near_start, near_stop = near_span(n0 // GRAIN * GRAIN, -offset, -far_future, -far_past, 0, query_grains, GRAIN)
    near_stop = tl.multiple_of(tl.where(query_stop > 0, near_stop, 0), GRAIN)
    near_start = tl.multiple_of(tl.minimum(near_start, near_stop), GRAIN)

    local = tl.arange(0, ROWS)
    present = tl.minimum(local, key_length - 1 - n0)
    key = start_of(key, batch, head, first + n0, k_b, k_h, k_l, UNIT)
    value = start_of(value, batch, head, first + n0, v_b, v_h, v_l, UNIT)
    query = start_of(query, batch, head, first, q_b, q_h, q_l, UNIT)
    grad_output = start_of(grad_output, batch, head, first, do_b, do_h, do_l, UNIT)
    room = room_of(first, batch, PACKED)
    place = place_of(batch, head, room, delta_b, delta_h)
    visible = local < key_length - n0
    if MASK != "none":
        mask = start_of(mask, batch, head, first + n0, mask_b, mask_h, mask_j, 1)
    if MASK == "keys":
        visible = tl.load(mask + local * mask_j, mask=visible, other=0) != 0
    hidden = tl.where(visible, 0.0, float("-inf"))
    if C2P:
        c2p = band_of(c2p, part_batch, part_head, room, c2p_b, c2p_h, c2p_pitch) + n0
    if C2P or P2C:
        p2c = band_of(p2c, part_batch, part_head, room + n0, p2c_b, p2c_h, p2c_pitch) - near_start
    queries = query, grad_output, shift + place, delta + place, q_l * UNIT, do_l * UNIT, query_length
    bands = c2p, p2c, c2p_pitch * 16, p2c_pitch * 16, inverse_band_scale
    table = offset, far_past, far_future, low, high
    hiding = mask, present, mask_i, mask_j
    dropping = seed, batch * heads + head, n0, threshold, inverse_keep

    dk = tl.zeros((ROWS, BLOCK_SIZE), tl.float32)
    dv = tl.zeros((ROWS, BLOCK_SIZE), tl.float32)
    before = tl.zeros((BLOCK_SIZE,), tl.float32)
    d = tl.arange(0, BLOCK_SIZE)
    # One record a key block: of packed sequences, as many as their blocks fit into at most.
    record = batch * blocks + n0 // ROWS
    if PACKED:
        record = (first + n0) // ROWS + batch
    for side in range(2):
        # Queries before the near ones lie so far before these keys that they read the row of the far future.
        slot = tl.where(side == 0, future_slot, past_slot)
        start = tl.where(side == 0, 0, near_stop)
        stop = tl.where(side == 0, tl.minimum(near_start, query_stop), query_stop)
        # Loaded anew for each segment: kept, they would not leave enough registers to the loops.
        k = load_rows(key, present, k_l * UNIT, SIZE, BLOCK_SIZE)
        v = load_rows(value, present, v_l * UNIT, SIZE, BLOCK_SIZE)
        shifted, constant = k, hidden
        if C2P:
            row = load_table_row(pos_key, head, slot, pos_key_h, pos_key_l, SIZE, BLOCK_SIZE)
            shifted = (k.to(tl.float32) + row[None, :]).to(k.dtype)
        if P2C:
            row = load_table_row(pos_query, head, slot, pos_query_h, pos_query_l, SIZE, BLOCK_SIZE)
            constant += tl.sum(k.to(tl.float32) * row[None, :], 1) * scale
        dk, dv, row_sum = _differentiate(
            dk, dv, shifted, v, constant, scale, queries, bands, table, hiding, dropping, start, stop,
            SIZE, BLOCK_SIZE, PRECISION, MASK, DROPOUT, False, False, P2C, GRAIN, COLUMNS,
        )  # fmt: skip
        sums = ((head.to(tl.int64) * 2 + side) * far_count + record) * SIZE + d
        if C2P:
            tl.store(far_pos_key + sums, tl.sum(dk, 0) - before, mask=d < SIZE)
        if P2C:
            k = load_rows(key, present, k_l * UNIT, SIZE, BLOCK_SIZE)
            row = load_table_row(pos_query, head, slot, pos_query_h, pos_query_l, SIZE, BLOCK_SIZE)
            tl.store(far_pos_query + sums, tl.sum(k.to(tl.float32) * row_sum[:, None], 0), mask=d < SIZE)
            dk += row_sum[:, None] * row[None, :]
        before = tl.sum(dk, 0)

    if C2P or P2C:
        k = load_rows(key, present, k_l * UNIT, SIZE, BLOCK_SIZE)
        v = load_rows(value, present, v_l * UNIT, SIZE, BLOCK_SIZE)
        dk, dv, row_sum = _differentiate(
            dk, dv, k, v, hidden, scale, queries, bands, table, hiding, dropping, near_start, near_stop,
            SIZE, BLOCK_SIZE, PRECISION, MASK, DROPOUT, C2P, P2C, False, GRAIN, COLUMNS,
        )  # fmt: skip
    if P2C:
        partial = start_of(partial, part_batch, part_head, room + n0, p2c_b * SIZE, p2c_h * SIZE, SIZE, 1)
        store_rows(partial, local, ROWS, SIZE, dk, SIZE, BLOCK_SIZE)
    else:
        grad_key = start_of(grad_key, batch, head, first + n0, dk_b, dk_h, dk_l, UNIT)
        store_rows(grad_key, local, key_length - n0, dk_l * UNIT, dk * softmax_scale, SIZE, BLOCK_SIZE)
    grad_value = start_of(grad_value, batch, head, first + n0, dv_b, dv_h, dv_l, UNIT)
    store_rows(grad_value, local, key_length - n0, dv_l * UNIT, dv, SIZE, BLOCK_SIZE)


@triton.jit
def _differentiate(
    dk, dv, k, v, constant, scale, queries, bands, table, hiding, dropping, start, stop,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    C2P: tl.constexpr, P2C: tl.constexpr, SUM: tl.constexpr, GRAIN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Equation 8 over the queries start to stop, near ones with C2P or P2C; the sums of dA over them with SUM."""
    query, grad_output, shift, delta, q_l, do_l, query_length = queries
    c2p, p2c, c2p_pitch, p2c_pitch, inverse_band_scale = bands
    offset, far_past, far_future, low, high = table
    seed, batch_head, n0, threshold, inverse_keep = dropping
    local, local_rows = tl.arange(0, COLUMNS), tl.arange(0, k.shape[0])
    row_sum = tl.zeros_like(constant)
    eye = identity(k.shape[0], inverse_band_scale, k.dtype)
    for m0 in range(start, stop, COLUMNS):
        here = tl.minimum(local, query_length - 1 - m0)
        q = load_rows(skip_rows(query, m0, q_l), here, q_l, SIZE, BLOCK_SIZE)
        z = matmul(k, tl.trans(q), PRECISION)
        if C2P:
            key_start, _ = near_span(m0 // GRAIN * GRAIN, offset, far_past, far_future, low, high, GRAIN)
            place = skip_rows(c2p, m0, c2p_pitch) - key_start
            tile = tl.load(place + (local[:, None] * c2p_pitch + local_rows[None, :]))
            z = add_tile(z, tl.trans(tile), eye, inverse_band_scale, PRECISION)
        if P2C:
            tile = tl.load(p2c + m0 + (local_rows[:, None] * p2c_pitch + local[None, :]))
            z = add_tile(z, tile, eye, inverse_band_scale, PRECISION)
        z = z * scale + constant[:, None] - tl.load(shift + m0 + local)[None, :]
        if MASK == "pairs":
            mask, rows, mask_i, mask_j = hiding
            pairs = skip_rows(mask, m0, mask_i) + (here[None, :] * mask_i + rows[:, None] * mask_j)
            z = tl.where(tl.load(pairs) != 0, z, float("-inf"))
        p = tl.exp2(z)
        do = load_rows(skip_rows(grad_output, m0, do_l), here, do_l, SIZE, BLOCK_SIZE)
        dp = matmul(v, tl.trans(do), PRECISION)
        dropped = p
        if DROPOUT:
            keep = tl.trans(kept((seed, batch_head, m0 + local, threshold), n0, k.shape[0]))
            dropped = tl.where(keep, p * inverse_keep, 0.0)
            dp = tl.where(keep, dp * inverse_keep, 0.0)
        dv = matmul_add(dropped.to(do.dtype), do, dv, PRECISION)
        da = p * (dp - tl.load(delta + m0 + local)[None, :])
        if SUM:
            row_sum += tl.sum(da, 1)
        rounded = da.to(q.dtype)
        dk = matmul_add(rounded, q, dk, PRECISION)
        if C2P or P2C:
            tl.store(p2c + m0 + (local_rows[:, None] * p2c_pitch + local[None, :]), rounded)
    return dk, dv, row_sum
