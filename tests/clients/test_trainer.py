"""transformers' Trainer with patched and native models: bfloat16, checkpoints, resuming, files."""

import pytest
import torch
import transformers
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from sharding import sharding
from tiny import TEXTS, TRAINED, assert_close, batch, folder, options, tokenizer, weights
from torch.distributed.fsdp import FSDPModule
from training import by_name

import deberta_fast
from deberta_fast import patch

HEADS = ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM"]


def model_folder(name, head="ForSequenceClassification"):
    return folder(name, head, num_labels=2 if head == "ForQuestionAnswering" else 3)


def hf(name, head="ForSequenceClassification", checkpoint=None):
    checkpoint = checkpoint or model_folder(name, head)
    return getattr(transformers, "AutoModel" + head).from_pretrained(checkpoint)


def native(name, head="ForSequenceClassification", checkpoint=None):
    kind = getattr(deberta_fast, ("Deberta" if name == "v1" else "DebertaV2") + head)
    return kind.from_pretrained(checkpoint or model_folder(name, head))


def data(name, head="ForSequenceClassification"):
    rows = [dict(tokenizer(name)(text)) for text in TEXTS * 2]
    for number, row in enumerate(rows):
        if head == "ForQuestionAnswering":
            row |= {"start_positions": 1, "end_positions": 2 + number % 2}
        elif head == "ForSequenceClassification":
            row["labels"] = number % 3
        elif head == "ForTokenClassification":
            row["labels"] = [x % 3 for x in row["input_ids"]]
    return rows


def collator(name, head):
    if head == "ForMaskedLM":
        return transformers.DataCollatorForLanguageModeling(tokenizer(name), seed=0)
    return transformers.DataCollatorForTokenClassification(tokenizer(name)) if "Token" in head else None


def trainer(model, name, path, head="ForSequenceClassification", kind=transformers.Trainer, **settings):
    arguments = dict(
        max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=4, per_device_eval_batch_size=4,
        learning_rate=1e-2, optim="sgd", report_to="none", use_cpu=True,
    )  # fmt: skip
    return kind(
        model,
        transformers.TrainingArguments(str(path), **arguments | settings),
        train_dataset=data(name, head),
        eval_dataset=data(name, head)[1:],
        processing_class=tokenizer(name),
        data_collator=collator(name, head),
    )


def trained(made):
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return {"losses": losses, "eval_loss": made.evaluate()["eval_loss"], "weights": weights(made.model)}


@pytest.mark.parametrize("name, head", [("v1", HEADS[0]), ("v2", HEADS[1]), *(("v3", head) for head in HEADS)])
@options
def test_patched(name, head, options, tmp_path, same_when_patched):
    run = lambda model: trained(trainer(model, name, tmp_path, head))
    got = same_when_patched(lambda: hf(name, head), run, tolerance=TRAINED, **options)
    assert len(set(got["losses"])) == 4


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}], ids=["keep", "checkpointing"])
@options
def test_patched_in_bfloat16(checkpointing, options, tmp_path, same_when_patched):
    settings = dict(gradient_checkpointing=checkpointing is not None, gradient_checkpointing_kwargs=checkpointing)
    run = lambda model: trained(trainer(model, "v3", tmp_path, bf16=True, **settings))["losses"]
    same_when_patched(lambda: hf("v3"), run, tolerance=4 * torch.finfo(torch.bfloat16).eps, **options)


def test_v1_in_bfloat16_where_hugging_face_fails(tmp_path):
    expected = trained(trainer(hf("v1"), "v1", tmp_path))["losses"]
    got = trained(trainer(patch(hf("v1"), unpad=True), "v1", tmp_path, bf16=True))["losses"]
    assert_close(got, expected, tolerance=8 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_patched_checkpoints_resume_and_load(name, tmp_path):
    first = trainer(patch(hf(name)), name, tmp_path)
    expected = trained(first)
    again = trainer(patch(hf(name), unpad=True), name, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_close(weights(again.model), expected["weights"], TRAINED)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4")
    with torch.no_grad():
        assert_close(loaded(**batch(name)).logits, again.model.eval()(**batch(name)).logits, TRAINED)


@pytest.mark.parametrize("name, head", [("v1", HEADS[0]), ("v3", HEADS[0]), ("v3", HEADS[1])])
def test_native(name, head, tmp_path):
    """A native model has the losses of Hugging Face's model, and its checkpoints load in both libraries."""
    expected = trained(trainer(hf(name, head), name, tmp_path / "hf", head))
    made = trainer(native(name, head), name, tmp_path / "native", head)
    got = trained(made)
    assert_close([got["losses"], got["eval_loss"]], [expected["losses"], expected["eval_loss"]], TRAINED)
    checkpoint = tmp_path / "native" / "checkpoint-4"
    assert (checkpoint / "config.json").exists()
    with torch.no_grad():
        logits = made.model.eval()(**batch(name)).logits
        for library in (transformers, deberta_fast):
            loaded = getattr(library, type(made.model).__name__).from_pretrained(checkpoint)
            assert_close(loaded.eval()(**batch(name)).logits, logits)
    again = trainer(native(name, head), name, tmp_path / "native", head)
    again.train(resume_from_checkpoint=str(tmp_path / "native" / "checkpoint-2"))
    assert_close(weights(again.model), got["weights"], TRAINED)


@pytest.mark.parametrize("name", ["v1", "v3"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["keep", "checkpointing"])
def test_native_in_bfloat16(name, checkpointing, tmp_path):
    expected = trained(trainer(native(name), name, tmp_path))["losses"]
    got = trained(trainer(native(name), name, tmp_path, bf16=True, gradient_checkpointing=checkpointing))["losses"]
    assert_close(got, expected, tolerance=8 * torch.finfo(torch.bfloat16).eps)


def test_native_predictions(tmp_path):
    rows = data("v3")
    got = trainer(native("v3"), "v3", tmp_path).predict(rows)
    expected = trainer(hf("v3"), "v3", tmp_path).predict(rows)
    assert_close(torch.as_tensor(got.predictions), torch.as_tensor(expected.predictions))
    assert_close(got.metrics["test_loss"], expected.metrics["test_loss"])


# Its eps exceeds the rounding of gradients that are otherwise zero. SGD has no state, and torch refuses to load that of
# an optimizer without any.
ADAMW = dict(optim="adamw_torch", adam_epsilon=1e-2)


class Sharding(transformers.Trainer):
    """A Trainer that shards on CPUs too."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        sharding(self.accelerator, FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args))
        self.is_fsdp_enabled = True


def sharded(kind, name, checkpoint, path):
    """Four steps, and the last two of them again from a checkpoint."""

    def make():
        AcceleratorState._reset_state(reset_partial_state=True)
        load = native if kind == "native" else lambda *arguments: patch(hf(*arguments), unpad=True)
        model = load(name, HEADS[0], checkpoint)
        config = {"version": 2, "transformer_layer_cls_to_wrap": [type(model.deberta.encoder.layer[0]).__name__]}
        # Trainer would double the loss of Hugging Face's model, which takes num_items_in_batch and does not use it.
        settings = dict(fsdp=True, fsdp_config=config, average_tokens_across_devices=False)
        return trainer(model, name, path, kind=Sharding, **settings, **ADAMW)

    made = make()
    made.train()
    assert all(isinstance(layer, FSDPModule) for layer in made.model.deberta.encoder.layer)
    again = make()
    again.train(resume_from_checkpoint=f"{path}/checkpoint-2")
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return {"losses": losses, "weights": by_name(made.model)}, by_name(again.model)


@pytest.mark.parametrize("kind, name", [("native", "v3"), ("patched", "v1"), ("patched", "v3")])
def test_sharded(kind, name, processes, tmp_path):
    """Two processes that share every layer's weights train as one with the batches of both."""
    load = native if kind == "native" else hf
    expected = trained(trainer(load(name), name, tmp_path / "one", per_device_train_batch_size=8, **ADAMW))
    del expected["eval_loss"]
    for got, resumed in processes.run(sharded, kind, name, model_folder(name), str(tmp_path)):
        assert_close(got, expected, TRAINED)
        assert_close(resumed, expected["weights"], TRAINED)
