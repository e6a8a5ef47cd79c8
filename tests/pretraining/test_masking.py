"""Which tokens are masked, how many, where, and by what."""

import numpy as np
import pytest
from tokenizer_files import spm_folder

from deberta_fast import DebertaV2Tokenizer
from deberta_fast.pretraining.masking import Masking, Vocabulary, _starts_word, chosen, hidden

SPECIAL = (0, 1, 2, 3, 999)


class Words(Vocabulary):
    """1,000 ids, of which those that 3 divides, the special ones included, continue no word."""

    def __init__(self):
        self.size, self.mask_id = 1000, 999
        self.special = np.isin(np.arange(1000), SPECIAL)
        self.starts_word = (np.arange(1000) % 3 == 0) | self.special


VOCABULARY = Words()
RULES = {
    "even": Masking(),
    "even-words": Masking(whole_words=True),
    "even-grams": Masking(max_gram=3),
    "even-words-grams": Masking(whole_words=True, max_gram=3),
    "ms": Masking(rule="ms"),
    "ms-words-grams": Masking(rule="ms", whole_words=True, max_gram=3),
}


def text(generator, length=512):
    ids = generator.integers(4, 999, length)
    ids[0], ids[-1] = 1, 2
    return ids


def rates(masking, texts=700, length=512):
    """How often each place of a text is masked."""
    generator, counts = np.random.default_rng(0), np.zeros(length)
    for _ in range(texts):
        counts[chosen(text(generator, length), np.array([length]), masking, VOCABULARY, generator)] += 1
    return counts / texts


@pytest.mark.parametrize("name", RULES)
def test_budget_and_special_tokens(name):
    masking, generator = RULES[name], np.random.default_rng(1)
    for length in (3, 9, 60, 512):
        ids = text(generator, length)
        ids[length // 2] = 999
        for _ in range(20):
            places = chosen(ids, np.array([length]), masking, VOCABULARY, generator)
            assert (np.diff(places) > 0).all() and not VOCABULARY.special[ids[places]].any()
            budget = max(1, round(0.15 * length))
            longest = 60 if masking.whole_words else 1  # the last word may exceed the budget
            assert len(places) < budget + longest
            assert name.startswith("ms") or len(places) >= min(budget, (~VOCABULARY.special[ids]).sum())
            if not masking.whole_words and name.startswith("even"):
                assert len(places) == min(budget, (~VOCABULARY.special[ids]).sum())


def test_most_predictions():
    generator = np.random.default_rng(0)
    for name, masking in RULES.items():
        few = Masking(**{**vars(masking), "max_predictions": 5, "whole_words": False})
        places = chosen(text(generator), np.array([512]), few, VOCABULARY, generator)
        assert len(places) == 5, name


@pytest.mark.parametrize("name", ["even", "even-words", "even-grams", "even-words-grams"])
def test_even_rule_masks_every_part_alike(name):
    """Each mean of 48 or more places has a standard error of 0.0016 or less, words and spans a multiple of it."""
    found = rates(RULES[name])
    parts = {"first": found[1:49], "middle": found[49:463], "last": found[463:511]}
    for part, values in parts.items():
        assert abs(values.mean() - 0.151) < 0.012, (part, values.mean())


def test_microsofts_rule_masks_the_end_less():
    """Microsoft's code masks 16.7 % of the first seven eighths, 3.9 % of the rest, and none of the last 16 tokens."""
    found = rates(Masking(rule="ms", max_predictions=80))
    assert abs(found[1:448].mean() - 0.1666) < 0.003 and abs(found[448:511].mean() - 0.039) < 0.006
    assert found[495:511].max() == 0.0
    grams = rates(Masking(rule="ms", max_predictions=80, max_gram=3, whole_words=True))
    assert 0.05 < grams[448:511].mean() < 0.1 and grams[1:448].mean() > 0.155


def test_words_are_masked_whole():
    generator = np.random.default_rng(2)
    for name in ("even-words", "even-words-grams", "ms-words-grams"):
        ids = text(generator)
        places = set(chosen(ids, np.array([512]), RULES[name], VOCABULARY, generator).tolist())
        for place in range(2, 511):
            if not VOCABULARY.starts_word[ids[place]]:
                assert (place in places) == (place - 1 in places) or ids[place - 1] in SPECIAL


def test_spans_have_lengths_in_proportion_to_1_over_n():
    """At a low rate spans seldom meet: the runs' lengths are those drawn, 6/11, 3/11 and 2/11."""
    generator, runs = np.random.default_rng(3), []
    for _ in range(1500):
        places = chosen(text(generator), np.array([512]), Masking(rate=0.01, max_gram=3), VOCABULARY, generator)
        cut = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        runs += [len(run) for run in cut[:-1] or cut]
    shares = [runs.count(n) / len(runs) for n in (1, 2, 3)]
    assert shares[0] > shares[1] > shares[2] and shares[2] > 0.08 and shares[0] < 0.68


def test_sequences_of_a_row_have_their_own_budgets():
    generator = np.random.default_rng(4)
    ids = np.concatenate([text(generator, 40), text(generator, 100)])
    places = chosen(ids, np.array([40, 140]), Masking(), VOCABULARY, generator)
    assert (places < 40).sum() == 6 and (places >= 40).sum() == 15


def test_what_masked_tokens_become():
    generator = np.random.default_rng(5)
    ids = generator.integers(4, 999, 60_000)
    places = np.arange(0, 60_000, 2)
    new = hidden(ids, places, Masking(), VOCABULARY, generator)
    assert (new[1::2] == ids[1::2]).all()
    masks, kept = (new[places] == 999).mean(), (new[places] == ids[places]).mean()
    assert abs(masks - 0.8) < 0.01 and abs(kept - 0.1) < 0.01
    others = new[places][(new[places] != 999) & (new[places] != ids[places])]
    assert len(np.unique(others)) > 900 and (others < 4).any()  # any id, special ones too
    assert (hidden(ids, places, Masking(mask=1.0, keep=0.0), VOCABULARY, generator)[places] == 999).all()


def test_vocabulary_of_a_tokenizer():
    tokenizer = DebertaV2Tokenizer.from_pretrained(spm_folder())
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.size == len(tokenizer) and vocabulary.mask_id == tokenizer.mask_token_id
    special = {getattr(tokenizer, f"{x}_token_id") for x in ("cls", "sep", "pad", "unk", "mask")}
    assert set(np.flatnonzero(vocabulary.special).tolist()) == special
    ids = tokenizer("internationalisation, of things", add_special_tokens=False)["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert vocabulary.starts_word[ids].tolist() == [x.startswith("▁") or x == "," for x in pieces]
    assert not _starts_word("e") and _starts_word("$") and _starts_word("Ġhe") and _starts_word("。")


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(rule="odd"), "masking.rule must be one of even, ms, got 'odd'"),
        (dict(rate=0.0), "masking.rate must be above 0"),
        (dict(max_gram=0), "masking.max_gram must be a whole number from 1 on, got 0"),
        (dict(mask=0.8, keep=0.3), "a sum of at most 1, got 0.8 and 0.3"),
    ],
)
def test_errors(values, message):
    with pytest.raises(ValueError, match=message):
        Masking(**values)


def test_nothing_to_mask():
    ids = np.array([1, 2])
    generator = np.random.default_rng(0)
    places = chosen(ids, np.array([2]), Masking(), VOCABULARY, generator)
    assert len(places) == 0 and (hidden(ids, places, Masking(), VOCABULARY, generator) == ids).all()
