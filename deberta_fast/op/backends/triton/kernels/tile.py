"""What the kernels share: which rows and columns a program works on, how tiles are loaded, multiplied, dropped out.

Rows are a program's own (queries in a query kernel, keys in a key kernel), columns are the others. For rows that are
queries e = column - row - offset is j - i, for rows that are keys it is i - j: c2p and p2c are one thing, said of the
scores and of their transpose.
"""

import triton
import triton.language as tl


@triton.jit
def find_rows(batch, cu_seqlens, query_length, key_length, PACKED: tl.constexpr):
    """Where a batch row, or packed sequence, begins in the tensors, and its numbers of queries and keys."""
    if PACKED:
        first = tl.load(cu_seqlens + batch)
        query_length = tl.load(cu_seqlens + batch + 1) - first
        key_length = query_length
    else:
        first = batch * 0
    return first, query_length, key_length


@triton.jit
def room_of(first, batch, PACKED: tl.constexpr):
    """Where a batch row's rows begin in the workspace, which has room for whole grains of each: of 128 rows at most."""
    if PACKED:
        first = (first // 128 + batch) * 128  # sequences after one another never overlap
    return tl.multiple_of(first, 128)


@triton.jit
def place_of(batch, head, room, stride_b, stride_h):
    """Where a batch row's entries begin in a vector of the workspace; strides count 16 rows."""
    return (batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h) * 16 + room


@triton.jit
def band_of(band, batch, head, room, stride_b, stride_h, pitch):
    """Pointer to a row of a band; strides count rows, the pitch of a row 16 scores."""
    return band + (batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + room) * pitch * 16


@triton.jit
def find_keys(batch, key_spans, key_length, GRAIN: tl.constexpr, SPANS: tl.constexpr):
    """The keys that a padding mask leaves to a batch row, in whole grains: low <= j < high."""
    low, high = key_length * 0, key_length
    if SPANS:
        low = tl.load(key_spans + 4 * batch) // GRAIN * GRAIN
        high = tl.load(key_spans + 4 * batch + 1)
    return tl.multiple_of(low, GRAIN), tl.multiple_of(tl.cdiv(high, GRAIN) * GRAIN, GRAIN)


@triton.jit
def find_solid_keys(batch, key_spans, key_length, SPANS: tl.constexpr, MASK: tl.constexpr):
    """Keys that every query may attend to, half-open: between them nothing has to be looked up."""
    low, high = key_length * 0, key_length
    if SPANS:
        low = tl.load(key_spans + 4 * batch + 2)
        high = tl.load(key_spans + 4 * batch + 3)
    elif MASK != "none":
        high = low
    return low, high


@triton.jit
def solid_tiles(start, stop, low, high, COLUMNS: tl.constexpr):
    """The tiles from start to stop that lie in low to high; start is a multiple of COLUMNS."""
    first = tl.maximum(tl.cdiv(low, COLUMNS) * COLUMNS, start)
    last = tl.maximum(tl.minimum(high, stop) // COLUMNS * COLUMNS, first)
    return tl.multiple_of(first, COLUMNS), tl.multiple_of(last, COLUMNS)


@triton.jit
def start_of(base, batch, head, row, stride_b, stride_h, stride_l, UNIT: tl.constexpr):
    """Pointer to a row, in 64 bits; strides count UNITs, so that the compiler knows what they divide by."""
    return base + (batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + row.to(tl.int64) * stride_l) * UNIT


@triton.jit
def near_span(first, offset, past, future, low, high, GRAIN: tl.constexpr):
    """The near columns of rows first to first + GRAIN, half-open, in whole grains of [low, high).

    Columns before them lie ``past`` or more behind all of these rows, columns after them ``-future`` or more ahead.
    """
    start = tl.maximum(first + offset - past + 1, 0) // GRAIN * GRAIN
    stop = tl.cdiv(tl.maximum(first + GRAIN - 1 + offset - future, 0), GRAIN) * GRAIN
    start, stop = tl.maximum(start, low), tl.minimum(stop, high)
    return tl.multiple_of(tl.minimum(start, stop), GRAIN), tl.multiple_of(stop, GRAIN)


@triton.jit
def spread_rows(
    r0, offset, past, future, low, high, row_low, row_high, residue,
    GRAIN: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Rows that are STEP apart, r0 + local, and the near columns of each: none of rows outside row_low to row_high."""
    local = STEP * tl.arange(0, ROWS) + residue
    rows = r0 + local
    start, stop = near_span(rows // GRAIN * GRAIN, offset, past, future, low, high, GRAIN)
    there = (rows >= row_low) & (rows < row_high)
    return local, tl.where(there, start, 0), tl.where(there, stop, 0)


@triton.jit
def window_of(start, stop, ROWS: tl.constexpr, STEP: tl.constexpr):
    """What the columns of spread rows begin and end with, where each row's are counted from STEP times its number."""
    shift = STEP * tl.arange(0, ROWS)
    lowest = tl.min(tl.where(start < stop, start - shift, 1 << 30))
    highest = tl.max(tl.where(start < stop, stop - shift, -(1 << 30)))
    return tl.multiple_of(lowest, STEP), highest


@triton.jit
def find_band(
    batch, cu_seqlens, key_spans, rows_length, columns_length,
    PACKED: tl.constexpr, SPANS: tl.constexpr, ROWS_ARE_KEYS: tl.constexpr, GRAIN: tl.constexpr,
):  # fmt: skip
    """First row, number of rows, rows and columns that a band holds, these in whole grains."""
    first, rows_length, columns_length = find_rows(batch, cu_seqlens, rows_length, columns_length, PACKED)
    if ROWS_ARE_KEYS:
        row_low, row_high = find_keys(batch, key_spans, rows_length, GRAIN, SPANS)
        low, high = columns_length * 0, tl.cdiv(columns_length, GRAIN) * GRAIN
    else:
        row_low, row_high = rows_length * 0, tl.cdiv(rows_length, GRAIN) * GRAIN
        low, high = find_keys(batch, key_spans, columns_length, GRAIN, SPANS)
    return first, rows_length, row_low, row_high, low, high


@triton.jit
def skip_rows(base, rows, stride):
    """Pointer ``rows`` rows on, in 64 bits: within a tile 32 are enough."""
    return base + tl.cast(rows, tl.int64) * stride


@triton.jit
def load_rows(base, local, stride, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """(rows, BLOCK_SIZE), zero from SIZE on. The rows must exist."""
    d = tl.arange(0, BLOCK_SIZE)
    pointers = base + (local[:, None] * stride + d[None, :])
    if SIZE == BLOCK_SIZE:
        return tl.load(pointers)
    return tl.load(pointers, mask=(d < SIZE)[None, :], other=0.0)


@triton.jit
def load_rows_below(limit, base, local, stride, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Those rows below ``limit``, for the others zero."""
    d = tl.arange(0, BLOCK_SIZE)
    pointers = base + (local[:, None] * stride + d[None, :])
    return tl.load(pointers, mask=(local < limit)[:, None] & (d < SIZE)[None, :], other=0.0)


@triton.jit
def store_rows(base, local, limit, stride, tile, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Those rows below ``limit``."""
    d = tl.arange(0, BLOCK_SIZE)
    pointers = base + (local[:, None] * stride + d[None, :])
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=(local < limit)[:, None] & (d < SIZE)[None, :])


@triton.jit
def load_table_row(table, head, row, stride_h, stride_l, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """One row of a position table as float32: what a far segment reads."""
    d = tl.arange(0, BLOCK_SIZE)
    table += head.to(tl.int64) * stride_h + row * stride_l
    return tl.load(table + d, mask=d < SIZE, other=0.0).to(tl.float32)


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr):
    """a b in float32. "upcast" is for Triton's interpreter, whose bfloat16 products are wrong."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def matmul_add(a, b, c, PRECISION: tl.constexpr):
    """c + a b in float32."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def identity(SIZE: tl.constexpr, inverse_band_scale, DTYPE: tl.constexpr):
    """What ``add_tile`` multiplies tiles of a band with: undoes their power of two."""
    n = tl.arange(0, SIZE)
    return tl.where(n[:, None] == n[None, :], inverse_band_scale, 0.0).to(DTYPE)


@triton.jit
def add_tile(z, tile, eye, inverse_band_scale, PRECISION: tl.constexpr):
    """z plus a tile of a band.

    In half precision as a product with the identity: exact, and the tile goes from device memory to the tensor cores
    by way of shared memory alone, a step ahead of its use. As an addition it would pass through registers, in another
    order than that of the product's, and with nothing to hide its latency.
    """
    if tile.dtype == tl.float32:
        return z + tile * inverse_band_scale
    return matmul_add(eye, tile, z, PRECISION)


@triton.jit
def hide(z, hiding, columns, key_length, MASK: tl.constexpr):
    """Minus infinity where a query may not attend. ``hiding``: mask, rows, stride of rows and of columns."""
    mask, rows, mask_i, mask_j = hiding
    visible = (columns < key_length)[None, :]
    if MASK == "keys":
        visible = tl.load(mask + columns.to(tl.int64) * mask_j, mask=columns < key_length, other=0)[None, :] != 0
    if MASK == "pairs":
        pairs = mask + rows.to(tl.int64)[:, None] * mask_i + columns.to(tl.int64)[None, :] * mask_j
        visible = tl.load(pairs, mask=visible, other=0) != 0
    return tl.where(visible, z, float("-inf"))


@triton.jit
def kept(dropping, first_key, KEYS: tl.constexpr):
    """Equation 12: True where dropout keeps the probability of (row, key). Four keys a call of the generator.

    ``dropping``: seed, b H + h, rows, and round(p 2^32) - 2^31, which compares as a signed number.
    """
    seed, batch_head, rows, threshold = dropping
    groups = first_key // 4 + tl.arange(0, KEYS // 4)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), groups[None, :], rows[:, None], batch_head, 0, 7)
    even = tl.join(_above(w0, threshold), _above(w2, threshold))
    odd = tl.join(_above(w1, threshold), _above(w3, threshold))
    return tl.reshape(tl.join(even, odd), (rows.shape[0], KEYS)) != 0


@triton.jit
def _above(word, threshold):
    return ((word ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold).to(tl.int8)
