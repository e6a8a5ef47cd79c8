"""Kernels on bands of near scores (equation 6), and on the gradients dA that replace the scores.

    band[r, c - start] = b x_r . T[e],  e = c - r - offset,  for the near columns start <= c < stop of row r

For c2p, x are the queries and T = K^r; for p2c, x are the keys and T = Q^r. T has one row per distance. b is a power of
two. start and stop are the same for all rows between two multiples of ALIGN.

In a product of rows with consecutive distances, row r belongs one column further right than row r - 1. The addresses of
loads and stores make that shift. A program owns rows that are STEP apart: their columns differ by STEP, so that STEP
scores are stored at once, and entries at one distance are aligned. Every cell of a near tile is finite.

One launch serves both terms, since each alone would leave multiprocessors idle at its end.
"""

import triton.language as tl

from .tile import (
    advance_rows,
    band_bounds,
    band_pointer,
    column_window,
    kernel,
    load_rows,
    load_rows_below,
    of_term,
    row_pointer,
    rows_are_keys,
    store_rows,
    strided_rows,
    term_geometry,
    workspace_row,
)


@kernel(first_integer="q_b")
def band_scores(
    query, key, key_table, query_table, c2p, p2c, cu_seqlens, key_spans,
    q_b, q_h, q_l, k_b, k_h, k_l, c2p_b, c2p_h, c2p_pitch, p2c_b, p2c_h, p2c_pitch,
    query_length, key_length, offset, far_past, far_future, first_distance, distances,
    blocks, first_batch, first_head, band_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, SPANS: tl.constexpr, C2P: tl.constexpr, P2C: tl.constexpr, LARGEST: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Writes the position terms of all near tiles."""
    part_batch, part_head = tl.program_id(0) // blocks, tl.program_id(1)
    batch, head = part_batch + first_batch, part_head + first_head
    keys = rows_are_keys(tl.program_id(2), C2P, P2C)
    offset, past, future, direction = term_geometry(keys, offset, far_past, far_future)
    block, residue = tl.program_id(0) % blocks // STEP, tl.program_id(0) % blocks % STEP
    r0 = block * (BLOCK_M * STEP)
    first, rows_length, row_low, row_high, low, high = band_bounds(
        batch, keys, cu_seqlens, key_spans, query_length, key_length, PACKED, SPANS, ALIGN
    )
    if r0 >= row_high:
        return
    x, x_l = of_term(keys, key, query), of_term(keys, k_l, q_l)
    table, band = of_term(keys, query_table, key_table), of_term(keys, p2c, c2p)
    x_b, x_h = of_term(keys, k_b, q_b), of_term(keys, k_h, q_h)
    band_b, band_h, pitch = (
        of_term(keys, p2c_b, c2p_b),
        of_term(keys, p2c_h, c2p_h),
        of_term(keys, p2c_pitch, c2p_pitch),
    )
    offs_m, start, stop = strided_rows(
        r0, offset, past, future, low, high, row_low, row_high, residue, ALIGN, BLOCK_M, STEP
    )
    lowest, highest = column_window(start, stop, BLOCK_M, STEP)
    x = row_pointer(x, batch, head, first + r0, x_b, x_h, x_l, UNIT)
    clamped_m = tl.minimum(offs_m, rows_length - 1 - r0)
    rows = load_rows(x, clamped_m, x_l * UNIT, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    # The product of the band with the identity would spread infinities and NaNs from row to row.
    rows = tl.where(tl.abs(rows.to(tl.float32)) <= LARGEST, rows, 0.0)
    table += head.to(tl.int64) * distances * HEAD_DIM
    workspace = workspace_row(first, batch, PACKED) + r0
    band = band_pointer(band, part_batch, part_head, workspace, band_b, band_h, pitch)
    row_offsets = offs_m * (pitch * 16) - start
    shift = STEP * tl.arange(0, BLOCK_M)
    for window in range(lowest, highest, BLOCK_E):
        e = window - (r0 + residue + offset) + tl.arange(0, BLOCK_E)
        t = tl.minimum(tl.maximum(direction * e - first_distance, 0), distances - 1)
        table_rows = load_rows(table, t, HEAD_DIM, HEAD_DIM, BLOCK_D)  # (BLOCK_E, BLOCK_D)
        scores = tl.dot(rows, tl.trans(table_rows), input_precision=PRECISION)  # (BLOCK_M, BLOCK_E)
        if band.dtype.element_ty == tl.float16:
            # Without propagate_nan, both replace a NaN by the other operand.
            scores = tl.maximum(scores * band_scale, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
            scores = tl.minimum(scores, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        column = window // STEP * STEP + shift[:, None] + tl.arange(0, BLOCK_E)[None, :]
        inside = (column >= start[:, None]) & (column < stop[:, None])
        tl.store(band + (row_offsets[:, None] + column), scores.to(band.dtype.element_ty), mask=inside)


@kernel(first_integer="dq_b")
def backward_rows(
    partial_query, partial_key, key_table, query_table, c2p, p2c, cu_seqlens, key_spans, grad_query, grad_key,
    dq_b, dq_h, dq_l, dk_b, dk_h, dk_l, c2p_b, c2p_h, c2p_pitch, p2c_b, p2c_h, p2c_pitch,
    query_length, key_length, offset, far_past, far_future, first_distance, distances,
    blocks, first_batch, first_head, softmax_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, SPANS: tl.constexpr, C2P: tl.constexpr, P2C: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Adds the position terms of near tiles to the gradients of queries and keys (equation 9).

    dx_r = s (partial_r + sum_e dA^e_r T[e])          ``backward_query`` or ``backward_key`` wrote partial
    """
    part_batch, part_head = tl.program_id(0) // blocks, tl.program_id(1)
    batch, head = part_batch + first_batch, part_head + first_head
    keys = rows_are_keys(tl.program_id(2), C2P, P2C)
    offset, past, future, direction = term_geometry(keys, offset, far_past, far_future)
    block, residue = tl.program_id(0) % blocks // STEP, tl.program_id(0) % blocks % STEP
    r0 = block * (BLOCK_M * STEP)
    first, rows_length, row_low, row_high, low, high = band_bounds(
        batch, keys, cu_seqlens, key_spans, query_length, key_length, PACKED, SPANS, ALIGN
    )
    if r0 >= rows_length:
        return
    partial, table = of_term(keys, partial_key, partial_query), of_term(keys, query_table, key_table)
    grad_x, band = of_term(keys, grad_key, grad_query), of_term(keys, p2c, c2p)
    dx_b, dx_h, dx_l = of_term(keys, dk_b, dq_b), of_term(keys, dk_h, dq_h), of_term(keys, dk_l, dq_l)
    band_b, band_h, pitch = (
        of_term(keys, p2c_b, c2p_b),
        of_term(keys, p2c_h, c2p_h),
        of_term(keys, p2c_pitch, c2p_pitch),
    )
    offs_m, start, stop = strided_rows(
        r0, offset, past, future, low, high, row_low, tl.minimum(row_high, rows_length), residue, ALIGN, BLOCK_M, STEP
    )
    lowest, highest = column_window(start, stop, BLOCK_M, STEP)
    workspace = workspace_row(first, batch, PACKED) + r0
    partial = row_pointer(partial, part_batch, part_head, workspace, band_b, band_h, 1, HEAD_DIM)
    acc = load_rows_below(rows_length - r0, partial, offs_m, HEAD_DIM, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    table += head.to(tl.int64) * distances * HEAD_DIM
    band = band_pointer(band, part_batch, part_head, workspace, band_b, band_h, pitch)
    row_offsets = offs_m * (pitch * 16) - start
    shift = STEP * tl.arange(0, BLOCK_M)
    for window in range(lowest, highest, BLOCK_E):
        column = window // STEP * STEP + shift[:, None] + tl.arange(0, BLOCK_E)[None, :]
        inside = (column >= start[:, None]) & (column < stop[:, None])
        da = tl.load(band + (row_offsets[:, None] + column), mask=inside, other=0.0)  # (BLOCK_M, BLOCK_E)
        e = window - (r0 + residue + offset) + tl.arange(0, BLOCK_E)
        t = tl.minimum(tl.maximum(direction * e - first_distance, 0), distances - 1)
        table_rows = load_rows(table, t, HEAD_DIM, HEAD_DIM, BLOCK_D)  # (BLOCK_E, BLOCK_D)
        acc = tl.dot(da, table_rows, acc, input_precision=PRECISION)
    grad_x = row_pointer(grad_x, batch, head, first + r0, dx_b, dx_h, dx_l, UNIT)
    store_rows(grad_x, offs_m, rows_length - r0, dx_l * UNIT, acc * softmax_scale, HEAD_DIM, BLOCK_D)


@kernel(first_integer="q_b")
def backward_by_distance(
    query, key, c2p, p2c, cu_seqlens, key_spans, sums_pos_key, sums_pos_query,
    q_b, q_h, q_l, k_b, k_h, k_l, c2p_b, c2p_h, c2p_pitch, p2c_b, p2c_h, p2c_pitch,
    query_length, key_length, offset, far_past, far_future, first_distance, distances,
    first_batch, first_head, batches, heads, batch_splits, row_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, SPANS: tl.constexpr, C2P: tl.constexpr, P2C: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sums the gradients of the position tables by distance, without atomics (equation 9).

    G[split, t] = sum_r band[r, r + e_t] x_r          x the queries for K^r, the keys for Q^r

    A program owns BLOCK_E distances of a head and some of the rows, and walks along their diagonal. C2P and P2C say
    which tables have gradients.
    """
    splits = STEP * batch_splits * row_splits
    part_head, split = tl.program_id(1), tl.program_id(2) % splits
    head, residue, share = part_head + first_head, split % STEP, split // STEP
    keys = rows_are_keys(tl.program_id(2) // splits, C2P, P2C)
    offset, past, future, direction = term_geometry(keys, offset, far_past, far_future)
    x_b, x_l = of_term(keys, k_b, q_b), of_term(keys, k_l, q_l)
    band_b, pitch = of_term(keys, p2c_b, c2p_b), of_term(keys, p2c_pitch, c2p_pitch)
    # Strides of heads are used up here: throughout the loops they would take registers.
    x = of_term(keys, key, query) + head.to(tl.int64) * of_term(keys, k_h, q_h) * UNIT
    band = band_pointer(of_term(keys, p2c, c2p), 0, part_head, 0, 0, of_term(keys, p2c_h, c2p_h), pitch)
    # At the first distance, the entries of these rows begin at multiples of STEP.
    first_e = tl.minimum(direction * first_distance, direction * (first_distance + distances - 1))
    first_e -= ((first_e + residue + offset) % STEP + STEP) % STEP
    first_e += tl.program_id(0) * BLOCK_E
    acc = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    shift = STEP * tl.arange(0, BLOCK_M)
    for part_batch in range(share // row_splits, batches, batch_splits):
        batch = part_batch + first_batch
        first, rows_length, row_low, row_high, low, high = band_bounds(
            batch, keys, cu_seqlens, key_spans, query_length, key_length, PACKED, SPANS, ALIGN
        )
        row_high = tl.minimum(row_high, rows_length)
        # These rows have columns at one of these distances.
        row_start = tl.maximum(row_low, low - first_e - BLOCK_E + 1 - offset)
        row_stop = tl.minimum(row_high, high - first_e - offset)
        row_start = (tl.maximum(row_start, 0) // (BLOCK_M * STEP) + share % row_splits) * (BLOCK_M * STEP)
        x_start = x + (batch.to(tl.int64) * x_b + first.to(tl.int64) * x_l) * UNIT
        workspace = workspace_row(first, batch, PACKED)
        band_start = band_pointer(band, part_batch, 0, workspace, band_b, 0, pitch)
        for r0 in range(row_start, row_stop, BLOCK_M * STEP * row_splits):
            offs_m, start, stop = strided_rows(
                r0, offset, past, future, low, high, row_low, row_high, residue, ALIGN, BLOCK_M, STEP
            )
            first_column = tl.multiple_of(first_e + (r0 + residue + offset), STEP)
            column = first_column + shift[:, None] + tl.arange(0, BLOCK_E)[None, :]
            present = (column >= start[:, None]) & (column < stop[:, None])
            offsets = (offs_m * (pitch * 16) - start)[:, None] + column
            pointers = advance_rows(band_start, r0, pitch * 16) + offsets
            da = tl.load(pointers, mask=present, other=0.0)  # (BLOCK_M, BLOCK_E)
            clamped_m = tl.minimum(offs_m, rows_length - 1 - r0)
            x_rows = advance_rows(x_start, r0, x_l * UNIT)
            tile = load_rows(x_rows, clamped_m, x_l * UNIT, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
            acc = tl.dot(tl.trans(da), tile, acc, input_precision=PRECISION)
    t = direction * (first_e + tl.arange(0, BLOCK_E)) - first_distance
    d = tl.arange(0, BLOCK_D)
    inside = ((t >= 0) & (t < distances))[:, None] & (d < HEAD_DIM)[None, :]
    by_distance = of_term(keys, sums_pos_query, sums_pos_key)
    by_distance += ((split.to(tl.int64) * heads + head) * distances + t)[:, None] * HEAD_DIM + d[None, :]
    if first_batch > 0:
        acc += tl.load(by_distance, mask=inside, other=0.0)  # (BLOCK_E, BLOCK_D), of earlier batches
    tl.store(by_distance, acc, mask=inside)


@kernel(first_integer="first_distance")
def backward_by_row(
    sums_pos_key, sums_pos_query, far_pos_key, far_pos_query, first_of_slot, grad_pos_key, grad_pos_query,
    first_distance, distances, splits, first_slot, past_slot, future_slot, far_count, softmax_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, C2P: tl.constexpr, P2C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Sums by row of a table (equation 11): its distances are consecutive, because sigma never decreases.

    grad[rho] = s (sum_split sum_{t: sigma = rho} G[split, t]  +  the far sums of ``backward_key``)
    """
    row, head, heads, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(1), tl.num_programs(0)
    keys = rows_are_keys(tl.program_id(2), C2P, P2C)
    by_distance, far_sums = of_term(keys, sums_pos_query, sums_pos_key), of_term(keys, far_pos_query, far_pos_key)
    grad_table = of_term(keys, grad_pos_query, grad_pos_key)
    start = tl.maximum(tl.load(first_of_slot + row + first_slot) - first_distance, 0)
    stop = tl.minimum(tl.load(first_of_slot + row + first_slot + 1) - first_distance, distances)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for split in range(splits):
        table = by_distance + (split * heads + head).to(tl.int64) * distances * HEAD_DIM
        for t0 in range(start, stop, BLOCK_E):
            t = t0 + tl.arange(0, BLOCK_E)
            inside = (t < stop)[:, None] & (d < HEAD_DIM)[None, :]
            acc += tl.load(table + t[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    for side in range(2):
        slot = tl.where(side == 0, future_slot, past_slot)
        sums = far_sums + (head.to(tl.int64) * 2 + side) * far_count * HEAD_DIM
        for p0 in range(0, tl.where(slot == row, far_count, 0), BLOCK_E):
            p = p0 + tl.arange(0, BLOCK_E)
            inside = (p < far_count)[:, None] & (d < HEAD_DIM)[None, :]
            acc += tl.load(sums + p[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    grad = grad_table + (head.to(tl.int64) * rows + row) * HEAD_DIM + d
    tl.store(grad, (tl.sum(acc, 0) * softmax_scale).to(grad_table.dtype.element_ty), mask=d < HEAD_DIM)
