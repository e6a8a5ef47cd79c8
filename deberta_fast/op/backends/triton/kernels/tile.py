"""Device functions that the kernels share: which rows and columns a program works on, tiles, masks, dropout.

Rows are the program's own (queries in a query kernel, keys in a key kernel), columns the others. e is column - row -
offset: j - i where rows are queries, i - j where rows are keys. c2p and p2c are the same computation, on the scores and
on their transpose. Near and far segments, and what the workspace holds of a sequence, are aligned to ALIGN rows.
"""

import inspect
from collections.abc import Callable

import triton
import triton.language as tl


def kernel(first_integer: str) -> Callable:
    """``triton.jit`` for a kernel that serves all lengths and strides: no integer becomes a constant of it.

    Args:
        first_integer: the first parameter after the pointers.
    """

    def decorate(function):
        parameters = inspect.signature(function).parameters
        numbers = [name for name, x in parameters.items() if x.annotation is not tl.constexpr]
        return triton.jit(function, do_not_specialize=numbers[numbers.index(first_integer) :])

    return decorate


@triton.jit
def sequence_bounds(batch, cu_seqlens, query_length, key_length, PACKED: tl.constexpr):
    """Returns the first row of a batch row or packed sequence, and its numbers of queries and keys."""
    if PACKED:
        first = tl.load(cu_seqlens + batch)
        query_length = tl.load(cu_seqlens + batch + 1) - first
        key_length = query_length
    else:
        first = batch * 0
    return first, query_length, key_length


@triton.jit
def workspace_row(first, batch, PACKED: tl.constexpr):
    """Returns the first row of a sequence in the workspace, where each sequence takes a multiple of 128 rows."""
    if PACKED:
        first = (first // 128 + batch) * 128  # successive sequences never overlap
    return tl.multiple_of(first, 128)


@triton.jit
def vector_offset(batch, head, workspace, stride_b, stride_h):
    """Returns the offset of a row in a vector of the workspace; strides count 16 rows."""
    return (batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h) * 16 + workspace


@triton.jit
def band_pointer(band, batch, head, workspace, stride_b, stride_h, pitch):
    """Returns a pointer to a row of a band; strides count rows, the pitch of a row counts 16 scores."""
    return band + (tl.cast(batch, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h + workspace) * pitch * 16


@triton.jit
def visible_span(batch, key_spans, key_length, ALIGN: tl.constexpr, SPANS: tl.constexpr):
    """Returns the aligned range of keys that a padding mask leaves to a batch row: low <= j < high."""
    low, high = key_length * 0, key_length
    if SPANS:
        low = tl.load(key_spans + 4 * batch) // ALIGN * ALIGN
        high = tl.load(key_spans + 4 * batch + 1)
    return tl.multiple_of(low, ALIGN), tl.multiple_of(tl.cdiv(high, ALIGN) * ALIGN, ALIGN)


@triton.jit
def unmasked_span(batch, key_spans, key_length, SPANS: tl.constexpr, MASK: tl.constexpr):
    """Returns a range of keys, low <= j < high, that every query may attend to: no mask has to be read there."""
    low, high = key_length * 0, key_length
    if SPANS:
        low = tl.load(key_spans + 4 * batch + 2)
        high = tl.load(key_spans + 4 * batch + 3)
    elif MASK != "none":
        high = low
    return low, high


@triton.jit
def full_tiles(start, stop, low, high, BLOCK_N: tl.constexpr):
    """Returns the range of whole tiles from start to stop that lie in [low, high); start is a multiple of BLOCK_N."""
    first = tl.maximum(tl.cdiv(low, BLOCK_N) * BLOCK_N, start)
    last = tl.maximum(tl.minimum(high, stop) // BLOCK_N * BLOCK_N, first)
    return tl.multiple_of(first, BLOCK_N), tl.multiple_of(last, BLOCK_N)


@triton.jit
def row_pointer(base, batch, head, row, stride_b, stride_h, stride_l, UNIT: tl.constexpr):
    """Returns a pointer to a row, in 64 bits. Strides count UNITs, which tells the compiler their divisibility."""
    return base + (batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + row.to(tl.int64) * stride_l) * UNIT


@triton.jit
def near_span(first, offset, past, future, low, high, ALIGN: tl.constexpr):
    """Returns the aligned range of near columns of rows first to first + ALIGN, within [low, high).

    Columns before it lie ``past`` or more behind all of these rows, columns after it ``-future`` or more ahead.
    """
    start = tl.maximum(first + offset - past + 1, 0) // ALIGN * ALIGN
    stop = tl.cdiv(tl.maximum(first + ALIGN - 1 + offset - future, 0), ALIGN) * ALIGN
    start, stop = tl.maximum(start, low), tl.minimum(stop, high)
    return tl.multiple_of(tl.minimum(start, stop), ALIGN), tl.multiple_of(stop, ALIGN)


@triton.jit
def strided_rows(
    r0, offset, past, future, low, high, row_low, row_high, residue,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Returns BLOCK_M rows that are STEP apart, relative to r0, and the range of near columns of each.

    The range is empty for rows outside [row_low, row_high).
    """
    offs_m = STEP * tl.arange(0, BLOCK_M) + residue
    rows = r0 + offs_m
    start, stop = near_span(rows // ALIGN * ALIGN, offset, past, future, low, high, ALIGN)
    inside = (rows >= row_low) & (rows < row_high)
    return offs_m, tl.where(inside, start, 0), tl.where(inside, stop, 0)


@triton.jit
def column_window(start, stop, BLOCK_M: tl.constexpr, STEP: tl.constexpr):
    """Returns the range of columns of strided rows, where row r counts its columns from STEP r."""
    shift = STEP * tl.arange(0, BLOCK_M)
    lowest = tl.min(tl.where(start < stop, start - shift, 1 << 30))
    highest = tl.max(tl.where(start < stop, stop - shift, -(1 << 30)))
    return tl.multiple_of(lowest, STEP), highest


@triton.jit
def rows_are_keys(term, C2P: tl.constexpr, P2C: tl.constexpr):
    """Returns whether the rows of a program are keys. A launch for both position terms has those of c2p first."""
    if C2P and P2C:
        return term == 1
    return P2C


@triton.jit
def of_term(keys, for_keys, for_queries):
    """Returns the argument of a program whose rows are keys or queries."""
    if for_keys is None:
        chosen = for_queries
    elif for_queries is None:
        chosen = for_keys
    else:
        chosen = tl.where(keys, for_keys, for_queries)
    return chosen


@triton.jit
def term_geometry(keys, offset, far_past, far_future):
    """Returns offset, past and future as ``near_span`` takes them, and the sign of e in a distance i - j."""
    past, future = of_term(keys, -far_future, far_past), of_term(keys, -far_past, far_future)
    return of_term(keys, -offset, offset), past, future, tl.where(keys, 1, -1)


@triton.jit
def band_bounds(
    batch, keys, cu_seqlens, key_spans, query_length, key_length,
    PACKED: tl.constexpr, SPANS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Returns a sequence's first row and number of rows, and the aligned ranges of rows and columns in its band."""
    first, query_length, key_length = sequence_bounds(batch, cu_seqlens, query_length, key_length, PACKED)
    key_low, key_high = visible_span(batch, key_spans, key_length, ALIGN, SPANS)
    query_low, query_high = query_length * 0, tl.cdiv(query_length, ALIGN) * ALIGN
    rows_length = of_term(keys, key_length, query_length)
    row_low, row_high = of_term(keys, key_low, query_low), of_term(keys, key_high, query_high)
    low, high = of_term(keys, query_low, key_low), of_term(keys, query_high, key_high)
    return first, rows_length, row_low, row_high, low, high


@triton.jit
def advance_rows(base, rows, stride):
    """Returns a pointer ``rows`` further, in 64 bits; offsets within a tile fit 32."""
    return base + tl.cast(rows, tl.int64) * stride


@triton.jit
def load_rows(base, offs, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads (rows, BLOCK_D), zero from HEAD_DIM on. The rows must exist."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + (offs[:, None] * stride + d[None, :])
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_rows_below(limit, base, offs, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads (rows, BLOCK_D), zero from HEAD_DIM on and for rows from ``limit`` on."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + (offs[:, None] * stride + d[None, :])
    return tl.load(pointers, mask=(offs < limit)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(base, offs, limit, stride, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores the rows of a tile (rows, BLOCK_D) below ``limit``."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + (offs[:, None] * stride + d[None, :])
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=(offs < limit)[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def load_table_row(table, head, row, stride_h, stride_l, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads the row of a position table that a far segment reads, (BLOCK_D,) in float32."""
    d = tl.arange(0, BLOCK_D)
    table += head.to(tl.int64) * stride_h + row * stride_l
    return tl.load(table + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit
def scaled_identity(SIZE: tl.constexpr, inverse_band_scale, DTYPE: tl.constexpr):
    """Returns the matrix (SIZE, SIZE) by which ``add_band_tile`` multiplies: it undoes the scale of the band."""
    n = tl.arange(0, SIZE)
    return tl.where(n[:, None] == n[None, :], inverse_band_scale, 0.0).to(DTYPE)


@triton.jit
def add_band_tile(z, tile, eye, inverse_band_scale, PRECISION: tl.constexpr):
    """Returns z plus a tile of a band.

    Half precision adds by a product with the identity. The product is exact, and the tile goes from device memory
    through shared memory to the tensor cores, one step ahead of its use. An addition would load it into registers, in a
    layout other than the product's, and nothing would hide the latency.
    """
    if tile.dtype == tl.float32:
        return z + tile * inverse_band_scale
    return tl.dot(eye, tile, z, input_precision=PRECISION)


@triton.jit
def apply_mask(z, mask_args, columns, key_length, MASK: tl.constexpr):
    """Returns z (rows, columns) with minus infinity where a query may not attend.

    ``mask_args``: mask, rows, stride of rows, stride of columns.
    """
    mask, rows, mask_i, mask_j = mask_args
    visible = (columns < key_length)[None, :]
    if MASK == "keys":
        visible = tl.load(mask + columns.to(tl.int64) * mask_j, mask=columns < key_length, other=0)[None, :] != 0
    if MASK == "pairs":
        pairs = mask + rows.to(tl.int64)[:, None] * mask_i + columns.to(tl.int64)[None, :] * mask_j
        visible = tl.load(pairs, mask=visible, other=0) != 0
    return tl.where(visible, z, float("-inf"))


@triton.jit
def dropout_origin(seed, batch, head, heads, ORIGIN: tl.constexpr):
    """Returns where equation 12 begins to count for a head: first row, first group of eight keys, and b H + h.

    ORIGIN: the seed has an origin.
    """
    if ORIGIN:
        batch_head = tl.load(seed + 3) + batch * tl.load(seed + 4) + head
        return tl.load(seed + 1).to(tl.int32), (tl.load(seed + 2) // 8).to(tl.int32), batch_head.to(tl.int32)
    return 0, 0, batch * heads + head


@triton.jit
def keep_mask(dropout_args, first_key, KEYS: tl.constexpr):
    """Returns the dropout mask (rows, KEYS) of equation 12. The generator makes eight keys per call.

    ``dropout_args``: seed, b H + h, rows, the first group of eight keys, and the threshold.
    """
    seed, batch_head, rows, first_group, threshold = dropout_args
    groups = first_group + first_key // 8 + tl.arange(0, KEYS // 8)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), groups[None, :], rows[:, None], batch_head, 0, 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # in the order of their numbers
    # The layout of the scores differs. Moving 16 bits a key there takes fewer instructions than moving the mask.
    halves = tl.join((words & 0xFFFF).to(tl.uint16), (words >> 16).to(tl.uint16))
    return tl.reshape(halves, (rows.shape[0], KEYS)).to(tl.int32) >= threshold
