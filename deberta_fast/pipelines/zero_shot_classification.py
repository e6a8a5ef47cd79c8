"""zero-shot-classification: labels given at the call, scored by a model of natural language inference."""

import dataclasses
import warnings
from collections.abc import Iterable

import torch

from ..models.task_models import DebertaForSequenceClassification
from .base import Pipeline, Row, text_of


class ZeroShotClassificationPipeline(Pipeline):
    """How well labels fit a text: how strongly the text entails the template filled with each label.

    A result is ``{"sequence", "labels", "scores"}``, the likeliest label first.
    """

    task = "zero-shot-classification"
    head = DebertaForSequenceClassification

    @dataclasses.dataclass(frozen=True)
    class Options:
        """
        candidate_labels: a list of labels, or text with commas between them.
        hypothesis_template: with {} where the label goes.
        multi_label: scores each label by itself, against contradiction; otherwise the scores of all labels add up to 1.
        """

        candidate_labels: str | list[str] | None = None
        hypothesis_template: str = "This example is {}."
        multi_label: bool = False

        def __post_init__(self):
            try:
                filled = self.hypothesis_template.format("label")
            except (IndexError, KeyError, ValueError) as error:
                raise ValueError(
                    f"hypothesis_template {self.hypothesis_template!r} cannot be filled: {error!r}"
                ) from None
            if filled == self.hypothesis_template:
                raise ValueError(f"hypothesis_template must have {{}} for the label, got {self.hypothesis_template!r}")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        found = [i for label, i in self.model.config.label2id.items() if label.lower().startswith("entail")]
        self.entailment = found[0] if found else -1
        if not found:
            labels = ", ".join(self.model.config.label2id)
            warnings.warn(f"no label of the model ({labels}) is called entailment: taking the last one for it")

    def __call__(self, inputs, candidate_labels: str | list[str] | None = None, **options):
        given = {} if candidate_labels is None else {"candidate_labels": candidate_labels}
        return super().__call__(inputs, **given, **options)

    __call__.__doc__ = Pipeline.__call__.__doc__

    def resolved(self, options):
        labels = options.candidate_labels
        if isinstance(labels, str):
            labels = [label.strip() for label in labels.split(",") if label.strip()]
        if not labels or not all(isinstance(label, str) for label in labels):
            raise ValueError(f"candidate_labels must be at least one label, got {options.candidate_labels!r}")
        return dataclasses.replace(options, candidate_labels=list(labels))

    def checked(self, item, options):
        text = text_of(item)
        if not text:
            raise ValueError("the text is empty")
        return text

    def rows(self, items, options):
        hypotheses = [options.hypothesis_template.format(label) for label in options.candidate_labels]
        return [self._pairs([(text, hypothesis) for hypothesis in hypotheses]) for text in items]

    def _pairs(self, pairs: list[tuple[str, str]]) -> list[Row]:
        try:
            return self.encode(pairs, truncation="only_first", verbose=False)
        except Exception:
            # A hypothesis that is too long by itself stays as it is, as in Hugging Face's pipeline. Any other error
            # is raised again.
            if len(pairs) > 1:
                return [row for pair in pairs for row in self._pairs([pair])]
            return self.encode(pairs, truncation=False, verbose=False)

    def outputs(self, inputs: dict, rows: list[Row], options) -> Iterable:
        return self.model(**inputs).logits.float().cpu()

    def answer(self, item, rows, outputs, options):
        logits = torch.stack(outputs)
        if options.multi_label or len(outputs) == 1:
            contradiction = -1 if self.entailment == 0 else 0
            scores = logits[:, [contradiction, self.entailment]].softmax(1)[:, 1].tolist()
        else:
            scores = logits[:, self.entailment].softmax(0).tolist()
        order = sorted(range(len(scores)), key=lambda i: scores[i])[::-1]
        return {
            "sequence": item,
            "labels": [options.candidate_labels[i] for i in order],
            "scores": [scores[i] for i in order],
        }
