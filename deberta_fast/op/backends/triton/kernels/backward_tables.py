"""Gradients of the position tables from the bands of dA, without atomics (equations 9 and 11).

First by distance: a program owns BLOCK_E distances of a head and some of the rows, and walks along their diagonal. Its
rows are STEP apart, so that their entries at one distance are aligned (see ``band_scores``).

    G[split, t] = sum_r band[r, r + e_t] x_r          x the queries for K^r, the keys for Q^r

Then by row of the table: the distances of a row are consecutive, because sigma never decreases.

    grad[rho] = s (sum_split sum_{t: sigma = rho} G[split, t]  +  the far sums of ``backward_key``)
"""

import triton.language as tl

from .tile import (
    advance_rows,
    band_bounds,
    band_pointer,
    kernel,
    load_rows,
    row_pointer,
    strided_rows,
    workspace_row,
)


@kernel(first_integer="x_b")
def backward_by_distance(
    x, band, cu_seqlens, key_spans, by_distance,
    x_b, x_h, x_l, band_b, band_h, pitch, rows_length, columns_length, offset, past, future,
    direction, first_distance, distances, first_batch, first_head, batches, heads, batch_splits, row_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, SPANS: tl.constexpr, ROWS_ARE_KEYS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    part_head, split = tl.program_id(1), tl.program_id(2)
    head, residue, share = part_head + first_head, split % STEP, split // STEP
    # At the first distance, the entries of these rows begin at multiples of STEP.
    first_e = tl.minimum(direction * first_distance, direction * (first_distance + distances - 1))
    first_e -= ((first_e + residue + offset) % STEP + STEP) % STEP
    first_e += tl.program_id(0) * BLOCK_E
    e = first_e + tl.arange(0, BLOCK_E)
    t = direction * e - first_distance
    d = tl.arange(0, BLOCK_D)
    inside = ((t >= 0) & (t < distances))[:, None] & (d < HEAD_DIM)[None, :]
    by_distance += ((split.to(tl.int64) * heads + head) * distances + t)[:, None] * HEAD_DIM + d[None, :]
    acc = tl.load(by_distance, mask=inside, other=0.0)  # (BLOCK_E, BLOCK_D), of earlier batches
    shift = STEP * tl.arange(0, BLOCK_M)
    for part_batch in range(share // row_splits, batches, batch_splits):
        batch = part_batch + first_batch
        first, rows_length_here, row_low, row_high, low, high = band_bounds(
            batch, cu_seqlens, key_spans, rows_length, columns_length, PACKED, SPANS, ROWS_ARE_KEYS, ALIGN
        )
        row_high = tl.minimum(row_high, rows_length_here)
        # These rows have columns at one of these distances.
        row_start = tl.maximum(row_low, low - first_e - BLOCK_E + 1 - offset)
        row_stop = tl.minimum(row_high, high - first_e - offset)
        row_start = (tl.maximum(row_start, 0) // (BLOCK_M * STEP) + share % row_splits) * (BLOCK_M * STEP)
        x_start = row_pointer(x, batch, head, first, x_b, x_h, x_l, UNIT)
        workspace = workspace_row(first, batch, PACKED)
        band_start = band_pointer(band, batch - first_batch, part_head, workspace, band_b, band_h, pitch)
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
            clamped_m = tl.minimum(offs_m, rows_length_here - 1 - r0)
            x_rows = advance_rows(x_start, r0, x_l * UNIT)
            tile = load_rows(x_rows, clamped_m, x_l * UNIT, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
            acc = tl.dot(tl.trans(da), tile, acc, input_precision=PRECISION)
    tl.store(by_distance, acc, mask=inside)


@kernel(first_integer="first_distance")
def backward_by_row(
    by_distance, far_sums, first_of_slot, grad_table,
    first_distance, distances, splits, first_slot, past_slot, future_slot, far_count, softmax_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row, head, heads, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(1), tl.num_programs(0)
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
