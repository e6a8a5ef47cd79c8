"""Padding, truncation, words, positions and the refusal of what cannot be done."""

import itertools

import numpy
import pytest
import torch
from test_tokenization import ALL, FAST, SLOW, make
from tokenizer_files import sentences

from deberta_fast.tokenization import BatchEncoding, DebertaTokenizer, DebertaTokenizerFast, DebertaV2Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LINES = [sentences()[i] for i in (0, 2, 5)]
SHORT = ["a", "the class", "of str and the list"]
every = pytest.mark.parametrize("kind", ALL)


def plain_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@every
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(kind, side):
    tokenizer = make(kind, padding_side=side)
    rows = [tokenizer.encode(text) for text in SHORT]
    longest = max(map(len, rows))
    for options, length in [
        (dict(padding=True), longest),
        (dict(padding="longest"), longest),
        (dict(padding="max_length", max_length=30), 30),
        (dict(padding="max_length", max_length=longest), longest),
        (dict(padding=True, pad_to_multiple_of=16), 16),
        (dict(padding="max_length", max_length=17, pad_to_multiple_of=8), 24),
    ]:
        padded = tokenizer(SHORT, **options)
        again = tokenizer.pad(tokenizer(SHORT), **options)
        for name, fill in (("input_ids", 0), ("token_type_ids", 0), ("attention_mask", 0)):
            for row, i in zip(rows, itertools.count()):
                value = row if name == "input_ids" else [int(name == "attention_mask")] * len(row)
                more = [fill] * (length - len(row))
                assert padded[name][i] == (value + more if side == "right" else more + value)
            assert again[name] == padded[name]
    other = {"right": "left", "left": "right"}[side]
    assert tokenizer(SHORT, padding=True, padding_side=other) == make(kind, padding_side=other)(SHORT, padding=True)
    assert tokenizer(SHORT, padding=False)["input_ids"] == tokenizer(SHORT)["input_ids"] == rows
    mask = tokenizer(SHORT[0], padding="max_length", max_length=5, return_special_tokens_mask=True)
    assert sum(mask["special_tokens_mask"]) == 4 and len(mask["special_tokens_mask"]) == 5


def cut(ids, length, side):
    return ids[:length] if side == "right" else ids[len(ids) - length :]


@every
@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation(kind, side):
    tokenizer = make(kind, truncation_side=side)
    ids = [plain_ids(tokenizer, line) for line in LINES]
    for options in (dict(truncation=True), dict(truncation="longest_first"), dict(truncation="only_first"), {}):
        for max_length in (3, 8, 12):
            rows = tokenizer(LINES, max_length=max_length, **options)["input_ids"]
            assert rows == [[1, *cut(row, max_length - 2, side), 2] for row in ids]
    assert tokenizer(LINES, truncation=False, max_length=3) == tokenizer(LINES)
    assert tokenizer(LINES, truncation="do_not_truncate", max_length=3) == tokenizer(LINES)
    assert tokenizer(LINES, truncation=True, max_length=1000) == tokenizer(LINES)
    rows = tokenizer(LINES, truncation=True, max_length=5, add_special_tokens=False)["input_ids"]
    assert rows == [cut(row, 5, side) for row in ids]
    tokenizer.model_max_length = 6
    assert tokenizer(LINES, truncation=True)["input_ids"] == [[1, *cut(row, 4, side), 2] for row in ids]
    assert len(tokenizer(LINES[0])["input_ids"]) > 6


@every
@pytest.mark.parametrize("side", ["right", "left"])
def test_truncated_pairs(kind, side):
    tokenizer = make(kind, truncation_side=side)
    first, second = plain_ids(tokenizer, LINES[0]), plain_ids(tokenizer, LINES[1])
    pair = lambda a, b: [1, *cut(first, a, side), 2, *cut(second, b, side), 2]
    total = len(first) + len(second)
    rows = tokenizer(LINES[0], LINES[1], truncation="only_first", max_length=len(second) + 7)
    assert rows["input_ids"] == pair(4, len(second))
    assert rows["token_type_ids"] == [0] * 6 + [1] * (len(second) + 1)
    rows = tokenizer(LINES[0], LINES[1], truncation="only_second", max_length=len(first) + 7)
    assert rows["input_ids"] == pair(len(first), 4)
    for length in (total + 2, total, 40, 13, 12, 5):
        room = length - 3
        small, large = sorted((len(first), len(second)))
        # The longer text shrinks to the shorter one's length, then both.
        least = min(small, room // 2)
        sizes = {small: least, large: room - least}
        rows = tokenizer(LINES[0], LINES[1], truncation=True, max_length=length)["input_ids"]
        assert len(rows) == length
        if abs(sizes[small] - sizes[large]) > 1:
            assert rows == pair(sizes[len(first)], sizes[len(second)])
        else:  # the odd one goes to either
            assert rows in (pair(room // 2, room - room // 2), pair(room - room // 2, room // 2))


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("stride", [0, 2])
def test_overflow_fast(kind, stride):
    tokenizer = make(kind)
    ids = [plain_ids(tokenizer, line) for line in LINES]
    options = dict(truncation=True, max_length=9, stride=stride, return_overflowing_tokens=True)
    rows = tokenizer(LINES, **options, return_offsets_mapping=True, return_length=True)
    expected, samples = [], []
    for sample, row in enumerate(ids):
        start = 0
        while True:
            expected.append([1, *row[start : start + 7], 2])
            samples.append(sample)
            if start + 7 >= len(row):
                break
            start += 7 - stride
    assert rows["input_ids"] == expected and rows["overflow_to_sample_mapping"] == samples
    assert rows["length"] == [len(row) for row in expected]
    assert all(len(row) == len(expected[i]) for i, row in enumerate(rows["offset_mapping"]))
    padded = tokenizer(LINES, **options, padding="max_length", return_tensors="pt")
    assert padded["input_ids"].shape == (len(expected), 9)
    # Only one text of a pair may overflow in windows.
    pairs = tokenizer(LINES[0], LINES[1], **options | dict(truncation="only_second", max_length=len(ids[0]) + 8))
    assert all(row[: len(ids[0]) + 2] == [1, *ids[0], 2] for row in pairs["input_ids"])


@pytest.mark.parametrize("kind", SLOW)
def test_overflow_slow(kind):
    tokenizer = make(kind)
    ids = plain_ids(tokenizer, LINES[0])
    row = tokenizer(LINES[0], truncation=True, max_length=9, stride=2, return_overflowing_tokens=True)
    assert row["input_ids"] == [1, *ids[:7], 2]
    assert row["overflowing_tokens"] == ids[5:] and row["num_truncated_tokens"] == len(ids) - 7


@every
def test_words(kind):
    if kind is DebertaTokenizerFast:
        with pytest.raises((ValueError, AssertionError), match="add_prefix_space"):
            make(kind)(["a", "b"], is_split_into_words=True)
    options = dict(add_prefix_space=True) if kind in (DebertaTokenizer, DebertaTokenizerFast) else {}
    tokenizer = make(kind, **options)
    words = LINES[0].split()
    expected = [i for word in words for i in plain_ids(tokenizer, " " + word)]
    row = tokenizer(words, is_split_into_words=True)
    assert row["input_ids"] == [1, *expected, 2]
    assert tokenizer([words, ["a"]], is_split_into_words=True)["input_ids"][0] == row["input_ids"]
    pair = tokenizer(words, ["a", "class"], is_split_into_words=True)
    assert pair["input_ids"] == [1, *expected, 2, *plain_ids(tokenizer, "a class"), 2]
    if kind in FAST:
        assert row.word_ids()[1:-1] == sorted(row.word_ids()[1:-1])
        assert set(row.word_ids()) == {None, *range(len(words))}
        for i, word in enumerate(words):
            span = row.word_to_tokens(i)
            assert row["input_ids"][span.start : span.end] == plain_ids(tokenizer, " " + word)


@pytest.mark.parametrize("kind", FAST)
def test_positions(kind):
    tokenizer, text, second = make(kind), "the class of [MASK] strings", "a list"
    row = tokenizer(text, second, return_offsets_mapping=True)
    assert row.is_fast and isinstance(row, BatchEncoding) and row.n_sequences == 2
    assert row.sequence_ids() == [
        None if i in (1, 2) else kind for i, kind in zip(row.input_ids, row["token_type_ids"])
    ]
    for i, (start, end) in enumerate(row["offset_mapping"]):
        source = second if row.sequence_ids()[i] else text
        if row.sequence_ids()[i] is None:
            assert (start, end) == (0, 0)
            continue
        span = row.token_to_chars(i)
        assert (span.start, span.end) == (start, end)
        token = row.tokens()[i].replace("▁", "").replace("Ġ", "")
        assert source[start:end].strip() == token.strip()
        assert row.char_to_token(end - 1, sequence_index=row.sequence_ids()[i]) == i
    assert row.char_to_word(4) == row.token_to_word(row.char_to_token(4))


@pytest.mark.parametrize("kind", SLOW)
def test_no_positions(kind):
    row = make(kind)("a")
    assert not row.is_fast
    with pytest.raises(ValueError, match="fast"):
        row.word_ids()
    with pytest.raises(NotImplementedError, match="fast"):
        make(kind)("a", return_offsets_mapping=True)


@every
def test_special_tokens_mask(kind):
    tokenizer = make(kind)
    row = tokenizer("the [MASK] class", "of", return_special_tokens_mask=True, return_token_type_ids=False)
    count = len(plain_ids(tokenizer, "of"))
    assert row["special_tokens_mask"][0] == 1 and row["special_tokens_mask"][-count - 2 :] == [1, *[0] * count, 1]
    assert "token_type_ids" not in row and "attention_mask" in row
    already = tokenizer.get_special_tokens_mask(row["input_ids"], already_has_special_tokens=True)
    assert already == [int(i in tokenizer.all_special_ids) for i in row["input_ids"]]
    assert tokenizer.build_inputs_with_special_tokens([7], [8, 9]) == [1, 7, 2, 8, 9, 2]
    assert tokenizer.create_token_type_ids_from_sequences([7], [8, 9]) == [0, 0, 0, 1, 1, 1]
    assert (tokenizer.num_special_tokens_to_add(), tokenizer.num_special_tokens_to_add(pair=True)) == (2, 3)


@every
def test_tensors(kind):
    tokenizer = make(kind)
    rows = tokenizer(SHORT, padding=True, return_tensors="pt")
    assert all(value.dtype == torch.int64 and value.shape[0] == 3 for value in rows.values())
    assert rows.input_ids.tolist() == tokenizer(SHORT, padding=True)["input_ids"]
    assert isinstance(rows.to("cpu"), BatchEncoding)
    assert rows.to("meta")["input_ids"].device.type == "meta"
    assert isinstance(tokenizer(SHORT, padding=True, return_tensors="np")["input_ids"], numpy.ndarray)
    assert tokenizer("a", return_tensors="pt")["input_ids"].shape[0] == 1
    assert tokenizer("", return_tensors="pt", add_special_tokens=False)["input_ids"].dtype == torch.int64
    with pytest.raises(ValueError, match="padding=True"):
        tokenizer(SHORT, return_tensors="pt")
    with pytest.raises(ValueError, match="return_tensors"):
        tokenizer(SHORT, padding=True, return_tensors="tf")
    with pytest.raises(ValueError, match="rows|items"):
        tokenizer.pad({"input_ids": [[1, 2], [3]], "token_type_ids": [[0, 0]]})
    padded = tokenizer.pad([{"input_ids": [1, 2], "labels": 1}, {"input_ids": [1], "labels": 0}], return_tensors="pt")
    assert padded["input_ids"].tolist() == [[1, 2], [1, 0]] and padded["labels"].tolist() == [1, 0]


@every
@pytest.mark.parametrize(
    "call, kind_of_error, reason",
    [
        (lambda x: x(None), TypeError, "text"),
        (lambda x: x(3), TypeError, "text"),
        (lambda x: x(b"bytes"), TypeError, "bytes"),
        (lambda x: x(["a", None]), TypeError, "text 1|str"),
        (lambda x: x(["a"], "b"), TypeError, "text_pair"),
        (lambda x: x(["a", "b"], ["c"]), ValueError, "2 texts.*1"),
        (lambda x: x("a", padding="sideways"), ValueError, "padding.*sideways"),
        (lambda x: x("a", truncation="sideways"), ValueError, "truncation.*sideways"),
        (lambda x: x("a", padding_side="top"), ValueError, "padding_side.*top"),
        (lambda x: x("a", nonsense=1), TypeError, "nonsense"),
        (lambda x: x("a b c d", truncation=True, max_length=1), ValueError, "max_length"),
        (lambda x: x("a", max_length=-3, truncation=True), ValueError, "max_length"),
        (lambda x: x("a", "the class of", truncation="only_first", max_length=4), ValueError, "only_first|cannot take"),
        (lambda x: x("a b c d e f", truncation=True, max_length=5, stride=3, return_overflowing_tokens=True), None, ""),
        (lambda x: x("a", pad_to_multiple_of=0, padding=True), ValueError, "pad_to_multiple_of"),
        (lambda x: x.pad({"labels": [1]}), ValueError, "input_ids"),
        (lambda x: x.add_special_tokens({"nonsense": "a"}), ValueError, "nonsense"),
        (lambda x: x.add_tokens([3]), TypeError, "int"),
        (lambda x: x(["a", 3], is_split_into_words=True), (TypeError, ValueError), "words|add_prefix_space"),
    ],
)
def test_refusals(kind, call, kind_of_error, reason):
    tokenizer = make(kind)
    before = tokenizer("the class")
    if kind_of_error is None:
        if kind in FAST:  # a slow one gives the windows of what it cut off only
            with pytest.raises(ValueError, match="stride"):
                call(tokenizer)
    else:
        with pytest.raises(kind_of_error, match=reason):
            call(tokenizer)
    assert tokenizer("the class") == before


def test_ids_without_a_token():
    """A model with more rows than tokens may predict such ids."""
    tokenizer = make(DebertaTokenizer)
    last = len(tokenizer)
    with pytest.raises(ValueError, match=f"there is no token with id {last}"):
        tokenizer.decode([5, last])
    with pytest.raises(ValueError, match="there is no token with id -100"):
        tokenizer.decode([5, -100])


@every
def test_no_padding_token(kind):
    tokenizer = make(kind)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad_token"):
        tokenizer(SHORT, padding=True)


def test_sampling():
    import sentencepiece

    options = dict(enable_sampling=True, nbest_size=-1, alpha=0.1)
    tokenizer = make(DebertaV2Tokenizer, sp_model_kwargs=options)
    rows = []
    for _ in range(2):
        sentencepiece.set_random_generator_seed(7)
        rows.append([tokenizer(line)["input_ids"] for line in LINES])
    assert rows[0] == rows[1] != make(DebertaV2Tokenizer)(LINES)["input_ids"]
    assert [tokenizer.decode(row[1:-1]) for row in rows[0]] == [
        tokenizer.decode(tokenizer.encode(x)[1:-1]) for x in LINES
    ]


@every
def test_added_tokens(kind):
    tokenizer = make(kind)
    size = len(tokenizer)
    assert tokenizer.add_tokens(["<new>"]) == 1 and len(tokenizer) == size + 1
    ids = tokenizer("the<new>class")["input_ids"]
    assert ids.count(size) == 1 and tokenizer.convert_ids_to_tokens(size) == "<new>"
    assert tokenizer.add_special_tokens(dict(additional_special_tokens=["<x>"])) == 1
    assert tokenizer.additional_special_tokens == ["<x>"] and tokenizer.additional_special_tokens_ids == [size + 1]
    row = tokenizer("the <x> class <new>")["input_ids"]
    assert {size, size + 1} < set(row)
    text = tokenizer.decode(row, skip_special_tokens=True)
    assert "<new>" in text and "<x>" not in text


@every
def test_overlapping_added_tokens(kind):
    """The longest counts, whichever came first."""
    for tokens in (["<a", "<a>", "<a><b>"], ["<a><b>", "<a>", "<a"]):
        tokenizer = make(kind)
        tokenizer.add_tokens(tokens)
        assert tokenizer.tokenize("<a><b><a><a")[-3:] == ["<a><b>", "<a>", "<a"]
