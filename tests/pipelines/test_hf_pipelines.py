"""Our pipelines against Hugging Face's; and Hugging Face's on models that ``patch`` changed."""

import functools
import random
import tempfile
from pathlib import Path

import pytest
import torch
from hf_models import build, transformers
from tokenizer_files import byte_level_folder, sentences, spm_folder

import deberta_fast
from deberta_fast import tokenization
from deberta_fast.pipelines import pipeline

HEADS = {
    "fill-mask": "ForMaskedLM",
    "text-classification": "ForSequenceClassification",
    "zero-shot-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "feature-extraction": "Model",
}
LABELS = {
    "ForSequenceClassification": ["contradiction", "neutral", "entailment"],
    "ForTokenClassification": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"],
}
MAX_LENGTH = 64
pytestmark = pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")


SAVED = {}


@functools.cache
def folder():
    return tempfile.TemporaryDirectory(prefix="pipelines-")


@functools.cache
def own_tokenizer(name, **options):
    kind = tokenization.DebertaTokenizerFast if name == "v1" else tokenization.DebertaV2TokenizerFast
    files = byte_level_folder() if name == "v1" else spm_folder()
    return kind.from_pretrained(files, model_max_length=MAX_LENGTH, **options)


def saved(name, head, **changes):
    """Hugging Face's model, and a folder with it and our tokenizer."""
    key = (name, head, str(changes))
    if key not in SAVED:
        SAVED[key] = save(name, head, changes)
    return SAVED[key]


def save(name, head, changes):
    labels = LABELS.get(head)
    named = labels and dict(id2label=dict(enumerate(labels)), label2id={x: i for i, x in enumerate(labels)})
    own = own_tokenizer(name)
    model = build(name, head, **{"vocab_size": len(own) + 3, "pad_token_id": 0, **(named or {}), **changes})
    if hasattr(model, "classifier"):
        # Else one label is every text's
        model.classifier.weight.data *= 8
        inputs = their_tokenizer(name)(TEXTS[:9], padding=True, return_tensors="pt")
        model.classifier.bias.data -= model(**inputs).logits.flatten(0, -2).mean(0).detach()
    path = Path(folder().name) / f"{name}-{head}-{len(SAVED)}"
    model.save_pretrained(path)
    own.save_pretrained(path)
    return model, path


def their_tokenizer(name):
    """One that makes the same tokens: transformers 5 builds others of the same files."""
    own = own_tokenizer(name)
    names = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=own.backend_tokenizer,
        model_max_length=MAX_LENGTH,
        **{x: getattr(own, x) for x in names},
    )
    tokenizer.model_input_names = own.model_input_names
    return tokenizer


def their_pipeline(name, task, model, **options):
    return transformers.pipeline(task, model=model, tokenizer=their_tokenizer(name), device="cpu", **options)


def both(name, task, options=None, **changes):
    """Our pipeline and theirs."""
    model, path = saved(name, HEADS[task], **changes)
    return pipeline(task, path, **(options or {})), their_pipeline(name, task, model, **(options or {}))


def assert_same(own, other, tolerance=1e-5):
    """Equal types, keys in their order, texts and numbers; scores up to the tolerance."""
    if isinstance(other, dict):
        assert list(own) == list(other)
        for key in other:
            assert_same(own[key], other[key], tolerance)
    elif isinstance(other, list):
        assert isinstance(own, list) and len(own) == len(other)
        for x, y in zip(own, other):
            assert_same(x, y, tolerance)
    elif not isinstance(other, str | int):
        assert own == pytest.approx(float(other), abs=tolerance)
    else:
        assert own == other


def distinct(results, key):
    """That the inputs matter: the answers are not all one."""
    flat = [x[0] if isinstance(x, list) else x for x in results]
    return len({str(x[key]) for x in flat}) > 1


TEXTS = [*sentences()[:6], "Short.", "a", "Zażółć ﬁ 日本語 [SEP] x²", " ".join(sentences()[:12])]


@pytest.fixture(params=["v1", "v3"])
def name(request):
    return request.param


def masked(text, seed):
    words = text.split()
    words[random.Random(seed).randrange(len(words))] = "[MASK]"
    return " ".join(words)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"targets": ["the", "class", "strings"]}, {"targets": "of"}])
def test_fill_mask(name, options):
    own, other = both(name, "fill-mask")
    texts = [masked(text, i) for i, text in enumerate(TEXTS[:7])]
    texts += ["[MASK]", "two [MASK] in[MASK] one", "[PAD] the [MASK].", " [MASK][PAD] of [MASK]"]
    result = own(texts, **options)
    assert_same(result, other(texts, **options))
    assert_same(own(texts[:1], **options), other(texts[:1], **options))
    assert_same(own(texts[8], **options), other(texts[8], **options))
    if options.get("top_k", 0) == 2:
        assert distinct(result[:8], "token")


def test_fill_mask_truncated(name):
    own, other = both(name, "fill-mask")
    text = "[MASK] " + TEXTS[-1]
    cut = {"tokenizer_kwargs": {"truncation": True}}
    assert_same(own(text, **cut), other(text, **cut))
    assert_same(own(text, truncation=True), other(text, **cut))


def test_text_classification(name):
    own, other = both(name, "text-classification")
    pairs = [{"text": a, "text_pair": b} for a, b in zip(TEXTS[:5], TEXTS[1:])]
    inputs = [*TEXTS[:9], *pairs]
    result = own(inputs)
    assert_same(result, other(inputs))
    assert distinct(result, "label")
    for options in ({"top_k": None}, {"top_k": 2}, {"top_k": 1}, {"function_to_apply": "sigmoid"}):
        assert_same(own(inputs, **options), other(inputs, **options))
    options = {"function_to_apply": "none", "top_k": None}
    assert_same(own(inputs, **options), other(inputs, **options), 1e-4)
    cut = {"truncation": True, "max_length": 9, "padding": True}
    for item in ([TEXTS[-1]], TEXTS[-1], pairs[1], [pairs[1]]):
        for given in (cut, {**cut, "top_k": None}, {"truncation": "only_first"}):
            assert_same(own(item, **given), other(item, **given))
    own, other = both(name, "text-classification", {"top_k": 2})
    assert_same(own(TEXTS[0]), other(TEXTS[0]))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", "single_label_classification"])
def test_problem_types(problem):
    own, other = both("v3", "text-classification", problem_type=problem)
    assert_same(own(TEXTS[:4], top_k=None), other(TEXTS[:4], top_k=None), 1e-4)


def test_one_label():
    own, other = both("v3", "text-classification", id2label={0: "score"}, label2id={"score": 0})
    assert_same(own(TEXTS[:4]), other(TEXTS[:4]))


@pytest.mark.parametrize("multi_label", [False, True])
def test_zero_shot_classification(name, multi_label):
    own, other = both(name, "zero-shot-classification")
    options = dict(candidate_labels=["strings", "classes and objects", "with"], multi_label=multi_label)
    result = own(TEXTS, **options)
    assert_same(result, other(TEXTS, **options))
    assert distinct(result, "labels")
    assert_same(own(TEXTS[0], "one", multi_label=multi_label), other(TEXTS[0], "one", multi_label=multi_label))
    options |= dict(candidate_labels="a, b ,c", hypothesis_template="{} it is.")
    assert_same(own(TEXTS[:1], **options), other(TEXTS[:1], **options))


def test_zero_shot_classification_shortens_texts_alone():
    """And nothing where a label alone is too long."""
    own, other = both("v3", "zero-shot-classification")
    for words in (20, 60):
        label = " ".join(TEXTS[-1].split()[:words])
        assert_same(own(TEXTS, [label, "with"]), other(TEXTS, [label, "with"]))


def test_zero_shot_classification_entailment_first():
    own, other = both("v3", "zero-shot-classification", id2label={0: "Entailed", 1: "not"}, label2id={"Entailed": 0})
    for multi_label in (False, True):
        options = dict(candidate_labels="a,b,c", multi_label=multi_label)
        assert_same(own(TEXTS[:3], **options), other(TEXTS[:3], **options))


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_token_classification(name, strategy):
    own, other = both(name, "token-classification", dict(aggregation_strategy=strategy))
    result = own(TEXTS)
    assert_same(result, other(TEXTS))
    assert len({x.get("entity_group", x.get("entity")) for each in result for x in each}) > 1
    options = dict(ignore_labels=["B-PER", "LOC", "PER"])
    assert_same(own(TEXTS[1], **options), other(TEXTS[1], **options))
    if strategy != "none":
        for stride in (0, 10):
            assert_same(own(TEXTS, stride=stride), other(TEXTS, stride=stride))


@pytest.mark.skipif(transformers.__version__ < "4.57", reason="is_split_into_words came later")
def test_token_classification_of_words():
    own, other = both("v3", "token-classification", dict(aggregation_strategy="simple"))
    words = [text.split() for text in TEXTS[:5]]
    options = dict(is_split_into_words=True)
    assert_same(own(words, **options), other(words, **options))
    assert_same(own(words[0], **options, delimiter="--"), other(words[0], **options, delimiter="--"))


QUESTIONS = [
    {"question": "What is a string?", "context": sentences()[3]},
    {"question": "Which methods are there?", "context": " ".join(sentences()[:25])},
    {"question": "Where?", "context": "Here."},
    {"question": "Zażółć?", "context": "日本語 ﬁ x² " + sentences()[7]},
]


def their_answers(their, item, top_k=1, align_to_words=True, handle_impossible_answer=False, **options):
    """Returns what version 4.57.6 answers, from the parts of 4.48, which does not add the scores of equal answers."""
    from transformers.pipelines.question_answering import select_starts_ends

    number = 2 * top_k + 10 if align_to_words else top_k
    longest = {"max_answer_len": options.pop("max_answer_len", 15)}
    sums, impossible = {}, 1e6
    for inputs in their.preprocess(their.create_sample(**item), **options):
        output = their.forward(inputs)
        scores = [output[x] for x in ("start", "end", "p_mask")] + [output["attention_mask"].numpy(), impossible]
        impossible = select_starts_ends(*scores, handle_impossible_answer=True)[-1]
        found = their.postprocess([output], top_k=number, align_to_words=align_to_words, **longest)
        for answer in found if isinstance(found, list) else [found]:
            if answer["score"] > 0:
                sums.setdefault(answer["answer"].lower(), answer | {"score": 0.0})["score"] += answer["score"]
    answers = [*sums.values()]
    if handle_impossible_answer:
        answers.append({"score": impossible, "start": 0, "end": 0, "answer": ""})
    answers = sorted(answers, key=lambda x: x["score"], reverse=True)[:top_k]
    return answers if top_k > 1 else answers[0]


@pytest.mark.skipif(transformers.__version__[:5] != "4.48.", reason="transformers 5 has no question-answering")
@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 3},
        {"handle_impossible_answer": True, "top_k": 40, "align_to_words": False},
        {"max_answer_len": 3, "max_seq_len": 40, "doc_stride": 10, "top_k": 5},
        {"align_to_words": False, "max_seq_len": 33, "top_k": 5},
    ],
    ids=str,
)
def test_question_answering(name, options):
    own, other = both(name, "question-answering")
    result = own(QUESTIONS, **options)
    assert_same(result, [their_answers(other, item, **options) for item in QUESTIONS])
    assert distinct(result, "answer")


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_feature_extraction(name, batch_size):
    """Theirs one at a time, since what it returns of a batch has padding in it."""
    own, other = both(name, "feature-extraction")
    texts = TEXTS[:9]
    expected = [other(text) for text in texts]
    got = own(texts, batch_size=batch_size)
    assert [len(x) for x in got] == [1] * len(texts) and [len(x[0]) for x in got] == [len(x[0]) for x in expected]
    as_tensors = own(texts, return_tensors=True, batch_size=batch_size)
    for one, tensor, theirs in zip(got, as_tensors, expected):
        torch.testing.assert_close(tensor, torch.tensor(theirs), atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(torch.tensor(one), tensor)
    cut = {"truncation": True, "tokenize_kwargs": {"max_length": 9}}
    torch.testing.assert_close(
        own(TEXTS[-1], return_tensors=True, **cut), other(TEXTS[-1], return_tensors=True, **cut), atol=2e-5, rtol=2e-5
    )


CALLS = {
    "fill-mask": ([masked(text, i) for i, text in enumerate(TEXTS[:7])], {}),
    "text-classification": (TEXTS[:9], {"top_k": None}),
    "zero-shot-classification": (TEXTS, {"candidate_labels": "strings,classes"}),
    "token-classification": (TEXTS, {"aggregation_strategy": "simple"}),
    "feature-extraction": (TEXTS[:9], {}),
}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("task", CALLS)
def test_theirs_on_patched(name, task, batch_size, fused_calls):
    inputs, options = CALLS[task]
    model = saved(name, HEADS[task])[0]
    run = lambda: their_pipeline(name, task, model, batch_size=batch_size)(inputs, **options)
    expected = run()
    assert not fused_calls
    assert deberta_fast.patch(model) is model
    try:
        got = run()
    finally:
        deberta_fast.unpatch(model)
    assert fused_calls
    if task == "feature-extraction":
        # Rows of padding behind a text are not results.
        lengths = [len(ids) for ids in their_tokenizer(name)(inputs)["input_ids"]]
        got, expected = ([[x[0][:n]] for x, n in zip(each, lengths)] for each in (got, expected))
    assert_same(got, expected)
