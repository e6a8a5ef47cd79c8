"""Pipelines without Hugging Face's code: loading, order, batches, streams, slow tokenizers, and what they refuse."""

import itertools
import json
import sys

import pytest
import torch
from native_models import build
from tokenizer_files import byte_level_folder, sentences, spm_folder

from deberta_fast import tokenization
from deberta_fast.models import config
from deberta_fast.pipelines import InputError, base, pipeline

HEADS = {
    "fill-mask": "ForMaskedLM",
    "text-classification": "ForSequenceClassification",
    "zero-shot-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
LABELS = {
    "ForSequenceClassification": {0: "contradiction", 1: "neutral", 2: "entailment"},
    "ForTokenClassification": {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"},
}
TEXTS = [text for text in sentences() if 20 < len(text) < 150][:40]
INPUTS = {
    "fill-mask": [f"{text} [MASK]" for text in TEXTS],
    "text-classification": TEXTS,
    "zero-shot-classification": TEXTS,
    "token-classification": TEXTS,
    "question-answering": [{"question": a, "context": b} for a, b in zip(TEXTS, TEXTS[1:])],
}


def tokenizer(name="v3", slow=False, **options):
    kind = ("DebertaTokenizer" if name == "v1" else "DebertaV2Tokenizer") + ("" if slow else "Fast")
    files = byte_level_folder() if name == "v1" else spm_folder()
    return getattr(tokenization, kind).from_pretrained(files, **{"model_max_length": 512, **options})


def model(task, name="v3", **changes):
    head = HEADS[task]
    labels = {"id2label": LABELS[head]} if head in LABELS else {}
    return build(name, head, **{"vocab_size": 1100, "max_position_embeddings": 64, **labels, **changes})


def ready(task, name="v3", slow=False, changes=None, **options):
    more = {"candidate_labels": "one,two"} if task == "zero-shot-classification" else {}
    return pipeline(task, model(task, name, **(changes or {})), tokenizer(name[:2], slow), **{**more, **options})


def close(a, b):
    """Equal but for rounding, which depends on what else is in a batch."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, abs=1e-5) if isinstance(a, float) else a == b


@pytest.mark.parametrize("unpad", [False, "auto"])
@pytest.mark.parametrize("task", HEADS)
def test_order_and_batches(task, unpad):
    """Results are those of each input alone, whatever the batches; no padding is seen, and none too many is made."""
    run = ready(task)
    run.model.set_unpad(unpad)
    first = INPUTS[task]
    alone = [run(iter([item])) for item in first]
    alone = [next(results) for results in alone]
    assert len({json.dumps(result) for result in alone}) > 30
    shapes, outputs = [], run._outputs
    run._outputs = lambda rows, options: shapes.append((len(rows), longest(rows))) or outputs(rows, options)
    for batch_size in (None, 1, 7):
        shapes.clear()
        assert close(run(first, batch_size=batch_size), alone)
        lengths = [length for _, length in shapes]
        assert lengths == sorted(lengths, reverse=True)
        if batch_size:
            assert max(rows for rows, _ in shapes) == batch_size
        else:
            assert all(rows == 1 or rows * length <= base.TOKENS["cpu"] for rows, length in shapes)
            assert len(shapes) < len(first)
    assert close(list(run(iter(first))), alone)
    assert close(run(tuple(first)), alone)


def longest(rows):
    return max(len(row.input_ids) for row in rows)


def watched(run):
    """Shapes of the ids that are embedded, and of the states that enter the first layer."""
    shapes = []
    note = lambda module, args: shapes.append(tuple(args[0].shape))
    run.model.deberta.embeddings.word_embeddings.register_forward_pre_hook(note)
    run.model.deberta.encoder.layer[0].register_forward_pre_hook(note)
    return shapes


ROWS = [*((task, name, {}) for task in HEADS for name in ("v1", "v2", "v3"))]
ROWS += [("fill-mask", "v3", {"enhanced_mask_decoder": True}), ("token-classification", "v3", {"z_steps": 2})]
LONGER = {"max_position_embeddings": 128}


@pytest.mark.parametrize("task, name, changes", ROWS, ids=lambda x: x if isinstance(x, str) else ", ".join(x))
def test_no_padding_is_made(task, name, changes):
    """Rows of several lengths go through the model one after the other, and the results are those of a padded batch."""
    run, items = ready(task, name, batch_size=len(TEXTS), changes={**LONGER, **changes}), INPUTS[task][:9]
    rows = run.rows([run.checked(item, run.options) for item in items], run.resolved(run.options))
    rows = [row for own in rows for row in own]
    tokens = sum(len(row.input_ids) for row in rows)
    assert tokens < len(rows) * longest(rows)
    shapes = watched(run)
    results = run(items)
    assert shapes == [(1, tokens), (tokens, 32)]
    shapes.clear()
    run.model.set_unpad(False)
    assert close(results, run(items))
    assert shapes == [(len(rows), longest(rows)), (len(rows), longest(rows), 32)]


def test_rows_of_one_length_are_a_batch():
    run = ready("text-classification")
    shapes = watched(run)
    run(TEXTS[:1] * 3)
    length = longest(run.rows([run.checked(TEXTS[0], run.options)], run.options)[0])
    assert shapes == [(3, length), (3, length, 32)]


def hooked(run):
    run.model.register_forward_hook(lambda module, args, output: None)


def hooked_below(run):
    run.model.deberta.register_forward_pre_hook(lambda module, args: None)


def wrapped(run):
    run.model.forward = run.model.forward


def compiled(run):
    run.model.compile(backend="eager")


def derived(run):
    run.model.__class__ = type("Derived", (type(run.model),), {"forward": type(run.model).forward})


def attentive(run):
    run.model.config.output_attentions = True


@pytest.mark.parametrize("change", [hooked, hooked_below, wrapped, compiled, derived, attentive])
def test_calls_stay_calls(change):
    """Hooks and wrappers of the model's call still run, because rows are padded then."""
    run = ready("text-classification")
    expected = run(TEXTS)
    change(run)
    assert not run._packs()
    assert close(run(TEXTS), expected)


@pytest.mark.parametrize("task", HEADS)
def test_talking_heads(task):
    """They need a batch; its padding is no result."""
    run, items = ready(task, "v1-talking-heads", changes=LONGER, batch_size=9), INPUTS[task][:9]
    alone = [next(run(iter([item]))) for item in items]
    shapes = watched(run)
    assert close(run(items), alone)
    assert len(shapes[1]) == 3


def files_opened(monkeypatch):
    """Names of the configurations that are read from now on."""
    names, read = [], config.read_object
    monkeypatch.setattr(config, "read_object", lambda path: names.append(path.name) or read(path))
    return names


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_from_folder(name, tmp_path, monkeypatch):
    own = model("text-classification", name)
    own.save_pretrained(tmp_path)
    tokenizer(name, model_max_length=64).save_pretrained(tmp_path)
    type("Derived", (type(own),), {})  # a subclass of somebody's is not what gets loaded
    opened = files_opened(monkeypatch)
    run = pipeline("sentiment-analysis", tmp_path, top_k=None, truncation=True)
    assert opened.count("config.json") == 1
    assert type(run.model) is type(own) and run.tokenizer.is_fast and run.model.dtype == torch.float32
    options = dict(top_k=None, truncation=True)
    assert close(
        run(TEXTS), pipeline("text-classification", own, tokenizer(name, model_max_length=64), **options)(TEXTS)
    )
    half = pipeline("text-classification", str(tmp_path), str(tmp_path), dtype=torch.bfloat16, backend="eager")
    assert half.model.dtype == torch.bfloat16
    assert half.model.deberta.encoder.layer[0].attention.self.backend == "eager"
    assert half(TEXTS[0])[0]["score"] == pytest.approx(run(TEXTS[0], top_k=1)[0]["score"], abs=0.05)


def test_slow_where_tokenizers_is_absent(tmp_path, monkeypatch):
    model("text-classification").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = pipeline("text-classification", tmp_path)
    assert type(run.tokenizer) is tokenization.DebertaV2Tokenizer
    assert close(run(TEXTS), ready("text-classification")(TEXTS))


def test_another_head_is_warned_of(tmp_path):
    model("fill-mask").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="classifier"):
        pipeline("token-classification", tmp_path)


def test_refusals_of_models(tmp_path):
    own, tokens = model("fill-mask"), tokenizer()
    for error, match, arguments, options in [
        (ValueError, "task must be one of fill-mask, .*, got 'summarization'", ("summarization", own, tokens), {}),
        (TypeError, "needs a DebertaForTokenClassification", ("ner", own, tokens), {}),
        (ValueError, "tokenizer must be given", ("fill-mask", own), {}),
        (TypeError, "model must be a folder", ("fill-mask", 3), {}),
        (FileNotFoundError, "no folder", ("fill-mask", tmp_path / "a" / "b" / "c"), {}),
        (FileNotFoundError, "config.json", ("fill-mask", tmp_path), {}),
        (TypeError, "fill-mask has no stride; its options are top_k", ("fill-mask", own, tokens), {"stride": 3}),
        (ValueError, "top_k must be a number from 1 on, got 0", ("fill-mask", own, tokens), {"top_k": 0}),
        (ValueError, "batch_size must be", ("fill-mask", own, tokens), {"batch_size": 0}),
        (ValueError, "backend must be one of", ("fill-mask", own, tokens), {"backend": "fast"}),
    ]:
        with pytest.raises(error, match=match):
            pipeline(*arguments, **options)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type must be one of deberta, deberta-v2, got 'bert'"):
        pipeline("fill-mask", tmp_path)
    run = pipeline("text-classification", model("text-classification", vocab_size=500), tokens)
    with pytest.raises(ValueError, match="the model has 500: they do not belong together"):
        run(TEXTS)


LONG = " ".join(TEXTS)
REFUSALS = [
    ("fill-mask", "none", {}, r"it has no mask token \(\[MASK\]\)$"),
    ("fill-mask", LONG + " [MASK]", {"truncation": True, "max_length": 9}, "no mask token .*; it was truncated"),
    ("fill-mask", None, {}, "text must be a string, got NoneType"),
    ("fill-mask", {"txt": "a"}, {}, "got an object with 'txt'"),
    ("fill-mask", "\ud800 [MASK]", {}, "surrogates not allowed"),
    ("text-classification", {"text": "a", "pair": "b"}, {}, "with text and text_pair, got one with 'text', 'pair'"),
    ("text-classification", ["a", "b"], {}, "expected a text or .*, got list"),
    ("text-classification", {"text": "a", "text_pair": 3}, {}, "text_pair must be a string, got int"),
    ("zero-shot-classification", "", {}, "the text is empty"),
    ("token-classification", 3.5, {}, "text must be a string, got float"),
    ("token-classification", "a b", {"is_split_into_words": True}, "expected a list of words, got str"),
    ("question-answering", "What?", {}, "expected {.*}, got str"),
    ("question-answering", {"question": "What?"}, {}, "got one with 'question'"),
    ("question-answering", {"question": "", "context": "a"}, {}, "the question is empty"),
    ("question-answering", {"question": "a", "context": ""}, {}, "the context is empty"),
    ("question-answering", {"question": LONG, "context": "a"}, {"max_seq_len": 30}, "max_question_len cuts"),
    (
        "question-answering",
        {"question": "class " * 12, "context": "a"},
        {"max_seq_len": 30, "doc_stride": 20},
        "must be less than 15",
    ),
]


GOOD = {
    **dict.fromkeys(HEADS, "a b"),
    "fill-mask": "[MASK] a",
    "question-answering": {"question": "Why?", "context": "a b"},
}


@pytest.mark.parametrize("task, item, options, match", REFUSALS, ids=lambda x: str(x)[:20])
def test_refusals_of_inputs(task, item, options, match):
    """They say which input it was, also of a stream, whose results before it have come by then."""
    run = ready(task)
    good = ["a", "b"] if "is_split_into_words" in options else GOOD[task]
    with pytest.raises(InputError, match="^input 2: .*" + match) as caught:
        run([good, good, item], **options)
    assert caught.value.index == 2
    stream = run(itertools.chain([good] * 20, [item]), **options)
    assert len(list(itertools.islice(stream, 16))) == 16
    with pytest.raises(InputError, match="^input 20: .*" + match):
        next(stream)


def test_refusals_of_options():
    for task, options, match in [
        ("zero-shot-classification", {"candidate_labels": " , "}, "candidate_labels must be at least one"),
        ("zero-shot-classification", {"hypothesis_template": "It is."}, "must have {} for the label"),
        ("zero-shot-classification", {"hypothesis_template": "{a}"}, "cannot be filled"),
        ("token-classification", {"aggregation_strategy": "best"}, "must be one of none, simple"),
        ("token-classification", {"stride": 3}, "stride needs an aggregation_strategy"),
        ("token-classification", {"stride": 510, "aggregation_strategy": "max"}, "tokens of a part, 510, got 510"),
        ("token-classification", {"stride": 7, "aggregation_strategy": "max", "max_length": 9}, "a part, 7, got 7"),
        ("text-classification", {"function_to_apply": "relu"}, "one of sigmoid, softmax, none, got 'relu'"),
        ("text-classification", {"top_k": "three"}, "top_k must be a number"),
        ("question-answering", {"max_answer_len": 0}, "max_answer_len must be a number from 1 on, got 0"),
    ]:
        with pytest.raises(ValueError, match=match):
            ready(task)(INPUTS[task][:1], **options)
    for options in ({"aggregation_strategy": "first"}, {"stride": 2, "aggregation_strategy": "simple"}):
        with pytest.raises(ValueError, match="needs a fast tokenizer"):
            ready("token-classification", slow=True)(TEXTS[0], **options)
    with pytest.raises(TypeError, match="takes inputs or an iterable of them, got int"):
        ready("text-classification")(3)


def test_too_long_for_the_positions():
    run = pipeline("text-classification", model("text-classification", "v1"), tokenizer("v1"))
    with pytest.raises(InputError, match="input 1: it has .* tokens, and the model takes 64; .*truncation=True"):
        run([TEXTS[0], LONG])
    assert len(run([TEXTS[0], LONG], truncation=True, max_length=64)) == 2


def test_parts_of_long_texts():
    """Every token is in one, and entities of overlapping parts are there once."""
    run = ready("token-classification", aggregation_strategy="simple", ignore_labels=[])
    options = dict(stride=6, max_length=30)
    [rows] = run.rows([(LONG, None)], run.changed(options, run.options))
    assert len(rows) > 5 and {len(row.input_ids) for row in rows[:-1]} == {30}
    for row, after in zip(rows, rows[1:]):
        assert row.input_ids[-7:-1] == after.input_ids[1:7]
    entities = run(LONG, **options)
    assert all(a["end"] <= b["start"] for a, b in zip(entities, entities[1:])) and entities[-1]["end"] == len(LONG)
    assert max(x["end"] for x in run(LONG, max_length=30)) < len(LONG) / 5
    run.tokenizer.model_max_length = 10**30
    with pytest.raises(ValueError, match="stride needs max_length"):
        run(LONG, stride=6)


def test_streams_are_read_as_results_are_asked_for():
    run, read = ready("text-classification"), []

    def inputs():
        for n in itertools.count():
            read.append(n)
            yield TEXTS[n % len(TEXTS)]

    results = run(inputs())
    assert not read
    next(results)
    assert len(read) == base.FIRST_WINDOW
    list(itertools.islice(results, 100))
    assert len(read) < 8 * base.FIRST_WINDOW


def test_nothing_in_nothing_out():
    for task in HEADS:
        assert ready(task)([]) == [] and list(ready(task)(iter([]))) == []
    assert ready("token-classification")("") == []


def test_kinds_of_results():
    """Results are lists where Hugging Face's are, also for a list of one text."""
    run = ready("text-classification")
    label = run([TEXTS[0]])[0]
    assert set(label) == {"label", "score"}
    assert close(run(TEXTS[0]), [label]) and close(run({"text": TEXTS[0]}), label)
    assert close(run(TEXTS[0], top_k=1), [label]) and close(run([TEXTS[0]], top_k=1), [[label]])
    assert [len(x) for x in run(TEXTS[:2], top_k=None)] == [3, 3]
    run = ready("fill-mask", top_k=2)
    assert [set(x) for x in run("a [MASK]")] == [{"score", "token", "token_str", "sequence"}] * 2
    assert close(run(["a [MASK]"]), run("a [MASK]")) and close(run("a [MASK]"), run({"text": "a [MASK]"}))
    assert [len(x) for x in run(["[MASK]a [MASK] [MASK]", "a [MASK]"])[0]] == [2, 2, 2]
    run, item = ready("question-answering"), INPUTS["question-answering"][0]
    answer = run(item)
    assert list(answer) == ["score", "start", "end", "answer"]
    assert item["context"][answer["start"] : answer["end"]] == answer["answer"]
    for same in (run([item]), run(**item), run(item["question"], item["context"]), run([item, item])[1]):
        assert close(same, answer)
    several = run(question=[item["question"], "Why?"], context=item["context"])
    assert close(several[0], answer) and len(several) == 2
    with pytest.raises(ValueError, match="2 questions and 1 contexts"):
        run(question=["a", "b"], context=["c"])
    with pytest.raises(TypeError, match="given together"):
        run(question="a")
    words = ["Sequence", "types"]
    run = ready("token-classification", aggregation_strategy="simple", ignore_labels=[])
    [entities] = run(words, is_split_into_words=True)
    assert close(run([words], is_split_into_words=True), [entities])
    assert entities[0]["start"] == 0 and entities[-1]["end"] == len("Sequence types")
    [entities] = run(words, is_split_into_words=True, delimiter=" - ")
    assert entities[-1]["end"] == len("Sequence - types")


def test_warnings():
    run = ready("fill-mask", top_k=3)
    with pytest.warns(UserWarning, match="target 'strings' is no token: '▁strings' stands for it"):
        results = run("a [MASK]", targets=["strings", "▁with", "▁strings"])
    assert {x["token_str"] for x in results} == {"strings", "with"}
    with pytest.warns(UserWarning, match="no label of the model .* is called entailment"):
        pipeline("zero-shot-classification", model("text-classification", id2label={0: "a", 1: "b"}), tokenizer())


def test_enhanced_mask_decoder():
    """Scores are those of the whole model."""
    own = model("fill-mask", enhanced_mask_decoder=True)
    [best] = pipeline("fill-mask", own, tokenizer(), top_k=1)("a [MASK] of strings")
    inputs = tokenizer()("a [MASK] of strings", return_tensors="pt")
    place = (inputs["input_ids"][0] == tokenizer().mask_token_id).nonzero().item()
    scores = own(**inputs).logits[0, place].softmax(-1)
    assert best["token"] == scores.argmax().item() and best["score"] == pytest.approx(scores.max().item(), abs=1e-6)


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_answers_with_a_slow_tokenizer(name):
    """The same passages as with a fast one that answers in words, also across parts of a long context."""
    slow, fast = (ready("question-answering", name, slow=x, align_to_words=False) for x in (True, False))
    context = "  The quick brown fox\n jumps over  the lazy dog, and then some more words follow here. "
    for options in ({}, {"max_seq_len": 32, "doc_stride": 4}):
        rows = [
            run.rows([{"question": "Who jumps?", "context": context}], run.changed(options))[0] for run in (slow, fast)
        ]
        assert len(rows[0]) > 1 or not options
        for row in rows[0]:
            part = row.about
            assert len(part.offsets) == len(row.input_ids) - part.first - 1
        # The offsets of the words cover the whole text.
        words = dict.fromkeys(span for row in rows[0] for span in row.about.offsets)
        assert [context[start:end] for start, end in words] == context.split()
        answer = slow("Who jumps?", context, **options)
        assert context[answer["start"] : answer["end"]] == answer["answer"].strip() != ""
    plain = [{"question": "Who jumps?", "context": " ".join(context.split())}]
    assert slow.rows(plain, slow.options)[0][0].input_ids == fast.rows(plain, fast.options)[0][0].input_ids


def test_question_is_cut():
    run = ready("question-answering")
    item = {"question": LONG, "context": TEXTS[0]}
    [rows] = run.rows([item], run.changed({"max_question_len": 5, "max_seq_len": 64}))
    assert {row.about.first for row in rows} == {7} and max(len(row.input_ids) for row in rows) <= 64


def test_words_that_a_part_cuts_are_joined(monkeypatch):
    """The probabilities of equal answers of overlapping parts are added up."""
    run = ready("question-answering", align_to_words=False, max_answer_len=1, max_seq_len=20, doc_stride=6)
    parts = run.rows([{"question": "a", "context": LONG}], run.options)[0]
    logits = [(torch.zeros(len(row.input_ids)), torch.zeros(len(row.input_ids))) for row in parts]
    answer = run.answer({"context": LONG}, parts[:2], logits[:2], run.changed({"top_k": 1}, run.options))
    least = (len(parts[0].about.offsets) + 1) ** -2
    assert answer["score"] == pytest.approx(least, rel=1e-5)
    # But of having no answer, the least counts
    logits[1][0][0] = logits[1][1][0] = 9
    options = run.changed({"top_k": 50, "handle_impossible_answer": True}, run.options)
    [nothing] = [x for x in run.answer({"context": LONG}, parts[:2], logits[:2], options) if not x["answer"]]
    assert nothing == {"score": pytest.approx(least, rel=1e-5), "start": 0, "end": 0, "answer": ""}


def test_parts_of_long_contexts():
    """384 tokens with the question, of which 128 overlap."""
    run = ready("question-answering")
    [rows] = run.rows([{"question": "Why?", "context": LONG}], run.options)
    first = rows[0].about.first
    assert {len(row.input_ids) for row in rows[:-1]} == {384}
    assert rows[0].input_ids[-129:-1] == rows[1].input_ids[first : first + 128]


def test_progress(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    ready("text-classification", progress=True)(TEXTS)
    assert f"{len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err
    list(ready("text-classification", progress=True)(iter(TEXTS)))
    assert f"{len(TEXTS)} inputs" in capsys.readouterr().err
    for progress in (None, False):
        ready("text-classification", progress=progress)(TEXTS)
        assert not capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    ready("text-classification")(TEXTS[:2])
    with pytest.raises(ImportError, match="pip install tqdm"):
        ready("text-classification", progress=True)
