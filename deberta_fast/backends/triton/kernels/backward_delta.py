"""What the kernels of backward need of every query: the shift of its exponents, and Delta of equation 8.

    shift_i = lse_i log2 e,  infinite where a query sees no key: its probabilities are zero then
    Delta_i = dO_i . O_i - dlse_i
"""

import triton
import triton.language as tl

from .tile import load_rows, start_of

INTEGERS = ("o_b", "o_h", "o_l", "do_b", "do_h", "do_l", "dlse_b", "dlse_h", "dlse_l", "delta_b", "delta_h")
INTEGERS += ("length", "blocks")


@triton.jit(do_not_specialize=INTEGERS)
def backward_delta(
    output, lse, grad_output, grad_lse, shift, delta,
    o_b, o_h, o_l, do_b, do_h, do_l, dlse_b, dlse_h, dlse_l, delta_b, delta_h, length, blocks,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(0) // blocks, tl.program_id(1)
    m0 = tl.program_id(0) % blocks * ROWS
    local = tl.arange(0, ROWS)
    inside = local < length - m0
    present = tl.minimum(local, length - 1 - m0)
    o = load_rows(start_of(output, batch, head, m0, o_b, o_h, o_l, UNIT), present, o_l * UNIT, SIZE, BLOCK_SIZE)
    grad_output = start_of(grad_output, batch, head, m0, do_b, do_h, do_l, UNIT)
    do = load_rows(grad_output, present, do_l * UNIT, SIZE, BLOCK_SIZE)
    product = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    grad_lse = start_of(grad_lse, batch, head, m0, dlse_b, dlse_h, dlse_l, 1)
    product -= tl.load(grad_lse + local * dlse_l, mask=inside, other=0.0)
    tl.store(start_of(delta, batch, head, m0, delta_b, delta_h, 1, 1) + local, product, mask=inside)
    lse = tl.load(start_of(lse, batch, head, m0, delta_b, delta_h, 1, 1) + local, mask=inside, other=0.0)
    lse = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    tl.store(start_of(shift, batch, head, m0, delta_b, delta_h, 1, 1) + local, lse, mask=inside)
