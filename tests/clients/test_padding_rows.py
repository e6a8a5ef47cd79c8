"""Code that reads rows of padding: pooling without a mask, a first token behind left padding, losses over all rows."""

import pytest
import torch
import transformers
from tiny import batch, folder, gradients, models, names

import deberta_fast

# patch cannot know which rows of hidden states are read, so pooling is tested with options that keep all rows.
ALL_ROWS = [{}, {"unpad": True, "padding_rows": "hf"}]
HEADS = {
    "ForSequenceClassification": {"labels": torch.tensor([0, 1, 1, 0])},
    "ForTokenClassification": {},
    "ForQuestionAnswering": {
        "start_positions": torch.tensor([2, 5, 1, 0]),
        "end_positions": torch.tensor([3, 9, 2, 4]),
    },
}
heads = pytest.mark.parametrize("head", HEADS)
sides = pytest.mark.parametrize("side", ["right", "left"])


@names
@sides
@pytest.mark.parametrize("pool", ["mean", "max", "lstm"])
@pytest.mark.parametrize("options", ALL_ROWS, ids=str)
def test_pooling_over_all_rows(name, side, pool, options, same_when_patched):
    def run(model):
        torch.manual_seed(0)
        lstm = torch.nn.LSTM(64, 8, batch_first=True, bidirectional=True)
        states = model(**batch(name, side)).last_hidden_state
        pooled = {"mean": states.mean(1), "max": states.amax(1), "lstm": lstm(states)[0]}[pool]
        pooled.square().sum().backward()
        return {"states": states.detach(), "pooled": pooled.detach(), "gradients": gradients(model)}

    same_when_patched(lambda: transformers.AutoModel.from_pretrained(folder(name)), run, **options)


def loss_of_all_rows(name, head, side, model):
    inputs = batch(name, side, **HEADS[head])
    if head == "ForTokenClassification":
        inputs["labels"] = inputs["input_ids"] % 2  # also at padding
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs


@models
@heads
@sides
def test_losses_of_patched_models(name, head, side, options, same_when_patched):
    def run(model):
        outputs = loss_of_all_rows(name, head, side, model)
        return {"loss": outputs.loss.item(), "gradients": gradients(model)}

    build = lambda: getattr(transformers, "AutoModel" + head).from_pretrained(folder(name, head, num_labels=2))
    same_when_patched(build, run, **options)


@names
@heads
@sides
@pytest.mark.parametrize("unpad", [True, False, "auto"])
def test_losses_of_native_models(name, head, side, unpad):
    checkpoint = folder(name, head, num_labels=2)
    kind = ("Deberta" if name == "v1" else "DebertaV2") + head
    expected, got = (getattr(x, kind).from_pretrained(checkpoint).eval() for x in (transformers, deberta_fast))
    got.set_unpad(unpad)
    expected, got = (loss_of_all_rows(name, head, side, model) for model in (expected, got))
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=0)
