"""Gradients of the position tables from the bands of dA, without atomics (equations 9 and 11).

First by distance: a program owns WINDOW distances of a head and some of the rows, and walks along their diagonal.

    G[split, t] = sum_r band[r, r + e_t] x_r          x the queries for K^r, the keys for Q^r

Then by row of the table: the distances of a row are neighbours, because sigma never decreases.

    grad[rho] = s (sum_split sum_{t: sigma = rho} G[split, t]  +  the far sums of ``backward_key``)
"""

import triton
import triton.language as tl

from .tile import find_keys, find_rows, load_rows, matmul_add, near_span, skip_rows, start_of

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
    GRAIN: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    window, part_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = part_head + first_head
    t = window * WINDOW + tl.arange(0, WINDOW)
    # Rows of the table rise with i - j: with the distance e of keys, or against that of queries.
    e = direction * (t + first_distance)
    lowest = tl.min(e)
    d = tl.arange(0, BLOCK_SIZE)
    inside = (t < distances)[:, None] & (d < SIZE)[None, :]
    by_distance += ((split.to(tl.int64) * heads + head) * distances + t)[:, None] * SIZE + d[None, :]
    acc = tl.load(by_distance, mask=inside, other=0.0)  # what earlier batches left
    for part_batch in range(split // row_splits, batches, batch_splits):
        batch = part_batch + first_batch
        first, row_count, column_count = find_rows(batch, cu_seqlens, rows_length, columns_length, PACKED)
        if ROWS_ARE_KEYS:
            row_low, row_high = find_keys(batch, key_spans, row_count, GRAIN, SPANS)
            low, high = column_count * 0, tl.cdiv(column_count, GRAIN) * GRAIN
        else:
            row_low, row_high = row_count * 0, row_count
            low, high = find_keys(batch, key_spans, column_count, GRAIN, SPANS)
        # Rows that meet one of these distances inside the columns.
        row_start = tl.maximum(row_low, low - lowest - WINDOW + 1 - offset)
        row_stop = tl.minimum(tl.minimum(row_high, row_count), high - lowest - offset)
        x_start = start_of(x, batch, head, first, x_b, x_h, x_l, UNIT)
        band_start = start_of(band, batch - first_batch, part_head, first, band_b * pitch, band_h * pitch, pitch, 16)
        row_start = tl.maximum(row_start, 0) // ROWS * ROWS + split % row_splits * ROWS
        local = tl.arange(0, ROWS)
        for r0 in range(row_start, row_stop, ROWS * row_splits):
            start, stop = near_span(r0 // GRAIN * GRAIN, offset, past, future, low, high, GRAIN)
            column = e[None, :] + local[:, None] + (r0 + offset - start)
            present = (column >= 0) & (column < stop - start) & (local < row_count - r0)[:, None]
            band_tile = skip_rows(band_start, r0, pitch * 16) + (local[:, None] * (pitch * 16) + column)
            da = tl.load(band_tile, mask=present, other=0.0)
            here = tl.minimum(local, row_count - 1 - r0)
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
