"""The range of keys that a padding mask leaves per batch row: kernels read nothing outside it.

spans[b] = first key, one past the last key, and the same range again if it has no holes, else an empty range
"""

import triton.language as tl

from .tile import kernel


@kernel(first_integer="mask_b")
def key_spans(mask, spans, mask_b, mask_j, length, BLOCK_N: tl.constexpr):
    batch = tl.program_id(0)
    mask += batch.to(tl.int64) * mask_b
    low, high, count = length, length * 0, length * 0
    for start in range(0, length, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        seen = tl.load(mask + j.to(tl.int64) * mask_j, mask=j < length, other=0) != 0  # (BLOCK_N,)
        low = tl.minimum(low, tl.min(tl.where(seen, j, length)))
        high = tl.maximum(high, tl.max(tl.where(seen, j + 1, 0)))
        count += tl.sum(seen.to(tl.int32))
    low = tl.minimum(low, high)
    tl.store(spans + 4 * batch, low)
    tl.store(spans + 4 * batch + 1, high)
    tl.store(spans + 4 * batch + 2, low)
    tl.store(spans + 4 * batch + 3, tl.where(count == high - low, high, low))
