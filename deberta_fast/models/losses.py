"""Losses of the task models, by the rules of Hugging Face's DeBERTa."""

import torch
from torch.nn import functional as F


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of logits (B, L, N) and labels (B, L) other than -100."""
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels must be of shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}")
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def span_loss(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    start_positions: torch.Tensor,
    end_positions: torch.Tensor,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross entropy of a span's start and end, logits (B, L), positions (B,) or (B, 1).

    Positions below 0 count as 0. Positions outside of the text or in its padding are ignored, and so are the logits of
    padding, where token_mask, bool (B, L), is False.
    """
    batch, outside = start_logits.shape
    losses = []
    for name, logits, positions in (("start", start_logits, start_positions), ("end", end_logits, end_positions)):
        if positions.shape not in ((batch,), (batch, 1)):
            raise ValueError(f"{name}_positions must be of shape {(batch,)}, got {tuple(positions.shape)}")
        positions = positions.reshape(-1).clamp(0, outside)
        if token_mask is not None:
            token = F.pad(token_mask, (0, 1)).gather(1, positions.unsqueeze(1)).squeeze(1)
            positions = torch.where(token, positions, outside)
            logits = logits.masked_fill(~token_mask, -torch.inf)
        losses.append(F.cross_entropy(logits, positions, ignore_index=outside))
    return (losses[0] + losses[1]) / 2


def sequence_loss(logits: torch.Tensor, labels: torch.Tensor, problem_type: str | None) -> torch.Tensor:
    """Loss of logits (B, num_labels) by the rules of Hugging Face's DeBERTa.

    With a problem_type: mean squared error ("regression"), cross entropy ("single_label_classification"), binary cross
    entropy ("multi_label_classification"). Without: mean squared error for one label; cross entropy of class numbers,
    (B,) or (B, 1), ignoring negative ones, and zero if all are; otherwise cross entropy of probabilities
    (B, num_labels).
    """
    batch, number = logits.shape
    classes = problem_type == "single_label_classification" or (problem_type is None and number > 1)
    if labels.shape in ((batch,), (batch, 1)):
        labels = labels.reshape(-1, 1) if number == 1 and not classes else labels.reshape(-1)
    if not (classes and labels.shape == (batch,)) and labels.shape != logits.shape:
        raise ValueError(
            f"labels must be of shape {tuple(logits.shape)}{f' or ({batch},)' if classes else ''}, "
            f"got {tuple(labels.shape)}"
        )
    if problem_type == "single_label_classification" and labels.dim() == 1 and labels.is_floating_point():
        raise TypeError(f"labels must be class numbers, got {labels.dtype}")
    exact = torch.promote_types(logits.dtype, labels.dtype if labels.is_floating_point() else torch.float32)
    logits = logits.to(exact)
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.to(exact))
    if problem_type == "regression" or not classes:
        return F.mse_loss(logits, labels.to(exact))
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels)
    if labels.dim() == 2:
        return -(F.log_softmax(logits, -1) * labels).sum(-1).mean()
    labels = labels.long().clamp(min=-1)
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / (labels >= 0).sum().clamp(min=1)
