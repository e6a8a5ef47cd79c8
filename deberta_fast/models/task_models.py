"""The task models of DeBERTa v1, v2 and v3.

Names, arguments, outputs, losses and defaults are Hugging Face's. v2's classes are v1's with another configuration.
Like ``DebertaModel``, all of them take packed sequences too: (T,) with cu_seqlens instead of (B, L).
"""

import torch
from torch import nn

from .config import DebertaConfig, DebertaV2Config
from .heads import ContextPooler, LMPredictions, first_states
from .losses import sequence_loss, span_loss, token_loss
from .model import base_model, check_form, given_rows, masks, returned
from .outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from .packing import Sequences, check_choices
from .pretrained import PreTrainedModel, resized


class TaskModel(PreTrainedModel):
    """The encoder and a head. ``_head`` of a subclass returns the loss, or None without targets, and the logits."""

    output_class: type[ModelOutput]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> ModelOutput | tuple:
        """The class describes labels and logits. The other arguments are those of ``DebertaModel``.

        Returns:
            loss, logits, hidden_states, attentions.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        asked = (output_attentions, output_hidden_states)
        return self._run(inputs, asked, return_dict, cu_seqlens, max_seqlen, labels=labels)

    def _run(self, inputs, asked, return_dict, cu_seqlens, max_seqlen, **targets) -> ModelOutput | tuple:
        """Runs the encoder on ``inputs``, the first five arguments of ``forward``, and the head with ``targets``."""
        packing = self.deberta.sequences(cu_seqlens, max_seqlen, inputs[1], inputs[0], inputs[4])
        states, outputs = self._encode(inputs, asked, packing)
        values = self._head(states, inputs[1], packing, **targets)
        output = self.output_class(**values, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
        return returned(self, return_dict, output)

    def _encode(self, inputs: tuple, asked: tuple, packing: Sequences | None) -> tuple[torch.Tensor, BaseModelOutput]:
        """The states that the head reads, and the encoder's output."""
        outputs = self.deberta(*inputs, *asked, True, packing)
        return outputs.last_hidden_state, outputs

    def _token_mask(self, attention_mask: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor | None:
        """The tokens that a head reads, bool (B, L); None for all: with ``padding_rows`` "hf", padding too."""
        if self.deberta.encoder.unpadding.padding_rows == "hf":
            return None
        return masks(attention_mask, *states.shape[:2])[1]


def _token_loss(packing: Sequences | None, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return token_loss(logits, labels) if packing is None else packing.token_loss(logits, labels)


class DebertaForMaskedLM(TaskModel):
    """Language model of masked tokens. With ``enhanced_mask_decoder`` in the configuration, Microsoft's decoder.

    labels are token ids, (B, L) or (T,) as input_ids, -100 where there is nothing to predict. logits are
    (B, L, vocab_size) or (T, vocab_size).
    """

    checkpoint_part = "generator"
    output_class = MaskedLMOutput

    def __init__(self, config: DebertaConfig):
        super().__init__(config)
        self.deberta = base_model(config)
        self.lm_predictions = LMPredictions(config)
        self.init_weights()

    def _head(self, states, attention_mask, packing, labels):
        logits = self.lm_predictions(states, self.get_input_embeddings())
        return {"loss": None if labels is None else _token_loss(packing, logits, labels), "logits": logits}

    def predicting_states(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[torch.Tensor, BaseModelOutput]:
        """The states that the head predicts from, (B, L, hidden_size) or (T, hidden_size), and ``deberta``'s output.

        With the enhanced mask decoder the output is empty unless attentions or hidden states are asked for: the
        decoder's two runs of the last layer replace the ordinary one. Arguments are those of ``forward``. Scores of a
        whole vocabulary are large: pass only the states at masks to ``lm_predictions`` where no others are needed.
        """
        packing = self.deberta.sequences(cu_seqlens, max_seqlen, attention_mask, input_ids, inputs_embeds)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return self._encode(inputs, (output_attentions, output_hidden_states), packing)

    def _encode(self, inputs, asked, packing):
        config = self.config
        if not config.enhanced_mask_decoder or config.position_biased_input:
            return super()._encode(inputs, asked, packing)
        _, attention_mask, _, position_ids, _ = inputs
        # The decoder reads the last layer's input, so that layer's ordinary run is left out where nobody asked for it.
        before_last = config.num_hidden_layers - 1
        attentions = config.output_attentions if asked[0] is None else asked[0]
        hidden_states = config.output_hidden_states if asked[1] is None else asked[1]
        if attentions or hidden_states:
            _, outputs = super()._encode(inputs, (attentions, True), packing)
            states = outputs.hidden_states[before_last]  # the repetitions of z_steps add states behind it
            if not hidden_states:
                outputs = BaseModelOutput(last_hidden_state=outputs.last_hidden_state, attentions=outputs.attentions)
        else:
            states = self.deberta(*inputs, False, False, True, packing, num_layers=before_last).last_hidden_state
            outputs = BaseModelOutput()
        mask = attention_mask if packing is None else packing
        return self.deberta.enhanced_mask_decoder(states, mask, position_ids), outputs

    def get_output_embeddings(self) -> nn.Module:
        """The word embeddings where they are tied; otherwise the decoder, a Linear. Both have a weight (V, width)."""
        decoder = self.lm_predictions.lm_head.decoder
        return self.get_input_embeddings() if decoder is None else decoder

    def set_output_embeddings(self, embeddings: nn.Module) -> None:
        """Ties the output if given the word embeddings; otherwise ``embeddings`` becomes the decoder."""
        tied = embeddings.weight is self.get_input_embeddings().weight
        self.config.tie_word_embeddings = tied
        self.config.legacy = self.config.legacy or not tied
        self.lm_predictions.lm_head.decoder = None if tied else embeddings

    def tie_weights(self) -> None:
        """Makes the output use the word embeddings, if the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_predictions.lm_head.decoder = None

    def _resize_output(self, rows: int, mean: bool) -> None:
        head = self.lm_predictions.lm_head
        if rows != head.bias.shape[0]:
            head.bias = resized(head.bias, rows, 0.0)
            if head.decoder is not None:
                weight = head.decoder.weight
                head.decoder.weight = resized(weight, rows, self._new_rows(weight, rows, mean))
                head.decoder.out_features = rows


class DebertaV2ForMaskedLM(DebertaForMaskedLM):
    """``DebertaForMaskedLM`` of v2 and v3."""

    config_class = DebertaV2Config


class _FirstTokenModel(TaskModel):
    """A head on the first token's state: pooler, dropout and a linear layer."""

    def __init__(self, config: DebertaConfig, outputs: int):
        super().__init__(config)
        self.deberta = base_model(config)
        self.pooler = ContextPooler(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob if config.cls_dropout is None else config.cls_dropout)
        self.classifier = nn.Linear(config.pooler_hidden_size, outputs)
        self.init_weights()

    def _logits(self, states, attention_mask, packing) -> torch.Tensor:
        if packing is None:
            first = first_states(states, self._token_mask(attention_mask, states))
        else:
            first = packing.first_tokens(states)
        return self.classifier(self.dropout(self.pooler(first)))


class DebertaForSequenceClassification(_FirstTokenModel):
    """Classification or regression of whole texts and pairs, from the first token's state.

    labels are (B,) class numbers or values, or (B, num_labels) probabilities or values: see ``sequence_loss``. B is the
    number of sequences, packed ones too. logits are (B, num_labels), or (B,) where there is one label, labels are given
    and no problem_type is set.
    """

    output_class = SequenceClassifierOutput

    def __init__(self, config: DebertaConfig):
        super().__init__(config, config.num_labels)
        self.num_labels = config.num_labels

    def _head(self, states, attention_mask, packing, labels):
        logits, problem, loss = self._logits(states, attention_mask, packing), self.config.problem_type, None
        if labels is not None:
            loss = sequence_loss(logits, labels, problem)
            logits = logits.view(-1) if self.num_labels == 1 and problem is None else logits
        return {"loss": loss, "logits": logits}


class DebertaV2ForSequenceClassification(DebertaForSequenceClassification):
    """``DebertaForSequenceClassification`` of v2 and v3."""

    config_class = DebertaV2Config


class DebertaForTokenClassification(TaskModel):
    """Classification of every token.

    labels are class numbers, (B, L) or (T,) as input_ids, -100 where there is none. logits are (B, L, num_labels) or
    (T, num_labels).
    """

    output_class = TokenClassifierOutput

    def __init__(self, config: DebertaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.deberta = base_model(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.init_weights()

    def _head(self, states, attention_mask, packing, labels):
        logits = self.classifier(self.dropout(states))
        return {"loss": None if labels is None else _token_loss(packing, logits, labels), "logits": logits}


class DebertaV2ForTokenClassification(DebertaForTokenClassification):
    """``DebertaForTokenClassification`` of v2 and v3."""

    config_class = DebertaV2Config


class DebertaForQuestionAnswering(TaskModel):
    """Predicts where in the text an answer starts and ends."""

    output_class = QuestionAnsweringModelOutput

    def __init__(self, config: DebertaConfig):
        super().__init__(config)
        self.deberta = base_model(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.init_weights()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> QuestionAnsweringModelOutput | tuple:
        """
        Args:
            start_positions, end_positions: (B,), counted within each sequence, packed ones too; positions beyond its
                end are ignored.
            The others: see ``DebertaModel``.

        Returns:
            loss, start_logits and end_logits (B, L) or (T,), hidden_states, attentions.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        asked, positions = (output_attentions, output_hidden_states), (start_positions, end_positions)
        return self._run(inputs, asked, return_dict, cu_seqlens, max_seqlen, positions=positions)

    def _head(self, states, attention_mask, packing, positions):
        logits = [x.contiguous() for x in self.qa_outputs(states).unbind(-1)]
        values = {"loss": None, "start_logits": logits[0], "end_logits": logits[1]}
        if positions[0] is None or positions[1] is None:
            return values
        if packing is None:
            loss = span_loss(*logits, *positions, self._token_mask(attention_mask, states))
        else:
            loss = packing.span_loss(*logits, *positions)
        return {**values, "loss": loss}


class DebertaV2ForQuestionAnswering(DebertaForQuestionAnswering):
    """``DebertaForQuestionAnswering`` of v2 and v3."""

    config_class = DebertaV2Config


class DebertaV2ForMultipleChoice(_FirstTokenModel):
    """Predicts which of several continuations fits, each scored by its first token's state."""

    config_class = DebertaV2Config
    output_class = MultipleChoiceModelOutput

    def __init__(self, config: DebertaV2Config):
        super().__init__(config, 1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        choices: int | None = None,
    ) -> MultipleChoiceModelOutput | tuple:
        """
        Args:
            input_ids and the others of ``DebertaModel``: with a dimension of choices after the batch, (B, C, L); or
                packed, the first question's choices, then the second one's.
            labels: (B,), numbers of the right choices.
            choices: C, of packed sequences only.

        Returns:
            loss, logits (B, C), hidden_states, attentions, the latter two of B C sequences.
        """
        given_rows(input_ids, inputs_embeds)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        packing = None
        if cu_seqlens is not None:
            packing = self.deberta.sequences(cu_seqlens, max_seqlen, attention_mask, input_ids, inputs_embeds)
            check_choices(packing, choices)
        elif choices is not None:
            raise ValueError(f"choices belongs to packed sequences: got choices={choices} and no cu_seqlens")
        else:
            _, choices, _ = check_form(input_ids, inputs_embeds, "B", "C", "L", nonempty=False)
            inputs = tuple(None if x is None else x.flatten(0, 1) for x in inputs)
        asked = (output_attentions, output_hidden_states)
        return self._run(inputs, asked, return_dict, packing, max_seqlen, labels=labels, choices=choices)

    def _head(self, states, attention_mask, packing, labels, choices):
        logits = self._logits(states, attention_mask, packing).view(-1, choices)
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}
