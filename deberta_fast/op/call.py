"""One call of disentangled attention: its tensors and settings, checked, and the geometry that follows from them."""

import math
from typing import NamedTuple

import torch

from .relative_position import FAR_NEGATIVE_RULES, DeviceTables, SlotTable, device_tables, slot_table, table_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TENSORS = 8  # the first fields of a Call


class Call(NamedTuple):
    """What every backend is handed, in the order of the operator's schema. ``api`` builds and checks it, once.

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

    # Geometry: which distances read which rows of the tables

    @property
    def has_positions(self) -> bool:
        return self.pos_key is not None or self.pos_query is not None

    @property
    def table(self) -> SlotTable:
        return slot_table(self.position_buckets, self.max_relative_positions, self.far_negative)

    @property
    def device_tables(self) -> DeviceTables:
        numbering = self.position_buckets, self.max_relative_positions, self.far_negative
        return device_tables(*numbering, self.query.device)

    @property
    def past_row(self) -> int:
        """The row of pos_key and pos_query that keys far before their query read."""
        return self.table.slots[-1] - self.first_slot

    @property
    def future_row(self) -> int:
        """The row of keys far behind their query."""
        return self.table.slots[0] - self.first_slot

    # Precision

    @property
    def work_dtype(self) -> torch.dtype:
        """The dtype that scores and statistics are held in: half precision is accumulated in float32."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    @property
    def band_scale(self) -> float:
        """Kernels that store position scores in float16 store this times them: it leaves room, and as a power of two
        rounds nothing."""
        if self.query.dtype != torch.float16:
            return 1.0
        return 2.0 ** max(-14, min(14, math.frexp(self.scale / math.log(2))[1] - 1))

    # Results

    def new_output(self) -> torch.Tensor:
        """Uninitialised output (B, H, Lq, D)."""
        return _new_heads(self.query)

    def new_lse(self) -> torch.Tensor:
        """Uninitialised log-sum-exp (B, H, Lq)."""
        return self.query.new_empty(self.query.shape[:-1], dtype=self.work_dtype)

    def new_gradients(self, wanted: tuple[bool, ...]) -> list[torch.Tensor | None]:
        """Uninitialised gradients of query, key, value, pos_key and pos_query.

        None for an absent table and for one that nobody wants; those of the heads are made together, always.
        """
        grads: list[torch.Tensor | None] = [_new_heads(x) for x in self[:3]]
        for table, want in zip(self[3:5], wanted[3:5], strict=True):
            grads.append(None if table is None or not want else table.new_empty(table.shape))
        return grads

    def sequences(self) -> list["Call"]:
        """The packed sequences as dense calls of one batch row each: views, nothing is copied.

        Reads cu_seqlens on the host: waits for the device where it lies on one.
        """
        ends = self.cu_seqlens.tolist()
        return [self._slice(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]

    def _slice(self, start: int, stop: int) -> "Call":
        mask = self.mask
        if mask is not None and mask.shape[-1] > 1:
            mask = mask[..., start:stop]
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., start:stop, :]
        cut = (heads[:, :, start:stop] for heads in (self.query, self.key, self.value))
        query, key, value = cut
        return self._replace(query=query, key=key, value=value, mask=mask, cu_seqlens=None)


def _new_heads(heads: torch.Tensor) -> torch.Tensor:
    """(B, H, L, D) laid out as (B, L, H, D), so that joining the heads afterwards copies nothing."""
    batch, count, length, size = heads.shape
    return heads.new_empty((batch, length, count, size)).transpose(1, 2)


def check_heads(query, key, value, ndim: int, layout: str) -> None:
    """Types, shapes, dtypes and devices of (B, H, L, D) or (T, H, D)."""
    for name, heads in (("query", query), ("key", key), ("value", value)):
        if not isinstance(heads, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(heads).__name__}")
        if heads.dim() != ndim:
            raise ValueError(f"{name} must be of shape {layout}, got {tuple(heads.shape)}")
        if heads.dtype not in DTYPES:
            raise TypeError(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {heads.dtype}")
        if heads.device != query.device:
            raise ValueError(f"{name} must be on query's device, {query.device}, got {heads.device}")
    asked, given = query.shape, key.shape
    if given != value.shape:
        raise ValueError(f"value must have key's shape, {tuple(given)}, got {tuple(value.shape)}")
    # The length is the third dimension of the dense layout and the first of the packed one.
    if asked[-1] != given[-1] or asked[1] != given[1] or (ndim == 4 and asked[0] != given[0]):
        raise ValueError(f"key must match query, {tuple(asked)}, in all but the length of {layout}, got {tuple(given)}")
    if asked[-1] < 1:
        raise ValueError("query must have a head size of at least 1, got 0")


def cast_and_align(query, key, value, pos_key, pos_query) -> list[torch.Tensor | None]:
    """One dtype, autocast's where it is on as for torch's own attention (float64 left alone); a unit last stride."""
    tensors = [query, key, value, pos_key, pos_query]
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        tensors = [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]
    dtype = tensors[0].dtype
    for index, x in enumerate(tensors):
        if x is None:
            continue
        if x.dtype != dtype:
            raise TypeError(f"{Call._fields[index]} must have query's dtype, {dtype}, got {x.dtype}")
        if x.stride(-1) != 1:
            tensors[index] = x.contiguous()
    return tensors


def check_mask(mask, query: torch.Tensor, key_length: int) -> torch.Tensor | None:
    """Four-dimensional, its last dimension Lk, the others 1 or whole; query is (B, H, Lq, D)."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"attention_mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.device != query.device:
        raise ValueError(f"attention_mask must be on query's device, {query.device}, got {mask.device}")
    batch, heads, query_length, _ = query.shape
    full = (batch, heads, query_length, key_length)
    if mask.dim() == 2 and mask.shape == (batch, key_length):
        return mask[:, None, None]
    if mask.dim() == 4 and all(size in (1, whole) for size, whole in zip(mask.shape, full, strict=True)):
        return mask.expand(-1, -1, -1, key_length)
    raise ValueError(
        f"attention_mask must be of shape {(batch, key_length)} or broadcastable to {full}, got {tuple(mask.shape)}"
    )


def check_settings(call: Call) -> None:
    """Tables and numbers: that the rows are there which these lengths read."""
    if call.far_negative not in FAR_NEGATIVE_RULES:
        raise ValueError(f"far_negative must be one of {FAR_NEGATIVE_RULES}, got {call.far_negative!r}")
    if not 0 <= call.dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {call.dropout_p}")
    query, first = call.query, call.first_slot
    given = None
    for name, table in (("pos_key", call.pos_key), ("pos_query", call.pos_query)):
        if table is None:
            continue
        if table.device != query.device:
            raise ValueError(f"{name} must be on query's device, {query.device}, got {table.device}")
        shape = table.shape
        if len(shape) != 3 or shape[0] != query.shape[1] or shape[2] != query.shape[3]:
            raise ValueError(f"{name} must be of shape ({query.shape[1]}, R, {query.shape[3]}), got {tuple(shape)}")
        if given is not None and shape[1] != given:
            raise ValueError(f"pos_query must have pos_key's rows, {given}, got {shape[1]}")
        given = shape[1]
        rows = table_rows(call.position_buckets, call.max_relative_positions)
        if given == rows and first == 0:
            continue
        lengths = (query.shape[2], call.key.shape[2]) if call.cu_seqlens is None else (call.max_seqlen,) * 2
        start, stop = call.table.window(*lengths, call.query_offset)
        if not 0 <= first <= start or not stop <= first + given <= rows:
            raise ValueError(
                f"{name} must have all {rows} rows of the table, or at least rows {start} to {stop} that these lengths "
                f"reach, got rows {first} to {first + given}"
            )


def check_cu_seqlens_form(cu_seqlens, device: torch.device) -> None:
    """Type, shape and device of cu_seqlens, not its values.

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


def check_cu_seqlens_values(cu_seqlens: torch.Tensor, total: int, max_seqlen: int) -> None:
    """That cu_seqlens rises from 0 to total in steps of at most max_seqlen.

    On the host a mistake raises ValueError. On a device nobody waits for them: a mistake trips a device-side assertion.
    """
    expected = f"cu_seqlens must rise from 0 to {total} in steps of 0 to max_seqlen={max_seqlen}"
    if cu_seqlens.device.type != "cpu":
        lengths = cu_seqlens.diff()
        right = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & ((lengths >= 0) & (lengths <= max_seqlen)).all()
        torch._assert_async(right, expected)
        return
    ends = cu_seqlens.tolist()
    steps = zip(ends, ends[1:], strict=False)
    if ends[0] != 0 or ends[-1] != total or not all(0 <= stop - start <= max_seqlen for start, stop in steps):
        raise ValueError(f"{expected}, got {ends}")
