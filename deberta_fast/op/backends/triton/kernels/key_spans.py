"""What a padding mask leaves of each batch row's keys, so that what lies outside is never read.

spans[b] = first key, one past the last; and the same again if there are no holes between them, else an empty range
"""

import triton
import triton.language as tl

INTEGERS = ("mask_b", "mask_j", "length")


@triton.jit(do_not_specialize=INTEGERS)
def key_spans(mask, spans, mask_b, mask_j, length, COLUMNS: tl.constexpr):
    batch = tl.program_id(0)
    mask += batch.to(tl.int64) * mask_b
    low, high, count = length, length * 0, length * 0
    for start in range(0, length, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        seen = tl.load(mask + j.to(tl.int64) * mask_j, mask=j < length, other=0) != 0
        low = tl.minimum(low, tl.min(tl.where(seen, j, length)))
        high = tl.maximum(high, tl.max(tl.where(seen, j + 1, 0)))
        count += tl.sum(seen.to(tl.int32))
    low = tl.minimum(low, high)
    tl.store(spans + 4 * batch, low)
    tl.store(spans + 4 * batch + 1, high)
    tl.store(spans + 4 * batch + 2, low)
    tl.store(spans + 4 * batch + 3, tl.where(count == high - low, high, low))
