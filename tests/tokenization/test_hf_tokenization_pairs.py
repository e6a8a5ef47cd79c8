"""Pairs and [MASK] of a tokenizer.json that transformers 5 saved for DeBERTa v1: as that file has them."""

import json
import warnings

import pytest
from tokenizer_files import byte_level, texts, texts_with_specials

import deberta_fast.tokenization as ours

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 has one [SEP]")
kinds = pytest.mark.parametrize("name", ["DebertaTokenizer", "DebertaTokenizerFast"])
DOUBLED = ["[CLS]:0", "$A:0", "[SEP]:0", "[SEP]:0", "$B:0", "[SEP]:0"]
TEXTS = [*texts()[::20], *texts_with_specials()[::2]]
TEXTS = [text for text in TEXTS if "[UNK]" not in text]


@pytest.fixture
def theirs(tmp_path):
    """Their tokenizer, which lies in a folder too."""
    vocab, merges = byte_level()
    tokenizer = transformers.DebertaTokenizer(vocab=vocab, merges=[*merges])
    tokenizer.save_pretrained(tmp_path / "theirs")
    return tokenizer


@kinds
def test_pairs_of_their_file(name, theirs, tmp_path):
    with pytest.warns(UserWarning, match=r"tokenizer.json: pairs become \[CLS\]:0 \$A:0 \[SEP\]:0 \[SEP\]:0 \$B:0"):
        own = getattr(ours, name).from_pretrained(tmp_path / "theirs")
    assert own.pair_template == DOUBLED
    assert own.num_special_tokens_to_add(pair=True) == theirs.num_special_tokens_to_add(pair=True) == 4
    for first, second in zip(TEXTS, TEXTS[3:]):
        assert dict(own(first, second)) == dict(theirs(first, second)), (first, second)
        assert dict(own(first)) == dict(theirs(first)), first
    pairs = [*zip(TEXTS[:20], TEXTS[5:])]
    options = dict(padding="max_length", truncation=True, max_length=12, return_special_tokens_mask=True)
    assert dict(own(pairs, **options)) == dict(theirs(pairs, **options))
    ids = [own(text, add_special_tokens=False)["input_ids"] for text in ("a b", "c")]
    assert own.build_inputs_with_special_tokens(*ids) == theirs("a b", "c")["input_ids"]
    assert own.create_token_type_ids_from_sequences(*ids) == theirs("a b", "c")["token_type_ids"]
    assert own.get_special_tokens_mask(*ids) == [1, *[0] * len(ids[0]), 1, 1, *[0] * len(ids[1]), 1]
    assert own.tokenize("a b", "c", add_special_tokens=True) == own.convert_ids_to_tokens(
        theirs("a b", "c")["input_ids"]
    )


@kinds
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_once_more(name, theirs, tmp_path):
    """A template that was loaded from their file is saved and loaded unchanged."""
    own = getattr(ours, name).from_pretrained(tmp_path / "theirs")
    own.save_pretrained(tmp_path / "own")
    for other in ("DebertaTokenizer", "DebertaTokenizerFast"):
        again = getattr(ours, other).from_pretrained(tmp_path / "own")
        assert again.pair_template == DOUBLED
        for text in ("a [MASK] b", "x"):
            assert dict(again(text, "c [MASK]")) == dict(theirs(text, "c [MASK]"))


@kinds
def test_the_published_models_pairs(name, theirs, tmp_path):
    """One may ask for them, and gets them from all other files, without a warning."""
    template = ["[CLS]:0", "$A:0", "[SEP]:0", "$B:1", "[SEP]:1"]
    kind = getattr(ours, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if name.endswith("Fast"):
            own = kind.from_pretrained(tmp_path / "theirs", pair_template=template)
        else:
            warnings.simplefilter("ignore")
            own = kind.from_pretrained(tmp_path / "theirs", pair_template=template)
            warnings.simplefilter("error")
        first, second = (own(x, add_special_tokens=False)["input_ids"] for x in ("a b", "c"))
        assert own("a b", "c")["input_ids"] == [1, *first, 2, *second, 2]
        assert own("a b", "c")["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
        own.save_pretrained(tmp_path / "own")
        assert kind.from_pretrained(tmp_path / "own")("a b", "c") == own("a b", "c")


@kinds
@pytest.mark.parametrize(
    "template, message",
    [
        (["$A:0"], "must hold .A and then .B, each once"),
        (["$B:0", "$A:1"], "must hold .A and then .B, each once"),
        (["$A:0", "$B"], "must be a list of texts such as"),
        ("$A:0 $B:0", "must be a list of texts such as"),
        ([1, 2], "must be a list of texts such as"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_templates_that_are_none(name, theirs, tmp_path, template, message):
    with pytest.raises(ValueError, match=message):
        getattr(ours, name).from_pretrained(tmp_path / "theirs", pair_template=template)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_mask_with_flags_of_its_own(theirs, tmp_path):
    mask = ours.AddedToken("[MASK]", lstrip=True, special=True)
    own = ours.DebertaTokenizerFast.from_pretrained(tmp_path / "theirs", mask_token=mask)
    assert own.tokenize("a [MASK] b") == ["a", " [MASK]", "Ġb"]
    own.save_pretrained(tmp_path / "own")
    content = json.loads((tmp_path / "own" / "tokenizer.json").read_text("utf-8"))
    (saved,) = [token for token in content["added_tokens"] if token["content"] == "[MASK]"]
    assert saved["lstrip"]
