"""The task models of DeBERTa v1, v2 and v3.

Names, arguments, outputs, losses and defaults are Hugging Face's. v2's classes are v1's with another configuration.
Like ``DebertaModel``, all of them take packed sequences too: (T,) with cu_seqlens instead of (B, L).
"""

import torch
from torch import nn

from .config import DebertaConfig, DebertaV2Config
from .heads import ContextPooler, LMPredictions, first_states, sequence_loss, span_loss, token_loss
from .model import base_model, given_packing, masks, returned
from .outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from .packing import Packing
from .pretrained import PreTrainedModel, resized


class _TaskModel(PreTrainedModel):
    def _returned(self, outputs: BaseModelOutput, return_dict: bool | None, kind: type, **own) -> ModelOutput | tuple:
        """The task's output of class ``kind``: its own values, with the encoder's states and probabilities."""
        output = kind(**own, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
        return returned(self, return_dict, output)

    def _first_tokens(
        self, states: torch.Tensor, attention_mask: torch.Tensor | None, packing: Packing | None
    ) -> torch.Tensor:
        """The first token of every sequence of a batch or of packed ones, (B, hidden_size)."""
        if packing is not None:
            return packing.first_tokens(states)
        return first_states(states, self._read_tokens(attention_mask, states))

    def _read_tokens(self, attention_mask: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor | None:
        """The tokens that a head reads, bool (B, L); None for all: with ``padding_rows`` "hf", padding too."""
        if self.deberta.encoder.unpadding.padding_rows == "hf":
            return None
        return masks(attention_mask, *states.shape[:2])[1]


class DebertaForMaskedLM(_TaskModel):
    """Language model of masked tokens. With ``enhanced_mask_decoder`` in the configuration, Microsoft's decoder."""

    checkpoint_part = "generator"

    def __init__(self, config: DebertaConfig):
        super().__init__(config)
        self.deberta = base_model(config)
        self.lm_predictions = LMPredictions(config)
        self.init_weights()

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
    ) -> MaskedLMOutput | tuple:
        """
        Args:
            labels: token ids, (B, L) or (T,) as input_ids, -100 where there is nothing to predict.
            The others: as of ``DebertaModel``.

        Returns:
            loss, logits (B, L, vocab_size) or (T, vocab_size), hidden_states, attentions.
        """
        states, outputs = self.predicting_states(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states, cu_seqlens, max_seqlen,
        )  # fmt: skip
        logits = self.lm_predictions(states, self.get_input_embeddings())
        loss = None if labels is None else token_loss(logits, labels)
        return self._returned(outputs, return_dict, MaskedLMOutput, loss=loss, logits=logits)

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

        Arguments are as of ``forward``. Scores of a whole vocabulary are large: give ``lm_predictions`` only the states
        at masks where no others are needed.
        """
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        packing = given_packing(cu_seqlens, max_seqlen, attention_mask, input_ids, inputs_embeds)
        outputs = self.deberta(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            asked or self._decodes, True, packing,
        )  # fmt: skip
        states = outputs.last_hidden_state
        if self._decodes and packing is not None:
            states = self.deberta.enhanced_mask_decoder_packed(self._last_input(outputs), packing, position_ids)
        elif self._decodes:
            states = self.deberta.enhanced_mask_decoder(self._last_input(outputs), attention_mask, position_ids)
        return states, self._as_asked(outputs, asked)

    @property
    def _decodes(self) -> bool:
        return self.config.enhanced_mask_decoder and not self.config.position_biased_input

    def _last_input(self, outputs: BaseModelOutput) -> torch.Tensor:
        """The last layer's input, also where z_steps' repetitions have added states behind it."""
        return outputs.hidden_states[self.config.num_hidden_layers - 1]

    @staticmethod
    def _as_asked(outputs: BaseModelOutput, asked: bool) -> BaseModelOutput:
        """The outputs without hidden states, unless the caller has asked for those."""
        if asked:
            return outputs
        return BaseModelOutput(last_hidden_state=outputs.last_hidden_state, attentions=outputs.attentions)

    def get_output_embeddings(self) -> nn.Module:
        """The word embeddings where they are tied; otherwise the decoder, a Linear. Both have a weight (V, width)."""
        decoder = self.lm_predictions.lm_head.decoder
        return self.get_input_embeddings() if decoder is None else decoder

    def set_output_embeddings(self, embeddings: nn.Module) -> None:
        """Ties where they are the word embeddings, and is a decoder of its own otherwise."""
        tied = embeddings.weight is self.get_input_embeddings().weight
        self.config.tie_word_embeddings = tied
        self.config.legacy = self.config.legacy or not tied
        self.lm_predictions.lm_head.decoder = None if tied else embeddings

    def tie_weights(self) -> None:
        """The output uses the word embeddings from now on, if the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_predictions.lm_head.decoder = None

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        head, rows = self.lm_predictions.lm_head, embeddings.num_embeddings
        if rows != head.bias.shape[0]:
            head.bias = resized(head.bias, rows, 0.0)
            if head.decoder is not None:
                weight = head.decoder.weight
                head.decoder.weight = resized(weight, rows, self._new_rows(weight, rows, mean_resizing))
                head.decoder.out_features = rows
        return embeddings


class DebertaV2ForMaskedLM(DebertaForMaskedLM):
    """``DebertaForMaskedLM`` of v2 and v3."""

    config_class = DebertaV2Config


class DebertaForSequenceClassification(_TaskModel):
    """Classification or regression of whole texts and pairs, from the first token's state."""

    def __init__(self, config: DebertaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.deberta = base_model(config)
        self.pooler = ContextPooler(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob if config.cls_dropout is None else config.cls_dropout)
        self.classifier = nn.Linear(config.pooler_hidden_size, self.num_labels)
        self.init_weights()

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
    ) -> SequenceClassifierOutput | tuple:
        """
        Args:
            labels: (B,) class numbers or values, (B, num_labels) probabilities or values: see ``sequence_loss``. B is
                the number of sequences, packed ones too.
            The others: as of ``DebertaModel``.

        Returns:
            loss, logits (B, num_labels), hidden_states, attentions. Logits are (B,) where there is one label, labels
            are given and no problem_type is set.
        """
        packing = given_packing(cu_seqlens, max_seqlen, attention_mask, input_ids, inputs_embeds)
        outputs = self.deberta(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states, True, packing,
        )  # fmt: skip
        first = self._first_tokens(outputs.last_hidden_state, attention_mask, packing)
        logits = self.classifier(self.dropout(self.pooler(first)))
        loss = None
        if labels is not None:
            loss = sequence_loss(logits, labels, self.config.problem_type)
            if self.num_labels == 1 and self.config.problem_type is None:
                logits = logits.view(-1)
        return self._returned(outputs, return_dict, SequenceClassifierOutput, loss=loss, logits=logits)


class DebertaV2ForSequenceClassification(DebertaForSequenceClassification):
    """``DebertaForSequenceClassification`` of v2 and v3."""

    config_class = DebertaV2Config


class DebertaForTokenClassification(_TaskModel):
    """Classification of every token."""

    def __init__(self, config: DebertaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.deberta = base_model(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.init_weights()

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
    ) -> TokenClassifierOutput | tuple:
        """
        Args:
            labels: class numbers, (B, L) or (T,) as input_ids, -100 where there is none.
            The others: as of ``DebertaModel``.

        Returns:
            loss, logits (B, L, num_labels) or (T, num_labels), hidden_states, attentions.
        """
        packing = given_packing(cu_seqlens, max_seqlen, attention_mask, input_ids, inputs_embeds)
        outputs = self.deberta(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states, True, packing,
        )  # fmt: skip
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else token_loss(logits, labels)
        return self._returned(outputs, return_dict, TokenClassifierOutput, loss=loss, logits=logits)


class DebertaV2ForTokenClassification(DebertaForTokenClassification):
    """``DebertaForTokenClassification`` of v2 and v3."""

    config_class = DebertaV2Config


class DebertaForQuestionAnswering(_TaskModel):
    """Where in the text an answer starts and ends."""

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
            start_positions, end_positions: (B,), counted in each sequence, packed ones too; beyond its end they do
                not count.
            The others: as of ``DebertaModel``.

        Returns:
            loss, start_logits and end_logits (B, L) or (T,), hidden_states, attentions.
        """
        packing = given_packing(cu_seqlens, max_seqlen, attention_mask, input_ids, inputs_embeds)
        outputs = self.deberta(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states, True, packing,
        )  # fmt: skip
        start_logits, end_logits = (x.contiguous() for x in self.qa_outputs(outputs.last_hidden_state).unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None and packing is not None:
            spans = (packing.by_sequence(x, 0.0) for x in (start_logits, end_logits))
            tokens = torch.ones_like(start_logits, dtype=torch.bool) if packing.mask is None else packing.mask
            loss = span_loss(*spans, start_positions, end_positions, packing.by_sequence(tokens, False))
        elif start_positions is not None and end_positions is not None:
            read = self._read_tokens(attention_mask, start_logits)
            loss = span_loss(start_logits, end_logits, start_positions, end_positions, read)
        logits = {"start_logits": start_logits, "end_logits": end_logits}
        return self._returned(outputs, return_dict, QuestionAnsweringModelOutput, loss=loss, **logits)


class DebertaV2ForQuestionAnswering(DebertaForQuestionAnswering):
    """``DebertaForQuestionAnswering`` of v2 and v3."""

    config_class = DebertaV2Config


class DebertaV2ForMultipleChoice(_TaskModel):
    """Which of several continuations fits, each scored by its first token's state."""

    config_class = DebertaV2Config

    def __init__(self, config: DebertaV2Config):
        super().__init__(config)
        self.deberta = base_model(config)
        self.pooler = ContextPooler(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob if config.cls_dropout is None else config.cls_dropout)
        self.classifier = nn.Linear(config.pooler_hidden_size, 1)
        self.init_weights()

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
            input_ids and the others of ``DebertaModel``: with a dimension of choices behind the batch, (B, C, L); or
                packed, the first question's choices, then the second one's.
            labels: (B,), numbers of the right choices.
            choices: C, of packed sequences only.

        Returns:
            loss, logits (B, C), hidden_states, attentions, the latter two of B C sequences.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        packing = given_packing(cu_seqlens, max_seqlen, attention_mask, input_ids, inputs_embeds)
        if packing is not None:
            sequences = packing.lengths.shape[0]
            if choices is None or choices < 1 or sequences % choices:
                raise ValueError(f"choices must divide the number of sequences, {sequences}, got {choices}")
        elif choices is not None:
            raise ValueError(f"choices belongs to packed sequences: got choices={choices} and no cu_seqlens")
        else:
            given = input_ids if input_ids is not None else inputs_embeds
            if given.dim() != (3 if inputs_embeds is None else 4):
                name, form = ("input_ids", "(B, C, L)") if inputs_embeds is None else ("inputs_embeds", "(B, C, L, E)")
                raise ValueError(f"{name} must be of shape {form}, got {tuple(given.shape)}")
            choices = given.shape[1]
            inputs = [None if x is None else x.flatten(0, 1) for x in inputs]
        outputs = self.deberta(*inputs, output_attentions, output_hidden_states, True, packing)
        first = self._first_tokens(outputs.last_hidden_state, inputs[1], packing)
        logits = self.classifier(self.dropout(self.pooler(first))).view(-1, choices)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return self._returned(outputs, return_dict, MultipleChoiceModelOutput, loss=loss, logits=logits)
