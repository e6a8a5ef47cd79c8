"""feature-extraction: the states of a text's tokens."""

import dataclasses
from collections.abc import Iterable

from ..models.model import DebertaModel
from .base import Pipeline, Row, lengths_of


class FeatureExtractionPipeline(Pipeline):
    """The encoder's last hidden states of all tokens, special tokens included.

    A result is a nested list (1, L, hidden_size), or with return_tensors a tensor of this shape on the CPU. L is the
    number of tokens of the text; padding is left out.
    """

    task = "feature-extraction"
    head = DebertaModel

    @dataclasses.dataclass(frozen=True)
    class Options:
        """
        return_tensors: tensors instead of lists.
        truncation, max_length: the tokenizer's, which shortens nothing by default.
        tokenize_kwargs: the same two under Hugging Face's name, and other options of the tokenizer.
        """

        return_tensors: bool = False
        truncation: bool | str = False
        max_length: int | None = None
        tokenize_kwargs: dict | None = None

    def rows(self, items, options):
        return [[row] for row in self.encode_texts(items, options, options.tokenize_kwargs)]

    def outputs(self, inputs: dict, rows: list[Row], options) -> Iterable:
        states = self.model(**inputs).last_hidden_state
        return self.unpadded(states, inputs).cpu().split(lengths_of(rows))

    def answer(self, item, rows, outputs, options):
        states = outputs[0].unsqueeze(0).clone()  # A view would keep the states of the whole batch.
        return states if options.return_tensors else states.tolist()
