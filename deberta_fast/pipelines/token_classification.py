"""token-classification: named entities, parts of speech."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable

import torch

from ..models.task_models import DebertaForTokenClassification
from ..tokenization.model_inputs import UNLIMITED
from .base import Pipeline, Row, check_optional, checked_text, lengths_of, rows_of, text_of

STRATEGIES = ("none", "simple", "first", "average", "max")
OF_WORDS = STRATEGIES[2:]


class TokenClassificationPipeline(Pipeline):
    """The class of every token of a text, or the entities of one class each.

    A result is a list of ``{"entity", "score", "index", "word", "start", "end"}``, one per token. With an
    aggregation_strategy it is a list of ``{"entity_group", "score", "word", "start", "end"}``, one per entity. start
    and end count characters of the text; with a slow tokenizer they are None.
    """

    task = "token-classification"
    head = DebertaForTokenClassification

    @dataclasses.dataclass(frozen=True)
    class Options:
        """
        aggregation_strategy: "none"; "simple" joins neighbours of one class, and B- begins another entity; "first",
            "average" and "max" first give all tokens of a word one class: that of its first token, of its mean
            probabilities, or of its surest token. These three need a fast tokenizer.
        ignore_labels: labels whose entities are left out, by default "O".
        stride: reads long texts in parts that overlap by this number of tokens, and keeps the longest of overlapping
            entities. By default long texts are cut. Needs a fast tokenizer and an aggregation_strategy.
        max_length: tokens of a part or of a cut text; by default the tokenizer's model_max_length, if it has one.
        is_split_into_words: inputs are lists of words.
        delimiter: text between words, which start and end count.
        """

        aggregation_strategy: str = "none"
        ignore_labels: list[str] | None = None
        stride: int | None = None
        max_length: int | None = None
        is_split_into_words: bool = False
        delimiter: str = " "

        def __post_init__(self):
            strategy = str(getattr(self.aggregation_strategy, "value", self.aggregation_strategy)).lower()
            if strategy not in STRATEGIES:
                choices = ", ".join(STRATEGIES)
                raise ValueError(f"aggregation_strategy must be one of {choices}, got {self.aggregation_strategy!r}")
            object.__setattr__(self, "aggregation_strategy", strategy)
            if isinstance(self.ignore_labels, str):
                raise TypeError(f"ignore_labels must be a list of labels, got {self.ignore_labels!r}")
            check_optional("max_length", self.max_length, 3)
            check_optional("stride", self.stride, 0)
            if self.stride is not None and strategy == "none":
                raise ValueError('stride needs an aggregation_strategy other than "none"')

    def is_one(self, inputs, options):
        if not options.is_split_into_words:
            return super().is_one(inputs, options)
        return isinstance(inputs, dict) or isinstance(inputs, list) and all(isinstance(x, str) for x in inputs)

    def single_result(self, item, result, given):
        return [result] if isinstance(item, list) else result

    def resolved(self, options):
        needs_fast = {
            f"aggregation_strategy={options.aggregation_strategy!r}": options.aggregation_strategy in OF_WORDS,
            "stride": options.stride is not None,
            "is_split_into_words": options.is_split_into_words,
        }
        for name, needed in needs_fast.items():
            if needed and not self.tokenizer.is_fast:
                raise ValueError(f"{name} needs a fast tokenizer (pip install tokenizers)")
        if options.stride is not None:
            longest = options.max_length or self.tokenizer.model_max_length
            if longest > UNLIMITED:
                raise ValueError("stride needs max_length, since the tokenizer has no model_max_length")
            size = longest - self.tokenizer.num_special_tokens_to_add()
            if options.stride >= size:
                raise ValueError(f"stride must be less than the tokens of a part, {size}, got {options.stride}")
        return options

    def checked(self, item, options):
        """Returns the text and, for an input of words, the words and where each begins in the text."""
        if not options.is_split_into_words:
            return text_of(item), None
        words = item["text"] if isinstance(item, dict) and set(item) == {"text"} else item
        if not isinstance(words, list | tuple):
            raise TypeError(f"with is_split_into_words, expected a list of words, got {type(words).__name__}")
        words = [checked_text(word, "every word") for word in words]
        starts = itertools.accumulate((len(word) + len(options.delimiter) for word in words), initial=0)
        return options.delimiter.join(words), list(zip(words, starts))

    def rows(self, items, options):
        words = options.is_split_into_words
        more = {} if options.stride is None else {"return_overflowing_tokens": True, "stride": options.stride}
        fast = self.tokenizer.is_fast
        encoding = self.tokenizer(
            [[word for word, _ in starts] if words else text for text, starts in items],
            is_split_into_words=words,
            truncation=True,
            return_special_tokens_mask=True,
            return_offsets_mapping=fast,
            return_attention_mask=False,
            max_length=options.max_length,
            verbose=False,
            **more,
        )
        rows = [[] for _ in items]
        indices = encoding.get("overflow_to_sample_mapping", range(len(items)))
        for n, (index, row) in enumerate(zip(indices, rows_of(encoding))):
            offsets = encoding["offset_mapping"][n] if fast else [(None, None)] * len(row.input_ids)
            if words:
                firsts = [start for _, start in items[index][1]]
                moves = [0 if word is None else firsts[word] for word in encoding.word_ids(n)]
                offsets = [(start + move, end + move) for (start, end), move in zip(offsets, moves)]
            row.about = encoding["special_tokens_mask"][n], offsets
            rows[index].append(row)
        return rows

    def outputs(self, inputs: dict, rows: list[Row], options) -> Iterable:
        scores = self.unpadded(self.model(**inputs).logits, inputs).float().softmax(-1)
        return scores.cpu().split(lengths_of(rows))

    def answer(self, item, rows, outputs, options):
        strategy, ignored = options.aggregation_strategy, options.ignore_labels
        ignored = ["O"] if ignored is None else ignored
        result = []
        for row, scores in zip(rows, outputs):
            tokens = self._tokens(item[0], row)
            if strategy in OF_WORDS:
                words = _joined(tokens, lambda last, token: token["inside"])
                entities = [self._word(word, scores, strategy) for word in words]
            else:
                best, labels = (x.tolist() for x in scores.max(1))
                entities = []
                for token in tokens:
                    label = self.model.config.id2label[labels[token["index"]]]
                    entities.append({"entity": label, "score": best[token["index"]], **token})
                    del entities[-1]["inside"]
            if strategy != "none":
                entities = [self._entity(group) for group in _joined(entities, _continues)]
            kind = "entity" if strategy == "none" else "entity_group"
            result += [entity for entity in entities if entity[kind] not in ignored]
        return _without_overlaps(result) if len(rows) > 1 else result

    def _tokens(self, text: str, row: Row) -> list[dict]:
        tokens = []
        for index, (token, special, (start, end)) in enumerate(zip(row.input_ids, *row.about)):
            if special:
                continue
            word, inside = self.tokenizer.convert_ids_to_tokens(token), False
            if start is not None:
                # The tokenizer does not say where words begin, but a word's first token includes the space before it.
                inside = start > 0 and " " not in text[start - 1 : start + 1]
                if token == self.tokenizer.unk_token_id:
                    word, inside = text[start:end], False
            tokens.append({"index": index, "word": word, "start": start, "end": end, "inside": inside})
        return tokens

    def _word(self, tokens: list[dict], scores: torch.Tensor, strategy: str) -> dict:
        scores = scores[[token["index"] for token in tokens]]
        if strategy == "first":
            scores = scores[0]
        elif strategy == "max":
            scores = scores[scores.amax(1).argmax()]
        else:
            scores = scores.mean(0)
        score, label = scores.max(0)
        return {"entity": self.model.config.id2label[label.item()], "score": score.item(), **self._span(tokens)}

    def _entity(self, group: list[dict]) -> dict:
        score = sum(entity["score"] for entity in group) / len(group)
        return {"entity_group": group[0]["entity"].split("-", 1)[-1], "score": score, **self._span(group)}

    def _span(self, parts: list[dict]) -> dict:
        word = self.tokenizer.convert_tokens_to_string([part["word"] for part in parts])
        return {"word": word, "start": parts[0]["start"], "end": parts[-1]["end"]}


def _joined(items: list[dict], joins: Callable[[dict, dict], bool]) -> list[list[dict]]:
    """Splits a list into groups; ``joins`` says whether an item belongs to the group of the item before it."""
    groups = []
    for item in items:
        if groups and joins(groups[-1][-1], item):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _continues(last: dict, entity: dict) -> bool:
    """Whether two neighbours are of one class; B- begins another entity."""
    one, other = (x["entity"][2:] if x["entity"].startswith(("B-", "I-")) else x["entity"] for x in (last, entity))
    return one == other and not entity["entity"].startswith("B-")


def _without_overlaps(entities: list[dict]) -> list[dict]:
    """Keeps the longest of overlapping entities, and the surest of equally long ones."""
    result = []
    size = lambda entity: (entity["end"] - entity["start"], entity["score"])
    for entity in sorted(entities, key=lambda x: x["start"]):
        if result and result[-1]["start"] <= entity["start"] < result[-1]["end"]:
            if size(entity) > size(result[-1]):
                result[-1] = entity
        else:
            result.append(entity)
    return result
