"""feature-extraction: the states of a text's tokens."""

import dataclasses
from collections.abc import Iterable

from ..models.model import DebertaModel
from .base import Pipeline, Row, lengths_of


class FeatureExtractionPipeline(Pipeline):
    """The encoder's last states of every token, special ones too.

    A result is a nested list (1, L, hidden_size), or with return_tensors a tensor of this shape on the CPU. L is the
    text's own number of tokens, whatever it is batched with.
    """

    task = "feature-extraction"
    head = DebertaModel

    @dataclasses.dataclass(frozen=True)
    class Options:
        """
        return_tensors: tensors instead of lists.
        truncation, max_length: as of the tokenizer, which shortens nothing by default.
        tokenize_kwargs: the same two under Hugging Face's name, and other options of the tokenizer.
        """

        return_tensors: bool = False
        truncation: bool | str = False
        max_length: int | None = None
        tokenize_kwargs: dict | None = None

    def rows(self, items, options):
        more = {"truncation": options.truncation, "max_length": options.max_length, **(options.tokenize_kwargs or {})}
        return [[row] for row in self.encode([(text, None) for text in items], **{**more, "padding": False})]

    def outputs(self, inputs: dict, rows: list[Row], options) -> Iterable:
        states = self.call(inputs).last_hidden_state
        return self.unpadded(states, inputs).cpu().split(lengths_of(rows))

    def answer(self, item, rows, outputs, options):
        states = outputs[0].unsqueeze(0).clone()  # not a view that keeps the whole batch
        return states if options.return_tensors else states.tolist()
