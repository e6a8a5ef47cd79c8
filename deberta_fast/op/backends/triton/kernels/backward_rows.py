"""What the position term of near tiles gives to the gradient of its rows (equation 9), and with it that gradient.

    dx_r = s (partial_r + sum_e dA^e_r T[e])          x the queries and T = K^r, or x the keys and T = Q^r

partial is what ``backward_query`` or ``backward_key`` found. Rows are STEP apart, so that their entries at one distance
lie aligned (see ``band_scores``).
"""

import triton
import triton.language as tl

from .tile import (
    band_of,
    find_band,
    load_rows,
    load_rows_below,
    matmul_add,
    room_of,
    spread_rows,
    start_of,
    store_rows,
    window_of,
)

INTEGERS = (
    "dx_b", "dx_h", "dx_l", "band_b", "band_h", "pitch", "rows_length", "columns_length", "offset", "past",
    "future", "direction", "first_distance", "distances", "blocks", "first_batch", "first_head",
)  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def backward_rows(
    partial, table, band, cu_seqlens, key_spans, grad_x,
    dx_b, dx_h, dx_l, band_b, band_h, pitch,
    rows_length, columns_length, offset, past, future, direction, first_distance, distances,
    blocks, first_batch, first_head, softmax_scale,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, SPANS: tl.constexpr, ROWS_ARE_KEYS: tl.constexpr,
    GRAIN: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    part_batch, part_head = tl.program_id(0) // blocks, tl.program_id(1)
    batch, head = part_batch + first_batch, part_head + first_head
    block, residue = tl.program_id(0) % blocks // STEP, tl.program_id(0) % blocks % STEP
    r0 = block * (ROWS * STEP)
    first, rows_length, row_low, row_high, low, high = find_band(
        batch, cu_seqlens, key_spans, rows_length, columns_length, PACKED, SPANS, ROWS_ARE_KEYS, GRAIN
    )
    if r0 >= rows_length:
        return
    local, start, stop = spread_rows(
        r0, offset, past, future, low, high, row_low, tl.minimum(row_high, rows_length), residue, GRAIN, ROWS, STEP
    )
    lowest, highest = window_of(start, stop, ROWS, STEP)
    room = room_of(first, batch, PACKED) + r0
    partial = start_of(partial, part_batch, part_head, room, band_b * SIZE, band_h * SIZE, SIZE, 1)
    acc = load_rows_below(rows_length - r0, partial, local, SIZE, SIZE, BLOCK_SIZE)
    table += head.to(tl.int64) * distances * SIZE
    band = band_of(band, part_batch, part_head, room, band_b, band_h, pitch)
    places = local * (pitch * 16) - start
    shift = STEP * tl.arange(0, ROWS)
    for window in range(lowest, highest, WINDOW):
        column = window // STEP * STEP + shift[:, None] + tl.arange(0, WINDOW)[None, :]
        inside = (column >= start[:, None]) & (column < stop[:, None])
        da = tl.load(band + (places[:, None] + column), mask=inside, other=0.0)
        e = window - (r0 + residue + offset) + tl.arange(0, WINDOW)
        t = tl.minimum(tl.maximum(direction * e - first_distance, 0), distances - 1)
        acc = matmul_add(da, load_rows(table, t, SIZE, SIZE, BLOCK_SIZE), acc, PRECISION)
    grad_x = start_of(grad_x, batch, head, first + r0, dx_b, dx_h, dx_l, UNIT)
    store_rows(grad_x, local, rows_length - r0, dx_l * UNIT, acc * softmax_scale, SIZE, BLOCK_SIZE)
