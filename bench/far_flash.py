"""Far keys by torch's flash attention, merged with near ones by their log-sum-exp: ``python -m bench.far_flash``.

Every block of queries has far keys before and behind it. Attention to each of these two slices is plain attention with
a shifted query and a constant per row (equation 7 of csrc/README.md), so torch's operator computes it. A fused backend
computes attention to the keys between. The question is whether this is faster than the backend's own loop over far
keys. ``merged`` is the whole forward pass; ``far`` and ``near`` are its parts, without the sum of their outputs.
"""

import argparse
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from deberta_fast import backends, disentangled_attention
from deberta_fast.op.relative_position import slot_table

from . import device as devices
from . import timing
from .device import Call, Device, Table, summary
from .variants import relative_difference
from .variants.operator import BUCKETS, LONGEST, VARIANTS, Workload, asked

BLOCKS = (2048, 1024, 4096)  # queries of a block
ALIGN = 64  # Slices of keys begin at multiples of this, because Triton compiles a kernel for each other alignment.
SECONDS = 0.1
BUSY_CYCLES = 10_000_000  # enough to queue dozens of launches before the first one starts
Part = tuple[torch.Tensor, torch.Tensor]  # output (B, H, M, D) and log-sum-exp (B, H, M), natural


class Tensors(NamedTuple):
    """query, key and value (B, H, L, D), tables (H, R, D), position_buckets and max_relative_positions."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pos_key: torch.Tensor
    pos_query: torch.Tensor
    buckets: int
    longest: int

    @property
    def scale(self) -> float:
        return (3 * self.query.shape[-1]) ** -0.5


def attention(x: Tensors, block: int, backend: str) -> torch.Tensor:
    """Computes disentangled attention of whole sequences, one block of queries after the other."""
    output = torch.empty_like(x.query)
    for start, stop, past, future in _blocks(x, block):
        parts = [near(x, start, stop, past, future, backend), *_far_parts(x, start, stop, past, future)]
        output[:, :, start:stop] = merged(parts)
    return output


def merged(parts: list[Part]) -> torch.Tensor:
    """Combines attention to disjoint sets of keys into attention to all of them, in the outputs' dtype."""
    if len(parts) == 1:
        return parts[0][0]
    weights = torch.stack([lse for _, lse in parts]).softmax(0).unsqueeze(-1)
    outputs = (weight * output for weight, (output, _) in zip(weights, parts, strict=True))
    return sum(outputs).to(parts[0][0].dtype)


def near(x: Tensors, start: int, stop: int, past: int, future: int, backend: str) -> Part:
    """Attends to the keys from ``past`` to ``future`` by a fused backend."""
    return disentangled_attention(
        x.query[:, :, start:stop], x.key[:, :, past:future], x.value[:, :, past:future], x.pos_key, x.pos_query,
        position_buckets=x.buckets, max_relative_positions=x.longest, query_offset=start - past, return_lse=True,
        backend=backend,
    )  # fmt: skip


def _far_parts(x: Tensors, start: int, stop: int, past: int, future: int) -> list[Part]:
    slots, length = slot_table(x.buckets, x.longest).slots, x.key.shape[2]
    sides = ((0, past, slots[-1]), (future, length, slots[0]))
    return [far(x, start, stop, first, last, row) for first, last, row in sides if first < last]


def far(x: Tensors, start: int, stop: int, first: int, last: int, row: int) -> Part:
    """Attends to keys that all read one table row, by plain attention with a shifted query; c2p is constant."""
    query = x.query[:, :, start:stop]
    shifted = query + x.pos_query[:, row, None]
    output, lse = _flash(shifted, x.key[:, :, first:last], x.value[:, :, first:last], x.scale)
    constant = (query @ x.pos_key[:, row, :, None]).squeeze(-1)
    return output, lse + x.scale * constant


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> Part:
    if query.is_cuda:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
    else:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    return output, lse[..., : query.shape[2]].float()


def _blocks(x: Tensors, block: int) -> list[tuple[int, int, int, int]]:
    """Lists the blocks of queries [start, stop) with their near keys [past, future); all other keys are far."""
    table, length, keys = slot_table(x.buckets, x.longest), x.query.shape[2], x.key.shape[2]
    found = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        past = min(max(start - table.far_past + 1, 0), keys)
        future = max(min(stop - 1 - table.far_future, keys), past)
        past, future = past // ALIGN * ALIGN, min(-(-future // ALIGN) * ALIGN, keys)
        found.append((start, stop, past, future))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = devices.parser("far_flash", __doc__)
    parser.set_defaults(lengths=[8192, 2048, 16384])
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, metavar="M", help="queries of a block")
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"], choices=("cuda", "triton", "cpu"))
    parser.add_argument("--heads", type=int, default=12, metavar="H")
    options = parser.parse_args(arguments)
    device = Device(options.device)
    device.busy_cycles = BUSY_CYCLES
    notes = (
        f"{options.tokens} tokens, {options.heads} heads of 64, tables of 512 rows, bfloat16, forward. The number "
        f"of a variant counts the queries of a block. difference: from the eager backend's output.\n\n{__doc__}"
    )
    table = Table(
        "far-flash", options.out, notes, lambda rows: summary(rows, "ms", lambda row: timing.cell(row.get("ms")))
    )
    for length in options.lengths:
        workload = Workload(length, max(1, options.tokens // length), options.heads, device=options.device)
        build, differences = _variants(workload, options)
        for name, taken in device.measure(build, SECONDS).items():
            row = {"length": length, "batch": workload.batch, "pass": "forward", "variant": name}
            table.add(row | taken.columns() | {"difference": differences.get(name)})


def _variants(workload: Workload, options: argparse.Namespace) -> tuple[dict[str, Callable[[], Call]], dict]:
    """Returns each variant's call, and the differences of merged outputs from eager's, filled as calls are built."""
    x = Tensors(*(t.detach() for t in (*workload.qkv, *workload.tables)), BUCKETS, LONGEST)
    differences: dict[str, float] = {}

    def whole(name: str, block: int) -> Call:
        run = functools.partial(attention, x, block, name)
        differences[f"{name} merged {block}"] = relative_difference(run(), workload.expected)
        return Call(run)

    def of_variant(name: str) -> Call:
        return VARIANTS[name].build(workload).call("forward")

    def near_only(name: str, block: int) -> Call:
        return Call(lambda: [near(x, *bounds, name) for bounds in _blocks(x, block)])

    def far_only(block: int) -> Call:
        return Call(lambda: [_far_parts(x, *bounds) for bounds in _blocks(x, block)])

    build = {"plain-flash": functools.partial(of_variant, "plain-flash")}
    for name in options.backends:
        if backends.BACKENDS[name].why_not(asked(workload)):
            continue
        build[name] = functools.partial(of_variant, name)
        for block in options.blocks:
            if block < workload.length or block == min(options.blocks):
                build[f"{name} merged {block}"] = functools.partial(whole, name, block)
                build[f"{name} near {block}"] = functools.partial(near_only, name, block)
    for block in options.blocks:
        build[f"far {block}"] = functools.partial(far_only, block)
    return build, differences


if __name__ == "__main__":
    main()
