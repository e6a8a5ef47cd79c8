"""Chooses batches by a budget of tokens, and packs their sequences for the models.

sampler = TokenBudgetSampler([len(feature["input_ids"]) for feature in dataset], max_tokens=8192)
loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=PackedCollator())
for epoch in range(epochs):
    sampler.set_epoch(epoch)
    for batch in loader:
        loss = model(**batch).loss
"""

import bisect
import functools
import itertools
import operator
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

# Number of next sequences that may fill a batch up.
WINDOW = 1024
# Padded batches: sequences of this many batches are sorted by length together, but at most 1 / SORTED_PART of the data.
# Sorting a small data set as a whole would give the same batches in every epoch.
SORTED_BATCHES, SORTED_PART = 100, 4


class _Progress:
    """How many batches of an epoch an iteration gave out. ``resumed``: it has to continue behind these."""

    def __init__(self, epoch: int, batches: int = 0, resumed: bool = False):
        self.epoch, self.batches, self.resumed = epoch, batches, resumed


class TokenBudgetSampler(torch.utils.data.Sampler[list[int]]):
    """Yields lists of indices for ``DataLoader(batch_sampler=...)``: batches of up to max_tokens tokens.

    With shuffle, seed and epoch determine the order. Call ``set_epoch`` before each epoch, or all epochs are like epoch
    0. A loader that accelerate has prepared, such as that of Hugging Face's Trainer, sets the epoch itself. It also
    distributes the batches among its processes, so num_replicas stays 1 there.

    Sequences are batched in random order, but a batch is filled up with the longest of the next thousand sequences that
    still fits. With padded, sequences of similar length go together. Without shuffle, batches hold the data in its
    order, each as long a run as fits.

    Every sequence comes once per epoch, except that distributed ranks must get the same number of batches. All ranks
    make the same list of batches, and a rank takes every num_replicas-th batch. Batches are repeated until their number
    is a multiple of num_replicas; with drop_last, the surplus batches are left out instead (with shuffle, different
    ones in every epoch). With shuffle, the batches of all ranks at one step are similar work: l (1 + l / (6 width)) for
    a sequence of l tokens, because attention takes as long as the linear layers where l is 6 widths.

    An epoch continues in its middle after ``load_state_dict``: the next ``iter`` starts at the batch behind those that
    ``state_dict`` counts, for all ranks the same number; ``len`` stays that of the whole epoch.

        sampler.load_state_dict(state)
        for epoch in range(sampler.epoch, epochs):
            sampler.set_epoch(epoch)

    A DataLoader with workers takes batches ahead of the loop that trains, and so does the count. torchdata's
    StatefulDataLoader saves the state of the batch that it returned last; with another loader, count the steps and save
    ``state_dict() | {"batches": steps}``. With accelerate, use its ``skip_first_batches`` instead.

    Args:
        lengths: tokens of every sequence, positive integers, or a tensor (N,).
        max_tokens: largest cost of a batch, which is the sum of its lengths.
        padded: the cost is the number of sequences times the longest length instead, for batches that get padded.
        max_sequences: largest number of sequences per batch.
        shuffle: False for inference.
        seed: changes the order of all epochs; must be the same on all ranks.
        drop_last: see above. A single rank drops nothing, however small its last batch is.
        num_replicas, rank: ``get_world_size()`` and ``get_rank()`` of torch.distributed.
        width: hidden_size of the model, see above.

    Raises:
        ValueError: a sequence is longer than max_tokens, or an argument is out of range. On iteration: drop_last would
            leave out all batches, or accelerate would distribute one process's share again.
        TypeError: an argument must hold integers and does not.
    """

    def __init__(
        self,
        lengths: Sequence[int] | torch.Tensor,
        max_tokens: int,
        *,
        padded: bool = False,
        max_sequences: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_replicas: int = 1,
        rank: int = 0,
        width: int = 768,
    ):
        self.width = _integer("width", width, 1)
        self.max_tokens = _integer("max_tokens", max_tokens, 1)
        self.max_sequences = None if max_sequences is None else _integer("max_sequences", max_sequences, 1)
        self.num_replicas = _integer("num_replicas", num_replicas, 1)
        self.rank = _integer("rank", rank, 0)
        if self.rank >= self.num_replicas:
            raise ValueError(f"rank must be less than num_replicas={num_replicas}, got {rank}")
        self.seed = _integer("seed", seed)
        self._progress = _Progress(0)  # of the last iteration, or of the next one after set_epoch or load_state_dict
        self.padded, self.shuffle, self.drop_last = padded, shuffle, drop_last
        if isinstance(lengths, torch.Tensor):
            if lengths.dim() != 1 or not _holds_integers(lengths):
                raise TypeError(f"lengths must be integers (N,), got {lengths.dtype} of shape {tuple(lengths.shape)}")
            lengths = lengths.tolist()
        self.lengths = [_integer(f"lengths[{index}]", length, 1) for index, length in enumerate(lengths)]
        for index, length in enumerate(self.lengths):
            if length > self.max_tokens:
                found = f"lengths[{index}] is {length}, and max_tokens={max_tokens}"
                raise ValueError(f"{found}: truncate the sequence, or raise the budget")
        self._tokens = sum(self.lengths)
        self._made: tuple[int, list[list[int]]] | None = None

    @property
    def epoch(self) -> int:
        return self._progress.epoch

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next ``iter`` and ``len``, from its first batch unless it is the epoch already."""
        if _integer("epoch", epoch) != self.epoch:
            self._progress = _Progress(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The epoch, how many of this rank's batches the last ``iter`` gave out, and the settings; all as JSON has it.

        It is the same on all ranks that have made as many steps.
        """
        return {"epoch": self.epoch, "batches": self._progress.batches, "settings": self._settings()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Makes the next ``iter`` continue behind the batches that ``state_dict`` counts.

        Raises:
            ValueError: an entry is missing, the state is that of a sampler with other arguments, or it counts more
                batches than there are.
        """
        if absent := {"epoch", "batches", "settings"} - state_dict.keys():
            raise ValueError(f"state_dict must be one of this class, got one without {', '.join(sorted(absent))}")
        for name, own in self._settings().items():
            if (given := state_dict["settings"].get(name)) != own:
                raise ValueError(f"state_dict must be of a sampler with {name}={own!r}, got one with {given!r}")
        self.set_epoch(state_dict["epoch"])
        batches = _integer("batches", state_dict["batches"], 0)
        if batches > len(self):
            raise ValueError(f"batches must be at most the {len(self)} of epoch {self.epoch}, got {batches}")
        self._progress = _Progress(self.epoch, batches, resumed=True)

    def _settings(self) -> dict[str, int | bool | None]:
        names = ("max_tokens", "padded", "max_sequences", "shuffle", "seed", "drop_last", "num_replicas", "width")
        return {"sequences": len(self.lengths), "tokens": self._tokens, **{name: getattr(self, name) for name in names}}

    @property
    def sampler(self) -> "TokenBudgetSampler":
        """Returns itself, because accelerate calls ``set_epoch`` on the attribute of this name."""
        return self

    def __iter__(self) -> Iterator[list[int]]:
        self.set_epoch(self._epoch_of_loader())
        if not self._progress.resumed:
            self._progress = _Progress(self.epoch)
        return self._given_out(self._batches()[self.rank :: self.num_replicas], self._progress)

    @staticmethod
    def _given_out(batches: list[list[int]], progress: "_Progress") -> Iterator[list[int]]:
        progress.resumed = False  # not before the first batch: a loader with workers calls iter twice
        while progress.batches < len(batches):
            progress.batches += 1
            yield list(batches[progress.batches - 1])

    def __len__(self) -> int:
        """Number of this rank's batches in this epoch; it may differ a little between epochs."""
        return len(self._batches()) // self.num_replicas

    def _epoch_of_loader(self) -> int:
        """Returns the epoch. accelerate's loader that skips batches after a resumption does not set it, so it is read.

        Raises ValueError if accelerate would distribute one process's share among the processes again.
        """
        accelerate = sys.modules.get("accelerate.state")
        loader: Any = accelerate and accelerate.GradientState().active_dataloader
        sampler, wrappers = getattr(loader, "batch_sampler", None), []
        while sampler is not None and sampler is not self:
            wrappers.append(sampler)
            sampler = getattr(sampler, "batch_sampler", None)
        if sampler is None:
            return self.epoch
        if self.num_replicas > 1 and any(getattr(x, "num_processes", 1) > 1 for x in wrappers):
            raise ValueError(
                f"num_replicas must be 1 where accelerate shares the batches out, got {self.num_replicas}: "
                "a process would get a part of its part"
            )
        return loader.iteration if any(hasattr(x, "skip_batches") for x in wrappers) else self.epoch

    def _batches(self) -> list[list[int]]:
        """Returns the batches of all ranks."""
        if self._made is None or self._made[0] != self.epoch:
            batches = self._shuffled() if self.shuffle else self._even(self._cut(range(len(self.lengths))))
            self._made = self.epoch, batches
        return self._made[1]

    def _shuffled(self) -> list[list[int]]:
        # A string, because seed + epoch would give seed 1 the epochs of seed 0, one later.
        generator = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        batches = self._cut(self._sorted(order)) if self.padded else self._filled(order)
        generator.shuffle(batches)  # Any batch may be left out or repeated.
        batches = self._even(batches)
        if self.num_replicas == 1:
            return batches
        # Ranks wait for each other at every step, so the batches of a step are similar work.
        batches.sort(key=self._work)
        steps = [batches[i : i + self.num_replicas] for i in range(0, len(batches), self.num_replicas)]
        generator.shuffle(steps)
        return list(itertools.chain.from_iterable(steps))

    def _work(self, batch: list[int]) -> float:
        lengths = [self.lengths[index] for index in batch]
        if self.padded:
            lengths = [max(lengths)] * len(lengths)
        return sum(length * (1 + length / (6 * self.width)) for length in lengths)

    def _even(self, batches: list[list[int]]) -> list[list[int]]:
        """Repeats or leaves out batches so that every rank gets the same number."""
        surplus = len(batches) % self.num_replicas
        if not surplus:
            return batches
        if not self.drop_last:
            return [*batches, *itertools.islice(itertools.cycle(batches), self.num_replicas - surplus)]
        if surplus == len(batches):
            raise ValueError(f"drop_last would leave out all {surplus} batches, as num_replicas={self.num_replicas}")
        return batches[:-surplus]

    def _cut(self, order: Sequence[int]) -> list[list[int]]:
        """Cuts the order into batches, each as long as fits."""
        batches: list[list[int]] = []
        batch: list[int] = []
        total = longest = 0
        for index in order:
            length = self.lengths[index]
            total, longest = total + length, max(longest, length)
            cost = (len(batch) + 1) * longest if self.padded else total
            if batch and (cost > self.max_tokens or len(batch) == self.max_sequences):
                batches.append(batch)
                batch, total, longest = [], length, length
            batch.append(index)
        return [*batches, batch] if batch else batches

    def _sorted(self, order: list[int]) -> list[int]:
        """Sorts each part, in turn up and down, so that a batch across two parts has similar lengths too."""
        in_batch = max(1, len(order) * self.max_tokens // max(1, sum(self.lengths)))
        size = in_batch * max(1, min(SORTED_BATCHES, len(order) // (SORTED_PART * in_batch)))
        parts = [order[i : i + size] for i in range(0, len(order), size)]
        for number, part in enumerate(parts):
            part.sort(key=self.lengths.__getitem__, reverse=number % 2 == 1)
        return list(itertools.chain.from_iterable(parts))

    def _filled(self, order: list[int]) -> list[list[int]]:
        """Fills each batch in order; when the next sequence does not fit, with the longest that does.

        The sequence that did not fit opens the next batch, so no sequence waits until the end of the epoch.
        """
        lengths = [self.lengths[index] for index in order]
        waiting = sorted((length, place) for place, length in enumerate(lengths[:WINDOW]))
        seen, first, taken = len(waiting), 0, bytearray(len(order))
        batches: list[list[int]] = []
        while waiting:
            batch: list[int] = []
            free = self.max_tokens
            while waiting and len(batch) != self.max_sequences:
                while taken[first]:
                    first += 1
                if lengths[first] <= free:
                    at = bisect.bisect_left(waiting, (lengths[first], first))
                else:
                    at = bisect.bisect_left(waiting, (free + 1,)) - 1
                    if at < 0:
                        break
                length, place = waiting.pop(at)
                taken[place] = True
                batch.append(order[place])
                free -= length
                if seen < len(order):
                    bisect.insort(waiting, (lengths[seen], seen))
                    seen += 1
            batches.append(batch)
        return batches


class PackedCollator:
    """Packs features of sequences into a model's arguments: all tokens one after the other, without padding.

    A feature is a mapping of lists, NumPy arrays or tensors, as tokenizers give them:

        input_ids (L,), optionally token_type_ids (L,) and position_ids (L,): concatenated.
        attention_mask (L,), optional: tokens before the first 1 and after the last are padding, which is removed from
            all entries.
        start_positions, end_positions: one integer each, which is shifted by the padding removed before it.
        labels, or label or label_ids: a number or a vector (k,) per sequence, which are stacked; or one integer per
            token (L,), which are concatenated. Integers become int64; floats keep their dtype.

    Args:
        token_labels: whether there is one label per token. By default that is so if labels are integers and every
            feature has as many labels as tokens. Pass False for vectors of integers (several classes per sequence),
            which may be as long as the sequences by chance.

    Returns:
        input_ids (T,), int64; cu_seqlens (n + 1,), int32; max_seqlen, an int; token_type_ids, position_ids (T,) if
        the features have them; attention_mask (T,) of 0 and 1 if zeros remain between a sequence's tokens;
        start_positions, end_positions (n,); labels (n,), (n, k) or (T,).

    Raises:
        ValueError: features is empty; an entry is missing, unknown, of another shape, or in some features only; a
            sequence has no token; a position lies in the padding; only some features have as many labels as tokens.
        TypeError: a feature is not a mapping, or an entry does not hold numbers, or not integers where required.
    """

    def __init__(self, token_labels: bool | None = None):
        if token_labels not in (None, True, False):
            raise ValueError(f"token_labels must be None, True or False, got {token_labels!r}")
        self.token_labels = token_labels

    def __call__(self, features: Sequence[Mapping]) -> dict[str, torch.Tensor | int]:
        rows = [_row(f"features[{index}]", feature) for index, feature in enumerate(features)]
        if not rows:
            raise ValueError("features must be a list of at least one feature, got none")
        for index, row in enumerate(rows):
            if row.keys() != rows[0].keys():
                odd = ", ".join(sorted(row.keys() ^ rows[0].keys()))
                raise ValueError(f"features[0] and features[{index}] must have the same entries, only one has {odd}")
        spans = [_span(f"features[{index}]", row["attention_mask"]) for index, row in enumerate(rows)]
        joined = lambda name: torch.cat([row[name][span] for row, span in zip(rows, spans)])

        # Labels come first: accelerate and Trainer take the first tensor's size for the number of sequences.
        batch: dict[str, torch.Tensor | int] = {}
        for name in ("start_positions", "end_positions"):
            if name in rows[0]:
                positions = [_shifted(f"features[{i}][{name!r}]", rows[i], name, spans[i]) for i in range(len(rows))]
                batch[name] = torch.tensor(positions)
        if "labels" in rows[0]:
            dtype = functools.reduce(torch.promote_types, [row["labels"].dtype for row in rows])
            for row in rows:
                row["labels"] = row["labels"].to(dtype if dtype.is_floating_point else torch.int64)
            labels = [row["labels"] for row in rows]
            batch["labels"] = joined("labels") if self._of_tokens(rows) else torch.stack(labels)
        lengths = [span.stop - span.start for span in spans]
        batch["input_ids"] = joined("input_ids")
        batch["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        batch["max_seqlen"] = max(lengths)
        mask = joined("attention_mask")
        if not mask.all():
            batch["attention_mask"] = mask.long()
        for name in ("token_type_ids", "position_ids"):
            if name in rows[0]:
                batch[name] = joined(name)
        return batch

    def _of_tokens(self, rows: list[dict[str, torch.Tensor]]) -> bool:
        """Whether there is one label per token. Checks the labels' shapes."""
        fits = [row["labels"].shape == row["input_ids"].shape for row in rows]
        of_tokens = self.token_labels
        if of_tokens is None:
            integers = not rows[0]["labels"].is_floating_point()  # Losses per token take class indices.
            if integers and any(fits) and not all(fits):
                raise ValueError(
                    f"features[{fits.index(True)}] has as many labels as tokens, features[{fits.index(False)}] has "
                    "not: say whether there is one label per token, PackedCollator(token_labels=...)"
                )
            of_tokens = integers and all(fits)
        for index, row in enumerate(rows):
            shape = tuple(row["labels"].shape)
            expected = tuple((row["input_ids"] if of_tokens else rows[0]["labels"]).shape)
            if shape != expected:
                other = "its input_ids are" if of_tokens else "those of features[0] are"
                raise ValueError(f"labels of features[{index}] must be of shape {expected} as {other}, got {shape}")
            if len(shape) > 1:
                raise ValueError(f"labels of features[{index}] must be a number or a vector, got shape {shape}")
        return of_tokens


_OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_LABELS = ("labels", "label", "label_ids")
_KNOWN = (*_OF_TOKENS, "start_positions", "end_positions", *_LABELS)


def _row(where: str, feature: Mapping) -> dict[str, torch.Tensor]:
    """Returns a feature's entries as tensors, with "labels" for any of its names and a boolean attention_mask."""
    if not isinstance(feature, Mapping):
        raise TypeError(f"{where} must be a mapping of input_ids and so on, got {type(feature).__name__}")
    unknown = [str(name) for name in feature if name not in _KNOWN]
    if unknown:
        raise ValueError(f"{where} has {', '.join(unknown)}: remove such columns; known are {', '.join(_KNOWN)}")
    if "input_ids" not in feature:
        raise ValueError(f"{where} has no input_ids")
    if len(labels := [name for name in _LABELS if name in feature]) > 1:
        raise ValueError(f"{where} has {' and '.join(labels)}, which are the same: keep one")
    row = {}
    for name, value in feature.items():
        try:
            row["labels" if name in _LABELS else name] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{where}[{name!r}] cannot become a tensor: {error}") from error
    shape = row["input_ids"].shape
    if len(shape) != 1 or shape[0] == 0:
        raise ValueError(f"{where}['input_ids'] must be of shape (L,) with L at least 1, got {tuple(shape)}")
    row["attention_mask"] = row.get("attention_mask", torch.ones(shape)) != 0
    for name in _OF_TOKENS:
        if name not in row:
            continue
        if row[name].shape != shape:
            raise ValueError(f"{where}[{name!r}] must be {tuple(shape)} as input_ids, got {tuple(row[name].shape)}")
        if name != "attention_mask":
            if not _holds_integers(row[name]):
                raise TypeError(f"{where}[{name!r}] must be integers, got {row[name].dtype}")
            row[name] = row[name].long()
    return row


def _span(where: str, mask: torch.Tensor) -> slice:
    """Returns the slice from the first token to the last."""
    places = mask.nonzero()
    if len(places) == 0:
        raise ValueError(f"{where}['attention_mask'] has zeros only: a sequence has at least one token")
    return slice(int(places[0]), int(places[-1]) + 1)


def _shifted(where: str, row: dict[str, torch.Tensor], name: str, span: slice) -> int:
    """Returns a position counted from the first token."""
    if row[name].numel() != 1 or not _holds_integers(row[name]):
        raise TypeError(f"{where} must be an integer, got {row[name].dtype} of shape {tuple(row[name].shape)}")
    position = int(row[name])
    # The loss leaves out positions past the end and clamps negative ones to 0, so both are allowed.
    if 0 <= position < len(row["input_ids"]) and not span.start <= position < span.stop:
        raise ValueError(f"{where} is {position}, and the tokens are at {span.start} to {span.stop - 1}")
    return position - span.start


def _holds_integers(x: torch.Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _integer(name: str, value, least: int | None = None) -> int:
    try:
        number = operator.index(None if isinstance(value, bool) else value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number
