"""Embeddings: from token ids to the input of the encoder."""

import torch
from torch import nn

from .config import DebertaConfig
from .onednn_linear import project


class DebertaEmbeddings(nn.Module):
    """Embeddings of words, optionally of positions and token types; then LayerNorm, mask and dropout."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        width = config.embedding_size or config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_biased_input = config.position_biased_input
        # If positions are not added here, the enhanced mask decoder adds them after the encoder
        positions = config.position_biased_input or config.enhanced_mask_decoder
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width) if positions else None
        types = config.type_vocab_size
        self.token_type_embeddings = nn.Embedding(types, width) if types > 0 else None
        self.embed_proj = nn.Linear(width, config.hidden_size, bias=False) if width != config.hidden_size else None
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            input_ids: (B, L), or inputs_embeds of shape (B, L, embedding_size).
            token_mask: bool (B, L), False for padding, whose embeddings become zero; None masks nothing.
            token_type_ids: (B, L), zeros by default; ignored by models without token types.
            position_ids: (1, L) or (B, L), 0 to L - 1 by default.

        Returns:
            (B, L, hidden_size)
        """
        states = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if self.position_biased_input:
            states = states + self.positions(states.shape[1], position_ids)
        if self.token_type_embeddings is not None:
            if token_type_ids is None:
                token_type_ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
            states = states + self.token_type_embeddings(token_type_ids)
        states = self.LayerNorm(self.project(states))
        if token_mask is not None:
            states = states * token_mask.unsqueeze(-1)
        return self.dropout(states)

    def positions(self, length: int, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings of absolute positions, (1, L, embedding_size), or those of position_ids, (..., embedding_size)."""
        if position_ids is not None:
            return self.position_embeddings(position_ids)
        self.check_length(length)
        return self.position_embeddings.weight[:length].unsqueeze(0)

    def check_length(self, length: int) -> None:
        """Raises ValueError if sequences of this length exceed max_position_embeddings."""
        longest = self.position_embeddings.num_embeddings
        if length > longest:
            raise ValueError(
                f"sequences may be max_position_embeddings={longest} tokens long with absolute positions, "
                f"got {length}: truncate them"
            )

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """(..., embedding_size) to (..., hidden_size)."""
        return states if self.embed_proj is None else project(self.embed_proj, states)
