"""What the kernels of backward need of every query: the shift of its exponents, and Delta of equation 8.

shift_i = lse_i log2 e,  infinite where a query sees no key: its probabilities are zero then
Delta_i = dO_i . O_i - dlse_i
"""

import triton
import triton.language as tl

from .tile import find_rows, load_rows, place_of, room_of, start_of

INTEGERS = (
    "o_b", "o_h", "o_l", "do_b", "do_h", "do_l", "lse_b", "lse_h", "dlse_b", "dlse_h", "dlse_l", "delta_b", "delta_h",
    "query_length", "key_length", "blocks",
)  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def backward_delta(
    output, lse, grad_output, grad_lse, cu_seqlens, shift, delta,
    o_b, o_h, o_l, do_b, do_h, do_l, lse_b, lse_h, dlse_b, dlse_h, dlse_l, delta_b, delta_h,
    query_length, key_length, blocks,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(0) // blocks, tl.program_id(1)
    m0 = tl.program_id(0) % blocks * ROWS
    first, query_length, key_length = find_rows(batch, cu_seqlens, query_length, key_length, PACKED)
    if m0 >= query_length:
        return
    local = tl.arange(0, ROWS)
    present = tl.minimum(local, query_length - 1 - m0)
    output = start_of(output, batch, head, first + m0, o_b, o_h, o_l, UNIT)
    o = load_rows(output, present, o_l * UNIT, SIZE, BLOCK_SIZE)
    grad_output = start_of(grad_output, batch, head, first + m0, do_b, do_h, do_l, UNIT)
    do = load_rows(grad_output, present, do_l * UNIT, SIZE, BLOCK_SIZE)
    product = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    product -= tl.load(start_of(grad_lse, batch, head, first + m0, dlse_b, dlse_h, dlse_l, 1) + present * dlse_l)
    lse = tl.load(start_of(lse, batch, head, first + m0, lse_b, lse_h, 1, 1) + present)
    # Rows up to the end of the grain are not there: no probability either.
    sees = (lse != float("-inf")) & (local < query_length - m0)
    place = place_of(batch, head, room_of(first, batch, PACKED), delta_b, delta_h) + m0
    tl.store(shift + place + local, tl.where(sees, lse * 1.4426950408889634, float("inf")))
    tl.store(delta + place + local, tl.where(sees, product, 0.0))
