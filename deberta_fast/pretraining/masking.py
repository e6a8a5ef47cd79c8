"""Chooses the tokens of a text that a language model has to predict, and hides them.

A *unit* is what is masked as a whole: a piece of the tokenizer, or a word. A *span* is a run of units. For a sequence
of n tokens, special ones included, units are chosen until they hold min(max_predictions, max(1, round(rate n))) tokens;
the last unit may exceed that. [CLS], [SEP], [PAD], [MASK] and [UNK] are never chosen (NGramMaskGenerator of
microsoft/DeBERTa; spans of words: Joshi et al., arXiv 1907.10529).

rule="even", the default, places spans of g units, with probabilities proportional to 1 / g for g = 1 ... max_gram, at
uniformly drawn places, one after the other, until the budget is spent. Every unit is as likely as any other.

rule="ms" is Microsoft's walk from the left: it draws a span's length g as above, one place of the span's start within
the next g floor(1 / rate) units, and goes on behind these. It marks 1 / floor(1 / rate) of the units, which is more
than the budget: 16.7 % where 15 % are asked for. Then it takes marked units from the left until the budget is spent.
The end of a text is therefore masked far less than the rest: with single pieces and 512 tokens, 16.7 % in the first
seven eighths, 4 % in the last, and nothing among the last 16 tokens.
"""

import dataclasses
import math
import unicodedata

import numpy as np

RULES = ("even", "ms")


@dataclasses.dataclass(frozen=True)
class Masking:
    """How tokens are chosen and hidden; see the module.

    Attributes:
        rule: "even" or "ms".
        rate: share of a sequence's tokens, above 0 and below 1.
        max_predictions: most tokens of a sequence; None sets no limit. Microsoft's code takes 80 at 512 tokens.
        whole_words: units are words instead of pieces. Microsoft's masks words whenever max_gram is above 1.
        max_gram: most units of a span. Microsoft's scripts take 3 for DeBERTa v1, and 1 for BERT and for v3.
        mask, keep: shares of the chosen tokens that become [MASK], and that stay; the others become any token of the
            vocabulary. 0.8 and 0.1 for a masked language model; 1 and 0 for replaced-token detection.
    """

    rule: str = "even"
    rate: float = 0.15
    max_predictions: int | None = None
    whole_words: bool = False
    max_gram: int = 1
    mask: float = 0.8
    keep: float = 0.1

    def __post_init__(self):
        if self.rule not in RULES:
            raise ValueError(f"masking.rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        if not 0 < self.rate < 1:
            raise ValueError(f"masking.rate must be above 0 and below 1, got {self.rate}")
        for name in ("max_gram", "max_predictions"):
            if (value := getattr(self, name)) is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"masking.{name} must be a whole number from 1 on, got {value!r}")
        if not (0 <= self.mask and 0 <= self.keep and self.mask + self.keep <= 1 + 1e-9):
            raise ValueError(
                f"masking.mask and masking.keep must be shares with a sum of at most 1, got {self.mask} and {self.keep}"
            )


class Vocabulary:
    """What masking needs to know of a tokenizer, as arrays that loaders' processes can copy.

    Attributes:
        size: number of ids.
        mask_id: that of [MASK].
        special: bool (V,), ids that are never chosen.
        starts_word: bool (V,), pieces that do not continue the word before them.
    """

    def __init__(self, tokenizer):
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.size, self.mask_id = len(pieces), tokenizer.mask_token_id
        self.special = np.zeros(self.size, bool)
        names = ("mask", "cls", "sep", "pad", "unk")
        for name in names:
            index = getattr(tokenizer, f"{name}_token_id")
            if index is None:
                raise ValueError(f"the tokenizer must have {', '.join(f'[{x.upper()}]' for x in names)}, got no {name}")
            self.special[index] = True
        self.starts_word = np.array([_starts_word(piece) for piece in pieces]) | self.special


def _starts_word(piece: str) -> bool:
    """Whether a piece does not continue a word: sentencepiece's mark or GPT-2's, or one lone mark or space."""
    if piece.startswith(("\u2581", "\u0120")):
        return True
    return len(piece) == 1 and (piece.isspace() or unicodedata.category(piece)[0] in "CP" or _is_ascii_mark(piece))


def _is_ascii_mark(character: str) -> bool:
    """Whether Microsoft's code counts an ASCII character as punctuation: those that Unicode calls symbols too."""
    return character.isascii() and not character.isalnum()


def chosen(
    ids: np.ndarray, ends: np.ndarray, masking: Masking, vocabulary: Vocabulary, generator: np.random.Generator
) -> np.ndarray:
    """Chooses the tokens to predict in each of a row's sequences.

    Args:
        ids: int64 (T,).
        ends: ints (n,), where the row's sequences end; the last is T.

    Returns:
        int64 (M,), places in the row in ascending order.
    """
    found, start = [], 0
    for end in ends.tolist():
        found.append(start + _of_sequence(ids[start:end], masking, vocabulary, generator))
        start = end
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _of_sequence(ids: np.ndarray, masking: Masking, vocabulary: Vocabulary, generator) -> np.ndarray:
    (places,) = np.nonzero(~vocabulary.special[ids])
    if len(places) == 0:
        return np.zeros(0, np.int64)
    budget = max(1, round(masking.rate * len(ids)))
    if masking.max_predictions is not None:
        budget = min(budget, masking.max_predictions)
    if masking.whole_words:
        # A special token between two pieces separates them as well.
        opens = vocabulary.starts_word[ids[places]] | (np.diff(places, prepend=-2) > 1)
        starts = np.flatnonzero(opens)
    else:
        starts = np.arange(len(places))
    bounds = np.append(starts, len(places))
    order = (_from_the_left if masking.rule == "ms" else _anywhere)(len(starts), masking, generator)
    taken = _within(budget, order, bounds)
    return np.sort(np.concatenate([places[bounds[unit] : bounds[unit + 1]] for unit in taken]))


def _within(budget: int, order, bounds: np.ndarray) -> list[int]:
    """Takes units in order until they hold ``budget`` tokens."""
    taken = []
    for unit in order:
        taken.append(unit)
        budget -= int(bounds[unit + 1] - bounds[unit])
        if budget <= 0:
            break
    return taken


def _anywhere(units: int, masking: Masking, generator: np.random.Generator):
    """Yields every unit once: spans of drawn lengths at uniformly drawn places."""
    order = generator.permutation(units + masking.max_gram - 1) - (masking.max_gram - 1)
    if masking.max_gram == 1:
        yield from order.tolist()
        return
    seen = np.zeros(units, bool)
    lengths = 1 + generator.choice(masking.max_gram, len(order), p=_weights(masking.max_gram))
    # Spans may begin before the first unit, of which only the rest counts: else the first units were rarer than others.
    for start, length in zip(order.tolist(), lengths.tolist()):
        for unit in range(max(start, 0), min(start + length, units)):
            if not seen[unit]:
                seen[unit] = True
                yield unit


def _from_the_left(units: int, masking: Masking, generator: np.random.Generator) -> list[int]:
    """Returns the units that Microsoft's walk marks, from left to right; see the module."""
    per_unit, offset, marked = math.floor(1 / masking.rate), 0, []
    # Every step goes on by one unit at least.
    lengths = 1 + generator.choice(masking.max_gram, units, p=_weights(masking.max_gram))
    for length, draw in zip(lengths.tolist(), generator.random(units).tolist()):
        window = min(length * per_unit, units - offset)
        start = offset + int(draw * window)
        end = min(start + length, units)
        marked += range(start, end)
        offset = max(offset + window, end)
        if offset >= units:
            break
    return marked


def _weights(max_gram: int) -> np.ndarray:
    weights = 1 / np.arange(1, max_gram + 1)
    return weights / weights.sum()


def hidden(
    ids: np.ndarray, places: np.ndarray, masking: Masking, vocabulary: Vocabulary, generator: np.random.Generator
) -> np.ndarray:
    """Returns ids (T,) with those at ``places`` (M,) replaced: by [MASK], by themselves, or by any token.

    Each token is drawn on its own. Any token means any id of the vocabulary, special ones among them, as in Microsoft's
    code.
    """
    hidden_ids, drawn = ids.copy(), generator.random(len(places))
    anything = generator.integers(vocabulary.size, size=len(places))
    replaced = np.where(drawn < masking.mask + masking.keep, ids[places], anything)
    hidden_ids[places] = np.where(drawn < masking.mask, vocabulary.mask_id, replaced)
    return hidden_ids
