"""The named situations in which every backend is compared with the reference."""

from dataclasses import dataclass

import torch

from deberta_fast import backends
from deberta_fast.op.call import Call
from deberta_fast.op.relative_position import slot_table

DROPOUT_SEED = 7  # what a caller hands to torch.manual_seed
TENSORS = ("query", "key", "value", "pos_key", "pos_query")


@dataclass(frozen=True)
class Case:
    """Small tables by default, so that far segments occur at lengths a test can afford."""

    name: str
    query_length: int = 129
    key_length: int = 129
    batch: int = 2
    heads: int = 3
    size: int = 64
    buckets: int = 16
    longest: int = 32
    c2p: bool = True
    p2c: bool = True
    mask: str | None = None
    offset: int = 0
    far_negative: str = "hf"
    window: bool = False  # the tables hold only the rows that the lengths can reach
    fused_qkv: bool = False  # query, key, value as views of one projection
    dropout_p: float = 0.0
    device: str = "cpu"  # where the tensors lie; their values are drawn on the CPU, so every device gets the same


CASES = [
    Case("one-token", 1, 1),
    Case("L7-D8", 7, 7, size=8),
    Case("exact-tile-L128-D64", 128, 128),
    Case("ragged-L129-D64"),
    Case("ragged-L129-D64-c2p-only", p2c=False),
    Case("ragged-L129-D64-p2c-only", c2p=False),
    Case("ragged-L129-D64-neither", c2p=False, p2c=False),
    Case("far-L700", 700, 700, batch=1, heads=2, size=16),
    Case("v3-table-L1100", 1100, 1100, batch=1, heads=1, size=32, buckets=256, longest=512),
    Case("ms-rule-L300", 300, 300, batch=1, far_negative="ms"),
    Case("v1-no-buckets-L200", 200, 200, buckets=-1, longest=40),
    Case("v1-shorter-than-table-L50", 50, 50, buckets=-1, longest=64),
    Case("right-padding-L200", 200, 200, mask="right"),
    Case("left-padding-L200", 200, 200, mask="left"),
    Case("holes-L200", 200, 200, mask="holes"),
    Case("whole-row-padded-L140", 140, 140, mask="empty"),
    Case("pairwise-mask-L150", 150, 150, mask="pairwise"),
    Case("block-diagonal-mask-L150", 150, 150, mask="blocks"),
    Case("mask-per-head-L70", 70, 70, mask="heads"),
    Case("short-query-offset-at-end", 9, 260, offset=251),
    Case("long-query-Lq300-Lk70", 300, 70),
    Case("negative-offset-all-far", 40, 90, offset=-500),
    Case("table-window-L20", 20, 20, window=True),
    Case("fused-qkv-views-L129-D24", size=24, fused_qkv=True),
    Case("D80-L65", 65, 65, size=80),
    Case("D256-L65", 65, 65, heads=1, size=256),
    Case("dropout-L140", 140, 140, mask="right", dropout_p=0.3),
    Case("no-keys", 5, 0),
]
BY_NAME = {case.name: case for case in CASES}


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> Call:
    """Unit-variance inputs of a case. Every dtype rounds the same numbers."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=random).to(dtype).to(case.device)

    batch, heads, size = case.batch, case.heads, case.size
    if case.fused_qkv:
        joined = normal(batch, case.query_length, heads * 3 * size).unflatten(-1, (heads, -1)).transpose(1, 2)
        query, key, value = joined.chunk(3, -1)
    else:
        query = normal(batch, heads, case.query_length, size)
        key, value = normal(batch, heads, case.key_length, size), normal(batch, heads, case.key_length, size)
    table = slot_table(case.buckets, case.longest, case.far_negative)
    first, stop = table.window(case.query_length, case.key_length, case.offset) if case.window else (0, table.rows)
    pos_key, pos_query = (normal(heads, table.rows, size)[:, first:stop] for _ in range(2))
    return Call(
        query,
        key,
        value,
        pos_key if case.c2p else None,
        pos_query if case.p2c else None,
        None if (mask := _mask(case, random)) is None else mask.to(case.device),
        cu_seqlens=None,
        seed=seed_after(DROPOUT_SEED, case.device) if case.dropout_p else None,
        position_buckets=case.buckets,
        max_relative_positions=case.longest,
        far_negative=case.far_negative,
        first_slot=first,
        query_offset=case.offset,
        max_seqlen=case.query_length,
        scale=(size * (1 + case.c2p + case.p2c)) ** -0.5,
        dropout_p=case.dropout_p,
    )


def seed_after(manual_seed: int, device: str = "cpu") -> torch.Tensor:
    """The seed that ``new_seed`` draws first after ``torch.manual_seed``."""
    generator = torch.Generator(device).manual_seed(manual_seed)
    return torch.randint(0, 2**63 - 1, (1,), generator=generator, device=device)


def _mask(case: Case, random: torch.Generator) -> torch.Tensor | None:
    """The mask of a case, of shape (B or 1, H or 1, Lq or 1, Lk), or None."""
    batch, rows, keys = case.batch, case.query_length, case.key_length
    lengths = torch.tensor([keys, *(max(1, keys * 2 // 3 - 5 * b) for b in range(1, batch))])
    valid = torch.arange(keys) < lengths[:, None]
    some = torch.rand(batch, keys, generator=random) > 0.4
    # The block-diagonal mask separates packed sequences. Row 3 of the pairwise mask sees no key.
    segment = torch.arange(keys) // 37
    pairwise = (torch.rand(batch, 1, rows, keys, generator=random) > 0.5) & (torch.arange(rows) != 3)[:, None]
    return {
        None: lambda: None,
        "right": lambda: valid[:, None, None],
        "left": lambda: valid.flip(-1)[:, None, None],
        "late": lambda: (torch.arange(keys) > keys * 3 // 5)[None, None, None],
        "holes": lambda: some[:, None, None],
        "empty": lambda: (valid & (torch.arange(batch) > 0)[:, None])[:, None, None],
        "pairwise": lambda: pairwise,
        "blocks": lambda: (segment[:, None] == segment)[None, None],
        "heads": lambda: torch.rand(1, case.heads, rows, keys, generator=random) > 0.3,
    }[case.mask]()


# Backends that take CPU tensors; tests/op/triton_interpreted.py and tests/op/test_gpu.py test the others.
ON_CPU = [
    name for name, reasons in backends.why_not(make_inputs(BY_NAME["one-token"], torch.float32)).items() if not reasons
]


def as_dtype(inputs: Call, dtype: torch.dtype) -> Call:
    """The same inputs cast to another dtype, as leaves that require gradients."""
    cast = {
        name: None if x is None else x.detach().to(dtype).requires_grad_()
        for name, x in ((name, getattr(inputs, name)) for name in TENSORS)
    }
    return inputs._replace(**cast)


def forward_and_gradients(attention, inputs: Call) -> dict[str, torch.Tensor]:
    """Output, log-sum-exp and the gradients of all tensors, under one fixed cotangent.

    Rows that see no key are set to zero and have no part in the loss, because Hugging Face's code gives other results
    there.
    """
    output, lse = attention(inputs)
    random = torch.Generator().manual_seed(99)
    grad_output = torch.randn(output.shape, dtype=torch.float64, generator=random).to(output.device)
    grad_lse = torch.randn(lse.shape, dtype=torch.float64, generator=random).to(lse.device)
    seen = torch.full((*lse.shape[:-1], 1), inputs.key.shape[2] > 0, device=lse.device)
    if inputs.mask is not None:
        seen = inputs.mask.any(-1)
    seen = seen.expand(lse.shape)
    lse = lse.masked_fill(~seen, 0.0)
    output = output.masked_fill(~seen[..., None], 0.0)
    leaves = {name: x for name in TENSORS if (x := getattr(inputs, name)) is not None}
    loss = (output.double() * grad_output).sum() + (lse.double() * grad_lse).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"output": output, "lse": lse} | {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}
