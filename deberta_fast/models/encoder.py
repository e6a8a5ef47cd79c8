"""The stack of layers, with the table of relative positions that they share."""

import warnings

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .activation import activation
from .attention import DisentangledSelfAttention
from .config import DebertaConfig
from .onednn_linear import project
from .packing import Packing, packing_of, why_not
from .weight_cache import WeightCache


class AddAndNorm(nn.Module):
    """LayerNorm(dropout(W x + b) + residual)."""

    def __init__(self, width: int, config: DebertaConfig):
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(project(self.dense, x)) + residual)


class DebertaAttention(nn.Module):
    """Attention, added to what asked: to the queries' states."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.self = DisentangledSelfAttention(config)
        self.output = AddAndNorm(self.self.num_attention_heads * self.self.attention_head_size, config)

    def forward(self, hidden_states, mask, rel_embeddings, query_states, output_attentions):
        context, probabilities = self.self(hidden_states, mask, rel_embeddings, query_states, output_attentions)
        return self.output(context, hidden_states if query_states is None else query_states), probabilities


class DebertaIntermediate(nn.Module):
    """The feed-forward layer's first half."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = activation(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(project(self.dense, x))


class DebertaLayer(nn.Module):
    """Attention and feed-forward, normalised after each.

    Its tensors are positional: reentrant checkpointing detaches those alone, and would walk the graph of the normalised
    table once a layer otherwise.
    """

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.attention = DebertaAttention(config)
        self.intermediate = DebertaIntermediate(config)
        self.output = AddAndNorm(config.intermediate_size, config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | Packing | None = None,
        rel_embeddings: torch.Tensor | None = None,
        query_states: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Arguments as of ``DisentangledSelfAttention``; returns states and the probabilities or None."""
        attended, probabilities = self.attention(hidden_states, mask, rel_embeddings, query_states, output_attentions)
        return self.output(self.intermediate(attended), attended), probabilities


class ConvLayer(nn.Module):
    """v2's convolution of the embeddings, added to the first layer's output (nGiE)."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        size = config.conv_kernel_size
        self.conv = nn.Conv1d(
            config.hidden_size, config.hidden_size, size, padding=size // 2, groups=config.conv_groups
        )
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.activation = activation(config.conv_act)

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor, token_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """All (B, L, hidden_size); token_mask bool (B, L), or None."""
        output = self.conv(hidden_states.transpose(1, 2)).transpose(1, 2)
        output = self.LayerNorm(residual + self.activation(self.dropout(output)))
        return output if token_mask is None else output * token_mask.unsqueeze(-1)


def normalised_table(weight: torch.Tensor, norm: nn.Module | None, kept: WeightCache) -> torch.Tensor:
    """The table of relative positions, (R, hidden_size); ``kept`` keeps it in inference."""
    if norm is None:
        return weight
    # Whatever is more than torch's own depends on who knows what
    if type(norm) is nn.LayerNorm and not ("forward" in vars(norm) or norm._forward_hooks or norm._forward_pre_hooks):
        weights = [weight, norm.weight, norm.bias]
        if kept.keeps(weights):
            return kept.get(weights, lambda: norm(weight))
    kept.clear()
    return norm(weight)


class DebertaEncoder(nn.Module):
    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.layer = nn.ModuleList(DebertaLayer(config) for _ in range(config.num_hidden_layers))
        self.rel_embeddings = nn.Embedding(config.table_rows, config.hidden_size) if config.relative_attention else None
        normalised = getattr(config, "normalises_table", False)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if normalised else None
        self.conv = ConvLayer(config) if getattr(config, "conv_kernel_size", 0) > 0 else None
        self.checkpointing: dict | None = None  # torch.utils.checkpoint's keywords, where layers are checkpointed
        self.checkpoint_every = 1
        self.unpad: bool | str = "auto"  # "auto" and True take padding out; True says so where it stays
        self.talking_head = config.talking_head
        self._warned = False
        self.kept = WeightCache()

    def table(self) -> torch.Tensor | None:
        """Relative positions, (R, hidden_size)."""
        if self.rel_embeddings is None:
            return None
        return normalised_table(self.rel_embeddings.weight, self.LayerNorm, self.kept)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | Packing | None = None,
        token_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """
        Args:
            hidden_states: the embeddings, (B, L, hidden_size); or packed, (T, hidden_size).
            mask: as of ``DisentangledSelfAttention``. With (B, L), padding is left out on the way, as ``unpad`` says.
            token_mask: bool (B, L), False for padding; not for packed states.

        Returns:
            Every layer's output, the embeddings first (only the last one without output_hidden_states), and every
            layer's probabilities (none without output_attentions).
        """
        packing = self._packing(mask, output_attentions)
        if packing is not None:
            states, _ = self.forward(packing.pack(hidden_states), packing, None, output_hidden_states)
            return [packing.pad(x, *hidden_states.shape[:2]) for x in states], []
        table = self.table()
        states, attentions = [hidden_states], []
        for index in range(len(self.layer)):
            output, probabilities = self._run(index, states[-1], mask, table, None, output_attentions)
            if index == 0 and self.conv is not None and isinstance(mask, Packing):
                output = mask.convolve(self.conv, hidden_states, output)
            elif index == 0 and self.conv is not None:
                output = self.conv(hidden_states, output, token_mask)
            states = [*states, output] if output_hidden_states else [output]
            if output_attentions:
                attentions.append(probabilities)
        return states, attentions

    def again(
        self,
        hidden_states: torch.Tensor,
        query_states: torch.Tensor,
        mask: torch.Tensor | Packing | None,
        times: int,
    ) -> list[torch.Tensor]:
        """The last layer run ``times`` more, each on the output before it as queries, with keys and values of
        hidden_states: Microsoft's z_steps and the enhanced mask decoder's two layers."""
        packing = self._packing(mask)
        if packing is not None:
            outputs = self.again(packing.pack(hidden_states), packing.pack(query_states), packing, times)
            return [packing.pad(x, *hidden_states.shape[:2]) for x in outputs]
        table, last = self.table(), len(self.layer) - 1
        outputs = []
        for _ in range(times):
            query_states, _ = self._run(last, hidden_states, mask, table, query_states, False)
            outputs.append(query_states)
        return outputs

    def _packing(self, mask: torch.Tensor | Packing | None, output_attentions: bool = False) -> Packing | None:
        """Of a batch whose padding is to be left out."""
        if not self.unpad or mask is None or isinstance(mask, Packing):
            return None
        reason = why_not(mask)
        if output_attentions or self.talking_head:
            reason = "output_attentions and talking heads are computed densely"
        if reason is None:
            return packing_of(mask, self.unpad)
        if self.unpad is True and not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            warnings.warn(f"padding stays, in spite of unpad=True: {reason}", stacklevel=2)
        return None

    def _run(self, index: int, *inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer = self.layer[index]
        if self.checkpointing is not None and self.training and index % self.checkpoint_every == 0:
            return checkpoint(layer, *inputs, **self.checkpointing)
        return layer(*inputs)
