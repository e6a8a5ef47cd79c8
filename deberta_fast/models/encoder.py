"""The encoder: a stack of layers that share the table of relative positions."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .activation import activation
from .add_norm import add_and_norm
from .attention import DisentangledSelfAttention
from .config import DebertaConfig
from .onednn_linear import project
from .ordinary import why_not_ordinary
from .packing import Packing, Sequences, Unpadding, is_sequences
from .weight_cache import WeightCache


class AddAndNorm(nn.Module):
    """LayerNorm(dropout(W h + b) + input), (..., width) and (..., hidden_size) to (..., hidden_size)."""

    def __init__(self, width: int, config: DebertaConfig):
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        return add_and_norm(self.LayerNorm, self.dropout(project(self.dense, hidden_states)), input_tensor)


class DebertaAttention(nn.Module):
    """Attention, output projection and norm; the residual is the input of the queries."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.self = DisentangledSelfAttention(config)
        self.output = AddAndNorm(self.self.num_attention_heads * self.self.attention_head_size, config)

    def forward(self, hidden_states, mask, rel_embeddings, query_states, output_attentions):
        context, probabilities = self.self(hidden_states, mask, rel_embeddings, query_states, output_attentions)
        return self.output(context, hidden_states if query_states is None else query_states), probabilities


class DebertaIntermediate(nn.Module):
    """act(W h + b), (..., hidden_size) to (..., intermediate_size)."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = activation(config.hidden_act)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return project(self.dense, hidden_states, self.intermediate_act_fn)


class DebertaLayer(nn.Module):
    """Attention and feed-forward, each followed by a norm.

    Tensors are passed by position, because reentrant checkpointing detaches only positional ones. If the position table
    were not detached, every layer's backward would run through the graph of the table's norm.
    """

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.attention = DebertaAttention(config)
        self.intermediate = DebertaIntermediate(config)
        self.output = AddAndNorm(config.intermediate_size, config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | Sequences | None = None,
        rel_embeddings: torch.Tensor | None = None,
        query_states: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Takes the arguments of ``DisentangledSelfAttention``; returns states, and the probabilities or None."""
        attended, probabilities = self.attention(hidden_states, mask, rel_embeddings, query_states, output_attentions)
        return self.output(self.intermediate(attended), attended), probabilities


class ConvLayer(nn.Module):
    """v2's convolution of the embeddings, added to the first layer's output ("n-gram induced input encoding")."""

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


def position_table(embeddings: nn.Embedding | None, norm: nn.Module | None, cache: WeightCache) -> torch.Tensor | None:
    """The table of relative positions, (R, hidden_size), after its norm.

    The norm takes less time than comparing its weights with a copy, so its result is cached only if the weights are
    promised to be constant. It is then the same tensor in every call, so values made from it can be cached too.
    """
    if embeddings is None or norm is None:
        return None if embeddings is None else embeddings.weight
    if not cache.constant or why_not_ordinary(norm, nn.LayerNorm) is not None:
        return norm(embeddings.weight)
    weights = [embeddings.weight, norm.weight, norm.bias]
    cached = cache.get(weights, lambda: norm(embeddings.weight), (norm.normalized_shape, norm.eps))
    return norm(embeddings.weight) if cached is None else cached


def run_layers(
    call: Callable,
    depth: int,
    hidden_states: torch.Tensor,
    mask: torch.Tensor | Sequences | None,
    packing: Packing | None,
    unpadding: Unpadding,
    conv: nn.Module | None,
    token_mask: torch.Tensor | None,
    output_hidden_states: bool,
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """The loop over the layers, for this library's encoder and for a patched one.

    Args:
        call: ``call(index, states, mask)`` runs one layer; returns its output, and its probabilities or None.
        depth: the number of layers.
        packing: removes the padding of hidden_states (B, L, hidden_size) before the first layer; None keeps it.
        unpadding: restores the rows of padding.
        conv: v2's convolution of the embeddings, added to the first layer's output; or None.
        token_mask: the mask for ``conv``, (B, L), 0 for padding; unused for packed states.

    The other arguments and the result are those of ``DebertaEncoder.forward``.
    """
    shape, given = hidden_states.shape[:2], mask
    if packing is not None:
        hidden_states, mask = packing.pack(hidden_states), packing
    states, attentions = [hidden_states], []
    for index in range(depth):
        output, probabilities = call(index, states[-1], mask)
        if index == 0 and conv is not None and is_sequences(mask):
            output = mask.convolve(conv, hidden_states, output, token_mask)
        elif index == 0 and conv is not None:
            output = conv(hidden_states, output, token_mask)
        states = [*states, output] if output_hidden_states else [output]
        attentions.append(probabilities)
    return unpadding.padded(states, packing, given, shape), attentions


class DebertaEncoder(nn.Module):
    """The layers, the table of relative positions with its norm, and v2's convolution."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.layer = nn.ModuleList(DebertaLayer(config) for _ in range(config.num_hidden_layers))
        self.rel_embeddings = nn.Embedding(config.table_rows, config.hidden_size) if config.relative_attention else None
        normalised = getattr(config, "normalises_table", False)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if normalised else None
        self.conv = ConvLayer(config) if getattr(config, "conv_kernel_size", 0) > 0 else None
        self.checkpointing: dict | None = None  # keywords of torch.utils.checkpoint; None disables checkpointing
        self.checkpoint_every = 1
        self.unpadding = Unpadding("auto")
        self.cache = WeightCache()

    def _table(self) -> torch.Tensor | None:
        return position_table(self.rel_embeddings, self.LayerNorm, self.cache)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | Sequences | None = None,
        token_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        num_layers: int | None = None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """
        Args:
            hidden_states: the embeddings, (B, L, hidden_size); or packed, (T, hidden_size).
            mask: see ``DisentangledSelfAttention``. The padding of a mask (B, L) is removed if ``unpadding`` says so.
            token_mask: bool (B, L), False for padding; unused for packed states.
            num_layers: run only so many, the first ones; None runs all.

        Returns:
            Every layer's output, starting with the embeddings (only the last without output_hidden_states), and every
            layer's probabilities (none without output_attentions).
        """
        packing, table = self._packing(mask, output_attentions), self._table()
        call = lambda index, states, mask: self._run(index, states, mask, table, None, output_attentions)
        depth = len(self.layer) if num_layers is None else num_layers
        states, attentions = run_layers(
            call, depth, hidden_states, mask, packing, self.unpadding, self.conv, token_mask,
            output_hidden_states,
        )  # fmt: skip
        return states, attentions if output_attentions else []

    def repeat_last_layer(
        self, hidden_states: torch.Tensor, query_states: torch.Tensor, mask: torch.Tensor | Sequences | None, times: int
    ) -> list[torch.Tensor]:
        """Runs the last layer ``times`` more times and returns their outputs, for Microsoft's enhanced mask decoder and
        z_steps.

        Keys and values come from hidden_states each time. Queries come from query_states first, then from the previous
        output.
        """
        packing, table, last = self._packing(mask), self._table(), len(self.layer) - 1
        keys = hidden_states if packing is None else packing.pack(hidden_states)
        call = lambda _, queries, mask: self._run(last, keys, mask, table, queries, False)
        states, _ = run_layers(call, times, query_states, mask, packing, self.unpadding, None, None, True)
        return states[1:]

    def _packing(self, mask: torch.Tensor | Sequences | None, output_attentions: bool = False) -> Packing | None:
        reasons = (layer.attention.self.dense_reason() for layer in self.layer)
        dense = "output_attentions" if output_attentions else next(filter(None, reasons), None)
        return self.unpadding.packing(mask, self, dense)

    def _run(self, index: int, *inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer = self.layer[index]
        if self.checkpointing is not None and self.training and index % self.checkpoint_every == 0:
            return checkpoint(layer, *inputs, **self.checkpointing)
        return layer(*inputs)
