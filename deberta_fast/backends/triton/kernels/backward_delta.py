"""Delta_i = dO_i . O_i - dlse_i of equation 8, before the kernels that need it of every query."""

import triton
import triton.language as tl

from .tile import load_rows, start_of

INTEGERS = ("o_b", "o_h", "o_l", "do_b", "do_h", "do_l", "dlse_b", "dlse_h", "dlse_l", "delta_b", "delta_h")
INTEGERS += ("length", "blocks")


@triton.jit(do_not_specialize=INTEGERS)
def backward_delta(
    output, grad_output, grad_lse, delta,
    o_b, o_h, o_l, do_b, do_h, do_l, dlse_b, dlse_h, dlse_l, delta_b, delta_h, length, blocks,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    batch, head, zero = tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(1) * 0
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    inside = rows < length
    present = tl.minimum(rows, length - 1)
    o = load_rows(start_of(output, batch, head, zero, o_b, o_h, o_l, UNIT), present, o_l * UNIT, SIZE, BLOCK_SIZE)
    grad_output = start_of(grad_output, batch, head, zero, do_b, do_h, do_l, UNIT)
    do = load_rows(grad_output, present, do_l * UNIT, SIZE, BLOCK_SIZE)
    product = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    grad_lse = start_of(grad_lse, batch, head, zero, dlse_b, dlse_h, dlse_l, 1)
    product -= tl.load(grad_lse + rows.to(tl.int64) * dlse_l, mask=inside, other=0.0)
    tl.store(start_of(delta, batch, head, zero, delta_b, delta_h, 1, 1) + rows, product, mask=inside)
