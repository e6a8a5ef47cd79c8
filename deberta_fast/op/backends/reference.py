"""The specification: disentangled attention written as the paper writes it, dense and differentiable.

    A_ij = s (q_i . k_j  +  q_i . K^r[sigma(i - j)]  +  k_j . Q^r[sigma(i - j)])                (1)
    P_ij = softmax_j(A_ij)                                                                      (2)
    O_i  = sum_j P_ij v_j                                                                       (3)

Source: He et al., DeBERTa (arXiv 2006.03654), equations 2 to 4. Everything is of size Lq x Lk per head. Other backends
are tested against this one. It also returns probabilities and computes talking heads, but is too large to train with.
"""

import torch

from ..call import Call
from ..dropout import keep_mask, number_heads, threshold_and_scale
from ..relative_position import distance_slots


def why_not(call: Call) -> list[str]:
    """Returns reasons not to serve this call: a trace cannot record that the lengths of packed sequences are read."""
    ends = call.cu_seqlens
    if ends is None or torch.compiler.is_compiling():
        return []
    if torch.jit.is_tracing():
        return ["packed sequences cannot be traced by torch.jit, which would keep their lengths as constants"]
    if ends.is_meta or _is_mapped(ends):
        return ["packed sequences need a cu_seqlens with values, neither on meta nor mapped over by torch.vmap"]
    return []


def _is_mapped(x: torch.Tensor) -> bool:
    """Tells whether torch.vmap maps over a tensor, under any other transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def attention(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns output (B, H, Lq, D) and log-sum-exp (B, H, Lq), differentiable by autograd to any order."""
    calls = [call] if call.cu_seqlens is None else call.sequences() or [call]
    parts = [attention_with_probabilities(x, batch) for batch, x in enumerate(calls)]
    output, lse = (torch.cat([part[index] for part in parts], 2) for index in range(2))
    return output.transpose(1, 2).contiguous().transpose(1, 2), lse


def attention_with_probabilities(
    call: Call,
    first_batch: int = 0,
    head_logits_proj: torch.nn.Module | None = None,
    head_weights_proj: torch.nn.Module | None = None,
    dropout: torch.nn.Module | None = None,
    uniform: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns output (B, H, Lq, D), log-sum-exp (B, H, Lq) and probabilities after dropout (B, H, Lq, Lk).

    Args:
        call: a call without cu_seqlens.
        first_batch: number of the first batch row, for dropout.
        head_logits_proj, head_weights_proj: v1's talking heads, linear maps over the heads of the scores before the
            softmax and of the probabilities after dropout (Shazeer et al., arXiv 2003.02436).
        dropout: a module that runs on the probabilities, (B, H, Lq, Lk), instead of the mask of equation 12.
        uniform: a query that sees no key gives all keys equal weight, as in Hugging Face's models, instead of zero.
    """
    q, k, v = (heads.to(call.work_dtype) for heads in (call.query, call.key, call.value))
    batch, heads, query_length, _ = q.shape
    key_length = k.shape[2]
    i = torch.arange(query_length, device=q.device)
    j = torch.arange(key_length, device=q.device)

    # torch.onnx.export(dynamo=False) lacks mT, and exports movedim(1, -1) below wrongly.
    q = q * call.scale
    scores = q @ k.transpose(-1, -2)
    if call.has_positions:
        distances = i[:, None] + call.query_offset - j[None, :]
        slots = distance_slots(call.device_tables.slots, distances) - call.first_slot
        slots = slots.expand(batch, heads, -1, -1)
    if call.pos_key is not None:
        scores = scores + (q @ call.pos_key.to(q).transpose(-1, -2)).gather(-1, slots)
    if call.pos_query is not None:
        by_key = k @ (call.pos_query.to(q) * call.scale).transpose(-1, -2)
        scores = scores + by_key.gather(-1, slots.transpose(-1, -2)).transpose(-1, -2)
    if head_logits_proj is not None:
        scores = head_logits_proj(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    visible = torch.ones(1, 1, 1, key_length, dtype=torch.bool, device=q.device)
    if call.mask is not None:
        visible = visible & call.mask
    # A query that sees no key has no softmax: it gets any scores here and zeros afterwards.
    some = visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible, -torch.inf).masked_fill(~some, 0.0)
    probabilities = torch.softmax(scores, -1).masked_fill(~visible & some if uniform else ~visible, 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(~some[..., 0], -torch.inf)

    if dropout is not None:
        probabilities = dropout(probabilities)
    elif call.dropout_p > 0:
        row = torch.arange(first_batch, first_batch + batch, device=q.device)[:, None]
        batch_head = number_heads(call.seed, row, torch.arange(heads, device=q.device), heads)[..., None, None]
        keep = keep_mask(call.seed, batch_head, i[:, None], (0, key_length), call.dropout_p)
        probabilities = probabilities * keep * threshold_and_scale(call.dropout_p)[1]
    if head_weights_proj is not None:
        probabilities = head_weights_proj(probabilities.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return (probabilities @ v).to(call.query.dtype), lse, probabilities.to(call.query.dtype)
