"""Keywords that callers bring along from other libraries."""

import shutil
import warnings

import pytest
import torch
from test_tokenization import ALL, make
from test_tokenization_files import published

every = pytest.mark.parametrize("kind", ALL)


@every
def test_subfolder(kind, tmp_path):
    shutil.copytree(published(kind), tmp_path / "some" / "part")
    tokenizer = kind.from_pretrained(tmp_path, subfolder="some/part", force_download=True, token="secret")
    assert tokenizer("A text.") == make(kind)("A text.")
    with pytest.raises(FileNotFoundError, match="there is no subfolder 'other' in "):
        kind.from_pretrained(tmp_path, subfolder="other")


@every
def test_what_says_how_to_load(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind.from_pretrained(published(kind), use_fast=kind.is_fast, trust_remote_code=True, revision="main")
    with pytest.warns(
        UserWarning, match=f"use_fast={not kind.is_fast} does nothing for a {kind.__name__}: see Deberta"
    ):
        tokenizer = kind.from_pretrained(published(kind), use_fast=not kind.is_fast)
    assert type(tokenizer) is kind
    with pytest.raises(TypeError, match=f"{kind.__name__} has no argument use_quick; it has "):
        kind.from_pretrained(published(kind), use_quick=True)


@every
def test_name_and_settings_are_attributes(kind, tmp_path):
    tokenizer = kind.from_pretrained(published(kind), name_or_path="another", padding_side="left")
    assert tokenizer.name_or_path == str(published(kind))
    assert tokenizer.init_kwargs["padding_side"] == "left"


@every
def test_text_target(kind):
    tokenizer = make(kind)
    one, two = tokenizer("A text."), tokenizer("another")
    both = tokenizer("A text.", text_target="another")
    assert dict(both) == {**one, "labels": two["input_ids"]}
    assert dict(tokenizer(text_target="another")) == dict(two)
    options = dict(padding="max_length", max_length=20, truncation=True, return_tensors="pt")
    rows = tokenizer(["A text.", "b"], text_target=["another", "c d"], text_pair_target=["x", "y"], **options)
    assert torch.equal(rows["labels"], tokenizer(["another", "c d"], ["x", "y"], **options)["input_ids"])
    assert torch.equal(rows["input_ids"], tokenizer(["A text.", "b"], **options)["input_ids"])
    with pytest.raises(ValueError, match="text_pair_target needs a text_target"):
        tokenizer("a", text_pair_target="b")
    with pytest.raises(TypeError, match="expected text to be a str, a list of str or a list of pairs, got NoneType"):
        tokenizer()
