"""DeBERTa v1, v2 and v3: the encoder with its embeddings.

Names, arguments, outputs and defaults are Hugging Face's. v2's class is v1's with another configuration.
"""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from .config import DebertaConfig, DebertaV2Config
from .embeddings import DebertaEmbeddings
from .encoder import DebertaEncoder
from .outputs import BaseModelOutput, ModelOutput
from .packing import Packing, Sequences, is_sequences, packed_sequences
from .pretrained import PreTrainedModel

if TYPE_CHECKING:  # few processes need torch.distributed's parts, which it imports
    from .sharding import ContextParallel


class DebertaModel(PreTrainedModel):
    """Embeddings and encoder of DeBERTa v1, without a pooler."""

    def __init__(self, config: DebertaConfig):
        super().__init__(config)
        self.embeddings = DebertaEmbeddings(config)
        self.encoder = DebertaEncoder(config)
        # The processes that have a stretch of each sequence; deberta_fast.distributed.context_parallel sets it.
        self.context: ContextParallel | None = None
        self._saw_no_mask = False
        self.init_weights()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: torch.Tensor | Sequences | None = None,
        max_seqlen: int | None = None,
        num_layers: int | None = None,
    ) -> BaseModelOutput | tuple:
        """Takes a batch (B, L), or with cu_seqlens the tokens of all sequences one after the other, (T,).

        Packed sequences need no padding, and no token sees another sequence. Where (B, L) is written below, packed
        sequences have (T,).

        Args:
            input_ids: (B, L) token ids, or inputs_embeds (B, L, embedding_size).
            attention_mask: 1 for tokens and 0 for padding, any dtype, (B, L) or (B, 1, 1, L); or pairwise, which query
                may attend to which key, (B, L, L) or (B, 1, L, L). It is not added to scores: anything but 0 counts
                as 1. Without one, everything is a token. Packed sequences take (T,) only.
            token_type_ids, position_ids: (B, L), zeros and each token's place in its sequence by default.
            output_attentions: also return every layer's probabilities, (B, H, L, L), computed densely; not available
                for packed sequences.
            output_hidden_states: also return the embeddings and every layer's output.
            return_dict: False returns a tuple. The three default to the configuration's values.
            cu_seqlens: int32 (n + 1,), on the same device: sequence s lies at rows cu_seqlens[s] to cu_seqlens[s + 1].
                Task models pass ``Sequences``.
            max_seqlen: at least the longest sequence's length. None reads it from cu_seqlens, which synchronises with
                the device; a compiled program needs it given.
            num_layers: run only so many layers, the first ones, and no ``z_steps``; None runs all.

        Returns:
            last_hidden_state (B, L, hidden_size) or (T, hidden_size), hidden_states, attentions.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds are given, shapes do not fit, packed sequences
                come with output_attentions or a model that has talking heads, or there are fewer than num_layers.
            TypeError: cu_seqlens or max_seqlen is not as described.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if num_layers is not None and not 0 <= num_layers <= config.num_hidden_layers:
            raise ValueError(f"num_layers must be from 0 to {config.num_hidden_layers}, got {num_layers}")
        sequences = self.sequences(cu_seqlens, max_seqlen, attention_mask, input_ids, inputs_embeds)
        mask: torch.Tensor | Sequences | None
        if sequences is None:
            shape = check_form(input_ids, inputs_embeds, "B", "L", hint="packed sequences need cu_seqlens")
            if attention_mask is None:
                self._warn_of_padding(input_ids)
            mask, token_mask = masks(attention_mask, *shape)
            embedded = self._embed(input_ids, token_mask, token_type_ids, position_ids, inputs_embeds)
        elif output_attentions:
            raise ValueError("output_attentions must be False with cu_seqlens or shared sequences: no probabilities")
        else:
            mask, token_mask = sequences, sequences.tokens
            embedded = self._embed_sequences(sequences, input_ids, token_type_ids, position_ids, inputs_embeds)
        repeats = config.z_steps - 1 if config.num_hidden_layers > 0 and num_layers is None else 0
        keep_all = output_hidden_states or repeats > 0
        states, attentions = self.encoder(embedded, mask, token_mask, keep_all, output_attentions, num_layers)
        if repeats > 0:
            states = [*states, *self.encoder.repeat_last_layer(states[-2], states[-1], mask, repeats)]
        output = BaseModelOutput(
            last_hidden_state=states[-1],
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return returned(self, return_dict, output)

    def sequences(
        self,
        cu_seqlens: torch.Tensor | Sequences | None,
        max_seqlen: int | None,
        attention_mask: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
    ) -> Sequences | None:
        """Checks these arguments of ``forward``; returns packed sequences, or stretches where processes share them.

        None stands for a batch that this process has alone. Task models pass the result as cu_seqlens.
        """
        if self.context is None or is_sequences(cu_seqlens):
            return given_packing(cu_seqlens, max_seqlen, attention_mask, input_ids, inputs_embeds)
        rows = given_rows(input_ids, inputs_embeds)
        padding_rows = self.encoder.unpadding.padding_rows
        return self.context.sharding(rows, attention_mask, cu_seqlens, max_seqlen, padding_rows)

    def _embed_sequences(self, sequences, input_ids, token_type_ids, position_ids, inputs_embeds) -> torch.Tensor:
        rows = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
        for name, x in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
            if x is not None and x.shape != rows.shape:
                raise ValueError(f"{name} must be of shape {tuple(rows.shape)}, got {tuple(x.shape)}")
        if position_ids is None and self.embeddings.position_biased_input:
            position_ids = self._positions(sequences, rows.shape[-1])
        inputs = (input_ids, sequences.tokens, token_type_ids, position_ids, inputs_embeds)
        if rows.dim() == 2:
            return self._embed(*inputs)
        return self._embed(*(None if x is None else x.unsqueeze(0) for x in inputs)).squeeze(0)

    def _embed(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        """Runs the embeddings. Checkpointing runs them again in backward, unless it is reentrant: ids have no gradient
        that would make it."""
        options = self.encoder.checkpointing
        if options is None or options["use_reentrant"] or not self.training:
            return self.embeddings(*inputs)
        return checkpoint(self.embeddings, *inputs, **options)

    def _positions(self, sequences: Sequences, tokens: int) -> torch.Tensor:
        self.embeddings.check_length(sequences.max_seqlen)
        return sequences.positions(tokens)

    def enhanced_mask_decoder(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | Sequences | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs the last layer twice more on its input, with absolute positions in the first queries.

        Keys and values are hidden_states both times. The first queries are hidden_states + positions, the second ones
        the first output (He et al., arXiv 2006.03654, section 3.2, as in Microsoft's code).

        Args:
            hidden_states: the last layer's input, (B, L, hidden_size) or packed (T, hidden_size).
            attention_mask, position_ids: see ``forward``. ``Sequences`` for packed and shared states.

        Returns:
            (B, L, hidden_size) or (T, hidden_size)
        """
        mask: torch.Tensor | Sequences | None
        if is_sequences(attention_mask):
            mask = attention_mask
            if position_ids is None:
                position_ids = self._positions(mask, hidden_states.shape[-2])
        else:
            mask, _ = masks(attention_mask, *hidden_states.shape[:2])
        positions = self.embeddings.positions(hidden_states.shape[-2], position_ids)
        queries = hidden_states + self.embeddings.project(positions)
        return self.encoder.repeat_last_layer(hidden_states, queries, mask, 2)[-1]

    def _warn_of_padding(self, input_ids: torch.Tensor | None) -> None:
        """Checks only the first call, because the check synchronises with the device."""
        if self._saw_no_mask or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        if input_ids is not None and torch._C._functorch.is_functorch_wrapped_tensor(input_ids):
            return
        self._saw_no_mask = True
        pad = self.config.pad_token_id
        if pad is None or input_ids is None or input_ids.numel() == 0 or input_ids.is_meta:
            return
        if (input_ids[:, [0, -1]] == pad).any():
            warnings.warn(
                f"input_ids hold padding ({pad}), and there is no attention_mask: it counts as text", stacklevel=4
            )


class DebertaV2Model(DebertaModel):
    """Embeddings and encoder of DeBERTa v2 and v3, without a pooler."""

    config_class = DebertaV2Config


def check_form(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    *dims: str,
    nonempty: bool = True,
    hint: str = "",
) -> torch.Size:
    """Checks that input_ids have the dimensions ``dims``, or inputs_embeds these and one more, and returns their sizes.

    The last of ``dims`` must not be 0 if ``nonempty``. The error for input_ids of one dimension ends with ``hint``.
    """
    name, given, names = "input_ids", input_ids, dims
    if inputs_embeds is not None:
        name, given, names = "inputs_embeds", inputs_embeds, (*dims, "embedding_size")
    if given.dim() != len(names) or (nonempty and given.shape[len(dims) - 1] == 0):
        form = f"({', '.join(names)}{',' if len(names) == 1 else ''})"
        least = f" with {dims[-1]} at least 1" if nonempty else ""
        hint = f"; {hint}" if hint and given.dim() == len(names) - 1 else ""
        raise ValueError(f"{name} must be of shape {form}{least}, got {tuple(given.shape)}{hint}")
    return given.shape[: len(dims)]


def given_rows(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """Returns the one of both that is given."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds must be given")
    return input_ids if inputs_embeds is None else inputs_embeds  # type: ignore[return-value]


def given_packing(
    cu_seqlens: torch.Tensor | Sequences | None,
    max_seqlen: int | None,
    attention_mask: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
) -> Packing | Any:  # Any: Sequences if cu_seqlens is one
    """Checks which inputs ``DebertaModel.forward`` is given; returns the packing of sequences, or None for a batch."""
    states = given_rows(input_ids, inputs_embeds)
    if is_sequences(cu_seqlens):
        return cu_seqlens
    if cu_seqlens is not None:
        check_form(input_ids, inputs_embeds, "T")
        return packed_sequences(cu_seqlens, max_seqlen, attention_mask, states)
    if max_seqlen is not None:
        raise ValueError(f"max_seqlen belongs to packed sequences: got max_seqlen={max_seqlen} and no cu_seqlens")
    return None


def base_model(config: DebertaConfig) -> DebertaModel:
    return (DebertaModel if config.generation == 1 else DebertaV2Model)(config)


def returned(model: PreTrainedModel, return_dict: bool | None, output: ModelOutput) -> ModelOutput | tuple:
    return output if (model.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def masks(mask: torch.Tensor | None, batch: int, length: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The mask for attention, (B, L) or (B, 1, L, L), and the mask of tokens, (B, L), False for padding; both bool."""
    if mask is None:
        return None, None
    mask = mask.bool()
    if mask.shape == (batch, length):
        return mask, mask
    if mask.shape == (batch, 1, 1, length):
        return mask[:, 0, 0], mask[:, 0, 0]
    if mask.shape == (batch, length, length):
        return mask.unsqueeze(1), mask.any(-2)
    if mask.shape == (batch, 1, length, length):
        return mask, mask[:, 0].any(-2)
    raise ValueError(
        f"attention_mask must be of shape {(batch, length)}, or pairwise {(batch, length, length)} or "
        f"{(batch, 1, length, length)}, got {tuple(mask.shape)}"
    )
