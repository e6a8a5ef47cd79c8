"""Ids and texts of the four tokenizers, against sentencepiece and tokenizers themselves."""

import re
import string
import unicodedata

import hypothesis
import hypothesis.strategies
import pytest
import tokenizers
from tokenizer_files import (
    SPECIALS,
    byte_level,
    byte_level_files,
    processor,
    sentences,
    spm_model,
    texts,
    texts_with_specials,
)

from deberta_fast.tokenization import DebertaTokenizer, DebertaTokenizerFast, DebertaV2Tokenizer, DebertaV2TokenizerFast

pytestmark = pytest.mark.filterwarnings("ignore:.*pieces for single bytes")
FUZZ = hypothesis.settings(max_examples=300, deadline=None)
SPLIT = re.compile("|".join(map(re.escape, SPECIALS)))


def make(kind, **options):
    if kind.__name__.startswith("DebertaV2"):
        return kind(spm_model(options.pop("model", "english")), **options)
    return kind(*byte_level_files(), **options)


ALL = [DebertaV2Tokenizer, DebertaV2TokenizerFast, DebertaTokenizer, DebertaTokenizerFast]
SLOW, FAST = ALL[::2], ALL[1::2]


def around_specials(text, ids, encode):
    """Ids of a text in which special tokens stand: those of the parts between them, and theirs."""
    result, end = [], 0
    for match in [*SPLIT.finditer(text), None]:
        part = text[end : match.start() if match else None]
        result += encode(part, match.group() if match else None) if part else []
        if match:
            result.append(ids[match.group()])
            end = match.end()
    return [1, *result, 2]


def wrong(tokenizer, chosen, expected):
    """Texts with other ids than expected, as one batch and alone."""
    rows = tokenizer(list(chosen))
    assert list(rows) == ["input_ids", "token_type_ids", "attention_mask"]
    assert rows["token_type_ids"] == [[0] * len(row) for row in rows["input_ids"]]
    assert rows["attention_mask"] == [[1] * len(row) for row in rows["input_ids"]]
    for text, row in list(zip(chosen, rows["input_ids"]))[::11]:
        assert tokenizer(text)["input_ids"] == tokenizer.encode(text) == row
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == row[1:-1]
    return [(text, row) for text, row in zip(chosen, rows["input_ids"]) if row != expected(text)]


@pytest.mark.parametrize("model", ["english", "world", "bytes", "bpe"])
def test_v2_slow(model):
    """sentencepiece's ids."""
    spm, tokenizer = processor(model), make(DebertaV2Tokenizer, model=model)
    assert wrong(tokenizer, texts(), lambda text: [1, *spm.encode(text), 2]) == []
    ids = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "[MASK]": len(spm)}
    expected = lambda text: around_specials(text, ids, lambda part, _: spm.encode(part))
    assert wrong(tokenizer, texts_with_specials(), expected) == []


def split_by_punctuation(text):
    mark = lambda c: c in string.punctuation or unicodedata.category(c).startswith("P")
    return re.findall(r"\x00.|[^\x00]+", "".join(f"\0{c}" if mark(c) else c for c in text), re.DOTALL)


def test_v2_slow_options():
    spm, chosen = processor(), [text for text in texts() if "\0" not in text]
    lower = make(DebertaV2Tokenizer, do_lower_case=True)
    # The sigma at the end of a word may be either.
    no_sigma = [text for text in chosen if "Σ" not in text]
    assert wrong(lower, no_sigma, lambda text: [1, *spm.encode(text.lower()), 2]) == []
    assert lower("THE [MASK] Class")["input_ids"] == [1, *spm.encode("the "), len(spm), *spm.encode(" class"), 2]

    marks = make(DebertaV2Tokenizer, split_by_punct=True)
    pieces = lambda text: [piece.removeprefix("\0") for piece in split_by_punctuation(text)]
    assert pieces("a.b") == ["a", ".", "b"]
    assert wrong(marks, chosen, lambda text: [1, *(i for piece in pieces(text) for i in spm.encode(piece)), 2]) == []


V2_OPTIONS = dict(plain={}, world=dict(model="world"), bytes=dict(model="bytes"))
V2_OPTIONS |= dict(lower=dict(do_lower_case=True), punctuation=dict(split_by_punct=True))


@pytest.mark.parametrize("options", V2_OPTIONS.values(), ids=V2_OPTIONS)
def test_v2_fast(options):
    tokenizer = make(DebertaV2TokenizerFast, **options)
    backend = make(DebertaV2TokenizerFast, **options).backend_tokenizer
    assert wrong(tokenizer, texts() + texts_with_specials(), lambda text: backend.encode(text).ids) == []
    if not options:
        chosen = [text for text in sentences() if not set("▁<@") & set(text)]
        assert len(chosen) > 200
        assert wrong(tokenizer, chosen, lambda text: [1, *processor().encode(text), 2]) == []


def byte_level_ids(text, before):
    """``before``: the special token that follows. [MASK] takes the spaces before it."""
    vocab, merges = byte_level()
    text = text.rstrip() if before == "[MASK]" else text
    return tokenizers.ByteLevelBPETokenizer(vocab, merges).encode(text).ids


@pytest.mark.parametrize("kind", [DebertaTokenizer, DebertaTokenizerFast])
def test_v1(kind):
    vocab, merges = byte_level()
    oracle = tokenizers.ByteLevelBPETokenizer(vocab, merges)
    tokenizer = make(kind)
    assert wrong(tokenizer, texts(), lambda text: [1, *oracle.encode(text).ids, 2]) == []
    expected = lambda text: around_specials(text, vocab, byte_level_ids)
    assert wrong(tokenizer, texts_with_specials()[::3], expected) == []

    prefix = make(kind, add_prefix_space=True)
    # tokenizers leaves the space out before spaces, Python before all white space.
    spaced = (lambda text: text[:1].isspace()) if kind is DebertaTokenizer else (lambda text: text[:1] == " ")
    expected = lambda text: [1, *oracle.encode(text if not text or spaced(text) else " " + text).ids, 2]
    assert wrong(prefix, texts(), expected) == []


def test_v1_fast_is_its_backend():
    backend = make(DebertaTokenizerFast).backend_tokenizer
    for text in texts_with_specials():
        assert make_once(DebertaTokenizerFast)(text)["input_ids"] == backend.encode(text).ids


_made = {}


def make_once(kind):
    if kind not in _made:
        _made[kind] = make(kind)
    return _made[kind]


@pytest.mark.parametrize("kind", ALL)
def test_special_ids(kind):
    tokenizer = make(kind)
    size = len(processor()) if "V2" in kind.__name__ else len(byte_level()[0])
    mask = size if "V2" in kind.__name__ else size - 1
    ids = [getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "unk", "mask", "bos", "eos")]
    assert ids == [0, 1, 2, 3, mask, 1, 2]
    assert set(tokenizer.all_special_tokens) == set(SPECIALS) and len(tokenizer.all_special_tokens) == 5
    assert (tokenizer.vocab_size, len(tokenizer)) == (size, mask + 1)
    assert sorted(tokenizer.get_vocab().values()) == list(range(mask + 1))
    assert tokenizer.convert_ids_to_tokens(mask) == "[MASK]" == tokenizer.mask_token
    assert tokenizer.convert_tokens_to_ids(["[CLS]", "no such piece"]) == [1, 3]
    assert tokenizer.is_fast == (kind in FAST)
    assert tokenizer.model_max_length > 1e20


@pytest.mark.parametrize("kind", ALL)
def test_pairs(kind):
    tokenizer = make(kind)
    first, second = tokenizer("the class", add_special_tokens=False)["input_ids"], tokenizer.encode("of str")[1:-1]
    row = tokenizer("the class", "of str")
    assert row["input_ids"] == [1, *first, 2, *second, 2]
    assert row["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert row["attention_mask"] == [1] * len(row["input_ids"])
    rows = tokenizer([("the class", "of str"), ("of str", "the class")])
    assert rows["input_ids"] == [row["input_ids"], [1, *second, 2, *first, 2]]
    assert rows == tokenizer(["the class", "of str"], ["of str", "the class"])
    assert tokenizer("the class", "of str", add_special_tokens=False)["input_ids"] == first + second


def test_mask_takes_its_space():
    for kind in (DebertaTokenizer, DebertaTokenizerFast):
        ids = make(kind)("the  [MASK] of")["input_ids"]
        assert ids == [1, *byte_level_ids("the", None), make(kind).mask_token_id, *byte_level_ids(" of", None), 2]


@pytest.mark.parametrize("kind", ALL)
def test_decode(kind):
    tokenizer = make(kind)
    between = " " if "V2" in kind.__name__ else ""
    for text in sentences()[:60]:
        ids = tokenizer(text)["input_ids"]
        if 3 not in ids:
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert tokenizer.decode(ids) == f"[CLS]{between}{text}[SEP]"
    rows = tokenizer(["the class", "of"], padding=True)["input_ids"]
    assert tokenizer.batch_decode(rows, skip_special_tokens=True) == ["the class", "of"]
    if "V2" not in kind.__name__:  # bytes: nothing is lost
        for text in texts():
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    ids = tokenizer("it is n't so , yes .", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=True) == "it isn't so, yes."


@pytest.mark.parametrize("kind", ALL)
def test_a_megabyte(kind):
    part, tokenizer = "the class of str [MASK] ", make(kind)
    ids, four, three = [tokenizer(part * n)["input_ids"] for n in (45000, 4, 3)]
    round = len(four) - len(three)
    assert len(ids) == len(four) + (45000 - 4) * round
    assert ids[: 2 * round] == four[: 2 * round] and ids[-round:] == four[-round:]
    assert ids[round : -round - 3] == ids[2 * round : -3]
    word = "x" * 10**6
    assert tokenizer.decode(tokenizer(word, add_special_tokens=False)["input_ids"]) == word


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "[MASK]\udc00"])
def test_lone_surrogates(kind, text):
    for call in (make_once(kind), make_once(kind).tokenize, lambda text: make_once(kind)(["a", text])):
        with pytest.raises((ValueError, TypeError)):
            call(text)


@FUZZ
@hypothesis.given(hypothesis.strategies.text())
def test_fuzz_v2(text):
    hypothesis.assume(not SPLIT.search(text))
    for model in ("english", "bytes"):
        if model not in _made:
            _made[model] = make(DebertaV2Tokenizer, model=model)
        assert _made[model](text)["input_ids"] == [1, *processor(model).encode(text), 2]
    fast = make_once(DebertaV2TokenizerFast)(text, return_offsets_mapping=True)
    assert all(0 <= start <= end <= len(text) for start, end in fast["offset_mapping"])
    if "backend" not in _made:
        _made["backend"] = make(DebertaV2TokenizerFast).backend_tokenizer
    assert fast["input_ids"] == _made["backend"].encode(text).ids


@FUZZ
@hypothesis.given(hypothesis.strategies.text())
def test_fuzz_v1(text):
    hypothesis.assume(not SPLIT.search(text))
    rows = [make_once(kind)(text, add_special_tokens=False)["input_ids"] for kind in ALL[2:]]
    assert rows[0] == rows[1]
    assert all(make_once(kind).decode(rows[0]) == text for kind in ALL[2:])


PARTS = hypothesis.strategies.sampled_from([*SPECIALS, " ", "a", "the", "▁", "\n", "é"])


@FUZZ
@hypothesis.given(hypothesis.strategies.lists(PARTS))
def test_fuzz_specials(parts):
    text = "".join(parts)
    spm = processor()
    ids = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "[MASK]": len(spm)}
    assert make_once(DebertaV2Tokenizer)(text)["input_ids"] == around_specials(
        text, ids, lambda part, _: spm.encode(part)
    )
    rows = [make_once(kind)(text)["input_ids"] for kind in ALL[2:]]
    assert rows[0] == rows[1]
