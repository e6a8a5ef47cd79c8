"""Vocabularies, added tokens, padding of what is there, sampling and positions, beside transformers 4."""

import copy
import pickle

import pytest
from hf_tokenizers import CASES, NAMES, assert_same, pair
from test_hf_tokenization import both  # noqa: F401
from tokenizer_files import sentences, texts_with_specials
from tokenizers import AddedToken

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ATTRIBUTES = [
    *["vocab_size", "model_max_length", "padding_side", "truncation_side", "model_input_names", "is_fast"],
    *["max_len_single_sentence", "max_len_sentences_pair", "all_special_tokens", "all_special_ids"],
    *["special_tokens_map", "additional_special_tokens", "additional_special_tokens_ids", "pad_token_type_id"],
    *[f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")],
    *[f"{name}_token_id" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")],
    *["added_tokens_encoder", "clean_up_tokenization_spaces", "split_special_tokens"],
]


def flags(token):
    """Returns the flags of an added token, ours or theirs."""
    return str(token), token.lstrip, token.rstrip, token.single_word, token.normalized, token.special


def test_attributes(both):  # noqa: F811
    for name in ATTRIBUTES:
        assert_same(both, lambda x, name=name: getattr(x, name), name)
    assert_same(both, len)
    assert_same(both, lambda x: x.get_vocab())
    assert_same(both, lambda x: x.get_added_vocab())
    assert_same(both, lambda x: {str(i): flags(token) for i, token in x.added_tokens_decoder.items()})


TOKENS = [
    ["<new>"],
    ["the", "zzzzq"],
    [AddedToken("<l>", lstrip=True), AddedToken("<r>", rstrip=True), AddedToken("<w>", single_word=True)],
    [AddedToken("raw", normalized=False), AddedToken("Norm", normalized=True)],
    [AddedToken("<both>", lstrip=True, rstrip=True, special=True)],
    [" lead", "two words", "<new>", "<new>"],
    [],
    "alone",
]
ADDED_TEXTS = [
    *[
        "a <new> b",
        "<new><new>",
        "the zzzzq there",
        "x<l>y x <l> y",
        "x<r>y x <r> y",
        "<w> x<w> <w>y",
        "RawRaw raw Raw",
    ],
    *["Norm norm NORM", "a <both> b  <both>", "x lead two words", "alone aloneb", "", "<a> <b>", "[MASK] <new> [MASK]"],
]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    "name, option",
    [(name, {}) for name in NAMES] + [(NAMES[0], dict(do_lower_case=True)), (NAMES[1], dict(do_lower_case=True))],
)
def test_added_tokens(name, option, special):
    for tokens in TOKENS:
        both = pair(name, **option)  # noqa: F811
        assert_same(both, lambda x: x.add_tokens(copy.deepcopy(tokens), special_tokens=special), tokens)  # noqa: B023
        assert_same(both, len, tokens)
        assert_same(both, lambda x: x.get_added_vocab(), tokens)
        assert_same(both, lambda x: {str(i): flags(token) for i, token in x.added_tokens_decoder.items()}, tokens)
        for text in ADDED_TEXTS:
            assert_same(both, lambda x: x(text), (tokens, text))  # noqa: B023
            for skip in (False, True):
                assert_same(both, lambda x: x.decode(x(text)["input_ids"], skip_special_tokens=skip), (tokens, text))  # noqa: B023


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens(name):
    for changes in [
        dict(additional_special_tokens=["<x>", "<y>"]),
        dict(additional_special_tokens=[AddedToken("<x>", lstrip=True)]),
        dict(pad_token="<pad>", bos_token="<s>"),
        dict(mask_token="the"),
        dict(mask_token=AddedToken("<m>", lstrip=True)),
        dict(nonsense="<x>"),
        dict(pad_token=3),
    ]:
        both = pair(name)  # noqa: F811
        assert_same(both, lambda x: x.add_special_tokens(changes), changes)  # noqa: B023
        for attribute in (*ATTRIBUTES, "special_tokens_map"):
            assert_same(both, lambda x: getattr(x, attribute), (changes, attribute))  # noqa: B023
        assert_same(both, lambda x: x.add_special_tokens(dict(additional_special_tokens=["<z>"])))
        assert_same(both, lambda x: x.additional_special_tokens)
        for text in ("a <x> b<y> <z>", "<s> the <pad> <m> the", "[MASK] [PAD] a"):
            assert_same(both, lambda x: x(text), (changes, text))  # noqa: B023
            assert_same(both, lambda x: x.decode(x(text)["input_ids"], skip_special_tokens=True), (changes, text))  # noqa: B023


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_set(name):
    both = pair(name)  # noqa: F811
    for tokenizer in both:
        tokenizer.pad_token = "the" if name.startswith("DebertaT") else "▁the"
        tokenizer.cls_token_id = 2
        tokenizer.padding_side = "left"
        tokenizer.model_max_length = 9
        tokenizer.bos_token = None
    for attribute in ATTRIBUTES:
        assert_same(both, lambda x: getattr(x, attribute), attribute)  # noqa: B023
    assert_same(both, lambda x: x.build_inputs_with_special_tokens([5, 6]))
    assert_same(both, lambda x: x(["a", "a class of strings that is long"], padding=True, truncation=True))


@pytest.mark.parametrize("name", NAMES)
def test_pad(name):
    both = pair(name)  # noqa: F811
    rows = [[1, 5, 6, 2], [1, 7, 2], [1, 2]]
    types = [[0] * len(row) for row in rows]
    inputs = [
        {"input_ids": rows},
        {"input_ids": rows, "token_type_ids": types, "attention_mask": [[1] * len(row) for row in rows]},
        {"input_ids": rows, "special_tokens_mask": types, "extra": [1, 2, 3]},
        [{"input_ids": row, "token_type_ids": [0] * len(row)} for row in rows],
        {"input_ids": rows[0]},
        {"token_type_ids": types},
        [],
        rows,
    ]
    for given in inputs:
        for options in [
            {},
            dict(padding="max_length", max_length=6),
            dict(padding="max_length", max_length=3),
            dict(padding=False),
            dict(pad_to_multiple_of=8),
            dict(return_attention_mask=False),
            dict(return_tensors="pt"),
            dict(padding_side="left"),
            dict(padding="max_length", max_length=5, pad_to_multiple_of=4, return_tensors="np"),
        ]:
            assert_same(both, lambda x: x.pad(copy.deepcopy(given), **options), (given, options))  # noqa: B023
    for tokenizer in both:
        tokenizer.pad_token = None
    assert_same(both, lambda x: x.pad({"input_ids": rows}))
    assert_same(both, lambda x: x(["a", "the class"], padding=True))


def test_positions(both):  # noqa: F811
    if not both[0].is_fast:
        assert_same(both, lambda x: x("a").word_ids())
        assert_same(both, lambda x: x("a", return_offsets_mapping=True))
        return
    text, second = " the ﬁrst class, 日本 [MASK]", "a string"
    own, other = [x([text, second], [second, text]) for x in both]
    for call in [
        lambda x: x.tokens(0),
        lambda x: x.word_ids(1),
        lambda x: x.sequence_ids(0),
        lambda x: [x.token_to_chars(0, i) for i in range(len(x["input_ids"][0]))],
        lambda x: [x.token_to_word(i) for i in range(len(x["input_ids"][0]))],
        lambda x: [x.token_to_sequence(1, i) for i in range(len(x["input_ids"][1]))],
        lambda x: [x.char_to_token(0, i) for i in range(len(text))],
        lambda x: [x.char_to_token(1, i, 1) for i in range(len(text))],
        lambda x: [x.char_to_word(0, i) for i in range(len(text))],
        lambda x: x.char_to_token(0, 10**6),
        lambda x: [x.word_to_tokens(0, i) for i in range(5)],
        lambda x: [x.word_to_tokens(0, i, sequence_index=1) for i in range(3)],
        lambda x: [x.word_to_chars(0, i) for i in range(3)],
        lambda x: [x.word_to_chars(0, i, 1) for i in range(2)],
        lambda x: x.n_sequences,
        lambda x: len(x.encodings),
        lambda x: [x[i].ids for i in (0, 1)],
        lambda x: x.input_ids,
        lambda x: x.nothing,
        lambda x: x["nothing"],
        lambda x: list(x.items()),
        lambda x: x.tokens(5),
        lambda x: x.convert_to_tensors("pt"),
    ]:
        assert_same((own, other), call)


@pytest.mark.parametrize(
    "kwargs", [dict(nbest_size=-1, alpha=0.2), dict(nbest_size=4, alpha=0.1), dict(alpha=0.3, nbest_size=-1)]
)
def test_sampling(kwargs):
    import sentencepiece

    both = pair(NAMES[0], sp_model_kwargs=dict(enable_sampling=True, **kwargs))  # noqa: F811
    rows = []
    for tokenizer in both:
        sentencepiece.set_random_generator_seed(11)
        rows.append([tokenizer(text)["input_ids"] for text in sentences()[:40]])
    assert rows[0] == rows[1] and rows[0] != [pair(NAMES[0])[0](text)["input_ids"] for text in sentences()[:40]]


@pytest.mark.parametrize("name, kind, option", CASES[::3])
def test_copies(name, kind, option):
    own, other = pair(name, kind)
    own.add_tokens(["<new>"])
    other.add_tokens(["<new>"])
    for copied in (pickle.loads(pickle.dumps(own)), copy.deepcopy(own)):
        for text in [*texts_with_specials()[::20], "a <new> b"]:
            assert_same((copied, other), lambda x: x(text))  # noqa: B023
        assert_same((copied, other), len)
        assert_same((copied, other), lambda x: x.get_vocab())
