"""One position term of all near tiles, written as a band of dense scores (equation 6).

    band[r, c - start] = b x_r . T[e],  e = c - r - offset,  for the near columns start <= c < stop of row r's grain

x are the queries and T = K^r for c2p; x are the keys and T = Q^r for p2c. T has a row a distance; b is a power of two.

Row r of a product with consecutive distances belongs one column further right than row r - 1: the addresses of the
stores do that. A program owns rows that are STEP apart, so that theirs differ by STEP columns and STEP scores are
stored at once. Kernels that read the band find it aligned, and every cell of a near tile finite.
"""

import triton
import triton.language as tl

from .tile import band_of, find_band, load_rows, matmul, room_of, spread_rows, start_of, window_of

INTEGERS = (
    "x_b", "x_h", "x_l", "band_b", "band_h", "pitch", "rows_length", "columns_length", "offset", "past",
    "future", "direction", "first_distance", "distances", "blocks", "first_batch", "first_head",
)  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def band_scores(
    x, table, band, cu_seqlens, key_spans,
    x_b, x_h, x_l, band_b, band_h, pitch,
    rows_length, columns_length, offset, past, future, direction, first_distance, distances,
    blocks, first_batch, first_head, band_scale,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, SPANS: tl.constexpr, ROWS_ARE_KEYS: tl.constexpr, LARGEST: tl.constexpr,
    GRAIN: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    part_batch, part_head = tl.program_id(0) // blocks, tl.program_id(1)
    batch, head = part_batch + first_batch, part_head + first_head
    block, residue = tl.program_id(0) % blocks // STEP, tl.program_id(0) % blocks % STEP
    r0 = block * (ROWS * STEP)
    first, rows_length, row_low, row_high, low, high = find_band(
        batch, cu_seqlens, key_spans, rows_length, columns_length, PACKED, SPANS, ROWS_ARE_KEYS, GRAIN
    )
    if r0 >= row_high:
        return
    local, start, stop = spread_rows(r0, offset, past, future, low, high, row_low, row_high, residue, GRAIN, ROWS, STEP)
    lowest, highest = window_of(start, stop, ROWS, STEP)
    x = start_of(x, batch, head, first + r0, x_b, x_h, x_l, UNIT)
    tile = load_rows(x, tl.minimum(local, rows_length - 1 - r0), x_l * UNIT, SIZE, BLOCK_SIZE)
    # What is not finite would spread from row to row when the band is multiplied with the identity.
    tile = tl.where(tl.abs(tile.to(tl.float32)) <= LARGEST, tile, 0.0)
    table += head.to(tl.int64) * distances * SIZE
    room = room_of(first, batch, PACKED) + r0
    band = band_of(band, part_batch, part_head, room, band_b, band_h, pitch)
    places = local * (pitch * 16) - start
    shift = STEP * tl.arange(0, ROWS)
    for window in range(lowest, highest, WINDOW):
        e = window - (r0 + residue + offset) + tl.arange(0, WINDOW)
        t = tl.minimum(tl.maximum(direction * e - first_distance, 0), distances - 1)
        product = matmul(tile, tl.trans(load_rows(table, t, SIZE, SIZE, BLOCK_SIZE)), PRECISION)
        if band.dtype.element_ty == tl.float16:
            # By default, both return the other operand for a NaN.
            product = tl.maximum(product * band_scale, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
            product = tl.minimum(product, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        column = window // STEP * STEP + shift[:, None] + tl.arange(0, WINDOW)[None, :]
        inside = (column >= start[:, None]) & (column < stop[:, None])
        tl.store(band + (places[:, None] + column), product.to(band.dtype.element_ty), mask=inside)
