"""Our tokenizers beside those of transformers 4, whose behaviour they keep; transformers 5 changed it."""

import importlib.util

import pytest
from tokenizer_files import byte_level_files, spm_model

import deberta_fast.tokenization as ours

transformers = pytest.importorskip("transformers")
if transformers.__version__.startswith("5."):
    pytest.skip("compares with transformers 4", allow_module_level=True)

PROTOBUF = importlib.util.find_spec("google") and importlib.util.find_spec("google.protobuf")
NAMES = ["DebertaV2Tokenizer", "DebertaV2TokenizerFast", "DebertaTokenizer", "DebertaTokenizerFast"]
OPTIONS = {
    "plain": {},
    "lower": dict(do_lower_case=True),
    "punctuation": dict(split_by_punct=True),
    "lower-punctuation": dict(do_lower_case=True, split_by_punct=True),
    "left": dict(padding_side="left", truncation_side="left"),
    "short": dict(model_max_length=11),
    "tokens": dict(additional_special_tokens=["<a>", "<b>"], mask_token="<mask>", pad_token="[PAD]"),
}
BYTE_LEVEL_OPTIONS = {name: OPTIONS[name] for name in ("plain", "left", "short", "tokens")}
BYTE_LEVEL_OPTIONS["prefix"] = dict(add_prefix_space=True)


def pair(name, kind="english", **options):
    """Our tokenizer and theirs."""
    files, more = (byte_level_files() if name.startswith("DebertaT") else [spm_model(kind)]), {}
    own = getattr(ours, name)(*files, **options)
    if name == "DebertaV2TokenizerFast" and not PROTOBUF:
        # transformers cannot read spm.model without protobuf.
        more = dict(tokenizer_object=own.backend_tokenizer)
    return own, getattr(transformers, name)(*files, **options, **more)


CASES = [(name, "english", option) for name in NAMES[:2] for option in OPTIONS]
CASES += [(name, kind, "plain") for name in NAMES[:2] for kind in ("world", "bytes", "symbols")]
CASES += [(name, "english", option) for name in NAMES[2:] for option in BYTE_LEVEL_OPTIONS]


def plain(value):
    """Results as lists and dicts, so that ours and theirs can be compared."""
    if hasattr(value, "keys"):
        return {key: plain(value[key]) for key in sorted(value.keys())}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def outcome(call):
    """The result of a call, or "fails" if it raises, because error messages may differ."""
    try:
        return plain(call())
    except BaseException as error:
        # The PanicException of tokenizers does not inherit from Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            return "fails"
        raise


def assert_same(both, call, what=""):
    own, other = [outcome(lambda tokenizer=tokenizer: call(tokenizer)) for tokenizer in both]
    assert own == other, what
