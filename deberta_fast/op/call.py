"""One call of disentangled attention: its checked tensors and settings, and the geometry that follows from them."""

import contextlib
import functools
import math
import operator
import warnings
from typing import Any, NamedTuple

import torch

from .dropout import check_seed, new_seed
from .relative_position import (
    FAR_NEGATIVE_RULES,
    FARTHEST,
    DeviceTables,
    SlotTable,
    device_tables,
    slot_table,
    table_rows,
)

LONGEST = 2**31 - 1  # the most rows of packed sequences: cu_seqlens is int32
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TENSORS = 8  # the first fields of a Call
STATISTICS = 3  # per row of scores: log-sum-exp, largest score, sum of exponentials relative to the largest


class Call(NamedTuple):
    """The arguments of one call, in the order of the operator's schema. ``checked_call`` makes it for the backends.

    Dense: query (B, H, Lq, D), key and value (B, H, Lk, D). Packed: B = 1 and all sequences along the length, sequence
    s in rows cu_seqlens[s] to cu_seqlens[s + 1]; no query sees a key of another sequence.

    pos_key and pos_query are (H, R', D), rows first_slot to first_slot + R' of the relative-position table, or None.
    mask is bool, four-dimensional, broadcastable to (B, H, Lq, Lk), True where a query may attend. seed is set if
    dropout_p > 0: int64 (1,), or (5,) with an origin. ``disentangled_attention`` describes the others.
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

    def to(self, device: torch.device | str) -> "Call":
        """Returns the same call with its tensors on a device."""
        tensors: Any = [None if x is None else x.to(device) for x in self[:TENSORS]]  # type: ignore[union-attr]
        return Call(*tensors, *self[TENSORS:])

    @property
    def has_positions(self) -> bool:
        return self.pos_key is not None or self.pos_query is not None

    @property
    def table(self) -> SlotTable:
        return slot_table(self.position_buckets, self.max_relative_positions, self.far_negative)

    @property
    def device_tables(self) -> DeviceTables:
        return device_tables(self.position_buckets, self.max_relative_positions, self.far_negative, self.query.device)

    @property
    def past_row(self) -> int:
        """Row of pos_key and pos_query for keys far before their query."""
        return self.table.slots[-1] - self.first_slot

    @property
    def future_row(self) -> int:
        """Row of pos_key and pos_query for keys far behind their query."""
        return self.table.slots[0] - self.first_slot

    @property
    def work_dtype(self) -> torch.dtype:
        """Dtype of scores and statistics: half precision accumulates in float32."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    @property
    def band_scale(self) -> float:
        """Factor of position scores that kernels store in float16: it prevents overflow. A power of two, it rounds
        nothing."""
        if self.query.dtype != torch.float16:
            return 1.0
        return 2.0 ** max(-14, min(14, math.frexp(self.scale / math.log(2))[1] - 1))

    def outside_autocast(self) -> contextlib.AbstractContextManager:
        """Disables autocast, which would round what is computed in ``work_dtype`` on purpose."""
        kind = self.query.device.type  # torch.autocast does not take "meta"
        return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)

    def new_output(self) -> torch.Tensor:
        """Allocates the output (B, H, Lq, D)."""
        return _new_heads(self.query)

    def new_lse(self) -> torch.Tensor:
        """Allocates the log-sum-exp (B, H, Lq); on the CPU, as the first of STATISTICS tensors in one storage."""
        query, dtype = self.query, self.work_dtype
        batch, heads, length, _ = query.shape
        if not query.is_cpu:
            return query.new_empty((batch, heads, length), dtype=dtype)
        strides = (batch * heads * length, heads * length, length, 1)  # with strides, torch allocates faster
        return query.new_empty_strided((STATISTICS, batch, heads, length), strides, dtype=dtype)[0]

    def new_gradients(self, wanted: tuple[bool, ...]) -> list[torch.Tensor | None]:
        """Allocates gradients of query, key, value, pos_key and pos_query.

        A table's is None if it is absent or not wanted. Those of query, key and value are always computed.
        """
        grads: list[torch.Tensor | None] = [_new_heads(x) for x in self[:3]]
        for table, want in zip(self[3:5], wanted[3:5], strict=True):
            grads.append(None if table is None or not want else table.new_empty(table.shape))
        return grads

    def sequences(self) -> list["Call"]:
        """Returns the packed sequences as dense calls of one batch row each; their tensors are views.

        Reads cu_seqlens on the host, which synchronises with its device.
        """
        assert self.cu_seqlens is not None
        ends = self.cu_seqlens.tolist()
        return [self._slice(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]

    def _slice(self, start: int, stop: int) -> "Call":
        mask = self.mask
        if mask is not None and mask.shape[-1] > 1:
            mask = mask[..., start:stop]
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., start:stop, :]
        query, key, value = (heads[:, :, start:stop] for heads in self[:3])
        return self._replace(query=query, key=key, value=value, mask=mask, cu_seqlens=None)


def _new_heads(heads: torch.Tensor) -> torch.Tensor:
    """Allocates (B, H, L, D) laid out as (B, L, H, D): joining the heads later copies nothing."""
    shape = batch, count, length, size = heads.shape
    return heads.new_empty_strided(shape, (length * count * size, size, count * size, 1))


def _quiet_in_traces(check):
    """Silences the warnings of torch.jit.trace about compared sizes: the outcome is an error or none, not a value."""

    @functools.wraps(check)
    def checked(*arguments):
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is None:
            return check(*arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            return check(*arguments)

    return checked


@_quiet_in_traces
def checked_call(
    query, key, value, pos_key, pos_query, attention_mask, cu_seqlens, position_buckets, max_relative_positions,
    far_negative, first_slot, query_offset, max_seqlen, scale, dropout_p, dropout_seed=None,
) -> Call:  # fmt: skip
    """Checks the arguments of the public functions and returns their call.

    Draws a dropout seed if dropout_p > 0 and none is given.

    The values of cu_seqlens are not checked.

    Raises:
        TypeError, ValueError: an argument is not as the public functions describe it.
    """
    packed = cu_seqlens is not None
    check_heads(query, key, value, 3 if packed else 4)
    if far_negative not in FAR_NEGATIVE_RULES:
        raise ValueError(f"far_negative must be one of {FAR_NEGATIVE_RULES}, got {far_negative!r}")
    # Most arguments have the right type, which saves the function call.
    if type(position_buckets) is not int:
        position_buckets = integer("position_buckets", position_buckets)
    if type(max_relative_positions) is not int:
        max_relative_positions = integer("max_relative_positions", max_relative_positions)
    if type(first_slot) is not int:
        first_slot = integer("first_slot", first_slot)
    if type(query_offset) is not int:
        query_offset = integer("query_offset", query_offset)
    if type(dropout_p) is not float:
        dropout_p = _real("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    device, shape = query.device, query.shape
    if packed:
        check_cu_seqlens_form(cu_seqlens, device)
        if type(max_seqlen) is not int:
            max_seqlen = integer("max_seqlen", max_seqlen)
        if max_seqlen < 0:
            raise ValueError(f"max_seqlen must not be negative, got {max_seqlen}")
        if max_seqlen > LONGEST:
            raise ValueError(f"max_seqlen must be at most {LONGEST}, got {max_seqlen}")
        if attention_mask is not None and attention_mask.dim() != 1:
            raise ValueError(f"attention_mask must be of shape ({shape[0]},), got {tuple(attention_mask.shape)}")
    heads, size = shape[1], shape[-1]
    lengths = (shape[2], key.shape[2]) if not packed else (max_seqlen, max_seqlen)
    numbering = position_buckets, max_relative_positions, far_negative
    # Most tables are whole and need no more than these comparisons.
    whole = heads, table_rows(position_buckets, max_relative_positions), size
    if (
        (pos_key is not None and (pos_key.shape != whole or pos_key.device != device))
        or (pos_query is not None and (pos_query.shape != whole or pos_query.device != device))
        or first_slot != 0
    ):
        check_tables(pos_key, pos_query, device, whole, numbering, first_slot, lengths, query_offset)
    if not -FARTHEST <= query_offset <= FARTHEST:
        query_offset = _near_offset(query_offset, pos_key, pos_query, numbering, lengths)
    if scale is None:
        scale = (size * (1 + (pos_key is not None) + (pos_query is not None))) ** -0.5
    elif type(scale) is not float:
        scale = _real("scale", scale)
    kind = device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        # float64 keeps its dtype, as in torch's own attention.
        dtype = torch.get_autocast_dtype(kind)
        query, key, value, pos_key, pos_query = (
            x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value, pos_key, pos_query)
        )
    dtype = query.dtype
    tensors: list[Any] = [query, key, value, pos_key, pos_query]
    for index, x in enumerate(tensors):
        if x is None:
            continue
        if x.dtype != dtype:
            raise TypeError(f"{Call._fields[index]} must have query's dtype, {dtype}, got {x.dtype}")
        if not x.is_contiguous() and x.stride(-1) != 1:
            tensors[index] = x.contiguous()
    if packed:  # backends get one batch row
        tensors[:3] = [x.transpose(0, 1).unsqueeze(0) for x in tensors[:3]]
    if attention_mask is not None:
        pairs = (1 if packed else shape[0], heads, shape[0] if packed else shape[2], tensors[1].shape[2])
        attention_mask = check_mask(attention_mask[None] if packed else attention_mask, device, pairs)
    if dropout_seed is not None:
        check_seed("dropout_seed", dropout_seed, device)
        dropout_seed = dropout_seed.contiguous()
    seed = None if dropout_p == 0 else new_seed(device) if dropout_seed is None else dropout_seed
    return Call(
        tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], attention_mask, cu_seqlens, seed, position_buckets,
        max_relative_positions, far_negative, first_slot, query_offset, lengths[0], scale, dropout_p,
    )  # fmt: skip


def integer(name: str, value: Any) -> int:
    """Returns an argument as an integer.

    Raises:
        TypeError: it is a float, text, None, or a tensor of another dtype.
    """
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]  # an int to everybody but mypy
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _real(name: str, value) -> float:
    if isinstance(value, torch.SymFloat):
        return value  # type: ignore[return-value]
    if not hasattr(value, "__float__"):  # rejects text, which float() accepts
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _near_offset(query_offset: int, pos_key, pos_query, numbering, lengths) -> int:
    """Returns an offset for which every pair reads the same rows, and no sum of positions exceeds 32 bits."""
    most = 0 if pos_key is None and pos_query is None else slot_table(*numbering).reach + max(lengths)
    return max(-most, min(most, query_offset))


def check_heads(query, key, value, ndim: int) -> None:
    """Checks types, shapes, dtypes and devices of query, key and value."""
    layout = "(B, H, L, D)" if ndim == 4 else "(T, H, D)"
    for index, x in enumerate((query, key, value)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{Call._fields[index]} must be a tensor, got {type(x).__name__}")
        if x.ndim != ndim:
            raise ValueError(f"{Call._fields[index]} must be of shape {layout}, got {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{Call._fields[index]} must be one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{Call._fields[index]} must be on query's device, {query.device}, got {x.device}")
    asked, given = query.shape, key.shape
    if given != value.shape:
        raise ValueError(f"value must have key's shape, {tuple(given)}, got {tuple(value.shape)}")
    # The length is the third dimension if dense, the first if packed.
    if asked[-1] != given[-1] or asked[1] != given[1] or (ndim == 4 and asked[0] != given[0]):
        raise ValueError(f"key must match query, {tuple(asked)}, in all but the length of {layout}, got {tuple(given)}")
    if asked[-1] < 1:
        raise ValueError("query must have a head size of at least 1, got 0")
    if ndim == 3 and asked[0] != given[0]:
        raise ValueError(f"key must have as many rows as query, {asked[0]}, got {given[0]}")


def check_tables(pos_key, pos_query, device, whole, numbering, first_slot, lengths, query_offset) -> None:
    """Checks that pos_key and pos_query are (H, R, D) and have the rows that these lengths read."""
    heads, rows, size = whole
    start, stop = slot_table(*numbering).window(lengths[0], lengths[1], query_offset)
    given = None
    for name, table in (("pos_key", pos_key), ("pos_query", pos_query)):
        if table is None:
            continue
        if table.device != device:
            raise ValueError(f"{name} must be on query's device, {device}, got {table.device}")
        if table.ndim != 3 or table.shape[0] != heads or table.shape[2] != size:
            raise ValueError(f"{name} must be of shape ({heads}, R, {size}), got {tuple(table.shape)}")
        if given is not None and table.shape[1] != given:
            raise ValueError(f"pos_query must have pos_key's rows, {given}, got {table.shape[1]}")
        given = table.shape[1]
        if given == rows and first_slot == 0:
            continue
        if not 0 <= first_slot <= start or not stop <= first_slot + given <= rows:
            raise ValueError(
                f"{name} must have all {rows} rows of the table, or at least rows {start} to {stop} that these lengths "
                f"reach, got rows {first_slot} to {first_slot + given}"
            )


def check_mask(mask, device: torch.device, whole: tuple[int, int, int, int]) -> torch.Tensor:
    """Checks the mask and returns it in four dimensions, the last one Lk; ``whole`` is (B, H, Lq, Lk)."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"attention_mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.device != device:
        raise ValueError(f"attention_mask must be on query's device, {device}, got {mask.device}")
    keys = whole[0], whole[3]
    if mask.dim() == 2 and mask.shape == keys:
        return mask[:, None, None]
    if mask.dim() == 4 and all(size in (1, most) for size, most in zip(mask.shape, whole, strict=True)):
        return mask.expand(-1, -1, -1, whole[3])
    raise ValueError(f"attention_mask must be of shape {keys} or broadcastable to {whole}, got {tuple(mask.shape)}")


def check_cu_seqlens_form(cu_seqlens, device: torch.device) -> None:
    """Checks type, shape and device of cu_seqlens, not its values.

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
    """Checks that cu_seqlens rises from 0 to total in steps of at most max_seqlen.

    On the CPU a mistake raises ValueError. On a device it trips a device-side assertion, without synchronising.
    """
    expected = f"cu_seqlens must rise from 0 to {total} in steps of 0 to max_seqlen={max_seqlen}"
    if cu_seqlens.device.type != "cpu":
        torch._assert_async(_rises(cu_seqlens, total, max_seqlen), expected)
        return
    ends = cu_seqlens.tolist()
    steps = zip(ends, ends[1:], strict=False)
    if ends[0] != 0 or ends[-1] != total or not all(0 <= stop - start <= max_seqlen for start, stop in steps):
        raise ValueError(f"{expected}, got {ends}")


def _rises(cu_seqlens: torch.Tensor, total: int, max_seqlen: int) -> torch.Tensor:
    """Returns the outcome of the same check as a bool on the device."""
    ends = cu_seqlens.long()  # differences of int32 wrap
    lengths = ends.diff()
    return (ends[0] == 0) & (ends[-1] == total) & ((lengths >= 0) & (lengths <= max_seqlen)).all()
