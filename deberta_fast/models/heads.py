"""Heads of the task models: pooler and language model."""

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
            return F.linear(states, word_embeddings.weight, self.bias)
        return self.decoder(states) + self.bias


class LMPredictions(nn.Module):
    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.lm_head = LMHead(config)

    def forward(self, hidden_states: torch.Tensor, word_embeddings: nn.Embedding) -> torch.Tensor:
        return self.lm_head(hidden_states, word_embeddings)


def first_states(states: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """The first token of each sequence, (B, L, hidden_size) to (B, hidden_size).

    ``token_mask`` is bool (B, L), False for padding; None takes the first row, even if it is padding.
    """
    if token_mask is None:
        return states[:, 0]
    first = token_mask.int().argmax(1)
    return states.gather(1, first.view(-1, 1, 1).expand(-1, 1, states.shape[-1])).squeeze(1)
