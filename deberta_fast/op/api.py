"""The public functions of disentangled attention: they check the arguments and run the chosen backend.

    A_ij = s (q_i . k_j  +  q_i . K^r[sigma(i - j)]  +  k_j . Q^r[sigma(i - j)]),   O = softmax(A) V

Source: He et al., DeBERTa (arXiv 2006.03654), equations 2 to 4; sigma is ``relative_position``'s.
"""

from typing import Any

import torch

from . import backends, selection
from .call import Call, checked_call
from .schema import attend, checked_cu_seqlens


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
    dropout_seed: torch.Tensor | None = None,
    query_offset: int = 0,
    first_slot: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | Any:  # Any: with return_lse a pair; callers without it need no cast
    """Computes disentangled attention: content-to-content, content-to-position and position-to-content terms.

    Args:
        query: (B, H, Lq, D), float32, bfloat16, float16 or float64.
        key, value: (B, H, Lk, D), dtype and device as query. Lq and Lk may differ.
        pos_key: K^r, the projected table of the content-to-position term, (H, R, D); None leaves the term out.
        pos_query: Q^r, of the position-to-content term, (H, R, D); None leaves the term out.
        position_buckets: B; 0 or less means one row per distance (v1). R must be 2B, or 2M without buckets.
        max_relative_positions: M.
        far_negative: the row of distances <= -M with buckets: "hf" (row 0) or "ms" (row 1, as in Microsoft's code).
        attention_mask: bool, True where a query may attend; (B, Lk), or four-dimensional and broadcastable to
            (B, H, Lq, Lk). A query that sees no key gets zeros, and a log-sum-exp of minus infinity.
        scale: s; None means 1 / sqrt(D (1 + [pos_key given] + [pos_query given])).
        dropout_p: probability of dropping an attention probability, in [0, 1), rounded to a multiple of 2^-16 (to 2^-16
            if it is smaller, but not 0). Apply 0 outside training yourself.
        dropout_seed: what the dropout mask is made from, int64 on query's device: a seed (1,), or (5,) by
            ``dropout.seed_at`` for a part of a larger call. None draws a seed from torch's generator. Backward reads it
            again, so do not write to it before.
        query_offset: position of the first query; query i and key j are i + query_offset - j apart.
        first_slot: the number of row 0 of pos_key and pos_query in the whole table, if these hold only the rows that
            the lengths can reach (``relative_position.SlotTable.window``).
        return_lse: also return log sum_j exp(A_ij), (B, H, Lq), float32 (float64 for float64).
        backend: a name of ``backends.BACKENDS``. None takes the first that can serve the call on a CPU, and elsewhere
            the fastest that passes the check on the device (``set_backend_check``). Inside torch.func's transforms,
            forward-mode derivatives, torch.jit.trace and ONNX exports only "reference" can run: None takes it, with
            one warning.

    Returns:
        O (B, H, Lq, D), laid out as (B, Lq, H, D); with return_lse also the log-sum-exp. Gradients flow to the five
        tensors. The reference computes second derivatives (create_graph=True) for every backend, in memory of size
        Lq x Lk per head.

    Raises:
        TypeError, ValueError: an argument is not as described. The message names the argument, what was expected and
            what was passed.
        RuntimeError: the named backend cannot serve the call, for the reasons listed. Or no backend is named, and a
            CUDA graph is being captured before any call like this one.
    """
    call = checked_call(
        query, key, value, pos_key, pos_query, attention_mask, None, position_buckets, max_relative_positions,
        far_negative, first_slot, query_offset, None, scale, dropout_p, dropout_seed,
    )  # fmt: skip
    return _run(call, return_lse, backend)


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
    dropout_seed: torch.Tensor | None = None,
    query_offset: int = 0,
    first_slot: int = 0,
    **options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns O (B, H, Lq, D) and the probabilities after dropout (B, H, Lq, Lk), computed by the reference.

    Args:
        options: keyword arguments of ``backends.reference.attention_with_probabilities``.
        The others: as in ``disentangled_attention``.

    Raises:
        TypeError, ValueError: as ``disentangled_attention``.
    """
    call = checked_call(
        query, key, value, pos_key, pos_query, attention_mask, None, position_buckets, max_relative_positions,
        far_negative, first_slot, query_offset, None, scale, dropout_p, dropout_seed,
    )  # fmt: skip
    with call.outside_autocast():
        output, _, probabilities = backends.reference.attention_with_probabilities(call, **options)
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
    dropout_seed: torch.Tensor | None = None,
    query_offset: int = 0,
    first_slot: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
    check_values: bool = True,
) -> torch.Tensor | Any:  # Any: with return_lse a pair; callers without it need no cast
    """Computes ``disentangled_attention`` over packed sequences without padding: each attends only within itself.

    Args:
        query, key, value: (T, H, D), all sequences one after the other.
        cu_seqlens: int32 (n + 1,), on the same device: sequence s is rows cu_seqlens[s] to cu_seqlens[s + 1]. It rises
            from 0 to T; empty sequences are allowed. On a GPU a device-side assertion checks its values.
        max_seqlen: at least the longest sequence's length.
        attention_mask: bool (T,), False for keys that no query attends to.
        check_values: False promises that ``schema.checked_cu_seqlens`` checked cu_seqlens for these T and max_seqlen,
            or that it is right by construction. Models check once per forward pass, not once per layer. With wrong
            values, kernels read and write out of bounds.
        The others: as in ``disentangled_attention``.

    Returns:
        O (T, H, D), contiguous; with return_lse also the log-sum-exp (H, T).

    Raises:
        TypeError, ValueError, RuntimeError: as in ``disentangled_attention``.
    """
    if cu_seqlens is None:
        raise TypeError("cu_seqlens must be an int32 tensor, got None")
    call = checked_call(
        query, key, value, pos_key, pos_query, attention_mask, cu_seqlens, position_buckets, max_relative_positions,
        far_negative, first_slot, query_offset, max_seqlen, scale, dropout_p, dropout_seed,
    )  # fmt: skip
    if check_values:
        call = call._replace(cu_seqlens=checked_cu_seqlens(cu_seqlens, query.shape[0], call.max_seqlen))
    result = _run(call, return_lse, backend)
    if return_lse:
        return result[0].squeeze(0).transpose(0, 1), result[1].squeeze(0)
    return result.squeeze(0).transpose(0, 1)


def _run(call: Call, return_lse: bool, backend: str | None):
    name = selection.choose(backend, call)
    if name == "reference":
        with call.outside_autocast():
            output, lse = backends.reference.attention(call)
    else:
        output, lse = attend(call, name, return_lse)  # type: ignore[assignment]  # lse is None unless it is asked for
    return (output, lse) if return_lse else output
