"""Batches by a budget of tokens: which sequences go together, and how they become the packed ones that models take.

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

import torch

# Sequences among which is looked for one that fills a batch up.
WINDOW = 1024
# Where batches get padded, sequences for so many of them are sorted by length together; but no more than this part of
# the data, as a few thousand sequences sorted all together would make the same batches in every epoch.
SORTED_BATCHES, SORTED_PART = 100, 4


class TokenBudgetSampler(torch.utils.data.Sampler[list[int]]):
    """Lists of indices for ``DataLoader(batch_sampler=...)``: batches of up to max_tokens tokens.

    With shuffle, every epoch has another order, drawn from seed and epoch alone: call ``set_epoch`` before each epoch,
    or all are like epoch 0. A loader that accelerate has prepared, and so Hugging Face's Trainer, tells the epoch by
    itself; it also shares the batches out among its processes, so num_replicas stays 1 there.

    Sequences go together as they come in a random order, except that a batch is filled up with the longest that still
    fits of the next thousand; with padded, sequences of similar length go together. Without shuffle, batches hold the
    data in its order, each as long a run of it as fits.

    Every sequence comes once an epoch, up to what distributed training needs: all ranks must get the same number of
    batches. They make the same list of batches, and a rank takes every num_replicas-th of it. What is missing to a
    multiple of num_replicas is filled with repeated batches, or with drop_last the surplus ones are left out (with
    shuffle, other ones every epoch). With shuffle, the batches of the ranks at one step are of similar cost.

    Args:
        lengths: tokens of every sequence, positive integers, or a tensor (N,) of them.
        max_tokens: what a batch may cost: the sum of its lengths.
        padded: the cost is the number of sequences times the longest instead, for batches that get padded.
        max_sequences: a batch has no more sequences than this.
        shuffle: False for inference.
        seed: another one, other epochs; the same on all ranks.
        drop_last: see above. With one rank nothing is dropped, be the last batch ever so small.
        num_replicas, rank: of the process group, ``get_world_size()`` and ``get_rank()`` of torch.distributed.

    Raises:
        ValueError: a sequence is longer than max_tokens; an argument is out of range; when batches are asked for,
            drop_last would leave out all of them, or accelerate shares out one process's share.
        TypeError: an argument is not of integers.
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
    ):
        self.max_tokens = _at_least("max_tokens", max_tokens, 1)
        self.max_sequences = None if max_sequences is None else _at_least("max_sequences", max_sequences, 1)
        self.num_replicas = _at_least("num_replicas", num_replicas, 1)
        self.rank = _at_least("rank", rank, 0)
        if self.rank >= self.num_replicas:
            raise ValueError(f"rank must be less than num_replicas={num_replicas}, got {rank}")
        self.seed, self.epoch = _integer("seed", seed), 0
        self.padded, self.shuffle, self.drop_last = padded, shuffle, drop_last
        if isinstance(lengths, torch.Tensor):
            if lengths.dim() != 1 or not _holds_integers(lengths):
                raise TypeError(f"lengths must be integers (N,), got {lengths.dtype} of shape {tuple(lengths.shape)}")
            lengths = lengths.tolist()
        self.lengths = [_at_least(f"lengths[{index}]", length, 1) for index, length in enumerate(lengths)]
        for index, length in enumerate(self.lengths):
            if length > self.max_tokens:
                raise ValueError(
                    f"lengths[{index}] is {length}, and max_tokens={max_tokens}: truncate the sequence, or raise the "
                    "budget"
                )
        self._made: tuple[int, list[list[int]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Of which epoch the next ``iter`` and ``len`` are."""
        self.epoch = _integer("epoch", epoch)

    @property
    def sampler(self) -> "TokenBudgetSampler":
        """Itself: it is here that accelerate looks for whom to tell the epoch."""
        return self

    def __iter__(self) -> Iterator[list[int]]:
        self.epoch = self._epoch_of_loader()
        return (list(batch) for batch in self._batches()[self.rank :: self.num_replicas])

    def __len__(self) -> int:
        """This rank's batches in this epoch; other epochs may have some more or less."""
        return len(self._batches()) // self.num_replicas

    def _epoch_of_loader(self) -> int:
        """That of accelerate's loader which skips batches, as after a resumption: it tells no sampler its epoch.

        Raises:
            ValueError: accelerate's loader shares out among its processes what is one process's share already.
        """
        accelerate = sys.modules.get("accelerate.state")
        loader = accelerate and accelerate.GradientState().active_dataloader
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
        """Those of all ranks."""
        if self._made is None or self._made[0] != self.epoch:
            self._made = (
                self.epoch,
                self._shuffled() if self.shuffle else self._even(self._cut(range(len(self.lengths)))),
            )
        return self._made[1]

    def _shuffled(self) -> list[list[int]]:
        # A string: of seed + epoch, an epoch of one seed would be the next epoch of the seed before
        generator = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        batches = self._cut(self._sorted(order)) if self.padded else self._filled(order)
        generator.shuffle(batches)  # also so that those left out or repeated are any
        batches = self._even(batches)
        if self.num_replicas == 1:
            return batches
        # One of two ranks that wait for each other at every step would idle where batches are unlike.
        most = max if self.padded else sum
        batches.sort(key=lambda batch: most(self.lengths[index] for index in batch))
        steps = [batches[i : i + self.num_replicas] for i in range(0, len(batches), self.num_replicas)]
        generator.shuffle(steps)
        return list(itertools.chain.from_iterable(steps))

    def _even(self, batches: list[list[int]]) -> list[list[int]]:
        """As many that every rank gets the same number."""
        surplus = len(batches) % self.num_replicas
        if not surplus:
            return batches
        if not self.drop_last:
            return [*batches, *itertools.islice(itertools.cycle(batches), self.num_replicas - surplus)]
        if surplus == len(batches):
            raise ValueError(f"drop_last would leave out all {surplus} batches, as num_replicas={self.num_replicas}")
        return batches[:-surplus]

    def _cut(self, order: Sequence[int]) -> list[list[int]]:
        """Runs of the order, each as long as fits."""
        batches, batch, total, longest = [], [], 0, 0
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
        """Part by part up and down: a batch across two parts is of similar lengths too."""
        in_batch = max(1, len(order) * self.max_tokens // max(1, sum(self.lengths)))
        size = in_batch * max(1, min(SORTED_BATCHES, len(order) // (SORTED_PART * in_batch)))
        parts = [order[i : i + size] for i in range(0, len(order), size)]
        for number, part in enumerate(parts):
            part.sort(key=self.lengths.__getitem__, reverse=number % 2 == 1)
        return list(itertools.chain.from_iterable(parts))

    def _filled(self, order: list[int]) -> list[list[int]]:
        """In this order as long as the next one fits, then the longest ones that do.

        The next one opens the next batch at the latest: no length is left for the end of the epoch.
        """
        lengths = [self.lengths[index] for index in order]
        waiting = sorted((length, place) for place, length in enumerate(lengths[:WINDOW]))
        seen, first, taken, batches = len(waiting), 0, bytearray(len(order)), []
        while waiting:
            batch, room = [], self.max_tokens
            while waiting and len(batch) != self.max_sequences:
                while taken[first]:
                    first += 1
                if lengths[first] <= room:
                    at = bisect.bisect_left(waiting, (lengths[first], first))
                else:
                    at = bisect.bisect_left(waiting, (room + 1,)) - 1
                    if at < 0:
                        break
                length, place = waiting.pop(at)
                taken[place] = True
                batch.append(order[place])
                room -= length
                if seen < len(order):
                    bisect.insort(waiting, (lengths[seen], seen))
                    seen += 1
            batches.append(batch)
        return batches


class PackedCollator:
    """Features of sequences to a model's arguments: all tokens one after the other, no padding.

    A feature is a mapping of lists, NumPy arrays or tensors, as tokenizers give them:

        input_ids (L,), and any of token_type_ids (L,), position_ids (L,): concatenated.
        attention_mask (L,): what lies before the first 1 and after the last is padding and is cut off everything, as
            if it had never been there. Other features may have none.
        start_positions, end_positions: an integer each, counted in what is left of the sequence afterwards.
        labels, or label or label_ids: a number or a vector (k,) a sequence, which are stacked; or one integer a token
            (L,), which are concatenated. Integers become int64; floats stay as they are.

    Args:
        token_labels: whether labels are one a token. By default they are if they are integers, in every feature as many
            as its tokens. Say False for vectors of integers (several classes a sequence), which may be as long as
            the sequences by chance.

    Returns:
        input_ids (T,), int64; cu_seqlens (n + 1,), int32; max_seqlen, an int; token_type_ids, position_ids (T,) where
        the features have them; attention_mask (T,) of 0 and 1 where zeros are left between a sequence's tokens;
        start_positions, end_positions (n,); labels (n,), (n, k) or (T,).

    Raises:
        ValueError: no features, or an entry is missing, unknown, of another shape than above, or in some features only;
            a sequence without a token; a position in the padding; labels some of which are as many as the tokens.
        TypeError: a feature is no mapping, or an entry is not of numbers, or not of integers where it must be.
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

        # Answers first: accelerate and Trainer take the first tensor's size for the number of sequences
        batch = {}
        for name in ("start_positions", "end_positions"):
            if name in rows[0]:
                positions = [_shifted(f"features[{i}][{name!r}]", rows[i], name, spans[i]) for i in range(len(rows))]
                batch[name] = torch.tensor(positions)
        if "labels" in rows[0]:
            dtype = functools.reduce(torch.promote_types, [row["labels"].dtype for row in rows])
            for row in rows:
                row["labels"] = row["labels"].to(dtype if dtype.is_floating_point else torch.int64)
            batch["labels"] = (
                joined("labels") if self._of_tokens(rows) else torch.stack([row["labels"] for row in rows])
            )
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
        """Whether labels are one a token; their shapes are as they must be then."""
        fits = [row["labels"].shape == row["input_ids"].shape for row in rows]
        of_tokens = self.token_labels
        if of_tokens is None and rows[0]["labels"].is_floating_point():
            of_tokens = False  # the losses of tokens take classes
        if of_tokens is None and any(fits) and not all(fits):
            raise ValueError(
                f"features[{fits.index(True)}] has as many labels as tokens, features[{fits.index(False)}] has not: "
                "say whether labels are one a token, PackedCollator(token_labels=...)"
            )
        of_tokens = all(fits) if of_tokens is None else of_tokens
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
    """A feature's entries as tensors, labels under this name, attention_mask always there and boolean."""
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
    row["attention_mask"] = (
        row["attention_mask"] != 0 if "attention_mask" in row else torch.ones(shape, dtype=torch.bool)
    )
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
    """From the first token to the last."""
    places = mask.nonzero()
    if len(places) == 0:
        raise ValueError(f"{where}['attention_mask'] has zeros only: a sequence has at least one token")
    return slice(int(places[0]), int(places[-1]) + 1)


def _shifted(where: str, row: dict[str, torch.Tensor], name: str, span: slice) -> int:
    """A position counted from the first token."""
    if row[name].numel() != 1 or not _holds_integers(row[name]):
        raise TypeError(f"{where} must be an integer, got {row[name].dtype} of shape {tuple(row[name].shape)}")
    position = int(row[name])
    # Those past the end are left out of the loss, and negative ones count as 0: they stay what they are.
    if 0 <= position < len(row["input_ids"]) and not span.start <= position < span.stop:
        raise ValueError(f"{where} is {position}, and the tokens are at {span.start} to {span.stop - 1}")
    return position - span.start


def _holds_integers(x: torch.Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _integer(name: str, value) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _at_least(name: str, value, least: int) -> int:
    value = _integer(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value
