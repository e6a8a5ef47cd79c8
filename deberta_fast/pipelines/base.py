"""What the pipelines share: windows of inputs, batches of rows of similar length, results in the inputs' order."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..models.pretrained import PreTrainedModel

# Padded tokens a batch where no batch_size is given: a CPU has had enough soon, a GPU wants more to do at once.
TOKENS = {"cpu": 1024}
TOKENS_ELSEWHERE = 16384
# Inputs that are sorted by length together; of an iterator, first so many that results come soon.
WINDOW, FIRST_WINDOW = 1024, 16
# A bar appears where the results take longer than this many seconds.
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
    """What the model gets for an input, or for a part of it; ``about`` is what the task needs to read the output."""

    input_ids: list[int]
    token_type_ids: list[int] | None
    about: Any = None


class Pipeline:
    """A model, its tokenizer and the options of a task. Made by ``pipeline``, which documents the arguments.

    A task says how inputs become rows (``rows``), what is kept of the model's output (``outputs``), and how that
    becomes a result (``answer``).
    """

    task: str
    head: type[PreTrainedModel]
    Options: type

    def __init__(self, model, tokenizer, *, batch_size: int | None = None, progress: bool | None = None, **options):
        if not isinstance(model, self.head):
            raise TypeError(f"{self.task} needs a {self.head.__name__} or its V2, got {type(model).__name__}")
        if progress:
            _tqdm()
        self.model, self.tokenizer, self.progress = model.eval(), tokenizer, progress
        self.batch_size = _checked_size(batch_size)
        self.options = self.changed(options)

    def __call__(self, inputs, *, batch_size: int | None = None, **options):
        """
        Args:
            inputs: one input; a list or tuple of them; or any other iterable, which is read as results are asked for.
            batch_size, options: for this call, instead of those of the pipeline.

        Returns:
            One result, a list, or an iterator of them, in the order of the inputs.

        Raises:
            InputError: an input is of the wrong type, empty, or too long; it says which.
            TypeError, ValueError: an option is unknown or out of range.
        """
        changed = self.resolved(self.changed(options, self.options))
        batch_size = self.batch_size if batch_size is None else _checked_size(batch_size)
        if self.is_one(inputs, changed):
            [result] = self._results([inputs], WINDOW, changed, batch_size, contextlib.nullcontext())
            return self.alone(inputs, result, options)
        if isinstance(inputs, list | tuple):
            bar = self._bar(len(inputs))
            return self.listed(list(self._results(inputs, WINDOW, changed, batch_size, bar)))
        try:
            inputs = iter(inputs)
        except TypeError:
            raise TypeError(f"{self.task} takes inputs or an iterable of them, got {type(inputs).__name__}") from None
        bar = self._bar(None) if self.progress else contextlib.nullcontext()
        return self._results(inputs, FIRST_WINDOW, changed, batch_size, bar)

    @classmethod
    def changed(cls, changes: dict, options=None):
        """Options of the task, of the defaults or of others. Raises TypeError or ValueError."""
        known = [field.name for field in dataclasses.fields(cls.Options)]
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise TypeError(f"{cls.task} has no {', '.join(unknown)}; its options are {', '.join(known)}")
        return dataclasses.replace(options or cls.Options(), **changes)

    def is_one(self, inputs, options) -> bool:
        """Whether it is one input, none of the kinds that hold several."""
        return isinstance(inputs, str | dict)

    def alone(self, item, result, given: dict):
        """What a call with one input returns; ``given`` are the options of the call."""
        return result

    def listed(self, results: list):
        """What a call with a list of inputs returns."""
        return results

    def resolved(self, options):
        """The options, checked against model and tokenizer."""
        return options

    def checked(self, item, options):
        """The input, or what ``rows`` and ``answer`` get instead of it. Raises TypeError or ValueError."""
        return text_of(item)

    def rows(self, items: list, options) -> list[list[Row]]:
        """What the model gets, for every input. Raises InputError, whose index counts from the first of ``items``."""
        raise NotImplementedError

    def outputs(self, inputs: dict, rows: list[Row], options) -> Iterable:
        """What ``answer`` needs of the model's output for each row, off the model's device.

        Args:
            inputs: as ``call`` takes them: the rows one after the other, with cu_seqlens; or a batch (B, L), with an
                attention_mask where it holds padding.
        """
        raise NotImplementedError

    def answer(self, item, rows: list[Row], outputs: list, options):
        """The result of an input."""
        raise NotImplementedError

    def call(self, inputs: dict):
        """The model's output."""
        return self.model(**inputs)

    @staticmethod
    def unpadded(values: torch.Tensor, inputs: dict) -> torch.Tensor:
        """The output's values of tokens, (T, ...) or (B, L, ...), as (T, ...): row after row, without padding."""
        if "cu_seqlens" in inputs:
            return values
        return values[inputs["attention_mask"]] if "attention_mask" in inputs else values.flatten(0, 1)

    def encode(self, pairs: list[tuple[str, str | None]], **options) -> list[Row]:
        """Rows of texts and pairs; options as the tokenizer takes them."""
        rows = [None] * len(pairs)
        for is_pair in (False, True):
            chosen = [i for i, pair in enumerate(pairs) if (pair[1] is not None) == is_pair]
            if chosen:
                texts = [pairs[i][0] for i in chosen]
                seconds = [pairs[i][1] for i in chosen] if is_pair else None
                encoding = self.tokenizer(texts, seconds, return_attention_mask=False, **options)
                for n, i in enumerate(chosen):
                    rows[i] = Row(encoding["input_ids"][n], types_of(encoding, n))
        return rows

    def _bar(self, total: int | None):
        if self.progress is False:
            return contextlib.nullcontext()
        try:
            tqdm = _tqdm()
        except ImportError:
            return contextlib.nullcontext()
        if self.progress:
            return tqdm(total=total, unit=" inputs")
        # disable=None: unless stderr is a terminal
        return tqdm(total=total, unit=" inputs", delay=PATIENCE, disable=None)

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
        places = [(i, n) for i in range(len(items)) for n in range(len(rows[i]))]
        outputs, left, results = [[None] * len(own) for own in rows], [len(own) for own in rows], [None] * len(items)
        for batch in self._batches(places, rows, batch_size):
            for (i, n), output in zip(batch, self._outputs([rows[i][n] for i, n in batch], options)):
                outputs[i][n] = output
                left[i] -= 1
                if not left[i]:
                    results[i] = self.answer(items[i], rows[i], outputs[i], options)
                    outputs[i] = None
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

    def _batches(self, places: list, rows: list[list[Row]], batch_size: int | None) -> Iterator[list]:
        """Places of rows, the longest first: what memory does not suffice for fails at once."""
        length = lambda place: len(rows[place[0]][place[1]].input_ids)
        places = sorted(places, key=length, reverse=True)
        while places:
            tokens = TOKENS.get(self.model.device.type, TOKENS_ELSEWHERE)
            size = batch_size or max(1, tokens // length(places[0]))
            yield places[:size]
            places = places[size:]

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
        # Rows of one length are a batch without padding, and some backends are faster with a batch
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
        """Whether packed sequences give the model's output."""
        config, base = self.model.config, self.model.base_model
        dense = config.talking_head or config.output_attentions or base.encoder.unpadding.mode is False
        return not dense and _is_plain(self.model) and _is_plain(base)


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether a call runs this package's forward, which takes packed sequences: no hook, program or subclass's."""
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    around = (module._forward_hooks, module._forward_pre_hooks, module._compiled_call_impl, vars(module).get("forward"))
    return owner.__module__.partition(".")[0] == __name__.partition(".")[0] and not any(around)


def lengths_of(rows: list[Row]) -> list[int]:
    return [len(row.input_ids) for row in rows]


def text_of(item, name: str = "text") -> str:
    """The text of an input that is one, or an object with one."""
    if isinstance(item, dict):
        if set(item) != {name}:
            raise ValueError(f"expected a text or {{{name!r}: text}}, got an object with {', '.join(map(repr, item))}")
        item = item[name]
    return checked_text(item, name)


def checked_text(value, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    value.encode()  # a lone surrogate is a ValueError here and a crash in some tokenizers
    return value


def types_of(encoding, row: int) -> list[int] | None:
    """Token types where the tokenizer gives some."""
    types = encoding.get("token_type_ids")
    return None if types is None else types[row]


def check_number(name: str, value, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a number from {least} on, got {value!r}")


def _checked_size(batch_size: int | None) -> int | None:
    if batch_size is not None:
        check_number("batch_size", batch_size, 1)
    return batch_size


def _tqdm():
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError("a progress bar needs tqdm: pip install tqdm") from None
    return tqdm
