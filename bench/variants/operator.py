"""Disentangled attention in several ways, and plain attention of the same shape, from query, key and value."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import deberta_fast
from deberta_fast import backends
from deberta_fast.op.call import Call as AttentionCall
from deberta_fast.op.precision import hf_style_scores
from deberta_fast.op.relative_position import device_tables, distance_slots

from ..device import Call
from . import PLAIN, Entry, call_of, relative_difference

SIZE, BUCKETS, LONGEST = 64, 256, 512  # DeBERTa-v3's head size, position_buckets and max_relative_positions


class Variant(NamedTuple):
    """A forward call, what it differentiates, and the gradient that its output gets."""

    forward: Callable[[], torch.Tensor]
    leaves: list[torch.Tensor]
    gradient: torch.Tensor

    def call(self, passes: str) -> Call:
        return call_of(self.forward, passes, self.gradient, self.leaves)

    def results(self, passes: str) -> int:
        """Returns the bytes of the output and the gradients."""
        kept = [self.gradient] * ("forward" in passes) + self.leaves * ("backward" in passes)
        return sum(x.numel() * x.element_size() for x in kept)


class Workload:
    """Random inputs of one shape, in the memory layout of a layer's projections; if padded, packed inputs too."""

    def __init__(
        self,
        length: int,
        batch: int,
        heads: int,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
        dropout_p: float = 0.0,
        padding: float = 0.0,
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
        # Longer and shorter sequences alternate around the mean. A single sequence has the mean length.
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

    def variant(self, forward: Callable, *arguments, positions: bool = True, packed: bool = False) -> Variant:
        """Makes a variant of forward(self, *arguments).

        Args:
            positions: whether it reads the position tables, which then get gradients.
            packed: whether it reads the packed tensors.
        """
        qkv, gradient = (self.packed_qkv, self.packed_gradient) if packed else (self.qkv, self.gradient)
        return Variant(functools.partial(forward, self, *arguments), qkv + self.tables * positions, gradient)

    def square_terms(self) -> int:
        """Sums length^2 x size of the valid tokens over all heads and sequences."""
        return self.heads * SIZE * sum(n * n for n in self.lengths)

    @functools.cached_property
    def slots(self) -> torch.Tensor:
        """The table row of each distance i - j from 1 - L to L - 1, int64."""
        return self._slots_of(torch.arange(1 - self.length, self.length, device=self.gradient.device))

    @functools.cached_property
    def buckets(self) -> torch.Tensor:
        """Bucketed i - j, (L, L), int64, before clamping: Hugging Face's encoder makes it once for all layers."""
        distances = torch.arange(1 - self.length, self.length, device=self.gradient.device)
        size = BUCKETS - self._slots_of(-distances.abs())
        i = torch.arange(self.length, device=self.gradient.device)
        return (distances.sign() * size)[i[:, None] - i + self.length - 1]

    @staticmethod
    def _slots_of(distances: torch.Tensor) -> torch.Tensor:
        return distance_slots(device_tables(BUCKETS, LONGEST, "hf", distances.device).slots, distances)

    @functools.cached_property
    def expected(self) -> torch.Tensor:
        """The eager backend's output, with which others are compared if there is no dropout."""
        with torch.no_grad():
            return ours(self, "eager")

    def difference(self, name: str, variant: Variant) -> float | None:
        """Compares the outputs of valid tokens with ``expected``; returns None for plain attention and dropout."""
        if name.startswith(("plain", "sdpa")) or self.dropout_p:
            return None
        try:
            with torch.no_grad():
                got, want = variant.forward(), self.expected
        except Exception:
            return None  # the timing reports it
        if self.mask is not None:
            got, want = (x if x.dim() == 3 else self.pack(x) for x in (got, want))
        return relative_difference(got, want)


def asked(w: Workload) -> AttentionCall:
    """Makes the Call that a backend receives."""
    mask = None if w.mask is None else w.mask[:, None, None]
    return AttentionCall(
        *w.qkv, *w.tables, mask=mask, cu_seqlens=None, seed=None, position_buckets=BUCKETS,
        max_relative_positions=LONGEST, far_negative="hf", first_slot=0, query_offset=0, max_seqlen=w.length,
        scale=(3 * SIZE) ** -0.5, dropout_p=w.dropout_p,
    )  # fmt: skip


def ours(w: Workload, backend: str) -> torch.Tensor:
    return deberta_fast.disentangled_attention(
        *w.qkv, *w.tables, attention_mask=w.mask, dropout_p=w.dropout_p, backend=backend
    )


def ours_packed(w: Workload, backend: str) -> torch.Tensor:
    return deberta_fast.disentangled_attention_varlen(
        *w.packed_qkv, *w.tables, cu_seqlens=w.ends, max_seqlen=w.longest, dropout_p=w.dropout_p, backend=backend
    )


def sdpa(w: Workload, mask: torch.Tensor | None = None) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*w.qkv, attn_mask=mask, dropout_p=w.dropout_p)


def plain(w: Workload, kernel: SDPBackend, masked: bool = False) -> torch.Tensor:
    with sdpa_kernel(kernel):
        return sdpa(w, w.mask[:, None, None] if masked else None)


def plain_packed(w: Workload) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(*w.packed_qkv, w.ends, w.ends, w.longest, w.longest)


def hf_eager(w: Workload) -> torch.Tensor:
    last = 2 * BUCKETS - 1
    slots = (w.buckets + BUCKETS).clamp(0, last), (BUCKETS - w.buckets).clamp(0, last)
    probabilities = torch.softmax(hf_style_scores(asked(w), slots), -1)
    return torch.nn.functional.dropout(probabilities, w.dropout_p) @ w.qkv[2]


def flex(w: Workload) -> Callable[[Workload], torch.Tensor]:
    torch._dynamo.reset()  # because it limits how often a function is compiled
    from torch.nn.attention.flex_attention import flex_attention

    scale = (3 * SIZE) ** -0.5

    def attention(query, key, value, pos_key, pos_query, slots):
        c2p, p2c = (query * scale) @ pos_key.mT, (key * scale) @ pos_query.mT

        def add_positions(score, b, h, i, j):
            slot = slots[i - j + w.length - 1]
            return score + c2p[b, h, i, slot] + p2c[b, h, j, slot]

        return flex_attention(query, key, value, score_mod=add_positions, scale=scale)

    compiled = torch.compile(attention, dynamic=False, fullgraph=True)
    return lambda w: compiled(*w.qkv, *w.tables, w.slots)


_full = lambda w: w.mask is None
_padded = lambda w: w.mask is not None


def _entries() -> Iterator[tuple[str, Entry]]:
    """Yields entries whose build(workload) returns a Variant. Ours take padding as a mask or as packed sequences."""
    for name, backend in backends.BACKENDS.items():
        if name == "reference":
            continue
        dense = lambda w, name=name: w.variant(ours, name)
        packed = lambda w, name=name: w.variant(ours_packed, name, packed=True)
        full = lambda w, backend=backend: _full(w) and not backend.why_not(asked(w))
        padded = lambda w, backend=backend: _padded(w) and not backend.why_not(asked(w))
        yield name, Entry("disentangled_attention by that backend", dense, full)
        yield f"{name}-mask", Entry("disentangled_attention, told of padding by a mask", dense, padded)
        yield f"{name}-packed", Entry("disentangled_attention_varlen of packed sequences", packed, padded)
    plain_packed_variant = lambda w: w.variant(plain_packed, positions=False, packed=True)
    masked = lambda w: w.variant(plain, PLAIN["efficient"], True, positions=False)
    about = "scaled_dot_product_attention without position terms"
    yield "sdpa", Entry(about, lambda w: w.variant(sdpa, positions=False))
    for name, kernel in PLAIN.items():
        unmasked = lambda w, kernel=kernel: w.variant(plain, kernel, positions=False)
        yield f"plain-{name}", Entry(f"{about} or mask, by that kernel", unmasked)
    yield "plain-efficient-mask", Entry(f"{about}, by the only kernel that takes a mask", masked, _padded)
    yield "plain-packed", Entry("torch's varlen_attn without position terms", plain_packed_variant, _padded)
    yield "hf-eager", Entry("Hugging Face's order of operations, dense", lambda w: w.variant(hf_eager))
    about = "FlexAttention, whose score_mod reads both position terms from tables (B, H, L, R), made in the call"
    yield "flex", Entry(about, lambda w: w.variant(flex(w)), lambda w: _full(w) and not w.dropout_p)


VARIANTS = dict(_entries())
