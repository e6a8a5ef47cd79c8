"""Gradient of the queries or keys: adds the position term of near tiles to the partial gradient (equation 9).

    dx_r = s (partial_r + sum_e dA^e_r T[e])          x the queries and T = K^r, or x the keys and T = Q^r

``backward_query`` or ``backward_key`` wrote partial. Rows are STEP apart, so that their entries at one distance are
aligned (see ``band_scores``).
"""

import triton.language as tl

from .tile import (
    band_bounds,
    band_pointer,
    column_window,
    kernel,
    load_rows,
    load_rows_below,
    row_pointer,
    store_rows,
    strided_rows,
    workspace_row,
)


@kernel(first_integer="dx_b")
def backward_rows(
    partial, table, band, cu_seqlens, key_spans, grad_x,
    dx_b, dx_h, dx_l, band_b, band_h, pitch,
    rows_length, columns_length, offset, past, future, direction, first_distance, distances,
    blocks, first_batch, first_head, softmax_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, SPANS: tl.constexpr, ROWS_ARE_KEYS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    part_batch, part_head = tl.program_id(0) // blocks, tl.program_id(1)
    batch, head = part_batch + first_batch, part_head + first_head
    block, residue = tl.program_id(0) % blocks // STEP, tl.program_id(0) % blocks % STEP
    r0 = block * (BLOCK_M * STEP)
    first, rows_length, row_low, row_high, low, high = band_bounds(
        batch, cu_seqlens, key_spans, rows_length, columns_length, PACKED, SPANS, ROWS_ARE_KEYS, ALIGN
    )
    if r0 >= rows_length:
        return
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
