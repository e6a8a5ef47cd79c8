"""One position term of all near tiles, written as a band of dense scores (equation 6).

    band[r, c - start] = b x_r . T[e],  e = c - r - offset,  for the near columns start <= c < stop of row r's grain

x are the queries and T = K^r for c2p; x are the keys and T = Q^r for p2c. T has a row a distance. A program owns
ROWS rows and multiplies them with the distances that they meet, WINDOW at a time. The product's row r belongs one column
further right than row r - 1: that shift happens in the addresses of the stores, so that all kernels that read the band
do it in aligned vectors.
"""

import triton
import triton.language as tl

from .tile import find_keys, find_rows, load_rows, matmul, near_span, start_of

INTEGERS = (
    "x_b", "x_h", "x_l", "band_b", "band_h", "pitch", "table_h", "rows_length", "columns_length", "offset", "past",
    "future", "direction", "first_distance", "distances", "blocks", "first_batch", "first_head",
)  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def band_scores(
    x, table, band, cu_seqlens, key_spans,
    x_b, x_h, x_l, band_b, band_h, pitch, table_h,
    rows_length, columns_length, offset, past, future, direction, first_distance, distances,
    blocks, first_batch, first_head, band_scale,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, SPANS: tl.constexpr, ROWS_ARE_KEYS: tl.constexpr,
    LARGEST: tl.constexpr, GRAIN: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(0) // blocks, tl.program_id(1)
    r0 = tl.program_id(0) % blocks * ROWS
    first, rows_length, columns_length = find_rows(batch + first_batch, cu_seqlens, rows_length, columns_length, PACKED)
    if ROWS_ARE_KEYS:
        row_low, row_high = find_keys(batch + first_batch, key_spans, rows_length, GRAIN, SPANS)
        low, high = 0, tl.cdiv(columns_length, GRAIN) * GRAIN
    else:
        row_low, row_high = 0, rows_length
        low, high = find_keys(batch + first_batch, key_spans, columns_length, GRAIN, SPANS)
    if (r0 >= rows_length) | (r0 >= row_high) | (r0 < row_low):
        return
    start, stop = near_span(r0 // GRAIN * GRAIN, offset, past, future, low, high, GRAIN)

    local = tl.arange(0, ROWS)
    x = start_of(x, batch + first_batch, head + first_head, first + r0, x_b, x_h, x_l, UNIT)
    tile = load_rows(x, tl.minimum(local, rows_length - 1 - r0), x_l * UNIT, SIZE, BLOCK_SIZE)
    table += (head + first_head).to(tl.int64) * table_h
    band = start_of(band, batch, head, first + r0, band_b * pitch, band_h * pitch, pitch, 16)
    lowest = start - (r0 + ROWS - 1) - offset
    for window in range(0, stop - start + ROWS - 1, WINDOW):
        e = lowest + window + tl.arange(0, WINDOW)
        t = tl.minimum(tl.maximum(direction * e - first_distance, 0), distances - 1)
        product = matmul(tile, tl.trans(load_rows(table, t, SIZE, SIZE, BLOCK_SIZE)), PRECISION) * band_scale
        # Finite, so that no score spreads when the band is multiplied with the identity.
        product = tl.minimum(tl.maximum(product, -LARGEST), LARGEST)
        column = e[None, :] + local[:, None] + (r0 + offset - start)
        inside = (column >= 0) & (column < stop - start) & (local < rows_length - r0)[:, None]
        tl.store(band + (local[:, None] * (pitch * 16) + column), product.to(band.dtype.element_ty), mask=inside)
