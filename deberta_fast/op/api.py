"""Disentangled attention as functions: every argument is checked, then the chosen backend runs.

    A_ij = s (q_i . k_j  +  q_i . K^r[sigma(i - j)]  +  k_j . Q^r[sigma(i - j)]),   O = softmax(A) V

Source: He et al., DeBERTa (arXiv 2006.03654), equations 2 to 4; sigma is ``relative_position``'s.
"""

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
        backend: a name of ``backends.BACKENDS``. None takes the first that can serve the call on a CPU, and elsewhere
            the fastest that has proved itself on the device (``set_backend_check``). Inside torch.func's transforms,
            forward-mode derivatives, torch.jit.trace and ONNX exports only "reference" can: None takes it, with one
            warning.

    Returns:
        O (B, H, Lq, D), laid out as (B, Lq, H, D); with return_lse also the log-sum-exp. Gradients flow to the five
        tensors. Second derivatives (create_graph=True) are the reference's, whatever the backend, and take its memory:
        Lq x Lk a head.

    Raises:
        TypeError, ValueError: an argument is not as described; names argument, expected and got.
        RuntimeError: the named backend cannot serve the call; lists its reasons. No backend is named, and a CUDA graph
            is being captured before any call like it.
    """
    call = checked_call(
        query, key, value, pos_key, pos_query, attention_mask, None, position_buckets, max_relative_positions,
        far_negative, first_slot, query_offset, None, scale, dropout_p,
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
    query_offset: int = 0,
    first_slot: int = 0,
    head_logits_proj: torch.nn.Module | None = None,
    head_weights_proj: torch.nn.Module | None = None,
    dropout: torch.nn.Module | None = None,
    uniform: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``disentangled_attention`` for whoever wants the probabilities or talking heads: dense, by the reference.

    Args:
        head_logits_proj, head_weights_proj: linear maps over the heads of the scores before the softmax and of the
            probabilities after dropout (Shazeer et al., arXiv 2003.02436); None leaves them out.
        dropout: a module that runs on the probabilities, (B, H, Lq, Lk), in the place of ``dropout_p``.
        uniform: a query that sees no key weighs all alike, as in Hugging Face's models, and does not get zeros.
        The others: as in ``disentangled_attention``.

    Returns:
        O (B, H, Lq, D) and the probabilities after dropout (B, H, Lq, Lk).

    Raises:
        TypeError, ValueError: as ``disentangled_attention``.
    """
    call = checked_call(
        query, key, value, pos_key, pos_query, attention_mask, None, position_buckets, max_relative_positions,
        far_negative, first_slot, query_offset, None, scale, dropout_p,
    )  # fmt: skip
    with call.outside_autocast():
        output, _, probabilities = backends.reference.attention_with_probabilities(
            call,
            head_logits_proj=head_logits_proj,
            head_weights_proj=head_weights_proj,
            dropout=dropout,
            uniform=uniform,
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
    """``disentangled_attention`` over packed sequences, without padding: each attends only within itself.

    Args:
        query, key, value: (T, H, D), all sequences one after the other.
        cu_seqlens: int32 (n + 1,), on the same device: sequence s lies at rows cu_seqlens[s] to cu_seqlens[s + 1].
            Rises from 0 to T; empty sequences are allowed. On a GPU a device-side assertion checks its values.
        max_seqlen: at least the longest sequence's length.
        attention_mask: bool (T,), False for keys that nobody attends to.
        check_values: False is the promise that cu_seqlens went through ``schema.checked_cu_seqlens`` with these T and
            max_seqlen, or is right by construction. Models check once a forward pass, not once a layer: wrong values
            make kernels read and write elsewhere.
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
        far_negative, first_slot, query_offset, max_seqlen, scale, dropout_p,
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
        output, lse = attend(call, name, return_lse)
    return (output, lse) if return_lse else output
