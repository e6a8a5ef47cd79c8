"""One position term of all near tiles, written as a band of dense scores (equation 6).

    band[r, c - start] = b x_r . T[e],  e = c - r - offset,  for the near columns start <= c < stop of row r

For c2p, x are the queries and T = K^r; for p2c, x are the keys and T = Q^r. T has one row per distance. b is a power of
two. start and stop are the same for all rows between two multiples of ALIGN.

In a product of rows with consecutive distances, row r belongs one column further right than row r - 1. The addresses of
the stores make that shift. A program owns rows that are STEP apart: their columns differ by STEP, so that STEP scores
are stored at once. Kernels that read the band find it aligned, and every cell of a near tile is finite.
"""

import triton.language as tl

from .tile import (
    band_bounds,
    band_pointer,
    column_window,
    kernel,
    load_rows,
    row_pointer,
    strided_rows,
    workspace_row,
)


@kernel(first_integer="x_b")
def band_scores(
    x, table, band, cu_seqlens, key_spans,
    x_b, x_h, x_l, band_b, band_h, pitch,
    rows_length, columns_length, offset, past, future, direction, first_distance, distances,
    blocks, first_batch, first_head, band_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, SPANS: tl.constexpr, ROWS_ARE_KEYS: tl.constexpr, LARGEST: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    part_batch, part_head = tl.program_id(0) // blocks, tl.program_id(1)
    batch, head = part_batch + first_batch, part_head + first_head
    block, residue = tl.program_id(0) % blocks // STEP, tl.program_id(0) % blocks % STEP
    r0 = block * (BLOCK_M * STEP)
    first, rows_length, row_low, row_high, low, high = band_bounds(
        batch, cu_seqlens, key_spans, rows_length, columns_length, PACKED, SPANS, ROWS_ARE_KEYS, ALIGN
    )
    if r0 >= row_high:
        return
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
