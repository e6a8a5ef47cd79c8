"""PEFT on native models, against PEFT on Hugging Face's with the same weights."""

import pytest
import torch
from native_models import build, inputs_of

from deberta_fast import DebertaForSequenceClassification
from deberta_fast.checkpoint import to_hf

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
HEAD = "ForSequenceClassification"
LENGTH = 19


def pair(name):
    """A native model, and Hugging Face's with its weights."""
    ours = build(name, HEAD)
    kind = getattr(transformers, type(ours).__name__)
    theirs = kind(kind.config_class(**ours.config.to_dict())).eval()
    version = 1 if name == "v1" else 2
    state = to_hf(ours.state_dict(), version=version, heads=ours.config.num_attention_heads, legacy=True)
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    return ours, theirs


PROMPTS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=4, encoder_hidden_size=16),
}


@pytest.mark.parametrize("unpad", [False, "auto"])
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("name", ["v1", "v3"])
def test_virtual_tokens(name, kind, unpad, tmp_path):
    inputs, found = inputs_of(HEAD, "right", LENGTH, labels=True), []
    for model in pair(name):
        if isinstance(model, DebertaForSequenceClassification):
            model.set_unpad(unpad)
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, PROMPTS[kind]()).eval()
        torch.manual_seed(1)
        for parameter in adapted.prompt_encoder.parameters():
            parameter.data.normal_(0, 0.3)
        out = adapted(**inputs)
        out.loss.backward()
        gradients = [p.grad for p in adapted.prompt_encoder.parameters() if p.grad is not None]
        assert gradients and adapted.base_model.deberta.encoder.layer[0].output.dense.weight.grad is None
        found.append((out.logits, out.loss, *gradients))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-3)
    adapted = peft.get_peft_model(build(name, HEAD), PROMPTS[kind]()).eval()
    expected = adapted(**inputs).logits
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(name, HEAD), tmp_path).eval()
    again.base_model.load_state_dict(adapted.base_model.state_dict())
    torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_targets():
    """PEFT's default targets fit v2 and v3. Native models lack its target for v1, so v1's targets must be named."""
    inputs = inputs_of(HEAD, "right", LENGTH, labels=True)
    for name, targets in (("v3", None), ("v2", None), ("v1", ["query_proj", "value_proj"]), ("v1", "all-linear")):
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=targets, init_lora_weights=False)
        adapted = peft.get_peft_model(build(name, HEAD), config).eval()
        adapted(**inputs).loss.backward()
        own = [p.grad for key, p in adapted.named_parameters() if "lora_" in key]
        assert len(own) >= 8 and all(x is not None and x.abs().sum() > 0 for x in own)
        merged = adapted(**inputs).logits
        torch.testing.assert_close(adapted.merge_and_unload()(**inputs).logits, merged, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="No modules were targeted"):
        peft.get_peft_model(build("v1", HEAD), peft.LoraConfig(task_type="SEQ_CLS"))


def test_adapters_by_sequence():
    """Each sequence can have its own adapter in a padded batch. Packed sequences raise an error."""
    model = build("v1", HEAD)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", target_modules=["query_proj", "value_proj"], modules_to_save=[], init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config, adapter_name="one").eval()
    adapted.add_adapter("two", config)
    inputs, asked = inputs_of(HEAD, "right", LENGTH), ["one", "two", "__base__"]
    expected = []
    for row, name in enumerate(asked):
        own = {key: x[row : row + 1] for key, x in inputs.items()}
        if name == "__base__":
            with adapted.disable_adapter():
                expected.append(adapted(**own).logits)
        else:
            adapted.set_adapter(name)
            expected.append(adapted(**own).logits)
    model.set_unpad(False)
    got = adapted(**inputs, adapter_names=asked).logits
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-5, rtol=1e-5)
    packed = {
        "input_ids": inputs["input_ids"].flatten(),
        "cu_seqlens": torch.arange(0, 3 * LENGTH + 1, LENGTH, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
        adapted(**packed, adapter_names=asked)
