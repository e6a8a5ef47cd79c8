"""What every backend is handed."""

from typing import NamedTuple

import torch

from .relative_position import SlotTable, slot_table


class AttentionInputs(NamedTuple):
    """The validated arguments of one attention call, in the order of the op's schema.

    Dense: query (B, H, Lq, D), key and value (B, H, Lk, D). Packed: B = 1 and all sequences along the length, sequence
    s at rows cu_seqlens[s] to cu_seqlens[s + 1]; no query sees a key of another sequence.

    pos_key and pos_query are (H, R', D), rows first_slot to first_slot + R' of the relative-position table, or None.
    mask is bool, four-dimensional, broadcastable to (B, H, Lq, Lk), True where a query may attend. The rest as in
    ``disentangled_attention``; seed is set where dropout_p > 0.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pos_key: torch.Tensor | None
    pos_query: torch.Tensor | None
    mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    seed: torch.Tensor | None
    position_buckets: int
    max_relative_positions: int
    far_negative: str
    first_slot: int
    query_offset: int
    max_seqlen: int
    scale: float
    dropout_p: float

    @property
    def table(self) -> SlotTable:
        return slot_table(self.position_buckets, self.max_relative_positions, self.far_negative)

    @property
    def has_positions(self) -> bool:
        return self.pos_key is not None or self.pos_query is not None

    @property
    def work_dtype(self) -> torch.dtype:
        """The dtype that scores and statistics are held in: half precision is accumulated in float32."""
        return torch.promote_types(self.query.dtype, torch.float32)

    def new_like_heads(self, heads: torch.Tensor) -> torch.Tensor:
        """Uninitialised (B, H, L, D) laid out as (B, L, H, D), so that joining the heads afterwards copies nothing."""
        batch, count, length, size = heads.shape
        return heads.new_empty(batch, length, count, size).transpose(1, 2)

    def new_lse(self) -> torch.Tensor:
        """Uninitialised (B, H, Lq) log-sum-exp."""
        return self.query.new_empty(self.query.shape[:-1], dtype=self.work_dtype)

    def sequences(self) -> list["AttentionInputs"]:
        """The packed sequences as dense calls of one batch row each: views, nothing is copied.

        Reads cu_seqlens on the host: waits for the device where it lies on one.
        """
        ends = self.cu_seqlens.tolist()
        return [self._slice(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]

    def _slice(self, start: int, stop: int) -> "AttentionInputs":
        mask = self.mask
        if mask is not None and mask.shape[-1] > 1:
            mask = mask[..., start:stop]
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., start:stop, :]
        cut = (heads[:, :, start:stop] for heads in (self.query, self.key, self.value))
        query, key, value = cut
        return self._replace(query=query, key=key, value=value, mask=mask, cu_seqlens=None)


def check_ends(cu_seqlens: torch.Tensor, device: torch.device) -> None:
    """All of cu_seqlens but its values.

    Raises:
        TypeError, ValueError: it is not int32 (n + 1,) on that device.
    """
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be an int32 tensor, got {getattr(cu_seqlens, 'dtype', type(cu_seqlens))}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.device != device:
        raise ValueError(
            f"cu_seqlens must be one-dimensional, not empty and on {device}, "
            f"got shape {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        )


def checked_cu_seqlens(cu_seqlens: torch.Tensor, total: int, max_seqlen: int) -> torch.Tensor:
    """cu_seqlens, once it is known to be right: type, shape and values.

    On a device nobody waits for the values: a mistake trips a device-side assertion.

    Raises:
        TypeError: it is no int32 tensor.
        ValueError: on the host, it does not rise from 0 to ``total`` in steps of 0 to ``max_seqlen``.
    """
    check_ends(cu_seqlens, cu_seqlens.device)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return cu_seqlens
    lengths = cu_seqlens.diff()
    expected = f"cu_seqlens must rise from 0 to {total} in steps of 0 to max_seqlen={max_seqlen}"
    right = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & ((lengths >= 0) & (lengths <= max_seqlen)).all()
    if cu_seqlens.device.type != "cpu":
        torch._assert_async(right, expected)
    elif not right:
        raise ValueError(f"{expected}, got {cu_seqlens.tolist()}")
    return cu_seqlens
