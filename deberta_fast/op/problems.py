"""Small calls of disentangled attention that together reach every kind of tile of a fused backend.

Tiles are at most 128 x 128. With a table that is constant from distance 32 on, 400 rows have far-left, near and
far-right tiles and a partial last one. A mask of keys hides whole tiles at either end.
"""

from typing import NamedTuple

import torch

from .call import Call
from .dropout import seed_at
from .relative_position import slot_table


class Kind(NamedTuple):
    """The settings that, with dtype and head size, decide which code of a backend a call runs.

    ``mask`` is "none", "keys" (the same for all heads and queries) or "pairs". ``origin`` tells whether the dropout
    seed has one.
    """

    c2p: bool = True
    p2c: bool = True
    mask: str = "none"
    packed: bool = False
    dropout: bool = False
    origin: bool = False

    @classmethod
    def of(cls, call: Call) -> "Kind":
        mask = call.mask
        which = "none" if mask is None else "keys" if mask.shape[1] == mask.shape[2] == 1 else "pairs"
        packed, dropout = call.cu_seqlens is not None, call.seed is not None
        origin = call.seed is not None and len(call.seed) > 1
        return cls(call.pos_key is not None, call.pos_query is not None, which, packed, dropout, origin)

    def __str__(self) -> str:
        terms = " and ".join(name for name, has in (("c2p", self.c2p), ("p2c", self.p2c)) if has) or "no positions"
        masks = {"none": [], "keys": ["mask of keys"], "pairs": ["pairwise mask"]}[self.mask]
        dropout = "dropout with an origin" if self.origin else "dropout"
        return ", ".join([terms, *masks, *["packed"] * self.packed, *[dropout] * self.dropout])


# The kinds of calls that the models of this package and of Hugging Face make: 19 problems.
COMMON = (
    Kind(),
    Kind(mask="keys"),
    Kind(mask="keys", dropout=True),
    Kind(packed=True),
    Kind(packed=True, dropout=True),
    Kind(p2c=False, mask="keys"),
    Kind(c2p=False, mask="keys"),
)


class Problem(NamedTuple):
    """The shape of one call: dense, ``batch`` times ``lengths`` = (Lq, Lk), or packed, one sequence per length."""

    name: str
    kind: Kind
    lengths: tuple[int, ...]
    batch: int = 2
    heads: int = 4
    buckets: int = 16
    longest: int = 32
    far_negative: str = "hf"
    offset: int = 0
    hidden: str = "right"  # keys that a mask hides: "right" or "left" padding, "holes" and a whole row, or "nothing"

    def __str__(self) -> str:
        masked = {"none": "", "keys": self.hidden if self.hidden == "holes" else f"{self.hidden} padding"}
        mask = masked.get(self.kind.mask, "pairwise mask")
        return ", ".join(word for word in (self.name, mask, "dropout" if self.kind.dropout else "") if word)


def problems(kind: Kind) -> list[Problem]:
    """Returns the two or three problems that a backend must solve before it is trusted with calls of this kind."""
    if kind.packed:
        return [
            Problem("packed, far left to far right", kind, (1, 130, 0, 400, 64), batch=1, far_negative="ms"),
            Problem("packed, a row per distance", kind, (300, 17, 129), batch=1, buckets=-1, longest=40, hidden="left"),
        ]
    return [
        Problem("short", kind, (100, 100), batch=6, hidden="holes"),
        Problem("far left to far right", kind, (400, 330), offset=37, far_negative="ms"),
        Problem("near, table of v3", kind, (300, 300), buckets=256, longest=512, hidden="left"),
    ]


def call_of(problem: Problem, dtype: torch.dtype, head_size: int, draw: int = 1) -> Call:
    """Makes the unit-variance inputs of a problem on the CPU; the same ``draw`` gives the same numbers."""
    random = torch.Generator().manual_seed(draw)
    kind, heads, lengths = problem.kind, problem.heads, problem.lengths
    rows, keys = (sum(lengths),) * 2 if kind.packed else lengths

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float32).to(dtype)

    table = slot_table(problem.buckets, problem.longest, problem.far_negative)
    query = normal(problem.batch, heads, rows, head_size)
    key, value = normal(2, problem.batch, heads, keys, head_size)
    pos_key, pos_query = normal(2, heads, table.rows, head_size)
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Call(
        query,
        key,
        value,
        pos_key if kind.c2p else None,
        pos_query if kind.p2c else None,
        _mask(problem, rows, keys, random),
        cu_seqlens=ends if kind.packed else None,
        seed=_seed(kind, heads),
        position_buckets=problem.buckets,
        max_relative_positions=problem.longest,
        far_negative=problem.far_negative,
        first_slot=0,
        query_offset=problem.offset,
        max_seqlen=max(lengths) if kind.packed else rows,
        scale=(head_size * (1 + kind.c2p + kind.p2c)) ** -0.5,
        dropout_p=0.1 if kind.dropout else 0.0,
    )


def _seed(kind: Kind, heads: int) -> torch.Tensor | None:
    if not kind.dropout:
        return None
    seed = torch.tensor([20260129])
    return seed_at(seed, first_row=1001, first_key=2008, first_batch_head=3, heads=heads + 5) if kind.origin else seed


def _mask(problem: Problem, rows: int, keys: int, random: torch.Generator) -> torch.Tensor | None:
    """(B, 1, 1, Lk), (B, 1, Lq, Lk) or None."""
    kind, batch = problem.kind, problem.batch
    if kind.mask == "none":
        return None
    if problem.hidden == "nothing":
        return torch.ones(batch, 1, rows if kind.mask == "pairs" else 1, keys, dtype=torch.bool)
    if kind.mask == "pairs":
        return _uniform(random, batch, 1, rows, keys) > 0.5
    if kind.packed or problem.hidden == "holes":
        visible = _uniform(random, batch, keys) > 0.4
        if batch > 1:
            visible[-1] = False  # a text that is all padding
    else:
        lengths = torch.tensor([keys * 3 // 5 - 50 * b for b in range(batch)])
        visible = torch.arange(keys) < lengths[:, None]
        visible = visible.flip(-1) if problem.hidden == "left" else visible
    return visible[:, None, None]


def _uniform(random: torch.Generator, *shape: int) -> torch.Tensor:
    # An explicit dtype makes the numbers independent of torch's default dtype
    return torch.rand(*shape, generator=random, dtype=torch.float32)
