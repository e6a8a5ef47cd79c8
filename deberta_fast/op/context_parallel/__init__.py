"""Disentangled attention of sequences that lie on several processes, each of which has a stretch of every sequence."""

import functools
import itertools
from typing import Any

import torch
import torch.distributed as dist

from ..api import disentangled_attention, disentangled_attention_varlen
from ..call import (
    LONGEST,
    Call,
    check_cu_seqlens_form,
    check_cu_seqlens_values,
    check_heads,
    check_mask,
    check_tables,
    checked_call,
    integer,
)
from ..dropout import seed_at
from ..relative_position import table_rows
from .exchange import agree, communicating, replicated, require_equal
from .heads import by_heads
from .ring import Ring, RingAttention
from .stretches import Stretches

METHODS = ("ring", "heads")


def disentangled_attention_context_parallel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pos_key: torch.Tensor | None = None,
    pos_query: torch.Tensor | None = None,
    *,
    group: Any = None,
    method: str = "ring",
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    position_buckets: int = 256,
    max_relative_positions: int = 512,
    far_negative: str = "hf",
    attention_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    first_slot: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
    stretches: Stretches | None = None,
    sum_table_gradients: bool = True,
) -> torch.Tensor | Any:  # Any: with return_lse a pair; callers without it need no cast
    """Computes ``disentangled_attention`` over sequences of which every rank of a process group has a stretch.

    The stretches follow each other in the order of ranks and may differ in length. All ranks must make the call, and
    backward through it. A result of one process is the same up to rounding, dropout included.

    Args:
        query, key, value: this rank's rows, (B, H, L_r, D), of a batch with L = sum of L_r columns; or of packed
            sequences, (T_r, H, D), with T = sum of T_r rows.
        pos_key, pos_query: the tables, (H, R, D), the same on all ranks.
        group: a ``torch.distributed.ProcessGroup``; None means all processes.
        method: "ring": keys and values travel from rank to rank, and partial results are merged. "heads": an exchange
            gives each rank all rows of some heads, whose number the ranks must divide.
        cu_seqlens: int32 (n + 1,), the ends of the packed sequences of all ranks together, from 0 to T.
        max_seqlen: at least the length of the longest packed sequence; None reads it from cu_seqlens.
        attention_mask: bool, True where a query may attend, for the keys of all ranks: (B, L), or four-dimensional and
            broadcastable to (B, H, L_r, L); or (T,). "heads" takes masks of keys only.
        stretches: who has which rows, where this is known already. None asks the other ranks, which synchronises, and
            compares the arguments of all ranks first.
        sum_table_gradients: the gradients of pos_key and pos_query are the sums over all ranks; False gives each rank
            the share of its rows or heads.
        The others: as in ``disentangled_attention``. Dropout draws its seed on the group's first rank.

    Returns:
        O of this rank's rows, (B, H, L_r, D) or (T_r, H, D); with return_lse also the log-sum-exp, (B, H, L_r) or
        (H, T_r).

    Raises:
        TypeError, ValueError, RuntimeError: as in ``disentangled_attention``. If one rank's arguments are wrong, all
            ranks raise before anything is sent; the others' errors name the rank. "ring" has no second derivatives and
            needs a backend with an explicit backward.
    """
    group = dist.group.WORLD if group is None else group
    make = functools.partial(
        _checked_call, query, key, value, pos_key, pos_query, cu_seqlens, position_buckets, max_relative_positions,
        far_negative, first_slot, scale, dropout_p, method, group,
    )  # fmt: skip
    if stretches is None:
        call, stretches = _agreed(make, group, cu_seqlens, attention_mask, method)
    else:
        call = make()
    longest = _longest(stretches, max_seqlen)
    whole = call.query.shape[1], table_rows(position_buckets, max_relative_positions), call.query.shape[3]
    numbering = position_buckets, max_relative_positions, far_negative
    check_tables(call.pos_key, call.pos_query, call.query.device, whole, numbering, first_slot, (longest, longest), 0)
    tables = [call.pos_key, call.pos_query]
    if sum_table_gradients:
        tables = [None if x is None else replicated(x, group, "position tables") for x in tables]
    if call.seed is not None:
        with communicating(group, "dropout seed", call.seed.device):
            dist.broadcast(call.seed, group=group, group_src=0)
    mask = None if attention_mask is None else _four_dimensional(attention_mask, call, stretches)
    call = call._replace(pos_key=tables[0], pos_query=tables[1], mask=mask, max_seqlen=longest)
    output, lse = (_by_ring if method == "ring" else _by_heads)(group, stretches, call, cu_seqlens, backend)
    if cu_seqlens is not None:
        output, lse = output.squeeze(0).transpose(0, 1), lse.squeeze(0)
    return (output, lse) if return_lse else output


def _checked_call(
    query, key, value, pos_key, pos_query, cu_seqlens, position_buckets, max_relative_positions, far_negative,
    first_slot, scale, dropout_p, method, group,
) -> Call:  # fmt: skip
    """Checks this rank's arguments and returns its call, packed sequences as a batch of one."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup of this process, got {type(group).__name__}")
    heads = (query, key, value)
    if cu_seqlens is not None:
        if not isinstance(query, torch.Tensor):
            raise TypeError(f"query must be a tensor, got {type(query).__name__}")
        check_cu_seqlens_form(cu_seqlens, query.device)
        check_heads(*heads, 3)
        heads = tuple(x.transpose(0, 1).unsqueeze(0) for x in heads)
    # This checks the tables' rows for this rank's lengths only; all ranks' lengths are checked once they are known.
    call = checked_call(
        *heads, pos_key, pos_query, None, None, position_buckets, max_relative_positions, far_negative, first_slot, 0,
        None, scale, dropout_p,
    )  # fmt: skip
    shape, rows = call.query.shape, call.key.shape[2]
    if shape[2] != rows:
        raise ValueError(f"key must have as many rows as query on each rank, {shape[2]}, got {rows}")
    if method == "heads" and shape[1] % group.size():
        raise ValueError(
            f"method='heads' needs a number of heads that the {group.size()} ranks divide, got {shape[1]}; "
            "method='ring' takes any"
        )
    try:
        group._get_backend(call.query.device)
    except RuntimeError as error:
        raise RuntimeError(f"the process group has no backend for tensors on {call.query.device}: {error}") from None
    return call


def _agreed(make, group, cu_seqlens, attention_mask, method) -> tuple[Call, Stretches]:
    """Compares the arguments of all ranks; returns this rank's call and who has which rows."""
    made: list[Call] = []

    def described() -> tuple:
        call = make()
        made.append(call)
        batch, heads, length, size = call.query.shape
        tables = [None if x is None else tuple(x.shape) for x in (call.pos_key, call.pos_query)]
        ends = None if cu_seqlens is None else cu_seqlens.tolist()
        settings = call.position_buckets, call.max_relative_positions, call.far_negative, call.first_slot
        same = (batch, heads, size, call.query.dtype, tables, ends, *settings, call.scale, call.dropout_p, method)
        mask = attention_mask
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool):
            raise TypeError(f"attention_mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        return length, same, None if mask is None else tuple(mask.shape)

    found = agree(group, described)
    require_equal([same for _, same, _ in found], "batch, heads, tables, cu_seqlens and settings")
    ends = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    stretches = Stretches(tuple(length for length, *_ in found), group.rank(), ends)
    if ends is not None:
        check_cu_seqlens_values(cu_seqlens.cpu(), stretches.total, LONGEST)
    batch, heads = made[0].query.shape[:2]
    for rank, (length, _, shape) in enumerate(found):
        require_mask_shape(shape, (batch, heads, length, stretches.total), ends is not None, method, rank)
    return made[0], stretches


def require_mask_shape(shape, whole: tuple[int, int, int, int], packed: bool, method: str, rank: int) -> None:
    """Raises ValueError, on all ranks alike, unless a rank's mask has a shape that the function accepts."""
    batch, _, _, total = whole
    keys = (total,) if packed else (batch, total)
    broadcastable = (
        not packed
        and shape is not None
        and len(shape) == 4
        and shape[3] == total
        and all(size in (1, most) for size, most in zip(shape, whole, strict=True))
        and (method != "heads" or shape[1] == shape[2] == 1)
    )
    if shape is not None and shape != keys and not broadcastable:
        form = "" if packed or method == "heads" else f" or broadcastable to {whole}"
        raise ValueError(f"attention_mask of rank {rank} must be of shape {keys}{form}, got {shape}")


def _longest(stretches: Stretches, max_seqlen: int | None) -> int:
    """The length of the longest sequence, or more if the caller says so."""
    if stretches.ends is None:
        return stretches.total
    longest = max((b - a for a, b in itertools.pairwise(stretches.ends)), default=0)
    return longest if max_seqlen is None else max(longest, integer("max_seqlen", max_seqlen))


def _four_dimensional(mask: torch.Tensor, call: Call, stretches: Stretches) -> torch.Tensor:
    """The mask as (B or 1, H or 1, L_r or 1, keys of all ranks)."""
    batch, heads, length, _ = call.query.shape
    whole = (batch, heads, length, stretches.total)
    return check_mask(mask[None] if stretches.ends is not None else mask, call.query.device, whole)


def _by_ring(group, stretches, call, cu_seqlens, backend):
    ends = None
    if stretches.inner is not None:
        rows, first, inner = stretches.inner
        ends = cu_seqlens[first : first + len(inner)] - (stretches.start + rows.start)
    tensors = call[:3]
    ring = Ring(group, stretches, call._replace(query=call.query.detach()), ends, backend)
    return RingAttention.apply(ring, *tensors, call.pos_key, call.pos_query)


def _by_heads(group, stretches, call, cu_seqlens, backend):
    heads, count = call.query.shape[1], call.query.shape[1] // group.size()
    first, packed = group.rank() * count, cu_seqlens is not None
    settings = dict(
        position_buckets=call.position_buckets, max_relative_positions=call.max_relative_positions,
        far_negative=call.far_negative, first_slot=call.first_slot, scale=call.scale, dropout_p=call.dropout_p,
        dropout_seed=None if call.seed is None else seed_at(call.seed, first_batch_head=first, heads=heads),
        return_lse=True, backend=backend, attention_mask=call.mask,
    )  # fmt: skip
    tables = [None if x is None else x[first : first + count] for x in (call.pos_key, call.pos_query)]

    def attend(*tensors):
        if not packed:
            return disentangled_attention(*tensors, *tables, **settings)
        settings["attention_mask"] = None if call.mask is None else call.mask.reshape(-1)
        output, lse = disentangled_attention_varlen(
            *(x.squeeze(0).transpose(0, 1) for x in tensors), *tables, cu_seqlens=cu_seqlens,
            max_seqlen=call.max_seqlen, check_values=False, **settings,
        )  # fmt: skip
        return output.transpose(0, 1).unsqueeze(0), lse.unsqueeze(0)

    return by_heads(group, stretches, *call[:3], attend)
