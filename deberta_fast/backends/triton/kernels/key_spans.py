"""The first and one past the last key that a padding mask leaves to each batch row: what lies outside is never read."""

import triton
import triton.language as tl

INTEGERS = ("mask_b", "mask_j", "length")


@triton.jit(do_not_specialize=INTEGERS)
def key_spans(mask, spans, mask_b, mask_j, length, COLUMNS: tl.constexpr):
    batch = tl.program_id(0)
    mask += batch.to(tl.int64) * mask_b
    low, high = length, length * 0
    for start in range(0, length, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        seen = tl.load(mask + j.to(tl.int64) * mask_j, mask=j < length, other=0) != 0
        low = tl.minimum(low, tl.min(tl.where(seen, j, length)))
        high = tl.maximum(high, tl.max(tl.where(seen, j + 1, 0)))
    tl.store(spans + 2 * batch, low)
    tl.store(spans + 2 * batch + 1, high)
