"""DeBERTa v1, v2 and v3: the encoder with its embeddings.

Names, arguments, outputs and defaults are Hugging Face's. v2's class is v1's with another configuration.
"""

import warnings

import torch

from .config import DebertaConfig, DebertaV2Config
from .embeddings import DebertaEmbeddings
from .encoder import DebertaEncoder
from .outputs import BaseModelOutput, ModelOutput
from .packing import Packing, packed_sequences
from .pretrained import PreTrainedModel


class DebertaModel(PreTrainedModel):
    """Embeddings and encoder of DeBERTa v1, without a pooler."""

    def __init__(self, config: DebertaConfig):
        super().__init__(config)
        self.embeddings = DebertaEmbeddings(config)
        self.encoder = DebertaEncoder(config)
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
        cu_seqlens: torch.Tensor | Packing | None = None,
        max_seqlen: int | None = None,
    ) -> BaseModelOutput | tuple:
        """Takes a batch (B, L); or with cu_seqlens the tokens of all sequences one after the other, (T,).

        Packed sequences need no padding, and no token sees another sequence. What is (B, L) below is (T,) for them.

        Args:
            input_ids: (B, L) token ids, or inputs_embeds (B, L, embedding_size).
            attention_mask: 1 for tokens and 0 for padding, any dtype, (B, L) or (B, 1, 1, L); or pairwise, which query
                may attend to which key, (B, L, L) or (B, 1, L, L). Not what is added to scores: anything but 0 counts
                as 1. Without one, everything is a token. Of packed sequences (T,) alone.
            token_type_ids, position_ids: (B, L), zeros and each token's place in its sequence by default.
            output_attentions: also return every layer's probabilities, (B, H, L, L), computed densely. There are none
                of packed sequences.
            output_hidden_states: also return the embeddings and every layer's output.
            return_dict: False returns a tuple. The three are the configuration's by default.
            cu_seqlens: int32 (n + 1,), on the same device: sequence s lies at rows cu_seqlens[s] to cu_seqlens[s + 1].
                Or a ``Packing`` of them, as task models give it.
            max_seqlen: at least the longest sequence's length. None reads it from cu_seqlens, which synchronises with
                the device; a compiled program needs it given.

        Returns:
            last_hidden_state (B, L, hidden_size) or (T, hidden_size), hidden_states, attentions.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds, or shapes that do not fit; output_attentions of
                packed sequences, or a model of them that has talking heads.
            TypeError: cu_seqlens or max_seqlen is not as described.
        """
        packing = given_packing(cu_seqlens, max_seqlen, attention_mask, input_ids, inputs_embeds)
        if packing is not None:
            output = self._run_packed(
                packing, input_ids, token_type_ids, position_ids, inputs_embeds, output_attentions, output_hidden_states
            )
            return returned(self, return_dict, output)
        shape = tuple(input_ids.shape if input_ids is not None else inputs_embeds.shape[:-1])
        if len(shape) != 2 or shape[1] == 0:
            name, form = (
                ("input_ids", "(B, L)") if input_ids is not None else ("inputs_embeds", "(B, L, embedding_size)")
            )
            given = tuple((inputs_embeds if input_ids is None else input_ids).shape)
            hint = "; packed sequences need cu_seqlens" if len(shape) == 1 else ""
            raise ValueError(f"{name} must be of shape {form} with L at least 1, got {given}{hint}")
        if attention_mask is None:
            self._warn_of_padding(input_ids)
        mask, token_mask = masks(attention_mask, *shape)
        embedded = self.embeddings(input_ids, token_mask, token_type_ids, position_ids, inputs_embeds)
        output = self._encode(embedded, mask, token_mask, output_hidden_states, output_attentions)
        return returned(self, return_dict, output)

    def _run_packed(
        self, packing, input_ids, token_type_ids, position_ids, inputs_embeds, output_attentions, output_hidden_states
    ) -> BaseModelOutput:
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions must be False with cu_seqlens: packed sequences have no probabilities")
        given = input_ids if input_ids is not None else inputs_embeds
        for name, x in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
            if x is not None and x.shape != given.shape[:1]:
                raise ValueError(f"{name} must be of shape {tuple(given.shape[:1])}, got {tuple(x.shape)}")
        if position_ids is None and self.embeddings.position_biased_input:
            position_ids = self._packed_positions(packing, given.shape[0])
        rows = (
            None if x is None else x.unsqueeze(0)
            for x in (input_ids, packing.mask, token_type_ids, position_ids, inputs_embeds)
        )
        embedded = self.embeddings(*rows).squeeze(0)
        return self._encode(embedded, packing, None, output_hidden_states, False)

    def _encode(self, embedded, mask, token_mask, output_hidden_states, output_attentions) -> BaseModelOutput:
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        repeats = config.z_steps - 1 if config.num_hidden_layers > 0 else 0
        keep_all = output_hidden_states or repeats > 0
        states, attentions = self.encoder(embedded, mask, token_mask, keep_all, output_attentions)
        if repeats > 0:
            states = [*states, *self.encoder.repeat_last_layer(states[-2], states[-1], mask, repeats)]
        return BaseModelOutput(
            last_hidden_state=states[-1],
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _packed_positions(self, packing: Packing, tokens: int) -> torch.Tensor:
        self.embeddings.check_length(packing.max_seqlen)
        return packing.positions(tokens)

    def enhanced_mask_decoder(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs the last layer twice more on the states it was given, with absolute positions in its first queries.

        Keys and values are hidden_states both times; the first queries are hidden_states + positions, the second ones
        the first output (He et al., arXiv 2006.03654, section 3.2, as Microsoft's code has it).

        Args:
            hidden_states: the last layer's input, (B, L, hidden_size).
            attention_mask, position_ids: as of ``forward``.

        Returns:
            (B, L, hidden_size)
        """
        positions = self.embeddings.positions(hidden_states.shape[1], position_ids)
        queries = hidden_states + self.embeddings.project(positions)
        mask, _ = masks(attention_mask, *hidden_states.shape[:2])
        return self.encoder.repeat_last_layer(hidden_states, queries, mask, 2)[-1]

    def enhanced_mask_decoder_packed(
        self, hidden_states: torch.Tensor, packing: Packing, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``enhanced_mask_decoder`` of packed states, (T, hidden_size) to (T, hidden_size)."""
        if position_ids is None:
            position_ids = self._packed_positions(packing, hidden_states.shape[0])
        queries = hidden_states + self.embeddings.project(self.embeddings.position_embeddings(position_ids))
        return self.encoder.repeat_last_layer(hidden_states, queries, packing, 2)[-1]

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


def given_packing(
    cu_seqlens: torch.Tensor | Packing | None,
    max_seqlen: int | None,
    attention_mask: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
) -> Packing | None:
    """The packing of what ``forward`` is called with; None where that is a batch.

    Raises:
        TypeError, ValueError: the arguments are not as ``DebertaModel.forward`` describes them.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds must be given")
    if isinstance(cu_seqlens, Packing):
        return cu_seqlens
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError(f"max_seqlen belongs to packed sequences: got max_seqlen={max_seqlen} and no cu_seqlens")
        return None
    given = input_ids if input_ids is not None else inputs_embeds
    if given.dim() != (1 if inputs_embeds is None else 2) or given.shape[0] == 0:
        name, form = ("input_ids", "(T,)") if inputs_embeds is None else ("inputs_embeds", "(T, embedding_size)")
        raise ValueError(
            f"{name} must be of shape {form} with T at least 1 beside cu_seqlens, got {tuple(given.shape)}"
        )
    return packed_sequences(cu_seqlens, max_seqlen, attention_mask, given)


def base_model(config: DebertaConfig) -> DebertaModel:
    return (DebertaModel if config.generation == 1 else DebertaV2Model)(config)


def returned(model: PreTrainedModel, return_dict: bool | None, output: ModelOutput) -> ModelOutput | tuple:
    return output if (model.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def masks(mask: torch.Tensor | None, batch: int, length: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The mask that attention takes, (B, L) or (B, 1, L, L), and the mask of tokens, (B, L), False for padding.

    Both are bool, as everything below takes them.

    Raises:
        ValueError: the mask is of another shape.
    """
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
