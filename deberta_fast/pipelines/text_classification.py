"""text-classification: the class of a text or a pair of texts."""

import dataclasses
from collections.abc import Iterable

import torch

from ..models.task_models import DebertaForSequenceClassification
from .base import Pipeline, Row, check_number, checked_text

FUNCTIONS = {"sigmoid": torch.sigmoid, "softmax": lambda logits: logits.softmax(-1), "none": lambda logits: logits}
BEST = "best"


class TextClassificationPipeline(Pipeline):
    """The class of a text, or of a pair ``{"text": ..., "text_pair": ...}``.

    A result is ``{"label", "score"}``, and with top_k a list of them, the likeliest first. As in Hugging Face's
    pipeline, a call with a single string always gives a list, and one with a single pair only with top_k.
    """

    task = "text-classification"
    head = DebertaForSequenceClassification

    @dataclasses.dataclass(frozen=True)
    class Options:
        """
        top_k: number of labels, None for all; by default only the best one, not in a list.
        function_to_apply: "sigmoid", "softmax" or "none", applied to the logits. The default follows the
            configuration's problem_type; without one it is softmax, or sigmoid for a single label.
        truncation, max_length: the tokenizer's, which shortens nothing by default.
        padding: has no effect; accepted because Hugging Face's pipeline accepts it.
        """

        top_k: int | str | None = BEST
        function_to_apply: str | None = None
        truncation: bool | str = False
        max_length: int | None = None
        padding: bool | str = False

        def __post_init__(self):
            if self.top_k not in (None, BEST):
                check_number("top_k", self.top_k, 1)
            if self.function_to_apply is not None and self.function_to_apply not in FUNCTIONS:
                raise ValueError(
                    f"function_to_apply must be one of {', '.join(FUNCTIONS)}, got {self.function_to_apply!r}"
                )

    def single_result(self, item, result, given):
        return [result] if isinstance(item, str) and "top_k" not in given else result

    def checked(self, item, options):
        if isinstance(item, str):
            item = {"text": item}
        if not isinstance(item, dict):
            raise TypeError(f'expected a text or {{"text": ..., "text_pair": ...}}, got {type(item).__name__}')
        if "text" not in item or set(item) - {"text", "text_pair"}:
            raise ValueError(f"expected an object with text and text_pair, got one with {', '.join(map(repr, item))}")
        second = item.get("text_pair")
        return checked_text(item["text"], "text"), None if second is None else checked_text(second, "text_pair")

    def rows(self, items, options):
        return [[row] for row in self.encode(items, truncation=options.truncation, max_length=options.max_length)]

    def outputs(self, inputs: dict, rows: list[Row], options) -> Iterable:
        return FUNCTIONS[options.function_to_apply or self._function()](self.model(**inputs).logits.float()).tolist()

    def _function(self) -> str:
        kind, number = self.model.config.problem_type, self.model.config.num_labels
        if kind == "regression":
            return "none"
        return "sigmoid" if kind == "multi_label_classification" or number == 1 else "softmax"

    def answer(self, item, rows, outputs, options):
        labels = self.model.config.id2label
        scores = [{"label": labels[index], "score": score} for index, score in enumerate(outputs[0])]
        scores.sort(key=lambda x: x["score"], reverse=True)
        return scores[0] if options.top_k == BEST else scores[: options.top_k]
