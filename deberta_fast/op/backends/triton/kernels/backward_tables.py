"""Gradients of the position tables from the bands of dA, without atomics (equations 9 and 11).

First by distance: a program owns WINDOW distances of a head and some of the rows, and walks along their diagonal. Its
rows are STEP apart, so that their entries at one distance lie aligned (see ``band_scores``).

    G[split, t] = sum_r band[r, r + e_t] x_r          x the queries for K^r, the keys for Q^r

Then by row of the table: the distances of a row are neighbours, because sigma never decreases.

    grad[rho] = s (sum_split sum_{t: sigma = rho} G[split, t]  +  the far sums of ``backward_key``)
"""

import triton
import triton.language as tl

from .tile import band_of, find_band, load_rows, matmul_add, room_of, skip_rows, spread_rows, start_of

INTEGERS_BY_DISTANCE = (
    "x_b", "x_h", "x_l", "band_b", "band_h", "pitch", "rows_length", "columns_length", "offset", "past", "future",
    "direction", "first_distance", "distances", "first_batch", "first_head", "batches", "heads", "batch_splits",
    "row_splits",
)  # fmt: skip
INTEGERS_BY_ROW = ("first_distance", "distances", "splits", "first_slot", "past_slot", "future_slot", "far_count")


@triton.jit(do_not_specialize=INTEGERS_BY_DISTANCE)
def backward_by_distance(
    x, band, cu_seqlens, key_spans, by_distance,
    x_b, x_h, x_l, band_b, band_h, pitch, rows_length, columns_length, offset, past, future,
    direction, first_distance, distances, first_batch, first_head, batches, heads, batch_splits, row_splits,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, SPANS: tl.constexpr, ROWS_ARE_KEYS: tl.constexpr,
    GRAIN: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    part_head, split = tl.program_id(1), tl.program_id(2)
    head, residue, share = part_head + first_head, split % STEP, split // STEP
    # The first distance is one at which these rows' entries begin at a multiple of STEP.
    first_e = tl.minimum(direction * first_distance, direction * (first_distance + distances - 1))
    first_e -= ((first_e + residue + offset) % STEP + STEP) % STEP
    first_e += tl.program_id(0) * WINDOW
    e = first_e + tl.arange(0, WINDOW)
    t = direction * e - first_distance
    d = tl.arange(0, BLOCK_SIZE)
    inside = ((t >= 0) & (t < distances))[:, None] & (d < SIZE)[None, :]
    by_distance += ((split.to(tl.int64) * heads + head) * distances + t)[:, None] * SIZE + d[None, :]
    acc = tl.load(by_distance, mask=inside, other=0.0)  # what earlier batches left
    shift = STEP * tl.arange(0, ROWS)
    for part_batch in range(share // row_splits, batches, batch_splits):
        batch = part_batch + first_batch
        first, rows_length_here, row_low, row_high, low, high = find_band(
            batch, cu_seqlens, key_spans, rows_length, columns_length, PACKED, SPANS, ROWS_ARE_KEYS, GRAIN
        )
        row_high = tl.minimum(row_high, rows_length_here)
        # Rows that meet one of these distances inside the columns.
        row_start = tl.maximum(row_low, low - first_e - WINDOW + 1 - offset)
        row_stop = tl.minimum(row_high, high - first_e - offset)
        row_start = tl.maximum(row_start, 0) // (ROWS * STEP) * (ROWS * STEP) + share % row_splits * (ROWS * STEP)
        x_start = start_of(x, batch, head, first, x_b, x_h, x_l, UNIT)
        room = room_of(first, batch, PACKED)
        band_start = band_of(band, batch - first_batch, part_head, room, band_b, band_h, pitch)
        for r0 in range(row_start, row_stop, ROWS * STEP * row_splits):
            local, start, stop = spread_rows(
                r0, offset, past, future, low, high, row_low, row_high, residue, GRAIN, ROWS, STEP
            )
            first_column = tl.multiple_of(first_e + (r0 + residue + offset), STEP)
            column = first_column + shift[:, None] + tl.arange(0, WINDOW)[None, :]
            present = (column >= start[:, None]) & (column < stop[:, None])
            places = (local * (pitch * 16) - start)[:, None] + column
            da = tl.load(skip_rows(band_start, r0, pitch * 16) + places, mask=present, other=0.0)
            here = tl.minimum(local, rows_length_here - 1 - r0)
            tile = load_rows(skip_rows(x_start, r0, x_l * UNIT), here, x_l * UNIT, SIZE, BLOCK_SIZE)
            acc = matmul_add(tl.trans(da), tile, acc, PRECISION)
    tl.store(by_distance, acc, mask=inside)


@triton.jit(do_not_specialize=INTEGERS_BY_ROW)
def backward_by_row(
    by_distance, far_sums, first_of_slot, grad_table,
    first_distance, distances, splits, first_slot, past_slot, future_slot, far_count, softmax_scale,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, head, heads, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(1), tl.num_programs(0)
    start = tl.maximum(tl.load(first_of_slot + row + first_slot) - first_distance, 0)
    stop = tl.minimum(tl.load(first_of_slot + row + first_slot + 1) - first_distance, distances)
    d = tl.arange(0, BLOCK_SIZE)
    acc = tl.zeros((ROWS, BLOCK_SIZE), tl.float32)
    for split in range(splits):
        table = by_distance + (split * heads + head).to(tl.int64) * distances * SIZE
        for t0 in range(start, stop, ROWS):
            t = t0 + tl.arange(0, ROWS)
            inside = (t < stop)[:, None] & (d < SIZE)[None, :]
            acc += tl.load(table + t[:, None] * SIZE + d[None, :], mask=inside, other=0.0)
    for side in range(2):
        slot = tl.where(side == 0, future_slot, past_slot)
        sums = far_sums + (head.to(tl.int64) * 2 + side) * far_count * SIZE
        for p0 in range(0, tl.where(slot == row, far_count, 0), ROWS):
            p = p0 + tl.arange(0, ROWS)
            inside = (p < far_count)[:, None] & (d < SIZE)[None, :]
            acc += tl.load(sums + p[:, None] * SIZE + d[None, :], mask=inside, other=0.0)
    grad = grad_table + (head.to(tl.int64) * rows + row) * SIZE + d
    tl.store(grad, (tl.sum(acc, 0) * softmax_scale).to(grad_table.dtype.element_ty), mask=d < SIZE)
