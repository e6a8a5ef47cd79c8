"""DeBERTa v1, v2 and v3: the encoder with its embeddings, and the task models on it.

Names, arguments, outputs, losses and defaults are Hugging Face's. v2's classes are v1's with another configuration.
"""

import warnings

import torch
from torch import nn

from .config import DebertaConfig, DebertaV2Config
from .embeddings import DebertaEmbeddings
from .encoder import DebertaEncoder
from .heads import ContextPooler, LMPredictions, sequence_loss, span_loss, token_loss
from .outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from .pretrained import PreTrainedModel, resized


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
    ) -> BaseModelOutput | tuple:
        """
        Args:
            input_ids: (B, L) token ids, or inputs_embeds (B, L, embedding_size).
            attention_mask: 1 for tokens and 0 for padding, any dtype, (B, L) or (B, 1, 1, L); or pairwise, which query
                may attend to which key, (B, L, L) or (B, 1, L, L). Not what is added to scores: anything but 0 counts
                as 1. Without one, everything is a token.
            token_type_ids, position_ids: (B, L), zeros and 0 to L - 1 by default.
            output_attentions: also return every layer's probabilities, (B, H, L, L), computed densely.
            output_hidden_states: also return the embeddings and every layer's output.
            return_dict: False returns a tuple. The three are the configuration's by default.

        Returns:
            last_hidden_state (B, L, hidden_size), hidden_states, attentions.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds, or shapes that do not fit.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        shape = tuple(input_ids.shape if input_ids is not None else inputs_embeds.shape[:-1])
        if len(shape) != 2 or shape[1] == 0:
            name, form = (
                ("input_ids", "(B, L)") if input_ids is not None else ("inputs_embeds", "(B, L, embedding_size)")
            )
            given = tuple((inputs_embeds if input_ids is None else input_ids).shape)
            raise ValueError(f"{name} must be of shape {form} with L at least 1, got {given}")
        if attention_mask is None:
            self._warn_of_padding(input_ids)
        mask, token_mask = _masks(attention_mask, *shape)
        embedded = self.embeddings(input_ids, token_mask, token_type_ids, position_ids, inputs_embeds)
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        again = config.z_steps > 1 and config.num_hidden_layers > 0
        states, attentions = self.encoder(embedded, mask, token_mask, output_hidden_states or again, output_attentions)
        if again:
            states = [*states, *self.encoder.again(states[-2], states[-1], mask, config.z_steps - 1)]
        return _returned(
            self,
            return_dict,
            BaseModelOutput(
                last_hidden_state=states[-1],
                hidden_states=tuple(states) if output_hidden_states else None,
                attentions=tuple(attentions) if output_attentions else None,
            ),
        )

    def enhanced_mask_decoder(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The last layer run twice more on what it was given, with absolute positions in its first queries.

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
        mask, _ = _masks(attention_mask, *hidden_states.shape[:2])
        return self.encoder.again(hidden_states, queries, mask, 2)[-1]

    def _warn_of_padding(self, input_ids: torch.Tensor | None) -> None:
        """Looks at the first call alone: on a GPU, looking means waiting for it."""
        if self._saw_no_mask or torch.compiler.is_compiling() or torch.jit.is_tracing():
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


def _base(config: DebertaConfig) -> DebertaModel:
    return (DebertaModel if config.generation == 1 else DebertaV2Model)(config)


class DebertaForMaskedLM(PreTrainedModel):
    """Language model of masked tokens. With ``enhanced_mask_decoder`` in the configuration, Microsoft's decoder."""

    checkpoint_part = "generator"

    def __init__(self, config: DebertaConfig):
        super().__init__(config)
        self.deberta = _base(config)
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
    ) -> MaskedLMOutput | tuple:
        """
        Args:
            labels: (B, L) token ids, -100 where there is nothing to predict.
            The others: as of ``DebertaModel``.

        Returns:
            loss, logits (B, L, vocab_size), hidden_states, attentions.
        """
        states, outputs = self.predicting_states(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states,
        )  # fmt: skip
        logits = self.lm_predictions(states, self.get_input_embeddings())
        return _returned(
            self,
            return_dict,
            MaskedLMOutput(
                loss=None if labels is None else token_loss(logits, labels),
                logits=logits,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            ),
        )

    def predicting_states(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> tuple[torch.Tensor, BaseModelOutput]:
        """What the head predicts from, (B, L, hidden_size), and the output of ``deberta``; arguments as of ``forward``.

        Of the states, ``lm_predictions`` need only see those at masks: scores of a whole vocabulary are large.
        """
        kept = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        decodes = self.config.enhanced_mask_decoder and not self.config.position_biased_input
        outputs = self.deberta(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            kept or decodes, True,
        )  # fmt: skip
        if not decodes:
            return outputs.last_hidden_state, outputs
        # of z_steps' repetitions, none is the last layer's input
        before_last = outputs.hidden_states[self.config.num_hidden_layers - 1]
        if not kept:
            outputs = BaseModelOutput(last_hidden_state=outputs.last_hidden_state, attentions=outputs.attentions)
        return self.deberta.enhanced_mask_decoder(before_last, attention_mask, position_ids), outputs

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
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of)
        head, rows = self.lm_predictions.lm_head, embeddings.num_embeddings
        if rows != head.bias.shape[0]:
            head.bias = resized(head.bias, rows, 0.0)
            if head.decoder is not None:
                head.decoder.weight = resized(head.decoder.weight, rows, head.decoder.weight.mean(0))
                head.decoder.out_features = rows
        return embeddings


class DebertaV2ForMaskedLM(DebertaForMaskedLM):
    """``DebertaForMaskedLM`` of v2 and v3."""

    config_class = DebertaV2Config


class DebertaForSequenceClassification(PreTrainedModel):
    """Classification or regression of whole texts and pairs, from the first token's state."""

    def __init__(self, config: DebertaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.deberta = _base(config)
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
    ) -> SequenceClassifierOutput | tuple:
        """
        Args:
            labels: (B,) class numbers or values, (B, num_labels) probabilities or values: see ``sequence_loss``.
            The others: as of ``DebertaModel``.

        Returns:
            loss, logits (B, num_labels), hidden_states, attentions. Logits are (B,) where there is one label, labels
            are given and no problem_type is set.
        """
        outputs = self.deberta(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states, True,
        )  # fmt: skip
        logits = self.classifier(self.dropout(self.pooler(outputs.last_hidden_state)))
        loss = None
        if labels is not None:
            loss = sequence_loss(logits, labels, self.config.problem_type)
            if self.num_labels == 1 and self.config.problem_type is None:
                logits = logits.view(-1)
        return _returned(
            self,
            return_dict,
            SequenceClassifierOutput(
                loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
            ),
        )


class DebertaV2ForSequenceClassification(DebertaForSequenceClassification):
    """``DebertaForSequenceClassification`` of v2 and v3."""

    config_class = DebertaV2Config


class DebertaForTokenClassification(PreTrainedModel):
    """Classification of every token."""

    def __init__(self, config: DebertaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.deberta = _base(config)
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
    ) -> TokenClassifierOutput | tuple:
        """
        Args:
            labels: (B, L) class numbers, -100 where there is none.
            The others: as of ``DebertaModel``.

        Returns:
            loss, logits (B, L, num_labels), hidden_states, attentions.
        """
        outputs = self.deberta(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states, True,
        )  # fmt: skip
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        return _returned(
            self,
            return_dict,
            TokenClassifierOutput(
                loss=None if labels is None else token_loss(logits, labels),
                logits=logits,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            ),
        )


class DebertaV2ForTokenClassification(DebertaForTokenClassification):
    """``DebertaForTokenClassification`` of v2 and v3."""

    config_class = DebertaV2Config


class DebertaForQuestionAnswering(PreTrainedModel):
    """Where in the text an answer starts and ends."""

    def __init__(self, config: DebertaConfig):
        super().__init__(config)
        self.deberta = _base(config)
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
    ) -> QuestionAnsweringModelOutput | tuple:
        """
        Args:
            start_positions, end_positions: (B,); beyond the text they do not count.
            The others: as of ``DebertaModel``.

        Returns:
            loss, start_logits (B, L), end_logits (B, L), hidden_states, attentions.
        """
        outputs = self.deberta(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states, True,
        )  # fmt: skip
        start_logits, end_logits = (x.contiguous() for x in self.qa_outputs(outputs.last_hidden_state).unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = span_loss(start_logits, end_logits, start_positions, end_positions)
        return _returned(
            self,
            return_dict,
            QuestionAnsweringModelOutput(
                loss=loss,
                start_logits=start_logits,
                end_logits=end_logits,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            ),
        )


class DebertaV2ForQuestionAnswering(DebertaForQuestionAnswering):
    """``DebertaForQuestionAnswering`` of v2 and v3."""

    config_class = DebertaV2Config


class DebertaV2ForMultipleChoice(PreTrainedModel):
    """Which of several continuations fits, each scored by its first token's state."""

    config_class = DebertaV2Config

    def __init__(self, config: DebertaV2Config):
        super().__init__(config)
        self.deberta = _base(config)
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
    ) -> MultipleChoiceModelOutput | tuple:
        """
        Args:
            input_ids and the others of ``DebertaModel``: with a dimension of choices behind the batch, (B, C, L).
            labels: (B,), numbers of the right choices.

        Returns:
            loss, logits (B, C), hidden_states, attentions, the latter two of B C sequences.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        choices = (input_ids if input_ids is not None else inputs_embeds).shape[1]
        flat = (
            None if x is None else x.flatten(0, 1)
            for x in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        outputs = self.deberta(*flat, output_attentions, output_hidden_states, True)
        logits = self.classifier(self.dropout(self.pooler(outputs.last_hidden_state))).view(-1, choices)
        return _returned(
            self,
            return_dict,
            MultipleChoiceModelOutput(
                loss=None if labels is None else nn.functional.cross_entropy(logits, labels),
                logits=logits,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            ),
        )


def _returned(model: PreTrainedModel, return_dict: bool | None, output: ModelOutput) -> ModelOutput | tuple:
    return output if (model.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def _masks(mask: torch.Tensor | None, batch: int, length: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What attention takes, (B, L) or (B, 1, L, L), and which tokens are none of padding, (B, L); both bool.

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
