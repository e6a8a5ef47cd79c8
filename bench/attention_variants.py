"""What ``attention_gpu`` compares: disentangled attention in several ways, and plain attention of the same shape.

NAME          ours, for every backend without objection; NAME-mask and NAME-packed where there is padding
plain-*       torch's scaled_dot_product_attention without position terms, by each of its backends; with padding
              also -mask, where only one takes a mask, and plain-packed, torch's varlen_attn
hf-eager      the order of operations of Hugging Face's code, in the dtype of the inputs: dense, matmul and gather
flex          torch's FlexAttention, compiled; reads both position terms from tables (B, H, L, R) by row number
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import deberta_fast
from deberta_fast import backends
from deberta_fast.op.relative_position import distance_slots, slot_table

from .device import Call

SIZE, BUCKETS, LONGEST = 64, 256, 512  # DeBERTa-v3's heads and table
PLAIN = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Matrices of the size of the scores that eager code holds at once, estimated: only to ask first where it cannot fit.
EAGER_MATRICES = 6


class Variant(NamedTuple):
    """A forward call, what it differentiates, and the gradient that its output gets."""

    forward: Callable[[], torch.Tensor]
    leaves: list[torch.Tensor]
    gradient: torch.Tensor
    exact: bool  # computes disentangled attention

    def results(self, passes: str) -> int:
        """Bytes of what a call cannot but leave behind."""
        kept = [self.gradient] + (self.leaves if "backward" in passes else [])
        return sum(x.numel() * x.element_size() for x in kept)


def build_call(variant: Variant, passes: str) -> Call:
    """The call of a pass; for backward alone, the forward pass is behind it."""

    def reset():
        for leaf in variant.leaves:
            leaf.grad = None

    def forward():
        with torch.no_grad():
            return variant.forward()

    if passes == "forward":
        return Call(forward)
    if passes == "forward+backward":
        return Call(lambda: variant.forward().backward(variant.gradient), reset)
    output = variant.forward()
    return Call(lambda: output.backward(variant.gradient, retain_graph=True), reset)


class Workload:
    """Random inputs of one shape, laid out as a layer's projections make them, and packed where there is padding."""

    def __init__(
        self, length: int, batch: int, heads: int, dtype: torch.dtype, device: str, dropout_p: float, padding: float
    ):
        torch.manual_seed(0)
        self.length, self.batch, self.heads, self.dropout_p = length, batch, heads, dropout_p
        normal = functools.partial(torch.randn, dtype=dtype, device=device)
        *self.qkv, self.gradient = (normal(batch, length, heads, SIZE).transpose(1, 2) for _ in range(4))
        self.tables = [normal(heads, 2 * BUCKETS, SIZE) for _ in range(2)]
        for x in (*self.qkv, *self.tables):
            x.requires_grad_()
        self.lengths, self.mask = [length] * batch, None
        if padding:
            self._pad(padding)

    def _pad(self, share: float) -> None:
        # Longer and shorter sequences alternate; one alone has just its share.
        mean = 1 - share
        spread = 0.0 if self.batch == 1 else min(mean, share) / 2
        self.lengths = [max(1, round(self.length * (mean + spread * (-1) ** b))) for b in range(self.batch)]
        device = self.gradient.device
        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        self.mask = torch.arange(self.length, device=device) < torch.tensor(self.lengths, device=device)[:, None]
        self.ends, self.longest = ends.to(device, torch.int32), max(self.lengths)
        self.packed_qkv = [self.pack(x.detach()).requires_grad_() for x in self.qkv]
        self.packed_gradient = self.pack(self.gradient)

    def pack(self, heads: torch.Tensor) -> torch.Tensor:
        """(B, H, L, D) to (T, H, D), the valid tokens."""
        return heads.transpose(1, 2)[self.mask]

    def square_terms(self) -> int:
        """The length^2 size of all heads and sequences, of valid tokens."""
        return self.heads * SIZE * sum(n * n for n in self.lengths)

    @functools.cached_property
    def slots(self) -> torch.Tensor:
        """Row numbers by distance, for i - j from 1 - L to L - 1, int64."""
        table = slot_table(BUCKETS, LONGEST)
        return distance_slots(table, torch.arange(1 - self.length, self.length, device=self.gradient.device))

    @functools.cached_property
    def buckets(self) -> torch.Tensor:
        """What Hugging Face's encoder makes once for all layers: bucketed i - j, (L, L), int64, not yet clamped."""
        distances = torch.arange(1 - self.length, self.length, device=self.gradient.device)
        size = BUCKETS - distance_slots(slot_table(BUCKETS, LONGEST), -distances.abs())
        i = torch.arange(self.length, device=self.gradient.device)
        return (distances.sign() * size)[i[:, None] - i + self.length - 1]

    @functools.cached_property
    def expected(self) -> torch.Tensor:
        """What exact variants give where nothing is dropped: the eager backend's output."""
        with torch.no_grad():
            return ours(self, "eager", dropout_p=0.0)

    def difference(self, variant: Variant) -> float | None:
        """Relative difference of an exact variant's output on valid tokens, in norm; None where that says nothing."""
        if not variant.exact or self.dropout_p:
            return None
        try:
            with torch.no_grad():
                got, want = variant.forward(), self.expected
        except Exception:
            return None  # said where it is timed
        if self.mask is not None:
            got, want = (x if x.dim() == 3 else self.pack(x) for x in (got, want))
        got, want = got.float(), want.float()
        return float((got - want).norm() / want.norm())


def variants(workload: Workload) -> dict[str, Variant]:
    """By name, those that make sense for this workload."""
    w = workload
    dense = [*w.qkv, *w.tables]

    def variant(forward, leaves=dense, gradient=w.gradient, exact=True):
        return Variant(forward, leaves, gradient, exact)

    found = {}
    for name, backend in backends.BACKENDS.items():
        if name == "reference" or backend.why_not(asked(w)):
            continue
        forward = functools.partial(ours, w, name, w.dropout_p)
        if w.mask is None:
            found[name] = variant(forward)
            continue
        found[f"{name}-mask"] = variant(forward)
        packed = functools.partial(ours_packed, w, name)
        found[f"{name}-packed"] = variant(packed, [*w.packed_qkv, *w.tables], w.packed_gradient)
    for name, kernel in PLAIN.items():
        found[f"plain-{name}"] = variant(functools.partial(plain, w, kernel), w.qkv, exact=False)
    if w.mask is not None:
        masked = functools.partial(plain, w, PLAIN["efficient"], w.mask[:, None, None])
        found["plain-efficient-mask"] = variant(masked, w.qkv, exact=False)
        found["plain-packed"] = variant(
            functools.partial(plain_packed, w), w.packed_qkv, w.packed_gradient, exact=False
        )
    found["hf-eager"] = variant(functools.partial(hf_eager, w))
    if w.mask is None and not w.dropout_p:
        found["flex"] = variant(flex(w))
    return found


def asked(w: Workload):
    """The call as a backend sees it, for ``why_not``."""
    from deberta_fast.op.call import AttentionInputs

    return AttentionInputs(
        *w.qkv,
        *w.tables,
        mask=None if w.mask is None else w.mask[:, None, None],
        cu_seqlens=None,
        seed=None,
        position_buckets=BUCKETS,
        max_relative_positions=LONGEST,
        far_negative="hf",
        first_slot=0,
        query_offset=0,
        max_seqlen=w.length,
        scale=(3 * SIZE) ** -0.5,
        dropout_p=w.dropout_p,
    )


def ours(w: Workload, backend: str, dropout_p: float) -> torch.Tensor:
    return deberta_fast.disentangled_attention(
        *w.qkv, *w.tables, attention_mask=w.mask, dropout_p=dropout_p, backend=backend
    )


def ours_packed(w: Workload, backend: str) -> torch.Tensor:
    return deberta_fast.disentangled_attention_varlen(
        *w.packed_qkv, *w.tables, cu_seqlens=w.ends, max_seqlen=w.longest, dropout_p=w.dropout_p, backend=backend
    )


def plain(w: Workload, kernel: SDPBackend, mask: torch.Tensor | None = None) -> torch.Tensor:
    with sdpa_kernel(kernel):
        return torch.nn.functional.scaled_dot_product_attention(*w.qkv, attn_mask=mask, dropout_p=w.dropout_p)


def plain_packed(w: Workload) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(*w.packed_qkv, w.ends, w.ends, w.longest, w.longest)


def hf_eager(w: Workload) -> torch.Tensor:
    (query, key, value), (pos_key, pos_query) = w.qkv, w.tables
    needed = EAGER_MATRICES * w.batch * w.heads * w.length**2 * query.element_size()
    if query.is_cuda and needed > sum(_free_and_cached(query.device)):
        raise MemoryError(f"needs about {needed / 2**30:.0f} GiB")
    scale = math.sqrt(3 * SIZE)
    scores = query @ (key.mT / scale)
    slots = (w.buckets + BUCKETS).clamp(0, 2 * BUCKETS - 1)
    scores = scores + (query @ pos_key.mT).gather(-1, slots.expand_as(scores)) / scale
    slots = (BUCKETS - w.buckets).clamp(0, 2 * BUCKETS - 1)  # of a key's row and a query's column
    scores = scores + (key @ pos_query.mT).gather(-1, slots.expand_as(scores)).mT / scale
    if w.mask is not None:
        scores = scores.masked_fill(~w.mask[:, None, None], torch.finfo(scores.dtype).min)
    probabilities = torch.nn.functional.dropout(torch.softmax(scores, -1), w.dropout_p)
    return probabilities @ value


def _free_and_cached(device: torch.device) -> tuple[int, int]:
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0], cached


def flex(w: Workload) -> Callable[[], torch.Tensor]:
    torch._dynamo.reset()  # which counts how often this function was compiled, whatever for
    from torch.nn.attention.flex_attention import flex_attention

    scale = (3 * SIZE) ** -0.5

    def attention(query, key, value, pos_key, pos_query, slots):
        c2p, p2c = (query * scale) @ pos_key.mT, (key * scale) @ pos_query.mT

        def add_positions(score, b, h, i, j):
            slot = slots[i - j + w.length - 1]
            return score + c2p[b, h, i, slot] + p2c[b, h, j, slot]

        return flex_attention(query, key, value, score_mod=add_positions, scale=scale)

    compiled = torch.compile(attention, dynamic=False, fullgraph=True)
    return lambda: compiled(*w.qkv, *w.tables, w.slots)
