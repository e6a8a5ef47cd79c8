"""PEFT on patched models: LoRA before and after patch, merged, saved, and batches of mixed adapters."""

import peft
import torch
from tiny import TEXTS, assert_close, batch, folder, gradients, models, names
from transformers import AutoModelForSequenceClassification

from deberta_fast import patch, unpatch

TARGETS = {
    "v1": ["in_proj", "pos_q_proj", "dense"],
    "v2": ["query_proj", "value_proj", "pos_key_proj", "dense"],
    "v3": ["query_proj", "key_proj", "value_proj"],
}
# These layers see only rows of texts. PEFT's mixed adapters fail on layers that also project the position table.
OF_TEXTS_ALONE = {"v1": ["in_proj", "dense"], "v2": ["query_proj", "value_proj"], "v3": ["value_proj", "dense"]}
LABELS = torch.tensor([0, 2, 1, 0])


def base(name="v3"):
    return AutoModelForSequenceClassification.from_pretrained(folder(name, "ForSequenceClassification", num_labels=3))


def adapted(model, targets, adapters=("default",)):
    """The model with adapters that differ from zero."""
    config = peft.LoraConfig(target_modules=targets, r=4, lora_alpha=8, task_type="SEQ_CLS")
    adapters, others = adapters[0], adapters[1:]
    model = peft.get_peft_model(model, config, adapter_name=adapters)
    for adapter in others:
        model.add_adapter(adapter, config)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.2, generator=generator)
    return model.eval()


def loss_and_gradients(name, model):
    outputs = model(**batch(name), labels=LABELS)
    outputs.loss.backward()
    got = gradients(model)
    assert got and all("lora_" in key or "modules_to_save" in key for key in got)
    return {"logits": outputs.logits.detach(), "loss": outputs.loss.item(), "gradients": got}


@models
def test_lora_then_patch(name, options, same_when_patched):
    same_when_patched(
        lambda: adapted(base(name), TARGETS[name]), lambda model: loss_and_gradients(name, model), **options
    )


@models
def test_patch_then_lora(name, options, same_when_patched):
    same_when_patched(
        lambda: base(name), lambda model: loss_and_gradients(name, adapted(model, TARGETS[name])), **options
    )


@models
@torch.no_grad()
def test_adapters_come_and_go(name, options, same_when_patched):
    """Each step changes weights of the projected tables that inference keeps."""
    if options.get("constant_weights"):
        options = {"unpad": True}  # merging writes through .data, and constant_weights forbids that

    def run(model):
        logits = lambda: model(**batch(name)).logits
        results = {"plain": logits()}
        model = adapted(model, TARGETS[name], ("default", "other"))
        results["adapted"] = logits()
        model.set_adapter("other")
        results["other"] = logits()
        model.merge_adapter()
        results["merged"] = logits()
        model.unmerge_adapter()
        results["unmerged"] = logits()
        with model.disable_adapter():
            results["disabled"] = logits()
        model.delete_adapter("other")
        results["deleted"] = model.merge_and_unload()(**batch(name)).logits
        return results

    got = same_when_patched(lambda: base(name), run, **options)
    assert_close(got["merged"], got["other"])
    assert_close(got["disabled"], got["plain"])
    assert (got["adapted"] - got["plain"]).abs().max() > 1e-3


@models
@torch.no_grad()
def test_batches_of_mixed_adapters(name, options, same_when_patched):
    chosen = ["first", "second", "__base__", "first"]
    assert len(chosen) == len(TEXTS)
    got = same_when_patched(
        lambda: adapted(base(name), OF_TEXTS_ALONE[name], ("first", "second")),
        lambda model: model(**batch(name), adapter_names=chosen).logits,
        **options,
    )
    alone = adapted(base(name), OF_TEXTS_ALONE[name], ("first", "second"))
    alone.set_adapter("second")
    assert_close(got[1], patch(alone)(**batch(name)).logits[1])


@names
@torch.no_grad()
def test_save_and_load(name, tmp_path):
    model = adapted(patch(base(name), unpad=True), TARGETS[name])
    expected = model(**batch(name)).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(name), tmp_path).eval()
    assert_close(loaded(**batch(name)).logits, expected)
    assert_close(patch(loaded)(**batch(name)).logits, expected)
    assert_close(unpatch(loaded)(**batch(name)).logits, expected)
