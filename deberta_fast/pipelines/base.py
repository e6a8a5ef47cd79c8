"""Base of the pipelines: sorts windows of inputs into batches of similar length, returns results in input order."""

import contextlib
import dataclasses
import importlib.util
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..models.pretrained import PreTrainedModel

# Padded tokens per batch when no batch_size is given. A GPU needs larger batches than a CPU.
TOKENS = {"cpu": 1024}
TOKENS_ELSEWHERE = 16384
# Inputs that are sorted by length together. The windows of an iterator start small, so that results come soon.
WINDOW, FIRST_WINDOW = 1024, 16
# Seconds after which a progress bar appears.
PATIENCE = 3


class InputError(ValueError):
    """An input that the pipeline cannot take.

    Attributes:
        index: its place among the inputs.
        reason: what is wrong with it.
    """

    def __init__(self, index: int, reason: str):
        super().__init__(index, reason)
        self.index, self.reason = index, reason

    def __str__(self) -> str:
        return f"input {self.index}: {self.reason}"


@dataclasses.dataclass
class Row:
    """One sequence for the model: an input, or a part of it.

    Attributes:
        about: what the task needs to read the output.
        output: what ``Pipeline.outputs`` gave for this row.
    """

    input_ids: list[int]
    token_type_ids: list[int] | None
    about: Any = None
    output: Any = None


class Pipeline:
    """A model, its tokenizer and the options of a task. Made by ``pipeline``, which documents the arguments.

    A task turns inputs into rows (``rows``), says what to keep of the model's output (``outputs``), and makes a result
    of that (``answer``).
    """

    task: str
    head: type[PreTrainedModel]
    Options: type

    def __init__(self, model, tokenizer, *, batch_size: int | None = None, progress: bool | None = None, **options):
        if not isinstance(model, self.head):
            raise TypeError(f"{self.task} needs a {self.head.__name__} or its V2, got {type(model).__name__}")
        if progress and importlib.util.find_spec("tqdm") is None:
            raise ImportError("a progress bar needs tqdm: pip install tqdm")
        check_optional("batch_size", batch_size, 1)
        self.model, self.tokenizer, self.progress, self.batch_size = model.eval(), tokenizer, progress, batch_size
        self.options = self.changed(options)

    def __call__(self, inputs, *, batch_size: int | None = None, **options):
        """
        Args:
            inputs: one input; a list or tuple of inputs; or any other iterable, which is read as results are asked for.
            batch_size, options: override those of the pipeline for this call.

        Returns:
            One result, a list, or an iterator of results, in the order of the inputs.

        Raises:
            InputError: an input is of the wrong type, empty, or too long; the message says which input.
            TypeError, ValueError: an option is unknown or out of range.
        """
        changed = self.resolved(self.changed(options, self.options))
        check_optional("batch_size", batch_size, 1)
        batch_size = batch_size or self.batch_size
        if self.is_one(inputs, changed):
            [result] = self._results([inputs], WINDOW, changed, batch_size, contextlib.nullcontext())
            return self.single_result(inputs, result, options)
        if isinstance(inputs, list | tuple):
            return self.list_result(list(self._results(inputs, WINDOW, changed, batch_size, self._bar(len(inputs)))))
        try:
            inputs = iter(inputs)
        except TypeError:
            raise TypeError(f"{self.task} takes inputs or an iterable of them, got {type(inputs).__name__}") from None
        bar = self._bar(None) if self.progress else contextlib.nullcontext()
        return self._results(inputs, FIRST_WINDOW, changed, batch_size, bar)

    @classmethod
    def changed(cls, changes: dict, options=None):
        """Returns ``options``, by default those of the task, with changes. Raises TypeError or ValueError."""
        known = [field.name for field in dataclasses.fields(cls.Options)]
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise TypeError(f"{cls.task} has no {', '.join(unknown)}; its options are {', '.join(known)}")
        return dataclasses.replace(options or cls.Options(), **changes)

    def is_one(self, inputs, options) -> bool:
        """Whether ``inputs`` is a single input, not a collection."""
        return isinstance(inputs, str | dict)

    def single_result(self, item, result, given: dict):
        """Returns what a call with one input returns; ``given`` are the options of the call."""
        return result

    def list_result(self, results: list):
        """Returns what a call with a list of inputs returns."""
        return results

    def resolved(self, options):
        """Checks the options against model and tokenizer and returns them."""
        return options

    def checked(self, item, options):
        """Returns the input in the form that ``rows`` and ``answer`` get. Raises TypeError or ValueError."""
        return text_of(item)

    def rows(self, items: list, options) -> list[list[Row]]:
        """Returns the rows of every input. Raises InputError, whose index counts from the first of ``items``."""
        raise NotImplementedError

    def outputs(self, inputs: dict, rows: list[Row], options) -> Iterable:
        """Runs the model and returns, for each row, what ``answer`` needs, on the CPU.

        Args:
            inputs: arguments of the model: packed rows with cu_seqlens; or a batch (B, L), with an attention_mask if it
                holds padding.
        """
        raise NotImplementedError

    def answer(self, item, rows: list[Row], outputs: list, options):
        """Returns the result of one input."""
        raise NotImplementedError

    @staticmethod
    def unpadded(values: torch.Tensor, inputs: dict) -> torch.Tensor:
        """Returns values per token, (T, ...) or (B, L, ...), as (T, ...): row after row, without padding."""
        if "cu_seqlens" in inputs:
            return values
        return values[inputs["attention_mask"]] if "attention_mask" in inputs else values.flatten(0, 1)

    def encode(self, pairs: list[tuple[str, str | None]], **options) -> list[Row]:
        """Returns the rows of texts and pairs; ``options`` are the tokenizer's."""
        rows = [None] * len(pairs)
        for is_pair in (False, True):
            chosen = [i for i, pair in enumerate(pairs) if (pair[1] is not None) == is_pair]
            if chosen:
                texts = [pairs[i][0] for i in chosen]
                seconds = [pairs[i][1] for i in chosen] if is_pair else None
                encoding = self.tokenizer(texts, seconds, return_attention_mask=False, **options)
                for i, row in zip(chosen, rows_of(encoding)):
                    rows[i] = row
        return rows

    def encode_texts(self, texts: list[str], options, keywords: dict | None) -> list[Row]:
        """Returns the rows of texts; ``keywords`` of the tokenizer override the options truncation and max_length."""
        given = {"truncation": options.truncation, "max_length": options.max_length, **(keywords or {})}
        return self.encode([(text, None) for text in texts], **{**given, "padding": False})

    def _bar(self, total: int | None):
        # disable=None: only if stderr is a terminal
        automatic = {} if self.progress else {"delay": PATIENCE, "disable": None}
        return progress_bar(self.progress is not False, total=total, unit=" inputs", **automatic)

    def _results(self, inputs: Iterable, size: int, options, batch_size: int | None, bar) -> Iterator:
        inputs, done = iter(inputs), 0
        with bar as shown:
            while window := list(itertools.islice(inputs, size)):
                yield from self._window(window, done, options, batch_size, shown)
                done += len(window)
                size = min(2 * size, WINDOW)

    def _window(self, window: list, first: int, options, batch_size: int | None, shown) -> list:
        items = []
        for index, item in enumerate(window):
            try:
                items.append(self.checked(item, options))
            except (TypeError, ValueError) as error:
                raise InputError(first + index, str(error)) from None
        try:
            rows = self.rows(items, options)
            self._check_lengths(rows)
        except InputError as error:
            raise InputError(first + error.index, error.reason) from error.__cause__
        # The longest come first: if memory does not suffice, the first batch fails.
        queue = [(index, row) for index, own in enumerate(rows) for row in own]
        queue.sort(key=lambda entry: len(entry[1].input_ids), reverse=True)
        tokens = TOKENS.get(self.model.device.type, TOKENS_ELSEWHERE)
        unanswered, results = [len(own) for own in rows], [None] * len(items)
        while queue:
            size = batch_size or max(1, tokens // len(queue[0][1].input_ids))
            batch, queue = queue[:size], queue[size:]
            outputs = self._outputs([row for _, row in batch], options)
            for (index, row), output in zip(batch, outputs):
                row.output = output
                unanswered[index] -= 1
                if not unanswered[index]:
                    own, rows[index] = rows[index], None  # frees the outputs
                    results[index] = self.answer(items[index], own, [row.output for row in own], options)
                    if shown is not None:
                        shown.update()
        return results

    def _check_lengths(self, rows: list[list[Row]]) -> None:
        config = self.model.config
        for index, own in enumerate(rows):
            longest = max(lengths_of(own))
            if config.position_biased_input and longest > config.max_position_embeddings:
                raise InputError(
                    index,
                    f"it has {longest} tokens, and the model takes {config.max_position_embeddings}; where the task "
                    "has truncation, truncation=True and max_length shorten it",
                )

    @torch.no_grad()
    def _outputs(self, rows: list[Row], options) -> list:
        lengths = lengths_of(rows)
        longest = max(lengths)
        inputs = {"input_ids": torch.tensor([x for row in rows for x in row.input_ids])}
        if rows[0].token_type_ids is not None:
            inputs["token_type_ids"] = torch.tensor([x for row in rows for x in row.token_type_ids])
        highest = int(inputs["input_ids"].max())
        if highest >= self.model.config.vocab_size:
            raise ValueError(
                f"the tokenizer gives token {highest}, and the model has {self.model.config.vocab_size}: they "
                "do not belong together, or resize_token_embeddings(len(tokenizer)) was forgotten"
            )
        # Rows of one length form a batch without padding, which some backends compute faster than packed rows.
        ragged = min(lengths) < longest
        packed = ragged and self._packs()
        if packed:
            inputs["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        else:
            fill = {"input_ids": self.tokenizer.pad_token_id or 0, "token_type_ids": 0}
            inputs = {name: pad_sequence(x.split(lengths), True, fill[name]) for name, x in inputs.items()}
            if ragged:
                inputs["attention_mask"] = torch.arange(longest) < torch.tensor(lengths)[:, None]
        inputs = {name: x.to(self.model.device) for name, x in inputs.items()}
        if packed:
            inputs["max_seqlen"] = longest
        return list(self.outputs(inputs, rows, options))

    def _packs(self) -> bool:
        """Whether the model can run on packed sequences and give the same output."""
        config, base = self.model.config, self.model.base_model
        dense = config.talking_head or config.output_attentions or base.encoder.unpadding.mode is False
        return not dense and _is_plain(self.model) and _is_plain(base)


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether a call runs this package's forward and nothing else: no hook, compiled program or subclass's forward."""
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    around = (module._forward_hooks, module._forward_pre_hooks, module._compiled_call_impl, vars(module).get("forward"))
    return owner.__module__.partition(".")[0] == __name__.partition(".")[0] and not any(around)


def lengths_of(rows: list[Row]) -> list[int]:
    return [len(row.input_ids) for row in rows]


def rows_of(encoding) -> list[Row]:
    """Returns the rows of a tokenizer's batch encoding, with token types if it has any."""
    ids = encoding["input_ids"]
    return list(map(Row, ids, encoding.get("token_type_ids") or [None] * len(ids)))


def text_of(item) -> str:
    """Returns the text of an input, which is a text or an object that holds one."""
    if isinstance(item, dict):
        if set(item) != {"text"}:
            raise ValueError(f"expected a text or {{'text': text}}, got an object with {', '.join(map(repr, item))}")
        item = item["text"]
    return checked_text(item, "text")


def checked_text(value, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    value.encode()  # A lone surrogate is a ValueError here and a crash in some tokenizers.
    return value


def check_number(name: str, value, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a number from {least} on, got {value!r}")


def check_optional(name: str, value, least: int) -> None:
    if value is not None:
        check_number(name, value, least)


def progress_bar(wanted: bool, **options):
    """Returns tqdm's bar, or a context of None if no bar is wanted or tqdm is not installed."""
    if not wanted or importlib.util.find_spec("tqdm") is None:
        return contextlib.nullcontext()
    from tqdm import tqdm

    return tqdm(**options)
