"""Heads of the task models, pooler and language model, and the losses."""

import torch
from torch import nn
from torch.nn import functional as F

from .activation import activation
from .config import DebertaConfig
from .onednn_linear import project


class ContextPooler(nn.Module):
    """act(W dropout(h_0) + b) for the first token's state h_0, (B, hidden_size) to (B, pooler_hidden_size)."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_hidden_size)
        self.dropout = nn.Dropout(config.pooler_dropout)
        self.activation = activation(config.pooler_hidden_act)

    def forward(self, first: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(self.dropout(first)))


class LMHead(nn.Module):
    """Scores of the whole vocabulary: LayerNorm(act(W h + b)) E^T + bias, with E the word embeddings or a decoder."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        width = config.embedding_size or config.hidden_size
        self.dense = nn.Linear(config.hidden_size, width)
        self.activation = activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(width, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        # Only the older of Hugging Face's two heads can have its own weights
        untied = config.legacy and not config.tie_word_embeddings
        self.decoder = nn.Linear(width, config.vocab_size, bias=False) if untied else None

    def forward(self, hidden_states: torch.Tensor, word_embeddings: nn.Embedding) -> torch.Tensor:
        states = self.LayerNorm(project(self.dense, hidden_states, self.activation))
        if self.decoder is None:
            _check_together(states, word_embeddings.weight)
            return F.linear(states, word_embeddings.weight, self.bias)
        return self.decoder(states) + self.bias


def _check_together(states: torch.Tensor, words: torch.Tensor) -> None:
    """Raises RuntimeError if this process has only a shard of the word embeddings while the head needs all."""
    if hasattr(words, "to_local") and not hasattr(states, "to_local"):
        raise RuntimeError(
            "the word embeddings are sharded while the language model's head multiplies with them: shard both as one "
            "group, fully_shard([model.deberta.embeddings, model.lm_predictions])"
        )


class LMPredictions(nn.Module):
    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.lm_head = LMHead(config)

    def forward(self, hidden_states: torch.Tensor, word_embeddings: nn.Embedding) -> torch.Tensor:
        return self.lm_head(hidden_states, word_embeddings)


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
            token = nn.functional.pad(token_mask, (0, 1)).gather(1, positions.unsqueeze(1)).squeeze(1)
            positions = torch.where(token, positions, outside)
            logits = logits.masked_fill(~token_mask, -torch.inf)
        losses.append(F.cross_entropy(logits, positions, ignore_index=outside))
    return (losses[0] + losses[1]) / 2


def first_states(states: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """The first token of each sequence, (B, L, hidden_size) to (B, hidden_size).

    ``token_mask`` is bool (B, L), False for padding; None takes the first row, even if it is padding.
    """
    if token_mask is None:
        return states[:, 0]
    first = token_mask.int().argmax(1)
    return states.gather(1, first.view(-1, 1, 1).expand(-1, 1, states.shape[-1])).squeeze(1)


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
