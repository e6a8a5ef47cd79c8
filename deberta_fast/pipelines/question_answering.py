"""question-answering: the passage of a context that answers a question."""

import dataclasses
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..models.task_models import DebertaForQuestionAnswering
from .base import InputError, Pipeline, Row, check_number, check_optional, checked_text, lengths_of

MAX_SEQ_LEN, DOC_STRIDE = 384, 128


class Part(NamedTuple):
    """The tokens of a context that a row holds.

    first: index in the row of the first of these tokens.
    offsets: start and end of each token in characters.
    words: index of each token's word, or None.
    """

    first: int
    offsets: list[tuple[int, int]]
    words: list[int | None]


class QuestionAnsweringPipeline(Pipeline):
    """The passage of a context that answers a question, of ``{"question": ..., "context": ...}``.

    A result is ``{"score", "start", "end", "answer"}``, with start and end in characters of the context. top_k beyond 1
    gives a list of results, the likeliest first. The probabilities of equal answers are added up. As in Hugging Face's
    pipeline, a list of one question gives that question's result. A slow tokenizer does not tell which characters a
    token covers; answers then begin and end where white space separates words.
    """

    task = "question-answering"
    head = DebertaForQuestionAnswering

    @dataclasses.dataclass(frozen=True)
    class Options:
        """
        top_k: largest number of answers.
        doc_stride: tokens by which parts of a long context overlap; by default half of max_seq_len, at most 128.
        max_answer_len: tokens of the longest answer.
        max_seq_len: tokens of question and part together; by default 384, or the tokenizer's smaller model_max_length.
        max_question_len: tokens to which a question is cut; by default it is not cut.
        handle_impossible_answer: allows the empty answer, with start and end 0.
        align_to_words: extends answers to whole words.
        """

        top_k: int = 1
        doc_stride: int | None = None
        max_answer_len: int = 15
        max_seq_len: int | None = None
        max_question_len: int | None = None
        handle_impossible_answer: bool = False
        align_to_words: bool = True

        def __post_init__(self):
            for name in ("top_k", "max_answer_len"):
                check_number(name, getattr(self, name), 1)
            for name in ("max_seq_len", "max_question_len"):
                check_optional(name, getattr(self, name), 1)
            check_optional("doc_stride", self.doc_stride, 0)

    def __call__(self, inputs=None, context=None, *, question=None, **options):
        """Takes inputs as other pipelines do; or question="...", context="...", or both by position. Lists of both are
        paired up, and one context serves a list of questions."""
        question = inputs if context is not None and question is None else question
        if (question is None) != (context is None):
            raise TypeError("question and context must be given together")
        if question is not None:
            if isinstance(question, list | tuple):
                contexts = [context] * len(question) if isinstance(context, str) else context
                if len(question) != len(contexts):
                    raise ValueError(f"there are {len(question)} questions and {len(contexts)} contexts")
                inputs = [{"question": x, "context": y} for x, y in zip(question, contexts)]
            else:
                inputs = {"question": question, "context": context}
        return super().__call__(inputs, **options)

    def list_result(self, results):
        return results[0] if len(results) == 1 else results

    def checked(self, item, options):
        if not isinstance(item, dict):
            raise TypeError(f'expected {{"question": ..., "context": ...}}, got {type(item).__name__}')
        if set(item) != {"question", "context"}:
            raise ValueError(f"expected an object with question and context, got one with {', '.join(map(repr, item))}")
        for name in ("question", "context"):
            if not checked_text(item[name], name):
                raise ValueError(f"the {name} is empty")
        return item

    def rows(self, items, options):
        questions = [item["question"] for item in items]
        questions = self.tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"]
        contexts = self._contexts([item["context"] for item in items])
        longest = options.max_seq_len or min(self.tokenizer.model_max_length, MAX_SEQ_LEN)
        result = []
        for index, (question, context) in enumerate(zip(questions, contexts)):
            question = question[: options.max_question_len]
            size = longest - len(question) - self.tokenizer.num_special_tokens_to_add(pair=True)
            if size < 1:
                reason = f"the question has {len(question)} tokens, which leaves none of max_seq_len={longest} for the"
                raise InputError(index, f"{reason} context; max_question_len cuts it")
            stride = options.doc_stride
            if stride is None:
                stride = min(longest // 2, DOC_STRIDE)
                stride = stride if stride < size else size // 2
            if stride >= size:
                reason = f"doc_stride must be less than {size}, the tokens of a part of the context, got {stride}"
                raise InputError(index, reason)
            result.append([])
            for ids, offsets, words in _parts(context, size, size - stride):
                row = self.tokenizer.build_inputs_with_special_tokens(question, ids)
                types = self.tokenizer.create_token_type_ids_from_sequences(question, ids)
                result[-1].append(Row(row, types, Part(len(row) - 1 - len(ids), offsets, words)))
        return result

    def _contexts(self, texts: list[str]) -> list[tuple[list[int], list, list]]:
        """Returns token ids, their offsets and their words for every text."""
        if self.tokenizer.is_fast:
            encoding = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            columns = encoding["input_ids"], encoding["offset_mapping"], map(encoding.word_ids, range(len(texts)))
            return list(zip(*columns))
        result = []
        for text in texts:
            spans = [match.span() for match in re.finditer(r"\S+", text)]
            # Byte-level tokenizers encode a word together with the space before it.
            pieces = [" " * (start > 0) + text[start:end] for start, end in spans]
            ids = self.tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] if pieces else []
            words = [word for word, own in enumerate(ids) for _ in own]
            result.append(([token for own in ids for token in own], [spans[word] for word in words], words))
        return result

    def outputs(self, inputs: dict, rows: list[Row], options) -> Iterable:
        output = self.model(**inputs)
        logits = (self.unpadded(x, inputs).float().cpu() for x in (output.start_logits, output.end_logits))
        return zip(*(x.split(lengths_of(rows)) for x in logits))

    def answer(self, item, rows, outputs, options):
        text, answers, impossible = item["context"], {}, float("inf")
        # Spans that extend to the same words become one answer, so more than top_k spans are needed.
        number = 2 * options.top_k + 10 if options.align_to_words else options.top_k
        for row, logits in zip(rows, outputs):
            part = row.about
            # The softmax is over the tokens of the part and [CLS], which stands for no answer.
            chosen = [0, *range(part.first, part.first + len(part.offsets))]
            starts, ends = (x[chosen].softmax(0) for x in logits)
            impossible = min(impossible, (starts[0] * ends[0]).item())
            for score, first, last in _best_spans(starts[1:], ends[1:], options.max_answer_len, number):
                start, end = part.offsets[first][0], part.offsets[last][1]
                if options.align_to_words and None not in (part.words[first], part.words[last]):
                    start = part.offsets[part.words.index(part.words[first])][0]
                    end = part.offsets[len(part.words) - 1 - part.words[::-1].index(part.words[last])][1]
                answer = {"score": 0.0, "start": start, "end": end, "answer": text[start:end]}
                answers.setdefault(text[start:end].lower(), answer)["score"] += score
        answers = list(answers.values())
        nothing = {"score": impossible, "start": 0, "end": 0, "answer": ""}
        if options.handle_impossible_answer:
            answers.append(nothing)
        elif not answers:
            answers.append(nothing | {"score": 0.0})
        answers = sorted(answers, key=lambda x: x["score"], reverse=True)[: options.top_k]
        return answers[0] if options.top_k == 1 else answers


def _parts(context: tuple[list, list, list], size: int, step: int):
    """Yields slices of ids, offsets and words: ``size`` tokens from every ``step``-th on, until one holds the last."""
    for start in range(0, max(len(context[0]), 1), step):
        yield tuple(list(column[start : start + size]) for column in context)
        if start + size >= len(context[0]):
            return


def _best_spans(starts: torch.Tensor, ends: torch.Tensor, longest: int, number: int):
    """Yields probability, first and last token of the best spans of at most ``longest`` tokens, best first."""
    longest = min(longest, len(starts))
    if not longest:
        return
    # scores[i, j] is the probability of the span from token i to i + j, or negative if i + j is past the end.
    scores = starts[:, None] * torch.nn.functional.pad(ends, (0, longest - 1), value=-1).unfold(0, longest, 1)
    spans = len(starts) * longest - longest * (longest - 1) // 2  # the number of scores that are not negative
    best = scores.flatten().topk(min(number, spans))
    for score, place in zip(best.values.tolist(), best.indices.tolist()):
        yield score, place // longest, place // longest + place % longest
