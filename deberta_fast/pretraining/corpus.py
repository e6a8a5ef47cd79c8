"""The rows of a run: from shards, which texts are tokenised into first, or from a stream of texts."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .batches import MaskedRows, Share, evaluation_numbers, loaded, masked, packed
from .masking import Masking, Vocabulary
from .objectives import MaskedBatch
from .parallel import Place
from .rows import ChunkedRows, PackedRows, SampleOrder
from .settings import Data, Settings
from .shards import Shards, write_shards
from .sources import Sources
from .streaming import StreamedRows

EVALUATION_SEED = 12345


class Shuffled:
    """A run's batches from shards. Their state is the number of the step."""

    def __init__(self, rows, settings: Settings, vocabulary: Vocabulary, share: Share, pin: bool):
        order = SampleOrder(len(rows), settings.seed)
        self._dataset = MaskedRows(rows, order, settings.masking, vocabulary, settings.seed)
        self._share, self._workers, self._pin = share, settings.data.workers, pin

    def batches(self, first_step: int, state: Any) -> Iterator[MaskedBatch]:
        return loaded(self._dataset, self._share, first_step, self._workers, self._pin)

    def state_dict(self) -> None:
        return None

    def close(self) -> None:
        pass


class Streamed:
    """A rank's batches from a stream, whose state is saved."""

    def __init__(self, rows: StreamedRows, settings: Settings, vocabulary: Vocabulary, share: Share):
        self._rows, self._settings, self._vocabulary, self._share = rows, settings, vocabulary, share

    def batches(self, first_step: int, state: Any) -> Iterator[MaskedBatch]:
        if first_step and state is None:
            raise ValueError("a run on a stream continues with as many processes as it had: each has its own position")
        if state is not None:
            self._rows.load_state_dict(state)
        share, settings = self._share, self._settings
        for numbers in share.numbers(first_step):
            rows = [next(self._rows) for _ in numbers]
            yield packed([
                masked(row, settings.masking, self._vocabulary, settings.seed, number)
                for row, number in zip(rows, numbers)
            ])  # fmt: skip

    def state_dict(self) -> dict:
        return self._rows.state_dict()

    def close(self) -> None:
        """Ends the processes that tokenize."""
        self._rows.close()


def training_batches(settings: Settings, tokenizer, vocabulary: Vocabulary, share: Share, place: Place):
    """Opens the run's text, tokenising it into shards first where ``data.shards`` says so.

    Raises:
        FileNotFoundError, ValueError: a file is absent, empty or damaged, or shards are those of another tokenizer.
    """
    data = settings.data
    if data.shards is None:
        rows = StreamedRows(
            _sources(data, data.train), tokenizer, data.length, packed=data.rows == "packed",
            shuffle_rows=data.shuffle_rows, seed=settings.seed, rank=place.rank, ranks=place.ranks,
            processes=data.processes,
        )  # fmt: skip
        return Streamed(rows, settings, vocabulary, share)
    shards = _shards(data, data.train, Path(data.shards), tokenizer, settings, place)
    rows = _rows(shards, data, tokenizer)
    return Shuffled(rows, settings, vocabulary, share, place.device.type == "cuda")


def evaluation_batches(settings: Settings, tokenizer, vocabulary: Vocabulary, share: Share, place: Place):
    """Makes this process's evaluation batches, all with the same masks in every evaluation; none without texts."""
    data = settings.data
    if not data.evaluation:
        return None
    folder = Path(settings.output) / "evaluation-shards"
    rows = _rows(_shards(data, data.evaluation, folder, tokenizer, settings, place), data, tokenizer)
    masking: Masking = settings.masking
    dataset = MaskedRows(rows, None, masking, vocabulary, EVALUATION_SEED)
    batches = evaluation_numbers(len(rows), share.micro_rows, place.rank, place.ranks)
    return lambda: (packed([dataset[number] for number in numbers]) for numbers in batches)


def _shards(data: Data, files: list[str], folder: Path, tokenizer, settings: Settings, place: Place) -> Shards:
    if place.rank == 0 and (files or data.dataset):
        progress = settings.reporting.progress
        write_shards(_sources(data, files), tokenizer, folder, processes=max(1, data.processes), progress=progress)
    elif files or data.dataset:
        _wait_for(folder)
    place.barrier()
    shards = Shards(folder)
    shards.check_tokenizer(tokenizer)
    return shards


def _wait_for(folder: Path) -> None:
    """Waits until another process has finished the shards: for hours perhaps, which no collective would."""
    while True:
        try:
            Shards(folder)
            return
        except (FileNotFoundError, ValueError):
            time.sleep(0.1)


def _rows(shards: Shards, data: Data, tokenizer):
    return (PackedRows if data.rows == "packed" else ChunkedRows)(shards, data.length, tokenizer)


def _sources(data: Data, files: list[str]) -> Sources:
    if files:
        return Sources(files, text_field=data.text_field, documents=data.documents)
    return Sources(dataset=data.dataset, config=data.dataset_config, split=data.split, text_field=data.text_field)
