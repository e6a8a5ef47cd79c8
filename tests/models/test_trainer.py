"""Native models in Hugging Face's Trainer."""

import json
import warnings

import pytest
import torch
from native_models import COMMON, CONFIGS, build, tokens
from tokenizer_files import byte_level_folder, sentences, spm_folder

import deberta_fast
from deberta_fast import tokenization
from deberta_fast.data import PackedCollator, TokenBudgetSampler

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

CLASSIFIER = "ForSequenceClassification"


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps one state per process, with the precision of the first Trainer."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def native_tokenizer(name):
    kind = tokenization.DebertaTokenizerFast if name == "v1" else tokenization.DebertaV2TokenizerFast
    return kind.from_pretrained(byte_level_folder() if name == "v1" else spm_folder(), model_max_length=32)


def data(head=CLASSIFIER, number=12):
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index in range(number):
        ids = torch.randint(5, COMMON["vocab_size"], (6 + 3 * (index % 4),), generator=generator).tolist()
        per_token = head in ("ForMaskedLM", "ForTokenClassification")
        answers = {"start_positions": 1, "end_positions": 3}
        labels = {"labels": [x % 2 for x in ids] if per_token else index % 2}
        rows.append({"input_ids": ids, **(answers if head == "ForQuestionAnswering" else labels)})
    return rows


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    pad = lambda values, fill: values + [fill] * (longest - len(values))
    batch = {
        "input_ids": [pad(row["input_ids"], 0) for row in rows],
        "attention_mask": [pad([1] * len(row["input_ids"]), 0) for row in rows],
    }
    for name in set(rows[0]) - {"input_ids"}:
        values = [row[name] for row in rows]
        batch[name] = [pad(x, -100) for x in values] if isinstance(values[0], list) else values
    return {name: torch.tensor(values) for name, values in batch.items()}


def trainer(model, folder, kind=transformers.Trainer, head=CLASSIFIER, train=None, **options):
    keywords = {name: options.pop(name) for name in ("processing_class", "data_collator") if name in options}
    settings = dict(
        per_device_train_batch_size=4, max_steps=3, save_steps=1, learning_rate=1e-3, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_strategy="no", seed=1,
    )  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **{**settings, **options})
    train = data(head) if train is None else train
    return kind(model, arguments, train_dataset=train, eval_dataset=train, **{"data_collator": collate, **keywords})


def states_of(model):
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(got[name], x), name


HEADS = [
    ("v1", CLASSIFIER), ("v3", CLASSIFIER), ("v1", "ForMaskedLM"), ("v2", "ForMaskedLM"),
    ("v1", "ForTokenClassification"), ("v3", "ForQuestionAnswering"),
]  # fmt: skip


@pytest.mark.parametrize("name, head", HEADS, ids=["-".join(x) for x in HEADS])
def test_checkpoints_load_in_both_libraries(name, head, tmp_path):
    model = build(name, head)
    run = trainer(model, tmp_path, head=head)
    run.train()
    run.save_model(tmp_path / "last")
    inputs = tokens("right", 19)
    expected = model.eval()(**inputs)[0]
    for folder in (tmp_path / "checkpoint-3", tmp_path / "last"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            native, info = type(model).from_pretrained(folder, output_loading_info=True)
        assert not (info.missing or info.unexpected)
        assert_same(native.state_dict(), states_of(model))
        assert native.config.architectures == [type(model).__name__]
        theirs, info = getattr(transformers, type(model).__name__).from_pretrained(folder, output_loading_info=True)
        assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
        mask = inputs["attention_mask"].bool()
        valid = mask if expected.shape[:2] == mask.shape else ...
        with torch.no_grad():
            torch.testing.assert_close(theirs(**inputs)[0][valid], expected[valid], atol=1e-4, rtol=1e-4)
    assert "in_proj" not in str(list(model.state_dict()))  # it is Hugging Face's name and occurs only in files


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_resumed(name, tmp_path):
    whole = build(name, CLASSIFIER)
    trainer(whole, tmp_path).train()
    again = build(name, CLASSIFIER, initializer_range=0.5)
    for parameter in again.parameters():
        parameter.data.zero_()
    result = trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert result.global_step == 3
    assert_same(again.state_dict(), states_of(whole))


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_best_model_at_the_end(name, tmp_path):
    model = build(name, CLASSIFIER)
    run = trainer(
        model, tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", eval_strategy="steps", eval_steps=1,
        learning_rate=0.3, optim="sgd",
    )  # fmt: skip
    run.train()
    best = type(model).from_pretrained(run.state.best_model_checkpoint)
    assert_same(model.state_dict(), states_of(best))
    losses = [x["eval_loss"] for x in run.state.log_history if "eval_loss" in x]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses))


OPTIONS = {
    "bf16": dict(bf16=True, gradient_accumulation_steps=2),
    "checkpointing": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
    "smoothing": dict(label_smoothing_factor=0.1),
    "compile": dict(torch_compile=True, torch_compile_backend="eager"),
    "full-bf16": dict(bf16_full_eval=True),
    "length": dict(train_sampling_strategy="group_by_length"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, tmp_path):
    model = build("v3", CLASSIFIER)
    before = states_of(model)
    run = trainer(model, tmp_path, save_strategy="no", **options)
    assert torch.isfinite(torch.tensor(run.train().training_loss))
    assert any(not torch.equal(x, before[name]) for name, x in model.state_dict().items())
    found = run.predict(data())
    assert found.predictions.shape == (12, 2) and sorted(found.label_ids) == [0] * 6 + [1] * 6


def test_accumulation_is_the_mean(tmp_path):
    """Two halves give the gradient of the whole batch. A model that claims to average by itself would break this."""
    gradients = []
    for size, steps in ((4, 1), (2, 2)):
        model = build("v3", CLASSIFIER)
        run = trainer(
            model, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1,
            learning_rate=1.0, optim="sgd", save_strategy="no", max_grad_norm=0.0,
        )  # fmt: skip
        before = states_of(model)
        run.train()
        gradients.append({name: before[name] - x for name, x in model.state_dict().items()})
    for name, x in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], x, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_with_a_tokenizer(name, tmp_path):
    """Trainer then aligns the special tokens of the configuration, and pads with the tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, **{str(i): i for i in range(3, COMMON["vocab_size"])}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]"
    )
    model = build(name, CLASSIFIER)
    run = trainer(model, tmp_path, processing_class=tokenizer, data_collator=None)
    run.train()
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, 2)
    saved = json.loads((tmp_path / "checkpoint-3" / "config.json").read_text())
    assert saved["eos_token_id"] == 2 and (tmp_path / "checkpoint-3" / "tokenizer_config.json").is_file()
    run.create_model_card()


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_with_a_native_tokenizer(name, tmp_path):
    """Trainer pads only with Hugging Face's tokenizers, so it gets a collator. A pipeline needs only the checkpoint."""
    tokenizer = native_tokenizer(name)
    rows = [{**tokenizer(text, truncation=True), "labels": i % 2} for i, text in enumerate(sentences()[:12])]
    model = build(name, CLASSIFIER, vocab_size=len(tokenizer))
    collator = transformers.DataCollatorWithPadding(tokenizer)
    trainer(model, tmp_path, train=rows, processing_class=tokenizer, data_collator=collator).train()
    run = deberta_fast.pipeline("text-classification", tmp_path / "checkpoint-3", device=-1)
    found = run(sentences()[:4], top_k=None, truncation=True)
    expected = deberta_fast.pipeline("text-classification", model, tokenizer)(
        sentences()[:4], top_k=None, truncation=True
    )
    for one, other in zip(found, expected, strict=True):
        assert [x["score"] for x in one] == pytest.approx([x["score"] for x in other], abs=1e-5)


@pytest.mark.parametrize("whole_words", [True, False])
@pytest.mark.parametrize("name", ["v1", "v3"])
def test_masking(name, whole_words):
    """Collators mask the same tokens with a native tokenizer and with Hugging Face's of the same vocabulary."""
    own = native_tokenizer(name)
    special = {x: getattr(own, x) for x in ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=own.backend_tokenizer, **special)
    options = dict(truncation=True, padding="max_length", max_length=32, return_special_tokens_mask=True)
    rows = [dict(own(text, return_offsets_mapping=True, **options)) for text in sentences()[:6]]
    found = []
    for tokenizer in (own, theirs):
        collator = transformers.DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=0.5, whole_word_mask=whole_words, seed=3
        )
        batch = [dict(row) for row in rows]
        if not whole_words:
            batch = [{key: x for key, x in row.items() if key != "offset_mapping"} for row in batch]
        found.append(collator(batch))
    assert torch.equal(found[0]["labels"], found[1]["labels"]) and (found[0]["labels"] >= 0).any()
    assert torch.equal(found[0]["input_ids"], found[1]["input_ids"])
    model = build(name, "ForMaskedLM", vocab_size=len(own))
    assert torch.isfinite(model(**found[0]).loss)


class Packing(transformers.Trainer):
    def get_train_dataloader(self):
        rows = self.train_dataset
        self.own = TokenBudgetSampler([len(row["input_ids"]) for row in rows], 40)
        loader = torch.utils.data.DataLoader(rows, batch_sampler=self.own, collate_fn=PackedCollator())
        return self.accelerator.prepare(loader)


@pytest.mark.parametrize("head", [CLASSIFIER, "ForTokenClassification"])
def test_packed_batches(head, tmp_path):
    """Trainer's steps equal those of a plain loop. Each epoch has its own order, also after resuming."""
    model, by_hand = build("v3", head), build("v3", head)
    seen = []
    model.register_forward_hook(
        lambda module, inputs, keywords, out: seen.append(keywords["input_ids"]), with_kwargs=True
    )
    keywords = dict(
        kind=Packing, head=head, max_steps=-1, num_train_epochs=3, save_steps=2, optim="sgd", learning_rate=0.1,
        lr_scheduler_type="constant", max_grad_norm=0.0, data_collator=PackedCollator(),
    )  # fmt: skip
    run = trainer(model, tmp_path, **keywords)
    run.train()
    rows = data(head)
    sampler = TokenBudgetSampler([len(row["input_ids"]) for row in rows], 40)
    optimizer, expected = torch.optim.SGD(by_hand.parameters(), 0.1), []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in sampler:
            inputs = PackedCollator()([rows[i] for i in batch])
            expected.append(inputs["input_ids"])
            by_hand.train()(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(seen) == len(expected) > 6 and all(torch.equal(x, y) for x, y in zip(seen, expected))
    for name, x in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], x, atol=1e-5, rtol=1e-4)
    if head == CLASSIFIER:  # every sequence has the same weight, also in uneven batches
        sizes = [len(rows[i : i + 8]) for i in range(0, len(rows), 8)]
        batches = [PackedCollator()(rows[i : i + 8]) for i in range(0, len(rows), 8)]
        losses = [model.eval()(**batch).loss.item() for batch in batches]
        mean = sum(n * loss for n, loss in zip(sizes, losses)) / len(rows)
        assert run.evaluate()["eval_loss"] == pytest.approx(mean, rel=1e-5)
        assert run.predict(rows).predictions.shape == (len(rows), 2)
    steps = len(list(sampler)) + 1 + (len(list(sampler)) + 1) % 2  # within the second epoch
    again = build("v3", head)
    trainer(again, tmp_path, **keywords).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    for name, x in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], x, atol=1e-6, rtol=1e-5)


def test_hugging_faces_names_load():
    """load_state_dict accepts them, because Trainer uses it. Tensors of other models are still unexpected."""
    theirs = transformers.DebertaForMaskedLM(transformers.DebertaConfig(**COMMON, **CONFIGS["v1"]))
    ours = build("v1", "ForMaskedLM")
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    inputs = tokens("right", 19)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        ours(**inputs).logits[valid], theirs.eval()(**inputs).logits[valid], atol=1e-5, rtol=1e-5
    )
    state = theirs.state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key.*classifier.weight"):
        ours.load_state_dict({**state, "classifier.weight": torch.ones(2, 32)})
    with pytest.raises(RuntimeError, match="Missing key.*lm_predictions.lm_head.bias"):
        ours.load_state_dict({name: x for name, x in state.items() if "predictions" not in name})
    assert isinstance(ours, deberta_fast.DebertaForMaskedLM)
