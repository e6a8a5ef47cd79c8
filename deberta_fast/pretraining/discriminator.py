"""The model that tells replaced tokens from original ones (replaced-token detection, RTD)."""

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from ..models.activation import activation
from ..models.config import DebertaConfig, DebertaV2Config
from ..models.model import base_model, masks
from ..models.onednn_linear import project
from ..models.outputs import ModelOutput, States
from ..models.task_models import TaskModel


@dataclasses.dataclass
class ReplacedTokensOutput(ModelOutput):
    """loss, a scalar, if there are labels; logits (B, L) or (T,); the others as ``BaseModelOutput``."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: States = None
    attentions: States = None


class ReplacedTokensHead(nn.Module):
    """y_i = w2 . act(W1 LayerNorm(h_0 + h_i) + b1) + b2, with h_0 the sequence's first state.

    The formula and the names are those of Microsoft's code (microsoft/DeBERTa, mask_predictions of their checkpoints).
    """

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(self, states: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """States (..., hidden_size), and each row's first state, to logits (...)."""
        normalised = self.LayerNorm(first + states)
        return self.classifier(project(self.dense, normalised, self.activation)).squeeze(-1)


class DebertaForReplacedTokens(TaskModel):
    """Predicts for every token whether a generator has replaced it (Clark et al., arXiv 2003.10555, section 2).

    labels are 1 for replaced tokens, 0 for original ones and negative where there is nothing to predict, (B, L) or (T,)
    as input_ids. The loss is the mean binary cross entropy over all tokens that are not padding, in float32 at least.
    logits are (B, L) or (T,): positive means replaced.
    """

    output_class = ReplacedTokensOutput

    def __init__(self, config: DebertaConfig):
        super().__init__(config)
        self.deberta = base_model(config)
        self.mask_predictions = ReplacedTokensHead(config)
        self.init_weights()

    def _head(self, states, attention_mask, packing, labels):
        if packing is None:
            first = states[:, :1]
        else:
            first = packing.repeated(packing.first_tokens(states), states.shape[0])
        logits, loss = self.mask_predictions(states, first), None
        if labels is not None:
            token_mask = masks(attention_mask, *states.shape[:2])[1] if packing is None else packing.tokens
            loss = replaced_tokens_loss(logits, labels, token_mask)
        return {"loss": loss, "logits": logits}


class DebertaV2ForReplacedTokens(DebertaForReplacedTokens):
    """``DebertaForReplacedTokens`` of v2 and v3."""

    config_class = DebertaV2Config


def replaced_tokens_loss(
    logits: torch.Tensor, labels: torch.Tensor, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean binary cross entropy of logits and labels of one shape, over tokens whose label is not negative.

    token_mask, bool of that shape, is False for padding, which does not count either. Without any token, the loss is 0.
    """
    if labels.shape != logits.shape:
        raise ValueError(f"labels must be of shape {tuple(logits.shape)}, got {tuple(labels.shape)}")
    counted = labels >= 0 if token_mask is None else (labels >= 0) & token_mask
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return losses.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)
