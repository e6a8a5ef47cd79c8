"""Disentangled attention as functions: every argument is checked, then the chosen backend runs.

    A_ij = s (q_i . k_j  +  q_i . K^r[sigma(i - j)]  +  k_j . Q^r[sigma(i - j)]),   O = softmax(A) V

Source: He et al., DeBERTa (arXiv 2006.03654), equations 2 to 4; sigma is ``relative_position``'s.
"""

import torch

from . import backends
from .call import AttentionInputs, check_ends
from .dropout import new_seed
from .relative_position import FAR_NEGATIVE_RULES, table_rows
from .schema import DisentangledAttention, check_cu_seqlens

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def disentangled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pos_key: torch.Tensor | None = None,
    pos_query: torch.Tensor | None = None,
    *,
    position_buckets: int = 256,
    max_relative_positions: int = 512,
    far_negative: str = "hf",
    attention_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    query_offset: int = 0,
    first_slot: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Disentangled attention of DeBERTa v1, v2 and v3, content-to-content, content-to-position, position-to-content.

    Args:
        query: (B, H, Lq, D), float32, bfloat16, float16 or float64.
        key, value: (B, H, Lk, D), dtype and device as query. Lq and Lk may differ.
        pos_key: K^r, the projected table of the content-to-position term, (H, R, D); None leaves the term out.
        pos_query: Q^r, of the position-to-content term, (H, R, D); None leaves the term out.
        position_buckets: B; 0 or less means one row a distance (v1). R must be 2B, or 2M without buckets.
        max_relative_positions: M.
        far_negative: the row of distances <= -M with buckets: "hf" (row 0) or "ms" (row 1, as Microsoft's code).
        attention_mask: bool, True where a query may attend; (B, Lk), or four-dimensional and broadcastable to
            (B, H, Lq, Lk). A query that sees no key gets zeros, and a log-sum-exp of minus infinity.
        scale: s; None means 1 / sqrt(D (1 + [pos_key given] + [pos_query given])).
        dropout_p: probability of dropping an attention probability, in [0, 1). Apply 0 outside training yourself.
        query_offset: position of the first query; query i and key j are i + query_offset - j apart.
        first_slot: the row of the whole table that row 0 of pos_key and pos_query is, where only the rows that these
            lengths can reach were projected (``relative_position.SlotTable.window``).
        return_lse: also return log sum_j exp(A_ij), (B, H, Lq), float32 (float64 for float64).
        backend: a name of ``backends.BACKENDS``, or None for the first that can serve the call.

    Returns:
        O (B, H, Lq, D), laid out as (B, Lq, H, D); with return_lse also the log-sum-exp. Gradients flow to the five
        tensors, once: a second derivative raises, except with backend="reference".

    Raises:
        TypeError, ValueError: an argument is not as described; names argument, expected and got.
        RuntimeError: the named backend cannot serve the call; lists its reasons.
    """
    inputs = _dense_inputs(
        query, key, value, pos_key, pos_query, position_buckets, max_relative_positions, far_negative, attention_mask,
        scale, dropout_p, query_offset, first_slot,
    )  # fmt: skip
    return _attend(inputs, return_lse, backend)


def disentangled_attention_with_probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pos_key: torch.Tensor | None = None,
    pos_query: torch.Tensor | None = None,
    *,
    position_buckets: int = 256,
    max_relative_positions: int = 512,
    far_negative: str = "hf",
    attention_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    query_offset: int = 0,
    first_slot: int = 0,
    head_logits_proj: torch.nn.Module | None = None,
    head_weights_proj: torch.nn.Module | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``disentangled_attention`` for whoever wants the probabilities or talking heads: dense, by the reference.

    Args:
        head_logits_proj, head_weights_proj: linear maps over the heads of the scores before the softmax and of the
            probabilities after dropout (Shazeer et al., arXiv 2003.02436); None leaves them out.
        The others: as in ``disentangled_attention``.

    Returns:
        O (B, H, Lq, D) and the probabilities after dropout (B, H, Lq, Lk).

    Raises:
        TypeError, ValueError: as ``disentangled_attention``.
    """
    inputs = _dense_inputs(
        query, key, value, pos_key, pos_query, position_buckets, max_relative_positions, far_negative, attention_mask,
        scale, dropout_p, query_offset, first_slot,
    )  # fmt: skip
    inputs = _checked(inputs)
    with torch.autocast(inputs.query.device.type, enabled=False):
        output, _, probabilities = backends.reference.attention_with_probabilities(
            inputs, head_logits_proj=head_logits_proj, head_weights_proj=head_weights_proj
        )
    return output, probabilities


def disentangled_attention_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pos_key: torch.Tensor | None = None,
    pos_query: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    position_buckets: int = 256,
    max_relative_positions: int = 512,
    far_negative: str = "hf",
    attention_mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    query_offset: int = 0,
    first_slot: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
    check_values: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``disentangled_attention`` over packed sequences, without padding: each attends within itself alone.

    Args:
        query, key, value: (T, H, D), all sequences one after the other.
        cu_seqlens: int32 (n + 1,), on the same device: sequence s lies at rows cu_seqlens[s] to cu_seqlens[s + 1].
            Rises from 0 to T; empty sequences are allowed. On a GPU a device-side assertion checks its values.
        max_seqlen: at least the longest sequence's length.
        attention_mask: bool (T,), False for keys that nobody attends to.
        check_values: False: the caller has checked cu_seqlens with ``checked_cu_seqlens``.
        The others: as in ``disentangled_attention``.

    Returns:
        O (T, H, D), contiguous; with return_lse also the log-sum-exp (H, T).

    Raises:
        TypeError, ValueError, RuntimeError: as in ``disentangled_attention``.
    """
    _check_heads(query, key, value, ndim=3, layout="(T, H, D)")
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"key must have as many rows as query, {query.shape[0]}, got {key.shape[0]}")
    check_ends(cu_seqlens, query.device)
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen must not be negative, got {max_seqlen}")
    if attention_mask is not None and attention_mask.dim() != 1:
        raise ValueError(f"attention_mask must be of shape ({query.shape[0]},), got {tuple(attention_mask.shape)}")
    query, key, value, pos_key, pos_query = _autocast(query, key, value, pos_key, pos_query)
    # To a backend, a dense call with one batch row: cu_seqlens says where in it the sequences lie.
    query, key, value = (heads.transpose(0, 1).unsqueeze(0) for heads in (query, key, value))
    result = _attend(
        AttentionInputs(
            query=query,
            key=key,
            value=value,
            pos_key=pos_key,
            pos_query=pos_query,
            mask=None if attention_mask is None else _broadcast_mask(attention_mask[None], query, key.shape[2]),
            cu_seqlens=cu_seqlens,
            seed=None,
            position_buckets=position_buckets,
            max_relative_positions=max_relative_positions,
            far_negative=far_negative,
            first_slot=first_slot,
            query_offset=query_offset,
            max_seqlen=max_seqlen,
            scale=_scale(scale, query, pos_key, pos_query),
            dropout_p=dropout_p,
        ),
        return_lse,
        backend,
    )
    if return_lse:
        return result[0].squeeze(0).transpose(0, 1), result[1].squeeze(0)
    return result.squeeze(0).transpose(0, 1)


def _dense_inputs(
    query, key, value, pos_key, pos_query, position_buckets, max_relative_positions, far_negative, attention_mask,
    scale, dropout_p, query_offset, first_slot,
) -> AttentionInputs:  # fmt: skip
    _check_heads(query, key, value, ndim=4, layout="(B, H, L, D)")
    query, key, value, pos_key, pos_query = _autocast(query, key, value, pos_key, pos_query)
    return AttentionInputs(
        query=query,
        key=key,
        value=value,
        pos_key=pos_key,
        pos_query=pos_query,
        mask=_broadcast_mask(attention_mask, query, key.shape[2]),
        cu_seqlens=None,
        seed=None,
        position_buckets=position_buckets,
        max_relative_positions=max_relative_positions,
        far_negative=far_negative,
        first_slot=first_slot,
        query_offset=query_offset,
        max_seqlen=query.shape[2],
        scale=_scale(scale, query, pos_key, pos_query),
        dropout_p=dropout_p,
    )


def _checked(inputs: AttentionInputs) -> AttentionInputs:
    """With a seed, if there is dropout."""
    _check_positions(inputs)
    if not 0 <= inputs.dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {inputs.dropout_p}")
    return inputs._replace(seed=new_seed(inputs.query.device)) if inputs.dropout_p > 0 else inputs


def _attend(inputs: AttentionInputs, return_lse: bool, backend: str | None):
    inputs = _checked(inputs)
    name = backends.choose(backend, inputs)
    if name == "reference":
        check_cu_seqlens(inputs)
        with torch.autocast(inputs.query.device.type, enabled=False):
            output, lse = backends.reference.attention(inputs)
    else:
        output, lse = DisentangledAttention.apply(*inputs, name)
    return (output, lse) if return_lse else output


def _check_heads(query, key, value, ndim: int, layout: str) -> None:
    for name, heads in (("query", query), ("key", key), ("value", value)):
        if not isinstance(heads, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(heads).__name__}")
        if heads.dim() != ndim:
            raise ValueError(f"{name} must be of shape {layout}, got {tuple(heads.shape)}")
        if heads.dtype not in _DTYPES:
            raise TypeError(f"{name} must be one of {', '.join(map(str, _DTYPES))}, got {heads.dtype}")
        if heads.device != query.device:
            raise ValueError(f"{name} must be on query's device, {query.device}, got {heads.device}")
    if key.shape != value.shape:
        raise ValueError(f"value must have key's shape, {tuple(key.shape)}, got {tuple(value.shape)}")
    # The length is the third dimension of the dense layout and the first of the packed one.
    fixed = (0, 1, 3) if ndim == 4 else (1, 2)
    if any(query.shape[d] != key.shape[d] for d in fixed):
        raise ValueError(
            f"key must match query, {tuple(query.shape)}, in all but the length of {layout}, got {tuple(key.shape)}"
        )
    if query.shape[-1] < 1:
        raise ValueError("query must have a head size of at least 1, got 0")


def _autocast(*tensors):
    """As torch's own attention under autocast: to its dtype, float64 left alone. One dtype and a unit last stride."""
    query = tensors[0]
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        tensors = [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]
    names = ("query", "key", "value", "pos_key", "pos_query")
    for name, x in zip(names, tensors, strict=True):
        if x is not None and x.dtype != tensors[0].dtype:
            raise TypeError(f"{name} must have query's dtype, {tensors[0].dtype}, got {x.dtype}")
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _scale(scale, query, pos_key, pos_query) -> float:
    if scale is not None:
        return float(scale)
    return (query.shape[-1] * (1 + (pos_key is not None) + (pos_query is not None))) ** -0.5


def _check_positions(inputs: AttentionInputs) -> None:
    if inputs.far_negative not in FAR_NEGATIVE_RULES:
        raise ValueError(f"far_negative must be one of {FAR_NEGATIVE_RULES}, got {inputs.far_negative!r}")
    tables = [(name, x) for name in ("pos_key", "pos_query") if (x := getattr(inputs, name)) is not None]
    query, key = inputs.query, inputs.key
    for name, x in tables:
        if x.device != query.device:
            raise ValueError(f"{name} must be on query's device, {query.device}, got {x.device}")
        if x.dim() != 3 or x.shape[0] != query.shape[1] or x.shape[2] != query.shape[3]:
            raise ValueError(f"{name} must be of shape ({query.shape[1]}, R, {query.shape[3]}), got {tuple(x.shape)}")
        if x.shape[1] != tables[0][1].shape[1]:
            raise ValueError(f"pos_query must have pos_key's rows, {tables[0][1].shape[1]}, got {x.shape[1]}")
        rows, first = table_rows(inputs.position_buckets, inputs.max_relative_positions), inputs.first_slot
        if x.shape[1] == rows and first == 0:
            continue
        lengths = (query.shape[2], key.shape[2]) if inputs.cu_seqlens is None else (inputs.max_seqlen,) * 2
        start, stop = inputs.table.window(*lengths, inputs.query_offset)
        if not 0 <= first <= start or not stop <= first + x.shape[1] <= rows:
            raise ValueError(
                f"{name} must have all {rows} rows of the table, or at least rows {start} to {stop} that these lengths "
                f"reach, got rows {first} to {first + x.shape[1]}"
            )


def _broadcast_mask(mask, query, key_length):
    """Four-dimensional, its last dimension Lk, the others 1 or whole."""
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
